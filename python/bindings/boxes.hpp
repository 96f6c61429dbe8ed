// What the bindings of relaxation and building share: boxes in, flags out.
#pragma once

#include <algorithm>
#include <vector>

#include "common.hpp"
#include "thalweg/relax.hpp"

namespace thalweg::bindings {

/// None, or (corner (3,), vectors (3, 3), open (3,) bool[, first atom that knows the walls])
inline Confinement confinement_of(const py::object& box) {
  Confinement out;
  if (box.is_none()) return out;
  if (!py::isinstance<py::sequence>(box) || (py::len(box) != 3 && py::len(box) != 4))
    throw Error("box must be None or (corner (3,), vectors (3, 3), open (3,)[, first atom]), but it is " +
                py::repr(box).cast<std::string>());
  const py::sequence parts(box);
  const auto corner = parts[0].cast<Array<double>>();
  const auto vectors = parts[1].cast<Array<double>>();
  const auto open = parts[2].cast<Array<bool>>();
  expect_shape(corner, "corner of box", {3});
  expect_shape(vectors, "vectors of box", {3, 3});
  expect_shape(open, "open of box", {3});
  out.active = true;
  std::copy(corner.data(), corner.data() + 3, out.corner);
  std::copy(vectors.data(), vectors.data() + 9, out.vectors);
  for (py::ssize_t k = 0; k < 3; ++k) out.open[k] = open.data()[k] ? 1 : 0;
  if (py::len(box) == 4) out.first_atom = parts[3].cast<std::size_t>();
  return out;
}

inline py::array_t<bool> flags(const std::vector<std::uint8_t>& values) {
  py::array_t<bool> out(static_cast<py::ssize_t>(values.size()));
  std::transform(values.begin(), values.end(), out.mutable_data(), [](std::uint8_t v) { return v != 0; });
  return out;
}

}  // namespace thalweg::bindings
