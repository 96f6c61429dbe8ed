// Inner loops of FCHL19, one table per instruction set (isa.hpp). Plain data and raw pointers only.
//
// Lanes are neighbours k of one centre and species, padded to a multiple of kFchlLanes with points of weight 0, no two
// of them on one place; j runs over them one by one. A triplet is a function of the vectors a, b to j and k:
//   f_j f_k |b - a|^-n3 (1 + 3 cos cos cos) G_l((|a| + |b|) / 2) A_m(theta)       f(r) = g(r) r^-n3
// G_l are Gaussians around the points of an even grid: one exponential gives the first of `chunk` of them, another one
// the ratio to the next, which then shrinks by a constant from point to point.
#pragma once

#include <cstddef>
#include <cstdint>

namespace thalweg {

inline constexpr std::size_t kFchlLanes = 8;
inline constexpr std::size_t kFchlMostRadial = 128, kFchlMostAngles = 16;  // fchl.cpp checks

struct Fchl19Basis {
  std::size_t species, size;                  // size: D
  std::size_t n_pairs, n_triplets, n_angles;  // n_angles = 2 n_fourier: cos and sin of each order
  std::size_t padded_pairs;                   // n_pairs rounded up to kFchlLanes
  std::size_t chunk;                          // Gaussians from one exponential
  double cutoff_pairs, cutoff_triplets;       // angstrom
  double eta_pairs, eta_triplets, step;       // step: between the points of the triplets' grid, angstrom
  double shrink;                              // exp(-2 eta_triplets step^2)
  double decay_pairs, decay_triplets;
  const double *log_grid, *inverse_grid;  // (padded_pairs): ln R_k, 1 / (R_k sqrt(2 pi)), zero in the padding
  const double* order_weight;             // (n_fourier): 2 w (eta3 / pi)^1/2 exp(-(zeta o)^2 / 2)
};

/// Neighbours of one centre within the triplets' cutoff. Group s: [first[s], first[s] + count[s]), then padding up to
/// first[s + 1].
struct Fchl19Neighbors {
  const std::size_t *first, *count;
  const double *x, *y, *z, *r;  // vector to the neighbour and its length
  const double *f, *df;         // g(r) r^-n3 and its derivative over r
};

struct Fchl19Kernels {
  /// Length of the scratch that triplets() and jacobian() take.
  std::size_t (*scratch)(const Fchl19Basis&);
  /// value, slope (padded_pairs): what a pair at distance r adds to both ends' features, and the derivative over r.
  void (*pair)(const Fchl19Basis&, double r, double* value, double* slope);
  /// Triplet part of a centre's features: (species (species + 1) / 2, n_triplets, n_angles).
  void (*triplets)(const Fchl19Basis&, const Fchl19Neighbors&, double* features, double* scratch);
  /// gx, gy, gz: sets the derivative of weights . triplets with respect to each neighbour's position.
  void (*pull)(const Fchl19Basis&, const Fchl19Neighbors&, const double* weights, double* gx, double* gy, double* gz);
  /// Adds d(triplets)/d(neighbour) to rows of D numbers at out + (3 atom + axis) D, from `column` on.
  void (*jacobian)(const Fchl19Basis&, const Fchl19Neighbors&, const std::int32_t* atom, double* out,
                   std::size_t column, double* scratch);
};

}  // namespace thalweg
