// Gaussian process regression on feature vectors with the two-scale kernel of GOFEE (thesis (2.14)-(2.17)):
//   k(x, x') = amplitude [ weight_long exp(-|x-x'|^2 / 2 length_long^2) + weight_short exp(-|x-x'|^2 / 2
//   length_short^2) ]
// plus `noise` (a variance, eV^2) on the diagonal.
//
// A point may bring slopes besides its value: observations of t . grad f along directions t in feature space. With
// t = -dx/d(coordinate) they are forces (Koistinen et al., J. Chem. Phys. 147, 152720 (2017); Solak et al., NIPS 2002).
// With r = x - x', k' = -2 dk/d(|r|^2) (slope) and k'' = 4 d^2k/d(|r|^2)^2 (bend):
//   cov(f, t'.grad f') = k' t'.r      cov(t.grad f, f') = -k' t.r      cov(t.grad f, t'.grad f') = k' t.t' - k'' (t.r)
//   (t'.r)
//
//   features_   (n, D) row-major
//   distances_  packed lower triangle of squared distances, cached: row i at i (i + 1) / 2 (append adds a row)
//   factor_     (capacity, stride) row-major, lower Cholesky factor L of K + noise in its first n rows; append and
//   remove
//               cost O(n^2)
//   solved_targets_, solved_ones_  (n)  L^-1 y and L^-1 1, kept so that a new mean costs nothing
//   weights_    (n)    alpha = (K + noise)^-1 (y - mean) = L^-T (L^-1 y - mean L^-1 1)
// With slopes, point i owns the rows first_row_[i] .. first_row_[i + 1] - 1 of the factor: its value, then its slopes;
// n above is then the number of rows.
//   directions_ (rows - n, D) row-major, point by point
//   geometry_   packed lower triangle over rows, cached: t_row . (x_i - x_j) against a value, t . t' against a slope
//   pulls_      (n, D) sum over a point's slopes of alpha t: the mean costs two vectors a point, not one for each slope
//
// Candidates are predicted in tiles of 8 (4, 1) SIMD lanes, one lane a candidate: a candidate's result does not depend
// on its neighbours in the tile, so it is the same for every batch size and thread count. Squared distances are sums of
// squared differences, never |x|^2 + |x'|^2 - 2 x.x': predictions stay smooth next to training points, wherever the
// features' origin is. Source of the formulas: Rasmussen and Williams, Gaussian Processes for Machine Learning (2006),
// (2.25), (2.26), (5.8), (5.9).
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

/// Range of the optimisation. The weight ratio weight_short / weight_long stays within 1e-4 .. 1e4.
struct KernelBounds {
  double amplitude[2] = {1e-2, 1e6};
  double length_long[2] = {1e-2, 1e4};  // length_short <= length_long is enforced
  double length_short[2] = {1e-2, 1e4};
  double noise[2] = {1e-8, 1e0};
  bool optimise_amplitude = true, optimise_long = true, optimise_short = true, optimise_noise = false,
       optimise_weight = false;
};

/// Slopes of points: counts (n) say how many each has, directions (sum of counts, D), values (sum of counts).
struct Slopes {
  std::span<const std::int64_t> counts;
  std::span<const double> directions, values;
};

class Gpr {
 public:
  /// noise_slope: standard deviation of the slopes.
  Gpr(std::size_t features, const Kernel& kernel, double noise_slope = 0.3);

  /// Full factorisation; the mean is the average of the targets. features (n, D), targets (n). Throws Error if shapes
  /// disagree, a value is not finite, or K is not positive definite even after jitter has grown: 0, then 1e-12, 1e-11,
  /// ... up to 1e-6 amplitude is added to the diagonal until it is. Same bits for any number of threads.
  void fit(std::span<const double> features, std::span<const double> targets, int threads = 1);
  void fit(std::span<const double> features, std::span<const double> targets, const Slopes& slopes, int threads = 1);
  /// One more point in O(n^2) for each of its rows; equal to a refit to 1e-10. (Should the point need more jitter, all
  /// is refitted with it.) directions (m, D) and slopes (m).
  void append(std::span<const double> feature, double target, std::span<const double> directions = {},
              std::span<const double> slopes = {});
  /// One point fewer in O(n^2) (rank-one update of the trailing block); with slopes, a refit. The last point cannot be
  /// removed.
  void remove(std::size_t row);
  /// New targets (rows: of each point its value, then its slopes) for the same points, O(n^2).
  void set_targets(std::span<const double> targets);
  /// New hyperparameters and a refit from the cached distances.
  void set_kernel(const Kernel& kernel);

  std::size_t size() const;      // n points
  std::size_t rows() const;      // n values and all slopes
  std::size_t features() const;  // D
  const Kernel& kernel() const;
  double mean() const;    // of the targets; predictions are mean + k alpha
  double jitter() const;  // what was added to the diagonal beyond noise
  double noise_slope() const;
  std::span<const double> weights() const;   // alpha (rows)
  std::span<const double> training() const;  // (n, D)

  /// At other hyperparameters, same data; does not change the fit. -infinity, with a zero gradient, where K + noise is
  /// not positive definite.
  Likelihood likelihood(const Kernel& kernel) const;
  double log_likelihood() const;  // of the current fit, O(n)
  /// Maximises the likelihood (projected L-BFGS in the logarithms, analytic gradient) from each of `starts` and from
  /// the current kernel, with at most max_evaluations each, sets the best and refits. Returns its value.
  /// Starts outside the bounds are moved onto them. Never collapses: a result under which the model would predict a
  /// constant is passed over, whatever its likelihood, and if none is left the current kernel is kept. Such a result
  /// has every point on its own (the median over points of the correlation with the nearest other one is below 0.01) or
  /// all points alike (the function varies by less than the noise over the two most distant points).
  double optimise(const KernelBounds& bounds, std::span<const Kernel> starts, int max_evaluations = 60);

  /// Predictions for `count` feature vectors (count, D), any of the outputs may be null:
  /// mean (count) and sigma (count) [eV] (of the noise-free function), and gradient (count, D) =
  /// d(mean - kappa sigma)/d feature, gradient_sigma (count, D) = d sigma/d feature. sigma is at least 1e-6
  /// sqrt(amplitude): there it is constant and its gradient zero.
  void predict(std::size_t count, const double* feature_vectors, double kappa, double* mean, double* sigma,
               double* gradient, double* gradient_sigma) const;
  /// L^-1 k (count, rows): the posterior covariance of two candidates is their k minus the product of their vectors.
  void whitened(std::size_t count, const double* feature_vectors, double* out) const;

 private:
  friend class GprTile;
  friend class LikelihoodOf;
  bool sloped() const { return rows_ > n_; }
  /// Directions of point i, (m, D).
  const double* directions_of(std::size_t i) const { return directions_.data() + (first_row_[i] - i) * dimension_; }
  std::size_t slopes_of(std::size_t i) const { return first_row_[i + 1] - first_row_[i] - 1; }
  void measure(std::size_t point);
  void measure_all(int threads);
  void covariances(std::size_t point, const Kernel& kernel, double jitter, double* out, std::size_t ld) const;
  void gram(const Kernel& kernel, double jitter, double* out, std::size_t ld) const;
  void factorise(double jitter, int threads);
  void solve_targets();
  void solve_weights();
  void reserve(std::size_t points);

  Kernel kernel_;
  std::size_t n_ = 0, rows_ = 0, dimension_ = 0, capacity_ = 0, stride_ = 0;
  double noise_slope_, mean_ = 0, jitter_ = 0;
  std::vector<double> features_, distances_, factor_, targets_, solved_targets_, solved_ones_, weights_;
  std::vector<std::size_t> first_row_{0};
  std::vector<double> directions_, geometry_, pulls_;
};

}  // namespace thalweg
