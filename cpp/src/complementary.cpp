#include "thalweg/complementary.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

namespace thalweg {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

}  // namespace

class ComplementaryEvaluator : public Evaluator {
 public:
  ComplementaryEvaluator(const ComplementaryEnergy& landscape, const BatchView& batch, ForcesOn on)
      : landscape_(landscape), batch_(batch), on_(on), workspaces_(batch.size()) {}

  void evaluate(std::span<const std::int64_t> rows, const double* positions, double* energies,
                double* forces) override {
    for (const std::int64_t at : rows) {
      const auto row = static_cast<std::size_t>(at), first = static_cast<std::size_t>(batch_.offsets[row]);
      StructureView structure = batch_[row];
      structure.positions = positions + 3 * first;
      energies[row] = evaluate_row(row, first, structure, forces + 3 * first);
      if (!std::isfinite(energies[row])) std::fill_n(forces + 3 * first, 3 * structure.n, kNaN);
    }
  }

 private:
  double evaluate_row(std::size_t row, std::size_t first, const StructureView& structure, double* forces) {
    const LocalDensity& density = *landscape_.density_;
    const std::size_t D = density.size();
    features_.resize(std::max(features_.size(), structure.n * D));
    for (std::size_t k = 0; k < 3 * structure.n; ++k)
      if (!(std::abs(structure.positions[k]) <= 1e9)) return kNaN;
    if (!workspaces_[row])
      workspaces_[row] = std::make_unique<LocalDensity::Workspace>(density, only_moving(first, structure));
    try {
      density.values(structure, features_.data(), *workspaces_[row]);
    } catch (const Error&) {  // what does not depend on the positions was checked before
      return kNaN;
    }
    // The features are turned into the derivatives with respect to them.
    const double softening = landscape_.softening_;
    double energy = 0;
    for (std::size_t i = 0; i < structure.n; ++i) {
      double* f = features_.data() + i * D;
      if (!landscape_.counts(first + i)) {
        std::fill_n(f, D, 0.0);
        continue;
      }
      const double* attractor = landscape_.attractors_.data() + (first + i) * D;
      double square = softening * softening;
      for (std::size_t s = 0; s + 1 < D; ++s) {
        f[s] -= attractor[s];
        square += f[s] * f[s];
      }
      const double distance = std::sqrt(square);
      energy += distance - softening;
      for (std::size_t s = 0; s + 1 < D; ++s) f[s] /= distance;
    }
    std::fill_n(forces, 3 * structure.n, 0.0);
    density.contract(features_.data(), -1.0, forces, *workspaces_[row]);
    return energy;
  }

  // What atoms that stay make among themselves matters to none of the others.
  bool only_moving(std::size_t first, const StructureView& structure) const {
    if (on_ == ForcesOn::all) return false;
    for (std::size_t i = 0; i < structure.n; ++i)
      if (structure.is_still(i) && landscape_.counts(first + i)) return false;
    return true;
  }

  const ComplementaryEnergy& landscape_;  // outlives its evaluators
  BatchView batch_;
  ForcesOn on_;
  std::vector<std::unique_ptr<LocalDensity::Workspace>> workspaces_;  // (n), made when a row is first asked for
  std::vector<double> features_;
};

ComplementaryEnergy::ComplementaryEnergy(std::shared_ptr<const LocalDensity> density, std::vector<double> attractors,
                                         double softening)
    : density_(std::move(density)), attractors_(std::move(attractors)), softening_(softening) {
  if (!density_) throw Error("a complementary energy needs a local density");
  if (!(softening > 0) || !std::isfinite(softening))
    throw Error("the softening of a complementary energy must be above 0, in the unit of the features, but it is " +
                std::to_string(softening));
  const std::size_t D = density_->size();
  if (attractors_.size() % D != 0)
    throw Error("attractors must have " + std::to_string(D) + " columns, but there are " +
                std::to_string(attractors_.size()) + " numbers");
  for (std::size_t row = 0; row < attractors_.size(); row += D) {
    const std::span<const double> values(attractors_.data() + row, D);
    if (!std::all_of(values.begin(), values.end(), [](double v) { return std::isfinite(v); }) &&
        !std::all_of(values.begin(), values.end(), [](double v) { return std::isnan(v); }))
      throw Error("attractors must be finite, or NaN in all columns where an atom does not count, but row " +
                  std::to_string(row / D) + " is neither");
  }
}

bool ComplementaryEnergy::counts(std::size_t atom) const { return !std::isnan(attractors_[atom * density_->size()]); }

std::unique_ptr<Evaluator> ComplementaryEnergy::evaluator(const BatchView& batch, ForcesOn on) const {
  batch.check();
  const std::size_t D = density_->size();
  if (batch.atoms() * D != attractors_.size())
    throw Error("this complementary energy is for batches of " + std::to_string(attractors_.size() / D) +
                " atoms, but this one has " + std::to_string(batch.atoms()));
  for (std::size_t atom = 0; atom < batch.atoms(); ++atom)
    if (counts(atom) && attractors_[atom * D + D - 1] != batch.numbers[atom])
      throw Error("an atom's attractor must be of its own species, but that of atom " + std::to_string(atom) +
                  " with atomic number " + std::to_string(batch.numbers[atom]) + " ends in " +
                  std::to_string(attractors_[atom * D + D - 1]));
  for (std::size_t row = 0; row < batch.size(); ++row) {
    try {
      density_->check(batch[row]);
    } catch (const Error& error) {
      throw Error("structure " + std::to_string(row) + " of the batch: " + error.what());
    }
  }
  return std::make_unique<ComplementaryEvaluator>(*this, batch, on);
}

}  // namespace thalweg
