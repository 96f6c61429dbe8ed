#include <algorithm>
#include <exception>
#include <mutex>

#include "common.hpp"
#include "thalweg/fingerprint.hpp"

namespace thalweg::bindings {
namespace {

/// Calls work(structure, index, workspace) for each structure of the batch on several threads, each with a workspace of
/// its own. The error of the first structure that has one is thrown in the end.
template <class Work>
void for_each_structure(const Fingerprint& fingerprint, const BatchView& batch, int threads, const Work& work) {
  check_threads(threads);
  if (threads < 0)
    throw Error("threads must be 0 (as many as there are cores) or more, but it is " + std::to_string(threads));
  const auto n = static_cast<std::int64_t>(batch.size());
  const int available = threads > 0 || n < 2 ? std::max(threads, 1) : default_threads();
  const int wanted = static_cast<int>(std::clamp<std::int64_t>(n, 1, available));
  std::exception_ptr error;
  std::int64_t failed = n;
  std::mutex guard;
#pragma omp parallel num_threads(wanted)
  {
    Fingerprint::Workspace workspace = fingerprint.borrow();
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t k = 0; k < n; ++k) {
      try {
        const auto index = static_cast<std::size_t>(k);
        work(batch[index], index, workspace);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(guard);
        if (k < failed) {
          failed = k;
          error = std::current_exception();
        }
      }
    }
    fingerprint.give_back(std::move(workspace));
  }
  if (!error) return;
  try {
    std::rethrow_exception(error);
  } catch (const Error& e) {
    throw Error("structure " + std::to_string(failed) + " of the batch: " + e.what());
  }
}

py::array_t<double> values(const Fingerprint& self, const py::object& batch, int threads) {
  const BatchArrays arrays(batch);
  const BatchView& view = arrays.view();
  py::array_t<double> out({view.size(), self.size()});
  double* features = out.mutable_data();
  py::gil_scoped_release release;
  for_each_structure(self, view, threads,
                     [&](const StructureView& structure, std::size_t k, Fingerprint::Workspace& workspace) {
                       self.values(structure, features + k * self.size(), workspace);
                     });
  return out;
}

py::array_t<double> jacobian(const Fingerprint& self, const py::object& batch, int threads) {
  const BatchArrays arrays(batch);
  const BatchView& view = arrays.view();
  py::array_t<double> out({view.atoms(), std::size_t{3}, self.size()});
  double* derivatives = out.mutable_data();
  py::gil_scoped_release release;
  for_each_structure(self, view, threads,
                     [&](const StructureView& structure, std::size_t k, Fingerprint::Workspace& workspace) {
                       std::vector<double> features(self.size());
                       self.values(structure, features.data(), workspace);
                       const auto first = static_cast<std::size_t>(view.offsets[k]);
                       self.jacobian(derivatives + 3 * first * self.size(), workspace);
                     });
  return out;
}

py::array_t<double> contract(const Fingerprint& self, const py::object& batch, const Array<double>& weights,
                             int threads) {
  const BatchArrays arrays(batch);
  const BatchView& view = arrays.view();
  expect_shape(weights, "weights", {static_cast<py::ssize_t>(view.size()), static_cast<py::ssize_t>(self.size())});
  py::array_t<double> out({view.atoms(), std::size_t{3}});
  double* gradient = out.mutable_data();
  std::fill_n(gradient, out.size(), 0.0);
  const double* w = weights.data();
  py::gil_scoped_release release;
  for_each_structure(self, view, threads,
                     [&](const StructureView& structure, std::size_t k, Fingerprint::Workspace& workspace) {
                       std::vector<double> features(self.size());
                       self.values(structure, features.data(), workspace);
                       const auto first = static_cast<std::size_t>(view.offsets[k]);
                       self.contract(w + k * self.size(), 1.0, gradient + 3 * first, workspace);
                     });
  return out;
}

FingerprintConvention convention_named(const std::string& name) {
  if (name == "smooth") return FingerprintConvention::smooth;
  if (name == "agox") return FingerprintConvention::agox;
  throw Error("convention must be 'smooth' or 'agox', but it is '" + name + "'");
}

}  // namespace

void bind_descriptors(py::module_& m) {
  const FingerprintSettings defaults;
  py::class_<Fingerprint, std::shared_ptr<Fingerprint>>(
      m, "Fingerprint", "Fingerprint of Oganov and Valle for structures of one composition; see thalweg.descriptors.")
      .def(py::init([](const Array<std::int32_t>& numbers, bool periodic, double cutoff_radial, double cutoff_angular,
                       double bin_width, int angular_bins, double sigma_radial, double sigma_angular, double gamma,
                       double eta, double n_sigma, bool angular, const std::string& convention) {
             expect_shape(numbers, "numbers", {-1});
             const FingerprintSettings settings{cutoff_radial,
                                                cutoff_angular,
                                                bin_width,
                                                angular_bins,
                                                sigma_radial,
                                                sigma_angular,
                                                gamma,
                                                eta,
                                                n_sigma,
                                                angular,
                                                convention_named(convention)};
             return std::make_shared<Fingerprint>(settings, span(numbers), periodic);
           }),
           py::arg("numbers"), py::arg("periodic"), py::kw_only(), py::arg("cutoff_radial") = defaults.cutoff_radial,
           py::arg("cutoff_angular") = defaults.cutoff_angular, py::arg("bin_width") = defaults.bin_width,
           py::arg("angular_bins") = defaults.angular_bins, py::arg("sigma_radial") = defaults.sigma_radial,
           py::arg("sigma_angular") = defaults.sigma_angular, py::arg("gamma") = defaults.gamma,
           py::arg("eta") = defaults.eta, py::arg("n_sigma") = defaults.n_sigma, py::arg("angular") = defaults.angular,
           py::arg("convention") = "smooth")
      .def_property_readonly("size", &Fingerprint::size, "Length of the feature vector.")
      .def("values", &values, py::arg("batch"), py::arg("threads") = 0, "Features (n, size).")
      .def("jacobian", &jacobian, py::arg("batch"), py::arg("threads") = 0,
           "Derivatives of the features with respect to the positions (m, 3, size), 1/angstrom.")
      .def("contract", &contract, py::arg("batch"), py::arg("weights"), py::arg("threads") = 0,
           "d(weights . features)/dx (m, 3) for weights (n, size), without the Jacobian.");
}

}  // namespace thalweg::bindings
