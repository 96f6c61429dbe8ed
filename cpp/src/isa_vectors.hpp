// Vectors of doubles as wide as the level that a per-ISA unit is compiled for (isa.hpp), and their exponential.
// Internal linkage: every unit has its own copy.
#pragma once

#include <cstddef>

namespace thalweg::THALWEG_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
using Real = double __attribute__((vector_size(kBytes)));
using Whole = long long __attribute__((vector_size(kBytes)));
constexpr std::size_t kLanes = kBytes / sizeof(double);

[[gnu::always_inline]] inline Real broadcast(double x) { return x - Real{}; }
[[gnu::always_inline]] inline Real load(const double* x) {
  Real out;
  __builtin_memcpy(&out, x, sizeof(out));
  return out;
}
[[gnu::always_inline]] inline void store(double* x, Real v) { __builtin_memcpy(x, &v, sizeof(v)); }
[[gnu::always_inline]] inline double sum(Real v) {
  double total = v[0];
  for (std::size_t lane = 1; lane < kLanes; ++lane) total += v[lane];
  return total;
}

// exp to 2e-16 relative between -700 and 700 (clamped outside): x = k ln 2 + f, Taylor series of exp f, |f| < 0.35.
[[gnu::always_inline]] inline Real exponential(Real x) {
  const Real low = broadcast(-700.0), high = broadcast(700.0);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Real magic = broadcast(0x1.8p52);  // adding it leaves the nearest whole number in the low bits
  const Real shifted = x * 1.4426950408889634 + magic;
  const Real k = shifted - magic;
  const Real f = (x - k * 0x1.62e42fee00000p-1) - k * 0x1.a39ef35793c76p-33;  // ln 2 in two parts
  const Real f2 = f * f, f4 = f2 * f2;
  const Real p01 = 1.0 + f, p23 = 1.0 / 2 + f * (1.0 / 6), p45 = 1.0 / 24 + f * (1.0 / 120),
             p67 = 1.0 / 720 + f * (1.0 / 5040), p89 = 1.0 / 40320 + f * (1.0 / 362880),
             pab = 1.0 / 3628800 + f * (1.0 / 39916800), pcd = 1.0 / 479001600 + f * (1.0 / 6227020800.0);
  const Real low_part = (p01 + f2 * p23) + f4 * (p45 + f2 * p67);
  const Real high_part = (p89 + f2 * pab) + f4 * pcd;
  const Real p = low_part + (f4 * f4) * high_part;
  return (Real)((Whole)p + ((Whole)shifted << 52));
}

}  // namespace
}  // namespace thalweg::THALWEG_ISA
