#include <cmath>
#include <cstdint>

#include "fchl_kernels.hpp"
#include "isa_vectors.hpp"

namespace thalweg::THALWEG_ISA {
namespace {

using Bits = unsigned long long __attribute__((vector_size(kBytes)));
static_assert(kFchlLanes % kLanes == 0);

constexpr double kOnALine = 1e-12;  // square of the sine of an angle that has no derivative: see fchl.hpp
constexpr double kFaded = 600.0;    // exp(-600) is nothing beside the Gaussians of any neighbour

[[gnu::always_inline]] inline Real square_root(Real v) {
  Real out;
  for (std::size_t k = 0; k < kLanes; ++k) out[k] = std::sqrt(v[k]);
  return out;
}

// ln x of positive normal x to 2e-16: x = 2^e m, m between sqrt(1/2) and sqrt(2), ln m = 2 artanh((m - 1) / (m + 1)).
[[gnu::always_inline]] inline Real logarithm(Real x) {
  const Bits one = (Bits)broadcast(1.0), root = (Bits)broadcast(0.70710678118654752), bits = (Bits)x;
  const Bits exponent = (bits - root + one) >> 52;  // plus 1023
  const Real m = (Real)(bits - (exponent << 52) + one);
  const Real e = (Real)(exponent | (Bits)broadcast(0x1p52)) - (0x1p52 + 1023.0);
  const Real z = (m - 1.0) / (m + 1.0), z2 = z * z, z4 = z2 * z2;
  const Real low = (1.0 / 3 + z2 * (1.0 / 5)) + z4 * (1.0 / 7 + z2 * (1.0 / 9));
  const Real high = (1.0 / 11 + z2 * (1.0 / 13)) + z4 * ((1.0 / 15 + z2 * (1.0 / 17)) + z4 * (1.0 / 19 + z2 / 21.0));
  const Real series = low + (z4 * z4) * high;
  return e * 0x1.62e42fee00000p-1 + (e * 0x1.a39ef35793c76p-33 + (2.0 * z + 2.0 * z * z2 * series));
}

void pair(const Fchl19Basis& b, double r, double* value, double* slope) {
  const double turn = 3.14159265358979323846 / b.cutoff_pairs, ratio = b.eta_pairs / (r * r);
  const double variance = std::log1p(ratio), center = std::log(r) - 0.5 * variance;
  const double d_variance = -2.0 * ratio / (r * (1.0 + ratio)), d_center = 1.0 / r - 0.5 * d_variance;
  const double scale = 1.0 / (std::sqrt(variance) * std::pow(r, b.decay_pairs)), cut = 0.5 * (1.0 + std::cos(turn * r));
  // d ln(scale), and the cutoff's apart: it may be zero
  const double d_scale = -0.5 * d_variance / variance - b.decay_pairs / r, d_cut = -0.5 * turn * std::sin(turn * r);
  for (std::size_t k = 0; k < b.padded_pairs; k += kLanes) {
    const Real t = load(b.log_grid + k) - center, u = t * (1.0 / variance);
    const Real bare = scale * load(b.inverse_grid + k) * exponential(-0.5 * t * u);
    const Real change = d_scale + u * d_center + (0.5 * d_variance) * (u * u);
    store(value + k, bare * cut);
    store(slope + k, bare * (change * cut + d_cut));
  }
}

/// A neighbour and the lanes of another ones: everything about their triangles but Gaussians and Fourier functions.
struct Triangle {
  Real mean, cosine, sine;
  Real weight;  // f_j f_k |b - a|^-n3 (1 + 3 cos cos cos)
  // F = weight G A changes by (u a + w b) . da + (v b + w a) . db, where
  //   u = u0 G A + u1 G' A + u2 G A', v the same, w = w0 G A + w2 G A'
  Real u0, u1, u2, v0, v1, v2, w0, w2;
};

template <bool slopes>
[[gnu::always_inline]] inline Triangle triangle(const Fchl19Basis& basis, const Fchl19Neighbors& n, std::size_t j,
                                                std::size_t k, Real lanes) {
  Triangle out;
  // Lanes up to j itself belong to other pairs, or to none.
  const Whole counts = lanes + static_cast<double>(k) > broadcast(static_cast<double>(j));
  const double ax = n.x[j], ay = n.y[j], az = n.z[j], ra = n.r[j], fa = n.f[j], A = ra * ra;
  const Real bx = load(n.x + k), by = load(n.y + k), bz = load(n.z + k), rb = load(n.r + k), B = rb * rb;
  const Real fb = counts ? load(n.f + k) : Real{};
  const Real cx = bx - ax, cy = by - ay, cz = bz - az, square = cx * cx + cy * cy + cz * cz;
  const Real C = counts ? square : broadcast(1.0);
  const Real d = ax * bx + ay * by + az * bz;
  const Real nx = ay * bz - az * by, ny = az * bx - ax * bz, nz = ax * by - ay * bx;
  const Real area2 = nx * nx + ny * ny + nz * nz, area = square_root(area2);
  const Real inverse_ab = 1.0 / (ra * rb), inverse_c = 1.0 / C, inverse = inverse_ab * inverse_ab * inverse_c;
  const Real far = exponential((-0.5 * basis.decay_triplets) * logarithm(C));
  const Real three = 3.0 * d * (A - d) * (B - d) * inverse, shape = 1.0 + three, reach = far * (fa * fb);
  out.mean = 0.5 * (ra + rb);
  out.cosine = d * inverse_ab;
  out.sine = area * inverse_ab;
  out.weight = reach * shape;
  if constexpr (slopes) {
    const double inverse_a = 1.0 / ra, inverse_A = inverse_a * inverse_a;
    const Real inverse_b = ra * inverse_ab, inverse_B = inverse_b * inverse_b;
    const Real d_fb = counts ? load(n.df + k) : Real{};
    const Real turn = area2 > kOnALine * (A * B) ? out.weight / area : Real{};
    const Real by_c = -2.0 * reach * inverse_c * (0.5 * basis.decay_triplets * shape + three);  // 2 d/dC
    out.u0 = 2.0 * reach * (3.0 * d * (B - d) * inverse - three * inverse_A) +
             far * shape * fb * (n.df[j] * inverse_a) + by_c;
    out.v0 =
        2.0 * reach * (3.0 * d * (A - d) * inverse - three * inverse_B) + far * shape * d_fb * (fa * inverse_b) + by_c;
    out.w0 = 3.0 * reach * inverse * ((A - d) * (B - d) - d * (A + B - 2.0 * d)) - by_c;
    out.u1 = 0.5 * out.weight * inverse_a;
    out.v1 = 0.5 * out.weight * inverse_b;
    out.u2 = turn * d * inverse_A;
    out.v2 = turn * d * inverse_B;
    out.w2 = -turn;
  }
  return out;
}

/// G_l at the mean distance m.
[[gnu::always_inline]] inline void gaussians(const Fchl19Basis& basis, Real m, Real* g) {
  const double eta = basis.eta_triplets, step = basis.step;
  for (std::size_t begin = 0; begin < basis.n_triplets; begin += basis.chunk) {
    const std::size_t end = begin + basis.chunk < basis.n_triplets ? begin + basis.chunk : basis.n_triplets;
    const Real x = m - step * static_cast<double>(begin + 1), power = eta * x * x;
    Real value = power < kFaded ? exponential(-power) : Real{};
    Real ratio = exponential((2.0 * eta * step) * x - eta * step * step);
    for (std::size_t l = begin; l < end; ++l) {
      g[l] = value;
      value *= ratio;
      ratio *= basis.shrink;
    }
  }
}

/// A_m and, if wanted, their derivatives over the angle.
template <bool slopes>
[[gnu::always_inline]] inline void fourier(const Fchl19Basis& basis, Real cosine, Real sine, Real* a, Real* d_a) {
  const Real twice = 2.0 * (cosine * cosine - sine * sine);  // 2 cos(2 theta)
  Real c = cosine, s = sine, before_c = cosine, before_s = -sine;
  for (std::size_t m = 0; m < basis.n_angles; m += 2) {
    const double weight = basis.order_weight[m / 2], order = static_cast<double>(m + 1);
    a[m] = weight * c;
    a[m + 1] = weight * s;
    if constexpr (slopes) {
      d_a[m] = (-order * weight) * s;
      d_a[m + 1] = (order * weight) * c;
    }
    const Real next_c = twice * c - before_c, next_s = twice * s - before_s;
    before_c = c, before_s = s, c = next_c, s = next_s;
  }
}

[[gnu::always_inline]] inline Real lane_numbers() {
  Real out;
  for (std::size_t lane = 0; lane < kLanes; ++lane) out[lane] = static_cast<double>(lane);
  return out;
}

/// Calls work(column, j, k) for each neighbour j and each vector of neighbours k of its own or a later group that are
/// not before it, done(column) after those of two groups. column: of the features of those two groups.
template <class Work, class Done>
[[gnu::always_inline]] inline void for_each_triangle(const Fchl19Basis& basis, const Fchl19Neighbors& n,
                                                     const Work& work, const Done& done) {
  std::size_t column = 0;
  for (std::size_t s = 0; s < basis.species; ++s)
    for (std::size_t t = s; t < basis.species; ++t) {
      const std::size_t end = n.first[t] + n.count[t];
      for (std::size_t j = n.first[s]; j < n.first[s] + n.count[s]; ++j)
        for (std::size_t k = s == t ? (j + 1) / kLanes * kLanes : n.first[t]; k < end; k += kLanes) work(column, j, k);
      done(column);
      column += basis.n_triplets * basis.n_angles;
    }
}

std::size_t scratch(const Fchl19Basis& basis) { return basis.n_triplets * basis.n_angles * kFchlLanes; }

void triplets(const Fchl19Basis& basis, const Fchl19Neighbors& n, double* features, double* sums) {
  const std::size_t radial = basis.n_triplets, angles = basis.n_angles, block = radial * angles;
  const Real lanes = lane_numbers();
  Real g[kFchlMostRadial], a[kFchlMostAngles];
  for (std::size_t f = 0; f < block * kLanes; ++f) sums[f] = 0.0;
  for_each_triangle(
      basis, n,
      [&](std::size_t, std::size_t j, std::size_t k) {
        const Triangle t = triangle<false>(basis, n, j, k, lanes);
        gaussians(basis, t.mean, g);
        fourier<false>(basis, t.cosine, t.sine, a, nullptr);
        for (std::size_t m = 0; m < angles; ++m) a[m] *= t.weight;
        double* at = sums;
        for (std::size_t l = 0; l < radial; ++l)
          for (std::size_t m = 0; m < angles; ++m, at += kLanes) store(at, load(at) + g[l] * a[m]);
      },
      [&](std::size_t column) {
        for (std::size_t f = 0; f < block; ++f) {
          features[column + f] = sum(load(sums + f * kLanes));
          store(sums + f * kLanes, Real{});
        }
      });
}

void pull(const Fchl19Basis& basis, const Fchl19Neighbors& n, const double* weights, double* gx, double* gy,
          double* gz) {
  const std::size_t radial = basis.n_triplets, angles = basis.n_angles;
  const Real lanes = lane_numbers();
  Real g[kFchlMostRadial], a[kFchlMostAngles], d_a[kFchlMostAngles];
  for (std::size_t k = n.first[0]; k < n.first[basis.species]; ++k) gx[k] = gy[k] = gz[k] = 0.0;
  for_each_triangle(
      basis, n,
      [&](std::size_t column, std::size_t j, std::size_t k) {
        const Triangle t = triangle<true>(basis, n, j, k, lanes);
        gaussians(basis, t.mean, g);
        fourier<true>(basis, t.cosine, t.sine, a, d_a);
        Real q = {}, q_mean = {}, q_angle = {};
        for (std::size_t m = 0; m < angles; ++m) {
          Real total = {}, first = {};  // sum of w G, of w G R
          double place = basis.step;
          for (std::size_t l = 0; l < radial; ++l, place += basis.step) {
            const Real part = g[l] * weights[column + l * angles + m];
            total += part;
            first += part * place;
          }
          q += a[m] * total;
          q_angle += d_a[m] * total;
          q_mean += a[m] * (-2.0 * basis.eta_triplets) * (t.mean * total - first);
        }
        const Real u = t.u0 * q + t.u1 * q_mean + t.u2 * q_angle, v = t.v0 * q + t.v1 * q_mean + t.v2 * q_angle,
                   w = t.w0 * q + t.w2 * q_angle;
        const Real bx = load(n.x + k), by = load(n.y + k), bz = load(n.z + k);
        store(gx + k, load(gx + k) + (v * bx + w * n.x[j]));
        store(gy + k, load(gy + k) + (v * by + w * n.y[j]));
        store(gz + k, load(gz + k) + (v * bz + w * n.z[j]));
        const double own = sum(u);
        gx[j] += own * n.x[j] + sum(w * bx);
        gy[j] += own * n.y[j] + sum(w * by);
        gz[j] += own * n.z[j] + sum(w * bz);
      },
      [](std::size_t) {});
}

void jacobian(const Fchl19Basis& basis, const Fchl19Neighbors& n, const std::int32_t* atom, double* out,
              std::size_t first_column, double* scratch) {
  const std::size_t radial = basis.n_triplets, angles = basis.n_angles, block = radial * angles, D = basis.size;
  const Real lanes = lane_numbers();
  Real g[kFchlMostRadial], a[kFchlMostAngles], d_a[kFchlMostAngles];
  double* __restrict value = scratch, * __restrict d_mean = value + block, * __restrict d_angle = d_mean + block;
  const auto add = [&](std::int32_t moved, std::size_t axis, std::size_t column, double by_value, double by_mean,
                       double by_angle) {
    double* __restrict row = out + (3 * static_cast<std::size_t>(moved) + axis) * D + first_column + column;
    for (std::size_t f = 0; f < block; ++f) row[f] += by_value * value[f] + by_mean * d_mean[f] + by_angle * d_angle[f];
  };
  for_each_triangle(
      basis, n,
      [&](std::size_t column, std::size_t j, std::size_t k) {
        const Triangle t = triangle<true>(basis, n, j, k, lanes);
        gaussians(basis, t.mean, g);
        fourier<true>(basis, t.cosine, t.sine, a, d_a);
        for (std::size_t lane = 0; lane < kLanes; ++lane) {
          if (k + lane <= j || n.f[k + lane] == 0.0) continue;
          for (std::size_t l = 0; l < radial; ++l) {
            const double G = g[l][lane], place = basis.step * static_cast<double>(l + 1);
            const double d_G = -2.0 * basis.eta_triplets * (t.mean[lane] - place) * G;
            for (std::size_t m = 0; m < angles; ++m) {
              value[l * angles + m] = G * a[m][lane];
              d_mean[l * angles + m] = d_G * a[m][lane];
              d_angle[l * angles + m] = G * d_a[m][lane];
            }
          }
          const double from[3] = {n.x[j], n.y[j], n.z[j]}, to[3] = {n.x[k + lane], n.y[k + lane], n.z[k + lane]};
          for (std::size_t axis = 0; axis < 3; ++axis) {
            add(atom[j], axis, column, t.u0[lane] * from[axis] + t.w0[lane] * to[axis], t.u1[lane] * from[axis],
                t.u2[lane] * from[axis] + t.w2[lane] * to[axis]);
            add(atom[k + lane], axis, column, t.v0[lane] * to[axis] + t.w0[lane] * from[axis], t.v1[lane] * to[axis],
                t.v2[lane] * to[axis] + t.w2[lane] * from[axis]);
          }
        }
      },
      [](std::size_t) {});
}

}  // namespace

const Fchl19Kernels& fchl19_kernels() {
  static constexpr Fchl19Kernels table{scratch, pair, triplets, pull, jacobian};
  return table;
}

}  // namespace thalweg::THALWEG_ISA
