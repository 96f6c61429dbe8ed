// Timings of the C++ core without Python, on one thread: thalweg_bench [--filter TEXT] [--json]
//
// Processor time of one thread; every row is repeated, best and median are printed beside the target. Inputs are fixed
// by a key; positions change from call to call by 0.001 angstrom so that nothing is answered from a cache.
//
// roofline: the least time that the row's work could take on this machine (roofline.hpp: peaks measured before the
// first row) over the best. The work is what the mathematics asks for, written beside each row: an exponential or the
// like counts as kExp operations, a distance as 10, index work and masks as nothing. Rows whose work is not arithmetic
// have none.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "roofline.hpp"
#include "thalweg/build.hpp"
#include "thalweg/density.hpp"
#include "thalweg/fingerprint.hpp"
#include "thalweg/gpr.hpp"
#include "thalweg/neighbors.hpp"
#include "thalweg/potentials.hpp"
#include "thalweg/qmap.hpp"
#include "thalweg/relax.hpp"
#include "thalweg/soap.hpp"
#include "thalweg/surrogate.hpp"

using namespace thalweg;
using thalweg_bench::Work;

namespace {

constexpr double kExp = 20, kDistance = 10;

/// Processor time of this thread [s]: what other programs do on the machine counts little.
double now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

/// Structures of equal composition in equal cells.
struct Structures {
  std::vector<double> positions, cells;
  std::vector<std::int32_t> numbers;
  std::vector<std::int64_t> offsets{0};
  std::vector<std::uint8_t> pbc, fixed;

  void add(const double* x, const std::vector<std::int32_t>& species, const double* cell,
           const std::array<std::uint8_t, 3>& periodic) {
    positions.insert(positions.end(), x, x + 3 * species.size());
    numbers.insert(numbers.end(), species.begin(), species.end());
    offsets.push_back(static_cast<std::int64_t>(numbers.size()));
    cells.insert(cells.end(), cell, cell + 9);
    pbc.insert(pbc.end(), periodic.begin(), periodic.end());
  }
  std::size_t size() const { return offsets.size() - 1; }
  BatchView view() const { return {positions, numbers, offsets, cells, pbc, fixed}; }
  StructureView operator[](std::size_t row) const { return view()[row]; }
};

/// A structure's positions and copies moved by 0.001 angstrom, given in turn.
class Moving {
 public:
  explicit Moving(const std::vector<double>& start) {
    Random random(Key{77, 0}, 0);
    for (auto& copy : copies_) {
      copy = start;
      for (double& x : copy) x += random.uniform(-1e-3, 1e-3);
    }
  }
  const double* next() { return copies_[turn_++ % copies_.size()].data(); }

 private:
  std::array<std::vector<double>, 16> copies_;
  std::size_t turn_ = 0;
};

const std::vector<std::int32_t> kAu4Ni4 = {79, 79, 79, 79, 28, 28, 28, 28};
constexpr double kCell[9] = {12, 0, 0, 0, 12, 0, 0, 0, 12};
constexpr std::array<std::uint8_t, 3> kOpen = {0, 0, 0};

BuildSettings cluster_box() {
  BuildSettings settings;
  settings.box.active = true;
  for (int k = 0; k < 3; ++k) {
    settings.box.corner[k] = 3.0;
    settings.box.vectors[4 * k] = 6.0;
  }
  return settings;
}

Structures random_clusters(std::size_t count, std::uint64_t first_row) {
  const StructureView empty{0, nullptr, nullptr, kCell, kOpen.data(), nullptr};
  Structures out;
  while (out.size() < count) {
    const BuildResult built = random_structures(empty, kAu4Ni4, cluster_box(), count, Key{1, 2}, first_row, 1);
    for (std::size_t row = 0; row < count && out.size() < count; ++row)
      if (built.ok[row]) out.add(built.positions.data() + 24 * row, kAu4Ni4, kCell, kOpen);
    first_row += count;
  }
  return out;
}

/// Au(111), 5 x 4 x 3 atoms, 25 angstrom high, and the box over it.
struct Slab {
  std::vector<double> positions;
  std::vector<std::int32_t> numbers = std::vector<std::int32_t>(60, 79);
  std::vector<std::uint8_t> fixed = std::vector<std::uint8_t>(180, 1);
  double cell[9] = {};
  std::array<std::uint8_t, 3> pbc = {1, 1, 0};
  BuildSettings settings;

  Slab() {
    const double bond = 4.08 / std::sqrt(2.0), layer = 4.08 / std::sqrt(3.0);
    const double a[3] = {bond, 0, 0}, b[3] = {bond / 2, bond * std::sqrt(0.75), 0};
    for (int k = 0; k < 3; ++k) {
      cell[k] = 5 * a[k];
      cell[3 + k] = 4 * b[k];
    }
    cell[8] = 25.0;
    for (int l = 0; l < 3; ++l)
      for (int i = 0; i < 5; ++i)
        for (int j = 0; j < 4; ++j)
          for (int k = 0; k < 3; ++k)
            positions.push_back((i + l / 3.0) * a[k] + (j + l / 3.0) * b[k] + (k == 2 ? 5.0 + l * layer : 0.0));
    Confinement& box = settings.box;
    box.active = true;
    box.corner[2] = 5.0 + 2 * layer + 1.0;
    std::copy_n(cell, 6, box.vectors);
    box.vectors[8] = 5.0;
    box.open[0] = box.open[1] = 1;
  }
  StructureView view() const { return {60, positions.data(), numbers.data(), cell, pbc.data(), fixed.data()}; }
};

Structures slab_with_nickel(std::size_t count) {
  const Slab slab;
  const std::vector<std::int32_t> nickel(6, 28);
  std::vector<std::int32_t> species = slab.numbers;
  species.insert(species.end(), nickel.begin(), nickel.end());
  Structures out;
  for (std::uint64_t row = 0; out.size() < count; ++row) {
    const BuildResult built = random_structures(slab.view(), nickel, slab.settings, 1, Key{1, 3}, row, 1);
    if (built.ok[0]) out.add(built.positions.data(), species, slab.cell, slab.pbc);
  }
  return out;
}

// ---- measuring
// -------------------------------------------------------------------------------------------------------

struct Row {
  std::string name, unit;
  double best, median, target;  // target 0: none
  bool higher_is_better;
  double roofline;  // least time over best; 0: none
};

class Bench {
 public:
  Bench(std::string filter, bool json)
      : filter_(std::move(filter)), json_(json), peaks_(thalweg_bench::measure_peaks(now)) {}

  bool wants(const std::string& name) const { return name.find(filter_) != std::string::npos; }

  /// Time of each of `pieces` in a call, in a unit of which a second holds `unit_per_second`; `least`: of each.
  void time(const std::string& name, const char* unit, double unit_per_second, double target,
            const std::function<void()>& call, const Work& least = {}, double pieces = 1) {
    if (!wants(name)) return;
    double start = now();
    call();  // warm
    const double once = std::max(now() - start, 1e-9);
    const int calls = std::clamp(static_cast<int>(0.004 / once), 1, 20000);
    const int repeats = once > 0.2 ? 5 : 15;
    std::vector<double> seconds;
    for (int repeat = 0; repeat < repeats; ++repeat) {
      start = now();
      for (int k = 0; k < calls; ++k) call();
      seconds.push_back((now() - start) / calls / pieces);
    }
    report(name, unit, seconds, unit_per_second, target, least);
  }
  /// Work done per second by each call, which returns how much it did.
  void rate(const std::string& name, const char* unit, double target, const std::function<double()>& call) {
    if (!wants(name)) return;
    call();
    std::vector<double> rates;
    for (int repeat = 0; repeat < 9; ++repeat) {
      const double start = now();
      const double work = call();
      rates.push_back(work / (now() - start));
    }
    std::sort(rates.begin(), rates.end(), std::greater<>());
    rows_.push_back({name, unit, rates.front(), rates[rates.size() / 2], target, true, 0});
    print(rows_.back());
  }
  void report(const std::string& name, const char* unit, std::vector<double> seconds, double unit_per_second,
              double target, const Work& least = {}) {
    std::sort(seconds.begin(), seconds.end());
    rows_.push_back({name, unit, seconds.front() * unit_per_second, seconds[seconds.size() / 2] * unit_per_second,
                     target, false, peaks_.seconds(least) / seconds.front()});
    print(rows_.back());
  }
  void header() const {
    if (!json_)
      std::printf(
          "%s, processor time of one thread; peaks: %.3g (float64) and %.3g (float32) GFLOP/s, %.3g GB/s\n"
          "%-58s %12s %12s  %-8s %8s  %s\n",
          active_isa(), 1e-9 * peaks_.flops64, 1e-9 * peaks_.flops32, 1e-9 * peaks_.bytes, "", "best", "median", "",
          "roofline", "target");
  }
  int finish() const {
    if (json_) {
      std::printf(
          "{\"isa\": \"%s\", \"threads\": 1, \"peaks\": {\"flops64\": %.4g, \"flops32\": %.4g, \"bytes\": %.4g},"
          " \"rows\": [",
          active_isa(), peaks_.flops64, peaks_.flops32, peaks_.bytes);
      for (std::size_t k = 0; k < rows_.size(); ++k) {
        const Row& r = rows_[k];
        std::printf("%s\n  {\"name\": \"%s\", \"unit\": \"%s\", \"best\": %.6g, \"median\": %.6g", k ? "," : "",
                    r.name.c_str(), r.unit.c_str(), r.best, r.median);
        if (r.roofline > 0) std::printf(", \"roofline\": %.3g", r.roofline);
        if (r.target > 0) std::printf(", \"target\": %.6g, \"met\": %s", r.target, met(r) ? "true" : "false");
        std::printf("}");
      }
      std::printf("\n]}\n");
    }
    if (rows_.empty()) std::fprintf(stderr, "thalweg_bench: no benchmark has '%s' in its name\n", filter_.c_str());
    return rows_.empty() ? 1 : 0;
  }

 private:
  static bool met(const Row& r) { return r.higher_is_better ? r.median >= r.target : r.median <= r.target; }
  void print(const Row& r) const {
    if (json_) return;
    std::printf("%-58s %12.5g %12.5g  %-8s", r.name.c_str(), r.best, r.median, r.unit.c_str());
    if (r.roofline > 0)
      std::printf(" %6.1f %% ", 100 * r.roofline);
    else
      std::printf(" %6s   ", "-");
    if (r.target > 0) std::printf(" %s %g %s", r.higher_is_better ? ">" : "<=", r.target, met(r) ? "met" : "MISSED");
    std::printf("\n");
    std::fflush(stdout);
  }

  std::string filter_;
  bool json_;
  thalweg_bench::Peaks peaks_;
  std::vector<Row> rows_;
};

constexpr double kMicro = 1e6, kMilli = 1e3;

// ---- benchmarks
// ------------------------------------------------------------------------------------------------------

/// Pairs of atoms, images counted, closer than this.
double pairs_within(double cutoff, const Structures& structure) {
  NeighborList list(cutoff);
  list.update(structure[0]);
  return static_cast<double>(list.size());
}

/// Pairs of neighbours of each atom, both closer than this.
double triplets_within(double cutoff, const Structures& structure) {
  NeighborList list(cutoff);
  list.update(structure[0]);
  std::vector<double> around(structure[0].n);
  for (std::size_t p = 0; p < list.size(); ++p)
    for (const std::int32_t atom : {list.i()[p], list.j()[p]}) around[static_cast<std::size_t>(atom)] += 1;
  double triplets = 0;
  for (const double m : around) triplets += m * (m - 1) / 2;
  return triplets;
}

/// flops: of each pair within the cutoff, energy and forces.
void bench_landscape(Bench& bench, const char* name, double target, const Landscape& landscape,
                     const Structures& structure, double cutoff, double flops) {
  if (!bench.wants(name)) return;
  const auto evaluator = landscape.evaluator(structure.view());
  Moving moving(structure.positions);
  double energy;
  std::vector<double> forces(structure.positions.size());
  const std::int64_t row = 0;
  bench.time(name, "us", kMicro, target, [&] { evaluator->evaluate({&row, 1}, moving.next(), &energy, forces.data()); },
             {.flops64 = flops * pairs_within(cutoff, structure)});
}

/// An orthogonal cell of a honeycomb sheet, 4 atoms times repeats[0] times repeats[1], rattled by 0.05 angstrom.
Structures sheet(std::int32_t one, std::int32_t other, double bond, const std::array<int, 2>& repeats) {
  Random random(Key{9, 9}, 0);
  const double side[2] = {3 * bond, std::sqrt(3.0) * bond};
  const double sites[4][2] = {{0, 0}, {1, 0}, {1.5, std::sqrt(0.75)}, {2.5, std::sqrt(0.75)}};
  std::vector<double> x;
  std::vector<std::int32_t> species;
  for (int i = 0; i < repeats[0]; ++i)
    for (int j = 0; j < repeats[1]; ++j)
      for (int site = 0; site < 4; ++site) {
        x.push_back(bond * sites[site][0] + i * side[0] + random.uniform(-0.05, 0.05));
        x.push_back(bond * sites[site][1] + j * side[1] + random.uniform(-0.05, 0.05));
        x.push_back(6.0 + random.uniform(-0.05, 0.05));
        species.push_back(site % 2 ? other : one);
      }
  const double cell[9] = {repeats[0] * side[0], 0, 0, 0, repeats[1] * side[1], 0, 0, 0, 12};
  Structures out;
  out.add(x.data(), species, cell, {1, 1, 0});
  return out;
}

void potentials(Bench& bench) {
  const Structures au4ni4 = random_clusters(1, 0);
  // EMT: sigma1 and pair sum from both sides, a cutoff: five exponentials; cutoff of gold. Morse: one exponential.
  const double emt = 5 * kExp + kDistance + 40, morse = kExp + kDistance + 20;
  bench_landscape(bench, "EMT Au4Ni4, energy and forces", 20, Emt(), au4ni4, 5.36, emt);
  if (bench.wants("Lennard-Jones LJ38, energy and forces")) {
    Structures lj38;
    Random random(Key{4, 4}, 0);
    std::vector<double> x;
    for (int i = 0; x.size() < 114; ++i)  // the first 38 sites of a rattled 4 x 4 x 4 lattice
      for (int k = 0; k < 3; ++k) x.push_back(1.1 * ((i >> 2 * k) & 3) + random.uniform(-0.1, 0.1));
    lj38.add(x.data(), std::vector<std::int32_t>(38, 18), kCell, kOpen);
    bench_landscape(bench, "Lennard-Jones LJ38, energy and forces", 6, LennardJones({1, 1, 20, 0, false}), lj38, 20,
                    kDistance + 15);
  }
  bench_landscape(bench, "pair prior (bonding) Au4Ni4, energy and forces", 0, PairPrior(PairPrior::Settings{}), au4ni4,
                  6.8, morse);
  bench_landscape(bench, "EMT Au60Ni6 slab, energy and forces", 0, Emt(), slab_with_nickel(1), 5.36, emt);
  // Tersoff, a bond with four angles: repulsion, attraction and cutoff; cosine, exponential and slopes of each angle.
  const double tersoff = 3 * kExp + kDistance + 60 + 4 * 60;
  bench_landscape(bench, "Tersoff graphene, 24 atoms, energy and forces", 0, Tersoff(Tersoff::published("C")),
                  sheet(6, 6, 1.46, {2, 3}), 2.1, tersoff);
  bench_landscape(bench, "Tersoff BN sheet, 32 atoms, energy and forces", 0, Tersoff(Tersoff::published("BN")),
                  sheet(5, 7, 1.45, {2, 4}), 2.1, tersoff);
}

void neighbors(Bench& bench) {
  const Structures structures[] = {random_clusters(1, 0), slab_with_nickel(1)};
  const char* names[] = {"neighbour refresh Au4Ni4, 6.8 A", "neighbour refresh Au60Ni6 slab, 6.8 A"};
  const double targets[] = {1, 0};
  for (int k = 0; k < 2; ++k) {
    NeighborList list(6.8);
    Moving moving(structures[k].positions);
    StructureView view = structures[k][0];
    bench.time(names[k], "us", kMicro, targets[k], [&] {
      view.positions = moving.next();
      list.update(view);
    });
  }
}

void fingerprints(Bench& bench) {
  const Structures structures[] = {random_clusters(1, 0), slab_with_nickel(1)};
  const std::string names[] = {"Au4Ni4", "Au60Ni6 slab"};
  const double values_target[] = {0, 500}, jacobian_target[] = {0, 1500};
  for (int k = 0; k < 2; ++k) {
    const Structures& s = structures[k];
    const Fingerprint fingerprint({}, s.numbers, k == 1);
    Fingerprint::Workspace workspace(fingerprint);
    Moving moving(s.positions);
    StructureView view = s[0];
    std::vector<double> features(fingerprint.size()), weights(fingerprint.size()), gradient(s.positions.size()),
        jacobian(s.positions.size() * fingerprint.size());
    Random random(Key{5, 5}, 0);
    for (double& w : weights) w = random.uniform(-1, 1);
    fingerprint.values(view, features.data(), workspace);
    // A pair touches 2 x 0.8 / 0.2 = 8 bins of 0.2 angstrom, a triplet 15 of pi / 30: 6 operations for the smeared step
    // at each edge; a triplet has an angle (kExp) and two cutoff functions. Slopes: Gaussians at the edges, a sum over
    // bins.
    const double pairs = pairs_within(6.8, s), triplets = triplets_within(4, s);
    const Work values{.flops64 = pairs * (kDistance + 10 + 9 * 6) + triplets * (kExp + 10 + 16 * 6)},
        slopes{.flops64 = pairs * (9 * 8 + 10) + triplets * (16 * 8 + 30)};
    bench.time(
        "fingerprint values " + names[k], "us", kMicro, values_target[k],
        [&] {
          view.positions = moving.next();
          fingerprint.values(view, features.data(), workspace);
        },
        values);
    bench.time(
        "fingerprint contract " + names[k], "us", kMicro, 0,
        [&] { fingerprint.contract(weights.data(), 1.0, gradient.data(), workspace); }, slopes);
    bench.time("fingerprint Jacobian " + names[k], "us", kMicro, jacobian_target[k],
               [&] { fingerprint.jacobian(jacobian.data(), workspace); });
  }
}

/// Rutile Ti8O16 and B2 NiAl with 200 atoms, rattled by 0.05 angstrom.
Structures rutile() {
  Random random(Key{11, 1}, 0);
  const double a = 4.594, c = 2.959, u = 0.305;
  const double sites[6][3] = {{0, 0, 0},   {.5, .5, .5},         {u, u, 0},
                              {-u, -u, 0}, {.5 + u, .5 - u, .5}, {.5 - u, .5 + u, .5}};
  std::vector<double> x;
  std::vector<std::int32_t> species;
  for (int i = 0; i < 2; ++i)
    for (int k = 0; k < 2; ++k)
      for (int site = 0; site < 6; ++site) {
        x.push_back((i + sites[site][0]) * a + random.uniform(-0.05, 0.05));
        x.push_back(sites[site][1] * a + random.uniform(-0.05, 0.05));
        x.push_back((k + sites[site][2]) * c + random.uniform(-0.05, 0.05));
        species.push_back(site < 2 ? 22 : 8);
      }
  const double cell[9] = {2 * a, 0, 0, 0, a, 0, 0, 0, 2 * c};
  Structures out;
  out.add(x.data(), species, cell, {1, 1, 1});
  return out;
}

Structures nickel_aluminium() {
  Random random(Key{11, 2}, 0);
  const double a = 2.88, cell[9] = {5 * a, 0, 0, 0, 5 * a, 0, 0, 0, 4 * a};
  std::vector<double> x;
  std::vector<std::int32_t> species;
  for (int site = 0; site < 200; ++site) {
    const int place[3] = {site / 2 % 5, site / 10 % 5, site / 50};
    for (const int p : place) x.push_back((p + 0.5 * (site % 2)) * a + random.uniform(-0.05, 0.05));
    species.push_back(site % 2 ? 13 : 28);
  }
  Structures out;
  out.add(x.data(), species, cell, {1, 1, 1});
  return out;
}

/// r_cut 7 A, n_max 3, l_max 2, sigma 0.5 A. Targets: what dscribe's values and a fifth of
/// featomic's derivative took on an AVX2 machine.
void soaps(Bench& bench) {
  const Structures structures[] = {rutile(), slab_with_nickel(1), nickel_aluminium()};
  const std::string names[] = {"Ti8O16", "Au60Ni6 slab", "NiAl 200"};
  const double values_target[] = {1650, 1800, 11400}, forces_target[] = {1780, 4400, 26800};
  for (int k = 0; k < 3; ++k) {
    const Structures& s = structures[k];
    SoapSettings settings;
    settings.r_cut = 7.0, settings.n_max = 3, settings.l_max = 2;
    const Soap soap(settings, s.numbers);
    const LocalDensity density({}, s.numbers);
    Soap::Workspace workspace(soap);
    LocalDensity::Workspace of_density(density);
    Moving moving(s.positions);
    StructureView view = s[0];
    const std::size_t n = view.n, longest = n * std::max(soap.size(), density.size());
    std::vector<double> features(longest), weights(longest), gradient(3 * n);
    Random random(Key{5, 6}, 0);
    for (double& w : weights) w = random.uniform(-1, 1);
    // Each pair: radial functions and spherical harmonics once, sums over them for both atoms; each atom: products of
    // all coefficients of equal l, m. Slopes cost twice that (soap.hpp).
    const double radial = settings.n_max * (settings.l_max + 1), harmonics = std::pow(settings.l_max + 1, 2),
                 blocks = 0.5 * static_cast<double>(soap.species().size() * (soap.species().size() + 1));
    const Work values{.flops64 = pairs_within(soap.reach(), s) * (kDistance + radial * (kExp + 2 * settings.n_max) +
                                                                  harmonics * 6 + 2 * 2 * settings.n_max * harmonics) +
                                 static_cast<double>(n) * blocks * 2 * settings.n_max * settings.n_max * harmonics},
        with_forces{.flops64 = 3 * values.flops64},
        of_pairs{.flops64 = pairs_within(11.9, s) * (kDistance + 2 * kExp + 30)};  // an exponential and a cosine
    bench.time(
        "SOAP values " + names[k], "us", kMicro, values_target[k],
        [&] {
          view.positions = moving.next();
          soap.values(view, features.data(), workspace);
        },
        values);
    bench.time(
        "SOAP values and forces " + names[k], "us", kMicro, forces_target[k],
        [&] {
          view.positions = moving.next();
          soap.values(view, features.data(), workspace);
          soap.contract(weights.data(), 1.0, gradient.data(), workspace);
        },
        with_forces);
    bench.time(
        "local density and forces " + names[k], "us", kMicro, 0,
        [&] {
          view.positions = moving.next();
          density.values(view, features.data(), of_density);
          density.contract(weights.data(), 1.0, gradient.data(), of_density);
        },
        of_pairs);
  }
}

/// Random Au4Ni4 clusters with their features and EMT energies, made when first needed.
struct Training {
  Structures clusters = random_clusters(2020, 1000);
  std::shared_ptr<Fingerprint> fingerprint = std::make_shared<Fingerprint>(FingerprintSettings{}, kAu4Ni4, false);
  std::vector<double> features, energies;

  Training() {
    features.resize(clusters.size() * fingerprint->size());
    Fingerprint::Workspace workspace(*fingerprint);
    for (std::size_t row = 0; row < clusters.size(); ++row)
      fingerprint->values(clusters[row], features.data() + row * fingerprint->size(), workspace);
    energies.resize(clusters.size());
    std::vector<double> forces(clusters.positions.size());
    evaluate(Emt(), clusters.view(), energies, forces, 1);
  }
  std::span<const double> x(std::size_t n) const { return std::span(features).first(n * fingerprint->size()); }
  std::span<const double> y(std::size_t n) const { return std::span(energies).first(n); }
  std::shared_ptr<Gpr> fitted(std::size_t n) const {
    auto gpr = std::make_shared<Gpr>(fingerprint->size(), Kernel{});
    gpr->fit(x(n), y(n));
    return gpr;
  }
};

const Training& training() {
  static const Training all;
  return all;
}

void gaussian_process(Bench& bench) {
  const std::string refit = "GPR refit n = 1000", kernel = "GPR refit n = 1000 from cached distances",
                    likelihood = "GPR likelihood gradient n = 1000", append = "GPR append n = 2000";
  if (bench.wants(refit) || bench.wants(kernel) || bench.wants(likelihood)) {
    const Training& data = training();
    const auto gpr = data.fitted(1000);
    // Half a matrix of products over D features and of two exponentials; a Cholesky factor; for the slopes an inverse.
    const double n = 1000, d = static_cast<double>(data.fingerprint->size()), factor = n * n * n / 3,
                 kernels = n * n * kExp;
    bench.time(refit, "ms", kMilli, 25, [&] { gpr->fit(data.x(1000), data.y(1000)); },
               {.flops64 = n * n * d + kernels + factor});
    bench.time(kernel, "ms", kMilli, 0, [&] { gpr->set_kernel(gpr->kernel()); }, {.flops64 = kernels + factor});
    bench.time(likelihood, "ms", kMilli, 45, [&] { (void)gpr->likelihood(gpr->kernel()); },
               {.flops64 = kernels + 3 * factor + 6 * n * n});
  }
  if (bench.wants(append)) {
    const Training& data = training();
    const auto gpr = data.fitted(1990);
    const std::size_t d = data.fingerprint->size();
    std::vector<double> seconds;
    for (std::size_t n = 1990; n < 2010; ++n) {
      const double start = now();
      gpr->append(std::span(data.features).subspan(n * d, d), data.energies[n]);
      seconds.push_back(now() - start);
    }
    // A row of products and one triangular solve, which reads half a matrix.
    const double n = 2000;
    bench.report(append, "ms", seconds, kMilli, 2,
                 {.flops64 = 2 * n * static_cast<double>(d) + n * n, .bytes = 4 * n * n});
  }
}

void surrogate(Bench& bench) {
  constexpr std::size_t batch = 16;
  for (const std::size_t n : {40ul, 500ul, 2000ul}) {
    const std::string name = "LCB energy and forces Au4Ni4, n = " + std::to_string(n) + ", per candidate of 16";
    if (!bench.wants(name)) continue;
    const Training& data = training();
    const Surrogate lcb(data.fingerprint, data.fitted(n), nullptr, {}, 2.0);
    const Structures candidates = random_clusters(batch, 900000);
    const auto evaluator = lcb.evaluator(candidates.view());
    // Products with n rows of features, there and back; two triangular solves, for sigma and for its slopes; the
    // fingerprint is left out.
    const double m = static_cast<double>(n);
    const Work least{.flops64 = 4 * m * static_cast<double>(data.fingerprint->size()) + 2 * m * kExp + 2 * m * m};
    Moving moving(candidates.positions);
    std::vector<double> energies(batch), forces(candidates.positions.size());
    std::vector<std::int64_t> rows(batch);
    for (std::size_t k = 0; k < batch; ++k) rows[k] = static_cast<std::int64_t>(k);
    bench.time(
        name, "us", kMicro,
        n == 500    ? 120
        : n == 2000 ? 800
                    : 0,
        [&] { evaluator->evaluate(rows, moving.next(), energies.data(), forces.data()); }, least, batch);
  }
  const std::string name = "relaxation on LCB Au4Ni4, n = 500";
  if (bench.wants(name)) {
    const Training& data = training();
    const Surrogate lcb(data.fingerprint, data.fitted(500), nullptr, {}, 2.0);
    const Structures candidates = random_clusters(batch, 900000);
    bench.rate(name, "steps/s", 8000, [&] {
      const RelaxResult result = relax(lcb, candidates.view(), {}, cluster_box().box, 1);
      double steps = 0;
      for (const std::int32_t count : result.evaluations) steps += count;
      return steps;
    });
  }
}

Structures aniline() {
  const double x[14][3] = {{0, 1.40, 0},      {1.21, 0.70, 0},  {1.21, -0.70, 0},  {0, -1.40, 0},     {-1.21, -0.70, 0},
                           {-1.21, 0.70, 0},  {0, 2.79, 0},     {2.15, 1.24, 0},   {2.15, -1.24, 0},  {0, -2.48, 0},
                           {-2.15, -1.24, 0}, {-2.15, 1.24, 0}, {0.85, 3.29, 0.2}, {-0.85, 3.29, 0.2}};
  std::vector<double> positions;
  for (const auto& atom : x)
    for (const double coordinate : atom) positions.push_back(7 + coordinate);
  const double cell[9] = {14, 0, 0, 0, 14, 0, 0, 0, 14};
  Structures out;
  out.add(positions.data(), {6, 6, 6, 6, 6, 6, 7, 1, 1, 1, 1, 1, 1, 1}, cell, kOpen);
  return out;
}

/// Energy and forces by the mean of a Gaussian process of 500 rattled copies. Targets: what an early prototype took
/// (AVX2).
void fingerprint_and_mean(Bench& bench) {
  constexpr std::size_t n = 500, batch = 64;
  const std::string names[] = {"C6H7N", "Ti8O16", "Au60Ni6 slab", "NiAl 200"};
  const double alone[] = {116, 608, 345, 2698}, together[] = {79, 564, 320, 2601};
  for (int k = 0; k < 4; ++k) {
    const std::string name = "fingerprint and GP mean, energy and forces, n = 500, " + names[k],
                      batched = name + ", per structure of 64";
    if (!bench.wants(name) && !bench.wants(batched)) continue;
    const Structures s = k == 0 ? aniline() : k == 1 ? rutile() : k == 2 ? slab_with_nickel(1) : nickel_aluminium();
    const auto fingerprint = std::make_shared<Fingerprint>(FingerprintSettings{}, s.numbers, s.pbc[0] != 0);
    Random random(Key{12, static_cast<std::uint64_t>(k)}, 0);
    Structures copies;
    for (std::size_t row = 0; row < n; ++row) {
      std::vector<double> x = s.positions;
      for (double& coordinate : x) coordinate += random.uniform(-0.2, 0.2);
      copies.add(x.data(), s.numbers, s.cells.data(), {s.pbc[0], s.pbc[1], s.pbc[2]});
    }
    std::vector<double> features(n * fingerprint->size()), energies(n);
    Fingerprint::Workspace workspace(*fingerprint);
    for (std::size_t row = 0; row < n; ++row) {
      fingerprint->values(copies[row], features.data() + row * fingerprint->size(), workspace);
      energies[row] = random.uniform(-1, 1);
    }
    auto gpr = std::make_shared<Gpr>(fingerprint->size(), Kernel{});
    gpr->fit(features, energies);
    const Surrogate mean(fingerprint, gpr, nullptr, {}, 0.0);
    for (const std::size_t count : {std::size_t{1}, batch}) {
      Structures candidates;
      for (std::size_t row = 0; row < count; ++row)
        candidates.add(copies[row].positions, s.numbers, s.cells.data(), {s.pbc[0], s.pbc[1], s.pbc[2]});
      const auto evaluator = mean.evaluator(candidates.view());
      Moving moving(candidates.positions);
      std::vector<double> energy(count), forces(candidates.positions.size());
      std::vector<std::int64_t> rows(count);
      for (std::size_t row = 0; row < count; ++row) rows[row] = static_cast<std::int64_t>(row);
      bench.time(
          count == 1 ? name : batched, "us", kMicro, count == 1 ? alone[k] : together[k],
          [&] { evaluator->evaluate(rows, moving.next(), energy.data(), forces.data()); }, {},
          static_cast<double>(count));
    }
  }
}

void building(Bench& bench) {
  const StructureView empty{0, nullptr, nullptr, kCell, kOpen.data(), nullptr};
  std::uint64_t row = 0;
  bench.rate("random Au4Ni4 in a 6 A box", "/s", 50000, [&] {
    const BuildResult built = random_structures(empty, kAu4Ni4, cluster_box(), 2000, Key{6, 6}, row += 2000, 1);
    return static_cast<double>(std::count(built.ok.begin(), built.ok.end(), 1));
  });
  const Slab slab;
  const std::vector<std::int32_t> nickel(6, 28);
  bench.rate("random Ni6 on Au60", "/s", 5000, [&] {
    const BuildResult built = random_structures(slab.view(), nickel, slab.settings, 400, Key{6, 7}, row += 400, 1);
    return static_cast<double>(std::count(built.ok.begin(), built.ok.end(), 1));
  });
}

/// ASLA's network: four layers of equal kernels, 10 channels between them, Gaussians of atoms.
std::shared_ptr<const QNetwork> q_network(int dimension, int kernel, int dilation, int species, int width) {
  Random random(Key{8, 8}, 0);
  const auto power = [&](int k) { return static_cast<std::size_t>(dimension == 2 ? k * k : k * k * k); };
  std::vector<QLayer> layers;
  int inputs = species;
  for (int l = 0; l < 4; ++l) {
    QLayer layer{inputs, l < 3 ? 10 : species, kernel, dilation, {}, {}};
    const std::size_t fan = static_cast<std::size_t>(inputs) * power(kernel);
    const double scale = std::sqrt(6.0 / static_cast<double>(fan));
    for (std::size_t k = 0; k < fan * static_cast<std::size_t>(layer.outputs); ++k)
      layer.weights.push_back(static_cast<float>(random.uniform(-scale, scale)));
    for (int o = 0; o < layer.outputs; ++o) layer.bias.push_back(static_cast<float>(random.uniform(-0.1, 0.1)));
    inputs = layer.outputs;
    layers.push_back(std::move(layer));
  }
  QRepresentation r{species, species, width, {}, std::vector<float>(static_cast<std::size_t>(species))};
  for (int c = 0; c < species; ++c)
    for (int s = 0; s < species; ++s)
      for (int k = 0; k < static_cast<int>(power(width)); ++k) {
        const double z = dimension == 2 ? 0 : k / width / width - width / 2, y = k / width % width - width / 2,
                     x = k % width - width / 2;
        r.kernel.push_back(c == s ? static_cast<float>(std::exp(-(x * x + y * y + z * z) / 3.125)) : 0.0f);
      }
  return std::make_shared<QNetwork>(dimension, std::move(layers), std::move(r));
}

/// A dense pass: every weight at every voxel.
Work dense_pass(const QNetwork& net, std::int64_t voxels) {
  double weights = 0;
  for (const QLayer& layer : net.layers()) weights += static_cast<double>(layer.weights.size());
  return {.flops32 = 2 * weights * static_cast<double>(voxels)};
}

void q_maps(Bench& bench) {
  {
    const std::string name = "Q-map 41 x 36 periodic, 15^2";
    const auto net = q_network(2, 15, 1, 1, 7);
    const std::int64_t shape[] = {41, 36};
    const std::uint8_t periodic[] = {1, 1};
    const auto map = std::make_shared<QMap>(net, shape, periodic);
    Random random(Key{8, 9}, 0);
    std::vector<Placed> placed;
    std::vector<std::int64_t> offsets{0};
    for (int i = 0; i < 64; ++i) {
      for (int k = 0; k < 12; ++k) placed.push_back({0, static_cast<std::int64_t>(random.uniform(0, 41 * 36))});
      offsets.push_back(static_cast<std::int64_t>(placed.size()));
    }
    const auto one = std::span(placed).first(12);
    bench.time(name + ", dense", "ms", kMilli, 0, [&] { (void)map->dense(one); }, dense_pass(*net, 41 * 36));
    QState state(map, QMethod::grid_fft);
    for (const Placed& atom : one) state.place(atom.species, atom.voxel);
    bench.time(name + ", one atom and Q everywhere", "ms", kMilli, 1.5, [&] {
      state.place(0, 700);
      (void)state.q();
      state.undo();
    });
    bench.time(
        name + ", batch of 64, per map", "ms", kMilli, 0.75, [&] { (void)map->batch(offsets, placed, 1); }, {}, 64);
    bench.time(name + ", first Q of a new map", "ms", kMilli, 0, [&] {
      QState fresh(std::make_shared<QMap>(net, shape, periodic), QMethod::grid_fft);
      (void)fresh.q();
    });
  }
  const struct {
    int n, kernel, dilation;
    double target;
  } cases[] = {{40, 7, 2, 16}, {60, 7, 2, 12}, {100, 7, 2, 12}, {60, 5, 3, 12}, {100, 5, 3, 12}};
  for (const auto& c : cases) {
    const std::string edge = std::to_string(c.kernel) + "^3 d" + std::to_string(c.dilation),
                      name = "Q-map " + std::to_string(c.n) + "^3, " + edge;
    const std::string step = name + ", one atom and Q on its shell", whole = name + ", one atom and Q everywhere",
                      fresh = name + ", first state of a new map", dense = name + ", dense";
    if (!bench.wants(step) && !bench.wants(whole) && !bench.wants(fresh) && !bench.wants(dense)) continue;
    const auto net = q_network(3, c.kernel, c.dilation, 2, 9);
    const std::int64_t shape[] = {c.n, c.n, c.n};
    const std::uint8_t periodic[] = {0, 0, 0};
    const auto map = std::make_shared<QMap>(net, shape, periodic);
    // A cluster of ten atoms about the centre and the 22,000 voxels of its allowed shell.
    Random random(Key{8, 10}, 0);
    std::vector<std::array<int, 3>> sites;
    std::vector<Placed> placed;
    for (int k = 0; k < 10; ++k) {
      std::array<int, 3> at;
      for (int& x : at) x = c.n / 2 + static_cast<int>(random.uniform(-8, 9));
      sites.push_back(at);
      placed.push_back({k % 2, (std::int64_t{at[0]} * c.n + at[1]) * c.n + at[2]});
    }
    std::vector<std::int64_t> shell;
    for (int z = 0; z < c.n; ++z)
      for (int y = 0; y < c.n; ++y)
        for (int x = 0; x < c.n; ++x) {
          double least = 1e300;
          for (const auto& s : sites) least = std::min(least, std::hypot(z - s[0], y - s[1], x - s[2]));
          if (least > 8 && least < 14 && shell.size() < 22000) shell.push_back((std::int64_t{z} * c.n + y) * c.n + x);
        }
    std::vector<float> q(2 * shell.size());
    const auto next = (std::int64_t{c.n / 2} * c.n + c.n / 2) * c.n + c.n / 2 + 3;
    if (bench.wants(step)) {
      QState state(map, QMethod::local_fft);
      for (const Placed& atom : placed) state.place(atom.species, atom.voxel);
      std::vector<double> forth, back;
      for (int repeat = 0; repeat < 40; ++repeat) {
        double start = now();
        state.place(0, next);
        state.q(shell, q);
        forth.push_back(now() - start);
        start = now();
        state.undo();
        back.push_back(now() - start);
      }
      bench.report(step, "ms", forth, kMilli, c.target);
      bench.report(name + ", undo", "ms", back, kMilli, 0);
    }
    if (bench.wants(whole) && c.n <= 60) {
      QState state(map, QMethod::grid_fft);
      bench.time(whole, "ms", kMilli, 0, [&] {
        state.place(0, next);
        (void)state.q();
        state.undo();
      });
    }
    if (c.n <= 60) {
      bench.time(fresh, "ms", kMilli, 0, [&] {
        QState state(std::make_shared<QMap>(net, shape, periodic), QMethod::local_fft);
        state.place(0, next);
        state.q(shell, q);
      });
      bench.time(
          dense, "ms", kMilli, 0, [&] { (void)map->dense(placed); }, dense_pass(*net, std::int64_t{c.n} * c.n * c.n));
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  std::string filter;
  bool json = false;
  for (int k = 1; k < count; ++k) {
    if (std::strcmp(arguments[k], "--json") == 0) {
      json = true;
    } else if (std::strcmp(arguments[k], "--filter") == 0 && k + 1 < count) {
      filter = arguments[++k];
    } else {
      const bool help = std::strcmp(arguments[k], "--help") == 0;
      std::fprintf(help ? stdout : stderr, "usage: thalweg_bench [--filter TEXT] [--json]\n");
      return help ? 0 : 2;
    }
  }
  try {
    Bench bench(filter, json);
    bench.header();
    potentials(bench);
    neighbors(bench);
    fingerprints(bench);
    soaps(bench);
    gaussian_process(bench);
    surrogate(bench);
    fingerprint_and_mean(bench);
    building(bench);
    q_maps(bench);
    return bench.finish();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "thalweg_bench: %s\n", error.what());
    return 1;
  }
}
