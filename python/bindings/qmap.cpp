#include "thalweg/qmap.hpp"

#include <pybind11/stl.h>

#include "common.hpp"

namespace thalweg::bindings {
namespace {

using Floats = Array<float>;

std::shared_ptr<QNetwork> network(const std::vector<Floats>& weights, const std::vector<Floats>& biases,
                                  const std::vector<std::int32_t>& dilations, const py::object& representation,
                                  const py::object& representation_bias) {
  if (weights.empty() || biases.size() != weights.size() || dilations.size() != weights.size())
    throw Error("weights, biases and dilations must have one entry per layer, but they have " +
                std::to_string(weights.size()) + ", " + std::to_string(biases.size()) + " and " +
                std::to_string(dilations.size()));
  const py::ssize_t rank = weights[0].ndim();
  if (rank != 4 && rank != 5)
    throw Error("weights must have shape (outputs, inputs, k, k) or (outputs, inputs, k, k, k), but one has " +
                std::to_string(rank) + " axes");
  // The edge of an array of equal edges from axis 2 on.
  const auto edge = [rank](const Floats& a, const char* name) {
    for (py::ssize_t k = 2; k < rank; ++k)
      if (a.ndim() != rank || a.shape(k) != a.shape(2))
        throw Error(std::string(name) + " must have " + std::to_string(rank) +
                    " axes, all from the third on equally long");
    return static_cast<std::int32_t>(a.shape(2));
  };
  std::vector<QLayer> layers;
  for (std::size_t l = 0; l < weights.size(); ++l) {
    QLayer layer;
    layer.kernel = edge(weights[l], "every array of weights");
    layer.outputs = static_cast<std::int32_t>(weights[l].shape(0));
    layer.inputs = static_cast<std::int32_t>(weights[l].shape(1));
    layer.dilation = dilations[l];
    expect_shape(biases[l], "every array of biases", {weights[l].shape(0)});
    layer.weights.assign(weights[l].data(), weights[l].data() + weights[l].size());
    layer.bias.assign(biases[l].data(), biases[l].data() + biases[l].size());
    layers.push_back(std::move(layer));
  }
  QRepresentation r;
  if (representation.is_none()) {
    if (layers[0].inputs > 1024)
      throw Error("weights of the first layer have " + std::to_string(layers[0].inputs) +
                  " inputs; expected at most 1024");
    r = QRepresentation::one_hot(layers[0].inputs);
  } else {
    const auto kernel = representation.cast<Floats>();
    r.width = edge(kernel, "representation");
    r.channels = static_cast<std::int32_t>(kernel.shape(0));
    r.species = static_cast<std::int32_t>(kernel.shape(1));
    r.kernel.assign(kernel.data(), kernel.data() + kernel.size());
    r.bias.assign(static_cast<std::size_t>(r.channels), 0.0f);
  }
  if (!representation_bias.is_none()) {
    const auto bias = representation_bias.cast<Floats>();
    expect_shape(bias, "representation_bias", {r.channels});
    r.bias.assign(bias.data(), bias.data() + bias.size());
  }
  return std::make_shared<QNetwork>(static_cast<std::int32_t>(rank - 2), std::move(layers), std::move(r));
}

std::vector<Placed> placed(const Array<std::int32_t>& species, const Array<std::int64_t>& voxels) {
  expect_shape(species, "species", {-1});
  expect_shape(voxels, "voxels", {species.shape(0)});
  std::vector<Placed> out;
  for (py::ssize_t k = 0; k < species.size(); ++k) out.push_back({species.data()[k], voxels.data()[k]});
  return out;
}

// Q as an array of leading axes and the grid's.
py::array_t<float> shaped(const QMap& map, const std::vector<float>& q, std::vector<py::ssize_t> leading) {
  leading.insert(leading.end(), map.shape().begin(), map.shape().end());
  py::array_t<float> out(leading);
  std::copy(q.begin(), q.end(), out.mutable_data());
  return out;
}

constexpr struct {
  const char* name;
  QMethod method;
} kMethods[] = {{"automatic", QMethod::automatic},
                {"direct", QMethod::direct},
                {"local_fft", QMethod::local_fft},
                {"grid_fft", QMethod::grid_fft}};

QMethod method_of(const std::string& name) {
  for (const auto& m : kMethods)
    if (name == m.name) return m.method;
  throw Error("method must be 'automatic', 'direct', 'local_fft' or 'grid_fft', but it is '" + name + "'");
}

const char* name_of(QMethod method) {
  for (const auto& m : kMethods)
    if (method == m.method) return m.name;
  return "";
}

// A state and its map, for the shape of what it gives.
struct StateOnMap {
  std::shared_ptr<const QMap> map;
  QState state;
};

}  // namespace

void bind_qmap(py::module_& m) {
  m.def(
      "q_weight_count",
      [](std::int32_t dimension, const std::vector<std::int32_t>& channels, const std::vector<std::int32_t>& kernels) {
        return q_weight_count(dimension, channels, kernels);
      },
      py::arg("dimension"), py::arg("channels"), py::arg("kernels"),
      "Weights and biases of a network with these channels (n + 1) and kernel edges (n).");
  m.def(
      "q_receptive_radius",
      [](const std::vector<std::int32_t>& kernels, const std::vector<std::int32_t>& dilations) {
        return q_receptive_radius(kernels, dilations);
      },
      py::arg("kernels"), py::arg("dilations"),
      "Voxels from an input to the farthest output that it changes: sum of (k - 1) / 2 times dilation.");

  py::class_<QNetwork, std::shared_ptr<QNetwork>>(m, "QNetwork",
                                                  R"(Convolutional network of an ASLA agent; immutable.

weights: per layer (outputs, inputs, k, k[, k]) float32, PyTorch's order; biases: per layer (outputs,). Leaky ReLU of slope
0.01 behind every layer but the last, tanh behind the last. representation: (channels, species, w, w[, w]), what an atom of
a species adds to the input around its voxel (None: one-hot); representation_bias: (channels,), added everywhere.)")
      .def(py::init(&network), py::arg("weights"), py::arg("biases"), py::kw_only(), py::arg("dilations"),
           py::arg("representation") = py::none(), py::arg("representation_bias") = py::none())
      .def_property_readonly("dimension", &QNetwork::dimension)
      .def_property_readonly("species", &QNetwork::species)
      .def_property_readonly("weight_count", &QNetwork::weight_count)
      .def_property_readonly("receptive_radius", &QNetwork::receptive_radius);

  py::class_<QMap, std::shared_ptr<QMap>>(
      m, "QMap",
      R"(A network on a grid: the value Q of placing one more atom, for every species and voxel.

shape, periodic: one entry per direction; open directions are padded with zeros at every layer. Voxels are numbered as
NumPy's flat index does. Make a new map after a weight update: tables are made when first needed.)")
      .def(py::init([](std::shared_ptr<const QNetwork> net, const std::vector<std::int64_t>& shape,
                       const std::vector<bool>& periodic) {
             const std::vector<std::uint8_t> flags(periodic.begin(), periodic.end());
             return std::make_shared<QMap>(std::move(net), shape, flags);
           }),
           py::arg("network"), py::arg("shape"), py::arg("periodic"))
      .def_property_readonly(
          "shape",
          [](const QMap& self) {
            return py::tuple(py::cast(std::vector<std::int64_t>(self.shape().begin(), self.shape().end())));
          })
      .def_property_readonly("voxels", &QMap::voxels)
      .def(
          "dense",
          [](const QMap& self, const Array<std::int32_t>& species, const Array<std::int64_t>& voxels) {
            const std::vector<Placed> atoms = placed(species, voxels);
            std::vector<float> q;
            {
              py::gil_scoped_release release;
              q = self.dense(atoms);
            }
            return shaped(self, q, {self.network().species()});
          },
          py::arg("species"), py::arg("voxels"),
          "Q (species, *shape) with atoms `species` (n,) placed at `voxels` (n,), by plain sums: the reference.")
      .def(
          "batch",
          [](const QMap& self, const Array<std::int64_t>& offsets, const Array<std::int32_t>& species,
             const Array<std::int64_t>& voxels, int threads) {
            expect_shape(offsets, "offsets", {-1});
            check_threads(threads);
            const std::vector<Placed> atoms = placed(species, voxels);
            std::vector<float> q;
            {
              py::gil_scoped_release release;
              q = self.batch(span(offsets), atoms, threads);
            }
            return shaped(self, q, {offsets.size() - 1, self.network().species()});
          },
          py::arg("offsets"), py::arg("species"), py::arg("voxels"), py::kw_only(), py::arg("threads") = 0,
          R"(Q (n, species, *shape) of n states; state i has placed atoms offsets[i] .. offsets[i + 1] - 1.

The bits of a state depend neither on threads nor on the other states.)")
      .def(
          "choose", [](const QMap& self, std::int64_t asked) { return name_of(self.choose(asked)); }, py::arg("asked"),
          "The method that 'automatic' stands for when Q is asked for at about `asked` voxels after each atom.");

  py::class_<QDelta>(m, "QDelta", "What placing one atom changes; bound to the atoms placed before it.")
      .def_property_readonly("species", [](const QDelta& self) { return self.placed().species; })
      .def_property_readonly("voxel", [](const QDelta& self) { return self.placed().voxel; })
      .def_property_readonly("nbytes", &QDelta::bytes);

  py::class_<StateOnMap>(m, "QState",
                         R"(Atoms placed one by one on a map, and Q after each; not for use by two threads at once.

method: 'automatic' (a cost model chooses), 'direct', 'local_fft' (both update the changed boxes) or 'grid_fft' (transforms
the whole grid when Q is asked for).)")
      .def(py::init([](std::shared_ptr<const QMap> map, const std::string& method) {
             const QMethod wanted = method_of(method);
             py::gil_scoped_release release;
             return std::make_unique<StateOnMap>(StateOnMap{map, QState(map, wanted)});
           }),
           py::arg("map"), py::arg("method") = "automatic")
      .def_property_readonly("method", [](const StateOnMap& self) { return name_of(self.state.method()); })
      .def_property_readonly("species",
                             [](const StateOnMap& self) {
                               std::vector<std::int32_t> out;
                               for (const Placed& atom : self.state.placed()) out.push_back(atom.species);
                               return py::array_t<std::int32_t>(static_cast<py::ssize_t>(out.size()), out.data());
                             })
      .def_property_readonly("voxels",
                             [](const StateOnMap& self) {
                               std::vector<std::int64_t> out;
                               for (const Placed& atom : self.state.placed()) out.push_back(atom.voxel);
                               return py::array_t<std::int64_t>(static_cast<py::ssize_t>(out.size()), out.data());
                             })
      .def(
          "place", [](StateOnMap& self, std::int32_t species, std::int64_t voxel) { self.state.place(species, voxel); },
          py::arg("species"), py::arg("voxel"), py::call_guard<py::gil_scoped_release>(),
          "Raises ConfigurationError for a species or voxel that does not exist.")
      .def(
          "undo", [](StateOnMap& self) { self.state.undo(); }, "Takes the last atom back, exactly.")
      .def(
          "retract", [](StateOnMap& self) { return self.state.retract(); },
          "undo(), but returns the change, for apply().")
      .def(
          "expand",
          [](StateOnMap& self, std::int32_t species, std::int64_t voxel) { return self.state.expand(species, voxel); },
          py::arg("species"), py::arg("voxel"), py::call_guard<py::gil_scoped_release>(),
          "The change that placing an atom would make, for apply().")
      .def(
          "apply", [](StateOnMap& self, const QDelta& delta) { self.state.apply(delta); }, py::arg("delta"),
          "Places the atom of a change that expand() or retract() gave for the atoms placed now; no arithmetic.")
      .def(
          "q",
          [](StateOnMap& self, const py::object& voxels) -> py::array_t<float> {
            if (voxels.is_none()) {
              std::vector<float> q;
              {
                py::gil_scoped_release release;
                q = self.state.q();
              }
              return shaped(*self.map, q, {self.map->network().species()});
            }
            const auto asked = voxels.cast<Array<std::int64_t>>();
            expect_shape(asked, "voxels", {-1});
            py::array_t<float> out({py::ssize_t{self.map->network().species()}, asked.size()});
            const std::span<float> values = span_mut(out);
            const std::span<const std::int64_t> list = span(asked);
            py::gil_scoped_release release;
            self.state.q(list, values);
            return out;
          },
          py::arg("voxels") = py::none(), "Q (species, n) at n voxels, or (species, *shape) everywhere.");
}

}  // namespace thalweg::bindings
