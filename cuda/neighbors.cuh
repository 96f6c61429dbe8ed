// Neighbours on the device: a full list (every pair from both of its ends, an atom's own images included), in the order
// (atom, image) of the CPU's. What lies in one block of memory:
//
//   count            (m)            neighbours of each atom
//   atom, x, y, z, r (m, capacity)  neighbour (number in the batch), vector to it, distance < cutoff [angstrom]
//   usable           (n)            0: a coordinate is not finite or beyond 1e9 angstrom; such a structure has no pairs
#pragma once

#include <vector>

#include "device.cuh"
#include "lattice.hpp"
#include "thalweg/neighbors.hpp"

namespace thalweg::cuda {

struct NeighborView {
  std::int32_t capacity;
  std::int32_t *count, *atom;
  double *x, *y, *z, *r;
  std::uint8_t* usable;
};

/// What kernels that go through a batch take; skip may be null.
struct Rows {
  const std::int64_t* offsets;
  const std::uint8_t* skip;
  __device__ bool skips(unsigned row) const { return skip != nullptr && skip[row] != 0; }
};

/// A batch on the host, for what is decided there once: species, tables, lattices.
struct HostBatch {
  explicit HostBatch(const BatchView& device, Stream stream);
  thalweg::BatchView view() const { return {positions, numbers, offsets, cells, pbc, {}}; }
  std::vector<double> positions, cells;
  std::vector<std::int32_t> numbers;
  std::vector<std::int64_t> offsets;
  std::vector<std::uint8_t> pbc;
};

/// The entry of `e` (an edge from i) as seen from its other end, or -1 (at the cutoff to the last bit).
__device__ inline std::int64_t reverse_edge(const NeighborView& list, std::int64_t i, std::int64_t e) {
  const std::int64_t j = list.atom[e], last = j * list.capacity + list.count[j];
  for (std::int64_t back = j * list.capacity; back < last; ++back)
    if (list.atom[back] == i && list.x[back] == -list.x[e] && list.y[back] == -list.y[e] && list.z[back] == -list.z[e])
      return back;
  return -1;
}

class NeighborList {
 public:
  /// Throws Error where thalweg::NeighborList refuses the cell of a structure.
  NeighborList(const HostBatch& batch, double cutoff, Stream stream);
  /// Waits for the device: whether the capacity was enough decides if the search is repeated with more.
  void update(const Rows& rows, const double* positions, Stream stream);
  NeighborView view();
  std::size_t structures() const { return structures_; }

 private:
  void reserve(std::int32_t capacity);
  std::size_t structures_, atoms_;
  double cutoff_;
  std::int32_t capacity_ = 0;
  Array<PeriodicLattice> lattices_;
  Array<std::int32_t> count_, atom_, needed_;
  Array<double> vectors_;  // x | y | z | r
  Array<std::uint8_t> usable_;
};

}  // namespace thalweg::cuda
