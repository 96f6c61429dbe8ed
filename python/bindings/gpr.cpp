#include "thalweg/gpr.hpp"

#include <pybind11/stl.h>

#include <optional>

#include "common.hpp"
#include "thalweg/surrogate.hpp"

namespace thalweg::bindings {
namespace {

py::ssize_t length(std::size_t n) { return static_cast<py::ssize_t>(n); }

py::array_t<double> array_of(std::span<const double> values) {
  return py::array_t<double>(length(values.size()), values.data());
}

/// A copy of the training data, the factor and all: appending to it leaves the first one as it is.
std::shared_ptr<Gpr> copy_of(const Gpr& self) { return std::make_shared<Gpr>(self); }

void fit(Gpr& self, const Array<double>& features, const Array<double>& targets,
         const std::optional<Array<std::int64_t>>& counts, const std::optional<Array<double>>& directions,
         const std::optional<Array<double>>& slopes, int threads) {
  check_threads(threads);
  expect_shape(targets, "targets", {-1});
  expect_shape(features, "features", {targets.shape(0), length(self.features())});
  if (counts.has_value() != directions.has_value() || counts.has_value() != slopes.has_value())
    throw Error("counts, directions and slopes belong together: give all three or none");
  Slopes observed;
  if (counts) {
    expect_shape(*counts, "counts", {targets.shape(0)});
    expect_shape(*slopes, "slopes", {-1});
    expect_shape(*directions, "directions", {slopes->shape(0), length(self.features())});
    observed = {span(*counts), span(*directions), span(*slopes)};
  }
  const std::span<const double> x = span(features), y = span(targets);
  py::gil_scoped_release release;
  self.fit(x, y, observed, threads);
}

void append(Gpr& self, const Array<double>& feature, double target, const std::optional<Array<double>>& directions,
            const std::optional<Array<double>>& slopes) {
  expect_shape(feature, "feature", {length(self.features())});
  if (directions.has_value() != slopes.has_value())
    throw Error("directions and slopes belong together: give both or neither");
  std::span<const double> t, g;
  if (slopes) {
    expect_shape(*slopes, "slopes", {-1});
    expect_shape(*directions, "directions", {slopes->shape(0), length(self.features())});
    t = span(*directions), g = span(*slopes);
  }
  const std::span<const double> x = span(feature);
  py::gil_scoped_release release;
  self.append(x, target, t, g);
}

py::array_t<double> whitened(const Gpr& self, const Array<double>& features) {
  expect_shape(features, "features", {-1, length(self.features())});
  py::array_t<double> out({features.shape(0), length(self.rows())});
  double* to = out.mutable_data();
  const double* from = features.data();
  py::gil_scoped_release release;
  self.whitened(static_cast<std::size_t>(features.shape(0)), from, to);
  return out;
}

py::dict likelihood(const Gpr& self, const Kernel& kernel) {
  Likelihood l;
  {
    py::gil_scoped_release release;
    l = self.likelihood(kernel);
  }
  py::dict out;
  out["value"] = l.value;
  out["amplitude"] = l.d_amplitude;
  out["length_long"] = l.d_length_long;
  out["length_short"] = l.d_length_short;
  out["noise"] = l.d_noise;
  out["weight"] = l.d_weight;
  return out;
}

double optimise(Gpr& self, const py::dict& bounds, const std::vector<Kernel>& starts,
                const std::vector<std::string>& free, int max_evaluations) {
  KernelBounds b;
  for (const auto& [key, range] : bounds) {
    const std::string name = py::cast<std::string>(key);
    double (*target)[2] = name == "amplitude"      ? &b.amplitude
                          : name == "length_long"  ? &b.length_long
                          : name == "length_short" ? &b.length_short
                          : name == "noise"        ? &b.noise
                                                   : nullptr;
    if (target == nullptr)
      throw Error("bounds may name amplitude, length_long, length_short and noise, but they name '" + name + "'");
    const auto [low, high] = py::cast<std::pair<double, double>>(range);
    (*target)[0] = low;
    (*target)[1] = high;
  }
  b.optimise_amplitude = b.optimise_long = b.optimise_short = b.optimise_noise = b.optimise_weight = false;
  for (const std::string& name : free) {
    bool* flag = name == "amplitude"      ? &b.optimise_amplitude
                 : name == "length_long"  ? &b.optimise_long
                 : name == "length_short" ? &b.optimise_short
                 : name == "noise"        ? &b.optimise_noise
                 : name == "weight"       ? &b.optimise_weight
                                          : nullptr;
    if (flag == nullptr)
      throw Error("free may name amplitude, length_long, length_short, noise and weight, but it names '" + name + "'");
    *flag = true;
  }
  py::gil_scoped_release release;
  return self.optimise(b, starts, max_evaluations);
}

py::tuple predict(const Gpr& self, const Array<double>& features, double kappa, bool gradient) {
  expect_shape(features, "features", {-1, length(self.features())});
  const py::ssize_t count = features.shape(0), dimension = length(self.features());
  py::array_t<double> mean(count), sigma(count);
  double *m = mean.mutable_data(), *s = sigma.mutable_data();
  const double* x = features.data();
  if (!gradient) {
    py::gil_scoped_release release;
    self.predict(static_cast<std::size_t>(count), x, kappa, m, s, nullptr, nullptr);
    py::gil_scoped_acquire acquire;
    return py::make_tuple(std::move(mean), std::move(sigma));
  }
  py::array_t<double> slope({count, dimension}), slope_sigma({count, dimension});
  double *g = slope.mutable_data(), *gs = slope_sigma.mutable_data();
  {
    py::gil_scoped_release release;
    self.predict(static_cast<std::size_t>(count), x, kappa, m, s, g, gs);
  }
  return py::make_tuple(std::move(mean), std::move(sigma), std::move(slope), std::move(slope_sigma));
}

py::tuple predict_batch(const Surrogate& self, const py::object& batch, bool forces, int threads) {
  check_threads(threads);
  const BatchArrays arrays(batch);
  const py::ssize_t n = length(arrays.view().size()), m = forces ? length(arrays.view().atoms()) : 0;
  py::array_t<double> energies(n), sigmas(n), f({m, py::ssize_t{3}}), sigma_forces({m, py::ssize_t{3}});
  const std::span<double> e = span_mut(energies), s = span_mut(sigmas), out = span_mut(f),
                          sigma_out = span_mut(sigma_forces);
  {
    py::gil_scoped_release release;
    self.predict(arrays.view(), e, s, out, sigma_out, threads);
  }
  if (!forces) return py::make_tuple(std::move(energies), std::move(sigmas));
  return py::make_tuple(std::move(energies), std::move(sigmas), std::move(f), std::move(sigma_forces));
}

}  // namespace

void bind_gpr(py::module_& m) {
  const Kernel defaults;
  py::class_<Kernel>(
      m, "Kernel",
      "k(x, x') = amplitude [weight_long exp(-|x-x'|^2 / 2 length_long^2) + weight_short exp(-|x-x'|^2 / 2 "
      "length_short^2)] (thesis (2.17)); amplitude and noise (a variance, on the diagonal) in eV^2, lengths "
      "in units of the features.")
      .def(py::init([](double amplitude, double length_long, double length_short, double weight_long,
                       double weight_short, double noise) {
             return Kernel{amplitude, length_long, length_short, weight_long, weight_short, noise};
           }),
           py::kw_only(), py::arg("amplitude") = defaults.amplitude, py::arg("length_long") = defaults.length_long,
           py::arg("length_short") = defaults.length_short, py::arg("weight_long") = defaults.weight_long,
           py::arg("weight_short") = defaults.weight_short, py::arg("noise") = defaults.noise)
      .def_readonly("amplitude", &Kernel::amplitude)
      .def_readonly("length_long", &Kernel::length_long)
      .def_readonly("length_short", &Kernel::length_short)
      .def_readonly("weight_long", &Kernel::weight_long)
      .def_readonly("weight_short", &Kernel::weight_short)
      .def_readonly("noise", &Kernel::noise)
      .def("__repr__", [](const Kernel& k) {
        const auto text = [](double x) { return py::cast<std::string>(py::repr(py::float_(x))); };
        return "Kernel(amplitude=" + text(k.amplitude) + ", length_long=" + text(k.length_long) +
               ", length_short=" + text(k.length_short) + ", weight_long=" + text(k.weight_long) +
               ", weight_short=" + text(k.weight_short) + ", noise=" + text(k.noise) + ")";
      });

  py::class_<Gpr, std::shared_ptr<Gpr>>(m, "Gpr",
                                        "Gaussian process regression on feature vectors (thesis (2.14)-(2.17)). Do not "
                                        "change one that a Surrogate uses: append to a copy().")
      .def(py::init<std::size_t, const Kernel&, double>(), py::arg("features"), py::arg("kernel"), py::kw_only(),
           py::arg("noise_slope") = 0.3)
      .def("copy", &copy_of, py::call_guard<py::gil_scoped_release>())
      .def("fit", &fit, py::arg("features"), py::arg("targets"), py::kw_only(), py::arg("counts") = py::none(),
           py::arg("directions") = py::none(), py::arg("slopes") = py::none(), py::arg("threads") = 1,
           "Full factorisation of (n, D) features and (n,) targets [eV]; with counts (n,), directions (m, D) and "
           "slopes (m,) also of slopes = directions . gradient, counts[i] of them at point i.")
      .def("append", &append, py::arg("feature"), py::arg("target"), py::kw_only(), py::arg("directions") = py::none(),
           py::arg("slopes") = py::none(),
           "One more point (D,) in O(n^2) for each row; with its slopes (m,) along directions (m, D).")
      .def("remove", &Gpr::remove, py::arg("row"), py::call_guard<py::gil_scoped_release>(),
           "One point fewer in O(n^2); with slopes, a refit.")
      .def(
          "set_targets",
          [](Gpr& self, const Array<double>& targets) {
            expect_shape(targets, "targets", {length(self.rows())});
            py::gil_scoped_release release;
            self.set_targets(span(targets));
          },
          py::arg("targets"), "New targets (rows,) for the same points, O(n^2).")
      .def("set_kernel", &Gpr::set_kernel, py::arg("kernel"), py::call_guard<py::gil_scoped_release>(),
           "New hyperparameters and a refit from the cached distances.")
      .def("likelihood", &likelihood, py::arg("kernel"),
           "Log marginal likelihood (`value`) at other hyperparameters and its derivatives with respect to the "
           "logarithms "
           "of amplitude, length_long, length_short, noise and weight_short / weight_long (`weight`).")
      .def(
          "optimise", &optimise, py::kw_only(), py::arg("bounds") = py::dict(),
          py::arg("starts") = std::vector<Kernel>(),
          py::arg("free") = std::vector<std::string>{"amplitude", "length_long", "length_short"},
          py::arg("max_evaluations") = 60,
          "Maximises the likelihood over the hyperparameters named in `free`, from the current kernel and from each of "
          "`starts`; refits with the best and returns its log likelihood. bounds: name -> (low, high).")
      .def("predict", &predict, py::arg("features"), py::kw_only(), py::arg("kappa") = 0.0, py::arg("gradient") = false,
           "Of (count, D) features: mean (count,) and sigma (count,), with gradient=True also d(mean - kappa sigma)/df "
           "and d sigma/df (count, D).")
      .def("whitened", &whitened, py::arg("features"),
           "L^-1 k (count, rows) of (count, D) features: the posterior covariance of two is their k minus the product "
           "of their rows.")
      .def_property_readonly("size", &Gpr::size)
      .def_property_readonly("rows", &Gpr::rows)
      .def_property_readonly("noise_slope", &Gpr::noise_slope)
      .def_property_readonly("features", &Gpr::features)
      .def_property_readonly("kernel", &Gpr::kernel, py::return_value_policy::copy)
      .def_property_readonly("mean", &Gpr::mean)
      .def_property_readonly("jitter", &Gpr::jitter)
      .def_property_readonly("log_likelihood", &Gpr::log_likelihood)
      .def_property_readonly("weights", [](const Gpr& self) { return array_of(self.weights()); })
      .def_property_readonly("training", [](const Gpr& self) {
        return py::array_t<double>({length(self.size()), length(self.features())}, self.training().data());
      });

  py::class_<Surrogate, Landscape, std::shared_ptr<Surrogate>>(
      m, "Surrogate", "The GP as a landscape: prior + atom energies + mean - kappa sigma, with forces (thesis (2.18)).")
      .def(py::init([](std::shared_ptr<Fingerprint> fingerprint, std::shared_ptr<Gpr> gpr,
                       std::shared_ptr<Landscape> prior, const std::map<std::int32_t, double>& atom_energies,
                       double kappa) {
             return std::make_shared<Surrogate>(
                 std::move(fingerprint), std::move(gpr), std::move(prior),
                 std::vector<std::pair<std::int32_t, double>>(atom_energies.begin(), atom_energies.end()), kappa);
           }),
           py::arg("fingerprint").none(false), py::arg("gpr").none(false), py::kw_only(), py::arg("prior") = py::none(),
           py::arg("atom_energies") = std::map<std::int32_t, double>(), py::arg("kappa") = 0.0)
      .def("predict", &predict_batch, py::arg("batch"), py::kw_only(), py::arg("forces") = false,
           py::arg("threads") = 0,
           "Energy (n,) and sigma (n,) [eV], with forces=True also -dE/dx and -d sigma/dx (m, 3); kappa is not "
           "applied.");
}

}  // namespace thalweg::bindings
