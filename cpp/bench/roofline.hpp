// What one thread of this machine can do at most, measured: fused multiply-adds, and bytes read per second from an
// array of 32 MB, the size of what a Gaussian process of thousands of points reads. And the least work of a kernel,
// from which follows the least time that it could take (its roofline).
#pragma once

#include <algorithm>
#include <cstddef>
#include <functional>
#include <vector>

namespace thalweg_bench {

/// The least that a call must do: arithmetic in double and single precision (a multiply-add is two), and bytes of large
/// arrays. 0 everywhere: not counted.
struct Work {
  double flops64 = 0, flops32 = 0, bytes = 0;
};

/// Per second, of one thread.
struct Peaks {
  double flops64 = 0, flops32 = 0, bytes = 0;
  double seconds(const Work& work) const {
    return std::max(work.flops64 / flops64 + work.flops32 / flops32, work.bytes / bytes);
  }
};

namespace detail {

// 64 bytes to a vector, split by the compiler where registers are narrower; independent sums hide the latency. Asked
// for as the core asks: x86-64-v4, -v3 or what is there. Sums stay small and are returned, so that nothing is optimised
// away.
template <class T, int Sums>
[[gnu::always_inline]] inline double multiply_add(std::size_t turns) {
  typedef T Vector __attribute__((vector_size(64)));
  constexpr int lanes = static_cast<int>(64 / sizeof(T));
  Vector sums[Sums], factor, summand;
  for (int k = 0; k < lanes; ++k) {
    factor[k] = static_cast<T>(0.999);
    summand[k] = static_cast<T>(1e-3);
  }
  for (int s = 0; s < Sums; ++s) sums[s] = summand * static_cast<T>(s + 1);
  for (std::size_t turn = 0; turn < turns; ++turn)
    for (int s = 0; s < Sums; ++s) sums[s] = sums[s] * factor + summand;
  double total = 0;
  for (int s = 0; s < Sums; ++s)
    for (int k = 0; k < lanes; ++k) total += static_cast<double>(sums[s][k]);
  return total;
}

#if defined(__x86_64__) && defined(__GNUC__)
template <class T>
[[gnu::target("avx512f,avx512dq,avx512vl,avx2,fma")]] double multiply_add_v4(std::size_t turns) {
  return multiply_add<T, 12>(turns);
}
template <class T>
[[gnu::target("avx2,fma")]] double multiply_add_v3(std::size_t turns) {
  return multiply_add<T, 6>(turns);
}
#endif
template <class T>
double multiply_add_any(std::size_t turns) {
  return multiply_add<T, 2>(turns);
}

/// Best of several timings; `now` gives seconds.
inline double best_rate(double (*now)(), double work, const std::function<double()>& call) {
  static volatile double kept;
  double best = 0;
  for (int repeat = 0; repeat < 9; ++repeat) {
    const double start = now();
    kept = call();
    best = std::max(best, work / (now() - start));
  }
  (void)kept;
  return best;
}

template <class T>
double flops(double (*now)()) {
  constexpr std::size_t turns = 1000000;
  constexpr double each = 2.0 * 64 / sizeof(T);
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl"))
    return best_rate(now, each * 12 * turns, [] { return multiply_add_v4<T>(turns); });
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return best_rate(now, each * 6 * turns, [] { return multiply_add_v3<T>(turns); });
#endif
  return best_rate(now, each * 2 * turns, [] { return multiply_add_any<T>(turns); });
}

}  // namespace detail

/// Takes some tenths of a second.
inline Peaks measure_peaks(double (*now)()) {
  const std::vector<double> far(std::size_t{1} << 22, 1.0);
  const double bytes = detail::best_rate(now, 8.0 * static_cast<double>(far.size()), [&] {
    typedef double Vector __attribute__((vector_size(64), aligned(8), may_alias));
    const auto* values = reinterpret_cast<const Vector*>(far.data());
    Vector a = {}, b = {};
    for (std::size_t k = 0; k + 1 < far.size() / 8; k += 2) {
      a += values[k];
      b += values[k + 1];
    }
    return a[0] + b[0];
  });
  return {detail::flops<double>(now), detail::flops<float>(now), bytes};
}

}  // namespace thalweg_bench
