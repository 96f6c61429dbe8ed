#include "thalweg/gpr.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string>

#include "gpr_tile.hpp"
#include "linalg.hpp"

namespace thalweg {
namespace {

constexpr double kSmallestVariance = 1e-12;  // of the kernel's total: below, 1 - v.v is rounding noise
constexpr double kSmallestPivot = 1e-15;     // of the kernel's total
constexpr std::size_t kTogether = 16;        // points that the kernels of linalg.hpp take at once, or a multiple of it
constexpr std::size_t kNearBytes = 1 << 18;  // of features that stay in the nearest caches
constexpr double kLargestJitter = 1e-6;
constexpr double kLargestWeightRatio = 1e4;

void require(bool holds, const std::string& message) {
  if (!holds) throw Error(message);
}

void check_finite(std::span<const double> values, const char* name) {
  for (std::size_t k = 0; k < values.size(); ++k)
    if (!std::isfinite(values[k]))
      throw Error(std::string(name) + " must be finite, but value " + std::to_string(k) + " is " +
                  std::to_string(values[k]) + "; leave failed structures out");
}

void check_kernel(const Kernel& k) {
  const auto positive = [](double value, const char* name) {
    require(std::isfinite(value) && value > 0,
            std::string(name) + " must be positive and finite, but it is " + std::to_string(value));
  };
  positive(k.amplitude, "amplitude");
  positive(k.length_long, "length_long");
  positive(k.length_short, "length_short");
  positive(k.noise, "noise");
  require(k.weight_long >= 0 && k.weight_short >= 0 && std::isfinite(k.weight_long + k.weight_short) &&
              k.weight_long + k.weight_short > 0,
          "weight_long and weight_short must not be negative and not both zero, but they are " +
              std::to_string(k.weight_long) + " and " + std::to_string(k.weight_short));
  require(k.length_short <= k.length_long, "length_short must not exceed length_long, but " +
                                               std::to_string(k.length_short) + " > " + std::to_string(k.length_long));
}

double total_amplitude(const Kernel& k) { return k.amplitude * (k.weight_long + k.weight_short); }

KernelTerms terms_of(const Kernel& k) {
  return {total_amplitude(k), k.weight_short / (k.weight_long + k.weight_short), -0.5 / (k.length_long * k.length_long),
          -0.5 / (k.length_short * k.length_short)};
}

double correlation(const KernelTerms& t, double d2) {
  return (1 - t.short_fraction) * std::exp(t.long_rate * d2) + t.short_fraction * std::exp(t.short_rate * d2);
}

// Two matrices and some scratch, kept by each thread: fresh memory of this size (18 MB at n = 1000) costs a third of
// the whole likelihood in page faults.
struct LikelihoodMemory {
  std::vector<double> factor, inverse, scratch;
};
LikelihoodMemory& likelihood_memory(std::size_t n, std::size_t ld) {
  thread_local LikelihoodMemory memory;
  const auto grow = [](std::vector<double>& v, std::size_t size) {
    if (v.size() < size) v.resize(size);
  };
  grow(memory.factor, n * ld);
  grow(memory.inverse, n * ld);
  grow(memory.scratch, n * n / 4 + 64 * n + 1);
  return memory;
}

}  // namespace

// The likelihood of one data set at many kernels. value() keeps the factor, so that gradient() after it costs the
// inverse only: a line search pays for gradients of accepted points alone. One at a time in each thread.
class LikelihoodOf {
 public:
  explicit LikelihoodOf(const Gpr& gpr)
      : gpr_(gpr),
        n_(gpr.rows_),
        ld_(linalg::leading_dimension(n_)),
        factor_(likelihood_memory(n_, ld_).factor),
        inverse_(likelihood_memory(n_, ld_).inverse),
        scratch_(likelihood_memory(n_, ld_).scratch),
        centred_(gpr.targets_),
        weights_(n_) {
    for (std::size_t i = 0; i < gpr.n_; ++i) centred_[gpr.first_row_[i]] -= gpr.mean_;
  }

  double value(const Kernel& kernel) {
    const LinalgKernels& kernels = linalg_kernels();
    kernel_ = kernel;
    gpr_.gram(kernel, 0.0, factor_.data(), ld_);
    if (!linalg::cholesky(n_, factor_.data(), ld_, kSmallestPivot * total_amplitude(kernel)))
      return -std::numeric_limits<double>::infinity();
    weights_ = centred_;
    kernels.forward_one(n_, 0, factor_.data(), ld_, weights_.data());
    double square = 0, log_determinant = 0;
    for (std::size_t i = 0; i < n_; ++i) {
      square += weights_[i] * weights_[i];
      log_determinant += std::log(factor_[i * ld_ + i]);
    }
    kernels.backward_one(n_, factor_.data(), ld_, weights_.data());
    value_ = -0.5 * square - log_determinant - 0.5 * static_cast<double>(n_) * std::log(2 * M_PI);
    return value_;
  }

  // At the kernel of the last value(), which must have been finite.
  Likelihood gradient() {
    const LinalgKernels& kernels = linalg_kernels();
    linalg::inverse_from_factor(n_, factor_.data(), ld_, inverse_.data(), ld_, scratch_.data());
    const KernelTerms terms = terms_of(kernel_);
    // of (alpha alpha^T - K^-1) with e_long, e_short, e_long d2, e_short d2 (and what stands for them between slopes)
    double sums[4] = {}, on_diagonal = 0;
    if (gpr_.sloped()) {
      sums_with_slopes(terms, sums, on_diagonal);
    } else {
      for (std::size_t i = 0; i < n_; ++i) {
        kernels.likelihood_row(i, terms, gpr_.distances_.data() + i * (i + 1) / 2, weights_[i], weights_.data(),
                               inverse_.data() + i * ld_, sums);
        on_diagonal += weights_[i] * weights_[i] - inverse_[i * ld_ + i];
      }
      for (double& s : sums) s *= 2;
      sums[0] += on_diagonal;
      sums[1] += on_diagonal;
    }
    const double weight = kernel_.weight_long + kernel_.weight_short;
    const double a_long = kernel_.amplitude * kernel_.weight_long, a_short = kernel_.amplitude * kernel_.weight_short;
    Likelihood out;
    out.value = value_;
    out.d_amplitude = 0.5 * (a_long * sums[0] + a_short * sums[1]);
    out.d_length_long = 0.5 * a_long * sums[2] / (kernel_.length_long * kernel_.length_long);
    out.d_length_short = 0.5 * a_short * sums[3] / (kernel_.length_short * kernel_.length_short);
    out.d_noise = 0.5 * kernel_.noise * on_diagonal;
    out.d_weight = 0.5 * a_long * kernel_.weight_short / weight * (sums[1] - sums[0]);
    return out;
  }

 private:
  // Every pair of points enters with three numbers: what the weighted block holds of k, of its slope and of its bend.
  void sums_with_slopes(const KernelTerms& terms, double* sums, double& on_diagonal) const {
    const double rho_long = -2 * terms.long_rate, rho_short = -2 * terms.short_rate;
    std::vector<double> e_long(gpr_.n_), e_short(gpr_.n_), q(n_);
    std::vector<double> of_value(gpr_.n_), of_slope(gpr_.n_), of_bend(gpr_.n_);
    for (std::size_t i = 0; i < gpr_.n_; ++i) {
      const double* d2 = gpr_.distances_.data() + i * (i + 1) / 2;
      for (std::size_t j = 0; j <= i; ++j) {
        e_long[j] = terms.long_rate * d2[j], e_short[j] = terms.short_rate * d2[j];
        of_value[j] = of_slope[j] = of_bend[j] = 0;
      }
      linalg_kernels().exponential(i + 1, e_long.data(), e_long.data());
      linalg_kernels().exponential(i + 1, e_short.data(), e_short.data());
      const std::size_t value_row = gpr_.first_row_[i];
      const double* of_this = gpr_.geometry_.data() + value_row * (value_row + 1) / 2;
      for (std::size_t row = value_row; row < gpr_.first_row_[i + 1]; ++row) {
        const double *inverse = inverse_.data() + row * ld_, *geometry = gpr_.geometry_.data() + row * (row + 1) / 2;
        for (std::size_t c = 0; c <= row; ++c) q[c] = 2 * (weights_[row] * weights_[c] - inverse[c]);
        q[row] *= 0.5;
        if (row == value_row) on_diagonal += q[row];
        for (std::size_t j = 0; j <= i; ++j) {
          const std::size_t first = gpr_.first_row_[j], end = std::min(gpr_.first_row_[j + 1], row + 1);
          double along = 0, across = 0;
          for (std::size_t c = first + 1; c < end; ++c) along += q[c] * geometry[c];
          if (row == value_row) {
            of_value[j] += q[first];
            of_slope[j] += along;
            continue;
          }
          of_slope[j] += along - q[first] * geometry[first];
          if (j == i) continue;  // r = 0
          for (std::size_t c = first + 1; c < end; ++c) across += q[c] * of_this[c];
          of_bend[j] -= across * geometry[first];
        }
      }
      const auto add = [&](double rho, const std::vector<double>& e, double& value, double& length) {
        for (std::size_t j = 0; j <= i; ++j) {
          const double slope = rho * of_slope[j], bend = rho * rho * of_bend[j];
          value += e[j] * (of_value[j] + slope + bend);
          length += e[j] * (of_value[j] * d2[j] + slope * (d2[j] - 2 / rho) + bend * (d2[j] - 4 / rho));
        }
      };
      add(rho_long, e_long, sums[0], sums[2]);
      add(rho_short, e_short, sums[1], sums[3]);
    }
  }

  const Gpr& gpr_;
  std::size_t n_, ld_;  // rows
  std::vector<double>&factor_, &inverse_, &scratch_;
  std::vector<double> centred_, weights_;
  Kernel kernel_;
  double value_ = 0;
};

namespace {

// ---- hyperparameters as a vector of logarithms --------------------------------------------------------------
constexpr std::size_t kAmplitude = 0, kLong = 1, kShort = 2, kNoise = 3, kWeight = 4, kParameters = 5;
using Vector = std::array<double, kParameters>;

double dot(const Vector& a, const Vector& b) {
  double sum = 0;
  for (std::size_t k = 0; k < kParameters; ++k) sum += a[k] * b[k];
  return sum;
}

class Parameters {
 public:
  Parameters(const KernelBounds& bounds, const Kernel& start) : fixed_part_(start) {
    const auto set = [this](std::size_t k, const double (&range)[2], bool optimised, const char* name) {
      require(range[0] > 0 && range[0] <= range[1] && std::isfinite(range[1]),
              std::string("bounds of ") + name + " must be positive and rise, but they are " +
                  std::to_string(range[0]) + " and " + std::to_string(range[1]));
      low_[k] = std::log(range[0]);
      high_[k] = std::log(range[1]);
      free_[k] = optimised;
    };
    set(kAmplitude, bounds.amplitude, bounds.optimise_amplitude, "amplitude");
    set(kLong, bounds.length_long, bounds.optimise_long, "length_long");
    set(kShort, bounds.length_short, bounds.optimise_short, "length_short");
    set(kNoise, bounds.noise, bounds.optimise_noise, "noise");
    set(kWeight, {1 / kLargestWeightRatio, kLargestWeightRatio},
        bounds.optimise_weight && start.weight_long > 0 && start.weight_short > 0, "weights");
  }

  Vector logarithms(const Kernel& k) const {
    const double ratio = free_[kWeight] ? std::log(k.weight_short / k.weight_long) : 0.0;
    return {std::log(k.amplitude), std::log(k.length_long), std::log(k.length_short), std::log(k.noise), ratio};
  }

  Kernel kernel(const Vector& p) const {
    Kernel k = fixed_part_;
    if (free_[kAmplitude]) k.amplitude = std::exp(p[kAmplitude]);
    if (free_[kLong]) k.length_long = std::exp(p[kLong]);
    if (free_[kShort]) k.length_short = std::exp(p[kShort]);
    if (free_[kNoise]) k.noise = std::exp(p[kNoise]);
    if (free_[kWeight]) {
      const double sum = k.weight_long + k.weight_short, ratio = std::exp(p[kWeight]);
      k.weight_short = sum * ratio / (1 + ratio);
      k.weight_long = sum - k.weight_short;
    }
    k.length_short = std::min(k.length_short, k.length_long);  // equal logarithms may differ in the last bit
    return k;
  }

  void project(Vector& p) const {
    for (std::size_t k = 0; k < kParameters; ++k)
      if (free_[k]) p[k] = std::clamp(p[k], low_[k], high_[k]);
    if (p[kShort] <= p[kLong]) return;
    if (free_[kLong] && free_[kShort]) {
      const double middle = 0.5 * (p[kLong] + p[kShort]);
      p[kLong] = p[kShort] =
          std::clamp(middle, std::max(low_[kLong], low_[kShort]), std::min(high_[kLong], high_[kShort]));
    } else if (free_[kLong]) {
      p[kLong] = p[kShort];
    } else if (free_[kShort]) {
      p[kShort] = p[kLong];
    }
  }

  // The gradient without what points out of the allowed range; `active` names the constraints that hold, one bit each.
  Vector reduced(const Vector& p, const Likelihood& l, unsigned& active) const {
    Vector g = {l.d_amplitude, l.d_length_long, l.d_length_short, l.d_noise, l.d_weight};
    active = 0;
    for (std::size_t k = 0; k < kParameters; ++k) {
      if (!free_[k])
        g[k] = 0;
      else if ((p[k] <= low_[k] && g[k] < 0) || (p[k] >= high_[k] && g[k] > 0))
        g[k] = 0, active |= 1u << k;
    }
    if (p[kShort] >= p[kLong] && g[kShort] > g[kLong]) {  // the two lengths move together
      active |= 1u << kParameters;
      const bool both = free_[kLong] && free_[kShort];
      g[kLong] = g[kShort] = both ? 0.5 * (g[kLong] + g[kShort]) : 0.0;
    }
    return g;
  }

 private:
  Kernel fixed_part_;
  Vector low_{}, high_{};
  std::array<bool, kParameters> free_{};
};

// Ascent from one start: limited-memory BFGS (Nocedal, Math. Comp. 35, 773 (1980)) on the free parameters, steps
// projected onto the bounds, history dropped when another set of constraints becomes active.
double maximise(LikelihoodOf& data, const Parameters& parameters, Vector& p, int max_evaluations) {
  constexpr std::size_t memory = 5;
  parameters.project(p);
  double value = data.value(parameters.kernel(p));
  int evaluations = 1;
  if (!std::isfinite(value)) return value;
  unsigned active = 0;
  Vector g = parameters.reduced(p, data.gradient(), active);
  std::vector<std::pair<Vector, Vector>> history;  // (step, fall of the gradient), oldest first
  while (evaluations < max_evaluations) {
    double largest_gradient = 0;
    for (const double x : g) largest_gradient = std::max(largest_gradient, std::abs(x));
    if (largest_gradient < 1e-3) break;

    Vector direction = g;
    std::vector<double> projections(history.size());
    for (std::size_t h = history.size(); h-- > 0;) {
      const auto& [s, y] = history[h];
      projections[h] = dot(s, direction) / dot(s, y);
      for (std::size_t k = 0; k < kParameters; ++k) direction[k] -= projections[h] * y[k];
    }
    const double scale = history.empty() ? std::min(1.0, 1.0 / largest_gradient)
                                         : dot(history.back().first, history.back().second) /
                                               dot(history.back().second, history.back().second);
    for (double& x : direction) x *= scale;
    for (std::size_t h = 0; h < history.size(); ++h) {
      const auto& [s, y] = history[h];
      const double beta = dot(y, direction) / dot(s, y);
      for (std::size_t k = 0; k < kParameters; ++k) direction[k] += (projections[h] - beta) * s[k];
    }
    double longest = 0;
    for (const double x : direction) longest = std::max(longest, std::abs(x));
    if (longest > 2)  // a factor of e^2 in a hyperparameter is far enough for one step
      for (double& x : direction) x *= 2 / longest;

    bool accepted = false;
    Vector next{};
    double next_value = 0;
    for (double step = 1; evaluations < max_evaluations && step > 1e-4; step *= 0.3) {
      for (std::size_t k = 0; k < kParameters; ++k) next[k] = p[k] + step * direction[k];
      parameters.project(next);
      Vector moved{};
      for (std::size_t k = 0; k < kParameters; ++k) moved[k] = next[k] - p[k];
      next_value = data.value(parameters.kernel(next));
      ++evaluations;
      if (next_value >= value + 1e-4 * dot(g, moved) && next_value > value) {
        accepted = true;
        break;
      }
    }
    if (!accepted) {
      if (history.empty()) break;
      history.clear();
      continue;
    }
    unsigned next_active = 0;
    const Vector next_g = parameters.reduced(next, data.gradient(), next_active);
    const double gain = next_value - value;
    if (next_active != active) history.clear();
    Vector s{}, y{};
    for (std::size_t k = 0; k < kParameters; ++k) s[k] = next[k] - p[k], y[k] = g[k] - next_g[k];
    if (next_active == active && dot(s, y) > 1e-10 * std::sqrt(dot(s, s) * dot(y, y))) {
      if (history.size() == memory) history.erase(history.begin());
      history.emplace_back(s, y);
    }
    p = next, g = next_g, value = next_value, active = next_active;
    if (gain < 1e-7 * (1 + std::abs(value))) break;
  }
  return value;
}

}  // namespace

Gpr::Gpr(std::size_t features, const Kernel& kernel, double noise_slope)
    : kernel_(kernel), dimension_(features), noise_slope_(noise_slope) {
  require(features > 0, "a GP needs at least one feature, but the feature vector is empty");
  require(std::isfinite(noise_slope) && noise_slope > 0,
          "noise_slope must be positive and finite, but it is " + std::to_string(noise_slope));
  check_kernel(kernel);
}

void Gpr::reserve(std::size_t rows) {
  if (rows <= capacity_) return;
  const std::size_t capacity = std::max<std::size_t>(rows + rows / 2, 32);
  const std::size_t stride = linalg::leading_dimension(capacity);
  std::vector<double> factor(capacity * stride);
  for (std::size_t i = 0; i < rows_ && !factor_.empty(); ++i)
    std::copy_n(factor_.data() + i * stride_, i + 1, factor.data() + i * stride);
  factor_ = std::move(factor);
  capacity_ = capacity;
  stride_ = stride;
}

// ---- covariances with slopes -------------------------------------------------------------------------------
// Rows of `geometry_` that belong to one point, from the points up to it.
void Gpr::measure(std::size_t point) {
  const LinalgKernels& kernels = linalg_kernels();
  const std::size_t first = first_row_[point], count = slopes_of(point), dimension = dimension_;
  const auto row_of = [this](std::size_t row) { return geometry_.data() + row * (row + 1) / 2; };
  double* value_row = row_of(first);
  std::vector<double> r(dimension), here(count);
  for (std::size_t j = 0; j <= point; ++j) {
    for (std::size_t d = 0; d < dimension; ++d) r[d] = features_[point * dimension + d] - features_[j * dimension + d];
    const std::size_t at = first_row_[j];
    value_row[at] = 0;
    if (j < point) kernels.tile1.products(slopes_of(j), dimension, directions_of(j), r.data(), value_row + at + 1);
    kernels.tile1.products(count, dimension, directions_of(point), r.data(), here.data());
    for (std::size_t c = 0; c < count; ++c) row_of(first + 1 + c)[at] = here[c];
  }
  // Eight slopes of this point at a time against all slopes so far.
  const std::size_t so_far = first_row_[point + 1] - point - 1;
  std::vector<double> tile(8 * dimension), out(8 * so_far);
  for (std::size_t begin = 0; begin < count; begin += 8) {
    const std::size_t lanes = std::min<std::size_t>(8, count - begin);
    for (std::size_t lane = 0; lane < 8; ++lane) {
      const double* direction = directions_of(point) + (begin + std::min(lane, lanes - 1)) * dimension;
      for (std::size_t d = 0; d < dimension; ++d) tile[8 * d + lane] = direction[d];
    }
    kernels.tile8.products(so_far, dimension, directions_.data(), tile.data(), out.data());
    for (std::size_t lane = 0; lane < lanes; ++lane) {
      const std::size_t row = first + 1 + begin + lane;
      double* to = row_of(row);
      for (std::size_t j = 0; j <= point; ++j)
        for (std::size_t c = first_row_[j] + 1; c < std::min(first_row_[j + 1], row + 1); ++c)
          to[c] = out[8 * (c - j - 1) + lane];
    }
  }
}

void Gpr::measure_all(int threads) {
  geometry_.resize(sloped() ? rows_ * (rows_ + 1) / 2 : 0);
  if (!sloped()) return;
  // Threads own whole points; the last ones have the longest rows.
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (std::int64_t point = static_cast<std::int64_t>(n_) - 1; point >= 0; --point)
    measure(static_cast<std::size_t>(point));
}

// Rows of the kernel matrix that belong to one point, to the diagonal, noise included.
void Gpr::covariances(std::size_t point, const Kernel& kernel, double jitter, double* out, std::size_t ld) const {
  thread_local std::vector<double> scratch;
  scratch.resize(3 * (point + 1));
  double *k = scratch.data(), *slope = k + point + 1, *bend = slope + point + 1;
  linalg_kernels().kernel_derivatives(point + 1, terms_of(kernel), distances_.data() + point * (point + 1) / 2, k,
                                      slope, bend);
  const std::size_t first = first_row_[point];
  const double* of_this = geometry_.data() + first * (first + 1) / 2;
  for (std::size_t j = 0; j <= point; ++j) {
    out[first_row_[j]] = k[j];
    if (j == point) break;
    for (std::size_t c = first_row_[j] + 1; c < first_row_[j + 1]; ++c) out[c] = slope[j] * of_this[c];
  }
  out[first] += kernel.noise + jitter;
  for (std::size_t row = first + 1; row < first_row_[point + 1]; ++row) {
    out += ld;
    const double* geometry = geometry_.data() + row * (row + 1) / 2;
    for (std::size_t j = 0; j < point; ++j) {
      const std::size_t at = first_row_[j];
      const double along = bend[j] * geometry[at];
      out[at] = -slope[j] * geometry[at];
      for (std::size_t c = at + 1; c < first_row_[j + 1]; ++c) out[c] = slope[j] * geometry[c] - along * of_this[c];
    }
    out[first] = 0;
    for (std::size_t c = first + 1; c <= row; ++c) out[c] = slope[point] * geometry[c];
    out[row] += noise_slope_ * noise_slope_ + jitter;
  }
}

void Gpr::gram(const Kernel& kernel, double jitter, double* out, std::size_t ld) const {
  if (!sloped()) return linalg::gram(n_, terms_of(kernel), kernel.noise + jitter, distances_.data(), out, ld);
  for (std::size_t point = 0; point < n_; ++point) covariances(point, kernel, jitter, out + first_row_[point] * ld, ld);
}

void Gpr::factorise(double jitter, int threads) {
  const double total = total_amplitude(kernel_);
  for (;;) {
    gram(kernel_, jitter, factor_.data(), stride_);
    if (linalg::cholesky(rows_, factor_.data(), stride_, kSmallestPivot * total, threads)) break;
    jitter = jitter == 0 ? 1e-12 * total : 10 * jitter;
    require(jitter <= 1.001 * kLargestJitter * total,
            "the kernel matrix of " + std::to_string(rows_) +
                " rows is not positive definite even with 1e-6 amplitude added to its diagonal; raise the noise (" +
                std::to_string(kernel_.noise) + " eV^2) or shorten the lengths");
  }
  jitter_ = jitter;
  solve_targets();
}

void Gpr::solve_targets() {
  const LinalgKernels& kernels = linalg_kernels();
  solved_targets_ = targets_;
  solved_ones_.assign(rows_, sloped() ? 0.0 : 1.0);
  for (std::size_t i = 0; i < n_; ++i) solved_ones_[first_row_[i]] = 1.0;  // slopes know nothing of a constant
  kernels.forward_one(rows_, 0, factor_.data(), stride_, solved_targets_.data());
  kernels.forward_one(rows_, 0, factor_.data(), stride_, solved_ones_.data());
  solve_weights();
}

void Gpr::solve_weights() {
  double sum = 0;
  for (std::size_t i = 0; i < n_; ++i) sum += targets_[first_row_[i]];
  mean_ = sum / static_cast<double>(n_);
  weights_.resize(rows_);
  for (std::size_t i = 0; i < rows_; ++i) weights_[i] = solved_targets_[i] - mean_ * solved_ones_[i];
  linalg_kernels().backward_one(rows_, factor_.data(), stride_, weights_.data());
  pulls_.assign(sloped() ? n_ * dimension_ : 0, 0.0);
  if (!sloped()) return;
  for (std::size_t i = 0; i < n_; ++i)
    for (std::size_t c = 0; c < slopes_of(i); ++c) {
      const double weight = weights_[first_row_[i] + 1 + c], *direction = directions_of(i) + c * dimension_;
      for (std::size_t d = 0; d < dimension_; ++d) pulls_[i * dimension_ + d] += weight * direction[d];
    }
}

void Gpr::fit(std::span<const double> features, std::span<const double> targets, int threads) {
  fit(features, targets, {}, threads);
}

void Gpr::fit(std::span<const double> features, std::span<const double> targets, const Slopes& slopes, int threads) {
  const std::size_t n = targets.size(), m = slopes.values.size();
  require(n > 0, "a fit needs at least one point, but there are no targets");
  require(features.size() == n * dimension_,
          "features must hold " + std::to_string(n) + " x " + std::to_string(dimension_) +
              " values (targets x features), but they hold " + std::to_string(features.size()));
  require(slopes.directions.size() == m * dimension_,
          "directions must hold " + std::to_string(m) + " x " + std::to_string(dimension_) +
              " values (slopes x features), but they hold " + std::to_string(slopes.directions.size()));
  require(slopes.counts.size() == n || (slopes.counts.empty() && m == 0),
          "counts must say for each of the " + std::to_string(n) + " points how many slopes it has, but they hold " +
              std::to_string(slopes.counts.size()) + " numbers");
  std::vector<std::size_t> first_row{0};
  for (std::size_t i = 0; i < n; ++i) {
    const std::int64_t count = slopes.counts.empty() ? 0 : slopes.counts[i];
    require(count >= 0, "counts of slopes must not be negative, but one is " + std::to_string(count));
    first_row.push_back(first_row.back() + 1 + static_cast<std::size_t>(count));
  }
  require(first_row.back() == n + m,
          "counts add up to " + std::to_string(first_row.back() - n) + " slopes, but there are " + std::to_string(m));
  check_finite(features, "features");
  check_finite(targets, "targets");
  check_finite(slopes.directions, "directions");
  check_finite(slopes.values, "slopes");
  features_.assign(features.begin(), features.end());
  directions_.assign(slopes.directions.begin(), slopes.directions.end());
  first_row_ = std::move(first_row);
  targets_.resize(n + m);
  for (std::size_t i = 0; i < n; ++i) {
    targets_[first_row_[i]] = targets[i];
    std::copy_n(slopes.values.begin() + static_cast<std::ptrdiff_t>(first_row_[i] - i), slopes_of(i),
                targets_.begin() + static_cast<std::ptrdiff_t>(first_row_[i] + 1));
  }
  distances_.resize(n * (n + 1) / 2);
  linalg::pair_distances(n, dimension_, features_.data(), distances_.data(), std::max(1, threads));
  rows_ = 0;  // nothing to keep when the factor moves
  reserve(n + m);
  n_ = n;
  rows_ = n + m;
  measure_all(std::max(1, threads));
  factorise(0.0, std::max(1, threads));
}

void Gpr::append(std::span<const double> feature, double target, std::span<const double> directions,
                 std::span<const double> slopes) {
  require(feature.size() == dimension_, "a feature vector must hold " + std::to_string(dimension_) +
                                            " values, but it holds " + std::to_string(feature.size()));
  require(directions.size() == slopes.size() * dimension_,
          "directions must hold " + std::to_string(slopes.size()) + " x " + std::to_string(dimension_) +
              " values (slopes x features), but they hold " + std::to_string(directions.size()));
  check_finite(feature, "features");
  check_finite({&target, 1}, "targets");
  check_finite(directions, "directions");
  check_finite(slopes, "slopes");
  if (n_ == 0) {
    const std::int64_t count = static_cast<std::int64_t>(slopes.size());
    return fit(feature, {&target, 1}, {{&count, 1}, directions, slopes});
  }
  const LinalgKernels& kernels = linalg_kernels();
  const std::size_t n = n_, first = rows_, end = first + 1 + slopes.size();
  const bool had_slopes = sloped();
  reserve(end);

  distances_.resize((n + 1) * (n + 2) / 2);
  double* d2 = distances_.data() + n * (n + 1) / 2;
  kernels.tile1.squared_distances(n, dimension_, features_.data(), feature.data(), d2);
  d2[n] = 0;
  features_.insert(features_.end(), feature.begin(), feature.end());
  directions_.insert(directions_.end(), directions.begin(), directions.end());
  targets_.push_back(target);
  targets_.insert(targets_.end(), slopes.begin(), slopes.end());
  first_row_.push_back(end);
  n_ = n + 1;
  rows_ = end;

  double* row = factor_.data() + first * stride_;
  if (sloped()) {
    if (!had_slopes) {
      measure_all(1);
    } else {
      geometry_.resize(rows_ * (rows_ + 1) / 2);
      measure(n);
    }
    covariances(n, kernel_, jitter_, row, stride_);
  } else {
    kernels.kernel_row(n, terms_of(kernel_), d2, row);
    row[n] = total_amplitude(kernel_) + kernel_.noise + jitter_;
  }
  const double total = total_amplitude(kernel_);
  for (std::size_t at = first; at < end; ++at, row += stride_) {
    const double own = row[at];
    kernels.forward_one(at, 0, factor_.data(), stride_, row);
    double square = 0, along_targets = 0, along_ones = 0;
    for (std::size_t i = 0; i < at; ++i) {
      square += row[i] * row[i];
      along_targets += row[i] * solved_targets_[i];
      along_ones += row[i] * solved_ones_[i];
    }
    const double pivot = own - square;
    if (!(pivot > kSmallestPivot * total)) return factorise(jitter_, 1);
    row[at] = std::sqrt(pivot);
    solved_targets_.push_back((targets_[at] - along_targets) / row[at]);
    solved_ones_.push_back(((at == first ? 1.0 : 0.0) - along_ones) / row[at]);
  }
  solve_weights();
}

void Gpr::remove(std::size_t row) {
  require(row < n_, "row to remove must be below the number of points " + std::to_string(n_) + ", but it is " +
                        std::to_string(row));
  require(n_ > 1, "the last point of a GP cannot be removed");
  const bool had_slopes = sloped();
  if (!had_slopes) {
    std::vector<double> workspace(2 * n_);
    double* const extra[2] = {solved_targets_.data(), solved_ones_.data()};
    linalg_kernels().remove_row(n_, row, factor_.data(), stride_, extra, workspace.data());
  }
  double* to = distances_.data() + row * (row + 1) / 2;
  for (std::size_t i = row + 1; i < n_; ++i) {
    const double* from = distances_.data() + i * (i + 1) / 2;
    to = std::copy(from, from + row, to);
    to = std::copy(from + row + 1, from + i + 1, to);
  }
  const auto erase = [](std::vector<double>& from, std::size_t begin, std::size_t count) {
    const auto at = from.begin() + static_cast<std::ptrdiff_t>(begin);
    from.erase(at, at + static_cast<std::ptrdiff_t>(count));
  };
  const std::size_t count = slopes_of(row) + 1;
  erase(features_, row * dimension_, dimension_);
  erase(directions_, (first_row_[row] - row) * dimension_, (count - 1) * dimension_);
  erase(targets_, first_row_[row], count);
  for (std::size_t i = row; i < n_; ++i) first_row_[i] = first_row_[i + 1] - count;
  first_row_.pop_back();
  --n_;
  rows_ -= count;
  distances_.resize(n_ * (n_ + 1) / 2);
  if (had_slopes) {
    measure_all(1);
    return factorise(jitter_, 1);
  }
  solved_targets_.resize(n_);
  solved_ones_.resize(n_);
  solve_weights();
}

void Gpr::set_targets(std::span<const double> targets) {
  require(targets.size() == rows_, "targets must hold one value for each of the " + std::to_string(rows_) +
                                       " rows, but they hold " + std::to_string(targets.size()));
  check_finite(targets, "targets");
  targets_.assign(targets.begin(), targets.end());
  if (n_ > 0) solve_targets();
}

void Gpr::set_kernel(const Kernel& kernel) {
  check_kernel(kernel);
  kernel_ = kernel;
  if (n_ > 0) factorise(0.0, 1);
}

std::size_t Gpr::size() const { return n_; }
std::size_t Gpr::rows() const { return rows_; }
double Gpr::noise_slope() const { return noise_slope_; }
std::size_t Gpr::features() const { return dimension_; }
const Kernel& Gpr::kernel() const { return kernel_; }
double Gpr::mean() const { return mean_; }
double Gpr::jitter() const { return jitter_; }
std::span<const double> Gpr::weights() const { return weights_; }
std::span<const double> Gpr::training() const { return features_; }

Likelihood Gpr::likelihood(const Kernel& kernel) const {
  require(n_ > 0, "the likelihood needs data; call fit first");
  check_kernel(kernel);
  LikelihoodOf data(*this);
  Likelihood out;
  out.value = data.value(kernel);
  return std::isfinite(out.value) ? data.gradient() : out;
}

double Gpr::log_likelihood() const {
  require(n_ > 0, "the likelihood needs data; call fit first");
  double square = 0, log_determinant = 0;
  for (std::size_t i = 0; i < rows_; ++i) {
    const double z = solved_targets_[i] - mean_ * solved_ones_[i];
    square += z * z;
    log_determinant += std::log(factor_[i * stride_ + i]);
  }
  return -0.5 * square - log_determinant - 0.5 * static_cast<double>(rows_) * std::log(2 * M_PI);
}

double Gpr::optimise(const KernelBounds& bounds, std::span<const Kernel> starts, int max_evaluations) {
  require(n_ > 0, "optimisation needs data; call fit first");
  require(max_evaluations >= 1, "max_evaluations must be at least 1, but it is " + std::to_string(max_evaluations));
  for (const Kernel& start : starts) check_kernel(start);

  double largest = 0;
  std::vector<double> nearest(n_, std::numeric_limits<double>::infinity());
  for (std::size_t i = 0; i < n_; ++i)
    for (std::size_t j = 0; j < i; ++j) {
      const double d2 = distances_[i * (i + 1) / 2 + j];
      largest = std::max(largest, d2);
      nearest[i] = std::min(nearest[i], d2);
      nearest[j] = std::min(nearest[j], d2);
    }
  std::nth_element(nearest.begin(), nearest.begin() + static_cast<std::ptrdiff_t>(n_ / 2), nearest.end());
  const double median_nearest = nearest[n_ / 2];
  const auto collapsed = [&](const Kernel& k) {
    const KernelTerms terms = terms_of(k);
    return correlation(terms, median_nearest) < 0.01 ||
           2 * terms.amplitude * (1 - correlation(terms, largest)) < k.noise;
  };

  LikelihoodOf data(*this);
  Kernel best = kernel_;
  double best_value = -std::numeric_limits<double>::infinity();
  const auto from = [&](const Kernel& start) {
    const Parameters parameters(bounds, start);
    Vector p = parameters.logarithms(start);
    const double value = maximise(data, parameters, p, max_evaluations);
    const Kernel found = parameters.kernel(p);
    if (value > best_value && !collapsed(found)) best_value = value, best = found;
  };
  from(kernel_);
  for (const Kernel& start : starts) from(start);
  // Also when the bounds, moved to, leave less than there was: with slopes one outlier may do that.
  if (!std::isfinite(best_value) || (sloped() && best_value < log_likelihood())) return log_likelihood();
  set_kernel(best);
  return best_value;
}

// ---- prediction --------------------------------------------------------------------------------------------
GprTile::GprTile(const Gpr& gpr) : dimension_(gpr.dimension_) {
  constexpr std::size_t lanes = 8;
  const std::size_t n = gpr.n_, rows = gpr.rows_, sloped = gpr.sloped() ? 1 : 0;
  const std::size_t size = lanes * (3 * dimension_ + 2 * n + rows + 4 + sloped * (3 * dimension_ + 3 * n + 2 * rows));
  storage_.reset(static_cast<double*>(std::aligned_alloc(64, size * sizeof(double))));
  if (!storage_) throw std::bad_alloc();
  double* at = storage_.get();
  const auto take = [&at](std::size_t count) {
    double* here = at;
    at += count * lanes;
    return here;
  };
  features_ = take(dimension_);
  gradient_ = take(dimension_);
  gradient_sigma_ = take(dimension_);
  solved_ = take(rows);
  slope_ = take(n);
  combined_ = take(n);
  mean_ = take(1);
  sigma_ = take(1);
  norm_ = take(1);
  coefficient_ = take(1);
  if (sloped == 0) return;
  value_ = take(n);
  bend_ = take(n);
  pull_ = take(n);
  along_ = take(rows);
  along_combined_ = take(rows);
  difference_ = take(dimension_);
  zero_ = take(dimension_);
  part_ = take(dimension_);
  std::fill_n(zero_, dimension_ * lanes, 0.0);
}

void GprTile::predict(const Gpr& gpr, int lanes, double kappa, Wanted wanted) {
  if (gpr.sloped()) return predict_with_slopes(gpr, lanes, kappa, wanted);
  const LinalgKernels& kernels = linalg_kernels();
  const TileKernels& tile = lanes == 8 ? kernels.tile8 : lanes == 4 ? kernels.tile4 : kernels.tile1;
  const std::size_t n = gpr.n_;
  const double *x = gpr.features_.data(), *weights = gpr.weights_.data(), *factor = gpr.factor_.data();
  const bool sloped = wanted.gradient || wanted.gradient_sigma;
  const bool solve_sigma = wanted.sigma || wanted.gradient_sigma || (wanted.gradient && kappa != 0);
  const KernelTerms terms = terms_of(gpr.kernel_);

  std::fill_n(mean_, lanes, 0.0);
  std::fill_n(gradient_, dimension_ * static_cast<std::size_t>(lanes), 0.0);
  // Where nothing has to be solved in between, a few points at a time go all the way while they are near.
  const std::size_t near = kNearBytes / (dimension_ * sizeof(double)) / kTogether * kTogether;
  const std::size_t block = solve_sigma ? n : std::max(near, kTogether);
  const double zeros[8] = {};
  for (std::size_t i = 0; i < n; i += block) {
    const std::size_t count = std::min(block, n - i), at = i * static_cast<std::size_t>(lanes);
    double* slope = sloped ? slope_ + at : nullptr;
    tile.squared_distances(count, dimension_, x + i * dimension_, features_, solved_ + at);
    tile.evaluate(count, terms, weights + i, solved_ + at, slope, mean_);
    if (!sloped || solve_sigma) continue;
    tile.combine(count, weights + i, zeros, nullptr, slope, combined_ + at);
    tile.gradient(count, dimension_, x + i * dimension_, features_, combined_ + at, gradient_);
  }
  for (int lane = 0; lane < lanes; ++lane) mean_[lane] += gpr.mean_;
  if (!solve_sigma) return;

  double inverse_sigma[8] = {};
  tile.forward(n, factor, gpr.stride_, solved_, norm_);
  for (int lane = 0; lane < lanes; ++lane) {
    const double variance = terms.amplitude - norm_[lane], floor = kSmallestVariance * terms.amplitude;
    sigma_[lane] = std::sqrt(std::max(variance, floor));
    inverse_sigma[lane] = variance > floor ? 1 / sigma_[lane] : 0.0;
  }
  if (sloped) tile.backward(n, factor, gpr.stride_, solved_);
  // dk_i/df = slope_i (x_i - f), so d sigma/df = -1/sigma sum_i u_i dk_i/df with u = (K + noise)^-1 k.
  if (wanted.gradient_sigma) {
    for (int lane = 0; lane < lanes; ++lane) coefficient_[lane] = -inverse_sigma[lane];
    tile.combine(n, nullptr, coefficient_, solved_, slope_, combined_);
    std::fill_n(gradient_sigma_, dimension_ * static_cast<std::size_t>(lanes), 0.0);
    tile.gradient(n, dimension_, x, features_, combined_, gradient_sigma_);
  }
  if (wanted.gradient) {
    for (int lane = 0; lane < lanes; ++lane) coefficient_[lane] = kappa * inverse_sigma[lane];
    tile.combine(n, weights, coefficient_, kappa != 0 ? solved_ : nullptr, slope_, combined_);
    tile.gradient(n, dimension_, x, features_, combined_, gradient_);
  }
}

template <int lanes>
static void differences(std::size_t dimension, const double* f, const double* x, double* out) {
  for (std::size_t d = 0; d < dimension; ++d)
    for (std::size_t lane = 0; lane < lanes; ++lane) out[d * lanes + lane] = f[d * lanes + lane] - x[d];
}

// d k(row)/df is slope (x - f) for a value and slope t - bend (t.r) r for a slope, r = f - x (top of gpr.hpp).
void GprTile::predict_with_slopes(const Gpr& gpr, int lanes, double kappa, Wanted wanted) {
  const LinalgKernels& kernels = linalg_kernels();
  const TileKernels& tile = lanes == 8 ? kernels.tile8 : lanes == 4 ? kernels.tile4 : kernels.tile1;
  const std::size_t n = gpr.n_, dimension = dimension_, width = static_cast<std::size_t>(lanes);
  const double* x = gpr.features_.data();
  const std::vector<std::size_t>& first_row = gpr.first_row_;
  const bool solve_sigma = wanted.sigma || wanted.gradient_sigma || (wanted.gradient && kappa != 0);
  const bool sloped = wanted.gradient || wanted.gradient_sigma;
  const KernelTerms terms = terms_of(gpr.kernel_);

  tile.squared_distances(n, dimension, x, features_, value_);
  kernels.kernel_derivatives(n * width, terms, value_, value_, slope_, bend_);
  for (std::size_t i = 0; i < n; ++i) {
    double* pull = pull_ + i * width;
    const std::size_t count = gpr.slopes_of(i);
    std::fill_n(pull, width, 0.0);
    if (count == 0) continue;
    const double* here = x + i * dimension;
    lanes == 8   ? differences<8>(dimension, features_, here, difference_)
    : lanes == 4 ? differences<4>(dimension, features_, here, difference_)
                 : differences<1>(dimension, features_, here, difference_);
    tile.products(1, dimension, gpr.pulls_.data() + i * dimension, difference_, pull);
    if (solve_sigma)
      tile.products(count, dimension, gpr.directions_of(i), difference_, along_ + (first_row[i] + 1) * width);
  }
  for (std::size_t lane = 0; lane < width; ++lane) {
    double sum = 0;
    for (std::size_t i = 0; i < n; ++i) {
      const std::size_t at = i * width + lane;
      sum += gpr.weights_[first_row[i]] * value_[at] + slope_[at] * pull_[at];
    }
    mean_[lane] = gpr.mean_ + sum;
  }

  double inverse_sigma[8] = {};
  if (solve_sigma) {
    for (std::size_t i = 0; i < n; ++i) {
      const std::size_t at = i * width;
      std::copy_n(value_ + at, width, solved_ + first_row[i] * width);
      for (std::size_t row = first_row[i] + 1; row < first_row[i + 1]; ++row)
        for (std::size_t lane = 0; lane < width; ++lane)
          solved_[row * width + lane] = slope_[at + lane] * along_[row * width + lane];
    }
    tile.forward(gpr.rows_, gpr.factor_.data(), gpr.stride_, solved_, norm_);
    for (int lane = 0; lane < lanes; ++lane) {
      const double variance = terms.amplitude - norm_[lane], floor = kSmallestVariance * terms.amplitude;
      sigma_[lane] = std::sqrt(std::max(variance, floor));
      inverse_sigma[lane] = variance > floor ? 1 / sigma_[lane] : 0.0;
    }
    if (sloped) tile.backward(gpr.rows_, gpr.factor_.data(), gpr.stride_, solved_);
  }

  // of_mean times the gradient of the mean + coefficient (lanes) times that of k . u, u = (K + noise)^-1 k.
  const auto add_up = [&](double of_mean, const double* coefficient, double* out) {
    for (std::size_t i = 0; i < n; ++i)
      for (std::size_t lane = 0; lane < width; ++lane) {
        const std::size_t at = i * width + lane;
        double on_slope = of_mean * gpr.weights_[first_row[i]], on_bend = of_mean * pull_[at];
        if (coefficient != nullptr) {
          on_slope += coefficient[lane] * solved_[first_row[i] * width + lane];
          double sum = 0;
          for (std::size_t row = first_row[i] + 1; row < first_row[i + 1]; ++row) {
            const double u = solved_[row * width + lane];
            sum += u * along_[row * width + lane];
            along_combined_[(row - i - 1) * width + lane] = coefficient[lane] * slope_[at] * u;
          }
          on_bend += coefficient[lane] * sum;
        }
        combined_[at] = slope_[at] * on_slope + bend_[at] * on_bend;
      }
    std::fill_n(out, dimension * width, 0.0);
    tile.gradient(n, dimension, x, features_, combined_, out);
    const auto add = [&](std::size_t count, const double* vectors, const double* factors) {
      std::fill_n(part_, dimension * width, 0.0);
      tile.gradient(count, dimension, vectors, zero_, factors, part_);
      for (std::size_t k = 0; k < dimension * width; ++k) out[k] += part_[k];
    };
    if (coefficient != nullptr) add(gpr.rows_ - n, gpr.directions_.data(), along_combined_);
    if (of_mean != 0) add(n, gpr.pulls_.data(), slope_);
  };
  if (wanted.gradient_sigma) {
    for (int lane = 0; lane < lanes; ++lane) coefficient_[lane] = -inverse_sigma[lane];
    add_up(0.0, coefficient_, gradient_sigma_);
  }
  if (wanted.gradient) {
    for (int lane = 0; lane < lanes; ++lane) coefficient_[lane] = kappa * inverse_sigma[lane];
    add_up(1.0, kappa != 0 ? coefficient_ : nullptr, gradient_);
  }
}

void Gpr::predict(std::size_t count, const double* feature_vectors, double kappa, double* mean, double* sigma,
                  double* gradient, double* gradient_sigma) const {
  require(n_ > 0, "a prediction needs data; call fit first");
  GprTile tile(*this);
  for (std::size_t first = 0; first < count;) {
    const int lanes = GprTile::lanes_for(count - first);
    const std::size_t width = static_cast<std::size_t>(lanes), real = std::min(width, count - first);
    for (std::size_t lane = 0; lane < width; ++lane)
      tile.set_features(lane, lanes, feature_vectors + (first + std::min(lane, real - 1)) * dimension_);
    tile.predict(*this, lanes, kappa, {sigma != nullptr, gradient != nullptr, gradient_sigma != nullptr});
    for (std::size_t lane = 0; lane < real; ++lane) {
      const std::size_t c = first + lane;
      if (mean != nullptr) mean[c] = tile.mean()[lane];
      if (sigma != nullptr) sigma[c] = tile.sigma()[lane];
      for (std::size_t d = 0; d < dimension_; ++d) {
        if (gradient != nullptr) gradient[c * dimension_ + d] = tile.gradient()[d * width + lane];
        if (gradient_sigma != nullptr) gradient_sigma[c * dimension_ + d] = tile.gradient_sigma()[d * width + lane];
      }
    }
    first += real;
  }
}

void Gpr::whitened(std::size_t count, const double* feature_vectors, double* out) const {
  require(n_ > 0, "a prediction needs data; call fit first");
  GprTile tile(*this);
  for (std::size_t c = 0; c < count; ++c) {
    tile.set_features(0, 1, feature_vectors + c * dimension_);
    tile.predict(*this, 1, 0.0, {true, false, false});
    std::copy_n(tile.solved(), rows_, out + c * rows_);
  }
}

}  // namespace thalweg
