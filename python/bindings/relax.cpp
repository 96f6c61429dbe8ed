#include "thalweg/relax.hpp"

#include <optional>

#include "boxes.hpp"

namespace thalweg::bindings {
namespace {

RelaxSettings relax_settings(int steps, double force_tolerance, double max_step, int memory, double first_curvature) {
  RelaxSettings settings;
  settings.steps = steps;
  settings.force_tolerance = force_tolerance;
  settings.max_step = max_step;
  settings.memory = memory;
  settings.first_curvature = first_curvature;
  return settings;
}

py::array_t<double> rows_of_three(const std::vector<double>& values) {
  py::array_t<double> out({static_cast<py::ssize_t>(values.size() / 3), py::ssize_t{3}});
  std::copy(values.begin(), values.end(), out.mutable_data());
  return out;
}

}  // namespace

void bind_relax(py::module_& m) {
  m.def(
      "relax",
      [](const Landscape& landscape, const py::object& batch, int steps, double force_tolerance, double max_step,
         int memory, double first_curvature, const py::object& box, int threads) {
        check_threads(threads);
        const BatchArrays arrays(batch);
        const RelaxSettings settings = relax_settings(steps, force_tolerance, max_step, memory, first_curvature);
        const Confinement confinement = confinement_of(box);
        RelaxResult result;
        {
          py::gil_scoped_release release;
          result = relax(landscape, arrays.view(), settings, confinement, threads);
        }
        py::array_t<double> energies(static_cast<py::ssize_t>(result.energies.size()), result.energies.data());
        py::array_t<std::int32_t> evaluations(static_cast<py::ssize_t>(result.evaluations.size()),
                                              result.evaluations.data());
        return py::make_tuple(rows_of_three(result.positions), energies, rows_of_three(result.forces), evaluations,
                              flags(result.converged));
      },
      py::arg("landscape"), py::arg("batch"), py::kw_only(), py::arg("steps") = 100, py::arg("force_tolerance") = 0.05,
      py::arg("max_step") = 0.2, py::arg("memory") = 10, py::arg("first_curvature") = 70.0, py::arg("box") = py::none(),
      py::arg("threads") = 0,
      R"(Relax every structure of a batch on a landscape with L-BFGS.

steps: evaluations per structure beyond the first; force_tolerance [eV/angstrom]: largest force on one atom, fixed
coordinates and forces into walls not counted; max_step [angstrom]: largest move of one atom in one step; box: None or
(corner (3,), vectors (3, 3), open (3,) bool), walls that free atoms do not cross (open: no walls along that vector);
threads = 0: as many as this process may use. The result of a structure depends neither on the batch nor on threads.

Returns positions (m, 3), energies (n,) [eV], forces (m, 3) [eV/angstrom] (0 on atoms with all
coordinates fixed), evaluations (n,), converged (n,) bool.
Raises ConfigurationError for settings out of range or a box without volume.)");

  py::class_<Minimiser>(m, "Minimiser",
                        R"(The optimiser of one structure, driven from outside:

    m = Minimiser(positions, fixed, steps=100)
    while not m.done:
        m.tell(*energy_and_forces(m.positions))

Energies in eV, forces = -dE/dx in eV/angstrom, positions in angstrom, all arrays (n, 3).)")
      .def(py::init([](const Array<double>& positions, const Array<bool>& fixed, int steps, double force_tolerance,
                       double max_step, int memory, double first_curvature, const py::object& box) {
             expect_shape(positions, "positions", {-1, 3});
             expect_shape(fixed, "fixed", {positions.shape(0), 3});
             StructureView start;
             start.n = static_cast<std::size_t>(positions.shape(0));
             start.positions = positions.data();
             start.fixed = reinterpret_cast<const std::uint8_t*>(fixed.data());
             return Minimiser(relax_settings(steps, force_tolerance, max_step, memory, first_curvature), start,
                              confinement_of(box));
           }),
           py::arg("positions"), py::arg("fixed"), py::kw_only(), py::arg("steps") = 100,
           py::arg("force_tolerance") = 0.05, py::arg("max_step") = 0.2, py::arg("memory") = 10,
           py::arg("first_curvature") = 70.0, py::arg("box") = py::none())
      .def_property_readonly("done", &Minimiser::done)
      .def_property_readonly("converged", &Minimiser::converged)
      .def_property_readonly("evaluations", &Minimiser::evaluations)
      .def_property_readonly("positions", [](const Minimiser& self) { return rows_of_three(self.positions()); })
      .def_property_readonly("best_energy", &Minimiser::best_energy)
      .def_property_readonly("best_positions",
                             [](const Minimiser& self) { return rows_of_three(self.best_positions()); })
      .def_property_readonly("best_forces", [](const Minimiser& self) { return rows_of_three(self.best_forces()); })
      .def(
          "tell",
          [](Minimiser& self, double energy, const Array<double>& forces) {
            expect_shape(forces, "forces", {static_cast<py::ssize_t>(self.positions().size() / 3), 3});
            self.tell(energy, forces.data());
          },
          py::arg("energy"), py::arg("forces"),
          "Energy [eV] and forces (n, 3) [eV/angstrom] at `positions`; moves `positions` on unless done.");
}

}  // namespace thalweg::bindings
