#include "common.hpp"

namespace thalweg::bindings {

void bind_potentials(py::module_&) {}

}  // namespace thalweg::bindings
