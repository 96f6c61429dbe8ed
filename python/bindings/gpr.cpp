#include "common.hpp"

namespace thalweg::bindings {

void bind_gpr(py::module_&) {}

}  // namespace thalweg::bindings
