// soap.cu itself with one of its barriers left out at a time. Each must show in the results under some order of
// threads: then the parity tests would notice its absence, and none is there for nothing.
#include <cstdio>
#include <limits>

#include "neighbors.cuh"  // before the barriers change: its own are not meant

namespace {
int left_out = -1;
void barrier(int which, const std::source_location& where = std::source_location::current()) {
  if (which != left_out) thalweg::emulator::block_barrier(where);
}
constexpr int kFirst = __COUNTER__ + 1;
}  // namespace
#define __syncthreads() barrier(__COUNTER__ - kFirst)
#include "../soap.cu"
#undef __syncthreads

namespace {

using namespace thalweg;

constexpr int kBarriers = __COUNTER__ - kFirst;

/// Values and forces of three atoms of two species and one on its own.
std::vector<double> run(const std::shared_ptr<const Soap>& host, unsigned order) {
  emulator::set_order(order);
  const std::vector<double> positions{0, 0, 0, 1.9, 0.1, 0.2, 0.3, 2.1, 0.4, 9, 9, 9}, cell(9, 0.0);
  const std::vector<std::int32_t> numbers{8, 22, 8, 22};
  const std::vector<std::int64_t> offsets{0, 4};
  const std::vector<std::uint8_t> flags(12, 0);
  const cuda::Batch batch({positions, numbers, offsets, cell, std::span(flags).first(3), flags});
  const cuda::Soap soap(host);
  cuda::Soap::Workspace workspace(soap, batch.view());
  const std::vector<double> weights(4 * soap.size(), 1.0), zeros(12, 0.0);
  cuda::Array<double> features(weights.size()), given(std::span<const double>{weights}),
      gradient(std::span<const double>{zeros});
  soap.values(batch.view().positions, features.data(), workspace);
  soap.contract(given.data(), 1.0, gradient.data(), workspace);
  std::vector<double> out = features.download();
  const std::vector<double> forces = gradient.download();
  out.insert(out.end(), forces.begin(), forces.end());
  return out;
}

}  // namespace

int main() {
  SoapSettings settings;
  settings.r_cut = 3.0, settings.n_max = 3, settings.l_max = 2;
  const auto host = std::make_shared<const Soap>(settings, std::vector<std::int32_t>{8, 22});
  const std::vector<double> intact = run(host, 0);
  int unseen = run(host, 1) != intact;
  for (left_out = 0; left_out < kBarriers; ++left_out) {
    bool caught = false;
    for (const unsigned order : {0u, 1u, 7u}) caught = caught || run(host, order) != intact;
    if (caught) continue;
    std::printf("barrier %d of soap.cu may be left out without a trace\n", left_out);
    ++unseen;
  }
  std::printf("%d barriers, %d unseen\n", kBarriers, unseen);
  return unseen != 0 || kBarriers == 0;
}
