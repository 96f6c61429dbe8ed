#include "thalweg/qmap.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>
#include <mutex>
#include <string>

#include "qmap_convolution.hpp"
#include "qmap_kernels.hpp"

namespace thalweg {

using namespace convolution;

namespace {

std::string text(int64_t n) { return std::to_string(n); }

// ---- arrays of activations ----------------------------------------------------------------------------------
// plain:   [z][y][x][channel]
// for the last layer, whose kernel is summed along rows: [z][y][phase of x][cell of x][channel], so that the taps of a
// row lie side by side. x starts half a kernel before the grid; behind the last y
// is a row of zeros, behind the last z a plane of them: what open walls show. Periodic directions of x repeat the first
// and last voxels.
struct Layout {
  int channels = 0;
  int64_t row = 0, plane = 0, floats = 0;
  std::vector<int64_t> column;      // (n_x), offset of a voxel
  std::vector<int64_t> from, to;    // copies along x: offsets
  std::vector<std::int32_t> image;  // x of these copies

  static Layout plain(const Grid& grid, int channels) {
    Layout out;
    out.channels = channels;
    out.row = int64_t{grid.n[2]} * channels;
    out.plane = out.row * grid.n[1];
    out.floats = out.plane * grid.n[0];
    for (int x = 0; x < grid.n[2]; ++x) out.column.push_back(int64_t{x} * channels);
    return out;
  }
  // slack: floats that may be read behind the last row
  static Layout for_rows(const Grid& grid, const Layer& layer, int slack) {
    Layout out;
    const int d = layer.dilation[2], reach = layer.reach(2), width = grid.n[2] + 2 * reach;
    const int cells = (width + d - 1) / d;
    out.channels = layer.inputs;
    const auto offset = [&](int e) { return (int64_t{e % d} * cells + e / d) * layer.inputs; };
    out.row = int64_t{cells} * d * layer.inputs;
    out.plane = out.row * (grid.n[1] + 1);
    out.floats = out.plane * (grid.n[0] + 1) + slack;
    for (int x = 0; x < grid.n[2]; ++x) {
      out.column.push_back(offset(x + reach));
      if (!grid.periodic[2]) continue;
      for (int e = (x + reach) % grid.n[2]; e < width; e += grid.n[2]) {
        if (e == x + reach) continue;
        out.from.push_back(out.column.back());
        out.to.push_back(offset(e));
        out.image.push_back(x);
      }
    }
    return out;
  }
};

// Offsets of a box's voxels along x.
void columns_of(const Grid& grid, const Layout& layout, const QBox& box, std::vector<int64_t>& offsets) {
  offsets.resize(static_cast<std::size_t>(box.count[2]));
  for (int x = 0; x < box.count[2]; ++x)
    offsets[static_cast<std::size_t>(x)] = layout.column[static_cast<std::size_t>((box.first[2] + x) % grid.n[2])];
}
int64_t row_of(const Grid& grid, const Layout& layout, const QBox& box, int z, int y) {
  return (box.first[0] + z) % grid.n[0] * layout.plane + (box.first[1] + y) % grid.n[1] * layout.row;
}

void repeat_images(const Grid& grid, const Layout& layout, const QBox& box, float* row) {
  for (std::size_t k = 0; k < layout.image.size(); ++k)
    if (grid.index(box, 2, layout.image[k]) >= 0)
      std::copy_n(row + layout.from[k], layout.channels, row + layout.to[k]);
}

// Working memory that threads take and give back: new memory costs more than what a small grid needs it for.
class Scratches {
 public:
  std::unique_ptr<Scratch> take() {
    const std::lock_guard<std::mutex> lock(guard_);
    if (free_.empty()) return std::make_unique<Scratch>();
    std::unique_ptr<Scratch> out = std::move(free_.back());
    free_.pop_back();
    return out;
  }
  void give(std::unique_ptr<Scratch> scratch) {
    const std::lock_guard<std::mutex> lock(guard_);
    free_.push_back(std::move(scratch));
  }

 private:
  std::mutex guard_;
  std::vector<std::unique_ptr<Scratch>> free_;
};

// Runs work(first, last) on `threads` threads over groups of a fixed size: shares never depend on the thread count.
template <class Work>
void in_groups(int64_t n, int64_t group, int threads, Scratches& scratches, Work work) {
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex guard;
  const auto loop = [&] {
    try {
      std::unique_ptr<Scratch> scratch = scratches.take();
      for (int64_t first; (first = next.fetch_add(group)) < n;) work(first, std::min(n, first + group), *scratch);
      scratches.give(std::move(scratch));
    } catch (...) {
      const std::lock_guard<std::mutex> lock(guard);
      if (!error) error = std::current_exception();
      next = n;
    }
  };
  const int useful = static_cast<int>(std::min<int64_t>(threads, (n + group - 1) / group));
  if (useful <= 1) {
    loop();
  } else {
#ifdef _OPENMP
#pragma omp parallel num_threads(useful)
#endif
    loop();
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace

// ---- networks -----------------------------------------------------------------------------------------------
namespace {

int64_t power(int64_t k, int dimension) { return dimension == 2 ? k * k : k * k * k; }

void check_dimension(std::int32_t dimension) {
  if (dimension != 2 && dimension != 3) throw Error("dimension must be 2 or 3, but it is " + text(dimension));
}

// Without the rim of values below 1e-8 of the largest, as in training: a Gaussian's window is mostly that.
QRepresentation cropped(const QRepresentation& whole, int dimension) {
  QRepresentation out = whole;
  const int w = whole.width, half = w / 2, volume = static_cast<int>(power(w, dimension));
  const auto distance = [&](int at) {  // from the middle, along the farthest direction
    int most = std::max(std::abs(at % w - half), std::abs(at / w % w - half));
    return dimension == 2 ? most : std::max(most, std::abs(at / w / w - half));
  };
  float largest = 0;
  for (const float v : whole.kernel) largest = std::max(largest, std::abs(v));
  int used = 0;
  for (std::size_t k = 0; k < whole.kernel.size(); ++k)
    if (std::abs(whole.kernel[k]) > 1e-8f * largest) used = std::max(used, distance(static_cast<int>(k) % volume));
  out.width = 2 * used + 1;
  out.kernel.clear();
  for (std::size_t k = 0; k < whole.kernel.size(); ++k)
    if (distance(static_cast<int>(k) % volume) <= used) out.kernel.push_back(whole.kernel[k]);
  return out;
}

void expect_size(const std::string& what, const std::string& shape, int64_t wanted, std::size_t came) {
  if (static_cast<std::size_t>(wanted) != came)
    throw Error(what + " must hold " + text(wanted) + " values " + shape + ", but it holds " +
                text(static_cast<int64_t>(came)));
}

void check_finite(const std::string& what, const std::vector<float>& values) {
  for (const float v : values)
    if (!std::isfinite(v)) throw Error(what + " must be finite, but one value is " + std::to_string(v));
}

}  // namespace

std::int64_t q_weight_count(std::int32_t dimension, std::span<const std::int32_t> channels,
                            std::span<const std::int32_t> kernels) {
  check_dimension(dimension);
  if (channels.size() != kernels.size() + 1)
    throw Error("channels must have one entry more than kernels, but they have " +
                text(static_cast<int64_t>(channels.size())) + " and " + text(static_cast<int64_t>(kernels.size())));
  int64_t count = 0;
  for (std::size_t l = 0; l < kernels.size(); ++l)
    count += channels[l + 1] * (channels[l] * power(kernels[l], dimension) + 1);
  return count;
}

std::int32_t q_receptive_radius(std::span<const std::int32_t> kernels, std::span<const std::int32_t> dilations) {
  if (kernels.size() != dilations.size())
    throw Error("kernels and dilations must have one entry per layer, but they have " +
                text(static_cast<int64_t>(kernels.size())) + " and " + text(static_cast<int64_t>(dilations.size())));
  std::int32_t radius = 0;
  for (std::size_t l = 0; l < kernels.size(); ++l) radius += (kernels[l] - 1) / 2 * dilations[l];
  return radius;
}

QRepresentation QRepresentation::one_hot(std::int32_t species) {
  QRepresentation out;
  out.channels = out.species = species;
  out.kernel.assign(static_cast<std::size_t>(species) * species, 0.0f);
  for (std::int32_t s = 0; s < species; ++s) out.kernel[static_cast<std::size_t>(s) * (species + 1)] = 1.0f;
  out.bias.assign(static_cast<std::size_t>(species), 0.0f);
  return out;
}

QNetwork::QNetwork(std::int32_t dimension, std::vector<QLayer> layers, QRepresentation representation)
    : dimension_(dimension), layers_(std::move(layers)), representation_(std::move(representation)) {
  check_dimension(dimension);
  if (layers_.size() < 2)
    throw Error("a network needs at least two layers, but it has " + text(static_cast<int64_t>(layers_.size())));
  const QRepresentation& r = representation_;
  const std::string k = dimension == 2 ? ", k, k)" : ", k, k, k)";
  const auto check_odd = [](const std::string& what, std::int32_t n) {
    if (n < 1 || n > 99 || n % 2 == 0) throw Error(what + " must be odd, from 1 to 99, but it is " + text(n));
  };
  const auto check_channels = [](const std::string& what, std::int32_t n) {
    if (n < 1 || n > 1024) throw Error(what + " must be from 1 to 1024, but there are " + text(n));
  };
  check_channels("channels of the representation", r.channels);
  check_channels("species of the representation", r.species);
  check_odd("the width of the representation", r.width);
  expect_size("the representation's kernel",
              dimension == 2 ? "(channels, species, w, w)" : "(channels, species, w, w, w)",
              int64_t{r.channels} * r.species * power(r.width, dimension), r.kernel.size());
  expect_size("the representation's bias", "(channels)", r.channels, r.bias.size());
  check_finite("the representation's kernel", r.kernel);
  check_finite("the representation's bias", r.bias);
  std::int32_t inputs = r.channels;
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    const QLayer& layer = layers_[l];
    const std::string name = "layer " + text(static_cast<int64_t>(l + 1));
    if (layer.inputs != inputs)
      throw Error(name + " must have " + text(inputs) + " inputs, what comes before it gives, but it has " +
                  text(layer.inputs));
    check_channels("outputs of " + name, layer.outputs);
    check_odd("the kernel of " + name, layer.kernel);
    if (layer.dilation < 1 || layer.dilation > 16)
      throw Error("the dilation of " + name + " must be from 1 to 16, but it is " + text(layer.dilation));
    expect_size("weights of " + name, "(outputs, inputs" + k,
                int64_t{layer.outputs} * layer.inputs * power(layer.kernel, dimension), layer.weights.size());
    expect_size("the bias of " + name, "(outputs)", layer.outputs, layer.bias.size());
    check_finite("weights of " + name, layer.weights);
    check_finite("the bias of " + name, layer.bias);
    inputs = layer.outputs;
  }
  if (inputs != r.species)
    throw Error("the last layer must have one output per species, " + text(r.species) + ", but it has " + text(inputs));
}

std::int64_t QNetwork::weight_count() const {
  int64_t count = 0;
  for (const QLayer& layer : layers_) count += static_cast<int64_t>(layer.weights.size() + layer.bias.size());
  return count;
}

std::int32_t QNetwork::receptive_radius() const {
  std::int32_t radius = 0;
  for (const QLayer& layer : layers_) radius += (layer.kernel - 1) / 2 * layer.dilation;
  return radius;
}

// ---- maps ---------------------------------------------------------------------------------------------------
struct QMap::Impl {
  std::shared_ptr<const QNetwork> network;
  std::vector<int64_t> shape;
  std::vector<std::uint8_t> periodic;
  const QmapKernels& kernels = qmap_kernels();
  Grid grid;
  std::vector<Layer> layers;
  QRepresentation representation;  // without the rim that is nearly zero
  Three width{1, 1, 1};            // of it
  std::uint64_t id = 0;            // no other map of this process has it

  // Per layer, null: not possible. Local ones, of what one atom changes, from the second layer on.
  std::vector<std::unique_ptr<LayerFft>> local, whole;
  bool keeps_last = false;
  std::vector<QBox> largest;  // unfolded boxes that one atom changes, at the origin

  // Activations of the layers that may be kept, without atoms: values[l] on a smaller grid, to which index leads.
  struct Empty {
    Grid grid;
    std::vector<int> index[3];
    std::vector<std::vector<float>> values;

    const float* at(int l, int channels, int z, int y, int x) const {
      return values[static_cast<std::size_t>(l)].data() +
             ((int64_t{index[0][static_cast<std::size_t>(z)]} * grid.n[1] + index[1][static_cast<std::size_t>(y)]) *
                  grid.n[2] +
              index[2][static_cast<std::size_t>(x)]) *
                 channels;
    }
  };
  mutable std::once_flag packed_made, stamps_made, empty_made, start_made, gather_made;
  mutable std::vector<PackedLayer> packed;
  mutable std::vector<std::vector<float>> stamps;  // per species: change of layer 1 far from walls, (box, outputs)
  mutable Empty empty;
  mutable std::vector<float> start;  // pre-activations of layer 1 without atoms (voxels, outputs)
  mutable Scratches scratches;
  mutable Floats gather_weights;
  int gather_padded = 0;
  Layout gather_layout;
  std::vector<int64_t> gather_plane, gather_row, gather_column;

  int species() const { return network->species(); }
  int hidden() const { return static_cast<int>(layers.size()) - 1; }
  // Layers that a state of local transforms keeps: the last one if its change costs less than sums at the voxels that
  // are asked for.
  int kept() const { return hidden() + (keeps_last ? 1 : 0); }

  const std::vector<PackedLayer>& packed_layers() const {
    std::call_once(packed_made, [&] {
      for (const Layer& layer : layers) packed.emplace_back(layer, kernels.lanes);
    });
    return packed;
  }

  void check(const Placed& atom) const {
    if (atom.species < 0 || atom.species >= species())
      throw Error("species must be from 0 to " + text(species() - 1) + ", but one is " + text(atom.species));
    check_voxel(atom.voxel);
  }
  void check_voxel(int64_t voxel) const {
    if (voxel < 0 || voxel >= grid.voxels())
      throw Error("voxels of this grid are 0 to " + text(grid.voxels() - 1) + ", but one is " + text(voxel));
  }
  Three position(int64_t voxel) const {
    const int v = static_cast<int>(voxel), row = v / grid.n[2], z = row / grid.n[1];
    return {z, row - z * grid.n[1], v - row * grid.n[2]};
  }

  // Adds to out (the stamp's box, layer 1's outputs) what the atom's part of the input [first, last) makes of it;
  // coordinates count from the atom's voxel.
  void add_stamp(int s, const Three& first, const Three& last, float* out) const {
    const QRepresentation& r = representation;
    const Layer& layer = layers[0];
    const PackedLayer& w = packed_layers()[0];
    const QBox& box = largest[0];
    const int64_t volume = product_of(width);
    for (int c = 0; c < r.channels; ++c)
      for (int z = first[0]; z < last[0]; ++z)
        for (int y = first[1]; y < last[1]; ++y)
          for (int x = first[2]; x < last[2]; ++x) {
            const int64_t at = ((z + width[0] / 2) * width[1] + y + width[1] / 2) * width[2] + x + width[2] / 2;
            const float value = r.kernel[static_cast<std::size_t>((int64_t{c} * r.species + s) * volume + at)];
            if (value == 0) continue;
            for (int kz = 0; kz < layer.kernel[0]; ++kz)
              for (int ky = 0; ky < layer.kernel[1]; ++ky) {
                const int oz = z - (kz - layer.half(0)) * layer.dilation[0] - box.first[0],
                          oy = y - (ky - layer.half(1)) * layer.dilation[1] - box.first[1],
                          ox = x + layer.reach(2) - box.first[2];
                const int64_t tap = int64_t{kz * layer.kernel[1] + ky} * layer.kernel[2];
                kernels.scaled_runs(layer.kernel[2], layer.outputs, value,
                                    w.weights.data() + (tap * layer.inputs + c) * w.padded,
                                    int64_t{layer.inputs} * w.padded,
                                    out + ((int64_t{oz} * box.count[1] + oy) * box.count[2] + ox) * layer.outputs,
                                    -int64_t{layer.dilation[2]} * layer.outputs);
              }
          }
  }

  const std::vector<std::vector<float>>& full_stamps() const {
    std::call_once(stamps_made, [&] {
      Three first, last;
      for (int a = 0; a < 3; ++a) first[a] = -(width[a] / 2), last[a] = width[a] / 2 + 1;
      for (int s = 0; s < species(); ++s) {
        stamps.emplace_back(static_cast<std::size_t>(largest[0].voxels() * layers[0].outputs), 0.0f);
        add_stamp(s, first, last, stamps.back().data());
      }
    });
    return stamps;
  }

  // Where the atom changes layer 1; add_atom adds the change to `out`, which holds a box.
  QBox stamp_box(const Placed& atom) const {
    const Three at = position(atom.voxel);
    QBox box = largest[0];
    for (int a = 0; a < 3; ++a) box.first[a] += at[a];
    return grid.fold(box);
  }
  // Whether open walls cut off a part of the atom's input, and what they leave: [first, last) from the atom's voxel.
  bool clip(const Placed& atom, Three& first, Three& last) const {
    const Three at = position(atom.voxel);
    bool clipped = false;
    for (int a = 0; a < 3; ++a) {
      first[a] = -(width[a] / 2);
      last[a] = width[a] / 2 + 1;
      if (grid.periodic[a]) continue;
      if (at[a] + first[a] < 0) first[a] = -at[a], clipped = true;
      if (at[a] + last[a] > grid.n[a]) last[a] = grid.n[a] - at[a], clipped = true;
    }
    return clipped;
  }
  void add_atom(const Placed& atom, const QBox& box, float* out, Floats& clipped) const {
    const Three at = position(atom.voxel);
    const QBox& unfolded = largest[0];
    const int outputs = layers[0].outputs;
    Three first, last;
    const float* stamp;
    if (!clip(atom, first, last)) {
      stamp = full_stamps()[static_cast<std::size_t>(atom.species)].data();
    } else {
      float* own = clipped.need(unfolded.voxels() * outputs);
      std::fill_n(own, unfolded.voxels() * outputs, 0.0f);
      add_stamp(atom.species, first, last, own);
      stamp = own;
    }
    for (int z = 0; z < unfolded.count[0]; ++z) {
      const int oz = grid.index(box, 0, at[0] + unfolded.first[0] + z);
      for (int y = 0; y < unfolded.count[1] && oz >= 0; ++y) {
        const int oy = grid.index(box, 1, at[1] + unfolded.first[1] + y);
        if (oy < 0) continue;
        for (int x = 0; x < unfolded.count[2];) {
          const int ox = grid.index(box, 2, at[2] + unfolded.first[2] + x);
          if (ox < 0) {
            ++x;
            continue;
          }
          const int run = std::min(unfolded.count[2] - x, box.count[2] - ox);
          const float* from = stamp + ((int64_t{z} * unfolded.count[1] + y) * unfolded.count[2] + x) * outputs;
          float* to = out + ((int64_t{oz} * box.count[1] + oy) * box.count[2] + ox) * outputs;
          for (int k = 0; k < run * outputs; ++k) to[k] += from[k];
          x += run;
        }
      }
    }
  }

  // Adds the atom to the input (voxels, channels).
  void splat(const Placed& atom, float* input) const {
    const Three at = position(atom.voxel);
    const QBox all = grid.whole();
    const int channels = representation.channels;
    const int64_t volume = product_of(width);
    for (int z = 0, k = 0; z < width[0]; ++z)
      for (int y = 0; y < width[1]; ++y)
        for (int x = 0; x < width[2]; ++x, ++k) {
          const int iz = grid.index(all, 0, at[0] + z - width[0] / 2),
                    iy = grid.index(all, 1, at[1] + y - width[1] / 2),
                    ix = grid.index(all, 2, at[2] + x - width[2] / 2);
          if (iz < 0 || iy < 0 || ix < 0) continue;
          float* to = input + ((int64_t{iz} * grid.n[1] + iy) * grid.n[2] + ix) * channels;
          for (int c = 0; c < channels; ++c)
            to[c] += representation.kernel[static_cast<std::size_t>(
                (int64_t{c} * representation.species + atom.species) * volume + k)];
        }
  }

  std::vector<float> dense(std::span<const Placed> placed) const;
  const Empty& empty_state() const;
  const std::vector<float>& start_of_layer_1() const;

  int64_t usually_asked() const { return std::min<int64_t>(25000, grid.voxels()); }
  bool grid_fft_possible() const {
    return std::all_of(whole.begin() + 1, whole.end(), [](const auto& plan) { return plan != nullptr; });
  }
  bool local_fft_possible() const {
    return std::all_of(local.begin() + 1, local.end() - 1, [](const auto& plan) { return plan != nullptr; });
  }
  // Q (species, voxels) of states from their activations of layer 1, which are overwritten.
  void grid_pass(int states, float* const* first, float* const* spare, float* const* q, Scratch& scratch) const;

  void make_gather();
  const float* packed_gather() const;
  double cost(const LayerFft* plan, const Layer& layer) const;
  double direct_cost(int l) const;
  double keeping_cost(int l) const;
  double gather_cost(int64_t asked) const;
};

// A row of a whole grid's result with the bias added, to its place (where it may be already).
static void put_biased(const Layer& layer, const Grid& grid, const float* row, float* out, int z, int y) {
  out += (int64_t{z} * grid.n[1] + y) * grid.n[2] * layer.outputs;
  for (int x = 0; x < grid.n[2]; ++x)
    for (int o = 0; o < layer.outputs; ++o) out[x * layer.outputs + o] = row[x * layer.outputs + o] + layer.bias[o];
}

// (voxels, species) before the tanh -> (species, voxels) behind it.
static void finish(const QmapKernels& kernels, int64_t voxels, int species, float* z, float* q) {
  kernels.tanh(voxels * species, z);
  for (int64_t v = 0; v < voxels; ++v)
    for (int s = 0; s < species; ++s) q[s * voxels + v] = z[v * species + s];
}

std::vector<float> QMap::Impl::dense(std::span<const Placed> placed) const {
  const QRepresentation& r = representation;
  const QBox all = grid.whole();
  std::vector<float> input(static_cast<std::size_t>(grid.voxels() * r.channels));
  for (int64_t v = 0; v < grid.voxels(); ++v) std::copy(r.bias.begin(), r.bias.end(), input.begin() + v * r.channels);
  for (const Placed& atom : placed) {
    check(atom);
    splat(atom, input.data());
  }
  std::vector<float> out = std::move(input);
  Scratch scratch;
  for (std::size_t l = 0; l < layers.size(); ++l) {
    std::vector<float> next(static_cast<std::size_t>(grid.voxels() * layers[l].outputs));
    convolve_direct(layers[l], packed_layers()[l], grid, kernels, scratch, out.data(), all, next.data(), all, true);
    if (l + 1 < layers.size()) kernels.leaky(static_cast<int64_t>(next.size()), next.data());
    out = std::move(next);
  }
  std::vector<float> q(out.size());
  finish(kernels, grid.voxels(), species(), out.data(), q.data());
  return q;
}

// Without atoms activations depend on the distances to open walls alone, and on those only as far as the kernels reach:
// a grid of one voxel per periodic direction and just wide enough between walls has all values.
const QMap::Impl::Empty& QMap::Impl::empty_state() const {
  std::call_once(empty_made, [&] {
    Grid small = grid;
    std::vector<Layer> small_layers = layers;
    for (int a = 0; a < 3; ++a) {
      // Counted in steps of the dilation where all layers here share it, else in voxels.
      const int d = layers[0].dilation[a];
      const bool shared =
          std::all_of(layers.begin(), layers.begin() + kept(), [&](const Layer& l) { return l.dilation[a] == d; });
      const int step = shared ? d : 1, cells = grid.n[a] / step;
      int reach = 0;
      for (int l = 0; l < kept(); ++l) reach += layers[static_cast<std::size_t>(l)].reach(a) / step;
      const int enough = grid.periodic[a] ? 1 : 2 * reach + 1;
      const bool reduced = cells >= enough || grid.n[a] % step == 0;  // all phases of an open direction are alike
      if (reduced) {
        small.n[a] = std::min(enough, cells);
        for (Layer& layer : small_layers) layer.dilation[a] /= grid.periodic[a] ? layer.dilation[a] : step;
      }
      for (int x = 0; x < grid.n[a]; ++x) {
        const int low = x / step, high = (grid.n[a] - 1 - x) / step;
        empty.index[a].push_back(!reduced           ? x
                                 : grid.periodic[a] ? 0
                                 : cells < enough   ? low
                                 : low < reach      ? low
                                 : high < reach     ? enough - 1 - high
                                                    : reach);
      }
    }
    empty.grid = small;
    const QRepresentation& r = representation;
    std::vector<float> in(static_cast<std::size_t>(small.voxels() * r.channels));
    for (int64_t v = 0; v < small.voxels(); ++v) std::copy(r.bias.begin(), r.bias.end(), in.begin() + v * r.channels);
    Scratch scratch;
    const QBox all = small.whole();
    for (int l = 0; l < kept(); ++l) {
      const Layer& layer = small_layers[static_cast<std::size_t>(l)];
      std::vector<float> out(static_cast<std::size_t>(small.voxels() * layer.outputs));
      const auto plan = small.voxels() > 1000 ? plan_fft(layer, small, small.n, true) : nullptr;
      if (plan) {
        const float* from = in.data();
        float* to = out.data();
        convolve_fft(*plan, layer, small, kernels, scratch, 1, &from, all, &to, all,
                     [&](int, int z, int y, float* row) { put_biased(layer, small, row, to, z, y); });
      } else {
        convolve_direct(layer, packed_layers()[static_cast<std::size_t>(l)], small, kernels, scratch, in.data(), all,
                        out.data(), all, true);
      }
      if (l < hidden()) kernels.leaky(static_cast<int64_t>(out.size()), out.data());
      empty.values.push_back(out);
      in = std::move(out);
    }
  });
  return empty;
}

// From the activations leaky ReLU is undone.
const std::vector<float>& QMap::Impl::start_of_layer_1() const {
  std::call_once(start_made, [&] {
    const Empty& activations = empty_state();
    const int channels = layers[0].outputs;
    start.reserve(static_cast<std::size_t>(grid.voxels() * channels));
    for (int64_t v = 0; v < grid.voxels(); ++v) {
      const Three at = position(v);
      const float* a = activations.at(0, channels, at[0], at[1], at[2]);
      for (int c = 0; c < channels; ++c) start.push_back(a[c] > 0 ? a[c] : a[c] * 100.0f);
    }
  });
  return start;
}

void QMap::Impl::grid_pass(int states, float* const* first, float* const* spare, float* const* q,
                           Scratch& scratch) const {
  std::vector<float*> in(first, first + states), out(spare, spare + states);
  const QBox all = grid.whole();
  for (std::size_t l = 1; l < layers.size(); ++l) {
    const Layer& layer = layers[l];
    convolve_fft(*whole[l], layer, grid, kernels, scratch, states, in.data(), all, out.data(), all,
                 [&](int s, int z, int y, float* row) { put_biased(layer, grid, row, out[s], z, y); });
    for (int s = 0; s < states; ++s) {
      if (l + 1 < layers.size())
        kernels.leaky(grid.voxels() * layer.outputs, out[s]);
      else
        finish(kernels, grid.voxels(), layer.outputs, out[s], q[s]);
    }
    std::swap(in, out);
  }
}

void QMap::Impl::make_gather() {
  const Layer& layer = layers.back();
  const int lanes = kernels.lanes, row = layer.kernel[2] * layer.inputs;
  gather_padded = (row + lanes - 1) / lanes * lanes;
  gather_layout = Layout::for_rows(grid, layer, gather_padded);
  const auto table = [&](int axis, int64_t stride) {
    std::vector<int64_t> out;
    for (int e = -layer.reach(axis); e < grid.n[axis] + layer.reach(axis); ++e) {
      const int i = grid.index(grid.whole(), axis, e);
      out.push_back((i < 0 ? grid.n[axis] : i) * stride);
    }
    return out;
  };
  gather_plane = table(0, gather_layout.plane);
  gather_row = table(1, gather_layout.row);
  const int d = layer.dilation[2], cells = (grid.n[2] + 2 * layer.reach(2) + d - 1) / d;
  for (int x = 0; x < grid.n[2]; ++x) gather_column.push_back((int64_t{x % d} * cells + x / d) * layer.inputs);
}

const float* QMap::Impl::packed_gather() const {
  std::call_once(gather_made, [&] {
    const Layer& layer = layers.back();
    const int rows = layer.kernel[0] * layer.kernel[1];
    float* out = gather_weights.need(int64_t{rows} * layer.outputs * gather_padded);
    for (int r = 0; r < rows; ++r)
      for (int o = 0; o < layer.outputs; ++o)
        for (int k = 0; k < layer.kernel[2]; ++k)
          for (int i = 0; i < layer.inputs; ++i)
            out[(int64_t{r} * layer.outputs + o) * gather_padded + k * layer.inputs + i] =
                layer.weights[(int64_t{o} * layer.inputs + i) * layer.taps() + int64_t{r} * layer.kernel[2] + k];
  });
  return gather_weights.data();
}

QMap::QMap(std::shared_ptr<const QNetwork> network, std::span<const std::int64_t> shape,
           std::span<const std::uint8_t> periodic)
    : impl_(std::make_unique<Impl>()) {
  if (!network) throw Error("a Q-map needs a network, but there is none");
  Impl& m = *impl_;
  m.network = std::move(network);
  const std::size_t dimension = static_cast<std::size_t>(m.network->dimension());
  if (shape.size() != dimension || periodic.size() != dimension)
    throw Error("shape and periodic must have one entry per direction of the network, " + text(m.network->dimension()) +
                ", but they have " + text(static_cast<int64_t>(shape.size())) + " and " +
                text(static_cast<int64_t>(periodic.size())));
  m.shape.assign(shape.begin(), shape.end());
  m.periodic.assign(periodic.begin(), periodic.end());
  for (std::size_t k = 0; k < dimension; ++k) {
    if (shape[k] < 1 || shape[k] > 2000)
      throw Error("a grid has 1 to 2000 voxels per direction, but one entry of shape is " + text(shape[k]));
    const std::size_t axis = dimension == 2 ? 2 * k : k;
    m.grid.n[axis] = static_cast<int>(shape[k]);
    m.grid.periodic[axis] = periodic[k] != 0;
  }
  constexpr int64_t most = 30'000'000;  // 1.2 GB of activations per layer of ten channels
  if (m.grid.voxels() > most)
    throw Error("a grid has at most " + text(most) + " voxels, but this one has " + text(m.grid.voxels()));
  const auto along = [&](int n, int other) { return dimension == 2 ? Three{n, other, n} : Three{n, n, n}; };
  for (const QLayer& given : m.network->layers()) {
    Layer layer;
    layer.inputs = given.inputs;
    layer.outputs = given.outputs;
    layer.kernel = along(given.kernel, 1);
    layer.dilation = along(given.dilation, 1);
    layer.weights = given.weights.data();
    layer.bias = given.bias.data();
    m.layers.push_back(layer);
  }
  m.representation = cropped(m.network->representation(), static_cast<int>(dimension));
  m.width = along(m.representation.width, 1);
  QBox box;
  for (int a = 0; a < 3; ++a) {
    box.first[a] = -(m.width[a] / 2);
    box.count[a] = m.width[a];
  }
  for (const Layer& layer : m.layers) {
    Three count;
    for (int a = 0; a < 3; ++a) count[a] = std::min(box.count[a], m.grid.n[a]);
    m.local.push_back(m.largest.empty() ? nullptr : plan_fft(layer, m.grid, count, false));
    m.whole.push_back(plan_fft(layer, m.grid, m.grid.n, true));
    box = Grid::grown(box, layer.reach());
    m.largest.push_back(box);
  }
  m.make_gather();
  m.keeps_last = m.local_fft_possible() && m.cost(m.local.back().get(), m.layers.back()) + m.keeping_cost(m.hidden()) <
                                               m.gather_cost(m.usually_asked());
  static std::atomic<std::uint64_t> maps{0};
  m.id = ++maps;
}

QMap::~QMap() = default;

const QNetwork& QMap::network() const { return *impl_->network; }
std::int64_t QMap::voxels() const { return impl_->grid.voxels(); }
std::span<const std::int64_t> QMap::shape() const { return impl_->shape; }
std::span<const std::uint8_t> QMap::periodic() const { return impl_->periodic; }
std::vector<float> QMap::dense(std::span<const Placed> placed) const { return impl_->dense(placed); }

std::vector<float> QMap::batch(std::span<const std::int64_t> offsets, std::span<const Placed> placed,
                               int threads) const {
  const Impl& m = *impl_;
  if (offsets.empty() || offsets.front() != 0 || offsets.back() != static_cast<int64_t>(placed.size()) ||
      !std::is_sorted(offsets.begin(), offsets.end()))
    throw Error("offsets must rise from 0 to the number of placed atoms, " + text(static_cast<int64_t>(placed.size())) +
                ", one entry more than there are states");
  for (const Placed& atom : placed) m.check(atom);
  if (threads == 0) threads = default_threads();
  const int64_t n = static_cast<int64_t>(offsets.size()) - 1, voxels = m.grid.voxels(), map = voxels * m.species();
  std::vector<float> out(static_cast<std::size_t>(n * map));
  const auto atoms = [&](int64_t i) {
    return placed.subspan(static_cast<std::size_t>(offsets[i]), static_cast<std::size_t>(offsets[i + 1] - offsets[i]));
  };
  if (m.whole[0] == nullptr || !m.grid_fft_possible()) {
    in_groups(n, 1, threads, m.scratches, [&](int64_t first, int64_t, Scratch&) {
      const std::vector<float> q = m.dense(atoms(first));
      std::copy(q.begin(), q.end(), out.begin() + first * map);
    });
    return out;
  }
  // Enough states to fill the registers, few enough to stay in the cache. A map of 46 x 46 between walls with three
  // species and 15 x 15 kernels: tiles of 40 x 54 cells, 33 transforms there and 33 back of 120,000 operations each,
  // and 260 complex products in every cell: 12 million operations, 0.4 ms on a core whose peak does them in 0.1. Halves
  // of the channels as real and imaginary parts instead of tiles need two thirds of them, but took as long: their
  // spectra must be taken apart and put together at every frequency.
  const LayerFft& plan = *m.whole[1];
  const int64_t fill = std::max(1, 80 / (plan.half_subs * m.layers[1].inputs)),
                fit = std::max<int64_t>(1, (1 << 15) / plan.cells()), group = std::min(fill, fit);
  int most = m.representation.channels;  // the image of atoms near walls lies where maps of layers will
  for (const Layer& layer : m.layers) most = std::max(most, layer.outputs);
  const int channels = m.layers[0].outputs;
  const std::vector<float>& start = m.start_of_layer_1();
  in_groups(n, group, threads, m.scratches, [&](int64_t first, int64_t last, Scratch& scratch) {
    const int states = static_cast<int>(last - first);
    const int64_t size = voxels * most;
    float* memory = scratch.box[0].need(2 * group * size);
    std::vector<float*> in, spare, q;
    bool clipped = false;
    const QBox all = m.grid.whole();
    for (int s = 0; s < states; ++s) {
      in.push_back(memory + 2 * s * size);
      spare.push_back(in.back() + size);
      q.push_back(out.data() + (first + s) * map);
      std::copy(start.begin(), start.end(), in[s]);
      std::fill_n(spare[s], voxels * m.representation.channels, 0.0f);
      for (const Placed& atom : atoms(first + s)) {
        Three begin, end;
        if (m.clip(atom, begin, end)) {
          m.splat(atom, spare[s]);
          clipped = true;
        } else {
          m.add_atom(atom, all, in[s], scratch.box[1]);
        }
      }
    }
    // Stamps that walls cut off are made anew for each atom; a transform of their image costs less. To a state without
    // such atoms it adds zeros.
    if (clipped) {
      std::vector<float*> sums;
      for (int s = 0; s < states; ++s) sums.push_back(scratch.box[1].need(group * size) + s * size);
      convolve_fft(*m.whole[0], m.layers[0], m.grid, m.kernels, scratch, states, spare.data(), all, sums.data(), all,
                   [&](int s, int z, int y, const float* row) {
                     float* to = in[s] + (int64_t{z} * m.grid.n[1] + y) * m.grid.n[2] * channels;
                     for (int k = 0; k < m.grid.n[2] * channels; ++k) to[k] += row[k];
                   });
    }
    for (float* values : in) m.kernels.leaky(voxels * channels, values);
    m.grid_pass(states, in.data(), spare.data(), q.data(), scratch);
  });
  return out;
}

// Seconds, roughly: what the transforms and the products take at the rates that AVX2 gives them.
double QMap::Impl::cost(const LayerFft* plan, const Layer& layer) const {
  if (plan == nullptr) return 1e30;
  const double cells = static_cast<double>(plan->cells());
  const double lanes = static_cast<double>(plan->half_subs * (layer.inputs + layer.outputs) + kernels.lanes);
  return cells * (lanes * 4.0 * std::log2(cells + 1) / 12e9 +
                  8.0 * plan->half_subs * layer.inputs * (layer.outputs + 4) / 30e9);
}

double QMap::Impl::direct_cost(int l) const {
  const Layer& layer = layers[static_cast<std::size_t>(l)];
  double pairs = static_cast<double>(layer.taps());
  for (int a = 0; a < 3; ++a) pairs *= std::min(largest[static_cast<std::size_t>(l) - 1].count[a], grid.n[a]);
  return 2.0 * pairs * layer.inputs * layer.outputs / 15e9;
}

// A layer's activations changed and what they were put aside.
double QMap::Impl::keeping_cost(int l) const {
  double floats = layers[static_cast<std::size_t>(l)].outputs;
  for (int a = 0; a < 3; ++a) floats *= std::min(largest[static_cast<std::size_t>(l)].count[a], grid.n[a]);
  return floats * 1.5e-9;
}

double QMap::Impl::gather_cost(int64_t asked) const {
  const Layer& last = layers.back();
  return 2.0 * static_cast<double>(asked * last.taps()) * last.inputs * last.outputs / 25e9;
}

QMethod QMap::choose(std::int64_t asked) const {
  const Impl& m = *impl_;
  const double gather = m.gather_cost(asked);
  double direct = gather, local = m.keeps_last ? 0 : gather, whole = 0;
  for (int l = 1; l < m.hidden(); ++l) direct += m.direct_cost(l) + m.keeping_cost(l);
  for (int l = 1; l < m.kept(); ++l) local += m.cost(m.local[l].get(), m.layers[l]) + m.keeping_cost(l);
  for (std::size_t l = 1; l < m.layers.size(); ++l) whole += m.cost(m.whole[l].get(), m.layers[l]);
  if (whole <= std::min(direct, local)) return QMethod::grid_fft;
  return local <= direct ? QMethod::local_fft : QMethod::direct;
}

// ---- states -------------------------------------------------------------------------------------------------
std::size_t QDelta::bytes() const {
  std::size_t floats = 0;
  for (const std::vector<float>& v : values_) floats += v.size();
  return floats * sizeof(float);
}

struct QState::Impl {
  std::shared_ptr<const QMap> owner;
  const QMap::Impl& m;
  QMethod method;
  bool has_last = false;        // the last layer's pre-activations are kept
  std::vector<Layout> layouts;  // of the activations that are kept: all layers, all hidden ones, or layer 1
  std::vector<Floats> activations;
  std::vector<Placed> placed;
  std::vector<std::uint64_t> history;  // a hash of the map and the atoms placed, in order
  std::vector<QDelta> steps;           // what the boxes held before
  std::vector<QDelta> pool;            // their memory, for the next ones
  Scratch scratch;
  std::vector<int64_t> offsets;
  std::vector<std::int32_t> voxels;
  std::vector<float> values;
  bool whole_known = false;  // values hold Q of the whole grid (grid_fft)

  Impl(std::shared_ptr<const QMap> map, QMethod wanted) : owner(std::move(map)), m(*owner->impl_), method(wanted) {
    history.push_back(m.id);
    if (method == QMethod::automatic) method = owner->choose(m.usually_asked());
    if ((method == QMethod::grid_fft && !m.grid_fft_possible()) ||
        (method == QMethod::local_fft && !m.local_fft_possible()))
      throw Error("this grid needs Fourier transforms of more than " + text(kMostFft) +
                  " cells; choose the method `direct`");
    has_last = method == QMethod::local_fft && m.keeps_last;
    const int kept = method == QMethod::grid_fft ? 1 : has_last ? m.kept() : m.hidden();
    const QMap::Impl::Empty& empty = m.empty_state();
    for (int l = 0; l < kept; ++l) {
      const bool summed = method != QMethod::grid_fft && !has_last && l + 1 == kept;
      const int channels = m.layers[static_cast<std::size_t>(l)].outputs;
      layouts.push_back(summed ? m.gather_layout : Layout::plain(m.grid, channels));
      const Layout& layout = layouts.back();
      activations.emplace_back();
      float* data = activations.back().need(layout.floats);
      for (int z = 0; z < m.grid.n[0]; ++z)
        for (int y = 0; y < m.grid.n[1]; ++y) {
          float* row = data + z * layout.plane + y * layout.row;
          for (int x = 0; x < m.grid.n[2]; ++x)
            std::copy_n(empty.at(l, channels, z, y, x), channels, row + layout.column[static_cast<std::size_t>(x)]);
          repeat_images(m.grid, layout, m.grid.whole(), row);
        }
    }
  }

  void place(const Placed& atom) {
    m.check(atom);
    QDelta step;
    if (!pool.empty()) {
      step = std::move(pool.back());
      pool.pop_back();
    }
    step.placed_ = atom;
    step.boxes_.clear();
    step.values_.resize(layouts.size());
    QBox box = m.stamp_box(atom);
    float* change = scratch.box[0].need(box.voxels() * m.layers[0].outputs);
    std::fill_n(change, box.voxels() * m.layers[0].outputs, 0.0f);
    m.add_atom(atom, box, change, scratch.box[1]);
    for (std::size_t l = 0; l < layouts.size(); ++l) {
      const QBox from = box;
      const Layer& layer = m.layers[l];
      if (l > 0) box = m.grid.fold(Grid::grown(from, layer.reach()));
      const Layout& layout = layouts[l];
      columns_of(m.grid, layout, box, offsets);
      std::vector<float>& saved = step.values_[l];
      saved.resize(static_cast<std::size_t>(box.voxels() * layout.channels));
      const int64_t size = int64_t{box.count[2]} * layout.channels;
      const int ahead = method == QMethod::direct ? 1 : layer.dilation[1];  // rows: what comes soon
      const float* in = change;
      if (l > 0) change = scratch.box[l % 2].need(box.voxels() * layer.outputs);
      // A row of changed pre-activations becomes one of changed activations, for the next layer.
      const auto update = [&](int, int z, int y, float* row) {
        const int64_t position = (int64_t{z} * box.count[1] + y) * size;
        float* data = activations[l].data() + row_of(m.grid, layout, box, z, y);
        m.kernels.update(box.count[2], layout.channels, l == static_cast<std::size_t>(m.hidden()), offsets.data(), data,
                         ahead * layout.row, row, saved.data() + position);
        repeat_images(m.grid, layout, box, data);
      };
      if (l > 0 && method != QMethod::direct) {
        convolve_fft(*m.local[l], layer, m.grid, m.kernels, scratch, 1, &in, from, &change, box, update);
      } else {
        if (l > 0)
          convolve_direct(layer, m.packed_layers()[l], m.grid, m.kernels, scratch, in, from, change, box, false);
        for (int z = 0; z < box.count[0]; ++z)
          for (int y = 0; y < box.count[1]; ++y) update(0, z, y, change + (int64_t{z} * box.count[1] + y) * size);
      }
      step.boxes_.push_back(box);
    }
    push(std::move(step));
  }

  void push(QDelta step) {
    const Placed atom = step.placed_;
    step.parent_ = history.back();
    placed.push_back(atom);
    std::uint64_t hash = history.back() ^ (static_cast<std::uint64_t>(atom.voxel) * 1024 + atom.species + 1);
    hash = (hash ^ (hash >> 31)) * 0x9e3779b97f4a7c15ull;  // SplitMix64's mixing
    history.push_back(hash ^ (hash >> 29));
    steps.push_back(std::move(step));
    whole_known = false;
  }

  void exchange(QDelta& step) {
    for (std::size_t l = 0; l < layouts.size(); ++l) {
      const Layout& layout = layouts[l];
      const QBox& box = step.boxes_[l];
      float *data = activations[l].data(), *saved = step.values_[l].data();
      columns_of(m.grid, layout, box, offsets);
      for (int z = 0; z < box.count[0]; ++z)
        for (int y = 0; y < box.count[1]; ++y, saved += int64_t{box.count[2]} * layout.channels) {
          float* row = data + row_of(m.grid, layout, box, z, y);
          m.kernels.exchange(box.count[2], layout.channels, offsets.data(), row, layout.row, saved);
          repeat_images(m.grid, layout, box, row);
        }
    }
  }

  QDelta undo() {
    if (steps.empty()) throw Error("no atom is placed, so there is none to take back");
    QDelta step = std::move(steps.back());
    steps.pop_back();
    placed.pop_back();
    history.pop_back();
    exchange(step);
    whole_known = false;
    return step;
  }

  void apply(QDelta step) {
    if (step.values_.size() != layouts.size())
      throw Error("this change belongs to a state of another method or network; expand the present one");
    if (step.parent_ != history.back())
      throw Error("this change belongs to a state with other atoms placed or of another map; expand the present one");
    exchange(step);
    push(std::move(step));
  }

  void whole_grid() {
    if (whole_known) return;
    int most = 0;
    for (const Layer& layer : m.layers) most = std::max(most, layer.outputs);
    const int64_t size = m.grid.voxels() * most;
    float *first = scratch.box[0].need(size), *spare = scratch.box[1].need(size);
    std::copy_n(activations[0].data(), layouts[0].floats, first);
    values.resize(static_cast<std::size_t>(m.grid.voxels() * m.species()));
    float* q = values.data();
    m.grid_pass(1, &first, &spare, &q, scratch);
    whole_known = true;
  }

  void q(std::span<const std::int64_t> asked, float* out) {
    const int64_t n = static_cast<int64_t>(asked.size());
    const int species = m.species();
    for (const int64_t v : asked) m.check_voxel(v);
    if (method == QMethod::grid_fft) {
      whole_grid();
      for (int s = 0; s < species; ++s)
        for (int64_t k = 0; k < n; ++k)
          out[s * n + k] = values[static_cast<std::size_t>(s * m.grid.voxels() + asked[k])];
      return;
    }
    values.resize(static_cast<std::size_t>(n * species));
    if (has_last) {
      const float* last = activations.back().data();
      for (int64_t k = 0; k < n; ++k) std::copy_n(last + asked[k] * species, species, values.data() + k * species);
      finish(m.kernels, n, species, values.data(), out);
      return;
    }
    voxels.resize(static_cast<std::size_t>(3 * n));
    for (int64_t k = 0; k < n; ++k) {
      const Three at = m.position(asked[k]);
      std::copy(at.begin(), at.end(), voxels.begin() + 3 * k);
    }
    const Layer& layer = m.layers.back();
    // Along y of a grid of two directions there is one row, and dilation is one there.
    Gather job{};
    job.rows_z = layer.kernel[0];
    job.rows_y = layer.kernel[1];
    job.outputs = layer.outputs;
    job.padded = m.gather_padded;
    job.step = layer.dilation[0];
    job.plane_stride = m.gather_layout.plane;
    job.row_stride = m.gather_layout.row;
    job.plane = m.gather_plane.data();
    job.row = m.gather_row.data();
    job.column = m.gather_column.data();
    job.weights = m.packed_gather();
    job.bias = layer.bias;
    job.in = activations.back().data();
    m.kernels.gather(job, voxels.data(), n, values.data());
    finish(m.kernels, n, species, values.data(), out);
  }
};

QState::QState(std::shared_ptr<const QMap> map, QMethod method) {
  if (!map) throw Error("a state needs a Q-map, but there is none");
  impl_ = std::make_unique<Impl>(std::move(map), method);
}
QState::~QState() = default;
QState::QState(QState&&) noexcept = default;
QState& QState::operator=(QState&&) noexcept = default;

std::span<const Placed> QState::placed() const { return impl_->placed; }
QMethod QState::method() const { return impl_->method; }
void QState::place(std::int32_t species, std::int64_t voxel) { impl_->place({species, voxel}); }
void QState::undo() { impl_->pool.push_back(impl_->undo()); }
QDelta QState::retract() { return impl_->undo(); }
QDelta QState::expand(std::int32_t species, std::int64_t voxel) {
  impl_->place({species, voxel});
  return impl_->undo();
}
void QState::apply(QDelta delta) { impl_->apply(std::move(delta)); }

void QState::q(std::span<const std::int64_t> voxels, std::span<float> out) {
  const std::size_t wanted = voxels.size() * static_cast<std::size_t>(impl_->m.species());
  if (out.size() != wanted)
    throw Error("out must hold species x voxels, " + text(static_cast<int64_t>(wanted)) + " values, but it holds " +
                text(static_cast<int64_t>(out.size())));
  impl_->q(voxels, out.data());
}

std::vector<float> QState::q() {
  std::vector<std::int64_t> all(static_cast<std::size_t>(impl_->m.grid.voxels()));
  for (std::size_t k = 0; k < all.size(); ++k) all[k] = static_cast<std::int64_t>(k);
  std::vector<float> out(all.size() * static_cast<std::size_t>(impl_->m.species()));
  impl_->q(all, out.data());
  return out;
}

}  // namespace thalweg
