// Neighbours on the device: a full list (every pair from both of its ends, an atom's own images included), in the order
// (atom, image) of the CPU's. What lies in one block of memory:
//
//   count            (m)            neighbours of each atom
//   atom, x, y, z, r (m, capacity)  neighbour (number in the batch), vector to it, distance < cutoff [angstrom]
//   usable           (n)            0: a coordinate is not finite or beyond 1e9 angstrom; such a structure has no pairs
#pragma once

#include <algorithm>
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

/// The entry of `e` (an edge from i) as seen from its other end, or -1 (at the cutoff to the last bit).
__device__ inline std::int64_t reverse_edge(const NeighborView& list, std::int64_t i, std::int64_t e) {
  const std::int64_t j = list.atom[e], last = j * list.capacity + list.count[j];
  for (std::int64_t back = j * list.capacity; back < last; ++back)
    if (list.atom[back] == i && list.x[back] == -list.x[e] && list.y[back] == -list.y[e] && list.z[back] == -list.z[e])
      return back;
  return -1;
}

/// Adds up, over this lane's share of the edges of atom i, derivatives of what its centres feel: pull (3 planes) holds
/// those of each centre by the vectors to its neighbours.
__device__ inline void gather_pulls(const NeighborView& list, std::int64_t i, const double* pull, std::size_t plane,
                                    double* sum) {
  for (std::int64_t e = i * list.capacity + lane_index(); e < i * list.capacity + list.count[i]; e += kLanes) {
    const std::int64_t back = reverse_edge(list, i, e);
    for (int c = 0; c < 3; ++c) {
      const double* of_axis = pull + static_cast<std::size_t>(c) * plane;
      sum[c] -= of_axis[e];
      if (back >= 0) sum[c] += of_axis[back];
    }
  }
}

inline constexpr double kOnOnePoint = 1e-6;  // angstrom, as on the CPU

/// Whether a structure has no features: a coordinate is not usable, or atoms lie on one point. The whole block asks;
/// scratch as in block_sum.
__device__ inline bool without_features(const Rows& rows, const NeighborView& list, double* scratch) {
  const unsigned row = blockIdx.x;
  double bad = list.usable[row] ? 0.0 : 1.0;
  for (std::int64_t i = rows.offsets[row] + warp_index(); i < rows.offsets[row + 1]; i += kWarps)
    for (std::int64_t e = i * list.capacity + lane_index(); e < i * list.capacity + list.count[i]; e += kLanes)
      bad += list.r[e] > kOnOnePoint ? 0.0 : 1.0;
  return block_sum(bad, scratch) > 0;
}

/// A batch on the host, for what is decided there once: species, tables, lattices.
struct HostBatch {
  explicit HostBatch(const BatchView& device, Stream stream);
  thalweg::BatchView view() const { return {positions, numbers, offsets, cells, pbc, {}}; }
  std::vector<double> positions, cells;
  std::vector<std::int32_t> numbers;
  std::vector<std::int64_t> offsets;
  std::vector<std::uint8_t> pbc;
};

/// Throws Error where descriptor.check refuses a structure.
template <class Descriptor>
void check_each(const Descriptor& descriptor, const HostBatch& host) {
  for (std::size_t row = 0; row < host.view().size(); ++row) {
    try {
      descriptor.check(host.view()[row]);
    } catch (const Error& error) {
      throw Error("structure " + std::to_string(row) + " of the batch: " + error.what());
    }
  }
}

/// Place of each atom's species among these, which rise; all are there.
inline std::vector<std::int32_t> places_among(std::span<const std::int32_t> species, const HostBatch& host) {
  std::vector<std::int32_t> out;
  for (const std::int32_t number : host.numbers)
    out.push_back(
        static_cast<std::int32_t>(std::lower_bound(species.begin(), species.end(), number) - species.begin()));
  return out;
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
