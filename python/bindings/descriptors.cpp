#include <algorithm>
#include <exception>
#include <mutex>

#include "common.hpp"
#include "thalweg/complementary.hpp"
#include "thalweg/density.hpp"
#include "thalweg/fchl.hpp"
#include "thalweg/fingerprint.hpp"
#include "thalweg/soap.hpp"

namespace thalweg::bindings {
namespace {

void expect_threads(int threads) {
  check_threads(threads);
  if (threads < 0)
    throw Error("threads must be 0 (as many as there are cores) or more, but it is " + std::to_string(threads));
}

/// Calls work(structure, index, workspace) for each structure of the batch on several threads, each with a workspace of
/// its own. The error of the first structure that has one is thrown in the end.
template <class Descriptor, class Work>
void for_each_structure(const Descriptor& descriptor, const BatchView& batch, int threads, const Work& work) {
  expect_threads(threads);
  const auto n = static_cast<std::int64_t>(batch.size());
  const int available = threads > 0 || n < 2 ? std::max(threads, 1) : default_threads();
  const int wanted = static_cast<int>(std::clamp<std::int64_t>(n, 1, available));
  std::exception_ptr error;
  std::int64_t failed = n;
  std::mutex guard;
#pragma omp parallel num_threads(wanted)
  {
    typename Descriptor::Workspace workspace = descriptor.borrow();
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
    descriptor.give_back(std::move(workspace));
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

// ---- descriptors of atoms: SOAP, FCHL19, the local density -------------------------------------------------------

/// Where the features of each structure begin, in rows; one more entry for the end.
template <class Descriptor>
std::vector<std::size_t> first_rows(const Descriptor& self, const BatchView& batch) {
  std::vector<std::size_t> first(batch.size() + 1, 0);
  for (std::size_t k = 0; k < batch.size(); ++k) first[k + 1] = first[k] + self.rows(batch[k].n);
  return first;
}

/// Threads share out structures; where there are fewer structures than threads, the atoms of each.
template <class Descriptor, class Work>
void for_each_of(const Descriptor& self, const BatchView& batch, int threads, const Work& work) {
  expect_threads(threads);
  const int available = threads > 0 ? threads : default_threads();
  const bool within = batch.size() < static_cast<std::size_t>(available);
  for_each_structure(self, batch, within ? 1 : available,
                     [&](const StructureView& structure, std::size_t k, typename Descriptor::Workspace& workspace) {
                       work(structure, k, workspace, within ? available : 1);
                     });
}

template <class Descriptor>
py::array_t<double> atom_values(const Descriptor& self, const py::object& batch, int threads) {
  const BatchArrays arrays(batch);
  const BatchView& view = arrays.view();
  const auto first = first_rows(self, view);
  py::array_t<double> out({first.back(), self.size()});
  double* features = out.mutable_data();
  py::gil_scoped_release release;
  for_each_of(self, view, threads, [&](const StructureView& structure, std::size_t k, auto& workspace, int within) {
    self.values(structure, features + first[k] * self.size(), workspace, within);
  });
  return out;
}

template <class Descriptor>
py::array_t<double> atom_contract(const Descriptor& self, const py::object& batch, const Array<double>& weights,
                                  int threads) {
  const BatchArrays arrays(batch);
  const BatchView& view = arrays.view();
  const auto first = first_rows(self, view);
  expect_shape(weights, "weights", {static_cast<py::ssize_t>(first.back()), static_cast<py::ssize_t>(self.size())});
  py::array_t<double> out({view.atoms(), std::size_t{3}});
  double* gradient = out.mutable_data();
  std::fill_n(gradient, out.size(), 0.0);
  const double* w = weights.data();
  py::gil_scoped_release release;
  for_each_of(self, view, threads, [&](const StructureView& structure, std::size_t k, auto& workspace, int within) {
    std::vector<double> features(self.rows(structure.n) * self.size());
    self.values(structure, features.data(), workspace, within);
    self.contract(w + first[k] * self.size(), 1.0, gradient + 3 * static_cast<std::size_t>(view.offsets[k]), workspace,
                  within);
  });
  return out;
}

template <class Descriptor>
py::list atom_jacobian(const Descriptor& self, const py::object& batch, int threads) {
  const BatchArrays arrays(batch);
  const BatchView& view = arrays.view();
  py::list out;
  std::vector<double*> each;
  for (std::size_t k = 0; k < view.size(); ++k) {
    const std::size_t n = view[k].n;
    py::array_t<double> one({n, n, std::size_t{3}, self.size()});
    each.push_back(one.mutable_data());
    out.append(std::move(one));
  }
  py::gil_scoped_release release;
  for_each_structure(self, view, threads, [&](const StructureView& structure, std::size_t k, auto& workspace) {
    std::vector<double> features(self.rows(structure.n) * self.size());
    self.values(structure, features.data(), workspace);
    for (std::size_t center = 0; center < structure.n; ++center)
      self.jacobian(center, each[k] + center * structure.n * 3 * self.size(), workspace);
  });
  return out;
}

template <class Descriptor>
void bind_atom_descriptor(py::class_<Descriptor, std::shared_ptr<Descriptor>>& c) {
  c.def_property_readonly("size", &Descriptor::size, "Features of one row.")
      .def("values", &atom_values<Descriptor>, py::arg("batch"), py::arg("threads") = 0, "Features (rows, size).")
      .def("contract", &atom_contract<Descriptor>, py::arg("batch"), py::arg("weights"), py::arg("threads") = 0,
           "d(weights . features)/dx (m, 3) for weights (rows, size), without the Jacobian.")
      .def("jacobian", &atom_jacobian<Descriptor>, py::arg("batch"), py::arg("threads") = 0,
           "Of each structure d(features of its atoms)/d(positions of its atoms) (n, n, 3, size), 1/angstrom.");
}

SoapCutoff soap_cutoff_named(const std::string& name) {
  if (name == "smooth") return SoapCutoff::smooth;
  if (name == "hard") return SoapCutoff::hard;
  throw Error("cutoff must be 'smooth' or 'hard', but it is '" + name + "'");
}

SoapAverage average_named(const std::string& name) {
  if (name == "off") return SoapAverage::off;
  if (name == "mean") return SoapAverage::mean;
  if (name == "sum") return SoapAverage::sum;
  throw Error("average must be 'off', 'mean' or 'sum', but it is '" + name + "'");
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

  const SoapSettings soap;
  py::class_<Soap, std::shared_ptr<Soap>> of_soap(m, "Soap", "SOAP power spectrum; see thalweg.descriptors.");
  of_soap
      .def(py::init([](const Array<std::int32_t>& species, double r_cut, int n_max, int l_max, double sigma,
                       const std::string& cutoff, const std::string& average) {
             expect_shape(species, "species", {-1});
             return std::make_shared<Soap>(
                 SoapSettings{r_cut, n_max, l_max, sigma, soap_cutoff_named(cutoff), average_named(average)},
                 span(species));
           }),
           py::arg("species"), py::kw_only(), py::arg("r_cut") = soap.r_cut, py::arg("n_max") = soap.n_max,
           py::arg("l_max") = soap.l_max, py::arg("sigma") = soap.sigma, py::arg("cutoff") = "smooth",
           py::arg("average") = "off")
      .def_property_readonly("reach", &Soap::reach, "Distance up to which neighbours count, angstrom.");
  bind_atom_descriptor(of_soap);

  const Fchl19Settings fchl;
  py::class_<Fchl19, std::shared_ptr<Fchl19>> of_fchl(m, "Fchl19", "FCHL19 of each atom; see thalweg.descriptors.");
  of_fchl.def(py::init([](const Array<std::int32_t>& species, double cutoff_pairs, double cutoff_triplets, int n_pairs,
                          int n_triplets, int n_fourier, double eta_pairs, double eta_triplets, double zeta,
                          double decay_pairs, double decay_triplets, double weight_triplets) {
                expect_shape(species, "species", {-1});
                return std::make_shared<Fchl19>(
                    Fchl19Settings{cutoff_pairs, cutoff_triplets, n_pairs, n_triplets, n_fourier, eta_pairs,
                                   eta_triplets, zeta, decay_pairs, decay_triplets, weight_triplets},
                    span(species));
              }),
              py::arg("species"), py::kw_only(), py::arg("cutoff_pairs") = fchl.cutoff_pairs,
              py::arg("cutoff_triplets") = fchl.cutoff_triplets, py::arg("n_pairs") = fchl.n_pairs,
              py::arg("n_triplets") = fchl.n_triplets, py::arg("n_fourier") = fchl.n_fourier,
              py::arg("eta_pairs") = fchl.eta_pairs, py::arg("eta_triplets") = fchl.eta_triplets,
              py::arg("zeta") = fchl.zeta, py::arg("decay_pairs") = fchl.decay_pairs,
              py::arg("decay_triplets") = fchl.decay_triplets, py::arg("weight_triplets") = fchl.weight_triplets);
  bind_atom_descriptor(of_fchl);

  const DensitySettings density;
  py::class_<LocalDensity, std::shared_ptr<LocalDensity>> of_density(
      m, "LocalDensity", "Local density feature of each atom; see thalweg.descriptors.");
  of_density.def(py::init([](const Array<std::int32_t>& species, double decay, double cutoff) {
                   expect_shape(species, "species", {-1});
                   return std::make_shared<LocalDensity>(DensitySettings{decay, cutoff}, span(species));
                 }),
                 py::arg("species"), py::kw_only(), py::arg("decay") = density.decay,
                 py::arg("cutoff") = density.cutoff);
  bind_atom_descriptor(of_density);

  py::class_<ComplementaryEnergy, Landscape, std::shared_ptr<ComplementaryEnergy>>(
      m, "ComplementaryEnergy",
      "Complementary energy (Chiriki, Christiansen, Hammer 2019): the sum over atoms with an attractor of sqrt(|f - "
      "A|^2 "
      "+ softening^2) - softening, f the local density. attractors (m, size): features that each atom of the batch "
      "should "
      "come to have, its own atomic number last; a row of NaN: the atom does not count. In the unit of the features.")
      .def(py::init([](std::shared_ptr<const LocalDensity> density_of_atoms, const Array<double>& attractors,
                       double softening) {
             if (density_of_atoms)
               expect_shape(attractors, "attractors", {-1, static_cast<py::ssize_t>(density_of_atoms->size())});
             const std::span<const double> values = span(attractors);
             return std::make_shared<ComplementaryEnergy>(std::move(density_of_atoms),
                                                          std::vector<double>(values.begin(), values.end()), softening);
           }),
           py::arg("density"), py::arg("attractors"), py::kw_only(), py::arg("softening") = 0.01);
}

}  // namespace thalweg::bindings
