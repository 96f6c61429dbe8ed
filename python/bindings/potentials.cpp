#include "thalweg/potentials.hpp"

#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <mutex>
#include <utility>

#include "common.hpp"
#include "thalweg/neighbors.hpp"

namespace thalweg::bindings {
namespace {

PairPrior::Form prior_form(const std::string& name) {
  if (name == "bonding") return PairPrior::Form::bonding;
  if (name == "repulsive") return PairPrior::Form::repulsive;
  throw Error("form must be 'bonding' or 'repulsive', but it is '" + name + "'");
}

// A landscape whose numbers come from Python, one call per structure. Calls never overlap: what they share (an external
// program's state, say) need not bear threads. Whoever waits for `turn` must not hold the GIL, or the one who has it
// could never go on; all bindings that evaluate landscapes let go of the GIL first.
struct PythonFunction {
  explicit PythonFunction(py::function f) : function(std::move(f)) {}
  PythonFunction(const PythonFunction&) = delete;
  PythonFunction& operator=(const PythonFunction&) = delete;
  ~PythonFunction() {
    const py::gil_scoped_acquire acquire;
    function = py::function();
  }
  py::function function;
  std::recursive_mutex turn;
};

class PythonLandscape : public Landscape {
 public:
  PythonLandscape(py::function function, std::string text)
      : function_(std::make_shared<PythonFunction>(std::move(function))), text_(std::move(text)) {}
  const std::string& text() const { return text_; }
  std::unique_ptr<Evaluator> evaluator(const BatchView& batch, ForcesOn on = ForcesOn::all) const override;

 private:
  friend class PythonEvaluator;
  std::shared_ptr<PythonFunction> function_;
  std::string text_;
};

class PythonEvaluator : public Evaluator {
 public:
  PythonEvaluator(std::shared_ptr<PythonFunction> function, const BatchView& batch)
      : function_(std::move(function)), batch_(batch) {}

  void evaluate(std::span<const std::int64_t> rows, const double* positions, double* energies,
                double* forces) override {
    for (const std::int64_t at : rows) {
      const std::size_t row = static_cast<std::size_t>(at), first = static_cast<std::size_t>(batch_.offsets[row]);
      const StructureView structure = batch_[row];
      const std::lock_guard<std::recursive_mutex> lock(function_->turn);
      const py::gil_scoped_acquire acquire;
      energies[row] = std::numeric_limits<double>::quiet_NaN();
      std::fill_n(forces + 3 * first, 3 * structure.n, energies[row]);
      const auto n = static_cast<py::ssize_t>(structure.n);
      py::array_t<bool> pbc(py::ssize_t{3});
      for (py::ssize_t k = 0; k < 3; ++k) pbc.mutable_at(k) = structure.pbc[k] != 0;
      try {
        const py::tuple result =
            function_->function(py::array_t<std::int32_t>(n, structure.numbers),
                                py::array_t<double>({n, py::ssize_t{3}}, positions + 3 * first),
                                py::array_t<double>({py::ssize_t{3}, py::ssize_t{3}}, structure.cell), pbc);
        const double energy = result[0].cast<double>();
        const auto found = result[1].cast<Array<double>>();
        expect_shape(found, "forces", {n, 3});
        if (!std::isfinite(energy)) continue;
        energies[row] = energy;
        std::copy_n(found.data(), 3 * structure.n, forces + 3 * first);
      } catch (py::error_already_set& error) {
        // A structure that fails fails by itself; the user's wish to stop is no such failure.
        if (!error.matches(PyExc_Exception)) throw;
      }
    }
  }

 private:
  std::shared_ptr<PythonFunction> function_;
  BatchView batch_;
};

std::unique_ptr<Evaluator> PythonLandscape::evaluator(const BatchView& batch, ForcesOn) const {
  batch.check();
  return std::make_unique<PythonEvaluator>(function_, batch);
}

py::tuple evaluate_batch(const Landscape& landscape, const py::object& batch, int threads) {
  check_threads(threads);
  const BatchArrays arrays(batch);
  py::array_t<double> energies(static_cast<py::ssize_t>(arrays.view().size()));
  py::array_t<double> forces({static_cast<py::ssize_t>(arrays.view().atoms()), py::ssize_t{3}});
  const std::span<double> e = span_mut(energies), f = span_mut(forces);
  {
    py::gil_scoped_release release;
    evaluate(landscape, arrays.view(), e, f, threads);
  }
  return py::make_tuple(std::move(energies), std::move(forces));
}

// {(number, number): (depth, r0, stiffness, ratio)}
using PairTable = std::map<std::pair<std::int32_t, std::int32_t>, std::array<double, 4>>;

// As tuples: std::array would become a list.
py::dict pair_dict(const ManyBodyPrior& prior) {
  py::dict table;
  for (const ManyBodyPrior::Pair& pair : prior.pairs())
    table[py::make_tuple(pair.first, pair.second)] = py::make_tuple(pair.depth, pair.r0, pair.stiffness, pair.ratio);
  return table;
}

// {(number, number): (ss, sp, pp sigma, pp pi, r0, stiffness, repulsion, ratio)} and {number: (s, p)}
using BondTable = std::map<std::pair<std::int32_t, std::int32_t>, std::array<double, 8>>;
using LevelTable = std::map<std::int32_t, std::array<double, 2>>;

py::dict bond_dict(const TightBinding& prior) {
  py::dict table;
  for (const TightBinding::Pair& pair : prior.pairs()) {
    const auto& [ss, sp, sigma, pi] = pair.couplings;
    table[py::make_tuple(pair.first, pair.second)] =
        py::make_tuple(ss, sp, sigma, pi, pair.r0, pair.stiffness, pair.repulsion, pair.ratio);
  }
  return table;
}

py::dict level_dict(const TightBinding& prior) {
  py::dict table;
  for (const TightBinding::Atom& atom : prior.atoms()) table[py::int_(atom.number)] = py::make_tuple(atom.s, atom.p);
  return table;
}

py::dict exponent_dict(const ManyBodyPrior& prior) {
  py::dict table;
  for (const ManyBodyPrior::Atom& atom : prior.atoms()) table[py::int_(atom.number)] = atom.exponent;
  return table;
}

// {(number, number, number): m, gamma, lambda3, c, d, h, n, beta, lambda2, B, R, D, lambda1, A}, as in LAMMPS' files
using TersoffTable = std::map<std::array<std::int32_t, 3>, std::array<double, 14>>;

py::dict tersoff_table(const std::vector<Tersoff::Entry>& entries) {
  py::dict table;
  for (const Tersoff::Entry& e : entries)
    table[py::make_tuple(e.first, e.second, e.third)] =
        py::make_tuple(e.m, e.gamma, e.lambda3, e.c, e.d, e.h, e.n, e.beta, e.lambda2, e.B, e.R, e.D, e.lambda1, e.A);
  return table;
}

std::vector<Tersoff::Entry> entries_of(const TersoffTable& table) {
  std::vector<Tersoff::Entry> entries;
  for (const auto& [species, v] : table)
    entries.push_back({species[0], species[1], species[2], v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9],
                       v[10], v[11], v[12], v[13]});
  return entries;
}

py::tuple pairs_of(NeighborList& list, const py::object& batch) {
  const BatchArrays arrays(batch);
  if (arrays.view().size() != 1)
    throw Error("neighbours are found in a batch of one structure, but it holds " +
                std::to_string(arrays.view().size()));
  list.update(arrays.view()[0]);
  const auto n = static_cast<py::ssize_t>(list.size());
  return py::make_tuple(py::array_t<std::int32_t>(n, list.i()), py::array_t<std::int32_t>(n, list.j()),
                        py::array_t<double>({n, py::ssize_t{3}}, list.d()), py::array_t<double>(n, list.r()));
}

py::tuple neighbor_pairs(const py::object& batch, double cutoff) {
  NeighborList list(cutoff, 0.0);
  return pairs_of(list, batch);
}

}  // namespace

void bind_potentials(py::module_& m) {
  py::class_<Landscape, std::shared_ptr<Landscape>>(
      m, "Landscape", "Anything that gives structures energies [eV] and forces [eV/angstrom, -dE/dx].");

  py::class_<Emt, Landscape, std::shared_ptr<Emt>>(m, "Emt",
                                                   "Effective medium theory (Jacobsen, Stoltze, Norskov 1996); values "
                                                   "of ASE's EMT() for Al, Cu, Ag, Au, Ni, Pd, Pt, "
                                                   "H, C, N and O.")
      .def(py::init<>())
      .def("__repr__", [](const Emt&) { return "Emt()"; });

  py::class_<SmoothCarbon, Landscape, std::shared_ptr<SmoothCarbon>>(
      m, "SmoothCarbon",
      "A smooth model of carbon: Morse wells and an angle term, both switched to zero between inner and outer.")
      .def(py::init([](double depth, double stiffness, double r0, double angle, double inner, double outer) {
             return std::make_shared<SmoothCarbon>(SmoothCarbon::Settings{depth, stiffness, r0, angle, inner, outer});
           }),
           py::kw_only(), py::arg("depth") = 3.0, py::arg("stiffness") = 2.0, py::arg("r0") = 1.45,
           py::arg("angle") = 2.0, py::arg("inner") = 1.8, py::arg("outer") = 2.5);
  py::class_<LennardJones, Landscape, std::shared_ptr<LennardJones>>(
      m, "LennardJones",
      "Lennard-Jones, all species alike; values of ASE's calculator. sigma, rc, ro in angstrom, epsilon in eV; rc = 0: "
      "3 sigma, ro = 0: 0.66 rc.")
      .def(py::init([](double sigma, double epsilon, double rc, double ro, bool smooth) {
             return std::make_shared<LennardJones>(LennardJones::Settings{sigma, epsilon, rc, ro, smooth});
           }),
           py::arg("sigma") = 1.0, py::arg("epsilon") = 1.0, py::kw_only(), py::arg("rc") = 0.0, py::arg("ro") = 0.0,
           py::arg("smooth") = false)
      .def("__repr__", [](const LennardJones& self) {
        const LennardJones::Settings& s = self.settings();
        return py::str("LennardJones(sigma={}, epsilon={}, rc={}, ro={}, smooth={})")
            .format(s.sigma, s.epsilon, s.rc, s.ro, s.smooth);
      });

  py::class_<Tersoff, Landscape, std::shared_ptr<Tersoff>>(
      m, "Tersoff",
      "Tersoff's bond-order potential: {(number, number, number): (m, gamma, lambda3, c, d, h, n, beta, lambda2, B, R, "
      "D, lambda1, A)} as in LAMMPS' files, or the name of a published set; eV, angstrom.")
      .def(py::init([](const TersoffTable& entries) { return std::make_shared<Tersoff>(entries_of(entries)); }),
           py::arg("entries"))
      .def(py::init([](const std::string& name) { return std::make_shared<Tersoff>(Tersoff::published(name)); }),
           py::arg("name"))
      .def_property_readonly(
          "entries", [](const Tersoff& self) { return tersoff_table(self.entries()); },
          "{(number, number, number): (m, gamma, lambda3, c, d, h, n, beta, lambda2, B, R, D, lambda1, A)}, in rising "
          "order.")
      .def_static("names", &Tersoff::names, "Names of the published sets.")
      // A store compares these texts to tell whether it was written by the same search.
      .def("__repr__",
           [](const Tersoff& self) { return "Tersoff(" + std::string(py::str(tersoff_table(self.entries()))) + ")"; });

  py::class_<PairPrior, Landscape, std::shared_ptr<PairPrior>>(
      m, "PairPrior",
      "Pair potential from covalent radii alone. form: 'bonding' (Morse wells at the sum of radii: depth [eV], "
      "stiffness "
      "[1/r0]) or 'repulsive' (1 / (r + 1 - r_min)^12, r_min = repulsive_factor times the sum of radii). cutoff "
      "[angstrom] = 0: 2.5 times the sum of radii of each pair (bonding), 3 (repulsive).")
      .def(py::init([](const std::string& form, double depth, double stiffness, double radius_scale, double cutoff,
                       double repulsive_factor, bool sharp_cutoff) {
             return std::make_shared<PairPrior>(PairPrior::Settings{prior_form(form), depth, stiffness, radius_scale,
                                                                    cutoff, repulsive_factor, sharp_cutoff});
           }),
           py::arg("form") = "bonding", py::kw_only(), py::arg("depth") = 0.8, py::arg("stiffness") = 4.0,
           py::arg("radius_scale") = 1.0, py::arg("cutoff") = 0.0, py::arg("repulsive_factor") = 0.7,
           py::arg("sharp_cutoff") = false)
      // A store compares these texts to tell whether it was written by the same search.
      .def("__repr__", [](const PairPrior& self) {
        const PairPrior::Settings& s = self.settings();
        return py::str(
                   "PairPrior('{}', depth={}, stiffness={}, radius_scale={}, cutoff={}, repulsive_factor={}, "
                   "sharp_cutoff={})")
            .format(s.form == PairPrior::Form::bonding ? "bonding" : "repulsive", s.depth, s.stiffness, s.radius_scale,
                    s.cutoff, s.repulsive_factor, s.sharp_cutoff);
      });

  py::class_<ManyBodyPrior, Landscape, std::shared_ptr<ManyBodyPrior>>(
      m, "ManyBodyPrior",
      "Wells with numbers of their own for every pair of species, {(number, number): (depth [eV], r0 [angstrom], "
      "stiffness = q, ratio = p / q)}, and an exponent for every species, {number: g}: 1 gives pair wells (Morse wells "
      "with ratio 2), 1/2 the second-moment form of metals (Cleri, Rosato, PRB 48, 22 (1993)); potentials.hpp has the "
      "formula.")
      .def(py::init([](const PairTable& pairs, const std::map<std::int32_t, double>& exponents) {
             std::vector<ManyBodyPrior::Pair> list;
             for (const auto& [species, numbers] : pairs)
               list.push_back({species.first, species.second, numbers[0], numbers[1], numbers[2], numbers[3]});
             std::vector<ManyBodyPrior::Atom> atoms;
             for (const auto& [number, exponent] : exponents) atoms.push_back({number, exponent});
             return std::make_shared<ManyBodyPrior>(std::move(list), std::move(atoms));
           }),
           py::arg("pairs"), py::arg("exponents"))
      .def_property_readonly("pairs", &pair_dict, "{(number, number): (depth, r0, stiffness, ratio)}, in rising order.")
      .def_property_readonly("exponents", &exponent_dict, "{number: exponent}, in rising order.")
      // A store compares these texts to tell whether it was written by the same search.
      .def("__repr__", [](const ManyBodyPrior& self) {
        return "ManyBodyPrior(" + std::string(py::str(py::repr(pair_dict(self)))) + ", " +
               std::string(py::str(py::repr(exponent_dict(self)))) + ")";
      });

  py::class_<TightBinding, Landscape, std::shared_ptr<TightBinding>>(
      m, "TightBinding",
      "Tight binding of the valence electrons of free molecules: {(number, number): (couplings ss, sp, pp sigma, pp pi "
      "[eV] at r0, r0 [angstrom], stiffness = q, repulsion [eV], ratio = p / q)} for every pair of species, and levels "
      "{number: (s, p)} [eV] for every species; potentials.hpp has the formula.")
      .def(py::init([](const BondTable& pairs, const LevelTable& levels) {
             std::vector<TightBinding::Pair> list;
             for (const auto& [species, v] : pairs)
               list.push_back({species.first, species.second, {v[0], v[1], v[2], v[3]}, v[4], v[5], v[6], v[7]});
             std::vector<TightBinding::Atom> atoms;
             for (const auto& [number, level] : levels) atoms.push_back({number, level[0], level[1]});
             return std::make_shared<TightBinding>(std::move(list), std::move(atoms));
           }),
           py::arg("pairs"), py::arg("levels"))
      .def_property_readonly("pairs", &bond_dict, "As given, in rising order.")
      .def_property_readonly("levels", &level_dict, "{number: (s, p)} [eV], in rising order.")
      .def_static(
          "free_atom",
          [](std::int32_t number) {
            const TightBinding::Atom atom = TightBinding::free_atom(number);
            return py::make_tuple(atom.s, atom.p);
          },
          py::arg("number"), "Levels (s, p) [eV] of a free atom; an error for an element that is not covered.")
      .def_static("elements", &TightBinding::elements, "Atomic numbers that `free_atom` covers.")
      .def("__repr__", [](const TightBinding& self) {
        return "TightBinding(" + std::string(py::str(py::repr(bond_dict(self)))) + ", " +
               std::string(py::str(py::repr(level_dict(self)))) + ")";
      });

  py::class_<Tilted, Landscape, std::shared_ptr<Tilted>>(
      m, "Tilted",
      "Another landscape plus a linear function of the positions, shift . x, for batches of as many atoms as shift (m, "
      "3) [eV/angstrom] has rows: makes the forces of a surrogate right at one point.")
      .def(py::init([](std::shared_ptr<const Landscape> landscape, const Array<double>& shift) {
             expect_shape(shift, "shift", {-1, 3});
             const std::span<const double> values = span(shift);
             return std::make_shared<Tilted>(std::move(landscape), std::vector<double>(values.begin(), values.end()));
           }),
           py::arg("landscape"), py::arg("shift"));

  py::class_<PythonLandscape, Landscape, std::shared_ptr<PythonLandscape>>(
      m, "PythonLandscape",
      "A landscape whose numbers come from function(numbers (n,), positions (n, 3), cell (3, 3), pbc (3,)) -> (energy "
      "[eV], forces (n, 3) [eV/angstrom]), called for one structure at a time whatever the number of threads; what "
      "raises or is not finite gives NaN for that structure alone. text: its repr.")
      .def(py::init<py::function, std::string>(), py::arg("function"), py::arg("text") = "PythonLandscape()")
      .def("__repr__", &PythonLandscape::text);

  py::class_<NeighborList>(m, "NeighborList",
                           "Pairs of one structure that moves: they are looked for anew only when an atom has moved by "
                           "more than skin / 2 [angstrom], or atoms, cell or pbc have changed.")
      .def(py::init<double, double>(), py::arg("cutoff"), py::arg("skin") = 0.5)
      .def("update", &pairs_of, py::arg("batch"), "What `neighbor_pairs` gives, in new arrays.")
      .def_property_readonly("rebuilds", &NeighborList::rebuilds, "How often pairs were looked for anew.");
  m.def("evaluate", &evaluate_batch, py::arg("landscape"), py::arg("batch"), py::kw_only(), py::arg("threads") = 0,
        "Energies (n,) [eV] and forces (m, 3) [eV/angstrom] of a batch; threads = 0: default_threads(). The same bits "
        "for any number of threads.");
  m.def(
      "neighbor_pairs", &neighbor_pairs, py::arg("batch"), py::arg("cutoff"),
      "Every pair (i, j, image) of one structure within the cutoff [angstrom], once: i (p,), j (p,), d (p, 3) = r_j + "
      "image - r_i, r (p,).");
}

}  // namespace thalweg::bindings
