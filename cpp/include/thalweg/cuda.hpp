// Twins of the kernels on a CUDA device: the same names, the same arguments, arrays in device memory. One call takes a
// whole ragged batch in a few launches; nothing is copied back but a few counters unless it is asked for.
//
//     cuda::Batch batch(host_batch);                                     // uploads
//     auto result = cuda::relax(cuda::Emt(), batch.view(), settings, box);  // stays on the device
//     std::vector<double> energies = result.energies.download();
//
// Results agree with the CPU's to rounding (sums run in another order) and do not depend on the rest of the batch or on
// the run: every sum has a fixed order, no floating-point atomics. In a build without CUDA every call throws
// BackendUnavailable. Whatever runs on one stream runs in order; calls return before the device is done unless they
// say otherwise. docs/cuda.md says what has run on a GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "thalweg/build.hpp"
#include "thalweg/core.hpp"
#include "thalweg/density.hpp"
#include "thalweg/fingerprint.hpp"
#include "thalweg/gpr.hpp"
#include "thalweg/landscape.hpp"
#include "thalweg/potentials.hpp"
#include "thalweg/qmap.hpp"
#include "thalweg/relax.hpp"
#include "thalweg/soap.hpp"

namespace thalweg::cuda {

/// This build or this machine cannot run device code; the message says what to do.
class BackendUnavailable : public Error {
 public:
  using Error::Error;
};

/// "cuda", "emulated" (kernels run on the CPU: for tests) or "none".
const char* backend() noexcept;
/// Whether a call would run here: built in, and a device answers (or is emulated).
bool available() noexcept;
/// Throws BackendUnavailable, with the way to get it, unless available().
void require();

/// A cudaStream_t; null: the default stream.
using Stream = void*;

// ---- memory -----------------------------------------------------------------------------------------------------

void* allocate(std::size_t bytes);
void release(void* memory) noexcept;
void copy_to_device(void* to, const void* from, std::size_t bytes, Stream stream = nullptr);
/// Waits for the stream: the data are there on return.
void copy_to_host(void* to, const void* from, std::size_t bytes, Stream stream = nullptr);
void copy_on_device(void* to, const void* from, std::size_t bytes, Stream stream = nullptr);
void fill_bytes(void* to, int value, std::size_t bytes, Stream stream = nullptr);

/// An array in device memory that this object owns.
template <class T>
class Array {
 public:
  Array() = default;
  explicit Array(std::size_t size)
      : memory_(size ? static_cast<T*>(allocate(size * sizeof(T))) : nullptr), size_(size) {}
  explicit Array(std::span<const T> values, Stream stream = nullptr) : Array(values.size()) { upload(values, stream); }
  Array(Array&& other) noexcept
      : memory_(std::exchange(other.memory_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Array& operator=(Array&& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Array() {
    if (memory_) release(memory_);
  }

  T* data() { return memory_; }
  const T* data() const { return memory_; }
  std::size_t size() const { return size_; }
  void upload(std::span<const T> values, Stream stream = nullptr) {
    copy_to_device(memory_, values.data(), values.size() * sizeof(T), stream);
  }
  std::vector<T> download(Stream stream = nullptr) const {
    std::vector<T> out(size_);
    copy_to_host(out.data(), memory_, size_ * sizeof(T), stream);
    return out;
  }
  /// At least `size` elements; contents are lost where it grows.
  T* need(std::size_t size) {
    if (size > size_) *this = Array(size + size / 4);
    return memory_;
  }

 private:
  T* memory_ = nullptr;
  std::size_t size_ = 0;
};

/// Like thalweg::BatchView, but the pointers are the device's.
struct BatchView {
  std::size_t structures = 0, atoms = 0;
  const double* positions = nullptr;      // (m, 3)
  const std::int32_t* numbers = nullptr;  // (m)
  const std::int64_t* offsets = nullptr;  // (n + 1)
  const double* cells = nullptr;          // (n, 3, 3)
  const std::uint8_t* pbc = nullptr;      // (n, 3)
  const std::uint8_t* fixed = nullptr;    // (m, 3); may be null: nothing is fixed
};

/// A batch copied to the device.
class Batch {
 public:
  explicit Batch(const thalweg::BatchView& host, Stream stream = nullptr);
  BatchView view() const;

 private:
  std::size_t structures_, atoms_;
  Array<double> positions_, cells_;
  Array<std::int32_t> numbers_;
  Array<std::int64_t> offsets_;
  Array<std::uint8_t> pbc_, fixed_;
};

// ---- landscapes ---------------------------------------------------------------------------------------------------

/// Twin of thalweg::Evaluator.
class Evaluator {
 public:
  virtual ~Evaluator() = default;
  /// positions (m, 3), energies (n) and forces (m, 3) on the device. skip: (n) on the device, 1 = leave this structure
  /// alone; null: all are evaluated.
  virtual void evaluate(const double* positions, double* energies, double* forces, const std::uint8_t* skip,
                        Stream stream) = 0;
};

/// Twin of thalweg::Landscape. Species, cells and sizes of a batch are read (and refused) once, in evaluator().
class Landscape {
 public:
  virtual ~Landscape() = default;
  virtual std::unique_ptr<Evaluator> evaluator(const BatchView& batch, Stream stream = nullptr) const = 0;
};

/// energies (n) and forces (m, 3) on the device.
void evaluate(const Landscape& landscape, const BatchView& batch, double* energies, double* forces,
              Stream stream = nullptr);

class LennardJones : public Landscape {
 public:
  explicit LennardJones(const thalweg::LennardJones::Settings& settings);
  std::unique_ptr<Evaluator> evaluator(const BatchView& batch, Stream stream = nullptr) const override;

 private:
  thalweg::LennardJones host_;
};

class Emt : public Landscape {
 public:
  std::unique_ptr<Evaluator> evaluator(const BatchView& batch, Stream stream = nullptr) const override;
};

class ManyBodyPrior : public Landscape {
 public:
  ManyBodyPrior(std::vector<thalweg::ManyBodyPrior::Pair> pairs, std::vector<thalweg::ManyBodyPrior::Atom> atoms);
  std::unique_ptr<Evaluator> evaluator(const BatchView& batch, Stream stream = nullptr) const override;

 private:
  thalweg::ManyBodyPrior host_;
};

class PairPrior : public Landscape {
 public:
  explicit PairPrior(const thalweg::PairPrior::Settings& settings);
  std::unique_ptr<Evaluator> evaluator(const BatchView& batch, Stream stream = nullptr) const override;

 private:
  thalweg::PairPrior host_;
};

class SmoothCarbon : public Landscape {
 public:
  explicit SmoothCarbon(const thalweg::SmoothCarbon::Settings& settings);
  std::unique_ptr<Evaluator> evaluator(const BatchView& batch, Stream stream = nullptr) const override;

 private:
  thalweg::SmoothCarbon host_;
};

class Tersoff : public Landscape {
 public:
  explicit Tersoff(std::vector<thalweg::Tersoff::Entry> entries);
  std::unique_ptr<Evaluator> evaluator(const BatchView& batch, Stream stream = nullptr) const override;

 private:
  thalweg::Tersoff host_;
};

// ---- surrogate ------------------------------------------------------------------------------------------------------

/// Twin of thalweg::Fingerprint: the feature vectors of a whole batch, and forces by contraction. Structures without
/// features (a coordinate that is not finite, atoms on one point) get NaN.
class Fingerprint {
 public:
  /// Keeps the host's fingerprint, which fixes composition and periodicity.
  explicit Fingerprint(std::shared_ptr<const thalweg::Fingerprint> host, Stream stream = nullptr);
  ~Fingerprint();
  std::size_t size() const { return host_->size(); }

  /// Neighbour lists and scratch of one batch, whose positions may move.
  class Workspace {
   public:
    /// Throws Error where thalweg::Fingerprint::check refuses a structure.
    Workspace(const Fingerprint& fingerprint, const BatchView& batch, Stream stream = nullptr);
    ~Workspace();
    struct State;
    std::unique_ptr<State> state;
  };

  /// features: (n, size()). positions: (m, 3); skip as in Evaluator.
  void values(const double* positions, double* features, Workspace& workspace, const std::uint8_t* skip = nullptr,
              Stream stream = nullptr) const;
  /// Adds scale * d(weights . features)/dx to gradient (m, 3) at the positions of the last values(); weights (n,
  /// size()).
  void contract(const double* weights, double scale, double* gradient, Workspace& workspace,
                const std::uint8_t* skip = nullptr, Stream stream = nullptr) const;

 private:
  struct Tables;
  std::shared_ptr<const thalweg::Fingerprint> host_;
  std::unique_ptr<Tables> tables_;
};

/// Twin of thalweg::LocalDensity. Structures without features (a coordinate that is not finite, atoms on one point) get
/// NaN.
class LocalDensity {
 public:
  explicit LocalDensity(std::shared_ptr<const thalweg::LocalDensity> host, Stream stream = nullptr);
  ~LocalDensity();
  std::size_t size() const { return host_->size(); }

  /// Neighbour list of one batch, whose positions may move.
  class Workspace {
   public:
    /// Throws Error where thalweg::LocalDensity::check refuses a structure.
    Workspace(const LocalDensity& density, const BatchView& batch, Stream stream = nullptr);
    ~Workspace();
    struct State;
    std::unique_ptr<State> state;
  };

  /// features: (m, size()). positions: (m, 3); skip as in Evaluator.
  void values(const double* positions, double* features, Workspace& workspace, const std::uint8_t* skip = nullptr,
              Stream stream = nullptr) const;
  /// Adds scale * d(weights . features)/dx to gradient (m, 3) at the positions of the last values(); weights (m,
  /// size()).
  void contract(const double* weights, double scale, double* gradient, Workspace& workspace,
                const std::uint8_t* skip = nullptr, Stream stream = nullptr) const;

 private:
  struct Tables;
  std::shared_ptr<const thalweg::LocalDensity> host_;
  std::unique_ptr<Tables> tables_;
};

/// Twin of thalweg::Soap. Structures with a coordinate that is not finite get NaN.
class Soap {
 public:
  explicit Soap(std::shared_ptr<const thalweg::Soap> host, Stream stream = nullptr);
  ~Soap();
  std::size_t size() const { return host_->size(); }

  /// Neighbour list, coefficients and scratch of one batch, whose positions may move. For each atom it holds
  /// species n_max (l_max + 1)^2 coefficients, and three numbers for each place in the list of its neighbours.
  class Workspace {
   public:
    /// Throws Error where thalweg::Soap::check refuses a structure.
    Workspace(const Soap& soap, const BatchView& batch, Stream stream = nullptr);
    ~Workspace();
    struct State;
    std::unique_ptr<State> state;
  };

  /// features: (m, size()), or (n, size()) averaged. positions: (m, 3); skip as in Evaluator.
  void values(const double* positions, double* features, Workspace& workspace, const std::uint8_t* skip = nullptr,
              Stream stream = nullptr) const;
  /// Adds scale * d(weights . features)/dx to gradient (m, 3) at the positions of the last values(); weights of the
  /// shape of features.
  void contract(const double* weights, double scale, double* gradient, Workspace& workspace,
                const std::uint8_t* skip = nullptr, Stream stream = nullptr) const;

 private:
  struct Tables;
  std::shared_ptr<const thalweg::Soap> host_;
  std::unique_ptr<Tables> tables_;
};

/// Lower triangle of k(x_i, x_j) + (noise + jitter) on the diagonal; features (n, D), out (n, n) row-major.
void gram(const Kernel& kernel, std::size_t n, std::size_t features, const double* feature_vectors, double jitter,
          double* out, Stream stream = nullptr);

/// Twin of thalweg::Gpr for values (no slopes): fit, append in O(n^2), predictions of whole batches.
class Gpr {
 public:
  Gpr(std::size_t features, const Kernel& kernel);
  /// features (n, D) on the device, targets (n) on the host. Jitter as on the CPU.
  void fit(std::size_t n, const double* feature_vectors, std::span<const double> targets, Stream stream = nullptr);
  /// One more point; feature (D) on the device.
  void append(const double* feature, double target, Stream stream = nullptr);

  std::size_t size() const { return n_; }
  std::size_t features() const { return dimension_; }
  const Kernel& kernel() const { return kernel_; }
  double mean() const { return mean_; }
  double jitter() const { return jitter_; }
  const double* weights() const { return weights_.data(); }  // (n) on the device

  /// As thalweg::Gpr::predict, all arrays on the device; any output may be null.
  void predict(std::size_t count, const double* feature_vectors, double kappa, double* mean, double* sigma,
               double* gradient, double* gradient_sigma, Stream stream = nullptr) const;

 private:
  void factorise(double jitter, Stream stream);
  void solve(Stream stream);
  void reserve(std::size_t points, Stream stream);
  Kernel kernel_;
  std::size_t n_ = 0, dimension_, capacity_ = 0;
  double mean_ = 0, jitter_ = 0;
  std::vector<double> targets_;
  Array<double> features_, factor_, weights_;  // (capacity, D), (capacity, capacity) lower, (capacity)
  Array<double> solved_;                       // (2, capacity): L^-1 targets, L^-1 1
};

/// Twin of thalweg::Surrogate.
class Surrogate : public Landscape {
 public:
  /// prior may be null.
  Surrogate(std::shared_ptr<const Fingerprint> fingerprint, std::shared_ptr<const Gpr> gpr,
            std::shared_ptr<const Landscape> prior, std::vector<std::pair<std::int32_t, double>> atom_energies,
            double kappa);
  std::unique_ptr<Evaluator> evaluator(const BatchView& batch, Stream stream = nullptr) const override;

 private:
  friend class SurrogateEvaluator;
  std::shared_ptr<const Fingerprint> fingerprint_;
  std::shared_ptr<const Gpr> gpr_;
  std::shared_ptr<const Landscape> prior_;
  std::vector<std::pair<std::int32_t, double>> atom_energies_;
  double kappa_;
};

// ---- relaxation -----------------------------------------------------------------------------------------------------

/// Twin of thalweg::RelaxResult.
struct RelaxResult {
  Array<double> positions, energies, forces;  // (m, 3), (n), (m, 3) at the best point of each structure
  Array<std::int32_t> evaluations;            // (n)
  Array<std::uint8_t> converged;              // (n)
};

/// The optimiser of thalweg::relax for all structures at once: a step is one evaluation of the landscape and one
/// launch; positions, forces and curvature stay on the device, a counter of those still moving comes back. A structure
/// that is done costs nothing more. Waits for the device.
RelaxResult relax(const Landscape& landscape, const BatchView& batch, const RelaxSettings& settings,
                  const Confinement& confinement, Stream stream = nullptr);

// ---- building -------------------------------------------------------------------------------------------------------

/// Twin of thalweg::BuildResult.
struct BuildResult {
  Array<double> positions;  // (n, atoms, 3)
  Array<std::uint8_t> ok;   // (n)
};

/// Twin of thalweg::random_structures: the same random numbers, so the same structures (to the rounding of sine, cosine
/// and cube root). frame and placed are the host's; the structures are made, and stay, on the device. Waits for it.
BuildResult random_structures(const StructureView& frame, std::span<const std::int32_t> placed,
                              const BuildSettings& settings, std::size_t count, Key key, std::uint64_t first_row,
                              Stream stream = nullptr);

// ---- Q-maps ---------------------------------------------------------------------------------------------------------

/// Twin of thalweg::QDelta for all states at once.
class QDelta {
 public:
  ~QDelta();
  QDelta(QDelta&&) noexcept;
  QDelta& operator=(QDelta&&) noexcept;
  struct Impl;

 private:
  friend class QState;
  explicit QDelta(std::unique_ptr<Impl> made);
  std::unique_ptr<Impl> impl;
};

/// Twin of thalweg::QState for n states side by side, each with as many atoms: a step is a launch per layer for all of
/// them. Values only, by sums over the changed boxes. Each state holds the activations of all hidden layers, float32.
class QState {
 public:
  /// states: 1 to 65535.
  QState(std::shared_ptr<const QMap> map, std::size_t states, Stream stream = nullptr);
  ~QState();
  QState(QState&&) noexcept;
  QState& operator=(QState&&) noexcept;
  std::size_t states() const;
  std::size_t placed() const;  // atoms of each state

  /// One more atom in each state: atoms (n), on the host. Waits for the device. Throws Error for a species or voxel
  /// that does not exist.
  void place(std::span<const Placed> atoms, Stream stream = nullptr);
  /// Takes the last atom of every state back, exactly. Throws Error if none is placed.
  void undo(Stream stream = nullptr);
  /// undo(), but returns the change, for apply().
  QDelta retract(Stream stream = nullptr);
  /// The change that placing an atom in each state would make, for apply().
  QDelta expand(std::span<const Placed> atoms, Stream stream = nullptr);
  /// Places the atoms of a change that expand() or retract() gave for the atoms placed now; no arithmetic. Throws Error
  /// for a change of other states.
  void apply(QDelta delta, Stream stream = nullptr);

  /// out (n, species, count): Q at voxels (n, count), both on the device; NaN where a voxel does not exist.
  void q(const std::int64_t* voxels, std::size_t count, float* out, Stream stream = nullptr) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace thalweg::cuda
