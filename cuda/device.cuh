// What every .cu file uses: launch configuration, error checks, sums in a fixed order. Blocks have kThreads threads,
// kWarps warps. Shared memory is dynamic throughout, so that the emulator can watch its bounds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>

#include "compat.hpp"
#include "thalweg/core.hpp"
#include "thalweg/cuda.hpp"

namespace thalweg::cuda {

inline constexpr unsigned kThreads = 128, kLanes = 32, kWarps = kThreads / kLanes, kAllLanes = 0xFFFFFFFFu;

/// Throws Error if a call or the launches before it failed; `what` names the work.
void check(cudaError_t error, const char* what);
inline void check_launch(const char* what) { check(cudaGetLastError(), what); }
inline cudaStream_t native(Stream stream) { return static_cast<cudaStream_t>(stream); }
inline unsigned blocks_for(std::size_t items, unsigned per_block = kThreads) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

// ---- in kernels ---------------------------------------------------------------------------------------------------

__device__ inline unsigned lane_index() { return threadIdx.x % kLanes; }
__device__ inline unsigned warp_index() { return threadIdx.x / kLanes; }
/// Number of this thread in a grid of one dimension.
__device__ inline std::size_t thread_index() { return std::size_t{blockIdx.x} * blockDim.x + threadIdx.x; }

/// Sum over the lanes of a warp, the same in all of them; a tree, always in the same order.
__device__ inline double warp_sum(double value) {
  for (int apart = kLanes / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(kAllLanes, value, apart);
  return value;
}
/// Sum over the lanes of a warp up to this one.
__device__ inline int warp_scan(int value) {
  for (unsigned apart = 1; apart < kLanes; apart *= 2) {
    const int below = __shfl_up_sync(kAllLanes, value, apart);
    if (lane_index() >= apart) value += below;
  }
  return value;
}
/// Writes from the first lane the sum over the warp of a vector of one atom, added to what is there if `add`.
__device__ inline void write_vector(double* vectors, std::int64_t atom, double x, double y, double z, bool add) {
  x = warp_sum(x);
  y = warp_sum(y);
  z = warp_sum(z);
  if (lane_index() != 0) return;
  double* to = vectors + 3 * atom;
  to[0] = add ? to[0] + x : x;
  to[1] = add ? to[1] + y : y;
  to[2] = add ? to[2] + z : z;
}
/// Sum over a block of kThreads; the same bits in every thread. scratch: kWarps doubles of shared memory that nobody
/// else uses; may be used again at once (the sum ends with a barrier).
__device__ inline double block_sum(double value, double* scratch) {
  value = warp_sum(value);
  if (lane_index() == 0) scratch[warp_index()] = value;
  __syncthreads();
  double total = scratch[0];
  for (unsigned warp = 1; warp < kWarps; ++warp) total += scratch[warp];
  __syncthreads();
  return total;
}
__device__ inline double block_max(double value, double* scratch) {
  for (int apart = kLanes / 2; apart > 0; apart /= 2) value = fmax(value, __shfl_xor_sync(kAllLanes, value, apart));
  if (lane_index() == 0) scratch[warp_index()] = value;
  __syncthreads();
  double most = scratch[0];
  for (unsigned warp = 1; warp < kWarps; ++warp) most = fmax(most, scratch[warp]);
  __syncthreads();
  return most;
}
__device__ inline double dot3(const double* a, const double* b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; }
__device__ inline double not_a_number() { return std::numeric_limits<double>::quiet_NaN(); }

}  // namespace thalweg::cuda
