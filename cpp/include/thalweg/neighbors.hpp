// Neighbour pairs of one structure under any mixture of periodic and open directions and any cell, skewed ones
// included, with a Verlet skin: within a relaxation only distances are recomputed until an atom has moved skin / 2.
//
// Half list: every pair (i, j, image) once. An atom and its own image form a pair with i == j, also once.
//   i[p], j[p]        atoms                       p = 0 .. size() - 1
//   d[3 p .. 3 p + 2] r_j + image - r_i, angstrom
//   r[p]              its length, r[p] < cutoff
#pragma once

#include <cstddef>
#include <vector>

#include "thalweg/core.hpp"

namespace thalweg {

class NeighborList {
 public:
  /// without_still: leaves out pairs of atoms that are fixed in all coordinates.
  explicit NeighborList(double cutoff, double skin = 0.5, bool without_still = false);

  /// Brings the pairs up to date with the structure. Rebuilds the candidates when an atom has moved by more than
  /// skin / 2 since they were found, or when n, cell or pbc changed. The order of pairs is deterministic given the
  /// positions alone (it does not depend on when the candidates were found), so energies are reproducible bit for bit
  /// from a fresh list: (i, j, image) rises. Throws Error if a periodic direction has a zero or degenerate lattice
  /// vector, or a position is not finite or beyond 1e9 angstrom. No allocation while the number of pairs does not grow.
  void update(const StructureView& structure);

  /// Throws Error if the lattice of the periodic directions cannot be used: the checks of update() that do not depend
  /// on positions.
  void check_cell(const StructureView& structure) const;

  std::size_t size() const { return count_; }
  const std::int32_t* i() const { return i_.data(); }
  const std::int32_t* j() const { return j_.data(); }
  const double* d() const { return d_.data(); }
  const double* r() const { return r_.data(); }
  double cutoff() const { return cutoff_; }
  std::size_t rebuilds() const { return rebuilds_; }

 private:
  struct Lattice;
  void rebuild(const StructureView& structure);
  void find_directly(const StructureView& structure, const Lattice& lattice);
  void find_in_bins(const StructureView& structure, const Lattice& lattice);
  bool both_still(std::size_t i, std::size_t j) const { return without_still_ && still_[i] && still_[j]; }
  void add_candidate(std::size_t i, std::size_t j, const double* shift);

  double cutoff_, skin_;
  bool without_still_, built_ = false;
  std::size_t rebuilds_ = 0, count_ = 0;
  // candidates within cutoff + skin, and the structure they were found for
  std::vector<std::int32_t> candidate_i_, candidate_j_;
  std::vector<double> candidate_shift_, reference_, fractional_;
  double cell_[9] = {};
  std::uint8_t pbc_[3] = {};
  std::vector<std::uint8_t> still_;  // (n); empty unless without_still
  // pairs within cutoff: the first count_ entries; the arrays are as long as the candidates
  std::vector<std::int32_t> i_, j_;
  std::vector<double> d_, r_;
};

}  // namespace thalweg
