// Hot loops of the dense algebra; compiled once per instruction set (see isa.hpp for the rule of these units).
//
// Every accumulation below is a chain of single multiply-adds (acc + a * b, never a * b + c * d), so that the compiler
// has one way only to contract it and a lane's bits do not depend on the width of the tile.
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "linalg.hpp"

namespace thalweg::THALWEG_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 8;
constexpr int kTileRows = 8;  // rows of a matrix handled at once: enough chains to hide the latency
constexpr int kMicroRows = 8, kMicroVectors = 3;
#elif defined(__AVX__)
constexpr int kWidth = 4;
constexpr int kTileRows = 4;
constexpr int kMicroRows = 6, kMicroVectors = 2;
#else
constexpr int kWidth = 2;
constexpr int kTileRows = 2;
constexpr int kMicroRows = 4, kMicroVectors = 2;
#endif

template <int width>
struct Vector {
  typedef double Type __attribute__((vector_size(width * sizeof(double))));
  typedef double Unaligned __attribute__((vector_size(width * sizeof(double)), aligned(8), may_alias));
  typedef std::int64_t Integer __attribute__((vector_size(width * sizeof(double))));
  static inline __attribute__((always_inline)) Type load(const double* p) {
    return *reinterpret_cast<const Unaligned*>(p);
  }
  static inline __attribute__((always_inline)) void store(double* p, Type v) { *reinterpret_cast<Unaligned*>(p) = v; }
  // x - 0 is x for every x (x + 0 is not: it would cost an addition).
  static inline __attribute__((always_inline)) Type broadcast(double x) { return x - Type{}; }
};
using Native = Vector<kWidth>;
using NativeType = Native::Type;

#define THALWEG_INLINE static inline __attribute__((always_inline))

// acc + a b of scalars, rounded as the vector code rounds it. Needed in loops over one accumulator: the compiler would
// multiply whole vectors and add their elements in order, which rounds twice.
THALWEG_INLINE double multiply_add(double acc, double a, double b) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fma(a, b, acc);
#else
  return acc + a * b;
#endif
}

// ---- exp ------------------------------------------------------------------------------------------------
// x = n ln 2 + r, |r| <= ln 2 / 2; exp(r) by its Taylor polynomial of degree 13 (remainder 4e-18), below 1.5 ulp.
template <int width>
THALWEG_INLINE typename Vector<width>::Type exponential(typename Vector<width>::Type x) {
  using V = Vector<width>;
  using T = typename V::Type;
  using I = typename V::Integer;
  const T shift = V::broadcast(6755399441055744.0);  // 1.5 * 2^52: adding it rounds to an integer in the low bits
  const T low = V::broadcast(-708.0);
  const I underflow = x < low;
  x = underflow ? low : x;
  const T shifted = x * 1.4426950408889634 + shift;
  const T n = shifted - shift;
  T r = x - n * 0x1.62e42fefa3800p-1;
  r = r - n * 0x1.ef35793c76730p-45;
  T p = V::broadcast(1.0 / 6227020800.0);
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  const T square = r * r;
  p = p * square + r;
  p = p + 1.0;
  const I bits = reinterpret_cast<I>(p) + (reinterpret_cast<I>(shifted) << 52);
  return underflow ? V::broadcast(0.0) : reinterpret_cast<T>(bits);
}

template <class Body>
THALWEG_INLINE void by_vectors(std::size_t n, Body body) {
  std::size_t j = 0;
  for (; j + kWidth <= n; j += kWidth) body(j, static_cast<std::size_t>(kWidth));
  if (j < n) body(j, n - j);
}

// Loads and stores of the last, partly filled vector of a row; a missing element reads as 0.
THALWEG_INLINE NativeType load_part(const double* p, std::size_t count) {
  if (count == kWidth) return Native::load(p);
  double buffer[kWidth] = {};
  for (std::size_t k = 0; k < count; ++k) buffer[k] = p[k];
  return Native::load(buffer);
}
THALWEG_INLINE void store_part(double* p, NativeType v, std::size_t count) {
  if (count == kWidth) return Native::store(p, v);
  double buffer[kWidth];
  Native::store(buffer, v);
  for (std::size_t k = 0; k < count; ++k) p[k] = buffer[k];
}

void exponential_row(std::size_t n, const double* x, double* y) {
  by_vectors(n, [=](std::size_t j, std::size_t count) {
    store_part(y + j, exponential<kWidth>(load_part(x + j, count)), count);
  });
}

void kernel_row(std::size_t n, const KernelTerms& terms, const double* d2, double* out) {
  const KernelTerms t = terms;
  by_vectors(n, [=](std::size_t j, std::size_t count) {
    const NativeType d = load_part(d2 + j, count);
    const NativeType e_long = exponential<kWidth>(d * t.long_rate), e_short = exponential<kWidth>(d * t.short_rate);
    store_part(out + j, ((e_short - e_long) * t.short_fraction + e_long) * t.amplitude, count);
  });
}

void kernel_derivatives(std::size_t n, const KernelTerms& terms, const double* d2, double* k, double* slope,
                        double* bend) {
  const KernelTerms t = terms;
  const double rho_long = -2 * t.long_rate, rho_short = -2 * t.short_rate;
  const double long_slope = rho_long * (1 - t.short_fraction), short_slope = rho_short * t.short_fraction;
  const double long_bend = rho_long * long_slope, short_bend = rho_short * short_slope;
  const double slope_scale = t.amplitude * (long_slope + short_slope),
               slope_fraction = short_slope / (long_slope + short_slope);
  const double bend_scale = t.amplitude * (long_bend + short_bend),
               bend_fraction = short_bend / (long_bend + short_bend);
  by_vectors(n, [=](std::size_t j, std::size_t count) {
    const NativeType d = load_part(d2 + j, count);
    const NativeType e_long = exponential<kWidth>(d * t.long_rate), e_short = exponential<kWidth>(d * t.short_rate);
    const NativeType difference = e_short - e_long;
    store_part(k + j, (difference * t.short_fraction + e_long) * t.amplitude, count);
    store_part(slope + j, (difference * slope_fraction + e_long) * slope_scale, count);
    store_part(bend + j, (difference * bend_fraction + e_long) * bend_scale, count);
  });
}

void likelihood_row(std::size_t n, const KernelTerms& terms, const double* d2, double weight_i, const double* weights,
                    const double* inverse, double* sums) {
  const KernelTerms t = terms;
  NativeType s0{}, s1{}, s2{}, s3{};
  by_vectors(n, [&](std::size_t j, std::size_t count) {
    const NativeType d = load_part(d2 + j, count);
    const NativeType q = load_part(weights + j, count) * weight_i - load_part(inverse + j, count);
    const NativeType q_long = q * exponential<kWidth>(d * t.long_rate);
    const NativeType q_short = q * exponential<kWidth>(d * t.short_rate);
    s0 += q_long;
    s1 += q_short;
    s2 += q_long * d;
    s3 += q_short * d;
  });
  for (int k = 0; k < kWidth; ++k) {
    sums[0] += s0[k];
    sums[1] += s1[k];
    sums[2] += s2[k];
    sums[3] += s3[k];
  }
}

// ---- matrix product: packed panels, register block of kMicroRows x (kMicroVectors * kWidth) ----------------
constexpr int kMicroColumns = kMicroVectors * kWidth;
constexpr std::size_t kBlockK = 256, kBlockM = 16 * kMicroRows, kBlockN = 128 * kMicroColumns;

THALWEG_INLINE std::size_t smaller(std::size_t a, std::size_t b) { return a < b ? a : b; }
THALWEG_INLINE std::size_t larger(std::size_t a, std::size_t b) { return a > b ? a : b; }

// Panel of `height` (of kMicroRows) rows: [l][row]; what lies in the other triangle, or beyond the height, is zero.
void pack_a(const Product& p, std::size_t row, std::size_t height, std::size_t k_begin, std::size_t k_count,
            double* out) {
  const double* a =
      p.a + static_cast<std::ptrdiff_t>(row) * p.a_row + static_cast<std::ptrdiff_t>(k_begin) * p.a_column;
  if (height == kMicroRows && p.a_shape == Product::full) {
    for (std::size_t l = 0; l < k_count; ++l, out += kMicroRows)
      for (int r = 0; r < kMicroRows; ++r) out[r] = a[r * p.a_row + static_cast<std::ptrdiff_t>(l) * p.a_column];
    return;
  }
  for (std::size_t l = 0; l < k_count; ++l, out += kMicroRows)
    for (std::size_t r = 0; r < kMicroRows; ++r) {
      const std::size_t i = row + r, column = k_begin + l;
      const bool present =
          r < height && !(p.a_shape == Product::lower && column > i) && !(p.a_shape == Product::upper && column < i);
      out[r] =
          present ? a[static_cast<std::ptrdiff_t>(r) * p.a_row + static_cast<std::ptrdiff_t>(l) * p.a_column] : 0.0;
    }
}

void pack_b(const Product& p, std::size_t column, std::size_t width, std::size_t k_begin, std::size_t k_count,
            double* out) {
  const double* b =
      p.b + static_cast<std::ptrdiff_t>(k_begin) * p.b_row + static_cast<std::ptrdiff_t>(column) * p.b_column;
  if (width == kMicroColumns && p.b_shape == Product::full) {
    if (p.b_column == 1) {
      for (std::size_t l = 0; l < k_count; ++l, out += kMicroColumns, b += p.b_row)
        for (int c = 0; c < kMicroColumns; ++c) out[c] = b[c];
    } else {
      for (std::size_t l = 0; l < k_count; ++l, out += kMicroColumns, b += p.b_row)
        for (int c = 0; c < kMicroColumns; ++c) out[c] = b[c * p.b_column];
    }
    return;
  }
  for (std::size_t l = 0; l < k_count; ++l, out += kMicroColumns)
    for (std::size_t c = 0; c < kMicroColumns; ++c) {
      const std::size_t i = k_begin + l, j = column + c;
      const bool present =
          c < width && !(p.b_shape == Product::lower && j > i) && !(p.b_shape == Product::upper && j < i);
      out[c] =
          present ? b[static_cast<std::ptrdiff_t>(l) * p.b_row + static_cast<std::ptrdiff_t>(c) * p.b_column] : 0.0;
    }
}

// c (height, width) += scale * a b over k_count; `diagonal`: last column to write in row r is diagonal + r.
void micro_kernel(std::size_t k_count, double scale, const double* __restrict a, const double* __restrict b,
                  double* __restrict c, std::size_t c_row, std::size_t height, std::size_t width,
                  std::ptrdiff_t diagonal) {
  NativeType acc[kMicroRows][kMicroVectors] = {};
#pragma GCC unroll 4
  for (std::size_t l = 0; l < k_count; ++l) {
    NativeType bv[kMicroVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kMicroVectors; ++v) bv[v] = Native::load(b + v * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kMicroRows; ++r) {
      const NativeType ar = Native::broadcast(a[r]);
#pragma GCC unroll 4
      for (int v = 0; v < kMicroVectors; ++v) acc[r][v] += ar * bv[v];
    }
    a += kMicroRows;
    b += kMicroColumns;
  }
  if (height == kMicroRows && width == kMicroColumns && diagonal >= kMicroColumns - 1) {
#pragma GCC unroll 8
    for (int r = 0; r < kMicroRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kMicroVectors; ++v) {
        double* at = c + static_cast<std::size_t>(r) * c_row + v * kWidth;
        Native::store(at, Native::load(at) + acc[r][v] * scale);
      }
    return;
  }
  double buffer[kMicroRows][kMicroColumns];
#pragma GCC unroll 8
  for (int r = 0; r < kMicroRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kMicroVectors; ++v) Native::store(&buffer[r][v * kWidth], acc[r][v]);
  for (std::size_t r = 0; r < height; ++r) {
    const std::ptrdiff_t limit = diagonal + static_cast<std::ptrdiff_t>(r) + 1;
    const std::size_t last = limit <= 0 ? 0 : smaller(width, static_cast<std::size_t>(limit));
    for (std::size_t j = 0; j < last; ++j) c[r * c_row + j] += buffer[r][j] * scale;
  }
}

void multiply(const Product& p, double* workspace) {
  double* packed_b = workspace;
  double* packed_a = workspace + kBlockK * kBlockN;
  for (std::size_t jc = 0; jc < p.n; jc += kBlockN) {
    const std::size_t n_count = smaller(kBlockN, p.n - jc);
    for (std::size_t pc = 0; pc < p.k; pc += kBlockK) {
      const std::size_t k_count = smaller(kBlockK, p.k - pc);
      if (p.b_shape == Product::lower && jc > pc + k_count) continue;   // needs k >= j
      if (p.b_shape == Product::upper && jc + n_count <= pc) continue;  // needs k <= j
      for (std::size_t j = 0; j < n_count; j += kMicroColumns)
        pack_b(p, jc + j, smaller(kMicroColumns, n_count - j), pc, k_count, packed_b + j * k_count);
      for (std::size_t ic = p.row_begin; ic < p.row_end; ic += kBlockM) {
        const std::size_t m_count = smaller(kBlockM, p.row_end - ic);
        if (p.lower_result && ic + m_count <= jc) continue;
        if (p.a_shape == Product::lower && ic + m_count <= pc) continue;  // needs k <= i
        if (p.a_shape == Product::upper && ic >= pc + k_count) continue;  // needs k >= i
        for (std::size_t i = 0; i < m_count; i += kMicroRows)
          pack_a(p, ic + i, smaller(kMicroRows, m_count - i), pc, k_count, packed_a + i * k_count);
        for (std::size_t j = 0; j < n_count; j += kMicroColumns) {
          const std::size_t width = smaller(kMicroColumns, n_count - j);
          for (std::size_t i = 0; i < m_count; i += kMicroRows) {
            const std::size_t height = smaller(kMicroRows, m_count - i), row = ic + i, column = jc + j;
            const std::ptrdiff_t diagonal = p.lower_result
                                                ? static_cast<std::ptrdiff_t>(row) - static_cast<std::ptrdiff_t>(column)
                                                : PTRDIFF_MAX / 2;
            if (diagonal + static_cast<std::ptrdiff_t>(height) <= 0) continue;
            // The range of k in which neither triangular factor is all zero.
            std::size_t begin = pc, end = pc + k_count;
            if (p.a_shape == Product::lower) end = smaller(end, row + height);
            if (p.a_shape == Product::upper) begin = larger(begin, row);
            if (p.b_shape == Product::lower) begin = larger(begin, column);
            if (p.b_shape == Product::upper) end = smaller(end, column + width);
            if (begin >= end) continue;
            micro_kernel(end - begin, p.scale, packed_a + i * k_count + (begin - pc) * kMicroRows,
                         packed_b + j * k_count + (begin - pc) * kMicroColumns, p.c + row * p.c_row + column, p.c_row,
                         height, width, diagonal);
          }
        }
      }
    }
  }
}

// ---- small blocks ------------------------------------------------------------------------------------------
std::size_t cholesky_block(std::size_t n, double* a, std::size_t ld, double smallest) {
  double column[64];  // n <= 64 (linalg.cpp)
  for (std::size_t j = 0; j < n; ++j) {
    const double pivot = a[j * ld + j];
    if (!(pivot > smallest)) return j;
    const double root = std::sqrt(pivot), inverse = 1.0 / root;
    a[j * ld + j] = root;
    for (std::size_t i = j + 1; i < n; ++i) column[i] = a[i * ld + j] *= inverse;
    for (std::size_t i = j + 1; i < n; ++i) {
      const double factor = column[i];
      double* row = a + i * ld;
      for (std::size_t k = j + 1; k <= i; ++k) row[k] -= factor * column[k];
    }
  }
  return n;
}

void invert_block(std::size_t n, double* a, std::size_t ld) {
  // Row by row: W_i = (e_i - L_i W) / L_ii, which needs the inverted rows above only.
  double row[64];
  for (std::size_t i = 0; i < n; ++i) {
    const double inverse = 1.0 / a[i * ld + i];
    for (std::size_t j = 0; j < i; ++j) row[j] = 0;
    for (std::size_t k = 0; k < i; ++k) {
      const double factor = a[i * ld + k] * inverse;
      const double* above = a + k * ld;
      for (std::size_t j = 0; j <= k; ++j) row[j] -= factor * above[j];
    }
    for (std::size_t j = 0; j < i; ++j) a[i * ld + j] = row[j];
    a[i * ld + i] = inverse;
  }
}

// ---- tiles ---------------------------------------------------------------------------------------------------
template <int lanes>
struct Tile {
  static constexpr int width = lanes < kWidth ? lanes : kWidth;
  static constexpr int parts = lanes / width;
  // A narrow tile has fewer chains per row: more rows at once.
  static constexpr int rows = parts == 1 && kTileRows < 8 ? 2 * kTileRows : kTileRows;
  using V = Vector<width>;
  using T = typename V::Type;

  template <int count>
  THALWEG_INLINE void distances_of(std::size_t dimension, const double* x, const double* f, double* out) {
    T acc[count][parts] = {};
    for (std::size_t d = 0; d < dimension; ++d) {
      T fv[parts];
#pragma GCC unroll 4
      for (int v = 0; v < parts; ++v) fv[v] = V::load(f + d * lanes + v * width);
#pragma GCC unroll 8
      for (int r = 0; r < count; ++r) {
        const T xr = V::broadcast(x[static_cast<std::size_t>(r) * dimension + d]);
#pragma GCC unroll 4
        for (int v = 0; v < parts; ++v) {
          const T difference = xr - fv[v];
          acc[r][v] += difference * difference;
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < count; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < parts; ++v) V::store(out + r * lanes + v * width, acc[r][v]);
  }
  static void squared_distances(std::size_t n, std::size_t dimension, const double* x, const double* f, double* out) {
    std::size_t i = 0;
    for (; i + rows <= n; i += rows) distances_of<rows>(dimension, x + i * dimension, f, out + i * lanes);
    for (; i < n; ++i) distances_of<1>(dimension, x + i * dimension, f, out + i * lanes);
  }

  template <int count>
  THALWEG_INLINE void products_of(std::size_t dimension, const double* x, const double* f, double* out) {
    T acc[count][parts] = {};
    for (std::size_t d = 0; d < dimension; ++d) {
      T fv[parts];
#pragma GCC unroll 4
      for (int v = 0; v < parts; ++v) fv[v] = V::load(f + d * lanes + v * width);
#pragma GCC unroll 8
      for (int r = 0; r < count; ++r) {
        const T xr = V::broadcast(x[static_cast<std::size_t>(r) * dimension + d]);
#pragma GCC unroll 4
        for (int v = 0; v < parts; ++v) acc[r][v] += xr * fv[v];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < count; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < parts; ++v) V::store(out + r * lanes + v * width, acc[r][v]);
  }
  static void products(std::size_t n, std::size_t dimension, const double* x, const double* f, double* out) {
    std::size_t i = 0;
    for (; i + rows <= n; i += rows) products_of<rows>(dimension, x + i * dimension, f, out + i * lanes);
    for (; i < n; ++i) products_of<1>(dimension, x + i * dimension, f, out + i * lanes);
  }

  template <bool with_slope>
  THALWEG_INLINE void evaluate_all(std::size_t n, const KernelTerms& terms, const double* weights, double* k,
                                   double* slope, double* mean) {
    const KernelTerms t = terms;
    const double long_slope = -2 * t.long_rate * t.amplitude * (1 - t.short_fraction);
    const double short_slope = -2 * t.short_rate * t.amplitude * t.short_fraction;
    const double total_slope = long_slope + short_slope, slope_fraction = short_slope / total_slope;
    T acc[parts];
#pragma GCC unroll 4
    for (int v = 0; v < parts; ++v) acc[v] = V::load(mean + v * width);
    for (std::size_t i = 0; i < n; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < parts; ++v) {
        const T d = V::load(k + i * lanes + v * width);
        const T e_long = exponential<width>(d * t.long_rate), e_short = exponential<width>(d * t.short_rate);
        const T difference = e_short - e_long;
        const T value = (difference * t.short_fraction + e_long) * t.amplitude;
        V::store(k + i * lanes + v * width, value);
        if (with_slope) V::store(slope + i * lanes + v * width, (difference * slope_fraction + e_long) * total_slope);
        acc[v] += value * weights[i];
      }
#pragma GCC unroll 4
    for (int v = 0; v < parts; ++v) V::store(mean + v * width, acc[v]);
  }
  static void evaluate(std::size_t n, const KernelTerms& terms, const double* weights, double* k, double* slope,
                       double* mean) {
    if (slope != nullptr)
      evaluate_all<true>(n, terms, weights, k, slope, mean);
    else
      evaluate_all<false>(n, terms, weights, k, slope, mean);
  }

  // Rows i .. i + count - 1 of the forward substitution: first the columns that are solved, then the small triangle.
  template <int count>
  THALWEG_INLINE void forward_rows(std::size_t i, const double* factor, std::size_t ld, double* v) {
    T acc[count][parts];
#pragma GCC unroll 8
    for (int r = 0; r < count; ++r)
#pragma GCC unroll 4
      for (int p = 0; p < parts; ++p) acc[r][p] = V::load(v + (i + static_cast<std::size_t>(r)) * lanes + p * width);
    const double* row = factor + i * ld;
    for (std::size_t j = 0; j < i; ++j) {
      T vj[parts];
#pragma GCC unroll 4
      for (int p = 0; p < parts; ++p) vj[p] = V::load(v + j * lanes + p * width);
#pragma GCC unroll 8
      for (int r = 0; r < count; ++r) {
        const T l = V::broadcast(row[static_cast<std::size_t>(r) * ld + j]);
#pragma GCC unroll 4
        for (int p = 0; p < parts; ++p) acc[r][p] -= l * vj[p];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < count; ++r) {
      const double* here = row + static_cast<std::size_t>(r) * ld + i;
      const double inverse = 1.0 / here[r];
#pragma GCC unroll 8
      for (int s = 0; s < r; ++s) {
        const T l = V::broadcast(here[s]);
#pragma GCC unroll 4
        for (int p = 0; p < parts; ++p) acc[r][p] -= l * acc[s][p];
      }
#pragma GCC unroll 4
      for (int p = 0; p < parts; ++p) {
        acc[r][p] = acc[r][p] * inverse;
        V::store(v + (i + static_cast<std::size_t>(r)) * lanes + p * width, acc[r][p]);
      }
    }
  }
  static void forward(std::size_t n, const double* factor, std::size_t ld, double* v, double* norm) {
    std::size_t i = 0;
    for (; i + rows <= n; i += rows) forward_rows<rows>(i, factor, ld, v);
    for (; i < n; ++i) forward_rows<1>(i, factor, ld, v);
    if (norm == nullptr) return;
    T acc[parts] = {};
    for (i = 0; i < n; ++i)
#pragma GCC unroll 4
      for (int p = 0; p < parts; ++p) {
        const T x = V::load(v + i * lanes + p * width);
        acc[p] += x * x;
      }
#pragma GCC unroll 4
    for (int p = 0; p < parts; ++p) V::store(norm + p * width, acc[p]);
  }

  // Rows end - count .. end - 1 are solved, then subtracted from all above (the largest row first, as one by one).
  template <int count>
  THALWEG_INLINE void backward_rows(std::size_t end, const double* factor, std::size_t ld, double* v) {
    const std::size_t i = end - count;
    const double* row = factor + i * ld;
    T u[count][parts];
#pragma GCC unroll 8
    for (int r = count - 1; r >= 0; --r) {
#pragma GCC unroll 4
      for (int p = 0; p < parts; ++p) u[r][p] = V::load(v + (i + static_cast<std::size_t>(r)) * lanes + p * width);
#pragma GCC unroll 8
      for (int s = count - 1; s > r; --s) {
        const T l = V::broadcast(row[static_cast<std::size_t>(s) * ld + i + static_cast<std::size_t>(r)]);
#pragma GCC unroll 4
        for (int p = 0; p < parts; ++p) u[r][p] -= l * u[s][p];
      }
      const double inverse = 1.0 / row[static_cast<std::size_t>(r) * ld + i + static_cast<std::size_t>(r)];
#pragma GCC unroll 4
      for (int p = 0; p < parts; ++p) {
        u[r][p] = u[r][p] * inverse;
        V::store(v + (i + static_cast<std::size_t>(r)) * lanes + p * width, u[r][p]);
      }
    }
    for (std::size_t j = 0; j < i; ++j) {
      T vj[parts];
#pragma GCC unroll 4
      for (int p = 0; p < parts; ++p) vj[p] = V::load(v + j * lanes + p * width);
#pragma GCC unroll 8
      for (int r = count - 1; r >= 0; --r) {
        const T l = V::broadcast(row[static_cast<std::size_t>(r) * ld + j]);
#pragma GCC unroll 4
        for (int p = 0; p < parts; ++p) vj[p] -= l * u[r][p];
      }
#pragma GCC unroll 4
      for (int p = 0; p < parts; ++p) V::store(v + j * lanes + p * width, vj[p]);
    }
  }
  static void backward(std::size_t n, const double* factor, std::size_t ld, double* v) {
    std::size_t end = n;
    for (; end >= rows; end -= rows) backward_rows<rows>(end, factor, ld, v);
    for (; end > 0; --end) backward_rows<1>(end, factor, ld, v);
  }

  static void combine(std::size_t n, const double* weights, const double* coefficient, const double* u,
                      const double* slope, double* out) {
    T c[parts];
#pragma GCC unroll 4
    for (int p = 0; p < parts; ++p) c[p] = V::load(coefficient + p * width);
    for (std::size_t i = 0; i < n; ++i)
#pragma GCC unroll 4
      for (int p = 0; p < parts; ++p) {
        const std::size_t at = i * lanes + static_cast<std::size_t>(p) * width;
        T w = V::broadcast(weights != nullptr ? weights[i] : 0.0);
        if (u != nullptr) w += c[p] * V::load(u + at);
        V::store(out + at, w * V::load(slope + at));
      }
  }

  template <int count>
  THALWEG_INLINE void gradient_of(std::size_t dimension, const double* x, const double* f, const double* g,
                                  double* out) {
    T gv[count][parts];
#pragma GCC unroll 8
    for (int r = 0; r < count; ++r)
#pragma GCC unroll 4
      for (int p = 0; p < parts; ++p) gv[r][p] = V::load(g + r * lanes + p * width);
    for (std::size_t d = 0; d < dimension; ++d) {
      T acc[parts], fv[parts];
#pragma GCC unroll 4
      for (int p = 0; p < parts; ++p) {
        acc[p] = V::load(out + d * lanes + p * width);
        fv[p] = V::load(f + d * lanes + p * width);
      }
#pragma GCC unroll 8
      for (int r = 0; r < count; ++r) {
        const T xr = V::broadcast(x[static_cast<std::size_t>(r) * dimension + d]);
#pragma GCC unroll 4
        for (int p = 0; p < parts; ++p) {
          const T difference = xr - fv[p];
          acc[p] += gv[r][p] * difference;
        }
      }
#pragma GCC unroll 4
      for (int p = 0; p < parts; ++p) V::store(out + d * lanes + p * width, acc[p]);
    }
  }
  static void gradient(std::size_t n, std::size_t dimension, const double* x, const double* f, const double* g,
                       double* out) {
    std::size_t i = 0;
    for (; i + rows <= n; i += rows) gradient_of<rows>(dimension, x + i * dimension, f, g + i * lanes, out);
    for (; i < n; ++i) gradient_of<1>(dimension, x + i * dimension, f, g + i * lanes, out);
  }

  static constexpr TileKernels table() {
    return {squared_distances, evaluate, forward, backward, combine, gradient, products};
  }
};

// One candidate: the same operations in the same order as in a lane above, but the SIMD lanes are rows of the matrix
// (their elements turned in registers, blocks of kTurn x kTurn) or its columns, where sums over rows allow it.
constexpr int kTurn = kWidth < 4 ? kWidth : 4;
using TurnVector = Vector<kTurn>;
using TurnType = TurnVector::Type;

// out[c][r] = x[r * row + c]
THALWEG_INLINE void turned(const double* x, std::size_t row, TurnType* out) {
#if defined(__AVX__)
  // Halves of rows 0 and 2, and of 1 and 3, meet while they are loaded: what is left are four shuffles, not eight.
  using Half = Vector<2>;
#pragma GCC unroll 2
  for (std::size_t h = 0; h < 2; ++h) {
    const double* here = x + 2 * h;
    const TurnType even = __builtin_shufflevector(Half::load(here), Half::load(here + 2 * row), 0, 1, 2, 3);
    const TurnType odd = __builtin_shufflevector(Half::load(here + row), Half::load(here + 3 * row), 0, 1, 2, 3);
    out[2 * h] = __builtin_shufflevector(even, odd, 0, 4, 2, 6);
    out[2 * h + 1] = __builtin_shufflevector(even, odd, 1, 5, 3, 7);
  }
#else
  const TurnType in[kTurn] = {TurnVector::load(x), TurnVector::load(x + row)};
  out[0] = __builtin_shufflevector(in[0], in[1], 0, 2);
  out[1] = __builtin_shufflevector(in[0], in[1], 1, 3);
#endif
}

// step(group, column vector, scalar index) for every column c < count of rows group * kTurn ..., in rising order of c.
template <int groups, class Step>
THALWEG_INLINE void by_columns(std::size_t count, const double* x, std::size_t row, Step step) {
  std::size_t c = 0;
  for (; c + kTurn <= count; c += kTurn)
#pragma GCC unroll 4
    for (int g = 0; g < groups; ++g) {
      TurnType column[kTurn];
      turned(x + static_cast<std::size_t>(g) * kTurn * row + c, row, column);
#pragma GCC unroll 4
      for (std::size_t k = 0; k < kTurn; ++k) step(g, column[k], c + k);
    }
  for (; c < count; ++c)
#pragma GCC unroll 4
    for (int g = 0; g < groups; ++g) {
      double column[kTurn];
      for (std::size_t r = 0; r < kTurn; ++r) column[r] = x[(static_cast<std::size_t>(g) * kTurn + r) * row + c];
      step(g, TurnVector::load(column), c);
    }
}

struct Single {
  static constexpr int groups = 4;  // chains at once
  static constexpr std::size_t rows = groups * kTurn;

  template <int count>
  THALWEG_INLINE void distances_of(std::size_t dimension, const double* x, const double* f, double* out) {
    TurnType acc[count] = {};
    by_columns<count>(dimension, x, dimension,
                      [&](int g, TurnType column, std::size_t d) __attribute__((always_inline)) {
                        const TurnType difference = column - f[d];
                        acc[g] += difference * difference;
                      });
#pragma GCC unroll 4
    for (int g = 0; g < count; ++g) TurnVector::store(out + g * kTurn, acc[g]);
  }
  static void squared_distances(std::size_t n, std::size_t dimension, const double* x, const double* f, double* out) {
    std::size_t i = 0;
    for (; i + rows <= n; i += rows) distances_of<groups>(dimension, x + i * dimension, f, out + i);
    for (; i + kTurn <= n; i += kTurn) distances_of<1>(dimension, x + i * dimension, f, out + i);
    for (; i < n; ++i) {
      double acc = 0;
      for (std::size_t d = 0; d < dimension; ++d) {
        const double difference = x[i * dimension + d] - f[d];
        acc = multiply_add(acc, difference, difference);
      }
      out[i] = acc;
    }
  }

  template <int count>
  THALWEG_INLINE void products_of(std::size_t dimension, const double* x, const double* f, double* out) {
    TurnType acc[count] = {};
    by_columns<count>(dimension, x, dimension,
                      [&](int g, TurnType column, std::size_t d)
                          __attribute__((always_inline)) { acc[g] += column * f[d]; });
#pragma GCC unroll 4
    for (int g = 0; g < count; ++g) TurnVector::store(out + g * kTurn, acc[g]);
  }
  static void products(std::size_t n, std::size_t dimension, const double* x, const double* f, double* out) {
    std::size_t i = 0;
    for (; i + rows <= n; i += rows) products_of<groups>(dimension, x + i * dimension, f, out + i);
    for (; i + kTurn <= n; i += kTurn) products_of<1>(dimension, x + i * dimension, f, out + i);
    for (; i < n; ++i) {
      double acc = 0;
      for (std::size_t d = 0; d < dimension; ++d) acc = multiply_add(acc, x[i * dimension + d], f[d]);
      out[i] = acc;
    }
  }

  static void evaluate(std::size_t n, const KernelTerms& terms, const double* weights, double* k, double* slope,
                       double* mean) {
    const KernelTerms t = terms;
    const double long_slope = -2 * t.long_rate * t.amplitude * (1 - t.short_fraction);
    const double short_slope = -2 * t.short_rate * t.amplitude * t.short_fraction;
    const double total_slope = long_slope + short_slope, slope_fraction = short_slope / total_slope;
    by_vectors(n, [=](std::size_t i, std::size_t count) {
      const NativeType d = load_part(k + i, count);
      const NativeType e_long = exponential<kWidth>(d * t.long_rate), e_short = exponential<kWidth>(d * t.short_rate);
      const NativeType difference = e_short - e_long;
      store_part(k + i, (difference * t.short_fraction + e_long) * t.amplitude, count);
      if (slope != nullptr) store_part(slope + i, (difference * slope_fraction + e_long) * total_slope, count);
    });
    double acc = *mean;
    for (std::size_t i = 0; i < n; ++i) acc = multiply_add(acc, k[i], weights[i]);
    *mean = acc;
  }

  template <int count>
  THALWEG_INLINE void forward_rows(std::size_t i, const double* factor, std::size_t ld, double* v) {
    TurnType acc[count];
#pragma GCC unroll 4
    for (int g = 0; g < count; ++g) acc[g] = TurnVector::load(v + i + static_cast<std::size_t>(g) * kTurn);
    by_columns<count>(i, factor + i * ld, ld,
                      [&](int g, TurnType column, std::size_t j)
                          __attribute__((always_inline)) { acc[g] -= column * v[j]; });
#pragma GCC unroll 4
    for (int g = 0; g < count; ++g) TurnVector::store(v + i + static_cast<std::size_t>(g) * kTurn, acc[g]);
    // The triangle of these rows, column by column: row r still takes its columns in rising order.
    constexpr std::size_t size = static_cast<std::size_t>(count) * kTurn;
    for (std::size_t s = 0; s < size; ++s) {
      const double inverse = 1.0 / factor[(i + s) * ld + i + s], solved = v[i + s] * inverse;
      v[i + s] = solved;
      for (std::size_t r = s + 1; r < size; ++r)
        v[i + r] = multiply_add(v[i + r], -factor[(i + r) * ld + i + s], solved);
    }
  }
  static void forward(std::size_t n, const double* factor, std::size_t ld, double* v, double* norm) {
    std::size_t i = 0;
    for (; i + rows <= n; i += rows) forward_rows<groups>(i, factor, ld, v);
    for (; i + kTurn <= n; i += kTurn) forward_rows<1>(i, factor, ld, v);
    for (; i < n; ++i) {
      double acc = v[i];
      for (std::size_t j = 0; j < i; ++j) acc = multiply_add(acc, -factor[i * ld + j], v[j]);
      const double inverse = 1.0 / factor[i * ld + i];
      v[i] = acc * inverse;
    }
    if (norm == nullptr) return;
    double acc = 0;
    for (i = 0; i < n; ++i) acc = multiply_add(acc, v[i], v[i]);
    *norm = acc;
  }

  static void backward(std::size_t n, const double* factor, std::size_t ld, double* v) {
    constexpr std::size_t block = 8;
    std::size_t end = n;
    for (; end > 0;) {
      const std::size_t count = end >= block ? block : 1, i = end - count;
      const double* row = factor + i * ld;
      for (std::size_t r = count; r-- > 0;) {
        const double inverse = 1.0 / row[r * ld + i + r], solved = v[i + r] * inverse;
        v[i + r] = solved;
        for (std::size_t q = 0; q < r; ++q) v[i + q] = multiply_add(v[i + q], -row[r * ld + i + q], solved);
      }
      std::size_t j = 0;
      if (count == block)
        for (; j + kWidth <= i; j += kWidth) {
          NativeType x = Native::load(v + j);
#pragma GCC unroll 8
          for (std::size_t r = block; r-- > 0;) x -= Native::load(row + r * ld + j) * v[i + r];
          Native::store(v + j, x);
        }
      for (; j < i; ++j)
        for (std::size_t r = count; r-- > 0;) v[j] = multiply_add(v[j], -row[r * ld + j], v[i + r]);
      end = i;
    }
  }

  static void combine(std::size_t n, const double* weights, const double* coefficient, const double* u,
                      const double* slope, double* out) {
    const double c = *coefficient;
    for (std::size_t i = 0; i < n; ++i) {
      double w = weights != nullptr ? weights[i] : 0.0;
      if (u != nullptr) w = multiply_add(w, c, u[i]);
      out[i] = w * slope[i];
    }
  }

  static void gradient(std::size_t n, std::size_t dimension, const double* x, const double* f, const double* g,
                       double* out) {
    constexpr std::size_t block = 8;
    std::size_t i = 0;
    for (; i + block <= n; i += block) {
      const double* row = x + i * dimension;
      std::size_t d = 0;
      for (; d + kWidth <= dimension; d += kWidth) {
        NativeType acc = Native::load(out + d);
        const NativeType fd = Native::load(f + d);
#pragma GCC unroll 8
        for (std::size_t r = 0; r < block; ++r) {
          const NativeType difference = Native::load(row + r * dimension + d) - fd;
          acc += difference * g[i + r];
        }
        Native::store(out + d, acc);
      }
      for (; d < dimension; ++d)
        for (std::size_t r = 0; r < block; ++r) {
          const double difference = row[r * dimension + d] - f[d];
          out[d] = multiply_add(out[d], difference, g[i + r]);
        }
    }
    for (; i < n; ++i)
      for (std::size_t d = 0; d < dimension; ++d) {
        const double difference = x[i * dimension + d] - f[d];
        out[d] = multiply_add(out[d], difference, g[i]);
      }
  }

  static constexpr TileKernels table() {
    return {squared_distances, evaluate, forward, backward, combine, gradient, products};
  }
};

void solve_rows_block(std::size_t m, std::size_t n, const double* factor, std::size_t ld, double* x, std::size_t x_row,
                      double* workspace) {
  for (std::size_t i = 0; i < m; i += 8) {
    const std::size_t count = smaller(8, m - i);
    for (std::size_t r = 0; r < 8; ++r) {
      const double* row = x + (i + smaller(r, count - 1)) * x_row;  // missing rows repeat the last one
      for (std::size_t j = 0; j < n; ++j) workspace[8 * j + r] = row[j];
    }
    Tile<8>::forward(n, factor, ld, workspace, nullptr);
    for (std::size_t r = 0; r < count; ++r)
      for (std::size_t j = 0; j < n; ++j) x[(i + r) * x_row + j] = workspace[8 * j + r];
  }
}

// ---- one right-hand side -------------------------------------------------------------------------------------
THALWEG_INLINE double sum(NativeType v) {
  double total = 0;
  for (int k = 0; k < kWidth; ++k) total += v[k];
  return total;
}

void forward_one(std::size_t n, std::size_t first, const double* factor, std::size_t ld, double* v) {
  constexpr std::size_t rows = 4;
  std::size_t i = first;
  for (; i + rows <= n; i += rows) {
    const double* row = factor + i * ld;
    NativeType acc[rows][2] = {};
    std::size_t j = 0;
    for (; j + 2 * kWidth <= i; j += 2 * kWidth) {
      const NativeType v0 = Native::load(v + j), v1 = Native::load(v + j + kWidth);
#pragma GCC unroll 4
      for (std::size_t r = 0; r < rows; ++r) {
        acc[r][0] += Native::load(row + r * ld + j) * v0;
        acc[r][1] += Native::load(row + r * ld + j + kWidth) * v1;
      }
    }
    for (std::size_t r = 0; r < rows; ++r) {
      double total = sum(acc[r][0] + acc[r][1]);
      for (std::size_t k = j; k < i + r; ++k) total += row[r * ld + k] * v[k];
      v[i + r] = (v[i + r] - total) / row[r * ld + i + r];
    }
  }
  for (; i < n; ++i) {
    const double* row = factor + i * ld;
    NativeType acc{};
    std::size_t j = 0;
    for (; j + kWidth <= i; j += kWidth) acc += Native::load(row + j) * Native::load(v + j);
    double total = sum(acc);
    for (; j < i; ++j) total += row[j] * v[j];
    v[i] = (v[i] - total) / row[i];
  }
}

void backward_one(std::size_t n, const double* factor, std::size_t ld, double* v) {
  std::size_t end = n;
  for (; end >= 4; end -= 4) {
    const std::size_t i = end - 4;
    const double* row = factor + i * ld;
    double u[4];
    for (int r = 3; r >= 0; --r) {
      double x = v[i + static_cast<std::size_t>(r)];
      for (int s = 3; s > r; --s) x -= row[static_cast<std::size_t>(s) * ld + i + static_cast<std::size_t>(r)] * u[s];
      v[i + static_cast<std::size_t>(r)] = u[r] =
          x / row[static_cast<std::size_t>(r) * ld + i + static_cast<std::size_t>(r)];
    }
    std::size_t j = 0;
    for (; j + kWidth <= i; j += kWidth) {
      NativeType x = Native::load(v + j);
#pragma GCC unroll 4
      for (std::size_t r = 0; r < 4; ++r) x -= Native::load(row + r * ld + j) * u[r];
      Native::store(v + j, x);
    }
    for (; j < i; ++j)
      for (std::size_t r = 0; r < 4; ++r) v[j] -= row[r * ld + j] * u[r];
  }
  for (; end > 0; --end) {
    const std::size_t i = end - 1;
    v[i] /= factor[i * ld + i];
    for (std::size_t j = 0; j < i; ++j) v[j] -= factor[i * ld + j] * v[i];
  }
}

// ---- removal -------------------------------------------------------------------------------------------------
// Givens rotations G_k of columns (k, x): L'_ik = c L_ik + s x_i, x_i' = c x_i - s L_ik. Rows are independent once the
// rotations of the columns before them are known: eight at a time hide the latency of the chain through x_i.
template <int count>
THALWEG_INLINE void rotate_rows(std::size_t begin, std::size_t end, const double* cosine, const double* sine,
                                const double* const* from, double* const* to, double* x) {
  double value[count];
#pragma GCC unroll 8
  for (int r = 0; r < count; ++r) value[r] = x[r];
  for (std::size_t k = begin; k < end; ++k) {
    const double c = cosine[k], s = sine[k];
#pragma GCC unroll 8
    for (int r = 0; r < count; ++r) {
      const double l = from[r][k], sx = s * value[r], sl = s * l;
      to[r][k] = sx + c * l;
      value[r] = c * value[r] - sl;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < count; ++r) x[r] = value[r];
}

void remove_row(std::size_t n, std::size_t row, double* factor, std::size_t ld, double* const extra[2],
                double* workspace) {
  // After the removal column k holds what was column k + 1; `from` points one column ahead of `to`.
  double *cosine = workspace, *sine = workspace + n;
  constexpr std::size_t block = 8;
  for (std::size_t first = row + 1; first < n; first += block) {
    const std::size_t count = smaller(block, n - first);
    const double* from[block];
    double* to[block];
    double x[block];
    for (std::size_t r = 0; r < count; ++r) {
      const double* old = factor + (first + r) * ld;
      double* target = factor + (first + r - 1) * ld;
      x[r] = old[row];
      for (std::size_t k = 0; k < row; ++k) target[k] = old[k];
      from[r] = old + 1;
      to[r] = target;
    }
    // Columns whose rotation is known, in parallel; then the triangle of this block, row by row. `to` of row r is
    // `old` of row r - 1: its columns beyond what was rotated are still to be read, so full rows go through a copy.
    if (count == block) {
      // Reads of row r happen at column k + 1, writes of row r + 1 into the same storage at column k <= k + 1 later
      // in the same step: the element read by row r at step k was at k + 1, written by row r + 1 at step k + 1 only.
      rotate_rows<8>(row, first - 1, cosine, sine, from, to, x);
    } else {
      for (std::size_t r = 0; r < count; ++r) rotate_rows<1>(row, first - 1, cosine, sine, from + r, to + r, x + r);
    }
    for (std::size_t r = 0; r < count; ++r) {
      const std::size_t k = first + r - 1;  // the column of this row's diagonal after the removal
      rotate_rows<1>(first - 1, k, cosine, sine, from + r, to + r, x + r);
      const double l = from[r][k], length = std::sqrt(l * l + x[r] * x[r]);
      cosine[k] = l / length;
      sine[k] = x[r] / length;
      to[r][k] = length;
    }
  }
  for (int e = 0; e < 2; ++e) {
    const double* from = extra[e] + 1;
    double* to = extra[e];
    double x = extra[e][row];
    rotate_rows<1>(row, n - 1, cosine, sine, &from, &to, &x);
  }
}

}  // namespace

const LinalgKernels& linalg_table() {
  static const LinalgKernels table = {multiply,         kBlockK * kBlockN + kBlockK * kBlockM,
                                      cholesky_block,   solve_rows_block,
                                      invert_block,     forward_one,
                                      backward_one,     exponential_row,
                                      kernel_row,       kernel_derivatives,
                                      likelihood_row,   remove_row,
                                      Tile<8>::table(), Tile<4>::table(),
                                      Single::table()};
  return table;
}

}  // namespace thalweg::THALWEG_ISA
