// Valence tight binding of free molecules, see potentials.hpp.
#include <Eigen/Eigenvalues>
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>

#include "thalweg/potentials.hpp"

namespace thalweg {
namespace {

constexpr double kSwitchFrom = 1.3, kSwitchTo = 2.1;  // of r0
constexpr double kTemperature = 0.2;                  // eV, of the electrons
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Hartree-Fock term values [eV] and valence electrons (Harrison 1999, after J. B. Mann).
struct Term {
  std::int32_t number;
  double s, p;
  int electrons;
};
constexpr Term kTerms[] = {
    {1, -13.61, 0.0, 1},     {5, -13.46, -8.43, 3},   {6, -19.38, -11.07, 4}, {7, -26.22, -13.84, 5},
    {8, -34.02, -16.77, 6},  {9, -42.79, -19.87, 7},  {14, -14.79, -7.59, 4}, {15, -19.22, -9.54, 5},
    {16, -24.02, -11.60, 6}, {17, -29.20, -13.78, 7},
};

const Term* term_of(std::int32_t number) {
  const auto found =
      std::find_if(std::begin(kTerms), std::end(kTerms), [&](const Term& t) { return t.number == number; });
  return found == std::end(kTerms) ? nullptr : found;
}

class TightBindingEvaluator : public Evaluator {
 public:
  TightBindingEvaluator(const BatchView& batch, const std::vector<TightBinding::Pair>& pairs,
                        const std::vector<TightBinding::Atom>& atoms)
      : batch_(batch) {
    batch.check();
    for (std::size_t row = 0; row < batch.size(); ++row)
      if (batch[row].periodic()) throw Error("TightBinding is for free molecules, but a structure is periodic");
    std::vector<std::int32_t> species(batch.numbers.begin(), batch.numbers.end());
    std::sort(species.begin(), species.end());
    species.erase(std::unique(species.begin(), species.end()), species.end());
    for (const std::int32_t z : species) {
      const auto found = std::find_if(atoms.begin(), atoms.end(), [&](const auto& atom) { return atom.number == z; });
      if (found == atoms.end()) throw Error("TightBinding has no levels for " + std::string(chemical_symbol(z)));
      atoms_.push_back(*found);
      electrons_.push_back(term_of(z)->electrons);
    }
    for (const std::int32_t z : batch.numbers)
      type_.push_back(static_cast<std::size_t>(std::lower_bound(species.begin(), species.end(), z) - species.begin()));
    for (const std::int32_t a : species)
      for (const std::int32_t b : species) {
        const auto found = std::find_if(pairs.begin(), pairs.end(), [&](const TightBinding::Pair& pair) {
          return pair.first == std::min(a, b) && pair.second == std::max(a, b);
        });
        if (found == pairs.end())
          throw Error("TightBinding has no entry for the pair " + std::string(chemical_symbol(a)) + "-" +
                      std::string(chemical_symbol(b)));
        table_.push_back({found->r0, found->couplings, found->stiffness / found->r0, found->repulsion,
                          found->ratio * found->stiffness / found->r0,
                          ManyBodyPrior::kWall * (covalent_radius(a) + covalent_radius(b))});
      }
  }

  void evaluate(std::span<const std::int64_t> rows, const double* positions, double* energies,
                double* forces) override {
    for (const std::int64_t row : rows) {
      const std::size_t first = static_cast<std::size_t>(batch_.offsets[static_cast<std::size_t>(row)]),
                        n = static_cast<std::size_t>(batch_.offsets[static_cast<std::size_t>(row) + 1]) - first;
      std::fill_n(forces + 3 * first, 3 * n, 0.0);
      energies[row] = one(n, type_.data() + first, positions + 3 * first, forces + 3 * first);
      if (!std::isfinite(energies[row])) {
        energies[row] = kNaN;
        std::fill_n(forces + 3 * first, 3 * n, kNaN);
      }
    }
  }

 private:
  struct Entry {
    double r0;                                       // angstrom
    std::array<double, 4> couplings;                 // eV
    double decay, repulsion, repulsion_decay, wall;  // 1/angstrom, eV, 1/angstrom, angstrom
  };
  struct Bond {
    std::size_t i, j;
    const Entry* entry;
    double u[3], r, g, slope;  // H = g x couplings
  };

  struct Block {
    std::vector<Eigen::Index> orbitals;
    Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver;
  };

  double one(std::size_t n, const std::size_t* type, const double* x, double* forces) {
    start_.resize(n + 1);
    start_[0] = 0;
    int electrons = 0;
    for (std::size_t i = 0; i < n; ++i) {
      start_[i + 1] = start_[i] + (atoms_[type[i]].number == 1 ? 1 : 4);
      electrons += electrons_[type[i]];
    }
    const Eigen::Index size = static_cast<Eigen::Index>(start_[n]);
    if (size == 0) return 0.0;
    h_.setZero(size, size);
    for (std::size_t i = 0; i < n; ++i)
      for (std::size_t a = start_[i]; a < start_[i + 1]; ++a)
        h_(index(a), index(a)) = a == start_[i] ? atoms_[type[i]].s : atoms_[type[i]].p;
    bonds_.clear();
    double energy = 0;
    for (std::size_t i = 0; i < n; ++i)
      for (std::size_t j = 0; j < i; ++j) energy += couple(i, j, type, x, forces);
    if (!h_.allFinite()) return kNaN;
    if (!diagonalise()) return kNaN;
    energy += occupy(electrons);
    // P = 2 sum f c c^T, block by block
    density_.setZero(size, size);
    const double* occupied = occupation_.data();
    for (std::size_t k = 0; k < used_; ++k) {
      const auto& [of, solver] = blocks_[k];
      const auto empty = std::find_if(occupied, occupied + of.size(), [](double f) { return f < 1e-15; });
      const auto vectors = solver.eigenvectors().leftCols(empty - occupied);
      weighted_ = vectors;
      for (Eigen::Index c = 0; c < vectors.cols(); ++c) weighted_.col(c) *= 2.0 * occupied[c];
      occupied += of.size();
      block_.noalias() = weighted_ * vectors.transpose();
      for (std::size_t a = 0; a < of.size(); ++a)
        for (std::size_t b = 0; b < of.size(); ++b) density_(of[a], of[b]) = block_(index(a), index(b));
    }
    for (const Bond& bond : bonds_) add_forces(bond, forces);
    return energy;
  }

  // Levels and states of each block of H: pieces of a molecule that are out of reach of one another, and in a flat one
  // the p orbitals at right angles to it, are nothing to one another (if it lies as the axes do, so that H is exactly
  // zero).
  bool diagonalise() {
    const Eigen::Index size = h_.rows();
    used_ = 0;
    levels_.clear();
    left_.resize(static_cast<std::size_t>(size));
    std::iota(left_.begin(), left_.end(), Eigen::Index{0});
    while (!left_.empty()) {
      if (used_ == blocks_.size()) blocks_.emplace_back();
      auto& [block, solver] = blocks_[used_++];
      block.assign(1, left_.front());
      left_.erase(left_.begin());
      for (std::size_t k = 0; k < block.size(); ++k) {
        const Eigen::Index a = block[k];
        const auto coupled = [&](Eigen::Index b) { return h_(std::max(a, b), std::min(a, b)) != 0.0; };
        const auto rest =
            std::stable_partition(left_.begin(), left_.end(), [&](Eigen::Index b) { return !coupled(b); });
        block.insert(block.end(), rest, left_.end());
        left_.erase(rest, left_.end());
      }
      std::sort(block.begin(), block.end());
      const std::size_t n = block.size();
      block_.resize(index(n), index(n));
      for (std::size_t a = 0; a < n; ++a)
        for (std::size_t b = 0; b <= a; ++b) block_(index(a), index(b)) = h_(block[a], block[b]);
      solver.compute(block_);
      if (solver.info() != Eigen::Success) return false;
      levels_.insert(levels_.end(), solver.eigenvalues().data(), solver.eigenvalues().data() + n);
    }
    return true;
  }

  static Eigen::Index index(std::size_t a) { return static_cast<Eigen::Index>(a); }
  std::size_t orbitals(std::size_t i) const { return start_[i + 1] - start_[i]; }

  // The block of two atoms; their repulsion is given back and its forces are added.
  double couple(std::size_t i, std::size_t j, const std::size_t* type, const double* x, double* forces) {
    const Entry& e = table_[type[i] * atoms_.size() + type[j]];
    Bond bond{i, j, &e, {}, 0.0, 0.0, 0.0};
    double square = 0;
    for (std::size_t c = 0; c < 3; ++c) {
      bond.u[c] = x[3 * j + c] - x[3 * i + c];
      square += bond.u[c] * bond.u[c];
    }
    const double r = bond.r = std::sqrt(square);
    if (!(r > 0)) return kNaN;
    if (r >= kSwitchTo * e.r0) return 0.0;
    for (double& c : bond.u) c /= r;
    double window = 1.0, d_window = 0.0;
    if (const double width = (kSwitchTo - kSwitchFrom) * e.r0, t = (r - kSwitchFrom * e.r0) / width; t > 0) {
      window = 1.0 - t * t * t * (10.0 - t * (15.0 - 6.0 * t));
      d_window = -30.0 * t * t * (1.0 - t) * (1.0 - t) / width;
    }
    const double hop = std::exp(-e.decay * (r - e.r0));
    bond.g = hop * window;
    bond.slope = hop * (d_window - e.decay * window);
    const auto& [ss, sp, sigma, pi] = e.couplings;
    const Eigen::Index a = index(start_[i]), b = index(start_[j]);
    h_(a, b) = bond.g * ss;
    for (Eigen::Index c = 1; c < index(orbitals(j)); ++c) h_(a, b + c) = bond.g * sp * bond.u[c - 1];
    for (Eigen::Index c = 1; c < index(orbitals(i)); ++c) h_(a + c, b) = -bond.g * sp * bond.u[c - 1];
    for (Eigen::Index c = 1; c < index(orbitals(i)); ++c)
      for (Eigen::Index d = 1; d < index(orbitals(j)); ++d)
        h_(a + c, b + d) = bond.g * ((sigma - pi) * bond.u[c - 1] * bond.u[d - 1] + (c == d ? pi : 0.0));
    bonds_.push_back(bond);

    const double push = e.repulsion * std::exp(-e.repulsion_decay * (r - e.r0));
    double energy = push * window, slope = push * (d_window - e.repulsion_decay * window);
    if (const double inside = 1.0 - r / e.wall; inside > 0) {
      energy += ManyBodyPrior::kWallHeight * inside * inside * inside;
      slope -= 3.0 * ManyBodyPrior::kWallHeight * inside * inside / e.wall;
    }
    for (std::size_t c = 0; c < 3; ++c) {
      forces[3 * j + c] -= slope * bond.u[c];
      forces[3 * i + c] += slope * bond.u[c];
    }
    return energy;
  }

  // Fermi-Dirac occupations of the levels; their free energy. The Fermi level by Newton's rule from the middle of the
  // gap, kept between bounds, in which it is halved where that leads out of them.
  double occupy(int electrons) {
    sorted_ = levels_;
    std::sort(sorted_.begin(), sorted_.end());
    occupation_.resize(levels_.size());
    const double pairs = 0.5 * electrons;
    const std::size_t half = static_cast<std::size_t>(electrons / 2);
    double mu = electrons % 2 == 0 ? 0.5 * (sorted_[half - 1] + sorted_[half]) : sorted_[half];
    double low = sorted_.front() - 40 * kTemperature, high = sorted_.back() + 40 * kTemperature;
    for (int step = 0; step < 100; ++step) {
      double excess = -pairs, slope = 0;
      for (std::size_t k = 0; k < levels_.size(); ++k) {
        const double z = (levels_[k] - mu) / kTemperature, f = z > 40 ? 0.0 : 1.0 / (1.0 + std::exp(z));
        occupation_[k] = f;
        excess += f;
        slope += f * (1.0 - f) / kTemperature;
      }
      if (std::abs(excess) < 1e-13 * (1.0 + pairs) || high - low < 1e-13) break;
      (excess < 0 ? low : high) = mu;
      mu -= excess / slope;
      if (!(mu > low && mu < high)) mu = 0.5 * (low + high);
    }
    double energy = 0;
    for (std::size_t k = 0; k < levels_.size(); ++k) {
      const double f = occupation_[k];
      energy += 2.0 * f * levels_[k];
      if (f > 1e-15 && f < 1.0) energy += 2.0 * kTemperature * (f * std::log(f) + (1.0 - f) * std::log1p(-f));
    }
    return energy;
  }

  void add_forces(const Bond& bond, double* forces) const {
    const Eigen::Index a = index(start_[bond.i]), b = index(start_[bond.j]);
    const bool p_i = orbitals(bond.i) > 1, p_j = orbitals(bond.j) > 1;
    const double* u = bond.u;
    const auto& [ss, sp, sigma, pi] = bond.entry->couplings;
    double angular = ss * density_(a, b), turn[3] = {0, 0, 0};  // of sum P M, and its derivative by u
    for (Eigen::Index c = 0; c < 3; ++c) {
      if (p_j) turn[c] += sp * density_(a, b + 1 + c);
      if (p_i) turn[c] -= sp * density_(a + 1 + c, b);
    }
    for (Eigen::Index c = 0; c < 3; ++c) angular += turn[c] * u[c];
    if (p_i && p_j)
      for (Eigen::Index c = 0; c < 3; ++c) {
        angular += pi * density_(a + 1 + c, b + 1 + c);
        for (Eigen::Index d = 0; d < 3; ++d) {
          const double both = (sigma - pi) * density_(a + 1 + c, b + 1 + d);
          angular += both * u[c] * u[d];
          turn[c] += both * u[d];
          turn[d] += both * u[c];
        }
      }
    const double along = turn[0] * u[0] + turn[1] * u[1] + turn[2] * u[2];
    for (std::size_t c = 0; c < 3; ++c) {
      const double slope = 2.0 * (bond.slope * angular * u[c] + bond.g / bond.r * (turn[c] - along * u[c]));
      forces[3 * bond.j + c] -= slope;
      forces[3 * bond.i + c] += slope;
    }
  }

  BatchView batch_;
  std::vector<TightBinding::Atom> atoms_;  // of each species
  std::vector<int> electrons_;
  std::vector<std::size_t> type_;   // of each atom of the batch
  std::vector<Entry> table_;        // (species, species)
  std::vector<std::size_t> start_;  // first orbital of each atom
  std::vector<Bond> bonds_;
  Eigen::MatrixXd h_, block_, weighted_, density_;  // h_: below the diagonal
  std::vector<Block> blocks_;                       // `used_` of them; the others keep their memory
  std::size_t used_ = 0;
  std::vector<Eigen::Index> left_;                    // orbitals in no block yet
  std::vector<double> levels_, occupation_, sorted_;  // block by block, but the last
};

}  // namespace

TightBinding::TightBinding(std::vector<Pair> pairs, std::vector<Atom> atoms)
    : pairs_(std::move(pairs)), atoms_(std::move(atoms)) {
  const auto twice = [](const std::string& what) { return Error("TightBinding takes " + what + " once, not twice"); };
  std::sort(atoms_.begin(), atoms_.end(), [](const Atom& a, const Atom& b) { return a.number < b.number; });
  for (std::size_t k = 0; k < atoms_.size(); ++k) {
    free_atom(atoms_[k].number);  // throws for one that is not covered
    if (!std::isfinite(atoms_[k].s) || !std::isfinite(atoms_[k].p)) throw Error("TightBinding needs finite levels");
    if (k > 0 && atoms_[k - 1].number == atoms_[k].number) throw twice(std::string(chemical_symbol(atoms_[k].number)));
  }
  for (Pair& pair : pairs_) {
    for (const std::int32_t z : {pair.first, pair.second})
      if (std::none_of(atoms_.begin(), atoms_.end(), [&](const Atom& atom) { return atom.number == z; }))
        throw Error("TightBinding has no levels for " + std::string(chemical_symbol(z)) + ", which is in a pair");
    if (pair.first > pair.second) std::swap(pair.first, pair.second);
    for (const double value : {pair.r0, pair.stiffness, pair.repulsion, pair.ratio})
      if (!(value > 0) || !std::isfinite(value))
        throw Error("TightBinding needs positive, finite r0, stiffness, repulsion and ratio, but one is " +
                    std::to_string(value));
    for (const double value : pair.couplings)
      if (!std::isfinite(value)) throw Error("TightBinding needs finite couplings");
  }
  const auto key = [](const Pair& pair) { return std::pair(pair.first, pair.second); };
  std::sort(pairs_.begin(), pairs_.end(), [&](const Pair& a, const Pair& b) { return key(a) < key(b); });
  for (std::size_t k = 1; k < pairs_.size(); ++k)
    if (key(pairs_[k - 1]) == key(pairs_[k]))
      throw twice(std::string(chemical_symbol(pairs_[k].first)) + "-" + std::string(chemical_symbol(pairs_[k].second)));
}

TightBinding::Atom TightBinding::free_atom(std::int32_t number) {
  const Term* term = term_of(number);
  if (!term)
    throw Error("TightBinding knows H, B, C, N, O, F, Si, P, S and Cl, not " + std::string(chemical_symbol(number)));
  return {number, term->s, term->p};
}

std::vector<std::int32_t> TightBinding::elements() {
  std::vector<std::int32_t> out;
  for (const Term& term : kTerms) out.push_back(term.number);
  return out;
}

std::unique_ptr<Evaluator> TightBinding::evaluator(const BatchView& batch, ForcesOn) const {
  return std::make_unique<TightBindingEvaluator>(batch, pairs_, atoms_);
}

}  // namespace thalweg
