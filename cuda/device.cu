#include "device.cuh"

namespace thalweg::cuda {

const char* backend() noexcept { return kEmulated ? "emulated" : "cuda"; }

bool available() noexcept {
  int devices = 0;
  const bool answers = cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
  if (!answers) (void)cudaGetLastError();
  return answers;
}

void require() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error == cudaSuccess && devices > 0) return;
  (void)cudaGetLastError();
  throw BackendUnavailable("thalweg was built with CUDA, but no device answers (" +
                           std::string(error == cudaSuccess ? "none is visible" : cudaGetErrorString(error)) +
                           "); check the driver with nvidia-smi and CUDA_VISIBLE_DEVICES, or use the CPU functions");
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::string reason = cudaGetErrorString(error);
  if constexpr (kEmulated) reason = reason + ": " + last_emulated_failure();
  throw Error(std::string("CUDA: ") + what + " failed: " + reason);
}

void* allocate(std::size_t bytes) {
  require();
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes), ("allocation of " + std::to_string(bytes) + " bytes").c_str());
  return memory;
}
void release(void* memory) noexcept { (void)cudaFree(memory); }

void copy_to_device(void* to, const void* from, std::size_t bytes, Stream stream) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, native(stream)), "copy to the device");
}
void copy_to_host(void* to, const void* from, std::size_t bytes, Stream stream) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, native(stream)), "copy from the device");
  check(cudaStreamSynchronize(native(stream)), "work on the device");
}
void copy_on_device(void* to, const void* from, std::size_t bytes, Stream stream) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, native(stream)), "copy on the device");
}
void fill_bytes(void* to, int value, std::size_t bytes, Stream stream) {
  check(cudaMemsetAsync(to, value, bytes, native(stream)), "filling device memory");
}

Batch::Batch(const thalweg::BatchView& host, Stream stream) : structures_(host.size()), atoms_(host.atoms()) {
  host.check();
  positions_ = Array<double>(host.positions, stream);
  cells_ = Array<double>(host.cells, stream);
  numbers_ = Array<std::int32_t>(host.numbers, stream);
  offsets_ = Array<std::int64_t>(host.offsets, stream);
  pbc_ = Array<std::uint8_t>(host.pbc, stream);
  fixed_ = Array<std::uint8_t>(host.fixed, stream);
}

BatchView Batch::view() const {
  return {structures_,     atoms_,        positions_.data(), numbers_.data(),
          offsets_.data(), cells_.data(), pbc_.data(),       fixed_.data()};
}

}  // namespace thalweg::cuda
