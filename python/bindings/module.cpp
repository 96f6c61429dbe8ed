#include "common.hpp"

namespace py = pybind11;
using namespace thalweg;

PYBIND11_MODULE(_core, m) {
  m.doc() = "Compiled core of thalweg. Use the Python package; nothing here checks more than shapes and types.";
  m.attr("__version__") = THALWEG_VERSION;
  // Error becomes thalweg.errors.ThalwegError's subclass there; here it only has to be a ValueError.
  py::register_exception<Error>(m, "CoreError", PyExc_ValueError);
  m.def("active_isa", &active_isa);
  m.def("force_isa", &force_isa, py::arg("name"));
  m.def("default_threads", &default_threads);
  m.def("covalent_radius", &covalent_radius, py::arg("number"));
  // Landscape is registered first: potentials, surrogates and relaxation all refer to it.
  bindings::bind_potentials(m);
  bindings::bind_descriptors(m);
  bindings::bind_gpr(m);
  bindings::bind_relax(m);
  bindings::bind_build(m);
}
