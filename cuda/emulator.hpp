// Runs CUDA kernels on the CPU, to test them: every CUDA thread is a fiber, a block stays on one OS thread, and the
// fibers of a block take turns at barriers. The names below are those of CUDA, so that a .cu file compiles unchanged.
//
//   block:  thread 0 ----run----> barrier | thread 1 ----run----> barrier | ... | thread 0 ----run----> barrier | ...
//
// What it finds:
//   always          threads at different barriers, threads that left before a barrier of the others, bad launch
//                   shapes; writes past the end of dynamic shared memory. The launch then fails and cudaGetLastError()
//                   tells; emulator::last_failure() says which thread and line.
//   by comparison   a missing barrier: run the threads of a block in another order (set_order) and the results differ;
//                   device and shared memory start as NaN (0xFF), so what nobody wrote shows
//   AddressSanitizer  out of bounds, in device memory and in dynamic shared memory, which have their exact sizes
//   ThreadSanitizer   data races inside a warp, inside a block and between blocks: each CUDA thread counts as a thread
//                   of its own that only barriers, shuffles and launches order
// What it does not model: the memory model of a device, asynchrony (every call is done when it returns), limits of
// registers, tensor cores, speed. Static __shared__ arrays work, but only dynamic ones are checked for overruns.
#pragma once

#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <string>
#include <type_traits>

// ---- language -----------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace thalweg::emulator {

inline constexpr int kWarp = 32;

/// What a kernel may ask about where it runs. One per OS thread; a switch of fibers updates thread_index.
struct Place {
  dim3 thread_index, block_index, block_dim, grid_dim;
};
Place& place();

void* dynamic_shared();
void block_barrier(const std::source_location& where);
void warp_barrier(const std::source_location& where);
/// The bits of `value` of lane `source` of this warp (all lanes call it); the own ones if there is no such lane.
std::uint64_t exchange(std::uint64_t value, int source, const std::source_location& where);
int lane();

/// 0: threads of a block run in rising order; 1: falling; others: shuffled with this seed. From the environment
/// variable THALWEG_EMULATOR_ORDER at first.
void set_order(unsigned order);
/// What the last failed launch complained about; empty if none failed.
const std::string& last_failure();

void run(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& thread);

template <class... Parameters, class... Arguments>
void launch(dim3 grid, dim3 block, std::size_t shared_bytes, void* /*stream*/, void (*kernel)(Parameters...),
            Arguments&&... arguments) {
  // Arguments are evaluated once and passed by value, as in a launch on a device.
  const auto bound = std::bind_front(kernel, static_cast<Parameters>(arguments)...);
  run(grid, block, shared_bytes, [&bound] { bound(); });
}

template <class T>
T shuffle(T value, int source, const std::source_location& where) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t) && std::is_trivially_copyable_v<T>);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(bits, source, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace thalweg::emulator

#define threadIdx (thalweg::emulator::place().thread_index)
#define blockIdx (thalweg::emulator::place().block_index)
#define blockDim (thalweg::emulator::place().block_dim)
#define gridDim (thalweg::emulator::place().grid_dim)
inline constexpr int warpSize = thalweg::emulator::kWarp;

inline void __syncthreads(const std::source_location& where = std::source_location::current()) {
  thalweg::emulator::block_barrier(where);
}
// Of masks only the full one is known: all lanes of a warp take part.
inline void __syncwarp(unsigned = ~0u, const std::source_location& where = std::source_location::current()) {
  thalweg::emulator::warp_barrier(where);
}
template <class T>
T __shfl_sync(unsigned, T value, int source, const std::source_location& where = std::source_location::current()) {
  return thalweg::emulator::shuffle(value, source, where);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask, const std::source_location& where = std::source_location::current()) {
  return thalweg::emulator::shuffle(value, thalweg::emulator::lane() ^ mask, where);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int by, const std::source_location& where = std::source_location::current()) {
  return thalweg::emulator::shuffle(value, thalweg::emulator::lane() + by, where);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int by, const std::source_location& where = std::source_location::current()) {
  return thalweg::emulator::shuffle(value, thalweg::emulator::lane() - by, where);
}
template <class T>
T atomicAdd(T* at, T value) {
  return std::atomic_ref<T>(*at).fetch_add(value, std::memory_order_relaxed);
}
template <class T>
T atomicOr(T* at, T value) {
  return std::atomic_ref<T>(*at).fetch_or(value, std::memory_order_relaxed);
}
template <class T>
T atomicMax(T* at, T value) {
  T seen = std::atomic_ref<T>(*at).load(std::memory_order_relaxed);
  while (seen < value && !std::atomic_ref<T>(*at).compare_exchange_weak(seen, value, std::memory_order_relaxed)) {
  }
  return seen;
}

// ---- the part of the runtime that host code uses --------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };

cudaError_t cudaMalloc(void** out, std::size_t bytes);
cudaError_t cudaFree(void* memory);
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaGetDeviceCount(int* count);
/// Returns and forgets the first failure since the last call.
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
