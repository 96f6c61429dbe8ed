#include "common.hpp"

namespace thalweg::bindings {

void bind_relax(py::module_&) {}

}  // namespace thalweg::bindings
