#include "linalg.hpp"

#include <algorithm>
#include <vector>

#include "isa.hpp"

namespace thalweg {

THALWEG_DISPATCH(LinalgKernels, linalg_table)

const LinalgKernels& linalg_kernels() { return linalg_table(); }

namespace linalg {
namespace {

constexpr std::size_t kSmall = 32;     // order below which the recursions hand over to the unblocked kernels
constexpr double kWorthThreads = 2e7;  // multiply-adds: about a millisecond

// Half of n, in whole small blocks.
std::size_t first_half(std::size_t n) { return (n / 2 + kSmall - 1) / kSmall * kSmall; }

// x (m, n) <- x L^-T.
void solve_rows(std::size_t m, std::size_t n, const double* factor, std::size_t ld, double* x, std::size_t x_row,
                int threads) {
  if (n <= 2 * kSmall) {
    const LinalgKernels& kernels = linalg_kernels();
    double workspace[2 * kSmall * 8];
    kernels.solve_rows_block(m, n, factor, ld, x, x_row, workspace);
    return;
  }
  const std::size_t half = first_half(n);
  solve_rows(m, half, factor, ld, x, x_row, threads);
  Product update;  // X2 -= X1 L21^T
  update.m = m, update.n = n - half, update.k = half, update.scale = -1;
  update.a = x, update.a_row = static_cast<std::ptrdiff_t>(x_row);
  update.b = factor + half * ld, update.b_row = 1, update.b_column = static_cast<std::ptrdiff_t>(ld);
  update.c = x + half, update.c_row = x_row;
  multiply(update, threads);
  solve_rows(m, n - half, factor + half * ld + half, ld, x + half, x_row, threads);
}

}  // namespace

void multiply(Product product, int threads) {
  const LinalgKernels& kernels = linalg_kernels();
  const std::size_t size = kernels.multiply_workspace;
  product.row_begin = 0;
  product.row_end = product.m;
  // Threads own whole rows of C, and a row's sums do not depend on who owns it.
  const double work = static_cast<double>(product.m) * static_cast<double>(product.n) * static_cast<double>(product.k);
  if (threads > 1 && work > kWorthThreads) {
    const int parts = 4 * threads;  // a lower result makes the last rows the longest
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int part = parts - 1; part >= 0; --part) {
      thread_local std::vector<double> workspace;
      workspace.resize(size);
      Product share = product;
      share.row_begin = product.m * static_cast<std::size_t>(part) / static_cast<std::size_t>(parts);
      share.row_end = product.m * static_cast<std::size_t>(part + 1) / static_cast<std::size_t>(parts);
      kernels.multiply(share, workspace.data());
    }
    return;
  }
  thread_local std::vector<double> workspace;
  if (workspace.size() < size) workspace.resize(size);
  kernels.multiply(product, workspace.data());
}

bool cholesky(std::size_t n, double* a, std::size_t ld, double smallest, int threads) {
  if (n <= 2 * kSmall) return linalg_kernels().cholesky_block(n, a, ld, smallest) == n;
  const std::size_t half = first_half(n);
  if (!cholesky(half, a, ld, smallest, threads)) return false;
  double* below = a + half * ld;
  solve_rows(n - half, half, a, ld, below, ld, threads);
  Product update;  // A22 -= L21 L21^T
  update.m = update.n = n - half, update.k = half, update.scale = -1;
  update.a = below, update.a_row = static_cast<std::ptrdiff_t>(ld);
  update.b = below, update.b_row = 1, update.b_column = static_cast<std::ptrdiff_t>(ld);
  update.c = below + half, update.c_row = ld;
  update.lower_result = true;
  multiply(update, threads);
  return cholesky(n - half, below + half, ld, smallest, threads);
}

void invert_lower(std::size_t n, double* a, std::size_t ld, double* scratch) {
  if (n <= 2 * kSmall) return linalg_kernels().invert_block(n, a, ld);
  const std::size_t half = first_half(n), rest = n - half;
  double *below = a + half * ld, *corner = below + half;
  invert_lower(half, a, ld, scratch);
  invert_lower(rest, corner, ld, scratch);
  // W21 = -W22 (L21 W11)
  std::fill(scratch, scratch + rest * half, 0.0);
  Product right;
  right.m = rest, right.n = right.k = half;
  right.a = below, right.a_row = static_cast<std::ptrdiff_t>(ld);
  right.b = a, right.b_row = static_cast<std::ptrdiff_t>(ld), right.b_shape = Product::lower;
  right.c = scratch, right.c_row = half;
  multiply(right);
  for (std::size_t i = 0; i < rest; ++i) std::fill(below + i * ld, below + i * ld + half, 0.0);
  Product left;
  left.m = left.k = rest, left.n = half, left.scale = -1;
  left.a = corner, left.a_row = static_cast<std::ptrdiff_t>(ld), left.a_shape = Product::lower;
  left.b = scratch, left.b_row = static_cast<std::ptrdiff_t>(half);
  left.c = below, left.c_row = ld;
  multiply(left);
}

void inverse_from_factor(std::size_t n, double* factor, std::size_t ld, double* out, std::size_t out_ld,
                         double* scratch) {
  invert_lower(n, factor, ld, scratch);
  for (std::size_t i = 0; i < n; ++i) std::fill(out + i * out_ld, out + i * out_ld + i + 1, 0.0);
  Product square;  // W^T W
  square.m = square.n = square.k = n;
  square.a = factor, square.a_row = 1, square.a_column = static_cast<std::ptrdiff_t>(ld);
  square.a_shape = Product::upper;
  square.b = factor, square.b_row = static_cast<std::ptrdiff_t>(ld), square.b_shape = Product::lower;
  square.c = out, square.c_row = out_ld;
  square.lower_result = true;
  multiply(square);
}

void pair_distances(std::size_t n, std::size_t dimension, const double* x, double* packed, int threads) {
  const LinalgKernels& kernels = linalg_kernels();
  const std::ptrdiff_t blocks = static_cast<std::ptrdiff_t>((n + 7) / 8);
  const auto block = [&](std::size_t first, std::vector<double>& points, std::vector<double>& out) {
    const std::size_t count = std::min<std::size_t>(8, n - first);
    points.resize(8 * dimension);
    out.resize(8 * n);
    for (std::size_t lane = 0; lane < 8; ++lane) {
      const double* row = x + (first + std::min(lane, count - 1)) * dimension;
      for (std::size_t d = 0; d < dimension; ++d) points[8 * d + lane] = row[d];
    }
    kernels.tile8.squared_distances(n - first, dimension, x + first * dimension, points.data(), out.data());
    for (std::size_t i = first; i < n; ++i)
      std::copy_n(&out[8 * (i - first)], std::min(count, i - first + 1), packed + i * (i + 1) / 2 + first);
  };
  const double work = 0.5 * static_cast<double>(n) * static_cast<double>(n) * static_cast<double>(dimension);
#pragma omp parallel num_threads(threads) if (threads > 1 && work > kWorthThreads)
  {
    std::vector<double> points, out;
#pragma omp for schedule(dynamic, 1)
    for (std::ptrdiff_t b = 0; b < blocks; ++b) block(8 * static_cast<std::size_t>(b), points, out);
  }
}

void gram(std::size_t n, const KernelTerms& terms, double noise, const double* packed, double* out, std::size_t ld) {
  const LinalgKernels& kernels = linalg_kernels();
  for (std::size_t i = 0; i < n; ++i) {
    kernels.kernel_row(i + 1, terms, packed + i * (i + 1) / 2, out + i * ld);
    out[i * ld + i] += noise;
  }
}

std::size_t leading_dimension(std::size_t n) {
  const std::size_t lines = (n + 7) / 8;
  return 8 * (lines + (lines % 2 == 0));  // an odd number of cache lines
}

}  // namespace linalg
}  // namespace thalweg
