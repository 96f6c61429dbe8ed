// The one interface that relaxation, surrogate and potentials share: batch -> energies and forces.
#pragma once

#include <memory>
#include <span>

#include "thalweg/core.hpp"

namespace thalweg {

/// Scratch space and neighbour lists of one thread for the structures of one batch. Structures keep species, cell and
/// pbc; only positions change between calls.
class Evaluator {
 public:
  virtual ~Evaluator() = default;
  /// Energies [eV] and forces [eV/angstrom] of the structures `rows` of the batch.
  /// positions: all coordinates of the batch (m, 3). energies (n) and forces (m, 3) are written at those rows only.
  /// The result of a row does not depend on which other rows are asked for (bit for bit).
  virtual void evaluate(std::span<const std::int64_t> rows, const double* positions, double* energies,
                        double* forces) = 0;
};

/// What an evaluator is asked for. `moving`, for relaxations: forces on atoms with all coordinates fixed may come out
/// as anything, and these atoms stay where they were when their row was first asked for, so that what they make among
/// themselves need be found only once.
enum class ForcesOn { all, moving };

/// Anything that gives every structure an energy: built-in potentials, pair priors, surrogates, acquisition surfaces.
/// Immutable while evaluators made from it live; shared by threads.
class Landscape {
 public:
  virtual ~Landscape() = default;
  /// Throws Error when a species, cell or size of the batch is not covered. The batch's arrays must outlive the
  /// evaluator, but its positions are only read in this call.
  virtual std::unique_ptr<Evaluator> evaluator(const BatchView& batch, ForcesOn on = ForcesOn::all) const = 0;
};

/// Energies (n) and forces (m, 3) of a whole batch; threads = 0: default_threads(). Same bits for any thread count.
void evaluate(const Landscape& landscape, const BatchView& batch, std::span<double> energies, std::span<double> forces,
              int threads = 0);

}  // namespace thalweg
