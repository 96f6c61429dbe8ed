#include "thalweg/cuda.hpp"

#include <pybind11/stl.h>

#include <deque>
#include <optional>
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

constexpr int kDefaultStream = 1;  // in the numbering of __cuda_array_interface__

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
  out["stream"] = kDefaultStream;  // where its contents are made, perhaps still
  out["version"] = 3;
  return out;
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
  const py::ssize_t size = array.dtype().itemsize();
  if (kind == 'i' && size == 4) return as(std::int32_t{}, std::int32_t{});
  if (kind == 'i' || (kind == 'u' && size <= 4)) return as(std::int64_t{}, std::int64_t{});
  throw Error("arrays for the device must hold floats, booleans or integers that int64 can hold");
}

// ---- arguments ----------------------------------------------------------------------------------------------------

/// What __cuda_array_interface__ says; waits for the stream on which the contents are made, unless it is ours.
struct Face {
  std::string type;
  std::vector<py::ssize_t> shape;
  const void* data;

  Face(const py::handle& array, const char* name) {
    const py::dict face = array.attr("__cuda_array_interface__");
    type = face["typestr"].cast<std::string>();
    if (face.contains("strides") && !face["strides"].is_none())
      throw Error(std::string(name) + " must be contiguous in C order; pass a copy");
    shape = face["shape"].cast<std::vector<py::ssize_t>>();
    data = reinterpret_cast<const void*>(face["data"].cast<py::tuple>()[0].cast<std::uintptr_t>());
    if (!face.contains("stream") || face["stream"].is_none()) return;
    const auto stream = face["stream"].cast<std::uintptr_t>();
    if (stream != kDefaultStream) device::copy_to_host(nullptr, nullptr, 0, reinterpret_cast<device::Stream>(stream));
  }
  template <class T>
  bool holds() const {
    return type == kType<T> || (type == "|u1" && sizeof(T) == 1);
  }
};

bool on_device(const py::handle& array) { return py::hasattr(array, "__cuda_array_interface__"); }

/// A NumPy copy of any array on the device.
py::object to_host(const py::object& array) {
  device::require();
  if (!on_device(array))
    throw Error("only an array on the device (with __cuda_array_interface__) can be copied from it");
  const Face face(array, "the array");
  for (const char* type : {kType<double>, kType<std::int32_t>, kType<std::int64_t>, kType<std::uint8_t>, "|u1"})
    if (face.type == type) {
      py::array out(py::dtype(face.type), face.shape);
      device::copy_to_host(out.mutable_data(), face.data, static_cast<std::size_t>(out.nbytes()));
      return out;
    }
  throw Error("only arrays of float64, int32, int64 and bool are copied from the device, but it is of type " +
              face.type);
}

/// An array as an argument: read where it lies on the device, or copied there. Throws Error unless type (on the device)
/// and shape fit; -1 matches any length.
template <class T>
class Input {
 public:
  Input(const py::handle& array, const char* name, std::initializer_list<py::ssize_t> wanted) {
    device::require();
    if (on_device(array)) {
      const Face face(array, name);
      if (!face.holds<T>())
        throw Error(std::string(name) + " must be of type " + kType<T> + ", but it is " + face.type);
      bool fits = face.shape.size() == wanted.size();
      for (std::size_t k = 0; fits && k < wanted.size(); ++k)
        fits = wanted.begin()[k] < 0 || face.shape[k] == wanted.begin()[k];
      if (!fits) throw Error(std::string(name) + " has a shape that does not fit the others");
      shape_ = face.shape;
      data_ = static_cast<const T*>(face.data);
      keep_ = py::reinterpret_borrow<py::object>(array);
      return;
    }
    using Source = std::conditional_t<std::is_same_v<T, std::uint8_t>, bool, T>;
    const auto host = py::reinterpret_borrow<py::object>(array).cast<Array<Source>>();
    expect_shape(host, name, wanted);
    shape_.assign(host.shape(), host.shape() + host.ndim());
    own_ = device::Array<T>(
        std::span<const T>(reinterpret_cast<const T*>(host.data()), static_cast<std::size_t>(host.size())));
    device::copy_to_host(nullptr, nullptr, 0);  // until the copy is done
    data_ = own_.data();
  }
  const T* data() const { return data_; }
  py::ssize_t shape(std::size_t k) const { return shape_[k]; }

 private:
  device::Array<T> own_;
  py::object keep_;
  const T* data_ = nullptr;
  std::vector<py::ssize_t> shape_;
};

/// An object with the attributes of Batch, each on the device or not, kept for as long as this lives; or a cuda.Batch.
class BatchInput {
 public:
  explicit BatchInput(const py::object& batch) {
    if (py::isinstance<device::Batch>(batch)) {
      view_ = batch.cast<const device::Batch&>().view();
      return;
    }
    const auto& numbers = numbers_.emplace(batch.attr("numbers"), "numbers", shape({-1}));
    const auto& cells = doubles_.emplace_back(batch.attr("cells"), "cells", shape({-1, 3, 3}));
    const py::ssize_t atoms = numbers.shape(0), structures = cells.shape(0);
    view_.cells = cells.data();
    view_.numbers = numbers.data();
    view_.positions = doubles_.emplace_back(batch.attr("positions"), "positions", shape({atoms, 3})).data();
    view_.offsets = offsets_.emplace(batch.attr("offsets"), "offsets", shape({structures + 1})).data();
    view_.pbc = flags_.emplace_back(batch.attr("pbc"), "pbc", shape({structures, 3})).data();
    if (const py::object fixed = batch.attr("fixed"); !fixed.is_none())
      view_.fixed = flags_.emplace_back(fixed, "fixed", shape({atoms, 3})).data();
    view_.atoms = static_cast<std::size_t>(atoms);
    view_.structures = static_cast<std::size_t>(structures);
  }
  const device::BatchView& view() const { return view_; }

 private:
  using shape = std::initializer_list<py::ssize_t>;
  std::optional<Input<std::int32_t>> numbers_;
  std::optional<Input<std::int64_t>> offsets_;
  std::deque<Input<double>> doubles_;
  std::deque<Input<std::uint8_t>> flags_;
  device::BatchView view_;
};

// ---- kernels ------------------------------------------------------------------------------------------------------

py::ssize_t rows_of(const Fingerprint&, const device::BatchView& batch) {
  return static_cast<py::ssize_t>(batch.structures);
}
py::ssize_t rows_of(const LocalDensity&, const device::BatchView& batch) {
  return static_cast<py::ssize_t>(batch.atoms);
}
py::ssize_t rows_of(const Soap& soap, const device::BatchView& batch) {
  return static_cast<py::ssize_t>(soap.settings().average == SoapAverage::off ? batch.atoms : batch.structures);
}

template <class Device, class Host>
void bind_descriptor(py::module_& m) {
  m.def(
      "values",
      [](const std::shared_ptr<Host>& descriptor, const py::object& batch) {
        const BatchInput in(batch);
        const py::ssize_t rows = rows_of(*descriptor, in.view()), size = static_cast<py::ssize_t>(descriptor->size());
        device::Array<double> features(static_cast<std::size_t>(rows * size));
        {
          py::gil_scoped_release release;
          const Device twin(descriptor);
          typename Device::Workspace workspace(twin, in.view());
          twin.values(in.view().positions, features.data(), workspace);
        }
        return shaped(std::move(features), {rows, size});
      },
      py::arg("descriptor"), py::arg("batch"),
      "Features (rows, size) as those of descriptor.values; NaN for a structure without features, such as one with a "
      "coordinate that is not finite.");
  m.def(
      "contract",
      [](const std::shared_ptr<Host>& descriptor, const py::object& batch, const py::object& weights) {
        const BatchInput in(batch);
        const py::ssize_t rows = rows_of(*descriptor, in.view()), size = static_cast<py::ssize_t>(descriptor->size());
        const Input<double> w(weights, "weights", {rows, size});
        device::Array<double> features(static_cast<std::size_t>(rows * size)), gradient(3 * in.view().atoms);
        {
          py::gil_scoped_release release;
          const Device twin(descriptor);
          typename Device::Workspace workspace(twin, in.view());
          twin.values(in.view().positions, features.data(), workspace);
          device::fill_bytes(gradient.data(), 0, gradient.size() * sizeof(double));
          twin.contract(w.data(), 1.0, gradient.data(), workspace);
        }
        return shaped(std::move(gradient), {static_cast<py::ssize_t>(in.view().atoms), 3});
      },
      py::arg("descriptor"), py::arg("batch"), py::arg("weights"),
      "d(weights . features)/dx (m, 3) for weights (rows, size).");
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
  py::module_ m = core.def_submodule("cuda");
  m.doc() =
      "Twins of the kernels for CUDA devices. Arrays with __cuda_array_interface__ (CuPy, PyTorch, DeviceArray) are "
      "read where they lie, others are copied to the device; results are DeviceArray. Work is on the default stream. "
      "Without CUDA every call raises BackendUnavailable.";
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
  m.def("require", &device::require, "Raises BackendUnavailable, with the way to get it, unless available().");
  m.def("to_device", &to_device, py::arg("array"), "Copies a NumPy array to the device.");
  m.def("to_host", &to_host, py::arg("array"), "A NumPy copy of an array on the device; waits for it.");
  bind_descriptor<device::Fingerprint, Fingerprint>(m);
  bind_descriptor<device::LocalDensity, LocalDensity>(m);
  bind_descriptor<device::Soap, Soap>(m);
  m.def(
      "evaluate",
      [](const Landscape& landscape, const py::object& batch) {
        const auto potential = twin(landscape);
        const BatchInput in(batch);
        const device::BatchView& view = in.view();
        device::Array<double> energies(view.structures), forces(3 * view.atoms);
        {
          py::gil_scoped_release release;
          device::evaluate(*potential, view, energies.data(), forces.data());
        }
        const auto n = static_cast<py::ssize_t>(view.structures), atoms = static_cast<py::ssize_t>(view.atoms);
        return py::make_tuple(shaped(std::move(energies), {n}), shaped(std::move(forces), {atoms, 3}));
      },
      py::arg("landscape"), py::arg("batch"),
      "Energies (n,) [eV] and forces (m, 3) [eV/angstrom] of a built-in potential or prior. batch: cuda.Batch, or an "
      "object with the attributes of Batch, each on the device or not.");
  m.def(
      "relax",
      [](const Landscape& landscape, const py::object& batch, int steps, double force_tolerance, double max_step,
         int memory, double first_curvature, const py::object& box) {
        const auto potential = twin(landscape);
        const BatchInput in(batch);
        const device::BatchView& view = in.view();
        const RelaxSettings settings{steps, force_tolerance, max_step, memory, first_curvature};
        const Confinement confinement = confinement_of(box);
        device::RelaxResult r = [&] {
          py::gil_scoped_release release;
          return device::relax(*potential, view, settings, confinement);
        }();
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
        const Input<double> x(features, "features", {-1, -1});
        const py::ssize_t n = x.shape(0);
        device::Array<double> out(static_cast<std::size_t>(n * n));
        device::fill_bytes(out.data(), 0, out.size() * sizeof(double));
        device::gram(kernel, static_cast<std::size_t>(n), static_cast<std::size_t>(x.shape(1)), x.data(), jitter,
                     out.data());
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
            const Input<double> x(features, "features", {targets.size(), static_cast<py::ssize_t>(self.features())});
            py::gil_scoped_release release;
            self.fit(static_cast<std::size_t>(targets.size()), x.data(), span(targets));
          },
          py::arg("features"), py::arg("targets"))
      .def(
          "append",
          [](device::Gpr& self, const py::object& feature, double target) {
            self.append(Input<double>(feature, "feature", {static_cast<py::ssize_t>(self.features())}).data(), target);
          },
          py::arg("feature"), py::arg("target"))
      .def_property_readonly("size", &device::Gpr::size)
      .def_property_readonly("mean", &device::Gpr::mean)
      .def(
          "predict",
          [](const device::Gpr& self, const py::object& features, double kappa, bool gradient) -> py::tuple {
            const Input<double> x(features, "features", {-1, static_cast<py::ssize_t>(self.features())});
            const py::ssize_t count = x.shape(0), dimension = x.shape(1);
            const auto slopes = static_cast<std::size_t>(gradient ? count * dimension : 0);
            device::Array<double> mean(static_cast<std::size_t>(count)), sigma(static_cast<std::size_t>(count)),
                slope(slopes), slope_sigma(slopes);
            {
              py::gil_scoped_release release;
              self.predict(static_cast<std::size_t>(count), x.data(), kappa, mean.data(), sigma.data(), slope.data(),
                           slope_sigma.data());
            }
            if (!gradient) return py::make_tuple(shaped(std::move(mean), {count}), shaped(std::move(sigma), {count}));
            return py::make_tuple(shaped(std::move(mean), {count}), shaped(std::move(sigma), {count}),
                                  shaped(std::move(slope), {count, dimension}),
                                  shaped(std::move(slope_sigma), {count, dimension}));
          },
          py::arg("features"), py::arg("kappa") = 0.0, py::arg("gradient") = false,
          "mean (n,), sigma (n,); with gradient also d(mean - kappa sigma)/d features and d sigma/d features (n, D).");
}

}  // namespace thalweg::bindings
