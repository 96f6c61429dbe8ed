// Gaussian process regression on feature vectors with the two-scale kernel of GOFEE (thesis (2.14)-(2.17)):
//   k(x, x') = amplitude [ weight_long exp(-|x-x'|^2 / 2 length_long^2) + weight_short exp(-|x-x'|^2 / 2 length_short^2) ]
// plus `noise` (a variance, eV^2) on the diagonal.
//
//   features_  (n, D) row-major        distances_  packed lower triangle of squared distances, cached (append adds a row)
//   factor_    (n, n) row-major, lower Cholesky factor L of K + noise;  append and remove cost O(n^2)
//   weights_   (n)    alpha = (K + noise)^-1 (y - mean)
//
// Candidates are predicted in tiles of 8 SIMD lanes, one lane a candidate: a candidate's result does not depend on its
// neighbours in the tile, so it is the same for every batch size and thread count.
#pragma once

#include <vector>

#include "thalweg/core.hpp"

namespace thalweg {

struct Kernel {
  double amplitude = 100.0;  // eV^2
  double length_long = 10.0, length_short = 2.0;
  double weight_long = 0.99, weight_short = 0.01;
  double noise = 1e-5;  // eV^2, a variance (Paper III: (3.2e-3 eV)^2)
};

/// Log marginal likelihood and its gradient with respect to the logarithms of the five hyperparameters.
struct Likelihood {
  double value = 0;
  // d value / d log(amplitude, length_long, length_short, noise, weight_short / weight_long at fixed sum)
  double d_amplitude = 0, d_length_long = 0, d_length_short = 0, d_noise = 0, d_weight = 0;
};

struct KernelBounds {
  double amplitude[2] = {1e-2, 1e6};
  double length_long[2] = {1e-2, 1e4};  // length_short <= length_long is enforced
  double length_short[2] = {1e-2, 1e4};
  double noise[2] = {1e-8, 1e0};
  bool optimise_amplitude = true, optimise_long = true, optimise_short = true, optimise_noise = false,
       optimise_weight = false;
};

class Gpr {
 public:
  Gpr(std::size_t features, const Kernel& kernel);

  /// Full factorisation. features (n, D), targets (n). Throws Error if shapes disagree, a value is not finite, or K is
  /// not positive definite even after the documented growth of jitter (up to 1e-6 amplitude).
  void fit(std::span<const double> features, std::span<const double> targets, int threads = 1);
  /// One more point in O(n^2); equal to a refit to 1e-10.
  void append(std::span<const double> feature, double target);
  /// One point fewer in O(n^2) (rank-one update of the trailing block).
  void remove(std::size_t row);
  /// New targets for the same points, O(n^2).
  void set_targets(std::span<const double> targets);
  /// New hyperparameters and a refit from the cached distances.
  void set_kernel(const Kernel& kernel);

  std::size_t size() const;      // n
  std::size_t features() const;  // D
  const Kernel& kernel() const;
  double mean() const;    // of the targets; predictions are mean + k alpha
  double jitter() const;  // what was added to the diagonal beyond noise
  std::span<const double> weights() const;        // alpha (n)
  std::span<const double> training() const;       // (n, D)

  Likelihood likelihood(const Kernel& kernel) const;  // at other hyperparameters, same data; does not change the fit
  /// Maximises the likelihood (projected L-BFGS in the logarithms, analytic gradient) from each of `starts` and from
  /// the current kernel, sets the best and refits. Returns the best value.
  double optimise(const KernelBounds& bounds, std::span<const Kernel> starts, int max_evaluations = 60);

  /// Predictions for `count` feature vectors (count, D), any of the outputs may be null:
  /// mean (count) and sigma (count) [eV] (sigma >= 0, of the noise-free function), and gradient (count, D) =
  /// d(mean - kappa sigma)/d feature, gradient_sigma (count, D) = d sigma/d feature.
  void predict(std::size_t count, const double* feature_vectors, double kappa, double* mean, double* sigma,
               double* gradient, double* gradient_sigma) const;

 private:
  friend struct GprAccess;
  Kernel kernel_;
  std::size_t n_ = 0, dimension_ = 0, capacity_ = 0;
  double mean_ = 0, jitter_ = 0;
  std::vector<double> features_, norms_, distances_, factor_, targets_, weights_;
};

}  // namespace thalweg
