#include <algorithm>

#include "neighbors.cuh"

namespace thalweg::cuda {
namespace {

constexpr double kFarthest = 1e9;  // angstrom, as on the CPU
constexpr double kSlack = 1e-6;    // of a lattice vector: rounding cannot lose an image; the distance decides

/// Calls visit(x, y, z, r) for every image of b within the cutoff of a, the atom itself left out.
template <class Visit>
__device__ void for_images(const PeriodicLattice& lattice, const double* a, const double* b, bool same, double cutoff,
                           Visit visit) {
  int low[3] = {0, 0, 0}, high[3] = {0, 0, 0};
  for (int k = 0; k < 3; ++k) {
    if (!lattice.periodic[k]) continue;
    const double offset = dot3(a, lattice.reciprocal + 3 * k) - dot3(b, lattice.reciprocal + 3 * k);
    const double range = cutoff / lattice.height[k] + kSlack;
    low[k] = static_cast<int>(ceil(offset - range));
    high[k] = static_cast<int>(floor(offset + range));
  }
  for (int p = low[0]; p <= high[0]; ++p)
    for (int q = low[1]; q <= high[1]; ++q)
      for (int s = low[2]; s <= high[2]; ++s) {
        if (same && p == 0 && q == 0 && s == 0) continue;
        double d[3];
        // Written so that the pair seen from its other end gives exactly the negative.
        for (int c = 0; c < 3; ++c) {
          double shift = 0.0;
          if (lattice.periodic[0]) shift += p * lattice.vectors[c];
          if (lattice.periodic[1]) shift += q * lattice.vectors[3 + c];
          if (lattice.periodic[2]) shift += s * lattice.vectors[6 + c];
          d[c] = (b[c] - a[c]) + shift;
        }
        const double square = dot3(d, d);
        if (square < cutoff * cutoff) visit(d[0], d[1], d[2], sqrt(square));
      }
}

// A block a structure, a warp an atom, a lane a candidate; lanes count first, so that each knows where to write.
__global__ void __launch_bounds__(kThreads)
    find_neighbors(Rows rows, const double* positions, const PeriodicLattice* lattices, double cutoff, NeighborView out,
                   std::int32_t* needed) {
  THALWEG_DYNAMIC_SHARED(double, scratch);  // kWarps
  const unsigned row = blockIdx.x;
  if (rows.skips(row)) return;
  const std::int64_t first = rows.offsets[row];
  const int n = static_cast<int>(rows.offsets[row + 1] - first);
  double bad = 0;
  for (int k = static_cast<int>(threadIdx.x); k < 3 * n; k += kThreads)
    bad += fabs(positions[3 * first + k]) <= kFarthest ? 0.0 : 1.0;
  bad = block_sum(bad, scratch);
  if (threadIdx.x == 0) out.usable[row] = bad == 0.0;
  const PeriodicLattice& lattice = lattices[row];
  const int lane = static_cast<int>(lane_index());
  for (int i = static_cast<int>(warp_index()); i < n; i += kWarps) {
    const std::int64_t list = (first + i) * out.capacity;
    const double* a = positions + 3 * (first + i);
    int found = 0;
    for (int base = 0; base < n && bad == 0.0; base += kLanes) {
      const int j = base + lane;
      const double* b = positions + 3 * (first + j);
      int mine = 0;
      if (j < n) for_images(lattice, a, b, i == j, cutoff, [&](double, double, double, double) { ++mine; });
      const int until = warp_scan(mine);
      int place = found + until - mine;
      if (mine > 0)
        for_images(lattice, a, b, i == j, cutoff, [&](double x, double y, double z, double r) {
          if (place < out.capacity) {
            out.atom[list + place] = static_cast<std::int32_t>(first + j);
            out.x[list + place] = x;
            out.y[list + place] = y;
            out.z[list + place] = z;
            out.r[list + place] = r;
          }
          ++place;
        });
      found += __shfl_sync(kAllLanes, until, kLanes - 1);
    }
    if (lane == 0) {
      out.count[first + i] = found < out.capacity ? found : out.capacity;
      atomicMax(needed, found);
    }
  }
}

}  // namespace

HostBatch::HostBatch(const BatchView& device, Stream stream)
    : positions(3 * device.atoms),
      cells(9 * device.structures),
      numbers(device.atoms),
      offsets(device.structures + 1),
      pbc(3 * device.structures) {
  require();
  copy_to_host(cells.data(), device.cells, cells.size() * sizeof(double), stream);
  copy_to_host(numbers.data(), device.numbers, numbers.size() * sizeof(std::int32_t), stream);
  copy_to_host(offsets.data(), device.offsets, offsets.size() * sizeof(std::int64_t), stream);
  copy_to_host(pbc.data(), device.pbc, pbc.size(), stream);
  view().check();
}

NeighborList::NeighborList(const HostBatch& batch, double cutoff, Stream stream)
    : structures_(batch.pbc.size() / 3),
      atoms_(batch.numbers.size()),
      cutoff_(cutoff),
      count_(atoms_),
      needed_(1),
      usable_(structures_) {
  std::vector<PeriodicLattice> lattices;
  const thalweg::NeighborList checks(cutoff, 0.0);
  for (std::size_t row = 0; row < structures_; ++row) {
    checks.check_cell(batch.view()[row]);
    lattices.emplace_back(batch.view()[row]);
  }
  lattices_ = Array<PeriodicLattice>(std::span<const PeriodicLattice>(lattices), stream);
  reserve(64);
  copy_to_host(lattices.data(), lattices_.data(), 0, stream);  // `lattices` must live until the copy is done
}

void NeighborList::reserve(std::int32_t capacity) {
  capacity_ = (capacity + 31) / 32 * 32;
  const std::size_t size = atoms_ * static_cast<std::size_t>(capacity_);
  atom_ = Array<std::int32_t>(size);
  vectors_ = Array<double>(4 * size);
}

NeighborView NeighborList::view() {
  const std::size_t size = atoms_ * static_cast<std::size_t>(capacity_);
  double* v = vectors_.data();
  return {capacity_, count_.data(), atom_.data(), v, v + size, v + 2 * size, v + 3 * size, usable_.data()};
}

void NeighborList::update(const Rows& rows, const double* positions, Stream stream) {
  if (structures_ == 0) return;
  for (;;) {
    fill_bytes(needed_.data(), 0, sizeof(std::int32_t), stream);
    THALWEG_LAUNCH(find_neighbors, static_cast<unsigned>(structures_), kThreads, kWarps * sizeof(double),
                   native(stream), rows, positions, lattices_.data(), cutoff_, view(), needed_.data());
    check_launch("the search for neighbours");
    std::int32_t needed = 0;
    copy_to_host(&needed, needed_.data(), sizeof(needed), stream);
    if (needed <= capacity_) return;
    reserve(needed + needed / 4);
  }
}

}  // namespace thalweg::cuda
