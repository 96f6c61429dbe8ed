#include "common.hpp"

namespace thalweg::bindings {

void bind_build(py::module_&) {}

}  // namespace thalweg::bindings
