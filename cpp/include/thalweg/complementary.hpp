// Complementary energy (Chiriki, Christiansen, Hammer, Phys. Rev. B 100, 235436 (2019), (5) to (7)): how far atoms are
// from the surroundings that they should take over.
//
//   CE(x) = sum over the atoms i that have an attractor A_i of sqrt(|f_i(x) - A_i|^2 + softening^2) - softening
//
// with f the local density (density.hpp). The paper's |f_i - A_i| has no derivative where an atom has arrived; the
// softening gives it one. Which attractor is whose stays fixed.
#pragma once

#include <memory>
#include <vector>

#include "thalweg/density.hpp"
#include "thalweg/landscape.hpp"

namespace thalweg {

/// For batches whose atoms are those of the attractors, in order. A structure without features (coordinates not finite,
/// atoms on one point) gets NaN and leaves the others alone. "Energies" are in the unit of the features.
class ComplementaryEnergy : public Landscape {
 public:
  /// attractors: (m, D), in each row the features that the atom should come to have, its own atomic number last; a row
  /// of NaN: the atom does not count. Throws Error if there is no density, the length is no multiple of D, a row is
  /// neither finite nor NaN throughout, or the softening is not above 0.
  ComplementaryEnergy(std::shared_ptr<const LocalDensity> density, std::vector<double> attractors, double softening);

  /// Throws Error for a batch with another number of atoms, atoms of another species than their attractor, species
  /// that the density does not cover or cells that cannot be used.
  std::unique_ptr<Evaluator> evaluator(const BatchView& batch, ForcesOn on = ForcesOn::all) const override;

 private:
  friend class ComplementaryEvaluator;
  bool counts(std::size_t atom) const;

  std::shared_ptr<const LocalDensity> density_;
  std::vector<double> attractors_;  // (m, D)
  double softening_;
};

}  // namespace thalweg
