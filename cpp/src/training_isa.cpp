// Hot loops of the training step; compiled once per instruction set (see isa.hpp for the rule of these units).
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "training_kernels.hpp"

#ifdef __SSE__
#include <immintrin.h>
#endif

namespace thalweg::THALWEG_ISA {
namespace {

#define THALWEG_INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int kWidth = 16;  // both channels of a cell at once
#elif defined(__AVX__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

template <int width>
struct Lanes {
  typedef float Type __attribute__((vector_size(width * sizeof(float))));
  typedef float Unaligned __attribute__((vector_size(width * sizeof(float)), aligned(4), may_alias));
  typedef std::int32_t Integer __attribute__((vector_size(width * sizeof(float))));
};
using V = Lanes<kWidth>::Type;
using V8 = Lanes<8>::Type;

template <int width = kWidth>
THALWEG_INLINE typename Lanes<width>::Type load(const float* p) {
  return *reinterpret_cast<const typename Lanes<width>::Unaligned*>(p);
}
template <class T>
THALWEG_INLINE void store(float* p, T v) {
  *reinterpret_cast<typename Lanes<sizeof(T) / sizeof(float)>::Unaligned*>(p) = v;
}
template <class T = V>
THALWEG_INLINE T spread(float x) {
  return x - T{};
}

struct Complex {
  V re, im;
};

template <int v>
struct Index {
  static constexpr int value = v;
};

// ---- transforms -------------------------------------------------------------------------------------------------

// cos and sin of 2 pi j k / radix, j and k from 1 on.
template <int radix>
struct Roots;
template <>
struct Roots<7> {
  static constexpr float cosine[3][3] = {{0.623489802f, -0.222520934f, -0.900968868f},
                                         {-0.222520934f, -0.900968868f, 0.623489802f},
                                         {-0.900968868f, 0.623489802f, -0.222520934f}};
  static constexpr float sine[3][3] = {{0.781831482f, 0.974927912f, 0.433883739f},
                                       {0.974927912f, -0.433883739f, -0.781831482f},
                                       {0.433883739f, -0.781831482f, 0.974927912f}};
};
template <>
struct Roots<13> {
  static constexpr float cosine[6][6] = {
      {0.885456026f, 0.568064747f, 0.12053668f, -0.354604887f, -0.748510748f, -0.970941817f},
      {0.568064747f, -0.354604887f, -0.970941817f, -0.748510748f, 0.12053668f, 0.885456026f},
      {0.12053668f, -0.970941817f, -0.354604887f, 0.885456026f, 0.568064747f, -0.748510748f},
      {-0.354604887f, -0.748510748f, 0.885456026f, 0.12053668f, -0.970941817f, 0.568064747f},
      {-0.748510748f, 0.12053668f, 0.568064747f, -0.970941817f, 0.885456026f, -0.354604887f},
      {-0.970941817f, 0.885456026f, -0.748510748f, 0.568064747f, -0.354604887f, 0.12053668f}};
  static constexpr float sine[6][6] = {
      {0.464723172f, 0.822983866f, 0.992708874f, 0.935016243f, 0.663122658f, 0.239315664f},
      {0.822983866f, 0.935016243f, 0.239315664f, -0.663122658f, -0.992708874f, -0.464723172f},
      {0.992708874f, 0.239315664f, -0.935016243f, -0.464723172f, 0.822983866f, 0.663122658f},
      {0.935016243f, -0.663122658f, -0.464723172f, 0.992708874f, -0.239315664f, -0.822983866f},
      {0.663122658f, -0.992708874f, 0.822983866f, -0.239315664f, -0.464723172f, 0.935016243f},
      {0.239315664f, -0.464723172f, 0.663122658f, -0.822983866f, 0.935016243f, -0.992708874f}};
};

template <int radix>
THALWEG_INLINE void butterfly(Complex* a) {
  if constexpr (radix == 1) {
  } else if constexpr (radix == 2) {
    const Complex t = a[1];
    a[1] = {a[0].re - t.re, a[0].im - t.im};
    a[0] = {a[0].re + t.re, a[0].im + t.im};
  } else if constexpr (radix == 3) {
    const V half = spread(0.5f), root = spread(0.86602540378443865f);
    const V sr = a[1].re + a[2].re, si = a[1].im + a[2].im;
    const V dr = root * (a[1].re - a[2].re), di = root * (a[1].im - a[2].im);
    const V er = a[0].re - half * sr, ei = a[0].im - half * si;
    a[0] = {a[0].re + sr, a[0].im + si};
    a[1] = {er + di, ei - dr};
    a[2] = {er - di, ei + dr};
  } else if constexpr (radix == 4) {
    const V b0r = a[0].re + a[2].re, b0i = a[0].im + a[2].im, b1r = a[0].re - a[2].re, b1i = a[0].im - a[2].im;
    const V b2r = a[1].re + a[3].re, b2i = a[1].im + a[3].im, b3r = a[1].re - a[3].re, b3i = a[1].im - a[3].im;
    a[0] = {b0r + b2r, b0i + b2i};
    a[2] = {b0r - b2r, b0i - b2i};
    a[1] = {b1r + b3i, b1i - b3r};
    a[3] = {b1r - b3i, b1i + b3r};
  } else if constexpr (radix == 5) {
    const V c1 = spread(0.30901699437494742f), c2 = spread(-0.80901699437494742f);
    const V s1 = spread(0.95105651629515357f), s2 = spread(0.58778525229247313f);
    const V p1r = a[1].re + a[4].re, p1i = a[1].im + a[4].im, q1r = a[1].re - a[4].re, q1i = a[1].im - a[4].im;
    const V p2r = a[2].re + a[3].re, p2i = a[2].im + a[3].im, q2r = a[2].re - a[3].re, q2i = a[2].im - a[3].im;
    const V u1r = (a[0].re + c1 * p1r) + c2 * p2r, u1i = (a[0].im + c1 * p1i) + c2 * p2i;
    const V u2r = (a[0].re + c2 * p1r) + c1 * p2r, u2i = (a[0].im + c2 * p1i) + c1 * p2i;
    const V w1r = s1 * q1r + s2 * q2r, w1i = s1 * q1i + s2 * q2i;
    const V w2r = s2 * q1r - s1 * q2r, w2i = s2 * q1i - s1 * q2i;
    a[0] = {a[0].re + (p1r + p2r), a[0].im + (p1i + p2i)};
    a[1] = {u1r + w1i, u1i - w1r};
    a[4] = {u1r - w1i, u1i + w1r};
    a[2] = {u2r + w2i, u2i - w2r};
    a[3] = {u2r - w2i, u2i + w2r};
  } else if constexpr (radix == 6) {
    Complex even[3] = {a[0], a[2], a[4]}, odd[3] = {a[3], a[5], a[1]};
    butterfly<3>(even);
    butterfly<3>(odd);
#pragma GCC unroll 3
    for (int k = 0; k < 3; ++k) {
      const Complex sum{even[k].re + odd[k].re, even[k].im + odd[k].im};
      const Complex difference{even[k].re - odd[k].re, even[k].im - odd[k].im};
      a[4 * k % 6] = sum;
      a[(4 * k + 3) % 6] = difference;
    }
  } else if constexpr (radix == 9) {
    constexpr float cosine[5] = {1, 0.76604444311897801f, 0.17364817766693036f, 0, -0.93969262078590843f};
    constexpr float sine[5] = {0, 0.64278760968653936f, 0.98480775301220802f, 0, 0.34202014332566871f};
    Complex b[3][3];
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) b[j][i] = a[3 * i + j];
      butterfly<3>(b[j]);
    }
#pragma GCC unroll 3
    for (int k = 0; k < 3; ++k) {
      Complex c[3] = {b[0][k], b[1][k], b[2][k]};
      if (k > 0) {
#pragma GCC unroll 3
        for (int j = 1; j < 3; ++j) {
          const V wr = spread(cosine[j * k]), wi = spread(sine[j * k]);
          c[j] = {b[j][k].re * wr + b[j][k].im * wi, b[j][k].im * wr - b[j][k].re * wi};
        }
      }
      butterfly<3>(c);
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) a[k + 3 * i] = c[i];
    }
  } else {
    // An odd prime: sums and differences of the points k and radix - k give the frequencies j and radix - j.
    constexpr int half = radix / 2;
    using Table = Roots<radix>;
    Complex plus[half], minus[half], sum = a[0];
#pragma GCC unroll 8
    for (int k = 0; k < half; ++k) {
      plus[k] = {a[k + 1].re + a[radix - 1 - k].re, a[k + 1].im + a[radix - 1 - k].im};
      minus[k] = {a[k + 1].re - a[radix - 1 - k].re, a[k + 1].im - a[radix - 1 - k].im};
      sum = {sum.re + plus[k].re, sum.im + plus[k].im};
    }
#pragma GCC unroll 8
    for (int j = 0; j < half; ++j) {
      Complex u = a[0], w = {V{}, V{}};
#pragma GCC unroll 8
      for (int k = 0; k < half; ++k) {
        const float c = Table::cosine[j][k], s = Table::sine[j][k];
        u = {u.re + c * plus[k].re, u.im + c * plus[k].im};
        w = {w.re + s * minus[k].re, w.im + s * minus[k].im};
      }
      a[j + 1] = {u.re + w.im, u.im - w.re};
      a[radix - 1 - j] = {u.re - w.im, u.im + w.re};
    }
    a[0] = sum;
  }
}

// Elements of a strided line; re and im: where the parts of an element are. next: Lines::Steps::later.
struct In {
  const float* p;
  std::ptrdiff_t stride;
  int count, re, im;
  std::ptrdiff_t next = 0;
};
struct Out {
  float* p;
  std::ptrdiff_t stride;
  int count, re, im;
  std::ptrdiff_t next = 0;
};

// One pass: n points left, s interleaved transforms of them. The first reads a line whose tail is zero, the last writes
// one whose tail nobody wants.
template <int radix, bool first, bool last>
THALWEG_INLINE void stage(int n, int s, const float* twiddles, const In& in, const Out& out) {
  const int m = n / radix;
  for (int p = 0; p < m; ++p) {
    V wr[radix] = {}, wi[radix] = {};
    if constexpr (!last) {
#pragma GCC unroll 16
      for (int j = 1; j < radix; ++j) {
        wr[j] = spread(twiddles[2 * p * j * s]);
        wi[j] = spread(twiddles[2 * p * j * s + 1]);
      }
    }
    for (int q = 0; q < s; ++q) {
      Complex a[radix];
#pragma GCC unroll 16
      for (int j = 0; j < radix; ++j) {
        const int k = q + s * (p + m * j);
        if (first && k >= in.count) {
          a[j] = {V{}, V{}};
        } else {
          const float* x = in.p + k * in.stride;
          if constexpr (first) {
            __builtin_prefetch(x + in.next);
            __builtin_prefetch(x + in.next + kImaginary);
          }
          a[j] = {load(x + in.re), load(x + in.im)};
        }
      }
      butterfly<radix>(a);
#pragma GCC unroll 16
      for (int j = 0; j < radix; ++j) {
        const int k = q + s * (radix * p + j);
        if (last && k >= out.count) continue;
        float* y = out.p + k * out.stride;
        if constexpr (last) {
          __builtin_prefetch(y + out.next, 1);
          __builtin_prefetch(y + out.next + kImaginary, 1);
        }
        if (last || j == 0) {
          store(y + out.re, a[j].re);
          store(y + out.im, a[j].im);
        } else {
          store(y + out.re, a[j].re * wr[j] - a[j].im * wi[j]);
          store(y + out.im, a[j].re * wi[j] + a[j].im * wr[j]);
        }
      }
    }
  }
}

template <bool first, bool last>
THALWEG_INLINE void stage_of(int radix, int n, int s, const float* twiddles, const In& in, const Out& out) {
  switch (radix) {
    case 2:
      return stage<2, first, last>(n, s, twiddles, in, out);
    case 3:
      return stage<3, first, last>(n, s, twiddles, in, out);
    case 4:
      return stage<4, first, last>(n, s, twiddles, in, out);
    case 5:
      return stage<5, first, last>(n, s, twiddles, in, out);
    case 7:
      return stage<7, first, last>(n, s, twiddles, in, out);
    default:
      return stage<13, first, last>(n, s, twiddles, in, out);
  }
}

// Lengths a b with coprime factors need no twiddles (Good, J. R. Stat. Soc. B 20, 361 (1958)): point b i + a j and
// frequency k = p mod a = q mod b separate into a DFT over j to q, then one over i to p.
template <int a, int b>
struct Coprime {
  static constexpr int n = a * b;
  static constexpr int point(int i, int j) { return (b * i + a * j) % n; }
  static constexpr int frequency(int p, int q) {
    int k = p;
    while (k % b != q) k += a;
    return k;
  }
};

template <int count, class Body>
THALWEG_INLINE void each(Body body) {
  if constexpr (count > 0) {
    each<count - 1>(body);
    body(Index<count - 1>());
  }
}

// Loops over the lines itself: arguments handed over in memory, line by line, would wait for the stores of the line
// before. The inverse is the forward transform with real and imaginary parts swapped on both sides.
template <int a, int b>
__attribute__((noinline)) void coprime_lines(const Lines& all, float* scratch) {
  using Map = Coprime<a, b>;
  alignas(64) static constexpr float zeros[kCell] = {};
  const int re = all.inverse ? kImaginary : 0, im = kImaginary - re, in_count = all.in_count, out_count = all.out_count;
  const Lines::Steps in_steps = all.in_steps, out_steps = all.out_steps;
  for (int l = 0; l < all.count; ++l)
    for (int part = 0; part < kImaginary; part += kWidth) {
      const float* in = all.in + l * in_steps.line + part;
      float* out = all.out + l * out_steps.line + part;
      each<a>([&](auto i) __attribute__((always_inline)) {
        Complex x[b];
        each<b>([&](auto j) __attribute__((always_inline)) {
          constexpr int k = Map::point(i.value, j.value);
          const float* p = k < in_count ? in + k * in_steps.element : zeros;
          if (in_steps.later != 0) {
            __builtin_prefetch(p + in_steps.later);
            __builtin_prefetch(p + in_steps.later + kImaginary);
          }
          x[j.value] = {load(p + re), load(p + im)};
        });
        butterfly<b>(x);
        each<b>([&](auto q) __attribute__((always_inline)) {
          float* p = scratch + (q.value * a + i.value) * 2 * kWidth;
          store(p, x[q.value].re);
          store(p + kWidth, x[q.value].im);
        });
      });
      each<b>([&](auto q) __attribute__((always_inline)) {
        Complex x[a];
        each<a>([&](auto i) __attribute__((always_inline)) {
          const float* p = scratch + (q.value * a + i.value) * 2 * kWidth;
          x[i.value] = {load(p), load(p + kWidth)};
        });
        butterfly<a>(x);
        each<a>([&](auto p) __attribute__((always_inline)) {
          constexpr int k = Map::frequency(p.value, q.value);
          if (k >= out_count) return;
          float* y = out + k * out_steps.element;
          if (out_steps.later != 0) {
            __builtin_prefetch(y + out_steps.later, 1);
            __builtin_prefetch(y + out_steps.later + kImaginary, 1);
          }
          store(y + re, x[p.value].re);
          store(y + im, x[p.value].im);
        });
      });
    }
}

// Any other length.
__attribute__((noinline)) void line(const Fft& fft, const In& in, const Out& out, float* scratch) {
  if (fft.n == 1) {
    store(out.p + out.re, load(in.p + in.re));
    store(out.p + out.im, load(in.p + in.im));
    return;
  }
  if (fft.stages == 1) return stage_of<true, true>(fft.radix[0], fft.n, 1, fft.twiddles, in, out);
  float* buffers[2] = {scratch, scratch + 2 * kWidth * fft.n};
  int n = fft.n, s = 1;
  stage_of<true, false>(fft.radix[0], n, s, fft.twiddles, in, {buffers[0], 2 * kWidth, n, 0, kWidth});
  for (int k = 1; k < fft.stages; ++k) {
    n /= fft.radix[k - 1];
    s *= fft.radix[k - 1];
    const In from{buffers[(k - 1) & 1], 2 * kWidth, fft.n, 0, kWidth};
    if (k + 1 < fft.stages)
      stage_of<false, false>(fft.radix[k], n, s, fft.twiddles, from, {buffers[k & 1], 2 * kWidth, fft.n, 0, kWidth});
    else
      stage_of<false, true>(fft.radix[k], n, s, fft.twiddles, from, out);
  }
}

void lines(const Fft& fft, const Lines& all, float* scratch) {
  switch (fft.n) {  // of the thesis' networks
    case 13:
      return coprime_lines<13, 1>(all, scratch);
    case 18:
      return coprime_lines<2, 9>(all, scratch);
    case 20:
      return coprime_lines<4, 5>(all, scratch);
    case 21:
      return coprime_lines<3, 7>(all, scratch);
    case 30:
      return coprime_lines<6, 5>(all, scratch);
    case 36:
      return coprime_lines<4, 9>(all, scratch);
    case 42:
      return coprime_lines<6, 7>(all, scratch);
    case 45:
      return coprime_lines<5, 9>(all, scratch);
    default:
      break;
  }
  const int re = all.inverse ? kImaginary : 0, im = kImaginary - re;
  for (int l = 0; l < all.count; ++l)
    for (int part = 0; part < kImaginary; part += kWidth)
      line(fft, {all.in + l * all.in_steps.line + part, all.in_steps.element, all.in_count, re, im, all.in_steps.later},
           {all.out + l * all.out_steps.line + part, all.out_steps.element, all.out_count, re, im, all.out_steps.later},
           scratch);
}

// ---- products of spectra ----------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int kPasses = 1, kOutputs = 10;
// Frequencies f and -f side by side, the second one conjugated: they share their weights.
struct Side {
  const float *f, *g;
  Side(const float* f_, const float* g_, int) : f(f_), g(g_) {}
  V re(std::ptrdiff_t k) const {
    return __builtin_shufflevector(load<8>(f + k), load<8>(g + k), 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14,
                                   15);
  }
  V im(std::ptrdiff_t k) const {
    return __builtin_shufflevector(load<8>(f + k + kImaginary), -load<8>(g + k + kImaginary), 0, 1, 2, 3, 4, 5, 6, 7, 8,
                                   9, 10, 11, 12, 13, 14, 15);
  }
};
THALWEG_INLINE void put(float* f, float* g, std::ptrdiff_t k, int, V re, V im) {
  store(f + k, __builtin_shufflevector(re, re, 0, 1, 2, 3, 4, 5, 6, 7));
  store(g + k, __builtin_shufflevector(re, re, 8, 9, 10, 11, 12, 13, 14, 15));
  store(f + k + kImaginary, __builtin_shufflevector(im, im, 0, 1, 2, 3, 4, 5, 6, 7));
  store(g + k + kImaginary, -__builtin_shufflevector(im, im, 8, 9, 10, 11, 12, 13, 14, 15));
}
#else
constexpr int kPasses = 2 * 8 / kWidth, kOutputs = 5;
struct Side {
  const float* p;
  float sign;
  Side(const float* f, const float* g, int pass)
      : p((pass < kPasses / 2 ? f : g) + pass % (kPasses / 2) * kWidth), sign(pass < kPasses / 2 ? 1.0f : -1.0f) {}
  V re(std::ptrdiff_t k) const { return load(p + k); }
  V im(std::ptrdiff_t k) const { return sign * load(p + k + kImaginary); }
};
THALWEG_INLINE void put(float* f, float* g, std::ptrdiff_t k, int pass, V re, V im) {
  float* p = (pass < kPasses / 2 ? f : g) + pass % (kPasses / 2) * kWidth + k;
  store(p, re);
  store(p + kImaginary, pass < kPasses / 2 ? im : -im);
}
#endif

THALWEG_INLINE std::ptrdiff_t channel_at(std::ptrdiff_t plane, int c) { return c / 2 * plane + c % 2 * kSecond; }

template <int outputs, bool conjugate>
THALWEG_INLINE void multiply_block(const float* w, std::size_t imaginary, int n_in, int step_in, int first,
                                   const int step_out, const float* in_f, const float* in_g, float* out_f, float* out_g,
                                   std::ptrdiff_t plane) {
  for (int pass = 0; pass < kPasses; ++pass) {
    const Side in(in_f, in_g, pass);
    V re[outputs] = {}, im[outputs] = {};
    for (int i = 0; i < n_in; ++i) {
      const V ar = in.re(channel_at(plane, i)), ai = in.im(channel_at(plane, i));
      const float* wi = w + i * step_in + first * step_out;
#pragma GCC unroll 10
      for (int o = 0; o < outputs; ++o) {
        const V w_re = spread(wi[o * step_out]),
                w_im = spread(wi[o * step_out + static_cast<std::ptrdiff_t>(imaginary)]);
        re[o] += w_re * ar;
        im[o] += w_re * ai;
        if (conjugate) {
          re[o] += w_im * ai;
          im[o] -= w_im * ar;
        } else {
          re[o] -= w_im * ai;
          im[o] += w_im * ar;
        }
      }
    }
#pragma GCC unroll 10
    for (int o = 0; o < outputs; ++o) put(out_f, out_g, channel_at(plane, first + o), pass, re[o], im[o]);
  }
}

// step: between outputs; what is known of it spares registers for addresses.
template <bool conjugate, int step>
void multiply_all(const Pairs& t, const float* weights, std::size_t cells, int n_in, int step_in, int n_out,
                  int any_step, const float* in, float* out) {
  const int step_out = step > 0 ? step : any_step;
  const std::size_t imaginary = cells * kCell;
  for (int p = 0; p < t.count; ++p) {
    const std::ptrdiff_t f = t.pair[2 * p] * std::ptrdiff_t{kCell}, g = t.pair[2 * p + 1] * std::ptrdiff_t{kCell};
    const float* w = weights + static_cast<std::size_t>(p) * 2 * imaginary;
    for (std::size_t k = 0; k < 2 * imaginary; k += 16)
      __builtin_prefetch(w + static_cast<std::size_t>(t.count) * 2 * imaginary + k);
    int o = 0;
    for (; o + kOutputs <= n_out; o += kOutputs)
      multiply_block<kOutputs, conjugate>(w, imaginary, n_in, step_in, o, step_out, in + f, in + g, out + f, out + g,
                                          t.plane);
    for (; o < n_out; ++o)
      multiply_block<1, conjugate>(w, imaginary, n_in, step_in, o, step_out, in + f, in + g, out + f, out + g, t.plane);
  }
}

void multiply(const Pairs& t, const float* weights, std::size_t cells, int channels, bool forward, const float* in,
              float* out) {
  const auto all = !forward              ? multiply_all<false, 1>
                   : channels == kHidden ? multiply_all<true, kHidden>
                                         : multiply_all<true, 0>;
  const int n_in = forward ? channels : kHidden, n_out = forward ? kHidden : channels;
  all(t, weights, cells, n_in, forward ? 1 : channels, n_out, forward ? channels : 1, in, out);
}

using Index8 = Lanes<8>::Integer;

THALWEG_INLINE void transpose(V8* r) {
  V8 t[8], u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = __builtin_shuffle(r[2 * i], r[2 * i + 1], Index8{0, 8, 1, 9, 4, 12, 5, 13});
    t[2 * i + 1] = __builtin_shuffle(r[2 * i], r[2 * i + 1], Index8{2, 10, 3, 11, 6, 14, 7, 15});
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    u[4 * i] = __builtin_shuffle(t[4 * i], t[4 * i + 2], Index8{0, 1, 8, 9, 4, 5, 12, 13});
    u[4 * i + 1] = __builtin_shuffle(t[4 * i], t[4 * i + 2], Index8{2, 3, 10, 11, 6, 7, 14, 15});
    u[4 * i + 2] = __builtin_shuffle(t[4 * i + 1], t[4 * i + 3], Index8{0, 1, 8, 9, 4, 5, 12, 13});
    u[4 * i + 3] = __builtin_shuffle(t[4 * i + 1], t[4 * i + 3], Index8{2, 3, 10, 11, 6, 7, 14, 15});
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = __builtin_shuffle(u[i], u[i + 4], Index8{0, 1, 2, 3, 8, 9, 10, 11});
    r[i + 4] = __builtin_shuffle(u[i], u[i + 4], Index8{4, 5, 6, 7, 12, 13, 14, 15});
  }
}

// One row per sample: real and imaginary parts of the ten channels of d, 24 floats. They are read again at once, so
// each is stored as it will be loaded: a load that spans two pending stores would wait for both.
constexpr int kRow = 32;

template <bool conjugated, bool few>
THALWEG_INLINE void sample_rows(const float* d, std::ptrdiff_t plane, float* rows) {
  V8 re[8], im[8];
  const auto real = [&](int c) { return few ? 2 * load<8>(d + c * kCell) : load<8>(d + channel_at(plane, c)); };
  const auto imaginary = [&](int c) {
    const V8 v = few ? 2 * load<8>(d + c * kCell + 8) : load<8>(d + channel_at(plane, c) + kImaginary);
    return conjugated ? -v : v;
  };
#pragma GCC unroll 8
  for (int c = 0; c < 8; ++c) re[c] = real(c);
#pragma GCC unroll 8
  for (int c = 0; c < 8; ++c) im[c] = imaginary(c);
  transpose(re);
  transpose(im);
#pragma GCC unroll 8
  for (int l = 0; l < 8; ++l) {
#if defined(__AVX512F__)
    store(rows + kRow * l, __builtin_shufflevector(re[l], im[l], 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
#else
    store(rows + kRow * l, re[l]);
    store(rows + kRow * l + 8, im[l]);
#endif
  }
  re[0] = real(8), re[1] = real(9), re[2] = imaginary(8), re[3] = imaginary(9);
  re[4] = re[5] = re[6] = re[7] = V8{};
  transpose(re);
#pragma GCC unroll 8
  for (int l = 0; l < 8; ++l) store(rows + kRow * l + 16, re[l]);
}

#if defined(__AVX512F__)
constexpr int kWide = 16, kChannelBlock = 5;
#else
constexpr int kWide = kWidth, kChannelBlock = kWidth == 8 ? 2 : 1;
#endif
constexpr int kWideCount = 24 / kWide;  // vectors of kWide in a row, the rest in one of 8

template <int channels, bool few>
THALWEG_INLINE void correlate_block(const float* a_f, const float* a_g, std::ptrdiff_t plane, int first,
                                    const float* rows, bool add, float* sums, std::ptrdiff_t imaginary,
                                    std::ptrdiff_t tail) {
  using W = Lanes<kWide>::Type;
  constexpr int imaginary_part = few ? 8 : kImaginary;
  constexpr bool rest = 24 % kWide != 0;
  W re[channels][kWideCount] = {}, im[channels][kWideCount] = {};  // sums with Re a and with Im a
  V8 re_rest[channels] = {}, im_rest[channels] = {};
  // The sign of -f's imaginary parts is in the operation: a factor straight from memory costs nothing to spread.
  const auto side = [&](const float* a, const float* from, auto conjugated) __attribute__((always_inline)) {
    for (int l = 0; l < 8; ++l) {
      const float* row = from + l * kRow;
      W d[kWideCount];
#pragma GCC unroll 8
      for (int k = 0; k < kWideCount; ++k) d[k] = load<kWide>(row + k * kWide);
      V8 d_rest{};
      if constexpr (rest) d_rest = load<8>(row + 16);
#pragma GCC unroll 8
      for (int c = 0; c < channels; ++c) {
        const float* x = a + (few ? (first + c) * kCell : channel_at(plane, first + c)) + l;
#pragma GCC unroll 8
        for (int k = 0; k < kWideCount; ++k) {
          re[c][k] += x[0] * d[k];
          if constexpr (decltype(conjugated)::value)
            im[c][k] -= x[imaginary_part] * d[k];
          else
            im[c][k] += x[imaginary_part] * d[k];
        }
        if constexpr (rest) {
          re_rest[c] += x[0] * d_rest;
          if constexpr (decltype(conjugated)::value)
            im_rest[c] -= x[imaginary_part] * d_rest;
          else
            im_rest[c] += x[imaginary_part] * d_rest;
        }
      }
    }
  };
  side(a_f, rows, Index<0>());
  if constexpr (!few) side(a_g, rows + 8 * kRow, Index<1>());
#pragma GCC unroll 8
  for (int c = 0; c < channels; ++c) {
    float* s = sums + (first + c) * 8;
    float* t = sums + tail + (first + c) * 2;
    V8 r[3], i[3];  // Re d_0..7, Im d_0..7, (Re d_8, d_9, Im d_8, d_9, 0 ...)
#if defined(__AVX512F__)
    r[0] = __builtin_shufflevector(re[c][0], re[c][0], 0, 1, 2, 3, 4, 5, 6, 7);
    r[1] = __builtin_shufflevector(re[c][0], re[c][0], 8, 9, 10, 11, 12, 13, 14, 15);
    i[0] = __builtin_shufflevector(im[c][0], im[c][0], 0, 1, 2, 3, 4, 5, 6, 7);
    i[1] = __builtin_shufflevector(im[c][0], im[c][0], 8, 9, 10, 11, 12, 13, 14, 15);
    r[2] = re_rest[c];
    i[2] = im_rest[c];
#else
    alignas(64) float parts[2][24];
    for (int k = 0; k < kWideCount; ++k) {
      store(parts[0] + k * kWide, re[c][k]);
      store(parts[1] + k * kWide, im[c][k]);
    }
    for (int k = 0; k < 3; ++k) {
      r[k] = load<8>(parts[0] + 8 * k);
      i[k] = load<8>(parts[1] + 8 * k);
    }
#endif
    const V8 out_re = r[0] + i[1], out_im = i[0] - r[1];
    using V4 = Lanes<4>::Type;
    const V4 r2 = __builtin_shufflevector(r[2], r[2], 0, 1, 2, 3), i2 = __builtin_shufflevector(i[2], i[2], 2, 3, 0, 1);
    const V4 tail_re = r2 + i2, tail_im = i2 - r2;
    store(s, add ? load<8>(s) + out_re : out_re);
    store(s + imaginary, add ? load<8>(s + imaginary) + out_im : out_im);
    for (int k = 0; k < 2; ++k) {
      t[k] = add ? t[k] + tail_re[k] : tail_re[k];
      t[imaginary + k] = add ? t[imaginary + k] + tail_im[2 + k] : tail_im[2 + k];
    }
  }
}

void correlate(const Pairs& t, int channels, const float* a, std::ptrdiff_t later, const float* d, bool add,
               float* sums) {
  alignas(64) float rows[16 * kRow];
  const std::ptrdiff_t imaginary = kSecond * sum_blocks(channels), tail = kSecond * channels;
  for (int p = 0; p < t.count; ++p, sums += 2 * imaginary) {
    const std::ptrdiff_t f = t.pair[2 * p] * std::ptrdiff_t{kCell}, g = t.pair[2 * p + 1] * std::ptrdiff_t{kCell};
    for (int j = 0; j < (channels + 1) / 2; ++j)
      for (int k = 0; k < kCell; k += 16) {
        __builtin_prefetch(a + later + f + j * t.plane + k);
        __builtin_prefetch(a + later + g + j * t.plane + k);
      }
    for (int k = 0; k < 2 * imaginary; k += 16) __builtin_prefetch(sums + t.count * 2 * imaginary + k, 1);
    sample_rows<false, false>(d + f, t.plane, rows);
    sample_rows<true, false>(d + g, t.plane, rows + 8 * kRow);
    int c = 0;
    for (; c + kChannelBlock <= channels; c += kChannelBlock)
      correlate_block<kChannelBlock, false>(a + f, a + g, t.plane, c, rows, add, sums, imaginary, tail);
    for (; c < channels; ++c) correlate_block<1, false>(a + f, a + g, t.plane, c, rows, add, sums, imaginary, tail);
  }
}

// ---- groups of few samples --------------------------------------------------------------------------------------

void unpack(const Pairs& t, const float* packed, float* x) {
  for (int p = 0; p < t.count; ++p, x += kFewChannels * kCell) {
    const float *f = packed + t.pair[2 * p] * std::ptrdiff_t{kCell},
                *g = packed + t.pair[2 * p + 1] * std::ptrdiff_t{kCell};
    for (int c = 0; c < kFewChannels; c += 4, f += t.plane, g += t.plane)
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const V8 half = spread<V8>(0.5f), f_re = half * load<8>(f + 8 * h),
                 f_im = half * load<8>(f + kImaginary + 8 * h), g_re = half * load<8>(g + 8 * h),
                 g_im = half * load<8>(g + kImaginary + 8 * h);
        const auto put_channel = [&](float* to, V8 re, V8 im) __attribute__((always_inline)) {
          store(to, re);
          store(to + 8, im);
          store(to + 16, im);
          store(to + 24, -re);
        };
        put_channel(x + (c + h) * kCell, f_re + g_re, f_im - g_im);
        put_channel(x + (c + 2 + h) * kCell, f_im + g_im, g_re - f_re);
      }
  }
}

void pack(const Pairs& t, const float* y, float* packed) {
  for (int p = 0; p < t.count; ++p, y += kFewChannels * kCell) {
    float *f = packed + t.pair[2 * p] * std::ptrdiff_t{kCell}, *g = packed + t.pair[2 * p + 1] * std::ptrdiff_t{kCell};
    for (int c = 0; c < kFewChannels; c += 4, f += t.plane, g += t.plane)
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const auto part = [&](int channel, int at) __attribute__((always_inline)) {
          return channel < kHidden ? load<8>(y + channel * kCell + at) : V8{};
        };
        const V8 a_re = part(c + h, 0), a_im = part(c + h, 8), b_re = part(c + 2 + h, 0), b_im = part(c + 2 + h, 8);
        store(f + 8 * h, a_re - b_im);
        store(f + kImaginary + 8 * h, a_im + b_re);
        store(g + 8 * h, a_re + b_im);
        store(g + kImaginary + 8 * h, b_re - a_im);
      }
  }
}

template <bool conjugate>
void multiply_few_all(int pairs, const float* w, std::size_t imaginary, const float* in, float* out) {
  constexpr int step_in = conjugate ? 1 : kHidden, step_out = conjugate ? kHidden : 1;
  for (int p = 0; p < pairs; ++p, w += 2 * imaginary, in += kFewChannels * kCell, out += kFewChannels * kCell) {
    for (std::size_t k = 0; k < 2 * imaginary; k += 16)
      __builtin_prefetch(w + static_cast<std::size_t>(pairs) * 2 * imaginary + k);
    for (int part = 0; part < 16; part += kWidth)
      for (int first = 0; first < kHidden; first += kOutputs) {
        V a[kOutputs] = {}, b[kOutputs] = {};
        for (int i = 0; i < kHidden; ++i) {
          const V x = load(in + i * kCell + part), turned = load(in + i * kCell + 16 + part);
          const float* re = w + first * step_out + i * step_in;
#pragma GCC unroll 10
          for (int o = 0; o < kOutputs; ++o) {
            a[o] += re[o * step_out] * x;
            b[o] += re[o * step_out + static_cast<std::ptrdiff_t>(imaginary)] * turned;
          }
        }
#pragma GCC unroll 10
        for (int o = 0; o < kOutputs; ++o)
          store(out + (first + o) * kCell + part, conjugate ? a[o] + b[o] : a[o] - b[o]);
      }
  }
}

void multiply_few(int pairs, const float* weights, std::size_t cells, bool conjugate, const float* in, float* out) {
  (conjugate ? multiply_few_all<true> : multiply_few_all<false>)(pairs, weights, cells * kCell, in, out);
}

void correlate_few(int pairs, const float* a, const float* d, bool add, float* sums) {
  alignas(64) float rows[8 * kRow];
  constexpr std::ptrdiff_t imaginary = kSecond * sum_blocks(kHidden), tail = kSecond * kHidden;
  for (int p = 0; p < pairs; ++p, sums += 2 * imaginary, a += kFewChannels * kCell, d += kFewChannels * kCell) {
    for (int k = 0; k < 2 * imaginary; k += 16) __builtin_prefetch(sums + pairs * 2 * imaginary + k, 1);
    sample_rows<false, true>(d, 0, rows);
    for (int c = 0; c < kHidden; c += kChannelBlock)
      correlate_block<kChannelBlock, true>(a, nullptr, 0, c, rows, add, sums, imaginary, tail);
  }
}

// ---- spectra of kernels -----------------------------------------------------------------------------------------

void split(const Pairs& t, std::size_t cells, const float* spectrum, float scale, float* weights) {
  const V half = spread(0.5f * scale);
  const std::size_t stride = cells * kCell;
  for (int p = 0; p < t.count; ++p, weights += 2 * stride) {
    const float *f = spectrum + t.pair[2 * p] * std::ptrdiff_t{kCell},
                *g = spectrum + t.pair[2 * p + 1] * std::ptrdiff_t{kCell};
    float *re = weights, *im = weights + stride;
    for (std::size_t j = 0; j < cells; ++j, f += t.plane, g += t.plane, re += kCell, im += kCell)
      for (int r = 0; r < kImaginary; r += kWidth) {
        const V a = half * load(f + r), b = half * load(g + r), c = half * load(f + kImaginary + r),
                d = half * load(g + kImaginary + r);
        store(re + r, a + b);
        store(im + r, c - d);
        store(re + kImaginary + r, c + d);
        store(im + kImaginary + r, b - a);
      }
  }
}

void join(const Pairs& t, int channels, int slots, const float* const* sums, std::size_t cells, float scale,
          float* spectrum) {
  const int blocks = sum_blocks(channels);
  const std::size_t stride = 2 * static_cast<std::size_t>(blocks) * kSecond;
  const V8 half = spread<V8>(0.5f * scale);
  for (int p = 0; p < t.count; ++p) {
    float *f = spectrum + t.pair[2 * p] * std::ptrdiff_t{kCell},
          *g = spectrum + t.pair[2 * p + 1] * std::ptrdiff_t{kCell};
    const auto total = [&](int block, int imaginary) __attribute__((always_inline)) {
      V8 sum{};
      if (block < blocks)
        for (int slot = 0; slot < slots; ++slot)
          sum += load<8>(sums[slot] + static_cast<std::size_t>(p) * stride +
                         static_cast<std::size_t>(block + imaginary * blocks) * kSecond);
      return half * sum;
    };
    for (int j = 0; j < static_cast<int>(cells); ++j, f += t.plane, g += t.plane)
      for (int k = 0; k < 2; ++k) {
        const V8 a_re = total(4 * j + k, 0), a_im = total(4 * j + k, 1), b_re = total(4 * j + 2 + k, 0),
                 b_im = total(4 * j + 2 + k, 1);
        store(f + 8 * k, a_re - b_im);
        store(f + 8 * k + kImaginary, a_im + b_re);
        store(g + 8 * k, a_re + b_im);
        store(g + 8 * k + kImaginary, b_re - a_im);
      }
  }
}

// ---- point by point ---------------------------------------------------------------------------------------------

// Calls body(cell's offset, mask of the cell or null) for every cell of the box.
template <class Body>
THALWEG_INLINE void for_cells(const Box& box, Body body) {
  std::ptrdiff_t at = 0;
  alignas(64) float row[kCell], mask[kCell];
  for (int z = 0; z < box.extent[0]; ++z)
    for (int y = 0; y < box.extent[1]; ++y) {
      if (box.mask[0] == nullptr) {
        for (int x = 0; x < box.extent[2]; ++x, at += kCell) body(at, static_cast<const float*>(nullptr));
        continue;
      }
      const float *mz = box.mask[0] + z * kCell, *my = box.mask[1] + y * kCell, *mx = box.mask[2];
      for (int k = 0; k < kCell; ++k) row[k] = mz[k] * my[k];
      for (int x = 0; x < box.extent[2]; ++x, at += kCell, mx += kCell) {
        for (int k = 0; k < kCell; ++k) mask[k] = row[k] * mx[k];
        body(at, static_cast<const float*>(mask));
      }
    }
}

using Bits = Lanes<kWidth>::Integer;

// One bit per value above 0.
THALWEG_INLINE std::uint32_t signs_of(V v) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(v, V{}, _CMP_GT_OQ);
#elif defined(__AVX__)
  return static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(v, V{}, _CMP_GT_OQ)));
#elif defined(__SSE__)
  return static_cast<std::uint32_t>(_mm_movemask_ps(_mm_cmpgt_ps(v, V{})));
#else
  std::uint32_t bits = 0;
  for (int k = 0; k < kWidth; ++k) bits |= static_cast<std::uint32_t>(v[k] > 0) << k;
  return bits;
#endif
}

// bit ? yes : no (in steps that stay vectors where the ternary operator falls apart into scalars).
THALWEG_INLINE V by_sign(std::uint32_t bits, V yes, V no) {
  Bits weight;
  for (int k = 0; k < kWidth; ++k) weight[k] = 1 << k;
  const Bits mask = ((static_cast<std::int32_t>(bits) - Bits{}) & weight) == weight;
  return reinterpret_cast<V>((mask & reinterpret_cast<Bits>(yes)) | (~mask & reinterpret_cast<Bits>(no)));
}

void activate(const Box& box, const float* bias, float slope, float* plane, std::uint32_t* signs) {
  alignas(64) float b[kCell];
  for (int k = 0; k < kCell; ++k) b[k] = bias[k / kSecond];
  const auto body = [&](std::ptrdiff_t at, const float* mask) __attribute__((always_inline)) {
    float* p = plane + at;
    std::uint32_t bits = 0;
#pragma GCC unroll 8
    for (int k = 0; k < kCell; k += kWidth) {
      const V v = load(p + k) + load(b + k), low = slope * v;
      V a = v > low ? v : low;
      bits |= signs_of(v) << k;
      if (mask != nullptr) a *= load(mask + k);
      store(p + k, a);
    }
    signs[at / kCell] = bits;
  };
  for_cells(box, body);
}

void pull(const Box& box, float slope, const std::uint32_t* signs, float* d) {
  const auto body = [&](std::ptrdiff_t at, const float* mask) __attribute__((always_inline)) {
    const std::uint32_t bits = signs[at / kCell];
#pragma GCC unroll 8
    for (int k = 0; k < kCell; k += kWidth) {
      const V v = load(d + at + k);
      V out = by_sign(bits >> k, v, slope * v);
      if (mask != nullptr) out *= load(mask + k);
      store(d + at + k, out);
    }
  };
  for_cells(box, body);
}

// ---- the last layer: one point ----------------------------------------------------------------------------------

void last(int points, int species, const float* w, const float* a, float* u) {
  for (int s = 0; s < species; ++s) {
    V8 sum[2][4] = {};
    for (int c = 0; c < kHidden; ++c) {
      const float* plane = a + static_cast<std::ptrdiff_t>(c / 2) * points * kCell + c % 2 * kSecond;
      const float* weight = w + (s * kHidden + c) * static_cast<std::ptrdiff_t>(points);
      for (int t = 0; t < points; ++t) {
        const V8 x = spread<V8>(weight[t]);
        sum[0][t % 4] += x * load<8>(plane + t * kCell);
        sum[1][t % 4] += x * load<8>(plane + t * kCell + kImaginary);
      }
    }
    for (int k = 0; k < 2; ++k) store(u + s * kGroup + k * 8, (sum[k][0] + sum[k][1]) + (sum[k][2] + sum[k][3]));
  }
}

void last_back(int points, int species, const float* w, const float* a, const float* du, float* d, float* dw) {
  for (int c = 0; c < kHidden; ++c) {
    const std::ptrdiff_t begin = static_cast<std::ptrdiff_t>(c / 2) * points * kCell + c % 2 * kSecond;
    const float* plane = a + begin;
    float* out = d + begin;
    for (int s = 0; s < species; ++s) {
      const V8 low = load<8>(du + s * kGroup), high = load<8>(du + s * kGroup + 8);
      const std::ptrdiff_t row = (s * kHidden + c) * static_cast<std::ptrdiff_t>(points);
      for (int t = 0; t < points; ++t) {
        const float x = w[row + t];
        const V8 re = x * low, im = x * high;
        store(out + t * kCell, s == 0 ? re : load<8>(out + t * kCell) + re);
        store(out + t * kCell + kImaginary, s == 0 ? im : load<8>(out + t * kCell + kImaginary) + im);
      }
      for (int t = 0; t < points; t += 8) {
        V8 r[8];
        const int count = points - t < 8 ? points - t : 8;
        for (int k = 0; k < 8; ++k) {
          const float* p = plane + (t + (k < count ? k : 0)) * kCell;
          r[k] = low * load<8>(p) + high * load<8>(p + kImaginary);
        }
        transpose(r);
        const V8 sum = ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]));
        for (int k = 0; k < count; ++k) dw[row + t + k] += sum[k];
      }
    }
  }
}

// ---- the first layer, atom by atom ------------------------------------------------------------------------------

void add_rows(const Piece* pieces, int count, bool to_images, float* stamps, std::ptrdiff_t stamp_row, float* images,
              std::ptrdiff_t image_row) {
  for (const Piece* p = pieces; p != pieces + count; ++p) {
    float *stamp = stamps + p->stamp, *image = images + p->image;
    const float* from = to_images ? stamp : image;
    float* to = to_images ? image : stamp;
    const std::ptrdiff_t from_row = to_images ? stamp_row : image_row, to_row = to_images ? image_row : stamp_row;
    for (int r = 0; r < p->rows; ++r, from += from_row, to += to_row) {
      int x = 0;
      if constexpr (kWidth == 16)
        for (; x + 16 <= p->width; x += 16) store(to + x, load(to + x) + load(from + x));
      for (; x < p->width; x += 8) store(to + x, load<8>(to + x) + load<8>(from + x));
    }
  }
}

void interleave(int rows, int width, const float* images, std::ptrdiff_t image, std::ptrdiff_t row, float* lanes) {
  for (int r = 0; r < rows; ++r)
    for (int x = 0; x < width; x += 8) {
      const int count = width - x < 8 ? width - x : 8;
      V8 t[8];
#pragma GCC unroll 8
      for (int l = 0; l < 8; ++l) t[l] = load<8>(images + l * image + r * row + x);
      transpose(t);
      if (count == 8) {
#pragma GCC unroll 8
        for (int k = 0; k < 8; ++k) store(lanes + k * kCell, t[k]);
      } else {
        for (int k = 0; k < count; ++k) store(lanes + k * kCell, t[k]);
      }
      lanes += count * kCell;
    }
}

void separate(int rows, int width, const float* lanes, float* images, std::ptrdiff_t image, std::ptrdiff_t row) {
  for (int r = 0; r < rows; ++r)
    for (int x = 0; x < width; x += 8) {
      const int count = width - x < 8 ? width - x : 8;
      V8 t[8];
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) t[k] = k < count ? load<8>(lanes + k * kCell) : V8{};
      transpose(t);
#pragma GCC unroll 8
      for (int l = 0; l < 8; ++l) store(images + l * image + r * row + x, t[l]);
      lanes += count * kCell;
    }
}

void total(std::size_t points, const float* plane, float* cell) {
  V sum[kCell / kWidth] = {};
  for (std::size_t t = 0; t < points; ++t, plane += kCell)
#pragma GCC unroll 8
    for (int k = 0; k < kCell / kWidth; ++k) sum[k] += load(plane + k * kWidth);
  for (int k = 0; k < kCell / kWidth; ++k) store(cell + k * kWidth, sum[k]);
}

// Up to eight elements of the kernel's rows at a time, from `first` on: shifted copies of a row of taps stay in
// registers while every row of the kernel meets them. kernel: eight floats longer than it is.
constexpr int kElements = 8;

template <int width>
THALWEG_INLINE void stamp_strip(const Stamp& s, int first, const float* kernel, const float* taps, float* out) {
  using T = Lanes<width>::Type;
  T shifted[kElements];
#pragma GCC unroll 8
  for (int n = 0; n < kElements; ++n) shifted[n] = first + n < s.kernel[2] ? load<width>(taps - first - n) : T{};
  kernel += first;
  for (int kz = 0; kz < s.kernel[0]; ++kz, out += (s.out[1] - s.kernel[1]) * std::ptrdiff_t{s.out_row})
    for (int ky = 0; ky < s.kernel[1]; ++ky, kernel += s.kernel[2], out += s.out_row) {
      T sum = load<width>(out);
#pragma GCC unroll 8
      for (int n = 0; n < kElements; ++n) sum += kernel[n] * shifted[n];
      store(out, sum);
    }
}

void stamp(const Stamp& s, const float* kernel, const float* taps, float* out) {
  const std::ptrdiff_t channel = static_cast<std::ptrdiff_t>(s.out[0]) * s.out[1] * s.out_row;
  const float* w = taps + s.tap_begin;
  for (int o = 0; o < kHidden; ++o)
    for (int z = 0; z < s.taps[0]; ++z)
      for (int y = 0; y < s.taps[1]; ++y, w += s.tap_row) {
        float* p = out + o * channel + (static_cast<std::ptrdiff_t>(z) * s.out[1] + y) * s.out_row;
        for (int first = 0; first < s.kernel[2]; first += kElements) {
          int x = 0;
          if constexpr (kWidth == 16)
            for (; x + 16 <= s.out_row; x += 16) stamp_strip<16>(s, first, kernel, w + x, p + x);
          for (; x < s.out_row; x += 8) stamp_strip<8>(s, first, kernel, w + x, p + x);
        }
      }
}

// Sums by element of the kernel's rows, over all rows; they are shifted into place at the end.
template <int width>
THALWEG_INLINE void tap_strip(const Stamp& s, int first, int x, const float* kernel, const float* out, float* taps) {
  typename Lanes<width>::Type sum[kElements] = {};
  kernel += first;
  out += x;
  for (int kz = 0; kz < s.kernel[0]; ++kz, out += (s.out[1] - s.kernel[1]) * std::ptrdiff_t{s.out_row})
    for (int ky = 0; ky < s.kernel[1]; ++ky, kernel += s.kernel[2], out += s.out_row) {
      const auto v = load<width>(out);
#pragma GCC unroll 8
      for (int n = 0; n < kElements; ++n) sum[n] += kernel[n] * v;
    }
  // what falls on either side of the taps lands in their row's margins
#pragma GCC unroll 8
  for (int n = 0; n < kElements; ++n)
    if (first + n < s.kernel[2]) store(taps + x - first - n, load<width>(taps + x - first - n) + sum[n]);
}

void stamp_taps(const Stamp& s, const float* kernel, const float* out, float* by_taps) {
  const std::ptrdiff_t channel = static_cast<std::ptrdiff_t>(s.out[0]) * s.out[1] * s.out_row;
  float* w = by_taps + s.tap_begin;
  for (int o = 0; o < kHidden; ++o)
    for (int z = 0; z < s.taps[0]; ++z)
      for (int y = 0; y < s.taps[1]; ++y, w += s.tap_row) {
        const float* p = out + o * channel + (static_cast<std::ptrdiff_t>(z) * s.out[1] + y) * s.out_row;
        for (int first = 0; first < s.kernel[2]; first += kElements) {
          int x = 0;
          if constexpr (kWidth == 16)
            for (; x + 16 <= s.out_row; x += 16) tap_strip<16>(s, first, x, kernel, p, w);
          for (; x < s.out_row; x += 8) tap_strip<8>(s, first, x, kernel, p, w);
        }
      }
}

void stamp_kernel(const Stamp& s, const float* taps, const float* out, float* by_kernel) {
  const std::ptrdiff_t channel = static_cast<std::ptrdiff_t>(s.out[0]) * s.out[1] * s.out_row;
  for (int kz = 0; kz < s.kernel[0]; ++kz)
    for (int ky = 0; ky < s.kernel[1]; ++ky)
      for (int kx = 0; kx < s.kernel[2]; ++kx, ++by_kernel) {
        const float* w = taps + s.tap_begin;
        V8 sum{};
        for (int o = 0; o < kHidden; ++o)
          for (int z = 0; z < s.taps[0]; ++z)
            for (int y = 0; y < s.taps[1]; ++y, w += s.tap_row) {
              const float* p =
                  out + o * channel + (static_cast<std::ptrdiff_t>(z + kz) * s.out[1] + y + ky) * s.out_row + kx;
              for (int x = 0; x < s.taps[2]; x += 8) sum += load<8>(w + x) * load<8>(p + x);
            }
        *by_kernel += ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
      }
}

void adam(std::size_t n, const float* gradient, float beta1, float beta2, float rate, float scale, float epsilon,
          float* parameters, float* first, float* second) {
  for (std::size_t k = 0; k < n; ++k) {
    const float g = gradient[k];
    first[k] = beta1 * first[k] + (1 - beta1) * g;
    second[k] = beta2 * second[k] + (1 - beta2) * (g * g);
    parameters[k] -= rate * first[k] / (std::sqrt(second[k]) * scale + epsilon);
  }
}

}  // namespace

const TrainingKernels& training_kernels() {
  static constexpr TrainingKernels table{lines,         multiply,     correlate,  unpack,   pack,  multiply_few,
                                         correlate_few, activate,     pull,       split,    join,  last,
                                         last_back,     add_rows,     interleave, separate, total, stamp,
                                         stamp_taps,    stamp_kernel, adam};
  return table;
}

}  // namespace thalweg::THALWEG_ISA
