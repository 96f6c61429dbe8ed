#include "thalweg/potentials.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <exception>
#include <limits>
#include <numbers>
#include <string>
#include <utility>

#include "potentials_kernels.hpp"
#include "potentials_tables.hpp"
#include "thalweg/neighbors.hpp"

namespace thalweg {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// What neighbour lists accept; a structure outside has no energy.
bool usable(const StructureView& structure) {
  bool all = true;
  for (std::size_t k = 0; k < 3 * structure.n; ++k) all &= std::abs(structure.positions[k]) <= 1e9;
  return all;
}

// The species of a batch, numbered 0, 1, ... in order of atomic number, and every atom's number among them.
struct Species {
  std::vector<std::int32_t> numbers;  // atomic numbers, rising
  std::vector<std::int32_t> of_atom;  // (m)

  explicit Species(const BatchView& batch) : numbers(batch.numbers.begin(), batch.numbers.end()) {
    std::sort(numbers.begin(), numbers.end());
    numbers.erase(std::unique(numbers.begin(), numbers.end()), numbers.end());
    for (const std::int32_t z : batch.numbers)
      of_atom.push_back(
          static_cast<std::int32_t>(std::lower_bound(numbers.begin(), numbers.end(), z) - numbers.begin()));
  }
};

// What the evaluators share: the view of a row at new positions, and neighbour lists made when a row is first asked
// for.
class RowEvaluator : public Evaluator {
 public:
  /// cutoffs: one of all rows, or one a row.
  /// without_still: their neighbour lists leave out pairs of atoms with all coordinates fixed.
  RowEvaluator(const BatchView& batch, std::vector<double> cutoffs, double skin, bool without_still = false)
      : batch_(batch), without_still_(without_still), cutoffs_(std::move(cutoffs)), skin_(skin), lists_(batch.size()) {
    batch.check();
    for (std::size_t row = 0; row < batch.size(); ++row) new_list(row).check_cell(batch[row]);
  }

  /// What another back end needs to give the same numbers.
  virtual PotentialTables tables() const = 0;

  void evaluate(std::span<const std::int64_t> rows, const double* positions, double* energies,
                double* forces) override {
    for (const std::int64_t row : rows) {
      const std::size_t first = static_cast<std::size_t>(batch_.offsets[static_cast<std::size_t>(row)]);
      StructureView structure = batch_[static_cast<std::size_t>(row)];
      structure.positions = positions + 3 * first;
      double* f = forces + 3 * first;
      if (usable(structure)) {
        std::fill_n(f, 3 * structure.n, 0.0);
        energies[row] = evaluate_row(static_cast<std::size_t>(row), first, structure, f);
      } else {
        std::fill_n(f, 3 * structure.n, kNaN);
        energies[row] = kNaN;
      }
    }
  }

 protected:
  PotentialTables tables_of(const Species& types) const {
    PotentialTables out;
    out.cutoff = cutoffs_.empty() ? 1.0 : *std::max_element(cutoffs_.begin(), cutoffs_.end());
    out.types = types.numbers.size();
    out.type_of_atom = types.of_atom;
    return out;
  }

  /// Energy of one structure with usable positions; adds to forces (n, 3), which are zero.
  virtual double evaluate_row(std::size_t row, std::size_t first_atom, const StructureView& structure,
                              double* forces) = 0;

  const NeighborList& neighbors(std::size_t row, const StructureView& structure) {
    if (!lists_[row]) lists_[row] = std::make_unique<NeighborList>(new_list(row, without_still_));
    lists_[row]->update(structure);
    return *lists_[row];
  }

  NeighborList new_list(std::size_t row, bool without_still = false) const {
    return NeighborList(cutoffs_.size() == 1 ? cutoffs_[0] : cutoffs_[row], skin_, without_still);
  }

  BatchView batch_;
  const bool without_still_;

 private:
  std::vector<double> cutoffs_;
  double skin_;
  std::vector<std::unique_ptr<NeighborList>> lists_;
};

// Each pair pulls its atoms together with slope_over_r * d.
void add_pair_forces(const NeighborList& list, const double* slope_over_r, double* forces) {
  const std::int32_t *i = list.i(), *j = list.j();
  const double* d = list.d();
  for (std::size_t p = 0; p < list.size(); ++p) {
    double* at_i = forces + 3 * static_cast<std::size_t>(i[p]);
    double* at_j = forces + 3 * static_cast<std::size_t>(j[p]);
    for (int k = 0; k < 3; ++k) {
      const double pull = slope_over_r[p] * d[3 * p + static_cast<std::size_t>(k)];
      at_i[k] += pull;
      at_j[k] -= pull;
    }
  }
}

void grow(std::vector<double>& array, std::size_t size) {
  if (array.size() < size) array.resize(size);
}

// ---- effective medium theory
// -----------------------------------------------------------------------------------------
//
// s_i: radius of the neutral sphere at which the density at atom i is that of its surroundings,
//   sigma_i = sum_j chi_ij exp(-eta_j (r_ij - beta s0_j)) w(r_ij),  chi_ij = n0_j / n0_i,
//   s_i - s0_i = -log(sigma_i / 12 gamma1_i) / (beta eta_i),
// cohesive function E0 (1 + l) exp(-l), l = lambda (s_i - s0_i), and the atomic-sphere correction
//   6 V0 exp(-kappa (s_i - s0_i)) - V0 / (2 gamma2) sum_j chi_ij exp(-kappa_j (r_ij / beta - s0_j)) w(r_ij).
// gamma1 and gamma2 make the correction vanish for the ideal fcc lattice with three shells of neighbours.

struct EmtElement {
  std::int32_t number;
  double e0, s0, v0, eta, kappa, lambda, n0;  // eV, bohr
};

constexpr EmtElement kEmtElements[] = {
    {13, -3.28, 3.00, 1.493, 1.240, 2.000, 1.169, 0.00700},  // Al
    {29, -3.51, 2.67, 2.476, 1.652, 2.740, 1.906, 0.00910},  // Cu
    {47, -2.96, 3.01, 2.132, 1.652, 2.790, 1.892, 0.00547},  // Ag
    {79, -3.80, 3.00, 2.321, 1.674, 2.873, 2.182, 0.00703},  // Au
    {28, -4.44, 2.60, 3.673, 1.669, 2.757, 1.948, 0.01030},  // Ni
    {46, -3.90, 2.87, 2.773, 1.818, 3.107, 2.155, 0.00688},  // Pd
    {78, -5.85, 2.90, 4.067, 1.812, 3.145, 2.192, 0.00802},  // Pt
    {1, -3.21, 1.31, 0.132, 2.652, 2.790, 3.892, 0.00547},   // H; this one and those below are not for serious use
    {6, -3.50, 1.81, 0.332, 1.652, 2.790, 1.892, 0.01322},   // C
    {7, -5.10, 1.88, 0.132, 1.652, 2.790, 1.892, 0.01222},   // N
    {8, -4.60, 1.95, 0.332, 1.652, 2.790, 1.892, 0.00850},   // O
};
constexpr double kBohr = 0.5291772105638411;  // angstrom, as in ASE
constexpr double kBeta = 1.809;  // fcc: nearest distance / sphere radius; (16 pi / 3)^(1/3) / sqrt 2, rounded

// The cutoff is that of the largest element in the table, whatever is present.
struct EmtCutoff {
  double middle, slope, list;
  EmtCutoff() {
    double largest = 0;
    for (const EmtElement& e : kEmtElements) largest = std::max(largest, e.s0 * kBohr);
    const double nearest = kBeta * largest;
    middle = nearest * 0.5 * (std::sqrt(3.0) + 2.0);                // between third and fourth neighbours
    slope = std::log(1.0 / 1e-4 - 1.0) / (2.0 * nearest - middle);  // 1e-4 is left at the fourth
    list = middle + 0.5;
  }
};

const EmtElement& emt_element(std::int32_t number) {
  for (const EmtElement& e : kEmtElements)
    if (e.number == number) return e;
  std::string known;
  for (const EmtElement& e : kEmtElements)
    known += (known.empty() ? "" : ", ") + std::string(chemical_symbol(e.number));
  throw Error("EMT has no parameters for " + std::string(chemical_symbol(number)) + " (atomic number " +
              std::to_string(number) + "); it knows " + known);
}

// A pair energy and, for each atom, a function of the density that its neighbours make (potentials_kernels.hpp).
class EmbeddedEvaluator : public RowEvaluator {
 public:
  EmbeddedEvaluator(const BatchView& batch, ForcesOn on, double cutoff, double slope, double middle)
      : RowEvaluator(batch, {cutoff}, 0.5, on == ForcesOn::moving), types_(batch), slope_(slope), middle_(middle) {}

  PotentialTables tables() const override {
    PotentialTables out = tables_of(types_);
    out.embedded = {slope_, middle_, table_, walls_, atoms()};
    return out;
  }

 protected:
  virtual std::vector<EmbeddedAtom> atoms() const = 0;
  /// Energy of an atom at this density (above 0) and its slope; type: number of its species in `types_`.
  virtual double embedding(std::size_t type, double density, double& slope) const = 0;
  /// That of an atom without neighbours.
  virtual double alone(std::size_t) const { return 0.0; }

  double evaluate_row(std::size_t row, std::size_t first, const StructureView& structure, double* forces) override {
    const NeighborList& list = neighbors(row, structure);
    const std::size_t n = structure.n;
    const std::int32_t* type = types_.of_atom.data() + first;
    grow(atoms_, 2 * n);
    double *density = atoms_.data(), *d_energy = atoms_.data() + n;
    std::fill_n(density, n, 0.0);
    double energy = 0;
    if (without_still_) {
      const Still& still = still_of(row, structure, type);
      energy = still.energy;
      std::copy(still.density.begin(), still.density.end(), density);
    }
    energy += pair_energies(list.size(), list.i(), list.j(), list.r(), type, density);
    for (std::size_t i = 0; i < n; ++i) {
      const std::size_t kind = static_cast<std::size_t>(type[i]);
      d_energy[i] = 0;
      energy += density[i] > 0 ? embedding(kind, density[i], d_energy[i]) : alone(kind);
    }
    const std::size_t pairs = list.size();
    const std::int32_t *i = list.i(), *j = list.j();
    const double *slope_i = pairs_.data(), *slope_j = slope_i + pairs;
    double* slope = pairs_.data() + 2 * pairs;
    for (std::size_t p = 0; p < pairs; ++p) {
      slope[p] += d_energy[i[p]] * slope_i[p] + d_energy[j[p]] * slope_j[p];
      slope[p] /= list.r()[p];
    }
    add_pair_forces(list, slope, forces);
    return energy;
  }

  Species types_;
  std::vector<EmbeddedPair> table_;  // (types, types)
  std::vector<EmbeddedWall> walls_;  // the same, or none

 private:
  /// Pair energies and walls; adds to the densities. On return pairs_ (3, pairs) holds the slopes of the density at i,
  /// of that at j, and of the pair energy.
  double pair_energies(std::size_t pairs, const std::int32_t* i, const std::int32_t* j, const double* r,
                       const std::int32_t* type, double* density) {
    grow(pairs_, 3 * pairs);
    double *slope_i = pairs_.data(), *slope_j = slope_i + pairs, *slope = slope_j + pairs;
    const std::size_t types = types_.numbers.size();
    double energy = potential_kernels().embedded_pairs(pairs, i, j, r, type, table_.data(), static_cast<int>(types),
                                                       slope_, middle_, density, slope_i, slope_j, slope);
    if (walls_.empty()) return energy;
    for (std::size_t p = 0; p < pairs; ++p) {
      const EmbeddedWall& wall =
          walls_[static_cast<std::size_t>(type[i[p]]) * types + static_cast<std::size_t>(type[j[p]])];
      if (r[p] >= wall.radius) continue;
      const double inside = 1.0 - r[p] / wall.radius;
      energy += wall.height * inside * inside * inside;
      slope[p] -= 3.0 * wall.height * inside * inside / wall.radius;
    }
    return energy;
  }

  /// What pairs of still atoms give.
  struct Still {
    double energy = 0;
    std::vector<double> density;  // (n)
  };
  const Still& still_of(std::size_t row, const StructureView& structure, const std::int32_t* type) {
    if (still_.empty()) still_.resize(batch_.size());
    if (still_[row]) return *still_[row];
    NeighborList list = new_list(row);
    list.update(structure);
    std::vector<std::int32_t> i, j;
    std::vector<double> r;
    for (std::size_t p = 0; p < list.size(); ++p) {
      if (!structure.is_still(static_cast<std::size_t>(list.i()[p])) ||
          !structure.is_still(static_cast<std::size_t>(list.j()[p])))
        continue;
      i.push_back(list.i()[p]);
      j.push_back(list.j()[p]);
      r.push_back(list.r()[p]);
    }
    auto still = std::make_unique<Still>();
    still->density.assign(structure.n, 0.0);
    still->energy = pair_energies(r.size(), i.data(), j.data(), r.data(), type, still->density.data());
    still_[row] = std::move(still);
    return *still_[row];
  }

  double slope_, middle_;
  std::vector<double> atoms_, pairs_;
  std::vector<std::unique_ptr<Still>> still_;
};

class EmtEvaluator : public EmbeddedEvaluator {
 public:
  EmtEvaluator(const BatchView& batch, ForcesOn on, const EmtCutoff& cutoff = EmtCutoff())
      : EmbeddedEvaluator(batch, on, cutoff.list, cutoff.slope, cutoff.middle) {
    const std::size_t count = types_.numbers.size();
    std::vector<double> gamma2(count);
    constexpr double shell_sites[3] = {12, 6, 24};
    for (std::size_t a = 0; a < count; ++a) {
      const EmtElement& e = emt_element(types_.numbers[a]);
      const double s0 = e.s0 * kBohr, eta = e.eta / kBohr, kappa = e.kappa / kBohr;
      double gamma1 = 0;
      for (int shell = 0; shell < 3; ++shell) {
        const double beyond = kBeta * s0 * (std::sqrt(shell + 1.0) - 1.0);
        const double w = 1.0 / (1.0 + std::exp(cutoff.slope * (kBeta * s0 + beyond - cutoff.middle)));
        gamma1 += shell_sites[shell] / 12.0 * w * std::exp(-eta * beyond);
        gamma2[a] += shell_sites[shell] / 12.0 * w * std::exp(-kappa / kBeta * beyond);
      }
      species_.push_back({e.e0, 6.0 * e.v0, kappa, e.lambda / kBohr, kBeta * eta, 1.0 / (12.0 * gamma1), 0.0});
    }
    for (std::size_t a = 0; a < count; ++a)
      for (std::size_t b = 0; b < count; ++b) {
        const EmtElement &at = emt_element(types_.numbers[a]), &by = emt_element(types_.numbers[b]);
        const double chi = by.n0 / at.n0, s0 = by.s0 * kBohr, eta = by.eta / kBohr, kappa = by.kappa / kBohr;
        table_.push_back({chi * std::exp(eta * kBeta * s0), -0.5 * at.v0 / gamma2[a] * chi * std::exp(kappa * s0), eta,
                          kappa / kBeta});
      }
  }

 protected:
  double embedding(std::size_t type, double density, double& slope) const override {
    const EmbeddedAtom& s = species_[type];
    const double ds = -std::log(density * s.inverse_12_gamma1) / s.beta_eta;
    const double l = s.lambda * ds, cohesive = s.e0 * std::exp(-l), sphere = s.six_v0 * std::exp(-s.kappa * ds);
    slope = (cohesive * s.lambda * l + s.kappa * sphere) / (s.beta_eta * density);
    return cohesive * (1.0 + l) + sphere - s.e0;
  }
  double alone(std::size_t type) const override { return -species_[type].e0; }
  std::vector<EmbeddedAtom> atoms() const override { return species_; }

 private:
  std::vector<EmbeddedAtom> species_;
};

// ---- Lennard-Jones
// ---------------------------------------------------------------------------------------------------

constexpr std::size_t kMostWithoutList = 100;  // atoms of an open cluster

class LennardJonesEvaluator : public RowEvaluator {
 public:
  LennardJonesEvaluator(const BatchView& batch, const LennardJones::Settings& settings)
      : RowEvaluator(batch, {settings.rc}, 0.3 * settings.sigma), sigma_(settings.sigma) {
    const double s6 = std::pow(settings.sigma / settings.rc, 6), rc2 = settings.rc * settings.rc,
                 ro2 = settings.ro * settings.ro;
    coefficients_ = {sigma_ * sigma_,
                     rc2,
                     ro2,
                     4 * settings.epsilon,
                     4 * settings.epsilon * (s6 * s6 - s6),
                     1.0 / ((rc2 - ro2) * (rc2 - ro2) * (rc2 - ro2)),
                     settings.smooth ? 1 : 0};
  }

  PotentialTables tables() const override {
    PotentialTables out = tables_of(Species(batch_));
    out.lennard_jones = coefficients_;
    return out;
  }

 protected:
  double evaluate_row(std::size_t row, std::size_t, const StructureView& structure, double* forces) override {
    const std::size_t n = structure.n;
    if (structure.periodic() || n > kMostWithoutList) {
      const NeighborList& list = neighbors(row, structure);
      grow(slopes_, list.size());
      const double energy =
          potential_kernels().lennard_jones_pairs(list.size(), list.r(), slopes_.data(), coefficients_);
      add_pair_forces(list, slopes_.data(), forces);
      return energy;
    }
    const std::size_t padded = (n + 7) / 8 * 8;
    grow(planes_, 6 * padded);
    double *x = planes_.data(), *f = planes_.data() + 3 * padded;
    for (std::size_t i = 0; i < padded; ++i)
      for (std::size_t k = 0; k < 3; ++k)
        x[k * padded + i] = i < n ? structure.positions[3 * i + k] : 1e20 * (1.0 + static_cast<double>(i - n));
    const double energy = potential_kernels().lennard_jones_all(n, padded, x, f, coefficients_);
    for (std::size_t i = 0; i < n; ++i)
      for (std::size_t k = 0; k < 3; ++k) forces[3 * i + k] = f[k * padded + i];
    return energy;
  }

 private:
  double sigma_;
  LennardJonesCoefficients coefficients_;
  std::vector<double> slopes_, planes_;
};

// ---- smooth carbon
// ---------------------------------------------------------------------------------------------------

class SmoothCarbonEvaluator : public RowEvaluator {
 public:
  SmoothCarbonEvaluator(const BatchView& batch, const SmoothCarbon::Settings& settings)
      : RowEvaluator(batch, {settings.outer}, 0.5), s_(settings) {}

  PotentialTables tables() const override { return tables_of(Species(batch_)); }

 protected:
  double evaluate_row(std::size_t row, std::size_t, const StructureView& structure, double* forces) override {
    const NeighborList& list = neighbors(row, structure);
    const std::size_t n = structure.n, pairs = list.size();
    start_.assign(n + 1, 0);
    for (std::size_t p = 0; p < pairs; ++p) {
      if (list.r()[p] == 0) {
        std::fill_n(forces, 3 * n, kNaN);
        return kNaN;
      }
      ++start_[static_cast<std::size_t>(list.i()[p]) + 1];
      ++start_[static_cast<std::size_t>(list.j()[p]) + 1];
    }
    for (std::size_t i = 0; i < n; ++i) start_[i + 1] += start_[i];
    next_.assign(start_.begin(), start_.end() - 1);
    if (bonds_.size() < 2 * pairs) bonds_.resize(2 * pairs);
    double energy = 0;
    for (std::size_t p = 0; p < pairs; ++p) {
      const double r = list.r()[p], e = std::exp(-s_.stiffness * (r - s_.r0)), well = e * e - 2.0 * e;
      double w = 1.0, d_w = 0.0;
      if (r > s_.inner) {
        const double scale = 1.0 / (s_.outer - s_.inner), t = (r - s_.inner) * scale, rest = 1.0 - t;
        w = 1.0 - t * t * t * (10.0 - t * (15.0 - 6.0 * t));
        d_w = -30.0 * t * t * rest * rest * scale;
      }
      energy += s_.depth * well * w;
      const double slope = s_.depth * (-2.0 * s_.stiffness * (e * e - e) * w + well * d_w);
      const std::size_t from[2] = {static_cast<std::size_t>(list.i()[p]), static_cast<std::size_t>(list.j()[p])};
      for (int way = 0; way < 2; ++way) {
        Bond& bond = bonds_[next_[from[way]]++];
        const double sign = way == 0 ? 1.0 / r : -1.0 / r;
        for (std::size_t k = 0; k < 3; ++k) {
          bond.unit[k] = sign * list.d()[3 * p + k];
          bond.slope[k] = 0.5 * slope * bond.unit[k];  // the other half with the bond back
        }
        bond.inverse_r = 1.0 / r;
        bond.w = w;
        bond.d_w = d_w;
        bond.j = from[1 - way];
      }
    }
    for (std::size_t i = 0; i < n; ++i)
      for (std::size_t a = start_[i]; a < start_[i + 1]; ++a)
        for (std::size_t b = a + 1; b < start_[i + 1]; ++b) energy += bend(bonds_[a], bonds_[b]);
    for (std::size_t i = 0; i < n; ++i)
      for (std::size_t a = start_[i]; a < start_[i + 1]; ++a)
        for (std::size_t k = 0; k < 3; ++k) {
          forces[3 * i + k] += bonds_[a].slope[k];
          forces[3 * bonds_[a].j + k] -= bonds_[a].slope[k];
        }
    return energy;
  }

 private:
  // From an atom to a neighbour; slope: dE / d(r_j - r_i).
  struct Bond {
    double unit[3], slope[3], inverse_r, w, d_w;
    std::size_t j;
  };

  double bend(Bond& a, Bond& b) const {
    const double cosine = a.unit[0] * b.unit[0] + a.unit[1] * b.unit[1] + a.unit[2] * b.unit[2], off = cosine + 0.5;
    const double energy = s_.angle * off * off, turn = 2.0 * s_.angle * off * a.w * b.w;
    for (int k = 0; k < 3; ++k) {
      a.slope[k] += energy * a.d_w * b.w * a.unit[k] + turn * a.inverse_r * (b.unit[k] - cosine * a.unit[k]);
      b.slope[k] += energy * b.d_w * a.w * b.unit[k] + turn * b.inverse_r * (a.unit[k] - cosine * b.unit[k]);
    }
    return energy * a.w * b.w;
  }

  const SmoothCarbon::Settings s_;
  std::vector<std::size_t> start_, next_;
  std::vector<Bond> bonds_;
};

// ---- Tersoff
// ---------------------------------------------------------------------------------------------------------

constexpr double kLargestExponent = 69.0776;  // of e^(lambda3^m (r_ij - r_ik)^m), as in LAMMPS and ASE

class TersoffEvaluator : public RowEvaluator {
 public:
  TersoffEvaluator(const BatchView& batch, std::vector<double> cutoffs, const Species& types, TersoffTables tables)
      : RowEvaluator(batch, std::move(cutoffs), 0.5), types_(types), tables_(std::move(tables)) {}

  PotentialTables tables() const override {
    PotentialTables out = tables_of(types_);
    out.tersoff = tables_;
    return out;
  }

 protected:
  double evaluate_row(std::size_t row, std::size_t first, const StructureView& structure, double* forces) override {
    const NeighborList& list = neighbors(row, structure);
    const std::int32_t* type = types_.of_atom.data() + first;
    const std::size_t n = structure.n, pairs = list.size(), windows = tables_.windows.size();
    for (std::size_t p = 0; p < pairs; ++p)
      if (list.r()[p] == 0) {
        std::fill_n(forces, 3 * n, kNaN);
        return kNaN;
      }
    fill_edges(list, type, n);

    double energy = 0;
    for (std::size_t i = 0; i < n; ++i) {
      const std::size_t begin = start_[i], end = start_[i + 1];
      for (std::size_t j = begin; j < end; ++j) {
        const std::size_t species = static_cast<std::size_t>(type[i]) * types_.numbers.size() + edges_[j].type;
        const TersoffBond& bond = tables_.bonds[species];
        const double fc = fc_[windows * j + static_cast<std::size_t>(bond.window)];
        if (fc == 0) continue;
        energy += bond_energy(begin, end, j, bond, fc, tables_.triplets.data() + species * types_.numbers.size());
      }
    }

    for (std::size_t i = 0; i < n; ++i)
      for (std::size_t e = start_[i]; e < start_[i + 1]; ++e) {
        double* at_i = forces + 3 * i;
        double* at_j = forces + 3 * edges_[e].j;
        for (int k = 0; k < 3; ++k) {
          at_i[k] += edges_[e].slope[k];
          at_j[k] -= edges_[e].slope[k];
        }
      }
    return energy;
  }

 private:
  // One direction of a pair, kept with the atom it starts from; `start_` (n + 1) says where those of an atom begin.
  struct Edge {
    double unit[3], r, inverse_r;
    double repulsion, attraction;  // A e^(-lambda1 r), B e^(-lambda2 r) of the bond (i, j)
    double slope[3];               // dE / d(r_j - r_i)
    std::size_t j;
    std::size_t type;  // of j
  };
  // dzeta_ij by the angle and by the distances, of one k
  struct Angle {
    double cosine, d_cosine, d_rij, d_rik;
  };

  void fill_edges(const NeighborList& list, const std::int32_t* type, std::size_t n) {
    const std::size_t pairs = list.size(), windows = tables_.windows.size(), count = types_.numbers.size();
    start_.assign(n + 1, 0);
    for (std::size_t p = 0; p < pairs; ++p) {
      ++start_[static_cast<std::size_t>(list.i()[p]) + 1];
      ++start_[static_cast<std::size_t>(list.j()[p]) + 1];
    }
    std::size_t most = 0;
    for (std::size_t i = 0; i < n; ++i) {
      most = std::max(most, start_[i + 1]);
      start_[i + 1] += start_[i];
    }
    next_.assign(start_.begin(), start_.end() - 1);
    if (edges_.size() < 2 * pairs) edges_.resize(2 * pairs);
    if (angles_.size() < most) angles_.resize(most);
    grow(fc_, 2 * pairs * windows);
    grow(d_fc_, 2 * pairs * windows);
    for (std::size_t p = 0; p < pairs; ++p) {
      const std::size_t from[2] = {static_cast<std::size_t>(list.i()[p]), static_cast<std::size_t>(list.j()[p])};
      const std::size_t place[2] = {next_[from[0]]++, next_[from[1]]++};
      const double r = list.r()[p], inverse = 1.0 / r;
      for (int way = 0; way < 2; ++way) {
        Edge& edge = edges_[place[way]];
        const double sign = way == 0 ? inverse : -inverse;
        for (std::size_t k = 0; k < 3; ++k) {
          edge.unit[k] = sign * list.d()[3 * p + k];
          edge.slope[k] = 0.0;
        }
        edge.r = r;
        edge.inverse_r = inverse;
        edge.j = from[1 - way];
        edge.type = static_cast<std::size_t>(type[edge.j]);
        double *fc = fc_.data() + windows * place[way], *d_fc = d_fc_.data() + windows * place[way];
        const TersoffBond& bond = tables_.bonds[static_cast<std::size_t>(type[from[way]]) * count + edge.type];
        if (way == 1) {
          std::copy_n(fc_.data() + windows * place[0], windows, fc);
          std::copy_n(d_fc_.data() + windows * place[0], windows, d_fc);
        } else {
          for (std::size_t w = 0; w < windows; ++w) tables_.windows[w].at(r, fc[w], d_fc[w]);
        }
        if (fc[bond.window] == 0) continue;
        if (way == 1 && bond.symmetric) {
          edge.repulsion = edges_[place[0]].repulsion;
          edge.attraction = edges_[place[0]].attraction;
        } else {
          edge.repulsion = bond.A * std::exp(-bond.lambda1 * r);
          edge.attraction = bond.B * std::exp(-bond.lambda2 * r);
        }
      }
    }
  }

  // Half of what i, j share; adds to the slopes of the edges of i. triplets: of these two species, by the third.
  double bond_energy(std::size_t begin, std::size_t end, std::size_t j, const TersoffBond& bond, double fc,
                     const TersoffTriplet* triplets) {
    const std::size_t windows = tables_.windows.size();
    Edge& to_j = edges_[j];
    double zeta = 0;
    for (std::size_t k = begin; k < end; ++k) {
      if (k == j) continue;
      const Edge& to_k = edges_[k];
      const TersoffTriplet& t = triplets[to_k.type];
      const std::size_t window = windows * k + static_cast<std::size_t>(t.window);
      const double fc_k = fc_[window];
      Angle& angle = angles_[k - begin];
      angle.cosine = 2.0;  // none: beyond its cutoff
      if (fc_k == 0) continue;
      const double cosine = to_j.unit[0] * to_k.unit[0] + to_j.unit[1] * to_k.unit[1] + to_j.unit[2] * to_k.unit[2];
      const double x = t.h - cosine, inverse = 1.0 / (1.0 + x * x * t.inverse_d2), scale = t.gamma * t.c2_by_d2;
      double g = t.gamma + scale * (x * x * t.inverse_d2) * inverse;
      double d_g = -2.0 * scale * x * t.inverse_d2 * inverse * inverse;
      double d_rij = 0;
      if (t.lambda3 != 0) {
        const double apart = to_j.r - to_k.r, exponent = t.lambda3 * (t.cubic ? apart * apart * apart : apart);
        const double grown = exponent < -kLargestExponent ? 0.0 : std::exp(std::min(exponent, kLargestExponent));
        g *= grown;
        d_g *= grown;
        if (std::abs(exponent) < kLargestExponent) d_rij = fc_k * g * t.lambda3 * (t.cubic ? 3.0 * apart * apart : 1.0);
      }
      zeta += fc_k * g;
      angle = {cosine, fc_k * d_g, d_rij, d_fc_[window] * g - d_rij};
    }

    double order = 1.0, d_order = 0.0;
    if (const double reach = bond.beta * zeta; reach > 0) {
      // by logarithms: (beta zeta)^n would overflow for the n = 22.956 of silicon
      const double log_reach = std::log(reach), s = bond.n * log_reach, small = std::exp(-std::abs(s));
      order = std::exp(-((s > 0 ? s : 0.0) + std::log1p(small)) / (2.0 * bond.n));
      d_order = -0.5 * order * (s > 0 ? 1.0 : small) / (1.0 + small) / zeta;
    }
    const double d_fc = d_fc_[windows * j + static_cast<std::size_t>(bond.window)];
    const double pair = to_j.repulsion - order * to_j.attraction;
    const double along =
        0.5 * (d_fc * pair + fc * (bond.lambda2 * order * to_j.attraction - bond.lambda1 * to_j.repulsion));
    for (int a = 0; a < 3; ++a) to_j.slope[a] += along * to_j.unit[a];
    const double d_zeta = -0.5 * fc * to_j.attraction * d_order;  // dE / dzeta
    if (d_zeta != 0)
      for (std::size_t k = begin; k < end; ++k) {
        if (k == j || angles_[k - begin].cosine == 2.0) continue;
        Edge& to_k = edges_[k];
        const Angle& angle = angles_[k - begin];
        const double turn = d_zeta * angle.d_cosine, turn_j = turn * to_j.inverse_r, turn_k = turn * to_k.inverse_r;
        const double stretch_j = d_zeta * angle.d_rij - turn_j * angle.cosine,
                     stretch_k = d_zeta * angle.d_rik - turn_k * angle.cosine;
        for (int a = 0; a < 3; ++a) {
          to_j.slope[a] += turn_j * to_k.unit[a] + stretch_j * to_j.unit[a];
          to_k.slope[a] += turn_k * to_j.unit[a] + stretch_k * to_k.unit[a];
        }
      }
    return 0.5 * fc * pair;
  }

  const Species types_;
  const TersoffTables tables_;
  std::vector<std::size_t> start_, next_;
  std::vector<Edge> edges_;
  std::vector<Angle> angles_;
  std::vector<double> fc_, d_fc_;  // (edge, window)
};

// Entries are ordered by these.
std::array<std::int32_t, 3> species_of(const Tersoff::Entry& entry) { return {entry.first, entry.second, entry.third}; }

// Numbers of a pair (i, j) that all its triplets share.
struct TersoffSet {
  std::int32_t first, second;
  double c, d, h, n, beta, lambda2, B, R, D, lambda1, A;
};
// m = 3, gamma = 1, lambda3 = 0 in all of them, and the triplets (i, j, k) of a pair have equal numbers for every k.

// J. Tersoff, Phys. Rev. Lett. 61, 2879 (1988); SiC_1989.tersoff of LAMMPS has the same numbers.
constexpr TersoffSet kCarbon[] = {
    {6, 6, 3.8049e4, 4.3484, -0.57058, 0.72751, 1.5724e-7, 2.2119, 346.74, 1.95, 0.15, 3.4879, 1393.6},
};
// L. Lindsay, D. A. Broido, Phys. Rev. B 81, 205441 (2010), fitted to phonons and velocities of graphene.
constexpr TersoffSet kCarbon2010[] = {
    {6, 6, 3.8049e4, 4.3484, -0.93, 0.72751, 1.5724e-7, 2.2119, 430.0, 1.95, 0.15, 3.4879, 1393.6},
};
// J. H. Los, J. M. H. Kroes, K. Albe, R. M. Gordillo, M. I. Katsnelson, A. Fasolino, Phys. Rev. B 96, 184108 (2017);
// the three-body part of LAMMPS' BN.extep. Its corrections F_ij are left out: zero between threefold coordinated (hBN)
// and between fourfold coordinated (cBN) B and N, at most 0.13 in the bond order elsewhere.
constexpr TersoffSet kBoronNitride[] = {
    {5, 5, 26617.3, 141.2, -0.13, 1.142247, 0.01498959, 2.521182, 2768.7363631, 2.0, 0.2, 2.6857244, 3376.3350735},
    {7, 7, 23.5, 3.75, -0.4, 0.665, 0.019251, 2.6272721, 2563.5603417, 2.0, 0.2, 2.8293093, 2978.9527928},
    {5, 7, 306.586555205, 10.0, -0.7218, 0.6576543657, 0.0027024851, 2.69335, 2595.6860833266, 2.0, 0.2, 2.95,
     3330.0655849887},
    {7, 5, 306.586555205, 10.0, -0.7218, 0.6576543657, 0.0027024851, 2.69335, 2595.6860833266, 2.0, 0.2, 2.95,
     3330.0655849887},
};
// A. Kinaci, J. B. Haskins, C. Sevik, T. Cagin, Phys. Rev. B 86, 115410 (2012), with C-C of Lindsay and Broido; B-N
// from C. Sevik et al., Phys. Rev. B 84, 085409 (2011); LAMMPS' BNC.tersoff. As published, A and B of B-B and N-N are
// the D0 / (S - 1) and S D0 / (S - 1) of K. Albe, W. Moeller, Comput. Mater. Sci. 10, 111 (1998), without the factors
// e^(lambda r0) that belong to them (compare N-N above: 2978.95 = 128.869 e^(2.8293 x 1.11)), so such pairs attract
// each other down to zero distance. Sheets never bring them together.
constexpr TersoffSet kBoronNitrideCarbon[] = {
    {5, 5, 0.52629, 0.001587, 0.5, 3.9929061, 1.6e-6, 2.0774982, 43.132016, 2.0, 0.1, 2.2372578, 40.0520156},
    {7, 7, 17.7959, 5.9484, 0.0, 0.6184432, 0.019251, 2.6272721, 138.77866, 2.0, 0.1, 2.8293093, 128.86866},
    {5, 7, 2.5e4, 4.3484, -0.89, 0.72751, 1.25724e-7, 2.199, 340.0, 1.95, 0.05, 3.568, 1380.0},
    {7, 5, 2.5e4, 4.3484, -0.89, 0.72751, 1.25724e-7, 2.199, 340.0, 1.95, 0.05, 3.568, 1380.0},
    {6, 6, 3.8049e4, 4.3484, -0.93, 0.72751, 1.5724e-7, 2.2119, 430.0, 1.95, 0.15, 3.4879, 1393.6},
    {6, 5, 3.8049e4, 4.3484, -0.93, 0.72751, 1.5724e-7, 2.2054, 339.06891, 1.95, 0.1, 3.5279, 1386.78},
    {6, 7, 3.8049e4, 4.3484, -0.93, 0.72751, 1.5724e-7, 2.2054, 387.575152, 1.95, 0.1, 3.5279, 1386.78},
    {5, 6, 2.5e4, 4.3484, -0.89, 0.72751, 1.25724e-7, 2.2054, 339.06891, 1.95, 0.1, 3.5279, 1386.78},
    {7, 6, 2.5e4, 4.3484, -0.89, 0.72751, 1.25724e-7, 2.2054, 387.575152, 1.95, 0.1, 3.5279, 1386.78},
};
struct TersoffName {
  const char* name;
  std::span<const TersoffSet> pairs;
};
constexpr TersoffName kTersoffNames[] = {
    {"C", kCarbon}, {"C-2010", kCarbon2010}, {"BN", kBoronNitride}, {"BNC", kBoronNitrideCarbon}};

// ---- pair priors
// -----------------------------------------------------------------------------------------------------

constexpr double kClosest = 0.5;  // angstrom: r + 1 - r_min below which the repulsive form goes on as a parabola

double repulsive_pairs(const NeighborList& list, const std::int32_t* kind, const PriorPair* table, bool sharp,
                       double* slope_over_r) {
  double total = 0;
  for (std::size_t p = 0; p < list.size(); ++p) {
    const PriorPair& pair = table[kind[p]];
    const double r = list.r()[p], gap = r + 1.0 - pair.radius;
    const double base = sharp ? gap : std::max(gap, kClosest), below = gap - base;
    const double inverse = 1.0 / base, q3 = inverse * inverse * inverse, value = (q3 * q3) * (q3 * q3);
    const double first = -12.0 * value * inverse, second = 156.0 * value * inverse * inverse;
    double energy = value + below * (first + 0.5 * below * second), slope = first + below * second;
    const double t = (r - pair.switch_from) * pair.switch_scale;
    if (!sharp && t > 0) {
      const double cut = 1.0 - t * t * t * (10.0 - t * (15.0 - 6.0 * t));
      slope = slope * cut - energy * 30.0 * t * t * (1.0 - t) * (1.0 - t) * pair.switch_scale;
      energy *= cut;
    }
    total += energy;
    slope_over_r[p] = slope / r;
  }
  return total;
}

class PriorEvaluator : public RowEvaluator {
 public:
  PriorEvaluator(const BatchView& batch, PairPrior::Form form, bool sharp_cutoff, const Species& types,
                 std::vector<PriorPair> table)
      : RowEvaluator(batch, longest_cutoffs(batch, types, table), 0.5),
        form_(form),
        sharp_cutoff_(sharp_cutoff),
        types_(types),
        table_(std::move(table)) {}

  PotentialTables tables() const override {
    PotentialTables out = tables_of(types_);
    out.prior = table_;
    out.repulsive = form_ == PairPrior::Form::repulsive;
    out.sharp = sharp_cutoff_;
    return out;
  }

 protected:
  double evaluate_row(std::size_t row, std::size_t first, const StructureView& structure, double* forces) override {
    const NeighborList& list = neighbors(row, structure);
    const std::int32_t* type = types_.of_atom.data() + first;
    const std::int32_t count = static_cast<std::int32_t>(types_.numbers.size());
    grow(slopes_, list.size());
    if (kinds_.size() < list.size()) kinds_.resize(list.size());
    for (std::size_t p = 0; p < list.size(); ++p) kinds_[p] = type[list.i()[p]] * count + type[list.j()[p]];
    const double energy =
        form_ == PairPrior::Form::bonding
            ? potential_kernels().morse_pairs(list.size(), list.r(), kinds_.data(), table_.data(), slopes_.data())
            : repulsive_pairs(list, kinds_.data(), table_.data(), sharp_cutoff_, slopes_.data());
    add_pair_forces(list, slopes_.data(), forces);
    return energy;
  }

 private:
  // Of each row's own pairs of species: a cutoff taken over the batch would make a row's sums depend on the others.
  static std::vector<double> longest_cutoffs(const BatchView& batch, const Species& types,
                                             const std::vector<PriorPair>& table) {
    const std::size_t count = types.numbers.size();
    std::vector<double> out;
    for (std::size_t row = 0; row < batch.size(); ++row) {
      std::vector<bool> present(count, false);
      for (std::int64_t atom = batch.offsets[row]; atom < batch.offsets[row + 1]; ++atom)
        present[static_cast<std::size_t>(types.of_atom[static_cast<std::size_t>(atom)])] = true;
      double longest = 0;
      for (std::size_t a = 0; a < count; ++a)
        for (std::size_t b = a; b < count; ++b)
          if (present[a] && present[b]) longest = std::max(longest, table[a * count + b].cutoff);
      out.push_back(longest > 0 ? longest : 1.0);  // a structure without atoms
    }
    return out;
  }

  PairPrior::Form form_;
  bool sharp_cutoff_;
  Species types_;
  std::vector<PriorPair> table_;
  std::vector<std::int32_t> kinds_;
  std::vector<double> slopes_;
};

// A well with its switch; cutoff 0: 2.5 r0.
PriorPair morse_pair(double r0, double stiffness, double depth, double cutoff = 0.0) {
  PriorPair pair{};
  pair.radius = r0;
  pair.exponent = stiffness / r0;
  pair.depth = depth;
  pair.cutoff = cutoff > 0 ? cutoff : 2.5 * r0;
  pair.switch_from = std::min(1.6 * r0, 0.64 * pair.cutoff);
  pair.switch_scale = 1.0 / (pair.cutoff - pair.switch_from);
  return pair;
}

class ManyBodyEvaluator : public EmbeddedEvaluator {
 public:
  /// entry: row of `pairs` for every two of the batch's species, or -1; exponents: of each species.
  ManyBodyEvaluator(const BatchView& batch, ForcesOn on, const std::vector<ManyBodyPrior::Pair>& pairs,
                    const std::vector<int>& entry, std::vector<double> exponents)
      : EmbeddedEvaluator(batch, on, 2.8 * longest(pairs), 11.5 / (0.6 * longest(pairs)), 2.2 * longest(pairs)),
        exponents_(std::move(exponents)) {
    const std::size_t count = exponents_.size();
    for (std::size_t a = 0; a < count; ++a)
      for (std::size_t b = 0; b < count; ++b) {
        const int row = entry[a * count + b];
        const ManyBodyPrior::Pair pair =
            row < 0 ? ManyBodyPrior::Pair{0, 0, 0.0, 1.0, 1.0, 2.0} : pairs[static_cast<std::size_t>(row)];
        const double q = pair.stiffness, p = pair.ratio * q, half = 0.5 * pair.depth / (p - q), g = exponents_[a];
        table_.push_back({pair.depth > 0 ? std::exp((std::log(half * p) + q) / g) : 0.0, half * q * std::exp(p),
                          q / (g * pair.r0), p / pair.r0});

        const double sum = covalent_radius(types_.numbers[a]) + covalent_radius(types_.numbers[b]);
        walls_.push_back({ManyBodyPrior::kWall * sum, ManyBodyPrior::kWallHeight});
      }
  }

 protected:
  double embedding(std::size_t type, double density, double& slope) const override {
    const double g = exponents_[type];
    const double energy = -std::pow(ManyBodyPrior::kCoordination, 1.0 - g) * std::pow(density, g);
    slope = g * energy / density;
    return energy;
  }
  std::vector<EmbeddedAtom> atoms() const override {
    std::vector<EmbeddedAtom> out(exponents_.size());
    for (std::size_t a = 0; a < out.size(); ++a) {
      out[a].exponent = exponents_[a];
      out[a].e0 = std::pow(ManyBodyPrior::kCoordination, 1.0 - exponents_[a]);
    }
    return out;
  }

 private:
  static double longest(const std::vector<ManyBodyPrior::Pair>& pairs) {
    double r0 = pairs.empty() ? 1.0 : 0.0;
    for (const ManyBodyPrior::Pair& pair : pairs) r0 = std::max(r0, pair.r0);
    return r0;
  }

  std::vector<double> exponents_;
};

class TiltedEvaluator : public Evaluator {
 public:
  TiltedEvaluator(const BatchView& batch, std::unique_ptr<Evaluator> inner, const std::vector<double>& shift)
      : offsets_(batch.offsets), inner_(std::move(inner)), shift_(shift) {}

  void evaluate(std::span<const std::int64_t> rows, const double* positions, double* energies,
                double* forces) override {
    inner_->evaluate(rows, positions, energies, forces);
    for (const std::int64_t row : rows) {
      const std::size_t first = 3 * static_cast<std::size_t>(offsets_[static_cast<std::size_t>(row)]),
                        last = 3 * static_cast<std::size_t>(offsets_[static_cast<std::size_t>(row) + 1]);
      for (std::size_t k = first; k < last; ++k) {
        energies[row] += shift_[k] * positions[k];
        forces[k] -= shift_[k];
      }
    }
  }

 private:
  std::span<const std::int64_t> offsets_;
  std::unique_ptr<Evaluator> inner_;
  const std::vector<double>& shift_;  // of the landscape, which outlives its evaluators
};

// Row of `pairs` for every two of `types`; -1 where there is none and no structure needs it. Throws where one does.
std::vector<int> entries(const BatchView& batch, const Species& types, const std::vector<ManyBodyPrior::Pair>& pairs) {
  const std::size_t count = types.numbers.size();
  std::vector<int> out(count * count, -1);
  for (std::size_t k = 0; k < pairs.size(); ++k) {
    const auto place = [&](std::int32_t z) {
      return static_cast<std::size_t>(std::lower_bound(types.numbers.begin(), types.numbers.end(), z) -
                                      types.numbers.begin());
    };
    const std::size_t a = place(pairs[k].first), b = place(pairs[k].second);
    if (a == count || b == count || types.numbers[a] != pairs[k].first || types.numbers[b] != pairs[k].second) continue;
    out[a * count + b] = out[b * count + a] = static_cast<int>(k);
  }
  std::vector<bool> present(count);
  for (std::size_t row = 0; row < batch.size(); ++row) {
    present.assign(count, false);
    for (std::int64_t atom = batch.offsets[row]; atom < batch.offsets[row + 1]; ++atom)
      present[static_cast<std::size_t>(types.of_atom[static_cast<std::size_t>(atom)])] = true;
    for (std::size_t a = 0; a < count; ++a)
      for (std::size_t b = a; b < count; ++b)
        if (present[a] && present[b] && out[a * count + b] < 0)
          throw Error("ManyBodyPrior has no entry for the pair " + std::string(chemical_symbol(types.numbers[a])) +
                      "-" + std::string(chemical_symbol(types.numbers[b])) +
                      "; give it depth, r0, stiffness and ratio");
  }
  return out;
}

void expect_positive(double value, const char* owner, const char* name) {
  if (!(value > 0) || !std::isfinite(value))
    throw Error(std::string(owner) + " needs a positive, finite " + name + ", but it is " + std::to_string(value));
}
void expect_not_negative(double value, const char* owner, const char* name) {
  if (!(value >= 0) || !std::isfinite(value))
    throw Error(std::string(owner) + " needs a finite " + name + " of at least 0, but it is " + std::to_string(value));
}

}  // namespace

std::unique_ptr<Evaluator> Emt::evaluator(const BatchView& batch, ForcesOn on) const {
  return std::make_unique<EmtEvaluator>(batch, on);
}

LennardJones::LennardJones(const Settings& settings) : settings_(settings) {
  expect_positive(settings.sigma, "LennardJones", "sigma");
  expect_not_negative(settings.rc, "LennardJones", "rc");
  expect_not_negative(settings.ro, "LennardJones", "ro");
  if (!std::isfinite(settings.epsilon)) throw Error("LennardJones needs a finite epsilon");
  if (settings_.rc == 0) settings_.rc = 3 * settings_.sigma;
  if (settings_.ro == 0) settings_.ro = 0.66 * settings_.rc;
  if (settings_.smooth && !(settings_.ro < settings_.rc))
    throw Error("LennardJones needs ro < rc, but ro is " + std::to_string(settings_.ro) + " and rc is " +
                std::to_string(settings_.rc));
}

std::unique_ptr<Evaluator> LennardJones::evaluator(const BatchView& batch, ForcesOn) const {
  return std::make_unique<LennardJonesEvaluator>(batch, settings_);
}

SmoothCarbon::SmoothCarbon(const Settings& settings) : settings_(settings) {
  expect_not_negative(settings.depth, "SmoothCarbon", "depth");
  expect_positive(settings.stiffness, "SmoothCarbon", "stiffness");
  expect_positive(settings.r0, "SmoothCarbon", "r0");
  expect_not_negative(settings.angle, "SmoothCarbon", "angle");
  expect_positive(settings.inner, "SmoothCarbon", "inner");
  if (!(settings.outer > settings.inner) || !std::isfinite(settings.outer))
    throw Error("SmoothCarbon needs inner < outer, but inner is " + std::to_string(settings.inner) + " and outer is " +
                std::to_string(settings.outer));
}

std::unique_ptr<Evaluator> SmoothCarbon::evaluator(const BatchView& batch, ForcesOn) const {
  for (const std::int32_t number : batch.numbers)
    if (number != 6)
      throw Error("SmoothCarbon is for carbon alone, but there is " + std::string(chemical_symbol(number)) +
                  "; take another calculator");
  return std::make_unique<SmoothCarbonEvaluator>(batch, settings_);
}

std::vector<std::string> Tersoff::names() {
  std::vector<std::string> out;
  for (const TersoffName& set : kTersoffNames) out.emplace_back(set.name);
  return out;
}

std::vector<Tersoff::Entry> Tersoff::published(const std::string& name) {
  std::string known;
  for (const TersoffName& set : kTersoffNames) {
    known += (known.empty() ? "'" : ", '") + std::string(set.name) + "'";
    if (name != set.name) continue;
    std::vector<Entry> out;
    for (const TersoffSet& p : set.pairs)
      for (const TersoffSet& other : set.pairs)
        if (other.first == other.second)  // every species once
          out.push_back({p.first, p.second, other.first, 3.0, 1.0, 0.0, p.c, p.d, p.h, p.n, p.beta, p.lambda2, p.B, p.R,
                         p.D, p.lambda1, p.A});
    return out;
  }
  throw Error("Tersoff has no published parameters named '" + name + "'; it knows " + known);
}

Tersoff::Tersoff(std::vector<Entry> entries) : entries_(std::move(entries)) {
  if (entries_.empty()) throw Error("Tersoff needs parameters, but there is no entry");
  std::sort(entries_.begin(), entries_.end(),
            [](const Entry& a, const Entry& b) { return species_of(a) < species_of(b); });
  for (std::size_t k = 0; k < entries_.size(); ++k) {
    const Entry& e = entries_[k];
    std::string owner = "Tersoff";
    for (const std::int32_t z : species_of(e)) {
      covalent_radius(z);  // throws for what is no element
      owner += owner == "Tersoff" ? ' ' : '-';
      owner += chemical_symbol(z);
    }
    if (k > 0 && species_of(entries_[k - 1]) == species_of(e)) throw Error(owner + " comes twice; give it once");
    if (e.m != 1 && e.m != 3) throw Error(owner + " needs m = 1 or m = 3, but it is " + std::to_string(e.m));
    if (!std::isfinite(e.h)) throw Error(owner + " needs a finite h");
    expect_positive(e.d, owner.c_str(), "d");
    const std::pair<double, const char*> rest[] = {{e.gamma, "gamma"}, {e.lambda3, "lambda3"}, {e.c, "c"}, {e.n, "n"},
                                                   {e.beta, "beta"},   {e.lambda2, "lambda2"}, {e.B, "B"}, {e.R, "R"},
                                                   {e.D, "D"},         {e.lambda1, "lambda1"}, {e.A, "A"}};
    for (const auto& [value, name] : rest) expect_not_negative(value, owner.c_str(), name);
    if (e.D > e.R)
      throw Error(owner + " needs D <= R, but D is " + std::to_string(e.D) + " and R is " + std::to_string(e.R));
    // only (i, j, j) describes a bond: files have zeros elsewhere
    if (e.second == e.third && e.B > 0 && e.beta > 0) expect_positive(e.n, owner.c_str(), "n");
  }
}

std::unique_ptr<Evaluator> Tersoff::evaluator(const BatchView& batch, ForcesOn) const {
  batch.check();
  const Species types(batch);
  const std::size_t count = types.numbers.size();
  std::vector<const Entry*> table(count * count * count, nullptr);
  for (std::size_t a = 0; a < count; ++a)
    for (std::size_t b = 0; b < count; ++b)
      for (std::size_t c = 0; c < count; ++c) {
        const std::array<std::int32_t, 3> species = {types.numbers[a], types.numbers[b], types.numbers[c]};
        const auto at = std::lower_bound(entries_.begin(), entries_.end(), species,
                                         [](const Entry& e, const auto& key) { return species_of(e) < key; });
        if (at != entries_.end() && species_of(*at) == species) table[(a * count + b) * count + c] = &*at;
      }

  // Cutoffs of each row's own species, so that a row's sums do not depend on the others.
  std::vector<double> cutoffs;
  std::vector<bool> present(count);
  for (std::size_t row = 0; row < batch.size(); ++row) {
    present.assign(count, false);
    for (std::int64_t atom = batch.offsets[row]; atom < batch.offsets[row + 1]; ++atom)
      present[static_cast<std::size_t>(types.of_atom[static_cast<std::size_t>(atom)])] = true;
    double longest = 0;
    for (std::size_t t = 0; t < table.size(); ++t) {
      const std::size_t a = t / (count * count), b = t / count % count, c = t % count;
      if (!present[a] || !present[b] || !present[c]) continue;
      if (!table[t])
        throw Error("Tersoff has no entry for " + std::string(chemical_symbol(types.numbers[a])) + "-" +
                    chemical_symbol(types.numbers[b]) + "-" + chemical_symbol(types.numbers[c]) +
                    "; its parameters do not cover these species");
      longest = std::max(longest, table[t]->R + table[t]->D);
    }
    cutoffs.push_back(longest > 0 ? longest : 1.0);  // a structure without atoms
  }

  TersoffTables tables;
  const auto window = [&](const Entry& e) {
    for (std::size_t w = 0; w < tables.windows.size(); ++w)
      if (tables.windows[w].R == e.R && tables.windows[w].D == e.D) return static_cast<int>(w);
    tables.windows.push_back({e.R, e.D});
    return static_cast<int>(tables.windows.size() - 1);
  };
  for (const Entry* e : table) {
    const Entry absent;  // of species that never meet
    if (!e) e = &absent;
    const double d2 = e->d * e->d;
    tables.triplets.push_back({e->gamma, e->h, 1.0 / d2, e->c * e->c / d2,
                               e->m == 3 ? e->lambda3 * e->lambda3 * e->lambda3 : e->lambda3, e->m == 3, window(*e)});
  }
  for (std::size_t a = 0; a < count; ++a)
    for (std::size_t b = 0; b < count; ++b) {
      const Entry absent;
      const Entry *e = table[(a * count + b) * count + b], *back = table[(b * count + a) * count + a];
      if (!e) e = &absent;
      if (!back) back = &absent;
      tables.bonds.push_back({e->A, e->lambda1, e->B, e->lambda2, e->beta, e->n, window(*e),
                              e->A == back->A && e->lambda1 == back->lambda1 && e->B == back->B &&
                                  e->lambda2 == back->lambda2 && e->R == back->R && e->D == back->D});
    }
  return std::make_unique<TersoffEvaluator>(batch, std::move(cutoffs), types, std::move(tables));
}

PairPrior::PairPrior(const Settings& settings) : settings_(settings) {
  expect_positive(settings.radius_scale, "PairPrior", "radius_scale");
  expect_not_negative(settings.cutoff, "PairPrior", "cutoff");
  if (settings.form == Form::bonding) {
    expect_not_negative(settings.depth, "PairPrior", "depth");
    expect_positive(settings.stiffness, "PairPrior", "stiffness");
  } else {
    expect_positive(settings.repulsive_factor, "PairPrior", "repulsive_factor");
  }
}

std::unique_ptr<Evaluator> PairPrior::evaluator(const BatchView& batch, ForcesOn) const {
  const Species types(batch);
  std::vector<PriorPair> table;
  for (const std::int32_t a : types.numbers)
    for (const std::int32_t b : types.numbers) {
      const double sum = settings_.radius_scale * (covalent_radius(a) + covalent_radius(b));
      PriorPair pair{};
      if (settings_.form == Form::bonding) {
        pair = morse_pair(sum, settings_.stiffness, settings_.depth, settings_.cutoff);
      } else {
        pair.radius = settings_.repulsive_factor * sum;
        pair.cutoff = settings_.cutoff > 0 ? settings_.cutoff : 3.0;
        pair.switch_from = 0.75 * pair.cutoff;
        pair.switch_scale = 1.0 / (pair.cutoff - pair.switch_from);
      }
      table.push_back(pair);
    }
  return std::make_unique<PriorEvaluator>(batch, settings_.form, settings_.sharp_cutoff, types, std::move(table));
}

ManyBodyPrior::ManyBodyPrior(std::vector<Pair> pairs, std::vector<Atom> atoms)
    : pairs_(std::move(pairs)), atoms_(std::move(atoms)) {
  for (const Atom& atom : atoms_) {
    covalent_radius(atom.number);  // throws for what is no element
    expect_positive(atom.exponent, "ManyBodyPrior", "exponent");
  }
  std::sort(atoms_.begin(), atoms_.end(), [](const Atom& a, const Atom& b) { return a.number < b.number; });
  for (std::size_t k = 1; k < atoms_.size(); ++k)
    if (atoms_[k - 1].number == atoms_[k].number)
      throw Error("ManyBodyPrior takes every species once, but " + std::string(chemical_symbol(atoms_[k].number)) +
                  " comes twice");
  const auto known = [&](std::int32_t z) {
    return std::any_of(atoms_.begin(), atoms_.end(), [&](const Atom& atom) { return atom.number == z; });
  };
  for (Pair& pair : pairs_) {
    for (const std::int32_t z : {pair.first, pair.second})
      if (!known(z))
        throw Error("ManyBodyPrior has no exponent for " + std::string(chemical_symbol(z)) + ", which is in a pair");
    if (pair.first > pair.second) std::swap(pair.first, pair.second);
    expect_not_negative(pair.depth, "ManyBodyPrior", "depth");
    expect_positive(pair.r0, "ManyBodyPrior", "r0");
    expect_positive(pair.stiffness, "ManyBodyPrior", "stiffness");
    if (!(pair.ratio > 1) || !std::isfinite(pair.ratio))
      throw Error("ManyBodyPrior needs a finite ratio above 1, but it is " + std::to_string(pair.ratio));
  }
  const auto key = [](const Pair& pair) { return std::pair(pair.first, pair.second); };
  std::sort(pairs_.begin(), pairs_.end(), [&](const Pair& a, const Pair& b) { return key(a) < key(b); });
  for (std::size_t k = 1; k < pairs_.size(); ++k)
    if (key(pairs_[k - 1]) == key(pairs_[k]))
      throw Error("ManyBodyPrior takes every pair of species once, but " +
                  std::string(chemical_symbol(pairs_[k].first)) + "-" + std::string(chemical_symbol(pairs_[k].second)) +
                  " comes twice");
}

std::unique_ptr<Evaluator> ManyBodyPrior::evaluator(const BatchView& batch, ForcesOn on) const {
  const Species types(batch);
  std::vector<double> exponents;
  for (const std::int32_t z : types.numbers) {
    const auto found = std::find_if(atoms_.begin(), atoms_.end(), [&](const Atom& atom) { return atom.number == z; });
    exponents.push_back(found == atoms_.end() ? 1.0 : found->exponent);
  }
  return std::make_unique<ManyBodyEvaluator>(batch, on, pairs_, entries(batch, types, pairs_), std::move(exponents));
}

Tilted::Tilted(std::shared_ptr<const Landscape> landscape, std::vector<double> shift)
    : landscape_(std::move(landscape)), shift_(std::move(shift)) {
  if (!landscape_) throw Error("Tilted needs a landscape");
  for (const double value : shift_)
    if (!std::isfinite(value)) throw Error("Tilted needs a finite shift");
}

std::unique_ptr<Evaluator> Tilted::evaluator(const BatchView& batch, ForcesOn on) const {
  if (batch.positions.size() != shift_.size())
    throw Error("Tilted is for batches of " + std::to_string(shift_.size() / 3) + " atoms, but this one has " +
                std::to_string(batch.positions.size() / 3));
  return std::make_unique<TiltedEvaluator>(batch, landscape_->evaluator(batch, on), shift_);
}

PotentialTables potential_tables(const Landscape& landscape, const BatchView& batch) {
  const std::unique_ptr<Evaluator> evaluator = landscape.evaluator(batch);
  const auto* of_rows = dynamic_cast<const RowEvaluator*>(evaluator.get());
  if (!of_rows) throw Error("only built-in potentials and priors can be handed to another back end");
  return of_rows->tables();
}

// ---- whole batches
// ---------------------------------------------------------------------------------------------------

void evaluate(const Landscape& landscape, const BatchView& batch, std::span<double> energies, std::span<double> forces,
              int threads) {
  batch.check();
  const std::int64_t n = static_cast<std::int64_t>(batch.size());
  if (energies.size() != batch.size())
    throw Error("energies must hold " + std::to_string(batch.size()) + " values, but it holds " +
                std::to_string(energies.size()));
  if (forces.size() != batch.positions.size())
    throw Error("forces must hold " + std::to_string(batch.positions.size()) + " values, but it holds " +
                std::to_string(forces.size()));
  if (threads < 0) throw Error("threads must be 0 (choose) or positive, but it is " + std::to_string(threads));
  if (threads == 0) threads = default_threads();
  if (n == 0) return;
  std::vector<std::int64_t> rows(static_cast<std::size_t>(n));
  for (std::int64_t row = 0; row < n; ++row) rows[static_cast<std::size_t>(row)] = row;
  // Chunks of 8, the width of a surrogate's tile; fewer structures are not worth waking a thread for.
  const std::int64_t chunk = 8, chunks = (n + chunk - 1) / chunk;
  threads = static_cast<int>(std::min<std::int64_t>(threads, chunks));
  if (threads == 1) {
    landscape.evaluator(batch)->evaluate(rows, batch.positions.data(), energies.data(), forces.data());
    return;
  }
  std::exception_ptr failure;
  std::int64_t failed_chunk = chunks;
#pragma omp parallel num_threads(threads)
  {
    std::unique_ptr<Evaluator> evaluator;
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t c = 0; c < chunks; ++c) {
      try {
        if (!evaluator) evaluator = landscape.evaluator(batch);
        const std::int64_t first = c * chunk, count = std::min(chunk, n - first);
        evaluator->evaluate({rows.data() + first, static_cast<std::size_t>(count)}, batch.positions.data(),
                            energies.data(), forces.data());
      } catch (...) {
#pragma omp critical(thalweg_evaluate)
        if (c < failed_chunk) {
          failed_chunk = c;
          failure = std::current_exception();
        }
      }
    }
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace thalweg
