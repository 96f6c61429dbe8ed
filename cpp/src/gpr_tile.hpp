// Predictions of a Gpr for a tile of candidates without allocation: what Gpr::predict and the surrogate share. Private.
#pragma once

#include <cstdlib>
#include <memory>

#include "thalweg/gpr.hpp"

namespace thalweg {

/// Scratch of one thread. Arrays of a tile are [row][lanes], see linalg.hpp.
class GprTile {
 public:
  explicit GprTile(const Gpr& gpr);

  /// Where the features of the candidates go, [dimension][lanes].
  double* features() { return features_; }
  void set_features(std::size_t lane, int lanes, const double* feature_vector) {
    for (std::size_t d = 0; d < dimension_; ++d)
      features_[d * static_cast<std::size_t>(lanes) + lane] = feature_vector[d];
  }

  struct Wanted {
    bool sigma = false, gradient = false, gradient_sigma = false;
  };
  /// lanes is 8, 4 or 1; `gpr` is the one this was made for. kappa acts on the gradient only.
  void predict(const Gpr& gpr, int lanes, double kappa, Wanted wanted);

  const double* mean() const { return mean_; }                      // [lanes]
  const double* sigma() const { return sigma_; }                    // [lanes]
  const double* gradient() const { return gradient_; }              // [dimension][lanes], d(mean - kappa sigma)/df
  const double* gradient_sigma() const { return gradient_sigma_; }  // [dimension][lanes], d sigma/df
  const double* solved() const { return solved_; }                  // [rows][lanes], L^-1 k if only sigma was wanted

  /// Lanes of the next tile when `left` candidates are still to be done; 4 lanes cost as much as two single ones.
  static int lanes_for(std::size_t left) { return left > 4 ? 8 : left > 1 ? 4 : 1; }

 private:
  struct Free {
    void operator()(double* p) const { std::free(p); }
  };
  void predict_with_slopes(const Gpr& gpr, int lanes, double kappa, Wanted wanted);

  std::size_t dimension_;
  std::unique_ptr<double[], Free> storage_;  // on 64-byte lines
  double *features_, *gradient_, *gradient_sigma_, *solved_, *slope_, *combined_, *mean_, *sigma_, *norm_,
      *coefficient_;
  // With slopes only: k and its bend for each point, its pull along f - x, t . (f - x) and what multiplies t.
  double *value_ = nullptr, *bend_ = nullptr, *pull_ = nullptr, *along_ = nullptr, *along_combined_ = nullptr;
  double *difference_ = nullptr, *zero_ = nullptr, *part_ = nullptr;  // [dimension][lanes]
};

}  // namespace thalweg
