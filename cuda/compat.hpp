// Single source: nvcc sees CUDA, any C++20 compiler sees the emulator (emulator.hpp) under the same names. Kernels are
// plain CUDA apart from the two macros below. This is the only place that asks which compiler it is.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>
/// Instead of `extern __shared__ T name[];`.
#define THALWEG_DYNAMIC_SHARED(T, name)                                 \
  extern __shared__ __align__(16) unsigned char thalweg_shared_bytes[]; \
  T* const name = reinterpret_cast<T*>(thalweg_shared_bytes)
/// Instead of `kernel<<<grid, block, shared_bytes, stream>>>(arguments...)`.
#define THALWEG_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__)
#define THALWEG_HOST_DEVICE __host__ __device__
namespace thalweg::cuda {
inline constexpr bool kEmulated = false;
inline const char* last_emulated_failure() { return ""; }
}  // namespace thalweg::cuda
#else
#include "emulator.hpp"
#define THALWEG_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(thalweg::emulator::dynamic_shared())
#define THALWEG_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  thalweg::emulator::launch((grid), (block), (shared_bytes), (stream), kernel, __VA_ARGS__)
#define THALWEG_HOST_DEVICE
namespace thalweg::cuda {
inline constexpr bool kEmulated = true;
inline const char* last_emulated_failure() { return emulator::last_failure().c_str(); }
}  // namespace thalweg::cuda
#endif
