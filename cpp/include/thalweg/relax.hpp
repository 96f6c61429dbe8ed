// Local minimisation of whole batches on any landscape: L-BFGS with a step limit, fixed coordinates, a confinement box
// and convergence per structure. Results do not depend on the batch or the number of threads.
#pragma once

#include <vector>

#include "thalweg/landscape.hpp"

namespace thalweg {

struct Confinement {
  bool active = false;
  double corner[3] = {};              // angstrom
  double vectors[9] = {};             // rows span the box, angstrom
  std::uint8_t open[3] = {};          // 1: no walls along this vector (a periodic direction that the box fills)
};

struct RelaxSettings {
  int steps = 100;                // energy + force evaluations per structure beyond the first
  double force_tolerance = 0.05;  // eV/angstrom: largest force on one atom (projected on free coordinates and walls)
  double max_step = 0.2;          // angstrom: largest move of one atom in one step
  int memory = 10;                // pairs of L-BFGS
  double first_curvature = 70.0;  // eV/angstrom^2: the first step is forces / first_curvature
};

/// The optimiser of one structure, driven from outside: give it energy and forces at position(), it moves on.
/// A step that raises the energy is taken back and shortened; every call counts one evaluation.
///
///     Minimiser m(settings, structure, confinement);
///     while (!m.done()) m.tell(energy_at(m.positions()), forces_at(m.positions()));
class Minimiser {
 public:
  Minimiser(const RelaxSettings& settings, const StructureView& start, const Confinement& confinement);
  bool done() const { return converged_ || evaluations_ > settings_.steps; }
  bool converged() const { return converged_; }
  int evaluations() const { return evaluations_; }
  /// Where the next energy and forces are wanted (n, 3).
  const std::vector<double>& positions() const { return trial_; }
  /// Throws nothing: an energy or force that is not finite is treated as a step too long.
  void tell(double energy, const double* forces);
  /// The best point seen and what it gave.
  const std::vector<double>& best_positions() const { return best_; }
  double best_energy() const { return best_energy_; }
  const std::vector<double>& best_forces() const { return best_forces_; }

 private:
  RelaxSettings settings_;
  Confinement confinement_;
  std::size_t n_ = 0;
  bool converged_ = false;
  int evaluations_ = 0;
  double best_energy_ = 0, scale_ = 1;
  std::vector<std::uint8_t> fixed_;
  std::vector<double> trial_, best_, best_forces_, direction_;
  std::vector<double> history_s_, history_y_, history_rho_;  // rings of `memory` vectors
  int stored_ = 0, newest_ = -1;
  // helpers live in relax.cpp; extend the private part as needed
};

struct RelaxResult {
  std::vector<double> positions, energies, forces;  // (m, 3), (n), (m, 3) at the best point of each structure
  std::vector<std::int32_t> evaluations;            // (n)
  std::vector<std::uint8_t> converged;              // (n)
};

/// Relaxes every structure of the batch. threads = 0: default_threads().
RelaxResult relax(const Landscape& landscape, const BatchView& batch, const RelaxSettings& settings,
                  const Confinement& confinement, int threads = 0);

}  // namespace thalweg
