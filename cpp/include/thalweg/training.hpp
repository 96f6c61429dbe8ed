// One training step of a Q-network on a grid: Q of state-action pairs and the gradient of a loss with respect to every
// weight. A network is
//   image_s(x) = shift_s + sum over atoms y of species s of kernels_s(x - y)           x on the grid
//   a_1 = leaky(w_1 * image + b_1),  a_2 = leaky(w_2 * a_1 + b_2),  a_3 = leaky(w_3 * a_2 + b_3)
//   Q_s = tanh(w_4 * a_3 + b_4)                                  (w * a)(x) = sum_t w(t) a(x + dilation (t - k / 2))
// with kHidden channels in between; gradients take the derivative of tanh as at least 1e-3, so that a saturated network
// still learns. Beyond an open wall every image and every a_l is zero; periodic directions wrap.
//
// Q of one action needs boxes of points around it only: K points wide for a_3, 2 K - 1 for a_2, 3 K - 2 for a_1, 4 K -
// 3 for the image, of one of the dilation^D interleaved lattices. All convolutions are products of spectra of these
// boxes.
//
//   group      16 actions. Two real images travel as one complex one: the kernels are real, so nothing mixes.
//   cell       32 floats, a point (or frequency) of two channels c, c + 1:
//                  re: c of samples 0-7 | c + 1 of samples 0-7;  im: c of samples 8-15 | c + 1 of samples 8-15
//   plane      [z][y][x] cells;  a channel pair of a box
//   half       [kx][channel pair][z][y] cells;  a box transformed along x
//   spectrum   [pair of columns (kx, ky), (-kx, -ky)][channel pair][column][kz] cells (two dimensions: [kx], [ky])
//   weights    [pair of frequencies f, -f][re, im][out x in]: real kernels, so half of the frequencies suffice
//   parameters w_1 (10, S, K^D) b_1 w_2 (10, 10, K^D) b_2 w_3 b_3 w_4 (S, 10, K^D) b_4, float32, C order
// Of a group of 8 actions or fewer, if none needs its images, a cell holds the channels c, c + 1 | c + 2, c + 3:
// nothing is spent on empty lanes. A kx and its negative at a time go through the spectrum and back, so that they meet
// the larger caches only once.
//
// Where every bias is zero, empty space has pre-activations of exactly 0; here they are rounding noise, so that the
// leaky ReLU's slope there is one or the other. Biases leave zero with the first step. Weight gradients are summed over
// actions as spectra and transformed back once. Groups are shared out among threads; they are summed in an order that
// depends on their number only.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>

#include "thalweg/core.hpp"

namespace thalweg {

struct QNetworkShape {
  static constexpr int kHidden = 10;
  int dimension = 2;                 // 2 or 3
  int species = 1;                   // images in, Q out
  int kernel = 15;                   // odd edge of the convolution kernels
  int dilation = 1;                  // of all layers
  int half_window = 12;              // kernels_s are (2 half_window + 1)^dimension, voxels
  std::array<int, 3> grid{1, 1, 1};  // voxels; the first `dimension` entries count
  std::array<bool, 3> periodic{false, false, false};
  float slope = 0.01f;  // of the leaky ReLU below zero
};

/// n states and one action in each.
struct StateActions {
  std::span<const std::int32_t> placed;   // (m, 2) species, flat voxel
  std::span<const std::int64_t> offsets;  // (n + 1) state i is placed[offsets[i]] .. placed[offsets[i + 1] - 1]
  std::span<const std::int32_t> actions;  // (n, 2) species, flat voxel
  std::size_t size() const { return offsets.empty() ? 0 : offsets.size() - 1; }
};

/// All that defines the network; every span belongs to the caller.
struct QNetworkWeights {
  std::span<const float> parameters;  // (parameters())
  std::span<const float> kernels;     // (species, (2 half_window + 1)^dimension)
  std::span<const float> shift;       // (species)
};

/// Where derivatives go; an empty span is not wanted.
struct QNetworkGradient {
  std::span<float> parameters, kernels, shift;  // shapes of QNetworkWeights
};

/// Plans and workspace for one shape; one call at a time.
class QTraining {
 public:
  /// Throws Error for shapes that make no sense.
  explicit QTraining(const QNetworkShape& shape);
  ~QTraining();
  QTraining(const QTraining&) = delete;
  QTraining& operator=(const QTraining&) = delete;

  const QNetworkShape& shape() const;
  std::size_t parameters() const;   // how many
  std::size_t kernel_size() const;  // of one species

  /// q (n). Throws Error for lengths, species and voxels that do not fit.
  void evaluate(const QNetworkWeights& weights, const StateActions& pairs, std::span<float> q, int threads = 1);
  /// Mean square loss against targets (n), its gradient, and q (n).
  double gradient(const QNetworkWeights& weights, const StateActions& pairs, std::span<const float> targets,
                  std::span<float> q, const QNetworkGradient& out, int threads = 1);
  /// Gradient of sum_i pull_i q_i.
  void pull_back(const QNetworkWeights& weights, const StateActions& pairs, std::span<const float> pull,
                 std::span<float> q, const QNetworkGradient& out, int threads = 1);

 private:
  struct Impl;
  friend void image_statistics(const QNetworkShape&, std::span<const float>, const StateActions&, std::span<double>,
                               std::span<double>);
  std::unique_ptr<Impl> impl_;
};

/// Mean and variance (species each) of the images of whole grids, without their shift, over the voxels of all n states;
/// for representations that are normalised. Uses dimension, species, half_window, grid and periodic of the shape, and
/// placed and offsets of the pairs. Throws Error as QTraining does.
void image_statistics(const QNetworkShape& shape, std::span<const float> kernels, const StateActions& pairs,
                      std::span<double> mean, std::span<double> variance);

/// One step of Adam (Kingma, Ba, arXiv 1412.6980), update = 1, 2, ...; arrays of equal length, in place.
struct AdamSettings {
  double rate = 1e-3, beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8;
};
void adam_step(const AdamSettings& settings, std::int64_t update, std::span<const float> gradient,
               std::span<float> parameters, std::span<float> first_moment, std::span<float> second_moment);

}  // namespace thalweg
