// The GP as a landscape: E(x) = prior(x) + sum of atom energies + mean + k(fingerprint(x)) alpha - kappa sigma(x).
// kappa = 0 gives the model's energy, kappa > 0 the lower confidence bound (thesis (2.18)).
// Forces come from one backward pass (fingerprint.hpp, contract): the Jacobian is never formed.
// Structures are taken eight at a time, one SIMD lane each (gpr.hpp); bits do not depend on who shares a tile.
// A structure without an energy (coordinates not finite, atoms on one point) gets NaN and leaves the others alone.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "thalweg/fingerprint.hpp"
#include "thalweg/gpr.hpp"
#include "thalweg/landscape.hpp"

namespace thalweg {

class Surrogate : public Landscape {
 public:
  /// prior may be null. atom_energies: (atomic number, eV); species not named count 0. Throws Error if the lengths of
  /// fingerprint and gpr disagree, the gpr has no data, or kappa is not finite.
  Surrogate(std::shared_ptr<const Fingerprint> fingerprint, std::shared_ptr<const Gpr> gpr,
            std::shared_ptr<const Landscape> prior, std::vector<std::pair<std::int32_t, double>> atom_energies,
            double kappa);

  std::unique_ptr<Evaluator> evaluator(const BatchView& batch, ForcesOn on = ForcesOn::all) const override;

  /// Energies and sigmas (n), and if wanted (else empty) their forces (m, 3): -d energy/dx and -d sigma/dx. kappa is
  /// not applied. threads = 0: default_threads().
  void predict(const BatchView& batch, std::span<double> energies, std::span<double> sigmas, std::span<double> forces,
               std::span<double> sigma_forces, int threads = 0) const;

 private:
  friend class SurrogateEvaluator;
  std::shared_ptr<const Fingerprint> fingerprint_;
  std::shared_ptr<const Gpr> gpr_;
  std::shared_ptr<const Landscape> prior_;
  std::vector<std::pair<std::int32_t, double>> atom_energies_;
  double kappa_;
};

}  // namespace thalweg
