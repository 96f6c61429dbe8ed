#include <cmath>
#include <cstdint>

#include "soap_kernels.hpp"

namespace thalweg::THALWEG_ISA {
namespace {

#ifdef __AVX512F__
constexpr std::size_t kWide = 8;
#else
constexpr std::size_t kWide = 4;
#endif
static_assert(kSoapLanes % kWide == 0);
constexpr std::size_t kNarrow = 4;
constexpr std::size_t kMostL = 12, kMostHarmonics = (kMostL + 1) * (kMostL + 1);  // soap.cpp checks
constexpr std::size_t kMostExponents = 16 * (kMostL + 1);
constexpr std::size_t kChunk = 4;  // vectors of neighbours whose functions are kept at a time

using Wide = double __attribute__((vector_size(8 * kWide)));
using UnalignedWide = double __attribute__((vector_size(8 * kWide), aligned(8), may_alias));
using WideBits = long long __attribute__((vector_size(8 * kWide)));
using Narrow = double __attribute__((vector_size(8 * kNarrow)));
using UnalignedNarrow = double __attribute__((vector_size(8 * kNarrow), aligned(8), may_alias));

inline Wide load(const double* p) { return *reinterpret_cast<const UnalignedWide*>(p); }
inline void store(double* p, Wide v) { *reinterpret_cast<UnalignedWide*>(p) = v; }
inline Narrow load4(const double* p) { return *reinterpret_cast<const UnalignedNarrow*>(p); }
inline void store4(double* p, Narrow v) { *reinterpret_cast<UnalignedNarrow*>(p) = v; }
inline Wide spread(double x) { return Wide{} + x; }
inline Wide choose(WideBits mask, Wide yes, Wide no) {
  return reinterpret_cast<Wide>((mask & reinterpret_cast<WideBits>(yes)) | (~mask & reinterpret_cast<WideBits>(no)));
}
inline double sum(Wide v) {
#ifdef __AVX512F__
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}
inline Wide square_root(Wide v) {
  Wide out;
  for (std::size_t k = 0; k < kWide; ++k) out[k] = std::sqrt(v[k]);
  return out;
}

/// e^x for x <= 0, relative error 3e-16; e^-708 below that. x = n ln 2 + r, Taylor's series of degree 12 in r.
inline Wide exponential(Wide x) {
  constexpr double kInverse[] = {
      1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,      1.0 / 720,
      1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600};
  const Wide shift = spread(6755399441055744.0);  // 1.5 * 2^52: the sum's low bits are the nearest integer
  x = choose(x > -708.0, x, spread(-708.0));
  const Wide moved = x * 1.4426950408889634 + shift;
  const Wide n = moved - shift;
  const Wide r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  const Wide r2 = r * r, r4 = r2 * r2;
  const auto four = [&](int k) {
    return (kInverse[k] + r * kInverse[k + 1]) + r2 * (kInverse[k + 2] + r * kInverse[k + 3]);
  };
  const Wide p = four(0) + r4 * (four(4) + r4 * (four(8) + r4 * kInverse[12]));
  return reinterpret_cast<Wide>(reinterpret_cast<WideBits>(p) + (reinterpret_cast<WideBits>(moved) << 52));
}

/// The weight of neighbours at square distance s, and twice its derivative with respect to s.
inline void fade(const SoapBasis& basis, Wide s, Wide& weight, Wide& slope) {
  const Wide nothing = spread(0.0), one = spread(1.0);
  if (!basis.smooth) {
    weight = choose(s < basis.reach * basis.reach, one, nothing);
    slope = nothing;
    return;
  }
  const double width = basis.reach - basis.r_cut;
  const Wide r = square_root(choose(s > 1e-12, s, spread(1e-12)));
  Wide u = (r - basis.r_cut) * (1.0 / width);
  u = choose(u > 0.0, u, nothing);
  u = choose(u < 1.0, u, one);
  weight = 1.0 - u * u * u * (10.0 + u * (6.0 * u - 15.0));
  slope = (-30.0 / width) * (u * (1.0 - u)) * (u * (1.0 - u)) / r;
}

// Solid harmonics without their norms, H_l,m = Q_lm cos_m, H_l,-m = Q_lm sin_m for m >= 0:
//   Q_lm = r^(l - m) d^m P_l(t)/dt^m at t = z / r, a polynomial in z and r^2
//   cos_m + i sin_m = (x + i y)^m
// dQ_lm/dx = -x Q_l-1,m+1, dQ_lm/dz = (l + m) Q_l-1,m.

constexpr std::size_t at(std::size_t l, std::size_t m) { return l * (l + 1) / 2 + m; }

template <std::size_t kL>
struct Polynomials {
  Wide q[(kL + 1) * (kL + 2) / 2], cosine[kL + 1], sine[kL + 1];

  inline void find(std::size_t l_max, Wide x, Wide y, Wide z, Wide s) {
    cosine[0] = spread(1.0);
    sine[0] = spread(0.0);
    double top = 1.0;  // (2 m - 1)!!
    for (std::size_t m = 0; m <= l_max; ++m) {
      if (m > 0) {
        cosine[m] = x * cosine[m - 1] - y * sine[m - 1];
        sine[m] = x * sine[m - 1] + y * cosine[m - 1];
        top *= 2.0 * static_cast<double>(m) - 1.0;
      }
      q[at(m, m)] = spread(top);
      if (m < l_max) q[at(m + 1, m)] = z * ((2.0 * static_cast<double>(m) + 1.0) * top);
      for (std::size_t l = m + 2; l <= l_max; ++l) {
        const double order = static_cast<double>(l), below = static_cast<double>(l + m - 1);
        const double divisor = 1.0 / static_cast<double>(l - m);
        q[at(l, m)] = ((2.0 * order - 1.0) * divisor) * z * q[at(l - 1, m)] - (below * divisor) * s * q[at(l - 2, m)];
      }
    }
  }
};

/// kChunk as a type: loops over it have a length that the compiler knows.
struct FullChunk {
  constexpr operator std::size_t() const { return kChunk; }
};

inline std::size_t all_functions(const SoapBasis& basis) { return basis.exponents + basis.harmonics; }

std::size_t scratch(const SoapBasis& basis) {
  const std::size_t chunk = kChunk * kSoapLanes * all_functions(basis);
  const std::size_t sums = basis.harmonics * basis.n_max * kSoapLanes;
  const std::size_t rest = 2 * basis.channels + 3 * basis.harmonics * basis.padded_n + basis.harmonics * basis.channels;
  return chunk + sums + rest + 64;
}

// ---- neighbours -> coefficients ------------------------------------------------------------------------------------

/// kL: l_max, known to the compiler; kMostL + 1: not known.
template <std::size_t kL>
void expand_for(const SoapBasis& basis, const SoapNeighbors& near, double* c, double* memory) {
  constexpr bool known = kL <= kMostL;
  const std::size_t l_max = known ? kL : basis.l_max, n_max = basis.n_max;
  const std::size_t harmonics = (l_max + 1) * (l_max + 1), exponents = basis.exponents;
  constexpr std::size_t stride = kChunk * kWide;
  double* radial = memory;                      // (exponents, chunk)
  double* solid = radial + exponents * stride;  // (harmonics, chunk)
  double* sums = solid + harmonics * stride;    // (harmonics, n_max) vectors
  for (std::size_t k = 0; k < harmonics * n_max; ++k) store(sums + k * kWide, spread(0.0));
  for (std::size_t first = 0; first < near.count; first += stride) {
    const std::size_t left = (near.count - first) / kWide, vectors = left < kChunk ? left : kChunk;
    for (std::size_t v = 0; v < vectors; ++v) {
      const std::size_t from = first + v * kWide;
      const Wide x = load(near.x + from), y = load(near.y + from), z = load(near.z + from);
      const Wide s = x * x + y * y + z * z;
      Wide weight, slope;
      fade(basis, s, weight, slope);
      double* to = radial + v * kWide;
      for (std::size_t k = 0; k < exponents; ++k, to += stride) store(to, weight * exponential(s * -basis.gamma[k]));
      Polynomials<known ? kL : kMostL> p;
      p.find(l_max, x, y, z, s);
      to = solid + v * kWide;
      for (std::size_t l = 0; l <= l_max; ++l) {
        double* middle = to + (l * l + l) * stride;
        store(middle, p.q[at(l, 0)]);
        for (std::size_t m = 1; m <= l; ++m) {
          store(middle + m * stride, p.q[at(l, m)] * p.cosine[m]);
          store(middle - m * stride, p.q[at(l, m)] * p.sine[m]);
        }
      }
    }
    const auto add = [&](auto count) {
      double* sum_at = sums;
      for (std::size_t l = 0; l <= l_max; ++l) {
        const std::int32_t* which = basis.exponent_of + l * n_max;
        for (std::size_t lm = l * l; lm < (l + 1) * (l + 1); ++lm) {
          const double* h = solid + lm * stride;
          for (std::size_t k = 0; k < n_max; ++k, sum_at += kWide) {
            const double* e = radial + static_cast<std::size_t>(which[k]) * stride;
            Wide total = load(sum_at);
            for (std::size_t v = 0; v < count; ++v) total += load(e + v * kWide) * load(h + v * kWide);
            store(sum_at, total);
          }
        }
      }
    };
    if (vectors == kChunk)
      add(FullChunk{});
    else
      add(vectors);
  }
  const double* sum_at = sums;
  for (std::size_t l = 0; l <= l_max; ++l) {
    const double* matrix = basis.to_basis + l * n_max * basis.padded_n;
    for (std::size_t lm = l * l; lm < (l + 1) * (l + 1); ++lm) {
      double row[16];
      for (std::size_t k = 0; k < n_max; ++k, sum_at += kWide) row[k] = basis.norm[lm] * sum(load(sum_at));
      for (std::size_t n = 0; n < basis.padded_n; n += kNarrow) {
        Narrow total{};
        for (std::size_t k = 0; k < n_max; ++k) total += row[k] * load4(matrix + k * basis.padded_n + n);
        store4(c + lm * basis.channels + n, total);
      }
    }
  }
}

template <std::size_t kL>
void pull_for(const SoapBasis& basis, const SoapNeighbors& near, const double* slope, double* gx, double* gy,
              double* gz) {
  constexpr bool known = kL <= kMostL;
  const std::size_t l_max = known ? kL : basis.l_max, n_max = basis.n_max;
  constexpr std::size_t room = known ? kL : kMostL;
  for (std::size_t from = 0; from < near.count; from += kWide) {
    const Wide x = load(near.x + from), y = load(near.y + from), z = load(near.z + from);
    const Wide s = x * x + y * y + z * z;
    Wide weight, fading;
    fade(basis, s, weight, fading);
    Wide value[kMostExponents], change[kMostExponents];  // w e and 2 d(w e)/ds
    for (std::size_t k = 0; k < basis.exponents; ++k) {
      const Wide e = exponential(s * -basis.gamma[k]);
      value[k] = weight * e;
      change[k] = (fading - 2.0 * basis.gamma[k] * weight) * e;
    }
    Polynomials<room> p;
    p.find(l_max, x, y, z, s);
    // Of the radial functions and of r^2 in the polynomials, along the vector; of the rest, along x, y, z.
    Wide along{}, along_xy{}, to_x{}, to_y{}, to_z{};
    for (std::size_t l = 0; l <= l_max; ++l) {
      const std::int32_t* which = basis.exponent_of + l * n_max;
      for (std::size_t m = 0; m <= l; ++m) {
        const double* of_cosine = slope + (l * l + l + m) * basis.channels;
        const double* of_sine = slope + (l * l + l - m) * basis.channels;
        Wide a{}, da{}, b{}, db{};
        for (std::size_t k = 0; k < n_max; ++k) {
          const Wide e = value[which[k]], de = change[which[k]];
          a += of_cosine[k] * e;
          da += of_cosine[k] * de;
          if (m > 0) {
            b += of_sine[k] * e;
            db += of_sine[k] * de;
          }
        }
        Wide part = a, d_part = da;
        if (m > 0) {
          part = a * p.cosine[m] + b * p.sine[m];
          d_part = da * p.cosine[m] + db * p.sine[m];
          const Wide q = p.q[at(l, m)] * static_cast<double>(m);
          to_x += q * (a * p.cosine[m - 1] + b * p.sine[m - 1]);
          to_y += q * (b * p.cosine[m - 1] - a * p.sine[m - 1]);
        }
        along += d_part * p.q[at(l, m)];
        if (l > m) to_z += part * (static_cast<double>(l + m) * p.q[at(l - 1, m)]);
        if (l > m + 1) along_xy -= part * p.q[at(l - 1, m + 1)];
      }
    }
    along_xy += along;
    store(gx + from, to_x + x * along_xy);
    store(gy + from, to_y + y * along_xy);
    store(gz + from, to_z + z * along);
  }
}

void expand(const SoapBasis& basis, const SoapNeighbors& near, double* c, double* memory) {
  switch (basis.l_max) {
    case 2:
      return expand_for<2>(basis, near, c, memory);
    case 3:
      return expand_for<3>(basis, near, c, memory);
    case 4:
      return expand_for<4>(basis, near, c, memory);
    case 6:
      return expand_for<6>(basis, near, c, memory);
    default:
      return expand_for<kMostL + 1>(basis, near, c, memory);
  }
}

void pull(const SoapBasis& basis, const SoapNeighbors& near, const double* slope, double* gx, double* gy, double* gz,
          double*) {
  switch (basis.l_max) {
    case 2:
      return pull_for<2>(basis, near, slope, gx, gy, gz);
    case 3:
      return pull_for<3>(basis, near, slope, gx, gy, gz);
    case 4:
      return pull_for<4>(basis, near, slope, gx, gy, gz);
    case 6:
      return pull_for<6>(basis, near, slope, gx, gy, gz);
    default:
      return pull_for<kMostL + 1>(basis, near, slope, gx, gy, gz);
  }
}

// ---- coefficients -> features, and back ----------------------------------------------------------------------------

/// Calls place(s, t, l, n, first n', feature of the first n') for every row of features, in their order.
template <class Place>
inline void for_each_row(const SoapBasis& basis, const Place& place) {
  std::size_t feature = 0;
  for (std::size_t s = 0; s < basis.species; ++s)
    for (std::size_t t = s; t < basis.species; ++t)
      for (std::size_t l = 0; l <= basis.l_max; ++l)
        for (std::size_t n = 0; n < basis.n_max; ++n) {
          const std::size_t first = s == t ? n : 0;
          place(s, t, l, n, first, feature);
          feature += basis.n_max - first;
        }
}

void spectrum(const SoapBasis& basis, const double* c, double* features, double*) {
  const std::size_t channels = basis.channels;
  for_each_row(basis,
               [&](std::size_t s, std::size_t t, std::size_t l, std::size_t n, std::size_t first, std::size_t feature) {
                 const double* mine = c + l * l * channels + s * basis.padded_n + n;
                 const double* others = c + l * l * channels + t * basis.padded_n;
                 for (std::size_t block = first / kNarrow * kNarrow; block < basis.n_max; block += kNarrow) {
                   Narrow total{};
                   for (std::size_t m = 0; m <= 2 * l; ++m)
                     total += mine[m * channels] * load4(others + m * channels + block);
                   total *= basis.factor[l];
                   for (std::size_t lane = 0; lane < kNarrow; ++lane) {
                     const std::size_t other = block + lane;
                     if (other >= first && other < basis.n_max) features[feature + other - first] = total[lane];
                   }
                 }
               });
}

void unfold(const SoapBasis& basis, const double* weights, double* matrices) {
  const std::size_t channels = basis.channels, all = channels * channels;
  for (std::size_t k = 0; k < (basis.l_max + 1) * all; ++k) matrices[k] = 0.0;
  for_each_row(basis,
               [&](std::size_t s, std::size_t t, std::size_t l, std::size_t n, std::size_t first, std::size_t feature) {
                 double* matrix = matrices + l * all;
                 const std::size_t row = s * basis.padded_n + n;
                 for (std::size_t other = first; other < basis.n_max; ++other) {
                   const std::size_t column = t * basis.padded_n + other;
                   const double w = basis.factor[l] * weights[feature + other - first];
                   matrix[row * channels + column] += w;  // twice on the diagonal: c^2
                   matrix[column * channels + row] += w;
                 }
               });
}

void backward(const SoapBasis& basis, const double* matrices, const double* c, double* slope, double* memory) {
  const std::size_t channels = basis.channels, padded = basis.padded_n;
  double* of_c = memory;  // (channels)
  for (std::size_t l = 0; l <= basis.l_max; ++l) {
    const double* matrix = matrices + l * channels * channels;
    const double* turn = basis.from_basis + l * basis.n_max * padded;
    for (std::size_t lm = l * l; lm < (l + 1) * (l + 1); ++lm) {
      const double* row = c + lm * channels;
      for (std::size_t block = 0; block < channels; block += kNarrow) {
        Narrow total{};
        for (std::size_t other = 0; other < channels; ++other)
          total += row[other] * load4(matrix + other * channels + block);
        store4(of_c + block, total * basis.norm[lm]);
      }
      for (std::size_t s = 0; s < basis.species; ++s)
        for (std::size_t block = 0; block < padded; block += kNarrow) {
          Narrow total{};
          for (std::size_t n = 0; n < basis.n_max; ++n)
            total += of_c[s * padded + n] * load4(turn + n * padded + block);
          store4(slope + lm * channels + s * padded + block, total);
        }
    }
  }
}

// ---- Jacobian ------------------------------------------------------------------------------------------------------

void sum_slopes(const SoapBasis& basis, const SoapNeighbors& near, std::size_t real, const std::int32_t* atom,
                double* out, double*) {
  const std::size_t l_max = basis.l_max, row = basis.harmonics * basis.padded_n;
  for (std::size_t from = 0; from < real; from += kWide) {
    const Wide r[3] = {load(near.x + from), load(near.y + from), load(near.z + from)};
    const Wide s = r[0] * r[0] + r[1] * r[1] + r[2] * r[2];
    Wide weight, fading;
    fade(basis, s, weight, fading);
    Polynomials<kMostL> p;
    p.find(l_max, r[0], r[1], r[2], s);
    Wide value[kMostExponents], change[kMostExponents];
    for (std::size_t k = 0; k < basis.exponents; ++k) {
      const Wide e = exponential(s * -basis.gamma[k]);
      value[k] = weight * e;
      change[k] = (fading - 2.0 * basis.gamma[k] * weight) * e;
    }
    const std::size_t lanes = real - from < kWide ? real - from : kWide;
    const auto add = [&](std::size_t l, std::size_t lm, Wide h, const Wide* dh) {
      for (std::size_t k = 0; k < basis.n_max; ++k) {
        const std::size_t which = static_cast<std::size_t>(basis.exponent_of[l * basis.n_max + k]);
        for (std::size_t axis = 0; axis < 3; ++axis) {
          const Wide d = change[which] * h * r[axis] + value[which] * dh[axis];
          double* to = out + axis * row + lm * basis.padded_n + k;
          for (std::size_t lane = 0; lane < lanes; ++lane)
            to[static_cast<std::size_t>(atom[from + lane]) * 3 * row] += d[lane];
        }
      }
    };
    for (std::size_t l = 0; l <= l_max; ++l)
      for (std::size_t m = 0; m <= l; ++m) {
        const double order = static_cast<double>(m);
        const Wide q = p.q[at(l, m)], nothing = spread(0.0);
        const Wide dz = l > m ? static_cast<double>(l + m) * p.q[at(l - 1, m)] : nothing;
        const Wide inward = l > m + 1 ? -p.q[at(l - 1, m + 1)] : nothing;
        const Wide c = p.cosine[m], si = p.sine[m];
        const Wide below_c = m > 0 ? order * q * p.cosine[m - 1] : nothing;
        const Wide below_s = m > 0 ? order * q * p.sine[m - 1] : nothing;
        const Wide of_cosine[3] = {inward * r[0] * c + below_c, inward * r[1] * c - below_s, dz * c};
        add(l, l * l + l + m, q * c, of_cosine);
        if (m == 0) continue;
        const Wide of_sine[3] = {inward * r[0] * si + below_s, inward * r[1] * si + below_c, dz * si};
        add(l, l * l + l - m, q * si, of_sine);
      }
  }
}

void spectrum_slope(const SoapBasis& basis, const double* c, std::size_t species, const double* sums, double* features,
                    double* memory) {
  const std::size_t channels = basis.channels, padded = basis.padded_n;
  double* changes = memory;  // (harmonics, padded_n), of c
  for (std::size_t l = 0; l <= basis.l_max; ++l) {
    const double* matrix = basis.to_basis + l * basis.n_max * padded;
    for (std::size_t lm = l * l; lm < (l + 1) * (l + 1); ++lm)
      for (std::size_t block = 0; block < padded; block += kNarrow) {
        Narrow total{};
        for (std::size_t k = 0; k < basis.n_max; ++k)
          total += sums[lm * padded + k] * load4(matrix + k * padded + block);
        store4(changes + lm * padded + block, total * basis.norm[lm]);
      }
  }
  for_each_row(basis,
               [&](std::size_t s, std::size_t t, std::size_t l, std::size_t n, std::size_t first, std::size_t feature) {
                 for (std::size_t block = first / kNarrow * kNarrow; block < basis.n_max; block += kNarrow) {
                   Narrow total{};
                   for (std::size_t lm = l * l; lm < (l + 1) * (l + 1); ++lm) {
                     if (s == species)
                       total += changes[lm * padded + n] * load4(c + lm * channels + t * padded + block);
                     if (t == species)
                       total += c[lm * channels + s * padded + n] * load4(changes + lm * padded + block);
                   }
                   total *= basis.factor[l];
                   for (std::size_t lane = 0; lane < kNarrow; ++lane) {
                     const std::size_t other = block + lane;
                     if (other >= first && other < basis.n_max) features[feature + other - first] = total[lane];
                   }
                 }
               });
}

}  // namespace

const SoapKernels& soap_kernels() {
  static constexpr SoapKernels table = {scratch, expand, spectrum, unfold, backward, pull, sum_slopes, spectrum_slope};
  return table;
}

}  // namespace thalweg::THALWEG_ISA
