// Dense algebra of the Gaussian process, our own instead of BLAS: the same bits for any number of threads and in any
// installation. Private to the core; plain structs and pointers only (this header is read by per-ISA units).
//
//   matrices      row-major, leading dimension `ld` >= columns; of a triangular matrix only its triangle is read
//   tiles         `lanes` (8, 4 or 1) candidates side by side, element i of candidate c at [i * lanes + c]. Every lane
//                 does the same operations in the same order whatever the width, so a candidate's result does not
//                 depend on its neighbours.
#pragma once

#include <cstddef>
#include <cstdint>

namespace thalweg {

/// C (m, n) += scale A (m, k) B (k, n); element (i, l) of A at a[i * a_row + l * a_column], likewise B.
/// Shapes: a triangular factor's other triangle is neither read nor multiplied. lower_result: only elements of C on or
/// below the diagonal are touched (m = n).
struct Product {
  enum Shape : int { full, lower, upper };
  std::size_t m = 0, n = 0, k = 0;
  double scale = 1;
  const double* a = nullptr;
  std::ptrdiff_t a_row = 0, a_column = 1;
  Shape a_shape = full;
  const double* b = nullptr;
  std::ptrdiff_t b_row = 0, b_column = 1;
  Shape b_shape = full;
  double* c = nullptr;
  std::size_t c_row = 0;
  bool lower_result = false;
  std::size_t row_begin = 0, row_end = 0;  // rows of C that this call owns: how threads share one product
};

/// k(d2) = amplitude [(1 - short_fraction) exp(long_rate d2) + short_fraction exp(short_rate d2)],
/// rates = -1 / (2 length^2).
struct KernelTerms {
  double amplitude, short_fraction, long_rate, short_rate;
};

/// The kernels of one tile width.
struct TileKernels {
  /// out[i][lane] = |x_i - f_lane|^2 with x (n, dimension), f [dimension][lanes]. By differences: exact zero for equal
  /// points, symmetric, and free of the cancellation of |x|^2 + |f|^2 - 2 x.f.
  void (*squared_distances)(std::size_t n, std::size_t dimension, const double* x, const double* f, double* out);
  /// In place d2 -> k(d2), and slope = -2 dk/d(d2), mean[lane] += sum_i weights_i k_i. slope may be null.
  void (*evaluate)(std::size_t n, const KernelTerms& terms, const double* weights, double* k, double* slope,
                   double* mean);
  /// v <- L^-1 v, and norm[lane] = |v|^2.
  void (*forward)(std::size_t n, const double* factor, std::size_t ld, double* v, double* norm);
  /// v <- L^-T v.
  void (*backward)(std::size_t n, const double* factor, std::size_t ld, double* v);
  /// out[i][lane] = slope[i][lane] (weights_i + coefficient[lane] u[i][lane]); weights or u may be null (zero).
  void (*combine)(std::size_t n, const double* weights, const double* coefficient, const double* u, const double* slope,
                  double* out);
  /// out[d][lane] += sum_i g[i][lane] (x_id - f[d][lane]).
  void (*gradient)(std::size_t n, std::size_t dimension, const double* x, const double* f, const double* g,
                   double* out);
  /// out[i][lane] = x_i . f_lane.
  void (*products)(std::size_t n, std::size_t dimension, const double* x, const double* f, double* out);
};

struct LinalgKernels {
  void (*multiply)(const Product& product, double* workspace);
  std::size_t multiply_workspace;  // doubles
  /// Lower Cholesky factor in place, small n. Returns n, or the first column whose pivot is not above `smallest`.
  std::size_t (*cholesky_block)(std::size_t n, double* a, std::size_t ld, double smallest);
  /// x (m, n) <- x L^-T, small n.
  void (*solve_rows_block)(std::size_t m, std::size_t n, const double* factor, std::size_t ld, double* x,
                           std::size_t x_row, double* workspace);
  /// In place inverse of a lower triangle, small n.
  void (*invert_block)(std::size_t n, double* a, std::size_t ld);
  /// One right-hand side: v <- L^-1 v from element `first` on (those before are already solved); v <- L^-T v.
  void (*forward_one)(std::size_t n, std::size_t first, const double* factor, std::size_t ld, double* v);
  void (*backward_one)(std::size_t n, const double* factor, std::size_t ld, double* v);
  /// y = exp(x), x <= 709; below -708 the result is 0.
  void (*exponential)(std::size_t n, const double* x, double* y);
  /// out_j = k(d2_j).
  void (*kernel_row)(std::size_t n, const KernelTerms& terms, const double* d2, double* out);
  /// k_j = k(d2_j), slope_j = -2 dk/d(d2) and bend_j = 4 d^2 k/d(d2)^2 there.
  void (*kernel_derivatives)(std::size_t n, const KernelTerms& terms, const double* d2, double* k, double* slope,
                             double* bend);
  /// Adds to sums[0..3] the sums over j of q_j e_long, q_j e_short, q_j e_long d2_j, q_j e_short d2_j, where
  /// q_j = weight_i weights_j - inverse_j.
  void (*likelihood_row)(std::size_t n, const KernelTerms& terms, const double* d2, double weight_i,
                         const double* weights, const double* inverse, double* sums);
  /// Row `row` leaves the factor: rotations that turn [L33 x] into a lower triangle again (x = the column that `row`
  /// left behind). Rows row + 1 .. n - 1 move up by one, columns beyond `row` move left. `extra` (two vectors of n, as
  /// two more rows of L: forward-solved right-hand sides) are treated alike. workspace: 2 n doubles.
  void (*remove_row)(std::size_t n, std::size_t row, double* factor, std::size_t ld, double* const extra[2],
                     double* workspace);
  TileKernels tile8, tile4, tile1;
};

const LinalgKernels& linalg_kernels();  // of the instruction set in use

/// Blocked drivers (linalg.cpp).
namespace linalg {

/// c += scale a b with any number of threads, same bits.
void multiply(Product product, int threads = 1);
/// In place; false if a pivot is not above `smallest`.
bool cholesky(std::size_t n, double* a, std::size_t ld, double smallest, int threads = 1);
/// In place inverse of a lower triangle. scratch: at least n * n / 4 + n doubles.
void invert_lower(std::size_t n, double* a, std::size_t ld, double* scratch);
/// out (lower triangle) = (L L^T)^-1 from the factor; the factor is overwritten with its inverse. scratch as above.
void inverse_from_factor(std::size_t n, double* factor, std::size_t ld, double* out, std::size_t out_ld,
                         double* scratch);
/// packed[i (i + 1) / 2 + j] = |x_i - x_j|^2, j <= i, of x (n, dimension).
void pair_distances(std::size_t n, std::size_t dimension, const double* x, double* packed, int threads = 1);
/// Lower triangle of k(d2) + noise on the diagonal.
void gram(std::size_t n, const KernelTerms& terms, double noise, const double* packed, double* out, std::size_t ld);
/// Leading dimension >= n that keeps rows on different cache sets.
std::size_t leading_dimension(std::size_t n);

}  // namespace linalg
}  // namespace thalweg
