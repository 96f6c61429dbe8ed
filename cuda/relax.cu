// Twin of relax.cpp: the same algorithm, step by step (read Minimiser there first). A block takes a structure and a
// thread the same atoms throughout, so only sums need barriers; all threads hold the same scalars and take the same
// branches.
#include <algorithm>
#include <cmath>

#include "device.cuh"
#include "relax_walls.hpp"

namespace thalweg::cuda {
namespace {

constexpr double kEnergySlack = 1e-8;  // as in relax.cpp
constexpr int kMostShortenings = 5;

/// What a structure remembers from step to step besides its arrays.
struct Scalars {
  double best_energy, scale;
  int evaluations, shortened, stored, newest;
  bool converged, stalled, steepest, corrected;
};

/// All arrays (m, 3) but those noted; history rows are `size` = 3 m apart.
struct State {
  Scalars* scalars;    // (n)
  std::uint8_t* done;  // (n)
  std::uint8_t* held;  // (m)
  double *free, *trial, *trial_forces, *best, *best_forces, *projected, *direction;
  double *history_s, *history_y;  // (memory, m, 3)
  double* history_rho;            // (n, memory)
  std::size_t size;
};

class DeviceMinimiser {
 public:
  /// shared: kWarps + 2 memory doubles.
  __device__ DeviceMinimiser(const RelaxSettings& settings, const Walls& walls, std::size_t first_atom,
                             const State& state, const std::int64_t* offsets, unsigned row, double* shared)
      : settings_(settings),
        walls_(walls),
        first_(static_cast<int>(first_atom)),
        n_(static_cast<int>(offsets[row + 1] - offsets[row])),
        begin_(3 * offsets[row]),
        size_(state.size),
        scalars_(state.scalars[row]),
        held_(state.held + offsets[row]),
        free_(state.free + begin_),
        trial_(state.trial + begin_),
        trial_forces_(state.trial_forces + begin_),
        best_(state.best + begin_),
        best_forces_(state.best_forces + begin_),
        projected_(state.projected + begin_),
        direction_(state.direction + begin_),
        history_s_(state.history_s + begin_),
        history_y_(state.history_y + begin_),
        saved_rho_(state.history_rho + std::size_t{row} * static_cast<std::size_t>(settings.memory)),
        scratch_(shared),
        rho_(shared + kWarps),
        alpha_(rho_ + settings.memory) {
    for (int k = static_cast<int>(threadIdx.x); k < settings_.memory; k += kThreads) rho_[k] = saved_rho_[k];
    __syncthreads();
  }

  __device__ bool done() const {
    return scalars_.converged || scalars_.stalled || scalars_.evaluations > settings_.steps;
  }

  __device__ void tell(double energy, const double* forces) {
    ++scalars_.evaluations;
    const bool first = scalars_.evaluations == 1, finite = std::isfinite(energy) && all_finite(forces);
    if (first && !finite) {  // nowhere to go back to
      scalars_.best_energy = energy;
      copy(best_forces_, forces);
      scalars_.stalled = true;
      return;
    }
    if (!first) {
      const double slack = kEnergySlack * fmax(1.0, fabs(scalars_.best_energy));
      if (!finite || energy > scalars_.best_energy + slack) {
        scalars_.stalled = !shorten(energy, forces, finite);
        return;
      }
      copy(trial_forces_, forces);
      remember();
      copy(best_, trial_);
      copy(best_forces_, trial_forces_);
    } else {
      copy(best_forces_, forces);
    }
    scalars_.best_energy = energy;
    scalars_.corrected = false;
    if (project_forces() < settings_.force_tolerance) {
      scalars_.converged = true;
      copy(trial_, best_);
    } else {
      choose_direction();
    }
  }

  __device__ void save(Scalars& to) {
    __syncthreads();
    for (int k = static_cast<int>(threadIdx.x); k < settings_.memory; k += kThreads) saved_rho_[k] = rho_[k];
    if (threadIdx.x == 0) to = scalars_;
  }

 private:
  /// visit(atom) for the atoms of this thread.
  template <class Visit>
  __device__ void for_atoms(Visit visit) const {
    for (int a = static_cast<int>(threadIdx.x); a < n_; a += kThreads) visit(a);
  }
  template <class Visit>
  __device__ void for_coordinates(Visit visit) const {
    for_atoms([&](int a) {
      for (int i = 3 * a; i < 3 * a + 3; ++i) visit(i);
    });
  }
  template <class Term>
  __device__ double sum(Term term) const {
    double total = 0;
    for_coordinates([&](int i) { total += term(i); });
    return block_sum(total, scratch_);
  }
  __device__ void copy(double* to, const double* from) const {
    for_coordinates([&](int i) { to[i] = from[i]; });
  }
  __device__ double dot(const double* a, const double* b) const {
    return sum([&](int i) { return a[i] * b[i]; });
  }
  __device__ bool all_finite(const double* x) const {
    return sum([&](int i) { return x[i] * 0.0; }) == 0.0;
  }
  __device__ double largest_row(const double* x) const {
    double most = 0;
    for_atoms([&](int a) { most = fmax(most, dot3(x + 3 * a, x + 3 * a)); });
    return sqrt(block_max(most, scratch_));
  }
  __device__ int ring_row(int age) const { return (scalars_.newest - age + settings_.memory) % settings_.memory; }
  __device__ double* row_s(int row) const { return history_s_ + static_cast<std::size_t>(row) * size_; }
  __device__ double* row_y(int row) const { return history_y_ + static_cast<std::size_t>(row) * size_; }

  __device__ bool weigh(int row) {
    const double *s = row_s(row), *y = row_y(row);
    const double sy = dot(s, y), ss = dot(s, s), yy = dot(y, y);
    const bool good = sy > 0 && sy > 1e-8 * sqrt(ss * yy);
    if (threadIdx.x == 0) rho_[row] = good ? 1.0 / sy : 0.0;
    __syncthreads();
    return good;
  }

  __device__ double project_forces() {
    for_coordinates([&](int i) { projected_[i] = best_forces_[i] * free_[i]; });
    if (!walls_.active) return largest_row(projected_);
    double changed = 0;
    for_atoms([&](int a) {
      Touching walls;
      if (a >= first_) walls = touching(walls_, free_ + 3 * a, best_ + 3 * a);
      if (walls.count > 0) walls.project(projected_ + 3 * a, true);
      const std::uint8_t before = held_[a];
      held_[a] = walls.held();
      if ((held_[a] & ~before) == 0) return;
      changed = 1;
      for (int k = 0; k < scalars_.stored; ++k) {
        project_to_face(walls_, free_ + 3 * a, held_[a], row_s(ring_row(k)) + 3 * a);
        project_to_face(walls_, free_ + 3 * a, held_[a], row_y(ring_row(k)) + 3 * a);
      }
    });
    if (block_sum(changed, scratch_) > 0)
      for (int k = 0; k < scalars_.stored; ++k) weigh(ring_row(k));
    return largest_row(projected_);
  }

  __device__ bool remember() {
    const int row = (scalars_.newest + 1) % settings_.memory;
    double *s = row_s(row), *y = row_y(row);
    for_coordinates([&](int i) {
      s[i] = trial_[i] - best_[i];
      y[i] = (best_forces_[i] - trial_forces_[i]) * free_[i];
    });
    if (walls_.active)
      for_atoms([&](int a) {
        if (held_[a] == 0) return;
        project_to_face(walls_, free_ + 3 * a, held_[a], s + 3 * a);
        project_to_face(walls_, free_ + 3 * a, held_[a], y + 3 * a);
      });
    if (!weigh(row)) return false;
    scalars_.newest = row;
    scalars_.stored = scalars_.stored + 1 < settings_.memory ? scalars_.stored + 1 : settings_.memory;
    return true;
  }

  __device__ void restart_direction() {
    scalars_.stored = 0;
    scalars_.newest = -1;
    scalars_.steepest = true;
    for_coordinates([&](int i) { direction_[i] = projected_[i] / settings_.first_curvature; });
  }

  __device__ void choose_direction() {
    scalars_.shortened = 0;
    scalars_.scale = 1;
    int last = 0;  // the newest pair that counts
    while (last < scalars_.stored && rho_[ring_row(last)] == 0) ++last;
    if (last == scalars_.stored) {
      restart_direction();
    } else {
      scalars_.steepest = false;
      double* d = direction_;
      copy(d, projected_);
      for (int k = last; k < scalars_.stored; ++k) {
        const int row = ring_row(k);
        const double alpha = rho_[row] * dot(row_s(row), d);
        if (threadIdx.x == 0) alpha_[row] = alpha;  // read after the barriers of later sums
        for_coordinates([&](int i) { d[i] -= alpha * row_y(row)[i]; });
      }
      const double* y = row_y(ring_row(last));
      const double gamma = 1.5 / (rho_[ring_row(last)] * dot(y, y));
      for_coordinates([&](int i) { d[i] *= gamma; });
      for (int k = scalars_.stored - 1; k >= last; --k) {
        const int row = ring_row(k);
        const double beta = rho_[row] * dot(row_y(row), d), change = alpha_[row] - beta;
        for_coordinates([&](int i) { d[i] += change * row_s(row)[i]; });
      }
      if (walls_.active)
        for_atoms([&](int a) {
          if (a < first_) return;
          Touching walls = touching(walls_, free_ + 3 * a, best_ + 3 * a);
          for (int k = 0; k < walls.count; ++k) walls.both[k] = (held_[a] >> walls.wall[k]) & 1;
          if (walls.count > 0) walls.project(d + 3 * a, false);
        });
      const double downhill = dot(d, projected_);
      if (!(downhill > 1e-8 * sqrt(dot(d, d) * dot(projected_, projected_)))) restart_direction();
    }
    limit_direction();
    place_trial();
  }

  __device__ void limit_direction() {
    const double most = largest_row(direction_);
    if (most > settings_.max_step) for_coordinates([&](int i) { direction_[i] *= settings_.max_step / most; });
  }

  __device__ void place_trial() {
    for_atoms([&](int a) {
      for (int i = 3 * a; i < 3 * a + 3; ++i) trial_[i] = best_[i] + scalars_.scale * direction_[i] * free_[i];
      if (!walls_.active || a < first_) return;
      double outside = -1.0;
      for (int k = 0; k < 3; ++k) {
        if (walls_.open[k]) continue;
        const double h = walls_.height(k, trial_ + 3 * a);
        outside = fmax(outside, fmax(-h, h - walls_.thickness[k]));
      }
      if (outside > 0) confine(walls_, free_ + 3 * a, held_[a], best_ + 3 * a, trial_ + 3 * a);
    });
  }

  __device__ bool shorten(double energy, const double* forces, bool finite) {
    if (finite && scalars_.shortened == 0 && !scalars_.corrected) {
      copy(trial_forces_, forces);
      if (remember()) {
        scalars_.corrected = true;
        choose_direction();
        return true;
      }
    }
    if (scalars_.shortened == kMostShortenings) {
      if (scalars_.steepest) return false;
      restart_direction();
      limit_direction();
      scalars_.shortened = 0;
      scalars_.scale = 1;
    } else {
      double factor = 0.25;
      if (finite) {
        const double slope = -sum([&](int i) { return best_forces_[i] * (trial_[i] - best_[i]); });
        if (slope < 0) factor = fmin(fmax(-slope / (2 * (energy - scalars_.best_energy - slope)), 0.1), 0.5);
      }
      scalars_.scale *= factor;
      ++scalars_.shortened;
    }
    place_trial();
    return true;
  }

  const RelaxSettings& settings_;
  const Walls& walls_;
  const int first_, n_;  // the first atom that knows walls; atoms
  const std::int64_t begin_;
  const std::size_t size_;
  Scalars scalars_;
  std::uint8_t* held_;
  double *free_, *trial_, *trial_forces_, *best_, *best_forces_, *projected_, *direction_;
  double *history_s_, *history_y_, *saved_rho_;
  double *scratch_, *rho_, *alpha_;  // shared
};

/// bad: counts coordinates that are not finite.
__global__ void __launch_bounds__(kThreads)
    begin_relaxation(std::size_t atoms, std::size_t structures, const double* positions, const std::uint8_t* fixed,
                     State state, std::int32_t* bad) {
  const std::size_t k = thread_index();
  if (k < structures) {
    state.scalars[k] = {0.0, 1.0, 0, 0, 0, -1, false, false, true, false};
    state.done[k] = 0;
  }
  if (k < atoms) state.held[k] = 0;
  if (k >= 3 * atoms) return;
  state.trial[k] = state.best[k] = positions[k];
  state.free[k] = fixed != nullptr && fixed[k] ? 0.0 : 1.0;
  if (!std::isfinite(positions[k])) atomicAdd(bad, 1);
}

__global__ void __launch_bounds__(kThreads)
    tell(const std::int64_t* offsets, RelaxSettings settings, Walls walls, std::size_t first_atom, State state,
         const double* energies, const double* forces, std::int32_t* running) {
  THALWEG_DYNAMIC_SHARED(double, shared);  // kWarps + 2 memory
  const unsigned row = blockIdx.x;
  if (state.done[row]) return;
  DeviceMinimiser minimiser(settings, walls, first_atom, state, offsets, row, shared);
  minimiser.tell(energies[row], forces + 3 * offsets[row]);
  minimiser.save(state.scalars[row]);
  if (threadIdx.x != 0) return;
  if (minimiser.done())
    state.done[row] = 1;
  else
    atomicAdd(running, 1);
}

__global__ void __launch_bounds__(kThreads)
    end_relaxation(std::size_t atoms, std::size_t structures, State state, double* positions, double* energies,
                   double* forces, std::int32_t* evaluations, std::uint8_t* converged) {
  const std::size_t k = thread_index();
  if (k < structures) {
    energies[k] = state.scalars[k].best_energy;
    evaluations[k] = state.scalars[k].evaluations;
    converged[k] = state.scalars[k].converged;
  }
  if (k >= atoms) return;
  const double* free = state.free + 3 * k;
  const bool still = free[0] == 0 && free[1] == 0 && free[2] == 0;
  for (std::size_t i = 3 * k; i < 3 * k + 3; ++i) {
    positions[i] = state.best[i];
    forces[i] = still ? 0.0 : state.best_forces[i];
  }
}

}  // namespace

RelaxResult relax(const Landscape& landscape, const BatchView& batch, const RelaxSettings& settings,
                  const Confinement& confinement, Stream stream) {
  Minimiser(settings, StructureView{}, confinement);  // refuses what the CPU refuses
  const Walls walls(confinement);
  const std::size_t n = batch.structures, m = batch.atoms, memory = static_cast<std::size_t>(settings.memory);
  RelaxResult out{Array<double>(3 * m), Array<double>(n), Array<double>(3 * m), Array<std::int32_t>(n),
                  Array<std::uint8_t>(n)};
  if (n == 0) return out;

  Array<Scalars> scalars(n);
  Array<std::uint8_t> flags(n + m);
  Array<double> arrays((7 + 2 * memory) * 3 * m), rho(n * memory), energies(n), forces(3 * m);
  Array<std::int32_t> counter(1);
  State state{scalars.data(), flags.data(), flags.data() + n, nullptr, nullptr, nullptr,    nullptr,
              nullptr,        nullptr,      nullptr,          nullptr, nullptr, rho.data(), 3 * m};
  double* next = arrays.data();
  for (double** array : {&state.free, &state.trial, &state.trial_forces, &state.best, &state.best_forces,
                         &state.projected, &state.direction}) {
    *array = next;
    next += 3 * m;
  }
  state.history_s = next;
  state.history_y = next + memory * 3 * m;
  fill_bytes(rho.data(), 0, n * memory * sizeof(double), stream);

  const auto counted = [&] {
    std::int32_t count = 0;
    copy_to_host(&count, counter.data(), sizeof(count), stream);
    return count;
  };
  fill_bytes(counter.data(), 0, sizeof(std::int32_t), stream);
  const unsigned blocks = blocks_for(std::max(3 * m, n));
  THALWEG_LAUNCH(begin_relaxation, blocks, kThreads, 0, native(stream), m, n, batch.positions, batch.fixed, state,
                 counter.data());
  check_launch("the start of a relaxation");
  if (counted() > 0) throw Error("relaxation needs finite positions to start from");

  const std::unique_ptr<Evaluator> evaluator = landscape.evaluator(batch, stream);
  const std::size_t shared_bytes = (kWarps + 2 * memory) * sizeof(double);
  do {
    evaluator->evaluate(state.trial, energies.data(), forces.data(), state.done, stream);
    fill_bytes(counter.data(), 0, sizeof(std::int32_t), stream);
    THALWEG_LAUNCH(tell, static_cast<unsigned>(n), kThreads, shared_bytes, native(stream), batch.offsets, settings,
                   walls, confinement.first_atom, state, energies.data(), forces.data(), counter.data());
    check_launch("a step of a relaxation");
  } while (counted() > 0);
  THALWEG_LAUNCH(end_relaxation, blocks, kThreads, 0, native(stream), m, n, state, out.positions.data(),
                 out.energies.data(), out.forces.data(), out.evaluations.data(), out.converged.data());
  check_launch("the end of a relaxation");
  copy_to_host(nullptr, nullptr, 0, stream);  // what the device still reads is freed below
  return out;
}

}  // namespace thalweg::cuda
