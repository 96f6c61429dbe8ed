// The Q-map of ASLA: the value of placing one more atom, for every voxel of a grid and every species, by a small
// convolutional network; whole, or updated after one atom was placed.
//
//   placed atoms --representation--> input (channels, voxels) --layer 1--> leaky ReLU --> ... --last layer--> tanh -->
//   Q
//
//   grid       2 or 3 directions, each periodic or open; voxel (z, y, x) has number (z n_y + y) n_x + x
//   weights    (outputs, inputs, k, k[, k]), float32, PyTorch's order and sign: layers correlate, the kernel is not
//              turned round; dilation d spreads its taps d voxels apart. Open directions are padded with zeros at every
//              layer, periodic ones go round
//   Q          (species, voxels), float32
//
// State of an incremental evaluation, per layer: activations, the `channels` of a voxel side by side; of the last layer
// only where its change costs less than its sums at some 25,000 voxels. The representation is linear, so an atom
// changes layer 1 by a stamp computed beforehand; each further layer changes in a box that its kernel widens:
//
//            |<- stamp ->|                       change of layer 1
//        |<-- 2 (r + h d) + 1 + 2 h d -->|       change of layer 2, by local Fourier transforms
//    |<---------- ... + 4 h d --------------->|  change of layer 3; the last layer likewise, or summed where asked
//
// undo() puts back what the boxes held; nothing is ever subtracted, so a state does not drift along a tree.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "thalweg/core.hpp"

namespace thalweg {

/// One convolution; `kernel` is odd.
struct QLayer {
  std::int32_t inputs = 0, outputs = 0, kernel = 1, dilation = 1;
  std::vector<float> weights;  // (outputs, inputs, kernel, kernel[, kernel])
  std::vector<float> bias;     // (outputs)
};

/// What an atom adds to the input: the kernel of its species, centred on its voxel, in every channel; what lies beyond
/// an open wall is dropped. `width` is odd; one-hot is width 1 and the unit matrix.
struct QRepresentation {
  std::int32_t channels = 0, species = 0, width = 1;
  std::vector<float> kernel;  // (channels, species, width, width[, width])
  std::vector<float> bias;    // (channels), added everywhere inside the grid

  static QRepresentation one_hot(std::int32_t species);
};

/// Weights and biases of a network: dimension 2 or 3, channels (n + 1), kernels (n).
std::int64_t q_weight_count(std::int32_t dimension, std::span<const std::int32_t> channels,
                            std::span<const std::int32_t> kernels);
/// Voxels from an input to the farthest output that it can change, per direction: sum of (k - 1) / 2 times dilation.
std::int32_t q_receptive_radius(std::span<const std::int32_t> kernels, std::span<const std::int32_t> dilations);

/// The network; immutable. Leaky ReLU of slope 0.01 behind every layer but the last, tanh behind the last.
class QNetwork {
 public:
  /// At least two layers. Throws Error where shapes do not fit together.
  QNetwork(std::int32_t dimension, std::vector<QLayer> layers, QRepresentation representation);

  std::int32_t dimension() const { return dimension_; }
  std::int32_t species() const { return layers_.back().outputs; }
  const std::vector<QLayer>& layers() const { return layers_; }
  const QRepresentation& representation() const { return representation_; }
  std::int64_t weight_count() const;
  /// Of the layers; the representation adds (width - 1) / 2.
  std::int32_t receptive_radius() const;

 private:
  std::int32_t dimension_;
  std::vector<QLayer> layers_;
  QRepresentation representation_;
};

/// An atom of a species, 0 .. species - 1, at the centre of a voxel.
struct Placed {
  std::int32_t species = 0;
  std::int64_t voxel = 0;
};

enum class QMethod {
  automatic,  // what a cost model expects to be fastest
  direct,     // sums over the changed box
  local_fft,  // Fourier transforms of the changed box
  grid_fft    // Fourier transforms of the whole grid, once per state whose Q is asked for
};

/// A network on a grid. Immutable and safe to share between threads; tables are made when first needed, so that a map
/// costs little to make again after a weight update.
class QMap {
 public:
  /// shape, periodic: one entry per dimension. Throws Error for a grid of another dimension or without voxels.
  QMap(std::shared_ptr<const QNetwork> network, std::span<const std::int64_t> shape,
       std::span<const std::uint8_t> periodic);
  ~QMap();

  const QNetwork& network() const;
  std::int64_t voxels() const;
  std::span<const std::int64_t> shape() const;
  std::span<const std::uint8_t> periodic() const;

  /// Q (species, voxels) by plain sums over all layers: the reference.
  std::vector<float> dense(std::span<const Placed> placed) const;

  /// Q (n, species, voxels) of n states; state i placed atoms offsets[i] .. offsets[i + 1] - 1. Whole-grid Fourier
  /// transforms of several states side by side, `dense` where the grid is too large for them. The bits of a state
  /// depend neither on `threads` nor on the other states.
  std::vector<float> batch(std::span<const std::int64_t> offsets, std::span<const Placed> placed,
                           int threads = 0) const;

  /// What `automatic` stands for when Q is asked for at about `asked` voxels after each atom.
  QMethod choose(std::int64_t asked) const;

 private:
  friend class QState;
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// A part of the grid: `count` voxels per direction from `first` on, round the grid where it is periodic.
struct QBox {
  std::int32_t first[3] = {}, count[3] = {};
  std::int64_t voxels() const { return std::int64_t{1} * count[0] * count[1] * count[2]; }
};

/// What placing one atom changes: new activations in a box per layer. Bound to the atoms placed before it.
class QDelta {
 public:
  Placed placed() const { return placed_; }
  std::size_t bytes() const;

 private:
  friend class QState;
  Placed placed_;
  std::uint64_t parent_ = 0;
  std::vector<QBox> boxes_;
  std::vector<std::vector<float>> values_;
};

/// Atoms placed one by one; one thread at a time may use a state.
class QState {
 public:
  /// Throws Error for a method of Fourier transforms on a grid that they do not reach (more than 256 cells across).
  explicit QState(std::shared_ptr<const QMap> map, QMethod method = QMethod::automatic);
  ~QState();
  QState(QState&&) noexcept;
  QState& operator=(QState&&) noexcept;

  std::span<const Placed> placed() const;
  QMethod method() const;

  /// Throws Error for a species or voxel that does not exist.
  void place(std::int32_t species, std::int64_t voxel);
  /// Takes the last atom back, exactly. Throws Error if none is placed.
  void undo();
  /// undo(), but returns the change, for apply().
  QDelta retract();
  /// The change that placing an atom would make, for apply().
  QDelta expand(std::int32_t species, std::int64_t voxel);
  /// Places the atom of a change that expand() or retract() gave for the atoms placed now; no arithmetic. Throws Error
  /// for a change of another state.
  void apply(QDelta delta);

  /// Q (species, n) at n voxels.
  void q(std::span<const std::int64_t> voxels, std::span<float> out);
  /// Q (species, voxels) everywhere.
  std::vector<float> q();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace thalweg
