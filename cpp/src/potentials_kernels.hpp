// Inner loops over pairs (potentials_isa.cpp), chosen at run time. Plain arrays only: see the RULE in isa.hpp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.hpp"

namespace thalweg {

/// Coefficients of one ordered pair of species (a, b) of an embedded-atom potential, distances in angstrom:
///   what b adds to the density at a:  density exp(-eta r) w(r)
///   pair energy of a due to b:        pair exp(-kappa r) w(r)
struct EmbeddedPair {
  double density, pair, eta, kappa;  // EMT: eta_b, kappa_b / beta
};

/// Coefficients of one pair of species of a pair prior (potentials.hpp).
struct PriorPair {
  double radius;                     // bonding: r0; repulsive: r_min
  double exponent;                   // bonding: stiffness / r0
  double depth;                      // bonding: eV
  double cutoff;                     // angstrom
  double switch_from, switch_scale;  // t = (r - switch_from) switch_scale runs from 0 to 1
  double unused[2];
};

struct LennardJonesCoefficients {
  double sigma2, rc2, ro2, four_epsilon, shift;
  double inverse_switch;  // 1 / (rc2 - ro2)^3
  int smooth;
};

struct PotentialKernels {
  /// First pass of an embedded-atom potential over n pairs of structure-wide types (species index per atom; table[types
  /// * a + b]). Adds to density (atoms); writes per pair d density_i/dr, d density_j/dr and d(pair energy)/dr. w(r) = 1
  /// / (1 + exp(slope (r - middle))). Returns the pair energy.
  double (*embedded_pairs)(std::size_t n, const std::int32_t* i, const std::int32_t* j, const double* r,
                           const std::int32_t* type, const EmbeddedPair* table, int types, double slope, double middle,
                           double* density, double* d_density_i, double* d_density_j, double* d_pair);
  /// Lennard-Jones over all pairs of an open cluster: planes x | y | z of `padded` coordinates each (a multiple of 8;
  /// the last ones beyond n far away from everything and from each other). Forces in the same layout, zeroed here.
  double (*lennard_jones_all)(std::size_t n, std::size_t padded, const double* planes, double* forces,
                              const LennardJonesCoefficients& c);
  /// Lennard-Jones over n distances: writes (dE/dr) / r per pair; returns the energy.
  double (*lennard_jones_pairs)(std::size_t n, const double* r, double* slope_over_r,
                                const LennardJonesCoefficients& c);
  /// Morse wells over n distances, kind: row of `table` per pair. Writes (dE/dr) / r; returns the energy.
  double (*morse_pairs)(std::size_t n, const double* r, const std::int32_t* kind, const PriorPair* table,
                        double* slope_over_r);
  /// exp(-fall r) (cos(turn r) + 1) / 2 and its derivative over r at n distances, 0 < turn r < pi: what a neighbour
  /// adds to a local density (density.hpp).
  void (*screened_pairs)(std::size_t n, const double* r, double fall, double turn, double* value, double* slope_over_r);
};

THALWEG_DISPATCH(PotentialKernels, potential_kernels)

}  // namespace thalweg
