// Faults planted on purpose, to see that they are caught: `cuda_faults NAME` runs one small kernel that is wrong in one
// way and prints what noticed it ("caught: ..."), unless a sanitizer ends the program first. `none` is the kernel
// without the fault, which must pass everywhere.
#include <cstdio>
#include <cstring>
#include <functional>
#include <vector>

#include "device.cuh"

namespace {

using namespace thalweg;
using namespace thalweg::cuda;

enum class Fault {
  none,
  missing_barrier,
  missing_warp_barrier,
  shared_out_of_bounds,
  device_out_of_bounds,
  race_in_block,
  race_between_blocks,
  early_exit,
  divergent_barrier,
  divergent_lanes,
};
constexpr const char* kNames[] = {
    "none",          "missing_barrier",     "missing_warp_barrier", "shared_out_of_bounds", "device_out_of_bounds",
    "race_in_block", "race_between_blocks", "early_exit",           "divergent_barrier",    "divergent_lanes"};

/// Each block turns its part of `in` round by way of shared memory, and all add up what they saw.
__global__ void turn_round(Fault fault, const double* in, double* out, int* seen, int* plain) {
  THALWEG_DYNAMIC_SHARED(double, tile);  // kThreads
  const unsigned t = threadIdx.x, last = kThreads - 1;
  const std::size_t first = std::size_t{blockIdx.x} * kThreads;
  tile[fault == Fault::shared_out_of_bounds ? t + 1 : t] = in[first + t];
  if (fault == Fault::early_exit && t == 5) return;
  if (fault == Fault::divergent_barrier && t % 2 == 0) {
    __syncthreads();
  } else if (fault != Fault::missing_barrier) {
    __syncthreads();
  }
  double value = tile[last - t];
  if (fault == Fault::divergent_lanes && t == 3) __syncwarp();
  value += 0.0 * __shfl_xor_sync(kAllLanes, value, 1);
  out[fault == Fault::device_out_of_bounds ? first + 2 * t : first + t] = value;
  if (fault == Fault::race_in_block) {
    __syncthreads();
    tile[t / 2] = value;  // two threads, one place
  }
  if (fault == Fault::missing_warp_barrier) {
    __syncthreads();
    if (lane_index() == 0) tile[t] = value;
    out[first + t] = tile[t - lane_index()];
  }
  atomicAdd(seen, 1);
  if (fault == Fault::race_between_blocks && t == 0) *plain += 1;
}

std::vector<double> run(Fault fault, unsigned order) {
  if constexpr (kEmulated) thalweg::emulator::set_order(order);
  constexpr unsigned blocks = 3;
  std::vector<double> values(blocks * kThreads);
  for (std::size_t k = 0; k < values.size(); ++k) values[k] = static_cast<double>(k);
  const std::vector<int> zero(1, 0);
  Array<double> in(std::span<const double>{values}), out(values.size());
  Array<int> seen(std::span<const int>{zero}), plain(std::span<const int>{zero});
  THALWEG_LAUNCH(turn_round, blocks, kThreads, kThreads * sizeof(double), nullptr, fault, in.data(), out.data(),
                 seen.data(), plain.data());
  check_launch("turning round");
  return out.download();
}

}  // namespace

int main(int count, char** arguments) {
  int which = -1;
  for (int k = 0; k < static_cast<int>(std::size(kNames)); ++k)
    if (count == 2 && std::strcmp(arguments[1], kNames[k]) == 0) which = k;
  if (which < 0) {
    std::printf("usage: cuda_faults NAME; names:");
    for (const char* name : kNames) std::printf(" %s", name);
    std::printf("\n");
    return 2;
  }
  try {
    const std::vector<double> forward = run(static_cast<Fault>(which), 0);
    for (const unsigned order : {1u, 7u})
      if (const std::vector<double> other = run(static_cast<Fault>(which), order);
          std::memcmp(forward.data(), other.data(), forward.size() * sizeof(double)) != 0) {
        std::printf("caught: the result depends on the order of threads\n");
        return 1;
      }
    for (std::size_t k = 0; k < forward.size(); ++k)
      if (forward[k] != static_cast<double>(k / kThreads * kThreads + kThreads - 1 - k % kThreads)) {
        std::printf("caught: the result is wrong\n");
        return 1;
      }
  } catch (const Error& error) {
    std::printf("caught: %s\n", error.what());
    return 1;
  }
  std::printf("nothing was caught\n");
  return 0;
}
