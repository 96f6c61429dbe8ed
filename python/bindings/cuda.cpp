#include "thalweg/cuda.hpp"

#include <pybind11/stl.h>

#include <variant>

#include "boxes.hpp"

namespace thalweg::bindings {
namespace {

namespace device = thalweg::cuda;

/// Device memory with a shape; other libraries read it by __cuda_array_interface__ (CuPy: cupy.asarray(x), no copy).
struct DeviceArray {
  std::variant<device::Array<double>, device::Array<std::int32_t>, device::Array<std::int64_t>,
               device::Array<std::uint8_t>>
      memory;
  std::vector<py::ssize_t> shape;
};

template <class T>
constexpr const char* kType = nullptr;
template <>
constexpr const char* kType<double> = "<f8";
template <>
constexpr const char* kType<std::int32_t> = "<i4";
template <>
constexpr const char* kType<std::int64_t> = "<i8";
template <>
constexpr const char* kType<std::uint8_t> = "|b1";

template <class T>
DeviceArray shaped(device::Array<T> memory, std::vector<py::ssize_t> shape) {
  return {std::move(memory), std::move(shape)};
}

py::dict interface_of(const DeviceArray& array) {
  py::dict out;
  std::visit(
      [&](const auto& memory) {
        using T = std::remove_cv_t<std::remove_reference_t<decltype(*memory.data())>>;
        out["typestr"] = kType<T>;
        out["data"] = py::make_tuple(reinterpret_cast<std::uintptr_t>(memory.data()), false);
      },
      array.memory);
  out["shape"] = py::tuple(py::cast(array.shape));
  out["version"] = 3;
  return out;
}

py::object to_host(const DeviceArray& array) {
  return std::visit(
      [&](const auto& memory) -> py::object {
        using T = std::remove_cv_t<std::remove_reference_t<decltype(*memory.data())>>;
        const std::vector<T> values = memory.download();
        py::array out(py::dtype(kType<T>), array.shape);
        std::copy(values.begin(), values.end(), static_cast<T*>(out.mutable_data()));
        return out;
      },
      array.memory);
}

DeviceArray to_device(const py::array& array) {
  device::require();
  const std::vector<py::ssize_t> shape(array.shape(), array.shape() + array.ndim());
  const auto as = [&]<class T, class Source>(T, Source) {
    const auto values = array.cast<Array<Source>>();
    const std::span<const T> bytes(reinterpret_cast<const T*>(values.data()), static_cast<std::size_t>(values.size()));
    device::Array<T> memory(bytes);
    device::copy_to_host(nullptr, nullptr, 0);  // until the copy is done
    return shaped(std::move(memory), shape);
  };
  const char kind = array.dtype().kind();
  if (kind == 'f') return as(double{}, double{});
  if (kind == 'b') return as(std::uint8_t{}, bool{});
  if ((kind == 'i' || kind == 'u') && array.dtype().itemsize() == 4) return as(std::int32_t{}, std::int32_t{});
  if (kind == 'i' || kind == 'u') return as(std::int64_t{}, std::int64_t{});
  throw Error("arrays for the device must hold floats, integers or booleans");
}

/// The memory of an object with __cuda_array_interface__; throws Error unless type and shape fit (-1: any length).
template <class T>
const T* pointer(const py::handle& array, const char* name, std::initializer_list<py::ssize_t> wanted,
                 py::ssize_t* length = nullptr) {
  if (!py::hasattr(array, "__cuda_array_interface__"))
    throw Error(std::string(name) + " must be an array on the device (with __cuda_array_interface__), but it is " +
                py::repr(py::type::of(array)).cast<std::string>() + "; upload it with to_device()");
  const py::dict face = array.attr("__cuda_array_interface__");
  const auto type = face["typestr"].cast<std::string>();
  if (type != kType<T> && !(type == "|u1" && sizeof(T) == 1))
    throw Error(std::string(name) + " must be of type " + kType<T> + ", but it is " + type);
  if (face.contains("strides") && !face["strides"].is_none())
    throw Error(std::string(name) + " must be contiguous in C order; pass a copy");
  const auto shape = face["shape"].cast<std::vector<py::ssize_t>>();
  bool fits = shape.size() == wanted.size();
  std::size_t k = 0;
  for (const py::ssize_t w : wanted) {
    fits = fits && (w < 0 || shape[k] == w);
    ++k;
  }
  if (!fits) throw Error(std::string(name) + " has a shape that does not fit the others");
  if (length != nullptr) *length = shape[0];
  return reinterpret_cast<const T*>(face["data"].cast<py::tuple>()[0].cast<std::uintptr_t>());
}

/// An object with the attributes of Batch whose arrays are on the device.
device::BatchView batch_view(const py::object& batch) {
  if (py::isinstance<device::Batch>(batch)) return batch.cast<const device::Batch&>().view();
  device::BatchView out;
  py::ssize_t atoms = 0, structures = 0;
  out.numbers = pointer<std::int32_t>(batch.attr("numbers"), "numbers", {-1}, &atoms);
  out.cells = pointer<double>(batch.attr("cells"), "cells", {-1, 3, 3}, &structures);
  out.positions = pointer<double>(batch.attr("positions"), "positions", {atoms, 3});
  out.offsets = pointer<std::int64_t>(batch.attr("offsets"), "offsets", {structures + 1});
  out.pbc = pointer<std::uint8_t>(batch.attr("pbc"), "pbc", {structures, 3});
  out.fixed = pointer<std::uint8_t>(batch.attr("fixed"), "fixed", {atoms, 3});
  out.atoms = static_cast<std::size_t>(atoms);
  out.structures = static_cast<std::size_t>(structures);
  return out;
}

std::unique_ptr<device::Landscape> twin(const Landscape& landscape) {
  device::require();
  if (dynamic_cast<const Emt*>(&landscape)) return std::make_unique<device::Emt>();
  if (const auto* p = dynamic_cast<const LennardJones*>(&landscape))
    return std::make_unique<device::LennardJones>(p->settings());
  if (const auto* p = dynamic_cast<const PairPrior*>(&landscape))
    return std::make_unique<device::PairPrior>(p->settings());
  if (const auto* p = dynamic_cast<const SmoothCarbon*>(&landscape))
    return std::make_unique<device::SmoothCarbon>(p->settings());
  if (const auto* p = dynamic_cast<const Tersoff*>(&landscape)) return std::make_unique<device::Tersoff>(p->entries());
  if (const auto* p = dynamic_cast<const ManyBodyPrior*>(&landscape))
    return std::make_unique<device::ManyBodyPrior>(p->pairs(), p->atoms());
  throw Error("only built-in potentials and priors have a twin on the device");
}

}  // namespace

void bind_cuda(py::module_& core) {
  py::module_ m = core.def_submodule(
      "cuda",
      "Twins of the kernels for CUDA devices. Arrays are objects with __cuda_array_interface__ (CuPy, PyTorch, "
      "DeviceArray); results are DeviceArray. Without CUDA every call raises BackendUnavailable.");
  py::class_<DeviceArray>(m, "DeviceArray")
      .def_property_readonly("__cuda_array_interface__", &interface_of)
      .def_property_readonly("shape", [](const DeviceArray& self) { return py::tuple(py::cast(self.shape)); })
      .def("to_host", &to_host, "A NumPy copy; waits for the device.");
  py::class_<device::Batch>(m, "Batch", "A Batch copied to the device.")
      .def(py::init([](const py::object& batch) {
             device::require();
             return device::Batch(BatchArrays(batch).view());
           }),
           py::arg("batch"));
  m.def("backend", &device::backend, R"("cuda", "emulated" (kernels run on the CPU: for tests) or "none".)");
  m.def("available", &device::available, "Whether a call would run here.");
  m.def("to_device", &to_device, py::arg("array"), "Copies a NumPy array to the device.");
  m.def(
      "evaluate",
      [](const Landscape& landscape, const py::object& batch) {
        const auto on_device = twin(landscape);
        const device::BatchView view = batch_view(batch);
        device::Array<double> energies(view.structures), forces(3 * view.atoms);
        device::evaluate(*on_device, view, energies.data(), forces.data());
        const auto n = static_cast<py::ssize_t>(view.structures), atoms = static_cast<py::ssize_t>(view.atoms);
        return py::make_tuple(shaped(std::move(energies), {n}), shaped(std::move(forces), {atoms, 3}));
      },
      py::arg("landscape"), py::arg("batch"),
      "Energies (n,) [eV] and forces (m, 3) [eV/angstrom] of a built-in potential or prior. batch: cuda.Batch, or an "
      "object with the attributes of Batch on the device.");
  m.def(
      "relax",
      [](const Landscape& landscape, const py::object& batch, int steps, double force_tolerance, double max_step,
         int memory, double first_curvature, const py::object& box) {
        const auto on_device = twin(landscape);
        const device::BatchView view = batch_view(batch);
        const RelaxSettings settings{steps, force_tolerance, max_step, memory, first_curvature};
        device::RelaxResult r = device::relax(*on_device, view, settings, confinement_of(box));
        const auto n = static_cast<py::ssize_t>(view.structures), atoms = static_cast<py::ssize_t>(view.atoms);
        return py::make_tuple(shaped(std::move(r.positions), {atoms, 3}), shaped(std::move(r.energies), {n}),
                              shaped(std::move(r.forces), {atoms, 3}), shaped(std::move(r.evaluations), {n}),
                              shaped(std::move(r.converged), {n}));
      },
      py::arg("landscape"), py::arg("batch"), py::kw_only(), py::arg("steps") = 100, py::arg("force_tolerance") = 0.05,
      py::arg("max_step") = 0.2, py::arg("memory") = 10, py::arg("first_curvature") = 70.0, py::arg("box") = py::none(),
      "Twin of relax(): positions, energies, forces, evaluations, converged.");
  m.def(
      "gram",
      [](const Kernel& kernel, const py::object& features, double jitter) {
        device::require();
        py::ssize_t n = 0;
        const double* x = pointer<double>(features, "features", {-1, -1}, &n);
        const auto dimension = features.attr("shape").cast<std::vector<py::ssize_t>>().at(1);
        device::Array<double> out(static_cast<std::size_t>(n * n));
        device::fill_bytes(out.data(), 0, out.size() * sizeof(double));
        device::gram(kernel, static_cast<std::size_t>(n), static_cast<std::size_t>(dimension), x, jitter, out.data());
        return shaped(std::move(out), {n, n});
      },
      py::arg("kernel"), py::arg("features"), py::arg("jitter") = 0.0, "Lower triangle of the Gram matrix (n, n).");
  py::class_<device::Gpr>(m, "Gpr", "Twin of Gpr for values (no slopes); feature vectors are on the device.")
      .def(py::init([](std::size_t features, const Kernel& kernel) {
             device::require();
             return std::make_unique<device::Gpr>(features, kernel);
           }),
           py::arg("features"), py::arg("kernel"))
      .def(
          "fit",
          [](device::Gpr& self, const py::object& features, const Array<double>& targets) {
            const double* x =
                pointer<double>(features, "features", {targets.size(), static_cast<py::ssize_t>(self.features())});
            self.fit(static_cast<std::size_t>(targets.size()), x, span(targets));
          },
          py::arg("features"), py::arg("targets"))
      .def(
          "append",
          [](device::Gpr& self, const py::object& feature, double target) {
            self.append(pointer<double>(feature, "feature", {static_cast<py::ssize_t>(self.features())}), target);
          },
          py::arg("feature"), py::arg("target"))
      .def_property_readonly("size", &device::Gpr::size)
      .def_property_readonly("mean", &device::Gpr::mean)
      .def(
          "predict",
          [](const device::Gpr& self, const py::object& features, double kappa) {
            py::ssize_t count = 0;
            const auto dimension = static_cast<py::ssize_t>(self.features());
            const double* x = pointer<double>(features, "features", {-1, dimension}, &count);
            device::Array<double> mean(static_cast<std::size_t>(count)), sigma(static_cast<std::size_t>(count)),
                gradient(static_cast<std::size_t>(count * dimension));
            self.predict(static_cast<std::size_t>(count), x, kappa, mean.data(), sigma.data(), gradient.data(),
                         nullptr);
            return py::make_tuple(shaped(std::move(mean), {count}), shaped(std::move(sigma), {count}),
                                  shaped(std::move(gradient), {count, dimension}));
          },
          py::arg("features"), py::arg("kappa") = 0.0,
          "mean (n,), sigma (n,) and d(mean - kappa sigma)/d features (n, D).");
}

}  // namespace thalweg::bindings
