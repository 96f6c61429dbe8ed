#include "common.hpp"

namespace thalweg::bindings {

void bind_descriptors(py::module_&) {}

}  // namespace thalweg::bindings
