// Twin of gpr.cpp for values. Matrices are row-major; vectors of candidates lie one after the other, (count, n). Work
// is cut into panels of kPanel rows: inside a panel a warp solves with one lane a row, between panels tiles of the
// factor go through shared memory.
#include <algorithm>
#include <cmath>

#include "device.cuh"

namespace thalweg::cuda {
namespace {

constexpr double kSmallestVariance = 1e-12, kSmallestPivot = 1e-15, kLargestJitter = 1e-6;  // as in gpr.cpp
constexpr int kPanel = 32;                                                                  // = kLanes
constexpr int kPad = kPanel + 1;  // rows of a tile lie on different banks
constexpr int kTile = 16;         // of outputs, for products and distances
constexpr int kPerWarp = 4;       // candidates of a warp in triangular solves

struct Terms {
  double amplitude, short_fraction, long_rate, short_rate;
  explicit Terms(const Kernel& k)
      : amplitude(k.amplitude * (k.weight_long + k.weight_short)),
        short_fraction(k.weight_short / (k.weight_long + k.weight_short)),
        long_rate(-0.5 / (k.length_long * k.length_long)),
        short_rate(-0.5 / (k.length_short * k.length_short)) {}
  /// k(d2) and -2 dk/d(d2).
  __device__ void at(double d2, double& k, double& slope) const {
    const double far = amplitude * (1.0 - short_fraction) * exp(long_rate * d2),
                 near = amplitude * short_fraction * exp(short_rate * d2);
    k = far + near;
    slope = -2.0 * (long_rate * far + short_rate * near);
  }
};

// k[c][i] (and slope) of candidates c and points i; on the diagonal of a Gram matrix `diagonal` is added and above it
// nothing is written. Blocks are kTile x kTile outputs; columns of features go through shared memory.
__global__ void __launch_bounds__(kTile* kTile)
    covariances(Terms terms, std::size_t dimension, std::size_t count, const double* candidates, std::size_t n,
                const double* points, bool lower, double diagonal, double* k_out, double* slope_out, std::size_t ld) {
  THALWEG_DYNAMIC_SHARED(double, tiles);  // 2 kTile (kTile + 1)
  double *of_candidates = tiles, *of_points = tiles + kTile * (kTile + 1);
  const unsigned column = threadIdx.x % kTile, line = threadIdx.x / kTile;
  const std::size_t c = std::size_t{blockIdx.y} * kTile + line, i = std::size_t{blockIdx.x} * kTile + column;
  const std::size_t row_of_point = std::size_t{blockIdx.x} * kTile + line;
  double d2 = 0;
  for (std::size_t first = 0; first < dimension; first += kTile) {
    const std::size_t d = first + column;
    of_candidates[line * (kTile + 1) + column] = c < count && d < dimension ? candidates[c * dimension + d] : 0.0;
    of_points[line * (kTile + 1) + column] =
        row_of_point < n && d < dimension ? points[row_of_point * dimension + d] : 0.0;
    __syncthreads();
    for (unsigned k = 0; k < kTile; ++k) {
      const double apart = of_candidates[line * (kTile + 1) + k] - of_points[column * (kTile + 1) + k];
      d2 += apart * apart;
    }
    __syncthreads();
  }
  if (c >= count || i >= n || (lower && i > c)) return;
  double k, slope;
  terms.at(d2, k, slope);
  k_out[c * ld + i] = lower && i == c ? k + diagonal : k;
  if (slope_out != nullptr) slope_out[c * ld + i] = slope;
}

// ---- Cholesky factor ------------------------------------------------------------------------------------------------

/// Diagonal block of the panel at `first`, by one warp, a lane a row. bad: set if a pivot is not above `smallest`.
__global__ void __launch_bounds__(kPanel)
    factor_panel(std::size_t n, std::size_t first, double* a, std::size_t ld, double smallest, std::int32_t* bad) {
  THALWEG_DYNAMIC_SHARED(double, tile);  // kPanel kPad
  const int lane = static_cast<int>(threadIdx.x), width = static_cast<int>(n - first < kPanel ? n - first : kPanel);
  for (int row = 0; row < width; ++row)
    tile[row * kPad + lane] = lane <= row ? a[(first + row) * ld + first + lane] : 0.0;
  __syncwarp();
  for (int k = 0; k < width; ++k) {
    double pivot = tile[k * kPad + k];
    if (!(pivot > smallest)) {
      if (lane == 0) *bad = 1;
      pivot = 1.0;  // the factor is of no use; nobody shall trip over NaN
    }
    const double root = sqrt(pivot);
    __syncwarp();
    if (lane == k) tile[k * kPad + k] = root;
    if (lane > k && lane < width) tile[lane * kPad + k] /= root;
    __syncwarp();
    if (lane > k && lane < width)
      for (int column = k + 1; column <= lane; ++column)
        tile[lane * kPad + column] -= tile[lane * kPad + k] * tile[column * kPad + k];
    __syncwarp();
  }
  for (int row = 0; row < width; ++row)
    if (lane <= row) a[(first + row) * ld + first + lane] = tile[row * kPad + lane];
}

/// Rows below the panel: x L^T = a, a thread a row.
__global__ void __launch_bounds__(kThreads) solve_panel(std::size_t n, std::size_t first, double* a, std::size_t ld) {
  THALWEG_DYNAMIC_SHARED(double, tile);  // kPanel kPad
  for (unsigned k = threadIdx.x; k < kPanel * kPanel; k += kThreads)
    tile[k / kPanel * kPad + k % kPanel] = a[(first + k / kPanel) * ld + first + k % kPanel];
  __syncthreads();
  const std::size_t row = first + kPanel + thread_index();
  if (row >= n) return;
  double x[kPanel];
  double* from = a + row * ld + first;
  for (int k = 0; k < kPanel; ++k) {
    double sum = from[k];
    for (int j = 0; j < k; ++j) sum -= x[j] * tile[k * kPad + j];
    x[k] = sum / tile[k * kPad + k];
  }
  for (int k = 0; k < kPanel; ++k) from[k] = x[k];
}

/// What is right of the panel: a -= p p^T, lower triangle. Blocks are kTile x kTile outputs.
__global__ void __launch_bounds__(kTile* kTile)
    update_rest(std::size_t n, std::size_t first, double* a, std::size_t ld) {
  THALWEG_DYNAMIC_SHARED(double, tiles);  // 2 kTile kPad
  if (blockIdx.x > blockIdx.y) return;
  double *of_rows = tiles, *of_columns = tiles + kTile * kPad;
  const unsigned column = threadIdx.x % kTile, line = threadIdx.x / kTile;
  const std::size_t rest = first + kPanel, row0 = rest + std::size_t{blockIdx.y} * kTile,
                    column0 = rest + std::size_t{blockIdx.x} * kTile;
  for (unsigned k = column; k < kPanel; k += kTile) {
    of_rows[line * kPad + k] = row0 + line < n ? a[(row0 + line) * ld + first + k] : 0.0;
    of_columns[line * kPad + k] = column0 + line < n ? a[(column0 + line) * ld + first + k] : 0.0;
  }
  __syncthreads();
  double sum = 0;
  for (unsigned k = 0; k < kPanel; ++k) sum += of_rows[line * kPad + k] * of_columns[column * kPad + k];
  if (row0 + line < n && column0 + column <= row0 + line) a[(row0 + line) * ld + column0 + column] -= sum;
}

// ---- triangular solves
// ------------------------------------------------------------------------------------------------

/// v <- L^-1 v (or L^-T v) for `count` vectors of n, kWarps kPerWarp of them a block; a lane holds a row of the panel.
template <bool transposed>
__global__ void __launch_bounds__(kThreads) solve_vectors(std::size_t n, const double* factor, std::size_t ld,
                                                          std::size_t count, double* vectors, std::size_t vector_ld) {
  THALWEG_DYNAMIC_SHARED(double, tile);  // kPanel kPad
  const int lane = static_cast<int>(lane_index());
  const std::size_t first_vector = (std::size_t{blockIdx.x} * kWarps + warp_index()) * kPerWarp;
  const std::size_t panels = (n + kPanel - 1) / kPanel;
  // tile[r][c] = L[rows + r][columns + c], zero outside
  const auto load = [&](std::size_t rows, std::size_t columns) {
    __syncthreads();
    for (unsigned k = threadIdx.x; k < kPanel * kPanel; k += kThreads) {
      const std::size_t row = rows + k / kPanel, column = columns + k % kPanel;
      tile[k / kPanel * kPad + k % kPanel] = row < n && column <= row ? factor[row * ld + column] : 0.0;
    }
    __syncthreads();
  };
  for (std::size_t step = 0; step < panels; ++step) {
    const std::size_t panel = transposed ? panels - 1 - step : step,
                      row = panel * kPanel + static_cast<std::size_t>(lane);
    double value[kPerWarp];
    for (int c = 0; c < kPerWarp; ++c)
      value[c] = first_vector + c < count && row < n ? vectors[(first_vector + c) * vector_ld + row] : 0.0;
    for (std::size_t before = 0; before < step; ++before) {  // what is solved already
      const std::size_t other = transposed ? panels - 1 - before : before;
      if (transposed)
        load(other * kPanel, panel * kPanel);
      else
        load(panel * kPanel, other * kPanel);
      for (int c = 0; c < kPerWarp; ++c) {
        const std::size_t at = other * kPanel + static_cast<std::size_t>(lane);
        const double solved = first_vector + c < count && at < n ? vectors[(first_vector + c) * vector_ld + at] : 0.0;
        for (int k = 0; k < kPanel; ++k)
          value[c] -= (transposed ? tile[k * kPad + lane] : tile[lane * kPad + k]) * __shfl_sync(kAllLanes, solved, k);
      }
    }
    load(panel * kPanel, panel * kPanel);
    const double pivot = row < n ? tile[lane * kPad + lane] : 1.0;
    for (int c = 0; c < kPerWarp; ++c) {
      for (int k = 0; k < kPanel; ++k) {
        const int at = transposed ? kPanel - 1 - k : k;
        if (lane == at) value[c] /= pivot;
        const double solved = __shfl_sync(kAllLanes, value[c], at);
        if (transposed ? lane < at : lane > at)
          value[c] -= (transposed ? tile[at * kPad + lane] : tile[lane * kPad + at]) * solved;
      }
      if (first_vector + c < count && row < n) vectors[(first_vector + c) * vector_ld + row] = value[c];
    }
  }
}

void solve_vectors_on(bool transposed, std::size_t n, const double* factor, std::size_t ld, std::size_t count,
                      double* vectors, std::size_t vector_ld, Stream stream) {
  const unsigned blocks = blocks_for(count, kWarps * kPerWarp);
  constexpr std::size_t shared_bytes = kPanel * kPad * sizeof(double);
  if (transposed)
    THALWEG_LAUNCH(solve_vectors<true>, blocks, kThreads, shared_bytes, native(stream), n, factor, ld, count, vectors,
                   vector_ld);
  else
    THALWEG_LAUNCH(solve_vectors<false>, blocks, kThreads, shared_bytes, native(stream), n, factor, ld, count, vectors,
                   vector_ld);
}

/// weights = L^-1 y - mean L^-1 1, to be solved with L^T.
__global__ void __launch_bounds__(kThreads)
    begin_weights(std::size_t n, const double* targets, const double* ones, double mean, double* weights) {
  const std::size_t i = thread_index();
  if (i < n) weights[i] = targets[i] - mean * ones[i];
}

/// The last row of the factor from row = L^-1 k (n), and the new elements of the solved right-hand sides.
__global__ void __launch_bounds__(kThreads) end_append(std::size_t n, double own, double target, double smallest,
                                                       double* row, double* targets, double* ones, std::int32_t* bad) {
  THALWEG_DYNAMIC_SHARED(double, scratch);  // kWarps
  double square = 0, along_targets = 0, along_ones = 0;
  for (std::size_t i = threadIdx.x; i < n; i += kThreads) {
    square += row[i] * row[i];
    along_targets += row[i] * targets[i];
    along_ones += row[i] * ones[i];
  }
  square = block_sum(square, scratch);
  along_targets = block_sum(along_targets, scratch);
  along_ones = block_sum(along_ones, scratch);
  if (threadIdx.x != 0) return;
  const double pivot = own - square;
  if (!(pivot > smallest)) {
    *bad = 1;
    return;
  }
  row[n] = sqrt(pivot);
  targets[n] = (target - along_targets) / row[n];
  ones[n] = (1.0 - along_ones) / row[n];
}

// ---- predictions
// ------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads)
    sum_mean(std::size_t n, const double* k, const double* weights, double mean, double* out) {
  THALWEG_DYNAMIC_SHARED(double, scratch);  // kWarps
  const double* row = k + std::size_t{blockIdx.x} * n;
  double sum = 0;
  for (std::size_t i = threadIdx.x; i < n; i += kThreads) sum += row[i] * weights[i];
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) out[blockIdx.x] = mean + sum;
}

/// inverse: 1 / sigma, 0 where sigma is at its floor.
__global__ void __launch_bounds__(kThreads)
    sum_sigma(std::size_t n, const double* solved, double amplitude, double* sigma, double* inverse) {
  THALWEG_DYNAMIC_SHARED(double, scratch);  // kWarps
  const double* row = solved + std::size_t{blockIdx.x} * n;
  double sum = 0;
  for (std::size_t i = threadIdx.x; i < n; i += kThreads) sum += row[i] * row[i];
  sum = block_sum(sum, scratch);
  if (threadIdx.x != 0) return;
  const double variance = amplitude - sum, floor = kSmallestVariance * amplitude;
  const double root = sqrt(variance > floor ? variance : floor);
  if (sigma != nullptr) sigma[blockIdx.x] = root;
  inverse[blockIdx.x] = variance > floor ? 1.0 / root : 0.0;
}

/// gradient[c][d] = sum_i slope_i (of_weights weights_i + of_solved u_i / sigma) (x_id - f_cd). A block a candidate.
__global__ void __launch_bounds__(kThreads)
    sum_gradient(std::size_t n, std::size_t dimension, const double* candidates, const double* points,
                 const double* slope, const double* weights, double of_weights, const double* solved, double of_solved,
                 const double* inverse_sigma, double* gradient) {
  const std::size_t c = blockIdx.x;
  const double factor = solved != nullptr ? of_solved * inverse_sigma[c] : 0.0;
  for (std::size_t d = threadIdx.x; d < dimension; d += kThreads) {
    const double f = candidates[c * dimension + d];
    double sum = 0;
    for (std::size_t i = 0; i < n; ++i) {
      double weight = of_weights * weights[i];
      if (solved != nullptr) weight += factor * solved[c * n + i];
      sum += slope[c * n + i] * weight * (points[i * dimension + d] - f);
    }
    gradient[c * dimension + d] = sum;
  }
}

dim3 tiles(std::size_t columns, std::size_t lines) {
  return dim3(blocks_for(columns, kTile), blocks_for(lines, kTile));
}

void covariances_on(const Kernel& kernel, std::size_t dimension, std::size_t count, const double* candidates,
                    std::size_t n, const double* points, bool lower, double diagonal, double* k, double* slope,
                    std::size_t ld, Stream stream) {
  // A grid has at most 65535 lines of blocks.
  constexpr std::size_t most = std::size_t{65535} * kTile;
  for (std::size_t first = 0; first < count; first += most)
    THALWEG_LAUNCH(covariances, tiles(n, std::min(most, count - first)), kTile * kTile,
                   2 * kTile * (kTile + 1) * sizeof(double), native(stream), Terms(kernel), dimension,
                   std::min(most, count - first), candidates + first * dimension, n, points, lower, diagonal,
                   k + first * ld, slope != nullptr ? slope + first * ld : nullptr, ld);
}

}  // namespace

void gram(const Kernel& kernel, std::size_t n, std::size_t features, const double* feature_vectors, double jitter,
          double* out, Stream stream) {
  covariances_on(kernel, features, n, feature_vectors, n, feature_vectors, true, kernel.noise + jitter, out, nullptr, n,
                 stream);
  check_launch("a Gram matrix");
}

Gpr::Gpr(std::size_t features, const Kernel& kernel) : kernel_(kernel), dimension_(features) {
  thalweg::Gpr(features, kernel);  // refuses what the CPU refuses
  cuda::require();
}

void Gpr::reserve(std::size_t points, Stream stream) {
  if (points <= capacity_) return;
  const std::size_t room = (points + points / 4 + kPanel) / kPanel * kPanel;
  Array<double> features(room * dimension_), factor(room * room), solved(2 * room);
  if (n_ > 0) {
    copy_on_device(features.data(), features_.data(), n_ * dimension_ * sizeof(double), stream);
    for (std::size_t row = 0; row < n_; ++row)
      copy_on_device(factor.data() + row * room, factor_.data() + row * capacity_, (row + 1) * sizeof(double), stream);
    for (std::size_t k = 0; k < 2; ++k)
      copy_on_device(solved.data() + k * room, solved_.data() + k * capacity_, n_ * sizeof(double), stream);
    copy_to_host(nullptr, nullptr, 0, stream);  // the old arrays go
  }
  features_ = std::move(features);
  factor_ = std::move(factor);
  solved_ = std::move(solved);
  weights_ = Array<double>(room);
  capacity_ = room;
}

void Gpr::fit(std::size_t n, const double* feature_vectors, std::span<const double> targets, Stream stream) {
  if (n == 0 || targets.size() != n)
    throw Error("targets must hold " + std::to_string(n) + " values (at least one), but they hold " +
                std::to_string(targets.size()));
  for (const double target : targets)
    if (!std::isfinite(target)) throw Error("targets must be finite; leave failed structures out");
  n_ = 0;
  reserve(n, stream);
  copy_on_device(features_.data(), feature_vectors, n * dimension_ * sizeof(double), stream);
  targets_.assign(targets.begin(), targets.end());
  n_ = n;
  factorise(0.0, stream);
}

void Gpr::factorise(double jitter, Stream stream) {
  const double total = kernel_.amplitude * (kernel_.weight_long + kernel_.weight_short);
  Array<std::int32_t> flag(1);
  for (;;) {
    covariances_on(kernel_, dimension_, n_, features_.data(), n_, features_.data(), true, kernel_.noise + jitter,
                   factor_.data(), nullptr, capacity_, stream);
    fill_bytes(flag.data(), 0, sizeof(std::int32_t), stream);
    for (std::size_t first = 0; first < n_; first += kPanel) {
      THALWEG_LAUNCH(factor_panel, 1u, kPanel, kPanel * kPad * sizeof(double), native(stream), n_, first,
                     factor_.data(), capacity_, kSmallestPivot * total, flag.data());
      if (first + kPanel >= n_) break;
      const std::size_t rest = n_ - first - kPanel;
      THALWEG_LAUNCH(solve_panel, blocks_for(rest), kThreads, kPanel * kPad * sizeof(double), native(stream), n_, first,
                     factor_.data(), capacity_);
      THALWEG_LAUNCH(update_rest, tiles(rest, rest), kTile * kTile, 2 * kTile * kPad * sizeof(double), native(stream),
                     n_, first, factor_.data(), capacity_);
    }
    check_launch("a Cholesky factor");
    std::int32_t bad = 0;
    copy_to_host(&bad, flag.data(), sizeof(bad), stream);
    if (bad == 0) break;
    jitter = jitter == 0 ? 1e-12 * total : 10 * jitter;
    if (!(jitter <= 1.001 * kLargestJitter * total))
      throw Error("the kernel matrix of " + std::to_string(n_) +
                  " rows is not positive definite even with 1e-6 amplitude added to its diagonal (or a feature is not "
                  "finite); raise the noise or shorten the lengths");
  }
  jitter_ = jitter;
  const std::vector<double> ones(n_, 1.0);
  copy_to_device(solved_.data(), targets_.data(), n_ * sizeof(double), stream);
  copy_to_device(solved_.data() + capacity_, ones.data(), n_ * sizeof(double), stream);
  solve_vectors_on(false, n_, factor_.data(), capacity_, 2, solved_.data(), capacity_, stream);
  solve(stream);
}

void Gpr::solve(Stream stream) {
  double sum = 0;
  for (const double target : targets_) sum += target;
  mean_ = sum / static_cast<double>(n_);
  THALWEG_LAUNCH(begin_weights, blocks_for(n_), kThreads, 0, native(stream), n_, solved_.data(),
                 solved_.data() + capacity_, mean_, weights_.data());
  solve_vectors_on(true, n_, factor_.data(), capacity_, 1, weights_.data(), capacity_, stream);
  check_launch("the weights of a GP");
  copy_to_host(nullptr, nullptr, 0, stream);  // copies from the host are done
}

void Gpr::append(const double* feature, double target, Stream stream) {
  if (!std::isfinite(target)) throw Error("targets must be finite; leave failed structures out");
  if (n_ == 0) return fit(1, feature, {&target, 1}, stream);
  const double total = kernel_.amplitude * (kernel_.weight_long + kernel_.weight_short);
  reserve(n_ + 1, stream);
  copy_on_device(features_.data() + n_ * dimension_, feature, dimension_ * sizeof(double), stream);
  double* row = factor_.data() + n_ * capacity_;
  covariances_on(kernel_, dimension_, 1, feature, n_, features_.data(), false, 0.0, row, nullptr, capacity_, stream);
  solve_vectors_on(false, n_, factor_.data(), capacity_, 1, row, capacity_, stream);
  Array<std::int32_t> flag(1);
  fill_bytes(flag.data(), 0, sizeof(std::int32_t), stream);
  THALWEG_LAUNCH(end_append, 1u, kThreads, kWarps * sizeof(double), native(stream), n_, total + kernel_.noise + jitter_,
                 target, kSmallestPivot * total, row, solved_.data(), solved_.data() + capacity_, flag.data());
  check_launch("appending to a GP");
  std::int32_t bad = 0;
  copy_to_host(&bad, flag.data(), sizeof(bad), stream);
  targets_.push_back(target);
  ++n_;
  if (bad != 0) return factorise(jitter_, stream);
  solve(stream);
}

void Gpr::predict(std::size_t count, const double* feature_vectors, double kappa, double* mean, double* sigma,
                  double* gradient, double* gradient_sigma, Stream stream) const {
  if (n_ == 0) throw Error("a prediction needs data; call fit first");
  if (count == 0) return;
  const bool solves = sigma != nullptr || gradient_sigma != nullptr || (gradient != nullptr && kappa != 0);
  const bool slopes = gradient != nullptr || gradient_sigma != nullptr;
  Array<double> k(count * n_), slope(slopes ? count * n_ : 0), inverse(solves ? count : 0);
  covariances_on(kernel_, dimension_, count, feature_vectors, n_, features_.data(), false, 0.0, k.data(), slope.data(),
                 n_, stream);
  const unsigned blocks = static_cast<unsigned>(count);
  constexpr std::size_t shared_bytes = kWarps * sizeof(double);
  if (mean != nullptr)
    THALWEG_LAUNCH(sum_mean, blocks, kThreads, shared_bytes, native(stream), n_, k.data(), weights_.data(), mean_,
                   mean);
  if (solves) {
    const double total = kernel_.amplitude * (kernel_.weight_long + kernel_.weight_short);
    solve_vectors_on(false, n_, factor_.data(), capacity_, count, k.data(), n_, stream);
    THALWEG_LAUNCH(sum_sigma, blocks, kThreads, shared_bytes, native(stream), n_, k.data(), total, sigma,
                   inverse.data());
    if (slopes) solve_vectors_on(true, n_, factor_.data(), capacity_, count, k.data(), n_, stream);
  }
  const double* solved = solves ? k.data() : nullptr;
  // dk_i/df = slope_i (x_i - f), so d sigma/df = -1/sigma sum_i u_i dk_i/df with u = (K + noise)^-1 k.
  if (gradient != nullptr)
    THALWEG_LAUNCH(sum_gradient, blocks, kThreads, 0, native(stream), n_, dimension_, feature_vectors, features_.data(),
                   slope.data(), weights_.data(), 1.0, kappa != 0 ? solved : nullptr, kappa, inverse.data(), gradient);
  if (gradient_sigma != nullptr)
    THALWEG_LAUNCH(sum_gradient, blocks, kThreads, 0, native(stream), n_, dimension_, feature_vectors, features_.data(),
                   slope.data(), weights_.data(), 0.0, solved, -1.0, inverse.data(), gradient_sigma);
  check_launch("a prediction");
  copy_to_host(nullptr, nullptr, 0, stream);  // scratch is freed
}

}  // namespace thalweg::cuda
