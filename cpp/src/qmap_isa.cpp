// Inner loops of the Q-map; compiled once per instruction set (see isa.hpp for the rule of these units).
//
// What happens to one lane never depends on its neighbours: states that are computed side by side get the bits that
// they get alone.
#include "qmap_kernels.hpp"

namespace thalweg::THALWEG_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
using Real = float __attribute__((vector_size(kLanes * sizeof(float))));
using Eight = float __attribute__((vector_size(8 * sizeof(float))));

#define THALWEG_INLINE static inline __attribute__((always_inline))

template <class V = Real>
THALWEG_INLINE V load(const float* p) {
  V out;
  __builtin_memcpy(&out, p, sizeof(out));
  return out;
}
template <class V>
THALWEG_INLINE void store(float* p, V v) {
  __builtin_memcpy(p, &v, sizeof(v));
}
THALWEG_INLINE Real broadcast(float x) { return x - Real{}; }  // x - 0 is x for every x

// ---- Fourier transforms: Stockham's, decimation in frequency ------------------------------------------------
// With n = radix m left of a transform, s finished: element q + s (p + m j) of the input, j = 0 .. radix - 1, goes
// through a butterfly and, times exp(-2 pi i p j / n), to q + s (radix p + j) of the output.
struct Complex {
  Real re, im;
};
THALWEG_INLINE Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
THALWEG_INLINE Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
THALWEG_INLINE Complex operator*(float a, Complex b) { return {a * b.re, a * b.im}; }
THALWEG_INLINE Complex minus_i(Complex a) { return {a.im, -a.re}; }

THALWEG_INLINE void butterfly3(Complex a0, Complex a1, Complex a2, Complex& b0, Complex& b1, Complex& b2) {
  const Complex sum = a1 + a2, turned = minus_i(0.866025403784438647f * (a1 - a2));
  const Complex middle = a0 - 0.5f * sum;
  b0 = a0 + sum;
  b1 = middle + turned;
  b2 = middle - turned;
}

template <int radix>
THALWEG_INLINE void butterfly(Complex* a) {
  if constexpr (radix == 2) {
    const Complex b = a[0] - a[1];
    a[0] = a[0] + a[1];
    a[1] = b;
  } else if constexpr (radix == 3) {
    butterfly3(a[0], a[1], a[2], a[0], a[1], a[2]);
  } else if constexpr (radix == 4) {
    const Complex b0 = a[0] + a[2], b1 = a[0] - a[2], b2 = a[1] + a[3], b3 = minus_i(a[1] - a[3]);
    a[0] = b0 + b2;
    a[1] = b1 + b3;
    a[2] = b0 - b2;
    a[3] = b1 - b3;
  } else if constexpr (radix == 5) {
    const float c1 = 0.309016994374947424f, c2 = -0.809016994374947424f, s1 = 0.951056516295153572f,
                s2 = 0.587785252292473129f;
    const Complex p1 = a[1] + a[4], q1 = a[1] - a[4], p2 = a[2] + a[3], q2 = a[2] - a[3];
    const Complex u1 = a[0] + c1 * p1 + c2 * p2, u2 = a[0] + c2 * p1 + c1 * p2;
    const Complex w1 = minus_i(s1 * q1 + s2 * q2), w2 = minus_i(s2 * q1 - s1 * q2);
    a[0] = a[0] + p1 + p2;
    a[1] = u1 + w1;
    a[4] = u1 - w1;
    a[2] = u2 + w2;
    a[3] = u2 - w2;
  } else {  // 6 = 2 x 3 without twiddles (Good): element 3 i + 2 j mod 6 goes in, 3 i + 4 j mod 6 comes out
    Complex e0, e1, e2, o0, o1, o2;
    butterfly3(a[0], a[2], a[4], e0, e1, e2);
    butterfly3(a[3], a[5], a[1], o0, o1, o2);
    a[0] = e0 + o0;
    a[4] = e1 + o1;
    a[2] = e2 + o2;
    a[3] = e0 - o0;
    a[1] = e1 - o1;
    a[5] = e2 - o2;
  }
}

template <int radix, class Load, class Store>
THALWEG_INLINE void pass(int m, int s, const float* twiddle, Load take, Store put) {
  for (int p = 0; p < m; ++p) {
    for (int q = 0; q < s; ++q) {
      Complex a[radix];
#pragma GCC unroll 8
      for (int j = 0; j < radix; ++j) a[j] = take(q + s * (p + m * j));
      butterfly<radix>(a);
      const int out = q + s * radix * p;
      put(out, a[0]);
      if (p == 0) {
#pragma GCC unroll 8
        for (int j = 1; j < radix; ++j) put(out + s * j, a[j]);
      } else {
#pragma GCC unroll 8
        for (int j = 1; j < radix; ++j) {
          const float c = twiddle[2 * ((radix - 1) * p + j - 1)], d = twiddle[2 * ((radix - 1) * p + j - 1) + 1];
          put(out + s * j, Complex{a[j].re * c - a[j].im * d, a[j].im * c + a[j].re * d});
        }
      }
    }
  }
}

template <class Load, class Store>
THALWEG_INLINE void any_pass(int radix, int m, int s, const float* twiddle, Load take, Store put) {
  switch (radix) {
    case 2:
      return pass<2>(m, s, twiddle, take, put);
    case 3:
      return pass<3>(m, s, twiddle, take, put);
    case 4:
      return pass<4>(m, s, twiddle, take, put);
    case 5:
      return pass<5>(m, s, twiddle, take, put);
    default:
      return pass<6>(m, s, twiddle, take, put);
  }
}

// Transforms of two or (third > 1) three passes, with everything but the strides known to the compiler. clipped: not
// all elements are given or wanted.
THALWEG_INLINE Complex turned(Complex a, const float* twiddle) {
  const float c = twiddle[0], d = twiddle[1];
  return {a.re * c - a.im * d, a.im * c + a.re * d};
}

template <int first, int second, int third, bool clipped>
THALWEG_INLINE void fft_in(const FftPlan& plan, const FftRun& run) {
  constexpr int n = first * second * third, m = second * third, s = third == 1 ? first : first * second;
  constexpr int last = third == 1 ? second : third;
  const std::int64_t in_im = run.in_im - run.in_re, out_im = run.out_im - run.out_re;
  const int valid = clipped ? run.valid : n, from = clipped ? run.from : 0, to = clipped ? run.to : n;
  Complex one[n], two[third == 1 ? 1 : n];
  for (std::int64_t k = 0; k < run.count; ++k) {
    const float* in = run.in_re + k * run.in_step;
    float* out = run.out_re + k * run.out_step;
    if (run.ahead != 0) {
      for (int j = 0; j < valid; ++j) {
        __builtin_prefetch(in + j * run.in_stride + run.ahead);
        __builtin_prefetch(in + j * run.in_stride + in_im + run.ahead);
      }
    }
    for (int p = 0; p < m; ++p) {
      Complex a[first];
#pragma GCC unroll 8
      for (int j = 0; j < first; ++j) {
        const float* here = in + (p + m * j) * run.in_stride;
        a[j] = p + m * j < valid ? Complex{load(here), load(here + in_im)} : Complex{};
      }
      butterfly<first>(a);
      Complex* here = one + first * p;
      const float* twiddle = plan.twiddle + 2 * (first - 1) * p;
      here[0] = a[0];
#pragma GCC unroll 8
      for (int j = 1; j < first; ++j) here[j] = p == 0 ? a[j] : turned(a[j], twiddle + 2 * j - 2);
    }
    if constexpr (third > 1) {
      for (int p = 0; p < third; ++p) {
        const float* twiddle = plan.twiddle + 2 * m * (first - 1) + 2 * (second - 1) * p;
        for (int q = 0; q < first; ++q) {
          Complex a[second];
#pragma GCC unroll 8
          for (int j = 0; j < second; ++j) a[j] = one[q + first * (p + third * j)];
          butterfly<second>(a);
          Complex* here = two + q + first * second * p;
          here[0] = a[0];
#pragma GCC unroll 8
          for (int j = 1; j < second; ++j) here[first * j] = p == 0 ? a[j] : turned(a[j], twiddle + 2 * j - 2);
        }
      }
    }
    const Complex* ready = third == 1 ? one : two;
    for (int q = 0; q < s; ++q) {
      Complex a[last];
#pragma GCC unroll 8
      for (int j = 0; j < last; ++j) a[j] = ready[q + s * j];
      butterfly<last>(a);
#pragma GCC unroll 8
      for (int j = 0; j < last; ++j) {
        const int element = q + s * j;
        if (element < from || element >= to) continue;
        float* here = out + element * run.out_stride;
        store(here, a[j].re);
        store(here + out_im, a[j].im);
      }
    }
  }
}

template <int first, int second, int third = 1>
void fft_of(const FftPlan& plan, const FftRun& run) {
  if (third == 1 && run.valid == plan.n && run.from == 0 && run.to == plan.n)
    fft_in<first, second, third, false>(plan, run);
  else
    fft_in<first, second, third, true>(plan, run);
}

void fft_any(const FftPlan& plan, const FftRun& run) {
  Complex first[kMostFft], second[kMostFft];
  for (std::int64_t k = 0; k < run.count; ++k) {
    const float *in_re = run.in_re + k * run.in_step, *in_im = run.in_im + k * run.in_step;
    float *out_re = run.out_re + k * run.out_step, *out_im = run.out_im + k * run.out_step;
    const auto take = [&](int j) __attribute__((always_inline)) {
      if (run.ahead != 0 && j < run.valid) {
        __builtin_prefetch(in_re + j * run.in_stride + run.ahead);
        __builtin_prefetch(in_im + j * run.in_stride + run.ahead);
      }
      return j < run.valid ? Complex{load(in_re + j * run.in_stride), load(in_im + j * run.in_stride)} : Complex{};
    };
    const auto put = [&](int j, Complex v) __attribute__((always_inline)) {
      if (j < run.from || j >= run.to) return;
      store(out_re + j * run.out_stride, v.re);
      store(out_im + j * run.out_stride, v.im);
    };
    if (plan.passes == 0) put(0, take(0));
    Complex *x = first, *y = second;
    int n = plan.n, s = 1;
    const float* twiddle = plan.twiddle;
    for (int stage = 0; stage < plan.passes; ++stage) {
      const int radix = plan.radix[stage], m = n / radix;
      const auto take_local = [x](int j) __attribute__((always_inline)) { return x[j]; };
      const auto put_local = [y](int j, Complex v) __attribute__((always_inline)) { y[j] = v; };
      if (stage == 0 && m == 1)
        any_pass(radix, m, s, twiddle, take, put);
      else if (stage == 0)
        any_pass(radix, m, s, twiddle, take, put_local);
      else if (m == 1)
        any_pass(radix, m, s, twiddle, take_local, put);
      else
        any_pass(radix, m, s, twiddle, take_local, put_local);
      twiddle += 2 * m * (radix - 1);
      Complex* swap = x;
      x = y;
      y = swap;
      n = m;
      s *= radix;
    }
  }
}

void fft(const FftPlan& plan, const FftRun& run) {
  if (plan.passes == 2 || plan.passes == 3) {
    switch (100 * plan.radix[0] + 10 * plan.radix[1] + (plan.passes == 3 ? plan.radix[2] : 0)) {
      case 440:
        return fft_of<4, 4>(plan, run);
      case 540:
        return fft_of<5, 4>(plan, run);
      case 550:
        return fft_of<5, 5>(plan, run);
      case 560:
        return fft_of<5, 6>(plan, run);
      case 620:
        return fft_of<6, 2>(plan, run);
      case 630:
        return fft_of<6, 3>(plan, run);
      case 640:
        return fft_of<6, 4>(plan, run);
      case 660:
        return fft_of<6, 6>(plan, run);
      case 442:
        return fft_of<4, 4, 2>(plan, run);
      case 533:
        return fft_of<5, 3, 3>(plan, run);
      case 542:
        return fft_of<5, 4, 2>(plan, run);
      case 552:
        return fft_of<5, 5, 2>(plan, run);
      case 562:
        return fft_of<5, 6, 2>(plan, run);
      case 633:
        return fft_of<6, 3, 3>(plan, run);
      case 642:
        return fft_of<6, 4, 2>(plan, run);
      case 662:
        return fft_of<6, 6, 2>(plan, run);
      default:
        break;
    }
  }
  fft_any(plan, run);
}

// ---- products of spectra ------------------------------------------------------------------------------------
// Keeps a value in a register: the compiler would rather read it again as the operand of each multiply-add, and reads
// that cross a cache line are what these loops are bound by.
template <class V>
THALWEG_INLINE void pin(V& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#else
  (void)v;
#endif
}

// `group` columns at a frequency f and, if paired, as many at -f, where the weights are conjugate.
template <int group, bool paired>
THALWEG_INLINE void multiply(const float* w, int inputs, int outputs, const float* const (&in)[2], std::int64_t in_im,
                             float* const (&out)[2], std::int64_t out_im) {
  constexpr int sides = paired ? 2 : 1;
  Real re[sides][group] = {}, im[sides][group] = {};
  const float* w_im = w + inputs * outputs;
  for (int i = 0; i < inputs; ++i) {
    Real wr = load(w + i * outputs), wi = load(w_im + i * outputs);
    pin(wr);
    pin(wi);
#pragma GCC unroll 2
    for (int side = 0; side < sides; ++side) {
#pragma GCC unroll 8
      for (int g = 0; g < group; ++g) {
        Real a = broadcast(in[side][g * inputs + i]);
        pin(a);
        re[side][g] += wr * a;
        im[side][g] = side == 0 ? im[side][g] + wi * a : im[side][g] - wi * a;
      }
#pragma GCC unroll 8
      for (int g = 0; g < group; ++g) {
        Real a = broadcast(in[side][in_im + g * inputs + i]);
        pin(a);
        re[side][g] = side == 0 ? re[side][g] - wi * a : re[side][g] + wi * a;
        im[side][g] += wr * a;
      }
    }
  }
#pragma GCC unroll 2
  for (int side = 0; side < sides; ++side)
#pragma GCC unroll 8
    for (int g = 0; g < group; ++g) {  // in order: each store spoils what the next one sets right
      store(out[side] + g * outputs, re[side][g]);
      store(out[side] + out_im + g * outputs, im[side][g]);
    }
}

// Columns from `column` on in groups; returns the first one left over.
template <int group, bool paired>
THALWEG_INLINE int multiply_columns(const SpectrumProduct& job, int column, const float* w, int o,
                                    const float* const (&in)[2], float* const (&out)[2]) {
  for (; column + group <= job.columns; column += group) {
    const int from = column * job.inputs, to = column * job.outputs + o;
    multiply<group, paired>(w + o, job.inputs, job.outputs, {in[0] + from, in[1] + from}, job.in_im,
                            {out[0] + to, out[1] + to}, job.out_im);
  }
  return column;
}

// Rows of weights are too short for the processor to read ahead by itself.
THALWEG_INLINE void ask_for_weights(const SpectrumProduct& job, const float* w) {
  if (job.weights_ahead == 0) return;
  for (std::int64_t k = 0; k < job.weight_step; k += 16) __builtin_prefetch(w + job.weights_ahead + k);
}

template <bool paired>
void product_as(const SpectrumProduct& job) {
  constexpr int most = paired && kLanes < 16 ? 2 : 4;
  for (int k = 0; k < job.count; ++k) {
    const float* w = job.weights + k * job.weight_step;
    ask_for_weights(job, w);
    const int minus = k == 0 ? 0 : job.count - k;
    const float* const in[2] = {job.in[0] + k * job.in_step, job.in[1] + minus * job.in_step};
    float* const out[2] = {job.out[0] + k * job.out_step, job.out[1] + minus * job.out_step};
    // The last, partly filled block of outputs first: it runs into the first block of the next column.
    for (int o = (job.outputs - 1) / kLanes * kLanes; o >= 0; o -= kLanes) {
      int column = multiply_columns<most, paired>(job, 0, w, o, in, out);
      if (most > 2) column = multiply_columns<2, paired>(job, column, w, o, in, out);
      multiply_columns<1, paired>(job, column, w, o, in, out);
    }
  }
}

// The last layer of two species on a lattice of eight phases: with an output a lane most lanes would be idle. Here the
// columns of both sides are lanes, each with two outputs. The sums are those of `multiply`, to the bit.
constexpr struct {
  int columns = 4, inputs = 10, outputs = 2;
} kFew;

template <int number>
struct Group {
  static constexpr int value = number;
};

#if defined(__AVX__)
#if defined(__AVX512F__)
#define THALWEG_SHUFFLE(a, b, i, j, k, l)                                                                           \
  __builtin_shufflevector(a, b, i, j, k, l, i + 4, j + 4, k + 4, l + 4, i + 8, j + 8, k + 8, l + 8, i + 12, j + 12, \
                          k + 12, l + 12)
#define THALWEG_TWICE(a, b, i)                                                                                  \
  __builtin_shufflevector(a, b, i, i, i + 1, i + 1, i + 2, i + 2, i + 3, i + 3, 16 + i, 16 + i, 17 + i, 17 + i, \
                          18 + i, 18 + i, 19 + i, 19 + i)
#else
#define THALWEG_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l, i + 4, j + 4, k + 4, l + 4)
#define THALWEG_TWICE(a, b, i) __builtin_shufflevector(a, b, i, i, i + 1, i + 1, i + 2, i + 2, i + 3, i + 3)
#endif

// Four rows: out[k] holds their elements k, then their elements k + 4, ...
THALWEG_INLINE void transpose(const float* const (&row)[4], Real (&out)[4]) {
  constexpr int n = kLanes;
  const Real a = load(row[0]), b = load(row[1]), c = load(row[2]), d = load(row[3]);
  const Real ab = THALWEG_SHUFFLE(a, b, 0, n, 1, n + 1), ab2 = THALWEG_SHUFFLE(a, b, 2, n + 2, 3, n + 3),
             cd = THALWEG_SHUFFLE(c, d, 0, n, 1, n + 1), cd2 = THALWEG_SHUFFLE(c, d, 2, n + 2, 3, n + 3);
  out[0] = THALWEG_SHUFFLE(ab, cd, 0, 1, n, n + 1);
  out[1] = THALWEG_SHUFFLE(ab, cd, 2, 3, n + 2, n + 3);
  out[2] = THALWEG_SHUFFLE(ab2, cd2, 0, 1, n, n + 1);
  out[3] = THALWEG_SHUFFLE(ab2, cd2, 2, 3, n + 2, n + 3);
}

THALWEG_INLINE Eight eight(Real v, int number) {
  Eight half[kLanes / 8];
  __builtin_memcpy(half, &v, sizeof(v));
  return half[number];
}

THALWEG_INLINE Real broadcast_pair(const float* p) {
  using Pairs = std::int64_t __attribute__((vector_size(kLanes * sizeof(float))));
  std::int64_t pair;
  __builtin_memcpy(&pair, p, sizeof(pair));
  return (Real)(pair - Pairs{});
}

// Elements 4 l + k, l = `group`, of the rows of both sides, each twice, times their weights.
template <int group>
THALWEG_INLINE void few_input(const Real (&re)[2][4], const Real (&im)[2][4], int k, const float* w, Real sign,
                              Real& sum_re, Real& sum_im) {
  if (4 * group + k >= kFew.inputs) return;
  const float* weight = w + (4 * group + k) * kFew.outputs;
  const Real wr = broadcast_pair(weight), wi = sign * broadcast_pair(weight + kFew.inputs * kFew.outputs);
  const Real xr = THALWEG_TWICE(re[0][k], re[1][k], 4 * (group % (kLanes / 4))),
             xi = THALWEG_TWICE(im[0][k], im[1][k], 4 * (group % (kLanes / 4)));
  sum_re += wr * xr;
  sum_im += wi * xr;
  sum_re -= wi * xi;
  sum_im += wr * xi;
}

// sides: how many of them a register holds
template <int sides>
THALWEG_INLINE void few(const SpectrumProduct& job, const float* w, const float* const (&in)[2], float* const (&out)[2],
                        Real sign) {
  Real sum_re = {}, sum_im = {}, re[2][4] = {}, im[2][4] = {};
  const auto take = [&](int first) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int side = 0; side < sides; ++side) {
      const float* a = in[side] + first;
      transpose({a, a + kFew.inputs, a + 2 * kFew.inputs, a + 3 * kFew.inputs}, re[side]);
      a += job.in_im;
      transpose({a, a + kFew.inputs, a + 2 * kFew.inputs, a + 3 * kFew.inputs}, im[side]);
    }
  };
  const auto add = [&](auto group) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) few_input<decltype(group)::value>(re, im, k, w, sign, sum_re, sum_im);
  };
  take(0);
  add(Group<0>{});
  add(Group<1>{});
  if (kLanes == 8) take(8);
  add(Group<2>{});
#pragma GCC unroll 2
  for (int side = 0; side < sides; ++side) {
    store(out[side], eight(sum_re, side));
    store(out[side] + job.out_im, eight(sum_im, side));
  }
}

void product_of_few(const SpectrumProduct& job) {
  const Real plus = broadcast(1.0f), minus = broadcast(-1.0f);
  Real both = plus;
  for (int k = 8; k < kLanes; ++k) both[k] = -1.0f;
  for (int k = 0; k < job.count; ++k) {
    const float* w = job.weights + k * job.weight_step;
    ask_for_weights(job, w);
    const int other = k == 0 ? 0 : job.count - k;
    const float* const in[2] = {job.in[0] + k * job.in_step, job.in[1] + other * job.in_step};
    float* const out[2] = {job.out[0] + k * job.out_step, job.out[1] + other * job.out_step};
    if (!job.paired) {
      few<1>(job, w, in, out, plus);
    } else if constexpr (kLanes > 8) {
      few<2>(job, w, in, out, both);
    } else {
      few<1>(job, w, in, out, plus);
      few<1>(job, w, {in[1], in[0]}, {out[1], out[0]}, minus);
    }
  }
}
#undef THALWEG_SHUFFLE
#undef THALWEG_TWICE
#else
void product_of_few(const SpectrumProduct& job) { job.paired ? product_as<true>(job) : product_as<false>(job); }
#endif

void product(const SpectrumProduct& job) {
  if (job.columns == kFew.columns && job.inputs == kFew.inputs && job.outputs == kFew.outputs)
    product_of_few(job);
  else
    job.paired ? product_as<true>(job) : product_as<false>(job);
}

// ---- direct convolution -------------------------------------------------------------------------------------
// Sums of a row of taps are rounded before they enter the total: a single chain over thousands of taps loses two
// digits.
template <int voxels>
THALWEG_INLINE void direct_voxels(const DirectRow& row, const float* in, float* out, int o) {
  Real total[voxels];
  const Real bias = load(row.bias + o);
#pragma GCC unroll 8
  for (int v = 0; v < voxels; ++v) total[v] = bias;
  const int inputs = row.inputs;
  for (int r = 0; r < row.rows; ++r) {
    const float* w = row.weights + row.weight_row[r] * inputs * row.padded_outputs + o;
    const float* a = in + row.in_row[r];
    Real sum[voxels] = {};
    for (int t = 0; t < row.taps; ++t, a += row.tap_step)
      for (int i = 0; i < inputs; ++i, w += row.padded_outputs) {
        const Real weight = load(w);
#pragma GCC unroll 8
        for (int v = 0; v < voxels; ++v) sum[v] += weight * a[v * inputs + i];
      }
#pragma GCC unroll 8
    for (int v = 0; v < voxels; ++v) total[v] += sum[v];
  }
  const int count = row.outputs - o < kLanes ? row.outputs - o : kLanes;
  for (int v = 0; v < voxels; ++v)
    for (int k = 0; k < count; ++k) out[v * row.outputs + o + k] = total[v][k];
}

void direct_row(const DirectRow& row, const float* in, float* out, std::int64_t n) {
  for (int o = 0; o < row.outputs; o += kLanes) {
    std::int64_t x = 0;
    for (; x + 8 <= n; x += 8) direct_voxels<8>(row, in + x * row.inputs, out + x * row.outputs, o);
    for (; x + 4 <= n; x += 4) direct_voxels<4>(row, in + x * row.inputs, out + x * row.outputs, o);
    for (; x < n; ++x) direct_voxels<1>(row, in + x * row.inputs, out + x * row.outputs, o);
  }
}

// ---- the last layer at chosen voxels ------------------------------------------------------------------------
THALWEG_INLINE float sum_of(Real v) {
  float part[kLanes];
  store(part, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int k = 0; k < width; ++k) part[k] += part[k + width];
  return part[0];
}

// sum += weights of a row times the numbers at a[voxel] + offset
template <int outputs, int voxels>
THALWEG_INLINE void gather_row(const float* w, int padded, const float* const* a, std::int64_t offset,
                               Real (&sum)[outputs][voxels]) {
  for (int k = 0; k < padded; k += kLanes) {
    Real weight[outputs];
#pragma GCC unroll 3
    for (int c = 0; c < outputs; ++c) weight[c] = load(w + c * padded + k);
#pragma GCC unroll 12
    for (int v = 0; v < voxels; ++v) {
      Real x = load(a[v] + (offset + k));
      pin(x);
#pragma GCC unroll 3
      for (int c = 0; c < outputs; ++c) sum[c][v] += weight[c] * x;
    }
  }
}

// The taps of plane z for a group of voxels.
template <int outputs, int voxels>
THALWEG_INLINE void gather_plane(const Gather& job, const std::int32_t* voxel, int count, int o, int z, float* sums) {
  Real sum[outputs][voxels];
#pragma GCC unroll 3
  for (int c = 0; c < outputs; ++c)
#pragma GCC unroll 12
    for (int v = 0; v < voxels; ++v) sum[c][v] = load(sums + (c * voxels + v) * kLanes);
  const float *start[voxels], *a[voxels];
  const std::int64_t* row[voxels];
  const std::int64_t last = (job.rows_y - 1) * job.step;
  bool linear = true;  // no voxel is near a wall or a seam in y: rows follow at equal distances
#pragma GCC unroll 12
  for (int v = 0; v < voxels; ++v) {
    const std::int32_t* at = voxel + 3 * (v < count ? v : count - 1);  // the last voxel again instead of a special case
    start[v] = job.in + job.column[at[2]] + job.plane[at[0] + z * job.step];
    row[v] = job.row + at[1];
    linear &= row[v][last] - row[v][0] == last * job.row_stride;
    a[v] = start[v] + row[v][0];
  }
  const std::int64_t row_of_weights = static_cast<std::int64_t>(job.outputs) * job.padded;
  const float* w = job.weights + z * job.rows_y * row_of_weights + o * job.padded;
  for (int y = 0; y < job.rows_y; ++y, w += row_of_weights) {
    if (linear) {
      gather_row<outputs, voxels>(w, job.padded, a, job.step * y * job.row_stride, sum);
    } else {
#pragma GCC unroll 12
      for (int v = 0; v < voxels; ++v) a[v] = start[v] + row[v][y * job.step];
      gather_row<outputs, voxels>(w, job.padded, a, 0, sum);
    }
  }
#pragma GCC unroll 3
  for (int c = 0; c < outputs; ++c)
#pragma GCC unroll 12
    for (int v = 0; v < voxels; ++v) store(sums + (c * voxels + v) * kLanes, sum[c][v]);
}

// As many voxels at once as the registers hold sums; groups of them plane by plane, so that a plane's weights stay in
// the first cache.
template <int outputs>
void gather_outputs(const Gather& job, const std::int32_t* voxels, std::int64_t n, int o, float* out) {
  constexpr int registers = kLanes == 16 ? 24 : 12;
  constexpr int most = registers / outputs, at_once = most < 8 ? most : 8, groups = 8, block = groups * at_once;
  alignas(64) float sums[groups * outputs * at_once * kLanes];
  for (std::int64_t first = 0; first < n; first += block) {
    const int count = n - first < block ? static_cast<int>(n - first) : block;
    for (int k = 0; k < groups * outputs * at_once * kLanes; ++k) sums[k] = 0.0f;
    for (int z = 0; z < job.rows_z; ++z)
      for (int v = 0; v < count; v += at_once)
        gather_plane<outputs, at_once>(job, voxels + 3 * (first + v), count - v < at_once ? count - v : at_once, o, z,
                                       sums + v * outputs * kLanes);
    for (int v = 0; v < count; ++v)
      for (int c = 0; c < outputs; ++c) {
        const float* sum = sums + (v / at_once * outputs * at_once + c * at_once + v % at_once) * kLanes;
        out[(first + v) * job.outputs + o + c] = sum_of(load(sum)) + job.bias[o + c];
      }
  }
}

void gather(const Gather& job, const std::int32_t* voxels, std::int64_t n, float* out) {
  for (int o = 0; o < job.outputs;) {
    const int left = job.outputs - o;
    if (left == 1) {
      gather_outputs<1>(job, voxels, n, o, out);
      o += 1;
    } else if (left == 3) {
      gather_outputs<3>(job, voxels, n, o, out);
      o += 3;
    } else {
      gather_outputs<2>(job, voxels, n, o, out);
      o += 2;
    }
  }
}

// ---- runs ---------------------------------------------------------------------------------------------------
// Calls body(run, first element of the run, vector type) so that a run of `channels` numbers is covered; everything is
// read before anything is written (the two vectors of a run of ten overlap).
template <class Two, class Each>
THALWEG_INLINE void by_runs(std::int64_t n, int channels, Two two, Each each) {
  if (channels == 10) {
    for (std::int64_t k = 0; k < n; ++k) two(k);
  } else {
    for (std::int64_t k = 0; k < n; ++k)
      for (int c = 0; c < channels; ++c) each(k, c);
  }
}

template <int length>
void copy_runs_of(std::int64_t n, const float* in, std::int64_t in_step, std::int64_t ahead, float* out,
                  std::int64_t out_step) {
  for (std::int64_t k = 0; k < n; ++k, in += in_step, out += out_step) {
    __builtin_prefetch(in + ahead);
    if (length > 16) __builtin_prefetch(in + ahead + 16);
    __builtin_memcpy(out, in, length * sizeof(float));
  }
}

void copy_runs(std::int64_t n, std::int32_t length, const float* in, std::int64_t in_step, std::int64_t ahead,
               float* out, std::int64_t out_step) {
  switch (length) {  // ten channels, one and two species; two and three phases of them
    case 1:
      return copy_runs_of<1>(n, in, in_step, ahead, out, out_step);
    case 2:
      return copy_runs_of<2>(n, in, in_step, ahead, out, out_step);
    case 4:
      return copy_runs_of<4>(n, in, in_step, ahead, out, out_step);
    case 10:
      return copy_runs_of<10>(n, in, in_step, ahead, out, out_step);
    case 20:
      return copy_runs_of<20>(n, in, in_step, ahead, out, out_step);
    case 30:
      return copy_runs_of<30>(n, in, in_step, ahead, out, out_step);
    default:
      for (std::int64_t k = 0; k < n; ++k)
        for (int c = 0; c < length; ++c) out[k * out_step + c] = in[k * in_step + c];
  }
}

void scaled_runs(std::int64_t n, std::int32_t channels, float weight, const float* in, std::int64_t in_step, float* out,
                 std::int64_t out_step) {
  by_runs(
      n, channels,
      [=](std::int64_t k) {
        const float* from = in + k * in_step;
        float* to = out + k * out_step;
        const Eight a = load<Eight>(to) + weight * load<Eight>(from),
                    b = load<Eight>(to + 2) + weight * load<Eight>(from + 2);
        store(to, a);
        store(to + 2, b);
      },
      [=](std::int64_t k, int c) { out[k * out_step + c] += weight * in[k * in_step + c]; });
}

void add_runs(std::int64_t n, std::int32_t channels, const float* in, std::int64_t in_step, float* out,
              std::int64_t out_step) {
  by_runs(
      n, channels,
      [=](std::int64_t k) {
        const float* from = in + k * in_step;
        float* to = out + k * out_step;
        const Eight a = load<Eight>(to) + load<Eight>(from), b = load<Eight>(to + 2) + load<Eight>(from + 2);
        store(to, a);
        store(to + 2, b);
      },
      [=](std::int64_t k, int c) { out[k * out_step + c] += in[k * in_step + c]; });
}

constexpr float kSlope = 0.01f, kInverseSlope = 100.0f;

// Calls body(place in state, place in the runs, vector type as a value) for every vector of the runs at state +
// offset[k]; runs that follow each other in the state are taken as one.
template <class V, class Body>
THALWEG_INLINE void vectors(std::int64_t from, std::int64_t to, Body body) {
  constexpr int lanes = sizeof(V) / sizeof(float);
  for (; from + lanes <= to; from += lanes) body(from, V{});
  if constexpr (lanes > 2) {
    using Half = float __attribute__((vector_size(sizeof(V) / 2)));
    vectors<Half>(from, to, body);
  } else if (from < to) {
    body(from, 0.0f);
  }
}
template <class Body>
THALWEG_INLINE void each_vector(std::int64_t n, int channels, const std::int64_t* offset, float* state,
                                std::int64_t ahead, Body body) {
  for (std::int64_t k = 0; k < n;) {
    std::int64_t end = k + 1;
    while (end < n && offset[end] == offset[end - 1] + channels) ++end;
    float* s = state + offset[k];
    const std::int64_t first = k * channels;
    if (end == k + 1 && channels == 10) {
      using Two = float __attribute__((vector_size(2 * sizeof(float))));
      __builtin_prefetch(s + ahead, 1);
      body(s, first, Eight{});
      body(s + 8, first + 8, Two{});
      k = end;
      continue;
    }
    vectors<Real>(0, (end - k) * channels, [=](std::int64_t at, auto v) __attribute__((always_inline)) {
      __builtin_prefetch(s + at + ahead, 1);
      body(s + at, first + at, v);
    });
    k = end;
  }
}

// What a change of its pre-activation does to an activation. The pre-activation is not kept: leaky ReLU is one to one.
template <bool linear>
void update_as(std::int64_t n, std::int32_t channels, const std::int64_t* offset, float* state, std::int64_t ahead,
               float* change, float* saved) {
  each_vector(n, channels, offset, state, ahead,
              [=](float* s, std::int64_t at, auto zero) __attribute__((always_inline)) {
                using V = decltype(zero);
                const V a = load<V>(s), d = load<V>(change + at);
                store(saved + at, a);
                if constexpr (linear) {
                  store(s, a + d);
                } else {
                  const V before = a > zero ? a : a * kInverseSlope, after = before + d;
                  const V now = after > zero ? after : after * kSlope;
                  store(s, now);
                  store(change + at, now - a);
                }
              });
}

void update(std::int64_t n, std::int32_t channels, bool linear, const std::int64_t* offset, float* state,
            std::int64_t ahead, float* change, float* saved) {
  (linear ? update_as<true> : update_as<false>)(n, channels, offset, state, ahead, change, saved);
}

void exchange(std::int64_t n, std::int32_t channels, const std::int64_t* offset, float* state, std::int64_t ahead,
              float* saved) {
  each_vector(n, channels, offset, state, ahead,
              [=](float* s, std::int64_t at, auto zero) __attribute__((always_inline)) {
                using V = decltype(zero);
                const V a = load<V>(s), b = load<V>(saved + at);
                store(s, b);
                store(saved + at, a);
              });
}

void leaky(std::int64_t n, float* x) {
  for (std::int64_t k = 0; k < n; ++k) x[k] = x[k] > 0 ? x[k] : x[k] * kSlope;
}

// tanh |x| = 1 - 2 / (exp(2 |x|) + 1), absolute error below 2e-7. exp: 2 |x| = k ln 2 + f, Taylor series of exp f.
void tanh(std::int64_t n, float* x) {
  using Whole = std::int32_t __attribute__((vector_size(kLanes * sizeof(float))));
  for (std::int64_t start = 0; start < n; start += kLanes) {
    const std::int64_t count = n - start < kLanes ? n - start : kLanes;
    float part[kLanes] = {};
    for (std::int64_t k = 0; k < count; ++k) part[k] = x[start + k];
    const Real v = load(part);
    Real twice = v > Real{} ? v + v : -(v + v);
    twice = twice < broadcast(20.0f) ? twice : broadcast(20.0f);
    const Real magic = broadcast(0x1.8p23f);
    const Real shifted = twice * 1.44269504088896341f + magic;
    const Real k = shifted - magic;
    const Real f = (twice - k * 0.693359375f) + k * 2.12194440e-4f;
    Real p = f * (1.0f / 5040.0f) + 1.0f / 720.0f;
    p = p * f + 1.0f / 120.0f;
    p = p * f + 1.0f / 24.0f;
    p = p * f + 1.0f / 6.0f;
    p = p * f + 0.5f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    const Real e = (Real)((Whole)p + ((Whole)shifted << 23));
    const Real t = 1.0f - 2.0f / (e + 1.0f);
    store(part, v > Real{} ? t : -t);
    for (std::int64_t i = 0; i < count; ++i) x[start + i] = v[i] == v[i] ? part[i] : v[i];
  }
}

}  // namespace

const QmapKernels& qmap_kernels() {
  static constexpr QmapKernels table{kLanes,   fft,         product, direct_row, gather, copy_runs,
                                     add_runs, scaled_runs, update,  exchange,   leaky,  tanh};
  return table;
}

}  // namespace thalweg::THALWEG_ISA
