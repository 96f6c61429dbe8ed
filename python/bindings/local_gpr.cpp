#include "thalweg/local_gpr.hpp"

#include <pybind11/stl.h>

#include "common.hpp"

namespace thalweg::bindings {
namespace {

py::ssize_t length(std::size_t n) { return static_cast<py::ssize_t>(n); }

py::array_t<double> array_of(std::span<const double> values) {
  return py::array_t<double>(length(values.size()), values.data());
}

py::array_t<double> values(const Environments& self, const py::object& batch) {
  const BatchArrays arrays(batch);
  const BatchView& view = arrays.view();
  py::array_t<double> out({length(view.atoms()), length(self.size())});
  double* features = out.mutable_data();
  Environments::Workspace workspace(self);
  for (std::size_t row = 0; row < view.size(); ++row) {
    self.check(view[row]);
    self.values(view[row], features + static_cast<std::size_t>(view.offsets[row]) * self.size(), workspace);
  }
  return out;
}

struct Targets {
  Targets(const py::object& batch, const Array<double>& energies_in, const Array<double>& forces_in)
      : arrays(batch), energies(energies_in), forces(forces_in) {
    expect_shape(energies, "energies", {length(arrays.view().size())});
    expect_shape(forces, "forces", {length(arrays.view().atoms()), 3});
  }
  BatchArrays arrays;
  Array<double> energies, forces;
};

void fit(LocalGpr& self, const py::object& batch, const Array<double>& energies, const Array<double>& forces,
         double kernel_length, double amplitude, double noise_scale) {
  const Targets t(batch, energies, forces);
  py::gil_scoped_release release;
  self.fit(t.arrays.view(), span(t.energies), span(t.forces), {kernel_length, amplitude, noise_scale});
}

void append(LocalGpr& self, const py::object& batch, const Array<double>& energies, const Array<double>& forces) {
  const Targets t(batch, energies, forces);
  py::gil_scoped_release release;
  self.append(t.arrays.view(), span(t.energies), span(t.forces));
}

py::tuple predict(const LocalSurrogate& self, const py::object& batch, bool forces, bool atoms, int threads) {
  check_threads(threads);
  const BatchArrays arrays(batch);
  const py::ssize_t n = length(arrays.view().size()), m = length(arrays.view().atoms()), f = forces ? m : 0;
  py::array_t<double> energies(n), sigmas(n), atom_sigmas(atoms ? m : 0), out({f, py::ssize_t{3}}),
      sigma_forces({f, py::ssize_t{3}});
  const std::span<double> e = span_mut(energies), s = span_mut(sigmas), a = span_mut(atom_sigmas), o = span_mut(out),
                          so = span_mut(sigma_forces);
  {
    py::gil_scoped_release release;
    self.predict(arrays.view(), e, s, a, o, so, threads);
  }
  py::list result;
  result.append(std::move(energies));
  result.append(std::move(sigmas));
  if (forces) {
    result.append(std::move(out));
    result.append(std::move(sigma_forces));
  }
  if (atoms) result.append(std::move(atom_sigmas));
  return py::tuple(result);
}

}  // namespace

void bind_local_gpr(py::module_& m) {
  py::class_<Environments, std::shared_ptr<Environments>>(
      m, "Environments", "Two- and three-body symmetry functions of every atom's surroundings (environments.hpp).")
      .def(py::init([](const std::vector<std::int32_t>& species, int n_radial, int n_angular, int l_max,
                       double radial_cutoff, double angular_cutoff) {
             EnvironmentSettings settings;
             settings.n_radial = n_radial;
             settings.n_angular = n_angular;
             settings.l_max = l_max;
             settings.radial_cutoff = radial_cutoff;
             settings.angular_cutoff = angular_cutoff;
             return std::make_shared<Environments>(settings, species);
           }),
           py::arg("species"), py::kw_only(), py::arg("n_radial") = 6, py::arg("n_angular") = 3, py::arg("l_max") = 3,
           py::arg("radial_cutoff") = 6.0, py::arg("angular_cutoff") = 5.0)
      .def("values", &values, py::arg("batch"), "(m, D) features of every atom of a batch.")
      .def_property_readonly("size", &Environments::size);

  const LocalSettings defaults;
  const LocalKernel kernel;
  py::class_<LocalGpr, std::shared_ptr<LocalGpr>>(
      m, "LocalGpr",
      "Sparse GP over atomic environments, taught energies and forces (local_gpr.hpp). Do not change one that a "
      "LocalSurrogate uses: append to a copy().")
      .def(py::init([](std::shared_ptr<Environments> environments, double noise_energy, double noise_force,
                       double tolerance, std::size_t max_inducing) {
             return std::make_shared<LocalGpr>(std::move(environments),
                                               LocalSettings{noise_energy, noise_force, tolerance, max_inducing});
           }),
           py::arg("environments").none(false), py::kw_only(), py::arg("noise_energy") = defaults.noise_energy,
           py::arg("noise_force") = defaults.noise_force, py::arg("tolerance") = defaults.tolerance,
           py::arg("max_inducing") = defaults.max_inducing)
      .def(
          "copy", [](const LocalGpr& self) { return std::make_shared<LocalGpr>(self); },
          py::call_guard<py::gil_scoped_release>())
      .def("fit", &fit, py::arg("batch"), py::arg("energies"), py::arg("forces"), py::kw_only(),
           py::arg("length") = kernel.length, py::arg("amplitude") = kernel.amplitude,
           py::arg("noise_scale") = kernel.noise_scale,
           "Forgets everything and learns these structures: energies (n,), forces (m, 3; NaN: not known).")
      .def("append", &append, py::arg("batch"), py::arg("energies"), py::arg("forces"),
           "Learns more structures, one by one.")
      .def(
          "optimise",
          [](LocalGpr& self, const std::vector<double>& factors) {
            py::gil_scoped_release release;
            return self.optimise(factors);
          },
          py::arg("factors") = std::vector<double>{0.5, 0.71, 1.0, 1.41, 2.0},
          "Maximises the marginal likelihood over the length (times each of `factors`), amplitude and noise scale; "
          "returns its logarithm.")
      .def_property_readonly("size", &LocalGpr::size)
      .def_property_readonly("inducing", &LocalGpr::inducing)
      .def_property_readonly("length", [](const LocalGpr& self) { return self.kernel().length; })
      .def_property_readonly("amplitude", [](const LocalGpr& self) { return self.kernel().amplitude; })
      .def_property_readonly("noise_scale", [](const LocalGpr& self) { return self.kernel().noise_scale; })
      .def_property_readonly("tolerance", &LocalGpr::tolerance)
      .def_property_readonly("mean", &LocalGpr::mean)
      .def_property_readonly("log_likelihood", &LocalGpr::log_likelihood)
      .def_property_readonly("scale", [](const LocalGpr& self) { return array_of(self.scale()); });

  py::class_<LocalSurrogate, Landscape, std::shared_ptr<LocalSurrogate>>(
      m, "LocalSurrogate", "A LocalGpr as a landscape: prior + atom energies + mean - kappa sigma, with forces.")
      .def(py::init([](std::shared_ptr<LocalGpr> gpr, std::shared_ptr<Landscape> prior,
                       const std::map<std::int32_t, double>& atom_energies, double kappa) {
             return std::make_shared<LocalSurrogate>(
                 std::move(gpr), std::move(prior),
                 std::vector<std::pair<std::int32_t, double>>(atom_energies.begin(), atom_energies.end()), kappa);
           }),
           py::arg("gpr").none(false), py::kw_only(), py::arg("prior") = py::none(),
           py::arg("atom_energies") = std::map<std::int32_t, double>(), py::arg("kappa") = 0.0)
      .def("predict", &predict, py::arg("batch"), py::kw_only(), py::arg("forces") = false, py::arg("atoms") = false,
           py::arg("threads") = 0,
           "Energy (n,) and sigma (n,) [eV], with forces=True also -dE/dx and -d sigma/dx (m, 3), with atoms=True also "
           "sigma of each atom's energy (m,); kappa is not applied.");
}

}  // namespace thalweg::bindings
