#include "thalweg/build.hpp"

#include "boxes.hpp"

namespace thalweg::bindings {
namespace {

Key key_of(const py::object& key) {
  if (!py::isinstance<py::sequence>(key) || py::len(key) != 2)
    throw Error("key must be two 64-bit whole numbers (low, high), but it is " + py::repr(key).cast<std::string>());
  const py::sequence parts(key);
  return {parts[0].cast<std::uint64_t>(), parts[1].cast<std::uint64_t>()};
}

BuildSettings build_settings(const py::object& box, double c1, double c2, int tries_per_atom, int tries_per_structure) {
  BuildSettings settings;
  settings.c1 = c1;
  settings.c2 = c2;
  settings.tries_per_atom = tries_per_atom;
  settings.tries_per_structure = tries_per_structure;
  settings.box = confinement_of(box);
  return settings;
}

// `ok` next to positions of the given leading shape.
py::tuple arrays(const BuildResult& result, std::vector<py::ssize_t> shape) {
  shape.push_back(3);
  py::array_t<double> positions(shape);
  std::copy(result.positions.begin(), result.positions.end(), positions.mutable_data());
  return py::make_tuple(positions, flags(result.ok));
}

}  // namespace

void bind_build(py::module_& m) {
  m.def(
      "random_structures",
      [](const Array<std::int32_t>& numbers, const Array<double>& cell, const Array<bool>& pbc,
         const Array<double>& template_positions, const Array<std::int32_t>& template_numbers, const py::object& box,
         py::ssize_t count, const py::object& key, std::uint64_t first_row, double c1, double c2, int tries_per_atom,
         int tries_per_structure, int threads) {
        expect_shape(numbers, "numbers", {-1});
        expect_shape(cell, "cell", {3, 3});
        expect_shape(pbc, "pbc", {3});
        expect_shape(template_numbers, "template_numbers", {-1});
        expect_shape(template_positions, "template_positions", {template_numbers.shape(0), 3});
        check_threads(threads);
        if (count < 0) throw Error("count must be at least 0, but it is " + std::to_string(count));
        constexpr py::ssize_t most = 100'000'000;  // atoms in all: 2.4 GB of positions
        if (count > most / std::max<py::ssize_t>(1, template_numbers.size() + numbers.size()))
          throw Error("structures of at most " + std::to_string(most) +
                      " atoms in all can be made at once, but count is " + std::to_string(count));
        StructureView frame;
        frame.n = static_cast<std::size_t>(template_numbers.shape(0));
        frame.positions = template_positions.data();
        frame.numbers = template_numbers.data();
        frame.cell = cell.data();
        frame.pbc = reinterpret_cast<const std::uint8_t*>(pbc.data());
        const BuildSettings settings = build_settings(box, c1, c2, tries_per_atom, tries_per_structure);
        const Key stream = key_of(key);
        BuildResult result;
        {
          py::gil_scoped_release release;
          result = random_structures(frame, span(numbers), settings, static_cast<std::size_t>(count), stream, first_row,
                                     threads);
        }
        return arrays(result, {count, template_numbers.shape(0) + numbers.shape(0)});
      },
      py::arg("numbers"), py::arg("cell"), py::arg("pbc"), py::arg("template_positions"), py::arg("template_numbers"),
      py::kw_only(), py::arg("box"), py::arg("count"), py::arg("key"), py::arg("first_row") = 0, py::arg("c1") = 0.75,
      py::arg("c2") = 1.25, py::arg("tries_per_atom") = 100, py::arg("tries_per_structure") = 20,
      py::arg("threads") = 0,
      R"(Random connected structures: atoms `numbers` (k,) placed in a box, on a template that may have no atoms.

Each atom goes next to a random atom present: uniform direction, distance uniform in volume between c1 and c2 times the
sum of covalent radii, inside the box, no atom or image closer than c1. box: (corner (3,), vectors (3, 3), open (3,)) in
angstrom; key: (low, high) of the random stream, row i of the result draws from row first_row + i of it whatever count
and threads are. Returns positions (count, t + k, 3), template first, and ok (count,) bool; rows that failed hold the
template and the box's centre. Raises ConfigurationError if the box or cell is too small or the template overlaps itself.)");

  m.def(
      "rattle",
      [](const py::object& batch, const py::object& box, double amplitude, double moved, const py::object& key,
         std::uint64_t first_row, double c1, double c2, int tries_per_atom, int tries_per_structure, int threads) {
        check_threads(threads);
        const BatchArrays parents(batch);
        const BuildSettings settings = build_settings(box, c1, c2, tries_per_atom, tries_per_structure);
        const Key stream = key_of(key);
        BuildResult result;
        {
          py::gil_scoped_release release;
          result = rattle(parents.view(), settings, amplitude, moved, stream, first_row, threads);
        }
        return arrays(result, {static_cast<py::ssize_t>(parents.view().atoms())});
      },
      py::arg("batch"), py::kw_only(), py::arg("box"), py::arg("amplitude") = 3.0, py::arg("moved") = 3.0,
      py::arg("key"), py::arg("first_row") = 0, py::arg("c1") = 0.75, py::arg("c2") = 1.25,
      py::arg("tries_per_atom") = 100, py::arg("tries_per_structure") = 20, py::arg("threads") = 0,
      R"(Move some free atoms of every parent by vectors uniform in a ball of radius `amplitude` [angstrom].

Each of a parent's n free atoms moves with probability moved / n (at least one), into the box, no atom closer than c1,
one within c2 (units of the sum of covalent radii). Returns positions (m, 3) and ok (n,) bool; rows that failed hold the
parent. Raises ConfigurationError without a box.)");

  m.def(
      "permute",
      [](const py::object& batch, double again, const py::object& key, std::uint64_t first_row, int threads) {
        check_threads(threads);
        const BatchArrays parents(batch);
        const Key stream = key_of(key);
        BuildResult result;
        {
          py::gil_scoped_release release;
          result = permute(parents.view(), again, stream, first_row, threads);
        }
        return arrays(result, {static_cast<py::ssize_t>(parents.view().atoms())});
      },
      py::arg("batch"), py::kw_only(), py::arg("again") = 0.3, py::arg("key"), py::arg("first_row") = 0,
      py::arg("threads") = 0,
      R"(Swap positions of random pairs of free atoms of different species in every parent.

One swap, and each further one with probability `again`. Returns positions (m, 3) and ok (n,) bool: False where no such
pair exists.)");

  m.def(
      "closest_contacts",
      [](const py::object& batch, int threads) {
        check_threads(threads);
        const BatchArrays arrays_of(batch);
        std::vector<double> out;
        {
          py::gil_scoped_release release;
          out = closest_contacts(arrays_of.view(), threads);
        }
        return py::array_t<double>(static_cast<py::ssize_t>(out.size()), out.data());
      },
      py::arg("batch"), py::kw_only(), py::arg("threads") = 0,
      R"(Smallest distance over the sum of covalent radii of every structure (n,), images included.

Pairs of atoms that are both fixed in all coordinates do not count; infinity where no pair is left.)");

  m.def(
      "fragments",
      [](const py::object& batch, double c2, int threads) {
        check_threads(threads);
        const BatchArrays arrays_of(batch);
        std::vector<std::int32_t> out;
        {
          py::gil_scoped_release release;
          out = fragments(arrays_of.view(), c2, threads);
        }
        return py::array_t<std::int32_t>(static_cast<py::ssize_t>(out.size()), out.data());
      },
      py::arg("batch"), py::arg("c2") = 1.25, py::kw_only(), py::arg("threads") = 0,
      R"(Number of pieces of every structure (n,) that hang together by distances of at most c2 times the covalent sum.

Images included; atoms fixed in all coordinates count as one piece.)");
}

}  // namespace thalweg::bindings
