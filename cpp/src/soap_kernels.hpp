// Inner loops of SOAP, one table per instruction set (isa.hpp). Plain data and raw pointers only.
//
// Lanes are neighbours: those of one centre and species lie together, padded with points beyond the reach to a multiple
// of kSoapLanes. Their sums
//   sums[lm][k] = sum_j w(r_j) exp(-gamma_kl r_j^2) H_lm(r_j)         H: real solid harmonics without their norms
// hold the l-th radial function's primitives k; the matrices beta and all norms are applied once per centre:
//   c[lm][s padded_n + n] = norm_lm sum_k to_basis[l][k][n] sums[lm][k]
// lm = l^2 + l + m. Rows of c are `channels` long: species by species, n within, rounded up to a multiple of 4 by
// zeros.
#pragma once

#include <cstddef>
#include <cstdint>

namespace thalweg {

inline constexpr std::size_t kSoapLanes = 8;

struct SoapBasis {
  std::size_t n_max, l_max, harmonics;      // harmonics = (l_max + 1)^2
  std::size_t species, padded_n, channels;  // channels = species * padded_n
  std::size_t exponents;                    // different gammas: those of k = 0 are the same for every l
  std::size_t size;                         // D
  double r_cut, reach;
  bool smooth;
  const double* gamma;              // (exponents)
  const std::int32_t* exponent_of;  // (l_max + 1, n_max)
  const double* to_basis;           // (l_max + 1, n_max, padded_n): [l][k][n]
  const double* from_basis;         // (l_max + 1, n_max, padded_n): [l][n][k], the same transposed
  const double* norm;               // (harmonics)
  const double* factor;             // (l_max + 1): pi sqrt(8 / (2 l + 1))
};

/// Neighbours of one centre and species: vectors from the centre.
struct SoapNeighbors {
  std::size_t count;  // a multiple of kSoapLanes
  const double *x, *y, *z;
};

struct SoapKernels {
  /// Length of the scratch that the functions below take.
  std::size_t (*scratch)(const SoapBasis&);
  /// c: the columns of one species, rows `channels` apart.
  void (*expand)(const SoapBasis&, const SoapNeighbors&, double* c, double* scratch);
  /// features (D) of c (harmonics, channels).
  void (*spectrum)(const SoapBasis&, const double* c, double* features, double* scratch);
  /// matrices (l_max + 1, channels, channels), symmetric: d(weights . features)/dc = matrix_l c_lm.
  void (*unfold)(const SoapBasis&, const double* weights, double* matrices);
  /// slope (harmonics, channels) = d(weights . features)/d(sums), laid out as c: [lm][s padded_n + k].
  void (*backward)(const SoapBasis&, const double* matrices, const double* c, double* slope, double* scratch);
  /// Derivatives with respect to each neighbour's position; slope: the columns of its species.
  void (*pull)(const SoapBasis&, const SoapNeighbors&, const double* slope, double* gx, double* gy, double* gz,
               double* scratch);
  /// Adds d(sums)/d(neighbour) to rows of (3, harmonics, padded_n) at out + atom * 3 harmonics padded_n of each of the
  /// first `real` neighbours.
  void (*sum_slopes)(const SoapBasis&, const SoapNeighbors&, std::size_t real, const std::int32_t* atom, double* out,
                     double* scratch);
  /// features (D): the derivative of the spectrum along the change `sums` (harmonics, padded_n) of one species' sums.
  void (*spectrum_slope)(const SoapBasis&, const double* c, std::size_t species, const double* sums, double* features,
                         double* scratch);
};

}  // namespace thalweg
