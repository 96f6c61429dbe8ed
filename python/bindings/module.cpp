#include "common.hpp"
#include "thalweg/cuda.hpp"

namespace py = pybind11;
using namespace thalweg;

PYBIND11_MODULE(_core, m) {
  m.doc() = "Compiled core of thalweg. Use the Python package; nothing here checks more than shapes and types.";
  m.attr("__version__") = THALWEG_VERSION;
  // One family of exceptions on both sides: what the core refuses is a ConfigurationError (a ValueError) in Python.
  static PyObject* configuration_error =  // lives as long as the process
      py::object(py::module_::import("thalweg.errors").attr("ConfigurationError")).release().ptr();
  static PyObject* backend_unavailable =
      py::object(py::module_::import("thalweg.errors").attr("BackendUnavailable")).release().ptr();
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const cuda::BackendUnavailable& error) {
      PyErr_SetString(backend_unavailable, error.what());
    } catch (const Error& error) {
      PyErr_SetString(configuration_error, error.what());
    }
  });
  m.def("active_isa", &active_isa);
  m.def("force_isa", &force_isa, py::arg("name").none(false));
  m.def("default_threads", &default_threads);
  m.def("covalent_radius", &covalent_radius, py::arg("number"));
  // Landscape is registered first: potentials, surrogates and relaxation all refer to it.
  bindings::bind_potentials(m);
  bindings::bind_descriptors(m);
  bindings::bind_gpr(m);
  bindings::bind_local_gpr(m);
  bindings::bind_relax(m);
  bindings::bind_build(m);
  bindings::bind_training(m);
  bindings::bind_qmap(m);
  bindings::bind_cuda(m);
}
