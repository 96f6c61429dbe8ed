// The training step as operators of PyTorch, through libtorch's stable ABI (torch/csrc/stable, torch/headeronly): one
// binary for every torch from 2.10 on. Autograd and shapes without data are registered in Python (torch_ops.py).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "thalweg/training.hpp"

namespace {

using thalweg::QNetworkShape;
using thalweg::QTraining;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

/// Plans and workspaces outlive a call: making them costs more than a small step. One is lent to one call at a time.
class Lent {
 public:
  explicit Lent(const std::vector<std::int64_t>& key, const QNetworkShape& shape) : key_(key) {
    const std::lock_guard lock(mutex());
    for (auto& kept : shelf())
      if (kept.training != nullptr && kept.key == key) {
        training_ = std::move(kept.training);
        return;
      }
    training_ = std::make_unique<QTraining>(shape);
  }
  ~Lent() {
    const std::lock_guard lock(mutex());
    shelf()[next()++ % kKept] = {key_, std::move(training_)};
  }
  Lent(const Lent&) = delete;
  Lent& operator=(const Lent&) = delete;
  QTraining& operator*() const { return *training_; }

 private:
  struct Kept {
    std::vector<std::int64_t> key;
    std::unique_ptr<QTraining> training;
  };
  static constexpr std::size_t kKept = 4;
  static std::mutex& mutex() {
    static std::mutex m;
    return m;
  }
  static std::vector<Kept>& shelf() {
    static std::vector<Kept> kept(kKept);
    return kept;
  }
  static std::size_t& next() {
    static std::size_t n = 0;
    return n;
  }
  std::vector<std::int64_t> key_;
  std::unique_ptr<QTraining> training_;
};

void expect(const Tensor& t, ScalarType type, const char* name, const char* type_name) {
  STD_TORCH_CHECK(t.scalar_type() == type, name, " must be ", type_name);
}

template <class T>
std::span<const T> view(const Tensor& t) {
  return {static_cast<const T*>(t.data_ptr()), static_cast<std::size_t>(t.numel())};
}
std::span<float> writable(Tensor& t) {
  return {static_cast<float*>(t.data_ptr()), static_cast<std::size_t>(t.numel())};
}

/// The arguments that both operators share.
struct Arguments {
  Arguments(const Tensor& parameters_in, const Tensor& kernels_in, const Tensor& shift_in, const Tensor& placed_in,
            const Tensor& offsets_in, const Tensor& actions_in, const std::vector<std::int64_t>& grid,
            const std::vector<std::int64_t>& periodic, std::int64_t kernel, std::int64_t dilation, double slope)
      : parameters(torch::stable::contiguous(parameters_in)),
        kernels(torch::stable::contiguous(kernels_in)),
        shift(torch::stable::contiguous(shift_in)),
        placed(torch::stable::contiguous(placed_in)),
        offsets(torch::stable::contiguous(offsets_in)),
        actions(torch::stable::contiguous(actions_in)) {
    expect(parameters, ScalarType::Float, "parameters", "float32");
    expect(kernels, ScalarType::Float, "kernels", "float32");
    expect(shift, ScalarType::Float, "shift", "float32");
    expect(placed, ScalarType::Int, "placed", "int32");
    expect(offsets, ScalarType::Long, "offsets", "int64");
    expect(actions, ScalarType::Int, "actions", "int32");
    const std::size_t d = grid.size();
    STD_TORCH_CHECK((d == 2 || d == 3) && periodic.size() == d, "grid and periodic must have 2 or 3 entries each");
    STD_TORCH_CHECK(static_cast<std::size_t>(kernels.dim()) == d + 1 && kernels.size(1) % 2 == 1,
                    "kernels must be (species, edge, ...) with an odd edge, one per direction of the grid");
    for (std::size_t k = 0; k < d; ++k)
      STD_TORCH_CHECK(kernels.size(static_cast<std::int64_t>(k) + 1) == kernels.size(1) && grid[k] > 0 &&
                          grid[k] < (std::int64_t{1} << 31),
                      "kernels must be as wide in all directions, and the grid's voxels at least 1");
    shape.dimension = static_cast<int>(d);
    shape.species = static_cast<int>(kernels.size(0));
    shape.kernel = static_cast<int>(kernel);
    shape.dilation = static_cast<int>(dilation);
    shape.half_window = static_cast<int>(kernels.size(1) / 2);
    shape.slope = static_cast<float>(slope);
    key = {kernels.size(0), kernel, dilation, kernels.size(1), static_cast<std::int64_t>(slope * 1e9)};
    for (std::size_t k = 0; k < d; ++k) {
      shape.grid[k] = static_cast<int>(grid[k]);
      shape.periodic[k] = periodic[k] != 0;
      key.push_back(grid[k]);
      key.push_back(periodic[k] != 0);
    }
  }
  thalweg::QNetworkWeights weights() const {
    return {view<float>(parameters), view<float>(kernels), view<float>(shift)};
  }
  thalweg::StateActions pairs() const {
    return {view<std::int32_t>(placed), view<std::int64_t>(offsets), view<std::int32_t>(actions)};
  }
  Tensor parameters, kernels, shift, placed, offsets, actions;
  QNetworkShape shape;
  std::vector<std::int64_t> key;
};

Tensor q_values(const Tensor& parameters, const Tensor& kernels, const Tensor& shift, const Tensor& placed,
                const Tensor& offsets, const Tensor& actions, std::vector<std::int64_t> grid,
                std::vector<std::int64_t> periodic, std::int64_t kernel, std::int64_t dilation, double slope,
                std::int64_t threads) {
  const Arguments a(parameters, kernels, shift, placed, offsets, actions, grid, periodic, kernel, dilation, slope);
  Tensor q = torch::stable::new_empty(a.parameters, {a.actions.size(0)});
  const Lent training(a.key, a.shape);
  (*training).evaluate(a.weights(), a.pairs(), writable(q), static_cast<int>(threads));
  return q;
}

std::tuple<Tensor, Tensor, Tensor> q_values_backward(const Tensor& pull_in, const Tensor& parameters,
                                                     const Tensor& kernels, const Tensor& shift, const Tensor& placed,
                                                     const Tensor& offsets, const Tensor& actions,
                                                     std::vector<std::int64_t> grid, std::vector<std::int64_t> periodic,
                                                     std::int64_t kernel, std::int64_t dilation, double slope,
                                                     std::int64_t threads, bool image) {
  const Arguments a(parameters, kernels, shift, placed, offsets, actions, grid, periodic, kernel, dilation, slope);
  const Tensor pull = torch::stable::contiguous(pull_in);
  expect(pull, ScalarType::Float, "pull", "float32");
  Tensor by_parameters = torch::stable::empty_like(a.parameters), by_kernels = torch::stable::empty_like(a.kernels),
         by_shift = torch::stable::empty_like(a.shift);
  torch::stable::zero_(by_kernels);
  torch::stable::zero_(by_shift);
  std::vector<float> q(static_cast<std::size_t>(pull.numel()));
  const std::span<float> none;
  const Lent training(a.key, a.shape);
  (*training).pull_back(
      a.weights(), a.pairs(), view<float>(pull), q,
      {writable(by_parameters), image ? writable(by_kernels) : none, image ? writable(by_shift) : none},
      static_cast<int>(threads));
  return {by_parameters, by_kernels, by_shift};
}

}  // namespace

STABLE_TORCH_LIBRARY(thalweg, m) {
  m.def(
      "q_values(Tensor parameters, Tensor kernels, Tensor shift, Tensor placed, Tensor offsets, Tensor actions, "
      "int[] grid, int[] periodic, int kernel, int dilation, float slope, int threads) -> Tensor");
  m.def(
      "q_values_backward(Tensor pull, Tensor parameters, Tensor kernels, Tensor shift, Tensor placed, Tensor offsets, "
      "Tensor actions, int[] grid, int[] periodic, int kernel, int dilation, float slope, int threads, bool image) -> "
      "(Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(thalweg, CPU, m) {
  m.impl("q_values", TORCH_BOX(&q_values));
  m.impl("q_values_backward", TORCH_BOX(&q_values_backward));
}
