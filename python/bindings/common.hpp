// What every binding file shares: checked arrays and the Python `Batch` as a BatchView. No physics here.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <string>

#include "thalweg/core.hpp"
#include "thalweg/random.hpp"

namespace thalweg::bindings {

namespace py = pybind11;
template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <class T>
std::span<const T> span(const Array<T>& a) {
  return {a.data(), static_cast<std::size_t>(a.size())};
}
template <class T>
std::span<T> span_mut(py::array_t<T>& a) {
  return {a.mutable_data(), static_cast<std::size_t>(a.size())};
}

/// Throws Error unless the array has this shape; -1 matches any length.
template <class A>
void expect_shape(const A& a, const char* name, std::initializer_list<py::ssize_t> wanted) {
  bool same = a.ndim() == static_cast<py::ssize_t>(wanted.size());
  py::ssize_t k = 0;
  for (const py::ssize_t w : wanted) {
    if (same && w >= 0 && a.shape(k) != w) same = false;
    ++k;
  }
  if (same) return;
  const auto text = [](auto first, auto last) {
    std::string out = "(";
    for (auto it = first; it != last; ++it)
      out += (it == first ? "" : ", ") + (*it < 0 ? std::string("n") : std::to_string(*it));
    return out + ")";
  };
  throw Error(std::string(name) + " must have shape " + text(wanted.begin(), wanted.end()) + ", but it has shape " +
              text(a.shape(), a.shape() + a.ndim()));
}

/// Throws Error for more threads than any machine has: starting them would end the process.
inline void check_threads(int threads) {
  if (threads > kMostThreads)
    throw Error("threads must be at most " + std::to_string(kMostThreads) + ", but it is " + std::to_string(threads));
}

/// The arrays of a Python object with the attributes of `Batch`, kept alive for as long as this lives.
class BatchArrays {
 public:
  explicit BatchArrays(const py::object& batch)
      : positions_(batch.attr("positions").cast<Array<double>>()),
        numbers_(batch.attr("numbers").cast<Array<std::int32_t>>()),
        offsets_(batch.attr("offsets").cast<Array<std::int64_t>>()),
        cells_(batch.attr("cells").cast<Array<double>>()),
        pbc_(batch.attr("pbc").cast<Array<bool>>()),
        fixed_(batch.attr("fixed").cast<Array<bool>>()) {
    view_ = {span(positions_), span(numbers_), span(offsets_), span(cells_), bytes(pbc_), bytes(fixed_)};
    view_.check();
  }
  const BatchView& view() const { return view_; }

 private:
  static std::span<const std::uint8_t> bytes(const Array<bool>& a) {
    return {reinterpret_cast<const std::uint8_t*>(a.data()), static_cast<std::size_t>(a.size())};
  }
  Array<double> positions_;
  Array<std::int32_t> numbers_;
  Array<std::int64_t> offsets_;
  Array<double> cells_;
  Array<bool> pbc_, fixed_;
  BatchView view_;
};

void bind_descriptors(py::module_& m);
void bind_gpr(py::module_& m);
void bind_local_gpr(py::module_& m);
void bind_potentials(py::module_& m);
void bind_relax(py::module_& m);
void bind_build(py::module_& m);
void bind_training(py::module_& m);
void bind_qmap(py::module_& m);
void bind_cuda(py::module_& core);

}  // namespace thalweg::bindings
