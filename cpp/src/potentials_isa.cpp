#include <cmath>

#include "isa_vectors.hpp"
#include "potentials_kernels.hpp"

namespace thalweg::THALWEG_ISA {
namespace {

double embedded_pairs(std::size_t n, const std::int32_t* i, const std::int32_t* j, const double* r,
                      const std::int32_t* type, const EmbeddedPair* table, int types, double slope, double middle,
                      double* density, double* d_density_i, double* d_density_j, double* d_pair) {
  Real energy = {};
  for (std::size_t p = 0; p < n; p += kLanes) {
    const std::size_t left = n - p < kLanes ? n - p : kLanes;
    Real distance = broadcast(middle);  // lanes beyond the end: all coefficients are zero
    Real density_i = {}, pair_i = {}, eta_j = {}, kappa_j = {}, density_j = {}, pair_j = {}, eta_i = {}, kappa_i = {};
    for (std::size_t lane = 0; lane < left; ++lane) {
      const int a = type[i[p + lane]], b = type[j[p + lane]];
      const EmbeddedPair& at_i = table[a * types + b];
      const EmbeddedPair& at_j = table[b * types + a];
      distance[lane] = r[p + lane];
      density_i[lane] = at_i.density;
      pair_i[lane] = at_i.pair;
      eta_j[lane] = at_i.eta;
      kappa_j[lane] = at_i.kappa;
      density_j[lane] = at_j.density;
      pair_j[lane] = at_j.pair;
      eta_i[lane] = at_j.eta;
      kappa_i[lane] = at_j.kappa;
    }
    const Real w = 1.0 / (1.0 + exponential(slope * (distance - middle)));
    const Real d_log_w = slope * (w - 1.0);
    const Real rho_i = density_i * w * exponential(-eta_j * distance);
    const Real rho_j = density_j * w * exponential(-eta_i * distance);
    const Real energy_i = pair_i * w * exponential(-kappa_j * distance);
    const Real energy_j = pair_j * w * exponential(-kappa_i * distance);
    energy += energy_i + energy_j;
    const Real slope_i = rho_i * (d_log_w - eta_j), slope_j = rho_j * (d_log_w - eta_i);
    const Real slope_pair = energy_i * (d_log_w - kappa_j) + energy_j * (d_log_w - kappa_i);
    for (std::size_t lane = 0; lane < left; ++lane) {
      density[i[p + lane]] += rho_i[lane];
      density[j[p + lane]] += rho_j[lane];
      d_density_i[p + lane] = slope_i[lane];
      d_density_j[p + lane] = slope_j[lane];
      d_pair[p + lane] = slope_pair[lane];
    }
  }
  return sum(energy);
}

// Energy of a pair and (dE/dr) / r from the square of its distance (ASE's formulas); zero beyond the cutoff.
template <bool smooth>
[[gnu::always_inline]] inline void lennard_jones(Real square, const LennardJonesCoefficients& c, Real& energy,
                                                 Real& slope_over_r) {
  const Real inverse = 1.0 / square;
  const Real s2 = c.sigma2 * inverse, s6 = s2 * s2 * s2;
  energy = c.four_epsilon * (s6 * s6 - s6);
  slope_over_r = -6.0 * c.four_epsilon * (2.0 * (s6 * s6) - s6) * inverse;
  if constexpr (smooth) {
    const Real gap = c.rc2 - square;
    Real cut = gap * gap * (c.rc2 + 2.0 * square - 3.0 * c.ro2) * c.inverse_switch;
    Real d_cut = 6.0 * gap * (c.ro2 - square) * c.inverse_switch;
    const Real onset = broadcast(c.ro2);
    cut = square < onset ? broadcast(1.0) : cut;
    d_cut = square < onset ? Real{} : d_cut;
    slope_over_r = cut * slope_over_r + 2.0 * d_cut * energy;
    energy = cut * energy;
  } else {
    energy -= c.shift;
  }
}

template <bool smooth>
double lennard_jones_all_as(std::size_t n, std::size_t padded, const double* planes, double* forces,
                            const LennardJonesCoefficients& c) {
  const double *x = planes, *y = planes + padded, *z = planes + 2 * padded;
  double *fx = forces, *fy = forces + padded, *fz = forces + 2 * padded;
  for (std::size_t k = 0; k < 3 * padded; ++k) forces[k] = 0.0;
  Real lane_index;
  for (std::size_t lane = 0; lane < kLanes; ++lane) lane_index[lane] = static_cast<double>(lane);
  const Real limit = broadcast(c.rc2);
  Real total = {};
  for (std::size_t i = 0; i + 1 < n; ++i) {
    const Real xi = broadcast(x[i]), yi = broadcast(y[i]), zi = broadcast(z[i]), self = broadcast(double(i));
    Real sum_x = {}, sum_y = {}, sum_z = {};
    for (std::size_t j = (i + 1) / kLanes * kLanes; j < n; j += kLanes) {
      const Real dx = load(x + j) - xi, dy = load(y + j) - yi, dz = load(z + j) - zi;
      const Real square = dx * dx + dy * dy + dz * dz;
      Real energy, slope;
      lennard_jones<smooth>(square, c, energy, slope);
      const Whole counts = (lane_index + double(j) > self) & (square <= limit);
      total += counts ? energy : Real{};
      slope = counts ? slope : Real{};
      const Real gx = slope * dx, gy = slope * dy, gz = slope * dz;
      sum_x += gx;
      sum_y += gy;
      sum_z += gz;
      store(fx + j, load(fx + j) - gx);
      store(fy + j, load(fy + j) - gy);
      store(fz + j, load(fz + j) - gz);
    }
    fx[i] += sum(sum_x);
    fy[i] += sum(sum_y);
    fz[i] += sum(sum_z);
  }
  return sum(total);
}

double lennard_jones_all(std::size_t n, std::size_t padded, const double* planes, double* forces,
                         const LennardJonesCoefficients& c) {
  return c.smooth ? lennard_jones_all_as<true>(n, padded, planes, forces, c)
                  : lennard_jones_all_as<false>(n, padded, planes, forces, c);
}

template <bool smooth>
double lennard_jones_pairs_as(std::size_t n, const double* r, double* slope_over_r, const LennardJonesCoefficients& c) {
  Real total = {};
  for (std::size_t p = 0; p < n; p += kLanes) {
    const std::size_t left = n - p < kLanes ? n - p : kLanes;
    Real distance = broadcast(2.0 * std::sqrt(c.rc2));
    if (left == kLanes)
      distance = load(r + p);
    else
      for (std::size_t lane = 0; lane < left; ++lane) distance[lane] = r[p + lane];
    const Real square = distance * distance;
    Real energy, slope;
    lennard_jones<smooth>(square, c, energy, slope);
    const Whole counts = square <= broadcast(c.rc2);
    total += counts ? energy : Real{};
    slope = counts ? slope : Real{};
    for (std::size_t lane = 0; lane < left; ++lane) slope_over_r[p + lane] = slope[lane];
  }
  return sum(total);
}

double lennard_jones_pairs(std::size_t n, const double* r, double* slope_over_r, const LennardJonesCoefficients& c) {
  return c.smooth ? lennard_jones_pairs_as<true>(n, r, slope_over_r, c)
                  : lennard_jones_pairs_as<false>(n, r, slope_over_r, c);
}

double morse_pairs(std::size_t n, const double* r, const std::int32_t* kind, const PriorPair* table,
                   double* slope_over_r) {
  Real total = {};
  for (std::size_t p = 0; p < n; p += kLanes) {
    const std::size_t left = n - p < kLanes ? n - p : kLanes;
    Real distance = broadcast(1.0), radius = distance, exponent = distance;
    Real depth = {}, cutoff = {}, from = {}, scale = {};
    for (std::size_t lane = 0; lane < left; ++lane) {
      const PriorPair& pair = table[kind[p + lane]];
      distance[lane] = r[p + lane];
      radius[lane] = pair.radius;
      exponent[lane] = pair.exponent;
      depth[lane] = pair.depth;
      cutoff[lane] = pair.cutoff;
      from[lane] = pair.switch_from;
      scale[lane] = pair.switch_scale;
    }
    const Real e = exponential(exponent * (radius - distance));
    const Real well = depth * (e * e - 2.0 * e);
    const Real d_well = -2.0 * exponent * depth * (e * e - e);
    Real t = (distance - from) * scale;
    t = t < Real{} ? Real{} : t;
    const Real rest = 1.0 - t;
    const Real cut = 1.0 - t * t * t * (10.0 - t * (15.0 - 6.0 * t));
    const Real d_cut = -30.0 * t * t * rest * rest * scale;
    const Whole counts = distance < cutoff;
    total += counts ? well * cut : Real{};
    const Real slope = counts ? (d_well * cut + well * d_cut) / distance : Real{};
    for (std::size_t lane = 0; lane < left; ++lane) slope_over_r[p + lane] = slope[lane];
  }
  return sum(total);
}

// With x = turn r and y = x / 2 - pi / 4, |y| <= pi / 4: (cos x + 1) / 2 = (cos y - sin y)^2 / 2, and its derivative is
// -turn (cos^2 y - sin^2 y) / 2. Taylor series of both, remainders below 5e-17.
void screened_pairs(std::size_t n, const double* r, double fall, double turn, double* value, double* slope_over_r) {
  for (std::size_t p = 0; p < n; p += kLanes) {
    const std::size_t left = n - p < kLanes ? n - p : kLanes;
    Real distance = broadcast(1.0);
    if (left == kLanes)
      distance = load(r + p);
    else
      for (std::size_t lane = 0; lane < left; ++lane) distance[lane] = r[p + lane];
    const Real y = (0.5 * turn) * distance - 0.78539816339744831, z = y * y;
    const Real sine =
        y * (1.0 +
             z * (-1.0 / 6 +
                  z * (1.0 / 120 + z * (-1.0 / 5040 + z * (1.0 / 362880 + z * (-1.0 / 39916800 +
                                                                               z * (1.0 / 6227020800.0 +
                                                                                    z * (-1.0 / 1307674368000.0))))))));
    const Real cosine =
        1.0 +
        z * (-0.5 + z * (1.0 / 24 +
                         z * (-1.0 / 720 +
                              z * (1.0 / 40320 + z * (-1.0 / 3628800 +
                                                      z * (1.0 / 479001600 + z * (-1.0 / 87178291200.0 +
                                                                                  z * (1.0 / 20922789888000.0))))))));
    const Real e = 0.5 * exponential(-fall * distance), root = cosine - sine;
    const Real added = e * root * root;
    const Real slope = -(fall * added + turn * e * root * (cosine + sine)) / distance;
    if (left == kLanes) {
      store(value + p, added);
      store(slope_over_r + p, slope);
    } else {
      for (std::size_t lane = 0; lane < left; ++lane)
        value[p + lane] = added[lane], slope_over_r[p + lane] = slope[lane];
    }
  }
}

}  // namespace

const PotentialKernels& potential_kernels() {
  static constexpr PotentialKernels table{embedded_pairs, lennard_jones_all, lennard_jones_pairs, morse_pairs,
                                          screened_pairs};
  return table;
}

}  // namespace thalweg::THALWEG_ISA
