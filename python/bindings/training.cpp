#include "thalweg/training.hpp"

#include <pybind11/stl.h>

#include <mutex>
#include <optional>

#include "common.hpp"

namespace thalweg::bindings {
namespace {

py::ssize_t length(std::size_t n) { return static_cast<py::ssize_t>(n); }

/// QTraining with a lock: its workspace serves one call at a time, and calls drop the GIL.
struct Training {
  explicit Training(const QNetworkShape& shape) : training(shape) {}
  QTraining training;
  std::mutex busy;
};

struct Pairs {
  Pairs(const Array<std::int32_t>& placed_in, const Array<std::int64_t>& offsets_in,
        const Array<std::int32_t>& actions_in)
      : placed(placed_in), offsets(offsets_in), actions(actions_in) {
    expect_shape(offsets, "offsets", {-1});
    if (offsets.size() == 0) throw Error("offsets must have n + 1 entries, but it has none");
    expect_shape(placed, "placed", {-1, 2});
    expect_shape(actions, "actions", {offsets.size() - 1, 2});
  }
  StateActions view() const { return {span(placed), span(offsets), span(actions)}; }
  Array<std::int32_t> placed;
  Array<std::int64_t> offsets;
  Array<std::int32_t> actions;
};

py::array_t<float> evaluate(Training& self, const Array<float>& parameters, const Array<float>& kernels,
                            const Array<float>& shift, const Array<std::int32_t>& placed,
                            const Array<std::int64_t>& offsets, const Array<std::int32_t>& actions, int threads) {
  check_threads(threads);
  const Pairs pairs(placed, offsets, actions);
  py::array_t<float> q(length(pairs.view().size()));
  const std::span<float> out = span_mut(q);
  {
    py::gil_scoped_release release;
    const std::lock_guard lock(self.busy);
    self.training.evaluate({span(parameters), span(kernels), span(shift)}, pairs.view(), out, threads);
  }
  return q;
}

py::tuple gradient(Training& self, const Array<float>& parameters, const Array<float>& kernels,
                   const Array<float>& shift, const Array<std::int32_t>& placed, const Array<std::int64_t>& offsets,
                   const Array<std::int32_t>& actions, const Array<float>& targets, bool image, int threads) {
  check_threads(threads);
  const Pairs pairs(placed, offsets, actions);
  expect_shape(targets, "targets", {length(pairs.view().size())});
  py::array_t<float> q(targets.size()), by_parameters(parameters.size()), by_kernels(image ? kernels.size() : 0),
      by_shift(image ? shift.size() : 0);
  const std::span<float> out_q = span_mut(q);
  const QNetworkGradient out{span_mut(by_parameters), span_mut(by_kernels), span_mut(by_shift)};
  double loss = 0;
  {
    py::gil_scoped_release release;
    const std::lock_guard lock(self.busy);
    loss = self.training.gradient({span(parameters), span(kernels), span(shift)}, pairs.view(), span(targets), out_q,
                                  out, threads);
  }
  return py::make_tuple(loss, q, by_parameters, by_kernels, by_shift);
}

QNetworkShape shape_of(const std::vector<int>& grid, const std::vector<bool>& periodic) {
  if (grid.size() != periodic.size() || grid.size() < 2 || grid.size() > 3)
    throw Error("grid and periodic must have 2 or 3 entries each, but they have " + std::to_string(grid.size()) +
                " and " + std::to_string(periodic.size()));
  QNetworkShape shape;
  shape.dimension = static_cast<int>(grid.size());
  for (std::size_t d = 0; d < grid.size(); ++d) {
    shape.grid[d] = grid[d];
    shape.periodic[d] = periodic[d];
  }
  return shape;
}

py::tuple statistics(const std::vector<int>& grid, const std::vector<bool>& periodic, const Array<float>& kernels,
                     const Array<std::int32_t>& placed, const Array<std::int64_t>& offsets) {
  QNetworkShape shape = shape_of(grid, periodic);
  if (kernels.ndim() != shape.dimension + 1 || kernels.shape(1) % 2 == 0)
    throw Error("kernels must be (species, edge, ...) with an odd edge per direction of the grid");
  for (py::ssize_t d = 1; d < kernels.ndim(); ++d)
    if (kernels.shape(d) != kernels.shape(1)) throw Error("kernels must have the same edge in every direction");
  shape.species = static_cast<int>(kernels.shape(0));
  shape.half_window = static_cast<int>(kernels.shape(1) / 2);
  expect_shape(placed, "placed", {-1, 2});
  expect_shape(offsets, "offsets", {-1});
  py::array_t<double> mean(kernels.shape(0)), variance(kernels.shape(0));
  const std::span<double> m = span_mut(mean), v = span_mut(variance);
  {
    py::gil_scoped_release release;
    image_statistics(shape, span(kernels), {span(placed), span(offsets), {}}, m, v);
  }
  return py::make_tuple(mean, variance);
}

/// In place: an array of another type would be a copy, and the step would be lost.
using InPlace = py::array_t<float, py::array::c_style>;
std::span<float> writable(const char* name, const py::object& array) {
  if (!py::isinstance<InPlace>(array) || !py::cast<InPlace>(array).writeable())
    throw Error(std::string(name) + " is changed in place and must be a contiguous, writable float32 array");
  InPlace typed = py::cast<InPlace>(array);
  return {typed.mutable_data(), static_cast<std::size_t>(typed.size())};
}

}  // namespace

void bind_training(py::module_& m) {
  py::class_<Training, std::shared_ptr<Training>>(
      m, "QTraining", "Q of state-action pairs and gradients of a Q-network for one shape (training.hpp).")
      .def(py::init([](const std::vector<int>& grid, const std::vector<bool>& periodic, int species, int kernel,
                       int dilation, int half_window, float slope) {
             QNetworkShape shape = shape_of(grid, periodic);
             shape.species = species;
             shape.kernel = kernel;
             shape.dilation = dilation;
             shape.half_window = half_window;
             shape.slope = slope;
             return std::make_shared<Training>(shape);
           }),
           py::arg("grid"), py::arg("periodic"), py::kw_only(), py::arg("species"), py::arg("kernel"),
           py::arg("dilation"), py::arg("half_window"), py::arg("slope") = 0.01f)
      .def("evaluate", &evaluate, py::arg("parameters"), py::arg("kernels"), py::arg("shift"), py::arg("placed"),
           py::arg("offsets"), py::arg("actions"), py::kw_only(), py::arg("threads") = 1, "Q (n,).")
      .def("gradient", &gradient, py::arg("parameters"), py::arg("kernels"), py::arg("shift"), py::arg("placed"),
           py::arg("offsets"), py::arg("actions"), py::arg("targets"), py::kw_only(), py::arg("image") = false,
           py::arg("threads") = 1,
           "Mean square loss, Q (n,), and its derivative by parameters and, with image=True, by kernels and shift "
           "(flat, else empty).")
      .def_property_readonly("parameters", [](const Training& self) { return self.training.parameters(); });
  m.def("image_statistics", &statistics, py::arg("grid"), py::arg("periodic"), py::arg("kernels"), py::arg("placed"),
        py::arg("offsets"), "Mean and variance (species,) of images (species, *window kernels) of whole grids.");
  m.def(
      "adam_step",
      [](const Array<float>& gradient, const py::object& parameters, const py::object& first, const py::object& second,
         std::int64_t update, double rate, double beta1, double beta2, double epsilon) {
        adam_step({rate, beta1, beta2, epsilon}, update, span(gradient), writable("parameters", parameters),
                  writable("first_moment", first), writable("second_moment", second));
      },
      py::arg("gradient"), py::arg("parameters"), py::arg("first_moment"), py::arg("second_moment"), py::kw_only(),
      py::arg("update"), py::arg("rate"), py::arg("beta1") = 0.9, py::arg("beta2") = 0.999, py::arg("epsilon") = 1e-8,
      "One step of Adam, in place; update = 1, 2, ...");
}

}  // namespace thalweg::bindings
