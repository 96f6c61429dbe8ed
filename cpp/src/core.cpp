#include "thalweg/core.hpp"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <thread>

#include "isa.hpp"
#include "thalweg/landscape.hpp"

namespace thalweg {
namespace {

// Cordero et al. 2008, in angstrom; index = atomic number. Carbon sp3, low-spin Mn, Fe, Co: as in ASE.
constexpr double kCovalentRadii[] = {0.2,  0.31, 0.28, 1.28, 0.96, 0.84, 0.76, 0.71, 0.66, 0.57, 0.58, 1.66, 1.41, 1.21,
                                     1.11, 1.07, 1.05, 1.02, 1.06, 2.03, 1.76, 1.70, 1.60, 1.53, 1.39, 1.39, 1.32, 1.26,
                                     1.24, 1.32, 1.22, 1.22, 1.20, 1.19, 1.20, 1.20, 1.16, 2.20, 1.95, 1.90, 1.75, 1.64,
                                     1.54, 1.47, 1.46, 1.42, 1.39, 1.45, 1.44, 1.42, 1.39, 1.39, 1.38, 1.39, 1.40, 2.44,
                                     2.15, 2.07, 2.04, 2.03, 2.01, 1.99, 1.98, 1.98, 1.96, 1.94, 1.92, 1.92, 1.89, 1.90,
                                     1.87, 1.87, 1.75, 1.70, 1.62, 1.51, 1.44, 1.41, 1.36, 1.36, 1.32, 1.45, 1.46, 1.48,
                                     1.40, 1.50, 1.50, 2.60, 2.21, 2.15, 2.06, 2.00, 1.96, 1.90, 1.87, 1.80, 1.69};

constexpr const char* kSymbols[] = {
    "X",  "H",  "He", "Li", "Be", "B",  "C",  "N",  "O",  "F",  "Ne", "Na", "Mg", "Al", "Si", "P",  "S",
    "Cl", "Ar", "K",  "Ca", "Sc", "Ti", "V",  "Cr", "Mn", "Fe", "Co", "Ni", "Cu", "Zn", "Ga", "Ge", "As",
    "Se", "Br", "Kr", "Rb", "Sr", "Y",  "Zr", "Nb", "Mo", "Tc", "Ru", "Rh", "Pd", "Ag", "Cd", "In", "Sn",
    "Sb", "Te", "I",  "Xe", "Cs", "Ba", "La", "Ce", "Pr", "Nd", "Pm", "Sm", "Eu", "Gd", "Tb", "Dy", "Ho",
    "Er", "Tm", "Yb", "Lu", "Hf", "Ta", "W",  "Re", "Os", "Ir", "Pt", "Au", "Hg", "Tl", "Pb", "Bi", "Po",
    "At", "Rn", "Fr", "Ra", "Ac", "Th", "Pa", "U",  "Np", "Pu", "Am", "Cm", "Bk", "Cf", "Es", "Fm", "Md",
    "No", "Lr", "Rf", "Db", "Sg", "Bh", "Hs", "Mt", "Ds", "Rg", "Cn", "Nh", "Fl", "Mc", "Lv", "Ts", "Og"};

struct Isa {
  const char* name;
  IsaLevel level;
  bool usable;
};

const Isa* isa_table(int& count) {
  static const Isa table[] = {
#ifdef THALWEG_HAVE_V4
      {"x86-64-v4", IsaLevel::v4, __builtin_cpu_supports("x86-64-v4") != 0},
#endif
#ifdef THALWEG_HAVE_V3
      {"x86-64-v3", IsaLevel::v3, __builtin_cpu_supports("x86-64-v3") != 0},
#endif
#if defined(__x86_64__)
      {"x86-64-v2", IsaLevel::v2, true},
#else
      {"portable", IsaLevel::v2, true},
#endif
  };
  count = static_cast<int>(sizeof(table) / sizeof(table[0]));
  return table;
}

std::atomic<const Isa*> chosen_isa{nullptr};

const Isa& isa() {
  const Isa* current = chosen_isa.load(std::memory_order_acquire);
  if (current == nullptr) {
    int count = 0;
    current = isa_table(count);
    while (!current->usable) ++current;
    chosen_isa.store(current, std::memory_order_release);
  }
  return *current;
}

// Cores that a cgroup quota allows (v2, then v1); 0 if there is no quota.
int cgroup_cores() {
  std::ifstream v2("/sys/fs/cgroup/cpu.max");
  std::string quota;
  double period = 0;
  if (v2 >> quota >> period && quota != "max" && period > 0)
    return std::max(1, static_cast<int>(std::ceil(std::atof(quota.c_str()) / period)));
  std::ifstream q("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), p("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  double microseconds = 0;
  if (q >> microseconds && p >> period && microseconds > 0 && period > 0)
    return std::max(1, static_cast<int>(std::ceil(microseconds / period)));
  return 0;
}

int available_cores() {
  int cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) cores = std::max(1, CPU_COUNT(&set));
#endif
  const int quota = cgroup_cores();
  return quota > 0 ? std::min(cores, quota) : cores;
}

}  // namespace

IsaLevel isa_level() noexcept { return isa().level; }
const char* active_isa() noexcept { return isa().name; }

bool force_isa(const char* name) noexcept {
  int count = 0;
  const Isa* table = isa_table(count);
  for (int k = 0; k < count; ++k) {
    if (std::strcmp(table[k].name, name) == 0 && table[k].usable) {
      chosen_isa.store(table + k, std::memory_order_release);
      return true;
    }
  }
  return false;
}

int default_threads() {
  if (const char* text = std::getenv("THALWEG_NUM_THREADS")) {
    const int wanted = std::atoi(text);
    if (wanted >= 1 && wanted <= kMostThreads) return wanted;
    throw Error("THALWEG_NUM_THREADS must be a whole number from 1 to " + std::to_string(kMostThreads) +
                ", but it is '" + text + "'");
  }
  // Affinity and quota are set before a program starts; reading them again costs 40 us.
  static const int cores = available_cores();
  return cores;
}

double cell_volume(const double* c) {
  return std::abs(c[0] * (c[4] * c[8] - c[5] * c[7]) - c[1] * (c[3] * c[8] - c[5] * c[6]) +
                  c[2] * (c[3] * c[7] - c[4] * c[6]));
}

double covalent_radius(std::int32_t number) {
  constexpr std::int32_t count = sizeof(kCovalentRadii) / sizeof(kCovalentRadii[0]);
  if (number < 1 || number >= count)
    throw Error("no covalent radius is known for atomic number " + std::to_string(number) + "; expected 1 to " +
                std::to_string(count - 1));
  return kCovalentRadii[number];
}

const char* chemical_symbol(std::int32_t number) {
  constexpr std::int32_t count = sizeof(kSymbols) / sizeof(kSymbols[0]);
  return number >= 0 && number < count ? kSymbols[number] : kSymbols[0];
}

void BatchView::check() const {
  if (offsets.empty()) throw Error("a batch needs offsets of length n + 1, but they are empty");
  const std::size_t n = size();
  if (offsets.front() != 0)
    throw Error("offsets must start at 0, but they start at " + std::to_string(offsets.front()));
  for (std::size_t i = 0; i < n; ++i)
    if (offsets[i + 1] < offsets[i])
      throw Error("offsets must not fall, but they do after structure " + std::to_string(i));
  const std::size_t m = static_cast<std::size_t>(offsets.back());
  const auto expect = [](const char* name, std::size_t wanted, std::size_t came) {
    if (wanted != came)
      throw Error(std::string(name) + " must hold " + std::to_string(wanted) + " values, but it holds " +
                  std::to_string(came));
  };
  expect("numbers", m, numbers.size());
  expect("positions", 3 * m, positions.size());
  expect("cells", 9 * n, cells.size());
  expect("pbc", 3 * n, pbc.size());
  if (!fixed.empty()) expect("fixed", 3 * m, fixed.size());
}

}  // namespace thalweg
