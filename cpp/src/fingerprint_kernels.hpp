// Inner loops of the fingerprint, one table per instruction set (isa.hpp). Plain data and raw pointers only.
//
// How a histogram is made. A *sample* (a pair or a triplet) sits at a coordinate q, in units of the bin width, inside
// bin floor(q); what it adds to the bins around is a function of its place p = q - floor(q) in that bin, and this
// function is analytic on each of a few *pieces* of 0 <= p <= 1. On a piece it is a polynomial of degree 7 in t = scale
// p + shift, -1 <= t <= 1 (error about 1e-13). A sample therefore only adds weight (1, t, ..., t^7) to the moments of
// its *slot* (block, bin, piece), and each slot in use is expanded to bins once. The derivative runs the same steps
// backwards: each slot's polynomial of the weighted features, then one evaluation per sample.
//
//   slot = (block * centers + bin) * pieces + piece
//   moments     [slot][8]
//   histogram   [4 copies][block][stride], a window starts at bin + ((-bin) & 3) of copy bin & 3: aligned accesses
//   weights     [block][stride], bin b of the block at b + reach
//   polynomials [slot][16]: 8 coefficients of the value, 8 of its derivative with respect to q
#pragma once

#include <cstddef>
#include <cstdint>

namespace thalweg {

inline constexpr int kPowers = 8;  // coefficients of a piece
inline constexpr int kLanes = 4;   // arrays of samples and neighbours are padded to multiples of this

/// Where the window of a slot starts.
struct SlotPlace {
  std::int32_t window;     // in [block][stride] arrays
  std::int32_t histogram;  // in the histogram's copies
  std::int32_t piece;
};

struct HistogramAxis {
  std::int32_t bins, reach;              // a window is the bins center - reach .. center + reach
  std::int32_t centers;                  // bins that samples may sit in
  std::int32_t columns, padded_columns;  // 2 reach + 1, and rounded up to a multiple of kLanes
  std::int32_t pieces, stride;
  double inverse_width;     // q = coordinate * inverse_width
  const double* breaks;     // (pieces - 1) between 0 and 1
  const double* scale;      // (pieces)
  const double* shift;      // (pieces)
  const double* by_power;   // (pieces, kPowers, padded_columns)
  const SlotPlace* places;  // (slots)
  const double* by_column;  // (pieces, padded_columns, kPowers)
};

/// Samples of one histogram; every array has room for n rounded up to kLanes.
struct Samples {
  std::size_t n;
  double *t, *weight;
  std::int32_t *block, *slot;
};

/// Slots in use, in the order in which samples first met them.
struct SlotsInUse {
  std::size_t n;
  std::int32_t* slots;
  std::uint8_t* in_use;  // (blocks * centers * pieces)
};

/// Neighbours within the angular cutoff, by centre: those of centre i are first[i] .. last[i] - 1, first[i] a multiple
/// of kLanes, and entries up to the next multiple of kLanes are zeros. The first of a triplet's two neighbours comes
/// before partners[i] (last[i] unless some pairs of neighbours are left out).
struct NearNeighbors {
  std::size_t centers;
  const std::int32_t *first, *last, *partners;
  const std::int32_t* species;
  const double *ux, *uy, *uz;  // unit vectors from the centre
  const double *inverse_r, *cutoff, *cutoff_slope;
};

/// Triplets in the order centre, first neighbour a, second neighbour b > a.
struct Triplets {
  Samples samples;
  double* cosine;
  double* half_square;  // sin^2(angle / 2) if the angle is acute, else cos^2(angle / 2): precise near 0 and pi
};

struct FingerprintKernels {
  /// Blocks, weights fc fc', cosines of all triplets; returns their number. block_of: (species, species, species).
  std::size_t (*find_triplets)(const NearNeighbors&, const std::int32_t* center_species, std::int32_t n_species,
                               const std::int32_t* block_of, Triplets&);
  /// t and slot of each sample; the padding of samples points at slot 0.
  void (*locate_pairs)(const HistogramAxis&, const double* r, double norm, Samples&);
  void (*locate_triplets)(const HistogramAxis&, Triplets&);
  void (*deposit)(const Samples&, double* moments, SlotsInUse&);
  /// Adds the slots' moments to the histogram and zeroes moments and in_use; the list of slots stays.
  void (*expand)(const HistogramAxis&, const SlotsInUse&, double* moments, double* histogram);
  void (*project)(const HistogramAxis&, const SlotsInUse&, const double* weights, double* polynomials);
  /// value and slope (d/dq) of the weighted features of each sample, for weight 1.
  void (*evaluate)(const Samples&, const double* polynomials, double* value, double* slope);
  /// pull: scratch (10, neighbors). On return its rows 0..2 hold the derivative with respect to each neighbour's
  /// position; the centre's is minus their sum. value and slope are those of evaluate() and start kLanes after the
  /// beginning of their arrays, as cosine does; slope is overwritten. neighbors: a multiple of kLanes.
  void (*triplet_gradient)(const NearNeighbors&, const Triplets&, double slope_scale, double* value, double* slope,
                           double* pull, std::size_t neighbors);
  void (*pair_gradient)(const Samples&, const std::int32_t* i, const std::int32_t* j, const double* d, const double* r,
                        double slope_scale, const double* value, const double* slope, double* gradient);
  /// rows: (3 atoms, row_stride), the padded radial blocks of each coordinate.
  void (*pair_jacobian)(const HistogramAxis&, const Samples&, const std::int32_t* i, const std::int32_t* j,
                        const double* d, const double* r, double* rows, std::size_t row_stride);
  /// rows: (3 atoms, row_stride), the padded angular blocks. neighbor_atom: the atom of each neighbour.
  void (*triplet_jacobian)(const HistogramAxis&, const NearNeighbors&, const Triplets&,
                           const std::int32_t* neighbor_atom, double* rows, std::size_t row_stride);
};

}  // namespace thalweg
