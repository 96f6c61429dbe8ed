// Twin of the incremental part of qmap.cpp, by sums over the changed boxes (QMethod::direct), for n states side by
// side: blockIdx.y is the state, a thread takes one output of one voxel. In device memory, layers from the first:
//
//   activations[l]  (n, voxels, outputs)  what is kept of each hidden layer
//   boxes           (layers, n)           [0]: what the atom changes of the input, [l]: of hidden layer l
//   change[l]       (n, most[l], outputs) by how much, in the box, but of the last hidden layer, which nobody asks for;
//                                         most: voxels of the largest box
//   saved[l]        (n, most[l], outputs) what the box held before: the change that undo() puts back
//   weights[l]      (taps, inputs, outputs)
//
// Every sum belongs to one thread and has a fixed order; a thread changes only what no other reads in that launch.
#include <algorithm>
#include <cmath>

#include "device.cuh"
#include "qmap_convolution.hpp"

namespace thalweg::cuda {
namespace {

using convolution::Three;

constexpr float kLeak = 0.01f, kUnleak = 100.0f;

struct GridView {
  std::int32_t n[3];
  bool periodic[3];
  /// Index in the box of a coordinate that may lie outside the grid; -1 if the box does not hold it.
  __device__ int index(const QBox& box, int axis, int u) const {
    int i = u - box.first[axis];
    if (periodic[axis]) i = (i % n[axis] + n[axis]) % n[axis];
    return i >= 0 && i < box.count[axis] ? i : -1;
  }
};

struct LayerView {
  std::int32_t inputs, outputs, kernel[3], dilation[3];
  const float *weights, *bias;
};

__device__ std::int64_t voxels_of(const QBox& box) {
  return std::int64_t{1} * box.count[0] * box.count[1] * box.count[2];
}

/// Coordinates of number k in a box.
__device__ void coordinates(const QBox& box, std::int64_t k, int* at) {
  const std::int64_t row = k / box.count[2];
  at[0] = box.first[0] + static_cast<int>(row / box.count[1]);
  at[1] = box.first[1] + static_cast<int>(row % box.count[1]);
  at[2] = box.first[2] + static_cast<int>(k % box.count[2]);
}

/// Sum over taps and inputs for output o at a voxel; `in` holds a box.
__device__ float convolve(const GridView& grid, const LayerView& layer, const QBox& box, const float* in, const int* at,
                          int o) {
  float sum = 0;
  const float* weights = layer.weights + o;
  const std::int64_t of_tap = std::int64_t{layer.inputs} * layer.outputs;
  for (int a = 0; a < layer.kernel[0]; ++a) {
    const int z = grid.index(box, 0, at[0] + (a - layer.kernel[0] / 2) * layer.dilation[0]);
    for (int b = 0; b < layer.kernel[1]; ++b) {
      const int y = grid.index(box, 1, at[1] + (b - layer.kernel[1] / 2) * layer.dilation[1]);
      for (int c = 0; c < layer.kernel[2]; ++c, weights += of_tap) {
        const int x = grid.index(box, 2, at[2] + (c - layer.kernel[2] / 2) * layer.dilation[2]);
        if (z < 0 || y < 0 || x < 0) continue;
        const float* from = in + ((std::int64_t{z} * box.count[1] + y) * box.count[2] + x) * layer.inputs;
        for (int i = 0; i < layer.inputs; ++i) sum += weights[std::int64_t{i} * layer.outputs] * from[i];
      }
    }
  }
  return sum;
}

__device__ float leaky(float x) { return x > 0 ? x : kLeak * x; }

/// A layer of one state everywhere.
__global__ void __launch_bounds__(kThreads)
    dense_layer(GridView grid, QBox all, LayerView layer, const float* in, float* out) {
  const auto item = static_cast<std::int64_t>(thread_index());
  if (item >= voxels_of(all) * layer.outputs) return;
  int at[3];
  coordinates(all, item / layer.outputs, at);
  const int o = static_cast<int>(item % layer.outputs);
  out[item] = leaky(layer.bias[o] + convolve(grid, layer, all, in, at, o));
}

/// What an atom adds to the input: its images of a width beyond a periodic grid fold.
__global__ void __launch_bounds__(kThreads)
    change_input(GridView grid, Three width, int channels, int species, const float* kernel, const QBox* boxes,
                 const std::int32_t* kinds, const std::int32_t* centers, std::int64_t most, float* change) {
  const unsigned state = blockIdx.y;
  const QBox box = boxes[state];
  const auto item = static_cast<std::int64_t>(thread_index());
  if (item >= voxels_of(box) * channels) return;
  int at[3], first[3], step[3];
  coordinates(box, item / channels, at);
  for (int a = 0; a < 3; ++a) {
    first[a] = at[a] - centers[3 * state + static_cast<unsigned>(a)] + width[static_cast<std::size_t>(a)] / 2;
    step[a] = grid.periodic[a] ? grid.n[a] : width[static_cast<std::size_t>(a)];
    if (grid.periodic[a]) first[a] = (first[a] % grid.n[a] + grid.n[a]) % grid.n[a];
  }
  const int c = static_cast<int>(item % channels);
  const float* from = kernel + (std::int64_t{c} * species + kinds[state]) * width[0] * width[1] * width[2];
  float sum = 0;
  for (int z = first[0]; z < width[0]; z += step[0])
    for (int y = first[1]; y < width[1]; y += step[1])
      for (int x = first[2]; x < width[2]; x += step[2]) sum += from[(z * width[1] + y) * width[2] + x];
  change[static_cast<std::int64_t>(state) * most * channels + item] = sum;
}

/// Changes of one layer by those of the layer before; activations get them.
__global__ void __launch_bounds__(kThreads)
    change_layer(GridView grid, QBox all, LayerView layer, const QBox* from_boxes, const QBox* boxes,
                 const float* change_before, std::int64_t most_before, std::int64_t most, float* activations,
                 float* change, float* saved) {
  const std::int64_t state = blockIdx.y;
  const QBox box = boxes[state];
  const auto item = static_cast<std::int64_t>(thread_index());
  if (item >= voxels_of(box) * layer.outputs) return;
  int at[3];
  coordinates(box, item / layer.outputs, at);
  const int o = static_cast<int>(item % layer.outputs);
  const float by = convolve(grid, layer, from_boxes[state], change_before + state * most_before * layer.inputs, at, o);
  for (int a = 0; a < 3; ++a) at[a] = grid.index(all, a, at[a]);
  float& held = activations[((state * all.count[0] + at[0]) * all.count[1] + at[1]) * all.count[2] * layer.outputs +
                            std::int64_t{at[2]} * layer.outputs + o];
  const float before = held, after = leaky((before > 0 ? before : kUnleak * before) + by);
  held = after;
  if (change != nullptr) change[state * most * layer.outputs + item] = after - before;
  saved[state * most * layer.outputs + item] = before;
}

__global__ void __launch_bounds__(kThreads) exchange(GridView grid, QBox all, int outputs, const QBox* boxes,
                                                     std::int64_t most, float* activations, float* saved) {
  const std::int64_t state = blockIdx.y;
  const QBox box = boxes[state];
  const auto item = static_cast<std::int64_t>(thread_index());
  if (item >= voxels_of(box) * outputs) return;
  int at[3];
  coordinates(box, item / outputs, at);
  for (int a = 0; a < 3; ++a) at[a] = grid.index(all, a, at[a]);
  float& held = activations[((state * all.count[0] + at[0]) * all.count[1] + at[1]) * all.count[2] * outputs +
                            std::int64_t{at[2]} * outputs + item % outputs];
  float& kept = saved[state * most * outputs + item];
  const float before = held;
  held = kept;
  kept = before;
}

__global__ void __launch_bounds__(kThreads)
    last_layer(GridView grid, QBox all, LayerView layer, const float* activations, const std::int64_t* voxels,
               std::int64_t count, float* out) {
  const std::int64_t state = blockIdx.y;
  const auto item = static_cast<std::int64_t>(thread_index());
  if (item >= count * layer.outputs) return;
  const std::int64_t k = item / layer.outputs, voxel = voxels[state * count + k];
  const int o = static_cast<int>(item % layer.outputs);
  float& q = out[(state * layer.outputs + o) * count + k];
  if (voxel < 0 || voxel >= voxels_of(all)) {
    q = std::numeric_limits<float>::quiet_NaN();
    return;
  }
  int at[3];
  coordinates(all, voxel, at);
  q = tanhf(layer.bias[o] + convolve(grid, layer, all, activations + state * voxels_of(all) * layer.inputs, at, o));
}

}  // namespace

struct QDelta::Impl {
  std::shared_ptr<const QMap> map;
  std::vector<thalweg::Placed> atoms;  // (n)
  std::uint64_t parent = 0;
  Array<QBox> boxes;
  std::vector<Array<float>> saved;
};
QDelta::QDelta(std::unique_ptr<Impl> made) : impl(std::move(made)) {}
QDelta::~QDelta() = default;
QDelta::QDelta(QDelta&&) noexcept = default;
QDelta& QDelta::operator=(QDelta&&) noexcept = default;

struct QState::Impl {
  Impl(std::shared_ptr<const QMap> of, std::size_t states, Stream stream) : map(std::move(of)), n(states) {
    const QNetwork& network = map->network();
    const std::size_t dimension = static_cast<std::size_t>(network.dimension());
    const auto along = [&](int k, int other) { return dimension == 2 ? Three{k, other, k} : Three{k, k, k}; };
    for (std::size_t k = 0; k < dimension; ++k) {
      const std::size_t axis = dimension == 2 ? 2 * k : k;
      host_grid.n[axis] = static_cast<int>(map->shape()[k]);
      host_grid.periodic[axis] = map->periodic()[k] != 0;
    }
    for (std::size_t a = 0; a < 3; ++a) grid.n[a] = host_grid.n[a], grid.periodic[a] = host_grid.periodic[a];
    all = host_grid.whole();
    width = along(network.representation().width, 1);
    kernel = Array<float>(std::span<const float>(network.representation().kernel), stream);
    Three reach{0, 0, 0};
    for (std::size_t a = 0; a < 3; ++a) reach[a] = width[a] / 2;
    const auto add_box = [&] {
      std::int64_t voxels = 1;
      for (std::size_t a = 0; a < 3; ++a) voxels *= std::min(2 * reach[a] + 1, host_grid.n[a]);
      reaches.push_back(reach);
      most.push_back(voxels);
    };
    add_box();
    std::vector<std::vector<float>> packed;
    for (const QLayer& given : network.layers()) {
      LayerView view{};
      view.inputs = given.inputs;
      view.outputs = given.outputs;
      const Three k = along(given.kernel, 1), d = along(given.dilation, 1);
      std::size_t taps = 1;
      for (std::size_t a = 0; a < 3; ++a) {
        view.kernel[a] = k[a];
        view.dilation[a] = d[a];
        taps *= static_cast<std::size_t>(k[a]);
        reach[a] += k[a] / 2 * d[a];
      }
      const auto inputs = static_cast<std::size_t>(given.inputs), outputs = static_cast<std::size_t>(given.outputs);
      std::vector<float>& to = packed.emplace_back(taps * inputs * outputs);
      for (std::size_t o = 0; o < outputs; ++o)
        for (std::size_t i = 0; i < inputs; ++i)
          for (std::size_t t = 0; t < taps; ++t)
            to[(t * inputs + i) * outputs + o] = given.weights[(o * inputs + i) * taps + t];
      memory.emplace_back(std::span<const float>(to), stream);
      view.weights = memory.back().data();
      memory.emplace_back(std::span<const float>(given.bias), stream);
      view.bias = memory.back().data();
      layers.push_back(view);
      add_box();
    }
    // Without atoms all states are alike: one is found, the others copy it.
    const QRepresentation& r = network.representation();
    const auto voxels = static_cast<std::size_t>(all.voxels()), channels = static_cast<std::size_t>(r.channels);
    std::vector<float> input(voxels * channels);
    for (std::size_t v = 0; v < voxels; ++v) std::copy(r.bias.begin(), r.bias.end(), input.begin() + v * channels);
    const Array<float> empty(std::span<const float>(input), stream);
    const float* in = empty.data();
    for (std::size_t l = 0; l < hidden(); ++l) {
      const std::size_t size = voxels * static_cast<std::size_t>(layers[l].outputs);
      float* out = activations.emplace_back(n * size).data();
      THALWEG_LAUNCH(dense_layer, blocks_for(size), kThreads, 0, native(stream), grid, all, layers[l], in, out);
      check_launch("a layer of a Q-map");
      for (std::size_t k = 1; k < n; ++k) copy_on_device(out + k * size, out, size * sizeof(float), stream);
      in = out;
    }
    for (std::size_t l = 0; l < hidden(); ++l)
      change.emplace_back(n * static_cast<std::size_t>(most[l] * channels_of(l)));
    copy_to_host(nullptr, nullptr, 0, stream);  // until the copies are done
  }

  std::size_t hidden() const { return layers.size() - 1; }
  std::int64_t channels_of(std::size_t box) const { return box == 0 ? layers[0].inputs : layers[box - 1].outputs; }
  dim3 threads_for(std::size_t box) const {
    return {blocks_for(static_cast<std::size_t>(most[box] * channels_of(box))), static_cast<unsigned>(n), 1};
  }

  void place(std::span<const thalweg::Placed> atoms, Stream stream) {
    if (atoms.size() != n)
      throw Error("place() takes one atom for each of the " + std::to_string(n) + " states, but " +
                  std::to_string(atoms.size()) + " came");
    std::vector<QBox> boxes;
    std::vector<std::int32_t> kinds, centers;
    for (const thalweg::Placed& atom : atoms) {
      if (atom.species < 0 || atom.species >= map->network().species() || atom.voxel < 0 || atom.voxel >= all.voxels())
        throw Error("species go from 0 to " + std::to_string(map->network().species() - 1) + " and voxels to " +
                    std::to_string(all.voxels() - 1) + ", but an atom has " + std::to_string(atom.species) + " and " +
                    std::to_string(atom.voxel));
      const auto v = static_cast<int>(atom.voxel), row = v / grid.n[2];
      kinds.push_back(atom.species);
      for (const int c : {row / grid.n[1], row % grid.n[1], v % grid.n[2]}) centers.push_back(c);
    }
    for (std::size_t l = 0; l <= hidden(); ++l)
      for (std::size_t k = 0; k < n; ++k) {
        QBox box;
        for (std::size_t a = 0; a < 3; ++a) box.first[a] = centers[3 * k + a], box.count[a] = 1;
        boxes.push_back(host_grid.fold(convolution::Grid::grown(box, reaches[l])));
      }
    auto step = std::make_unique<QDelta::Impl>();
    step->map = map;
    step->atoms.assign(atoms.begin(), atoms.end());
    step->boxes = Array<QBox>(std::span<const QBox>(boxes), stream);
    const Array<std::int32_t> device_kinds(std::span<const std::int32_t>(kinds), stream),
        device_centers(std::span<const std::int32_t>(centers), stream);
    const QBox* of_layer = step->boxes.data();
    THALWEG_LAUNCH(change_input, threads_for(0), kThreads, 0, native(stream), grid, width, layers[0].inputs,
                   map->network().species(), kernel.data(), of_layer, device_kinds.data(), device_centers.data(),
                   most[0], change[0].data());
    for (std::size_t l = 0; l < hidden(); ++l) {
      float* saved = step->saved.emplace_back(n * static_cast<std::size_t>(most[l + 1] * layers[l].outputs)).data();
      THALWEG_LAUNCH(change_layer, threads_for(l + 1), kThreads, 0, native(stream), grid, all, layers[l],
                     of_layer + l * n, of_layer + (l + 1) * n, change[l].data(), most[l], most[l + 1],
                     activations[l].data(), l + 1 < hidden() ? change[l + 1].data() : nullptr, saved);
    }
    check_launch("placing an atom on a Q-map");
    copy_to_host(nullptr, nullptr, 0, stream);  // until the copies are done
    push(std::move(step));
  }

  void exchange_all(QDelta::Impl& step, Stream stream) {
    for (std::size_t l = 0; l < hidden(); ++l)
      THALWEG_LAUNCH(exchange, threads_for(l + 1), kThreads, 0, native(stream), grid, all, layers[l].outputs,
                     step.boxes.data() + (l + 1) * n, most[l + 1], activations[l].data(), step.saved[l].data());
    check_launch("taking an atom back from a Q-map");
  }

  void push(std::unique_ptr<QDelta::Impl> step) {
    step->parent = history.back();
    std::uint64_t hash = history.back();
    for (const thalweg::Placed& atom : step->atoms) {
      hash ^= static_cast<std::uint64_t>(atom.voxel) * 1024 + static_cast<std::uint64_t>(atom.species) + 1;
      hash = (hash ^ (hash >> 31)) * 0x9e3779b97f4a7c15ull;  // SplitMix64's mixing
    }
    history.push_back(hash ^ (hash >> 29));
    steps.push_back(std::move(step));
  }

  std::shared_ptr<const QMap> map;
  std::size_t n;
  convolution::Grid host_grid;
  GridView grid{};
  QBox all;
  Three width{};
  std::vector<Three> reaches;      // of each box from the atom's voxel
  std::vector<std::int64_t> most;  // voxels of the largest box
  std::vector<LayerView> layers;
  std::vector<Array<float>> memory, activations, change;
  Array<float> kernel;
  std::vector<std::unique_ptr<QDelta::Impl>> steps;
  std::vector<std::uint64_t> history{0};  // a hash of the atoms placed, in order
};

QState::QState(std::shared_ptr<const QMap> map, std::size_t states, Stream stream) {
  require();
  if (!map) throw Error("a state needs a Q-map, but there is none");
  if (states < 1 || states > 65535)
    throw Error("states must be from 1 to 65535, but there are " + std::to_string(states));
  impl_ = std::make_unique<Impl>(std::move(map), states, stream);
}
QState::~QState() = default;
QState::QState(QState&&) noexcept = default;
QState& QState::operator=(QState&&) noexcept = default;

std::size_t QState::states() const { return impl_->n; }
std::size_t QState::placed() const { return impl_->steps.size(); }
void QState::place(std::span<const thalweg::Placed> atoms, Stream stream) { impl_->place(atoms, stream); }
QDelta QState::retract(Stream stream) {
  Impl& s = *impl_;
  if (s.steps.empty()) throw Error("no atom is placed, so there is none to take back");
  std::unique_ptr<QDelta::Impl> step = std::move(s.steps.back());
  s.steps.pop_back();
  s.history.pop_back();
  s.exchange_all(*step, stream);
  return QDelta(std::move(step));
}
void QState::undo(Stream stream) { (void)retract(stream); }
QDelta QState::expand(std::span<const thalweg::Placed> atoms, Stream stream) {
  place(atoms, stream);
  return retract(stream);
}
void QState::apply(QDelta delta, Stream stream) {
  if (!delta.impl) throw Error("this change was used already; expand the present states");
  const QDelta::Impl& d = *delta.impl;
  if (d.map != impl_->map || d.parent != impl_->history.back() || d.atoms.size() != impl_->n)
    throw Error("this change belongs to states with other atoms placed or of another map; expand the present ones");
  impl_->exchange_all(*delta.impl, stream);
  impl_->push(std::move(delta.impl));
}

void QState::q(const std::int64_t* voxels, std::size_t count, float* out, Stream stream) const {
  const Impl& s = *impl_;
  if (count == 0) return;
  const LayerView& layer = s.layers.back();
  const dim3 blocks{blocks_for(count * static_cast<std::size_t>(layer.outputs)), static_cast<unsigned>(s.n), 1};
  THALWEG_LAUNCH(last_layer, blocks, kThreads, 0, native(stream), s.grid, s.all, layer, s.activations.back().data(),
                 voxels, static_cast<std::int64_t>(count), out);
  check_launch("a Q-map");
}

}  // namespace thalweg::cuda
