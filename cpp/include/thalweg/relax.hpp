// Local minimisation of whole batches on any landscape: L-BFGS with a step limit, fixed coordinates, a confinement box
// and convergence per structure. Results do not depend on the batch or the number of threads.
#pragma once

#include <vector>

#include "thalweg/landscape.hpp"

namespace thalweg {

/// A parallelepiped that free atoms do not leave. A vector of length zero makes a flat box: atoms stay in the plane of
/// the two others.
struct Confinement {
  bool active = false;
  double corner[3] = {};       // angstrom
  double vectors[9] = {};      // rows span the box, angstrom
  std::uint8_t open[3] = {};   // 1: no walls along this vector (a periodic direction that the box fills)
  std::size_t first_atom = 0;  // atoms before this one (a template's) know no walls when a structure is relaxed
};

/// A Confinement as three slabs: along vector k a point is inside while 0 <= height(k, x) <= thickness[k].
struct Walls {
  Walls() = default;
  /// Throws Error if the vectors do not span a box (two of them at least must be independent, none nearly so).
  explicit Walls(const Confinement& box);
  constexpr double height(int k, const double* x) const {
    const double* normal = normals + 3 * k;
    return normal[0] * x[0] + normal[1] * x[1] + normal[2] * x[2] - base[k];
  }
  /// Largest distance by which x lies beyond a wall [angstrom]; at most 0 inside. Open directions do not count.
  double outside(const double* x) const;
  /// The same with walls along open directions too.
  double outside_closed(const double* x) const;

  bool active = false;
  double normals[9] = {};    // unit vectors; row k is perpendicular to the two other vectors
  double base[3] = {};       // normal . corner
  double thickness[3] = {};  // angstrom
  bool open[3] = {};
};

struct Touching;  // walls that one atom touches; private (relax_walls.hpp)

struct RelaxSettings {
  int steps = 100;                // energy + force evaluations per structure beyond the first
  double force_tolerance = 0.05;  // eV/angstrom: largest force on one atom (projected on free coordinates and walls)
  double max_step = 0.2;          // angstrom: largest move of one atom in one step
  int memory = 10;                // pairs of L-BFGS
  double first_curvature = 70.0;  // eV/angstrom^2: the first step is forces / first_curvature
};

/// The optimiser of one structure, driven from outside: give it energy and forces at positions(), it moves on.
///
///     Minimiser m(settings, structure, confinement);
///     while (!m.done()) m.tell(energy_at(m.positions()), forces_at(m.positions()));
///
/// L-BFGS (Nocedal, Math. Comp. 35, 773 (1980)); the whole step is scaled so that no atom moves further than max_step.
/// A step that raises the energy, or gives something that is not finite, is taken back; the curvature seen on it gives
/// a new direction, which is then shortened up to five times; then all curvature is forgotten and the forces are
/// followed; if that fails too the minimiser is done, not converged. Every call counts one evaluation.
///
/// Box: an atom at a wall slides along it, and the force that presses it against the wall does not count. An atom that
/// starts outside is not put back: for each wall it is beyond, its present distance is its wall, so it may only come
/// closer. Curvature pairs are steps and differences of the true forces along the faces that hold atoms at the time
/// (a projected quasi-Newton method after Bertsekas, SIAM J. Control Optim. 20, 221 (1982)).
class Minimiser {
 public:
  /// Throws Error for settings out of range, positions that are not finite, or a box without volume.
  Minimiser(const RelaxSettings& settings, const StructureView& start, const Confinement& confinement);
  bool done() const { return converged_ || stalled_ || evaluations_ > settings_.steps; }
  bool converged() const { return converged_; }
  /// Calls of tell() so far.
  int evaluations() const { return evaluations_; }
  /// Where the next energy and forces are wanted (n, 3).
  const std::vector<double>& positions() const { return trial_; }
  /// Throws nothing: an energy or force that is not finite is treated as a step too long. Ignored once done().
  void tell(double energy, const double* forces);
  /// The last point that was kept (the lowest seen, to the tolerance of 1e-8 max(1, |E|)) and what it gave.
  const std::vector<double>& best_positions() const { return best_; }
  double best_energy() const { return best_energy_; }
  const std::vector<double>& best_forces() const { return best_forces_; }

 private:
  Touching touching(std::size_t atom, const double* x) const;
  void project_to_face(std::size_t atom, double* v) const;
  std::size_t ring_row(int age) const {
    return static_cast<std::size_t>((newest_ - age + settings_.memory) % settings_.memory);
  }
  bool weigh(std::size_t row);
  void confine(std::size_t atom, const double* from, double* to) const;
  double project_forces();
  bool remember();
  void choose_direction();
  void restart_direction();
  void limit_direction();
  void place_trial();
  bool shorten(double energy, const double* forces, bool finite);

  RelaxSettings settings_;
  Walls walls_;
  std::size_t n_ = 0, first_ = 0;  // atoms; the first one that knows walls
  bool converged_ = false, stalled_ = false, steepest_ = true, corrected_ = false;
  int evaluations_ = 0, shortened_ = 0;
  double best_energy_ = 0, scale_ = 1;         // trial = best + scale * direction, confined
  std::vector<std::uint8_t> held_;             // (n) walls that hold an atom, one bit per direction of the box
  std::vector<double> free_;                   // (n, 3) 1 where the coordinate may move, else 0
  std::vector<double> trial_, trial_forces_;   // (n, 3)
  std::vector<double> best_, best_forces_;     // (n, 3)
  std::vector<double> projected_, direction_;  // (n, 3) forces that count; step of length scale = 1
  // rings of `memory` rows of 3 n: steps, falls of the force along them, and 1 / (step . fall)
  std::vector<double> history_s_, history_y_, history_rho_, history_alpha_;
  int stored_ = 0, newest_ = -1;
};

struct RelaxResult {
  std::vector<double> positions, energies, forces;  // (m, 3), (n), (m, 3) at the best point of each structure;
                                                    // forces on atoms with all coordinates fixed: 0
  std::vector<std::int32_t> evaluations;            // (n)
  std::vector<std::uint8_t> converged;              // (n)
};

/// Relaxes every structure of the batch. threads = 0: default_threads().
RelaxResult relax(const Landscape& landscape, const BatchView& batch, const RelaxSettings& settings,
                  const Confinement& confinement, int threads = 0);

}  // namespace thalweg
