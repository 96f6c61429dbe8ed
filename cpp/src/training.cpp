#include "thalweg/training.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "buffer.hpp"
#include "isa.hpp"
#include "training_kernels.hpp"

namespace thalweg {

THALWEG_DISPATCH(TrainingKernels, training_kernels)

namespace {

// What the derivative of tanh counts for at least: at the true one, a network that has run into saturation never leaves
// it.
constexpr double kLeastSlope = 1e-3;

static_assert(QNetworkShape::kHidden == kHidden);

constexpr int kLayers = 4;
constexpr int kMostSlots = 8;                    // partial sums that threads fill; fixed, so that sums are
constexpr std::int64_t kMostPoints = 1LL << 26;  // of a box

bool is_smooth(int n) {
  for (const int prime : {2, 3, 5, 7, 13})
    while (n % prime == 0) n /= prime;
  return n == 1;
}

int smooth_at_least(int n) {
  while (!is_smooth(n)) ++n;
  return n;
}

/// Transforms of boxes in two or three directions z, y, x (two: size[0] = 1).
struct Plan {
  /// Frequencies (kx, ky) and (-kx, -ky) of the directions but the innermost, which is z, in two dimensions y.
  struct Column {
    int kx, ky, minus_ky;
    bool alone;  // its own negative
    int first;   // pair of frequencies
  };

  int size[3], inner, middle;  // middle: how many ky that are not innermost
  Fft fft[3];
  std::vector<float> twiddles[3];
  std::vector<Column> columns;
  std::vector<std::int32_t> crossed, own;  // pairs within two columns side by side, or within one that stands alone
  int pairs;

  std::size_t frequencies() const {
    return static_cast<std::size_t>(size[0]) * static_cast<std::size_t>(size[1]) * static_cast<std::size_t>(size[2]);
  }
  /// Floats of a column and its negative.
  std::size_t column(int cells) const { return static_cast<std::size_t>(2 * cells * size[inner]) * kCell; }

  void make(int dimension, const int* sizes) {
    inner = dimension == 3 ? 0 : 1;
    for (int d = 0; d < 3; ++d) {
      const int n = size[d] = sizes[d];
      fft[d].n = n;
      fft[d].stages = 0;
      int rest = n;
      for (const int radix : {13, 7, 5, 4, 3, 2})
        while (rest % radix == 0) {
          fft[d].radix[fft[d].stages++] = radix;
          rest /= radix;
        }
      twiddles[d].resize(2 * static_cast<std::size_t>(n));
      for (int j = 0; j < n; ++j) {
        const double angle = -2 * 3.141592653589793 * j / n;
        twiddles[d][2 * static_cast<std::size_t>(j)] = static_cast<float>(std::cos(angle));
        twiddles[d][2 * static_cast<std::size_t>(j) + 1] = static_cast<float>(std::sin(angle));
      }
      fft[d].twiddles = twiddles[d].data();
    }
    const int n = size[inner], nx = size[2];
    middle = dimension == 3 ? size[1] : 1;
    for (int k = 0; k < n; ++k) {
      const int minus = (n - k) % n;
      crossed.insert(crossed.end(), {k, n + minus});
      if (k <= minus) own.insert(own.end(), {k, minus});
    }
    pairs = 0;
    for (int kx = 0; kx <= (nx - kx) % nx; ++kx)
      for (int ky = 0; ky < middle; ++ky) {
        const int minus_ky = (middle - ky) % middle;
        const bool flat = kx == (nx - kx) % nx, alone = flat && ky == minus_ky;
        if (flat && ky > minus_ky) continue;
        columns.push_back({kx, ky, minus_ky, alone, pairs});
        pairs += static_cast<int>((alone ? own : crossed).size() / 2);
      }
  }
};

/// Channel pairs of a box, transformed along x: [kx][cell][z][y].
struct Half {
  float* data;
  int cells;
  const int* extent;
  /// Cells of a plane of rows; odd, or many kx would share few cache sets.
  static std::size_t plane(const int* extent) {
    return static_cast<std::size_t>(extent[0]) * static_cast<std::size_t>(extent[1]) | 1;
  }
  static std::size_t floats(const Plan& p, int cells, const int* extent) {
    return static_cast<std::size_t>(p.size[2] * cells) * plane(extent) * kCell;
  }
  float* at(int kx, int cell) const {
    return data + static_cast<std::size_t>(kx * cells + cell) * plane(extent) * kCell;
  }
};

/// Between a box's plane of cells and a cell of its Half.
void along_x(const Plan& p, bool inverse, float* plane, const Half& half, int cell, float* scratch) {
  const int nx = p.size[2], width = half.extent[2], rows = half.extent[0] * half.extent[1];
  const Lines::Steps box{width * std::ptrdiff_t{kCell}, kCell, 2 * width * std::ptrdiff_t{kCell}},
      spectrum{kCell, half.at(1, 0) - half.at(0, 0), 2 * kCell};
  if (inverse)
    training_kernels().lines(p.fft[2], {true, rows, nx, width, half.at(0, cell), plane, spectrum, box}, scratch);
  else
    training_kernels().lines(p.fft[2], {false, rows, width, nx, plane, half.at(0, cell), box, spectrum}, scratch);
}

std::size_t sweep_scratch(const Plan& p, int cells, const int* extent) {
  return static_cast<std::size_t>(2 * cells * extent[p.inner] * (p.middle | 1)) * kCell + p.column(cells);
}

/// Of a sweep with boxes on one side only.
std::size_t kernel_scratch_size(const Plan& p, int cells, const int* extent) {
  return sweep_scratch(p, cells, extent) +
         static_cast<std::size_t>(2 * std::max({p.size[0], p.size[1], p.size[2]})) * kCell;
}

/// Takes every pair of columns from half-transformed boxes to its spectrum [cell][column, its negative], calls
/// body(pairs, first pair, spectra in, spectra out), and takes what that leaves back. Only one kx and its negative are
/// on the way at a time: from the first to the last read they stay in the cache. kept: where spectra are to stay, null:
/// nowhere. in.data or out.data null: there is nothing to take.
template <class Body>
void sweep(const Plan& p, const Half& in, float* kept, const Half& out, float* scratch, Body body) {
  const TrainingKernels& k = training_kernels();
  const int n = p.size[p.inner], nx = p.size[2];
  const bool solid = p.inner == 0;
  const std::ptrdiff_t line = (p.middle | 1) * std::ptrdiff_t{kCell};
  float* const slabs[2] = {scratch, scratch + 2 * in.cells * in.extent[p.inner] * line};
  float* column_in = slabs[1] + 2 * out.cells * out.extent[p.inner] * line;
  float* column_out = column_in + p.column(in.cells);
  float* line_scratch = column_out + p.column(out.cells);
  const auto slab = [&](int which, const Half& half, int side, int cell) {
    return slabs[which] + (side * half.cells + cell) * half.extent[p.inner] * line;
  };
  const auto along_y = [&](bool inverse, const Half& half, int which, int side, int kx) {
    const int lines = half.extent[0], width = half.extent[1];
    const Lines::Steps far{width * std::ptrdiff_t{kCell}, kCell, 2 * width * std::ptrdiff_t{kCell}},
        near{line, kCell, 0};
    for (int j = 0; j < half.cells; ++j)
      if (inverse)
        k.lines(p.fft[1], {true, lines, p.middle, width, slab(which, half, side, j), half.at(kx, j), near, far},
                line_scratch);
      else
        k.lines(p.fft[1], {false, lines, width, p.middle, half.at(kx, j), slab(which, half, side, j), far, near},
                line_scratch);
  };
  std::size_t c = 0;
  for (int kx = 0; kx <= (nx - kx) % nx; ++kx) {
    const int both[2] = {kx, (nx - kx) % nx}, sides = kx == both[1] ? 1 : 2;
    for (int side = 0; solid && in.data != nullptr && side < sides; ++side) along_y(false, in, 0, side, both[side]);
    for (; c < p.columns.size() && p.columns[c].kx == kx; ++c) {
      const Plan::Column& column = p.columns[c];
      float* spectra = kept == nullptr ? column_in : kept + c * p.column(in.cells);
      const std::vector<std::int32_t>& pair = column.alone ? p.own : p.crossed;
      // where a half's column starts, and its steps
      const auto place = [&](const Half& half, int which, int side) {
        const int of = sides == 1 ? 0 : side, ky = side == 0 ? column.ky : column.minus_ky;
        return solid ? slab(which, half, of, 0) + ky * kCell : half.at(both[of], 0);
      };
      const auto steps = [&](const Half& half) {
        return solid ? Lines::Steps{half.extent[0] * line, line, kCell}
                     : Lines::Steps{half.at(0, 1) - half.at(0, 0), kCell, 0};
      };
      const std::ptrdiff_t later = kept == nullptr ? 0 : static_cast<std::ptrdiff_t>(p.column(in.cells));
      for (int side = 0; in.data != nullptr && side < (column.alone ? 1 : 2); ++side)
        k.lines(p.fft[p.inner],
                {false,
                 in.cells,
                 in.extent[p.inner],
                 n,
                 place(in, 0, side),
                 spectra + side * n * kCell,
                 steps(in),
                 {2 * n * std::ptrdiff_t{kCell}, kCell, later}},
                line_scratch);
      body(Pairs{2 * n * std::ptrdiff_t{kCell}, static_cast<int>(pair.size() / 2), pair.data()},
           static_cast<std::size_t>(column.first), spectra, column_out);
      for (int side = 0; out.data != nullptr && side < (column.alone ? 1 : 2); ++side)
        k.lines(p.fft[p.inner],
                {true,
                 out.cells,
                 n,
                 out.extent[p.inner],
                 column_out + side * n * kCell,
                 place(out, 1, side),
                 {2 * n * std::ptrdiff_t{kCell}, kCell, 0},
                 steps(out)},
                line_scratch);
    }
    for (int side = 0; solid && out.data != nullptr && side < sides; ++side) along_y(true, out, 1, side, both[side]);
  }
}

std::string tuple(const int* values, int count) {
  std::string out = "(";
  for (int d = 0; d < count; ++d) out += (d > 0 ? ", " : "") + std::to_string(values[d]);
  return out + ")";
}

std::size_t size_of(int n) { return static_cast<std::size_t>(n); }

}  // namespace

struct QTraining::Impl {
  explicit Impl(const QNetworkShape& wanted);

  // One call.
  struct Call {
    const QNetworkWeights& weights;
    const StateActions& pairs;
    std::span<const float> targets, pull;  // one of them, or none to evaluate only
    std::span<float> q;
    bool backward, wants_kernels;
    int channel_pairs;                   // of the images
    double scale;                        // of the loss' derivative
    std::span<const std::size_t> order;  // of samples: the first `stamped` ones need no images
    std::size_t stamped;
  };

  /// A stretch of one direction where a stamp covers the box of a_1.
  struct Run {
    int phase, box, stamp, count;
  };
  // Buffers of one thread.
  struct Arena {
    Floats image, activation, last, spectrum[3], half[2], delta, scratch, few[3];
    std::vector<std::uint32_t> signs[kLayers];
    Floats masks[kLayers];
    std::vector<float> u, du;
    Floats rows, delta_rows;                    // (8 samples, slab_rows, row_size)
    std::vector<std::vector<Piece>> pieces[2];  // per slab, of the first and the last eight samples
  };

  // What one share of the groups adds up to.
  struct Slot {
    Floats sums[3];
    std::vector<float> last, kernels;  // (species, kHidden, points), (species, window)
    std::array<std::array<double, kHidden>, 3> bias{};
    std::vector<double> last_bias, shift;
    Floats stamps;
    std::array<double, kHidden> constant{};  // bias gradient of the stamped groups alone
    bool has_sums = false;                   // of the first layer
    double loss = 0;
  };

  // Where the points of one layer's box (0: image) sit in the grid.
  int coordinate(int d, int layer, int index, int action) const { return action + step[d] * (index - centre[layer]); }

  void check(const QNetworkWeights& weights, const StateActions& pairs) const;
  double run(const QNetworkWeights& weights, const StateActions& pairs, std::span<const float> targets,
             std::span<const float> pull, std::span<float> q, const QNetworkGradient& out, bool backward, int threads);
  void prepare_weights(const QNetworkWeights& weights, bool first);
  void crop_kernels(std::span<const float> kernels, bool whole);
  void group(const Call& call, std::size_t g, Arena& arena, Slot& slot, Slot& spectra, bool add);
  Box box(int layer, const Arena& arena, bool masked) const;
  void splat(const Call& call, std::size_t lane, std::size_t sample, float* plane, float* gradient) const;
  void position(std::int32_t voxel, int* out) const;
  void make_stamps(const QNetworkWeights& weights);
  int kernel_element(const int* phase, int z, int y, int x) const;
  bool is_clean(const StateActions& pairs, std::size_t sample, bool constant) const;
  void find_pieces(const Call& call, std::size_t lane, std::size_t sample,
                   std::vector<std::vector<Piece>>& pieces) const;
  std::size_t points(int layer) const {
    return size_of(extent[layer][0]) * size_of(extent[layer][1]) * size_of(extent[layer][2]);
  }
  int inputs(int layer) const { return layer == 0 ? shape.species : kHidden; }
  std::size_t parameter_offset(int layer, bool bias) const {
    std::size_t at = 0;
    for (int l = 0; l < kLayers; ++l) {
      const std::size_t out = size_of(l == kLayers - 1 ? shape.species : kHidden), in = size_of(inputs(l));
      if (l == layer && !bias) return at;
      at += out * in * taps;
      if (l == layer) return at;
      at += out;
    }
    return at;
  }

  QNetworkShape shape;
  // Directions z, y, x; a plane has z of one voxel.
  int grid[3] = {1, 1, 1}, step[3] = {1, 1, 1}, reach[3] = {0, 0, 0};
  bool periodic[3] = {true, false, false}, torus[3] = {false, false, false};
  int centre[kLayers] = {0, 0, 0, 0};  // index of the action in each box (0: image, then a_1, a_2, a_3), not in z of 2D
  int extent[kLayers][3]{};
  std::size_t taps = 1;  // of a convolution kernel
  std::size_t window = 1;
  Plan plan[3];  // of the inputs of layers 1, 2, 3
  int weight_cells[3] = {0, 0, 0};
  std::size_t scratch_size = 0, half_size = 0;

  Floats weight_spectrum[3], kernel_planes, kernel_half, kernel_scratch;
  std::vector<Arena> arenas;
  std::vector<Slot> slots;
  std::vector<float> kernels;  // cropped to `used` around their middle, rows along x
  int used = 0;

  // The first layer without images: an atom adds its stamp, w_1 convolved with the part of its kernel that lies on the
  // lattice, to z_1. Stamps belong to (species, phase), phase = where the atom sits between lattice points.
  //   stamps [species][phase][kHidden][z][y][stamp.out_row]
  // Only where the whole kernel lies inside the grid and no constant is cut off by a wall; other samples take images.
  Stamp stamp{};
  int phases = 1, low[3] = {0, 0, 0};  // lattice points of a kernel before its middle
  int row_size = 0, row_begin = 0;     // of the arenas' rows: stamps may stick out on both sides
  int slab_rows = 1;                   // rows of a_1's box that are dealt with at a time, in the nearest cache
  std::size_t stamp_size = 0;          // of one channel
  Floats stamps, taps_reversed;        // (species, kHidden, z, y, tap_row)
  std::vector<float> lattice;          // (species, phase, stamp.kernel)
  std::vector<float> first_bias;       // with what the constants add in the middle of the grid
};

QTraining::Impl::Impl(const QNetworkShape& wanted) : shape(wanted) {
  if (shape.dimension != 2 && shape.dimension != 3)
    throw Error("dimension must be 2 or 3, but it is " + std::to_string(shape.dimension));
  if (shape.species < 1 || shape.species > kMostSpecies)
    throw Error("species must be 1 to " + std::to_string(kMostSpecies) + ", but it is " +
                std::to_string(shape.species));
  if (shape.kernel < 1 || shape.kernel % 2 == 0 || shape.kernel > 63)
    throw Error("kernel must be odd, 1 to 63, but it is " + std::to_string(shape.kernel));
  if (shape.dilation < 1 || shape.dilation > 64)
    throw Error("dilation must be 1 to 64, but it is " + std::to_string(shape.dilation));
  if (shape.half_window < 0 || shape.half_window > 100)
    throw Error("half_window must be 0 to 100, but it is " + std::to_string(shape.half_window));
  if (!(shape.slope >= 0 && shape.slope < 1))
    throw Error("slope must be at least 0 and below 1, but it is " + std::to_string(shape.slope));
  std::int64_t voxels = 1;
  for (int d = 0; d < shape.dimension; ++d) {
    if (shape.grid[size_of(d)] < 1)
      throw Error("grid must have at least one voxel per direction, but it is " +
                  tuple(shape.grid.data(), shape.dimension));
    voxels *= shape.grid[size_of(d)];
    if (voxels > (std::int64_t{1} << 31) - 1)
      throw Error("grid " + tuple(shape.grid.data(), shape.dimension) + " has more than 2^31 - 1 voxels");
  }
  const int k = shape.kernel, half = k / 2, first = 3 - shape.dimension;
  for (int layer = 0; layer < kLayers; ++layer) {
    centre[layer] = (kLayers - layer) * half;
    extent[layer][0] = 1;
  }
  int size[3][3];
  for (int layer = 0; layer < 3; ++layer) size[layer][0] = 1;
  for (int d = first; d < 3; ++d) {
    const std::size_t from = size_of(d - first);
    grid[d] = shape.grid[from];
    periodic[d] = shape.periodic[from];
    step[d] = shape.dilation;
    reach[d] = shape.half_window;
    taps *= size_of(k);
    window *= size_of(2 * shape.half_window + 1);
    // A periodic lattice that is smaller than its unfolded box is transformed as it is, if its length is smooth.
    const int length = grid[d] % step[d] == 0 ? grid[d] / step[d] : 0;
    torus[d] = periodic[d] && length >= k && length < 2 * centre[0] + 1 && is_smooth(length);
    for (int layer = 0; layer < kLayers; ++layer) {
      const int unfolded = 2 * centre[layer] + 1;
      extent[layer][d] = torus[d] ? std::min(unfolded, length) : unfolded;
      if (layer < 3) size[layer][d] = smooth_at_least(extent[layer][d]);
    }
  }
  if (shape.dimension == 2) periodic[0] = true;  // no walls
  for (int layer = 0; layer < 3; ++layer) {
    double frequencies = 1;
    for (int d = 0; d < 3; ++d) frequencies *= size[layer][d];
    if (frequencies > static_cast<double>(kMostPoints))
      throw Error("the box around an action has " + std::to_string(frequencies) +
                  " points, too many to train on; choose a smaller kernel or a dilation");
    plan[layer].make(shape.dimension, size[layer]);
    weight_cells[layer] = (inputs(layer) * kHidden + kCell - 1) / kCell;
    const int longest = std::max({size[layer][0], size[layer][1], size[layer][2]});
    const int in_cells = (inputs(layer) + 1) / 2;
    scratch_size = std::max(scratch_size, sweep_scratch(plan[layer], in_cells, extent[layer]) +
                                              sweep_scratch(plan[layer], kHiddenCells, extent[layer + 1]) +
                                              size_of(2 * longest) * kCell);
    for (const std::size_t floats : {Half::floats(plan[layer], in_cells, extent[layer]),
                                     Half::floats(plan[layer], kHiddenCells, extent[layer + 1])})
      half_size = std::max(half_size, floats);
  }
}

void QTraining::Impl::position(std::int32_t voxel, int* out) const {
  for (int d = 2; d >= 0; --d) {
    out[d] = voxel % grid[d];
    voxel /= grid[d];
  }
}

void QTraining::Impl::check(const QNetworkWeights& weights, const StateActions& pairs) const {
  const auto expect = [](const char* name, std::size_t wanted, std::size_t came) {
    if (wanted != came)
      throw Error(std::string(name) + " must hold " + std::to_string(wanted) + " values, but it holds " +
                  std::to_string(came));
  };
  expect("parameters", parameter_offset(kLayers, false), weights.parameters.size());
  expect("kernels", size_of(shape.species) * window, weights.kernels.size());
  expect("shift", size_of(shape.species), weights.shift.size());
  if (pairs.offsets.empty() || pairs.offsets[0] != 0) throw Error("offsets must start at 0 and have n + 1 entries");
  for (std::size_t i = 0; i < pairs.size(); ++i)
    if (pairs.offsets[i + 1] < pairs.offsets[i])
      throw Error("offsets must not fall, but they do after state " + std::to_string(i));
  expect("placed", 2 * static_cast<std::size_t>(pairs.offsets.back()), pairs.placed.size());
  expect("actions", 2 * pairs.size(), pairs.actions.size());
  const std::int64_t voxels = std::int64_t{grid[0]} * grid[1] * grid[2];
  for (const auto& [name, rows] : {std::pair{"placed", pairs.placed}, std::pair{"actions", pairs.actions}})
    for (std::size_t i = 0; i < rows.size(); i += 2)
      if (rows[i] < 0 || rows[i] >= shape.species || rows[i + 1] < 0 || rows[i + 1] >= voxels)
        throw Error(std::string(name) + " row " + std::to_string(i / 2) + " is species " + std::to_string(rows[i]) +
                    ", voxel " + std::to_string(rows[i + 1]) + "; expected species below " +
                    std::to_string(shape.species) + " and voxels below " + std::to_string(voxels));
}

/// Values below 1e-8 of the largest change no bit that matters; their gradient does, so `whole` keeps them.
void QTraining::Impl::crop_kernels(std::span<const float> all, bool whole) {
  const int half = shape.half_window, edge = 2 * half + 1;
  const bool solid = shape.dimension == 3;
  const auto at = [&](std::size_t s, int z, int y, int x) {
    const int row = solid ? (z + half) * edge + y + half : y + half;
    return all[s * window + size_of(row * edge + x + half)];
  };
  used = half;
  if (!whole) {
    float largest = 0;
    for (const float v : all) largest = std::max(largest, std::abs(v));
    used = 0;
    for (std::size_t s = 0; s < size_of(shape.species); ++s)
      for (int z = solid ? -half : 0; z <= (solid ? half : 0); ++z)
        for (int y = -half; y <= half; ++y)
          for (int x = -half; x <= half; ++x)
            if (std::abs(at(s, z, y, x)) > 1e-8f * largest)
              used = std::max({used, std::abs(z), std::abs(y), std::abs(x)});
  }
  for (int d = 3 - shape.dimension; d < 3; ++d) reach[d] = used;
  kernels.clear();
  for (std::size_t s = 0; s < size_of(shape.species); ++s)
    for (int z = -reach[0]; z <= reach[0]; ++z)
      for (int y = -used; y <= used; ++y)
        for (int x = -used; x <= used; ++x) kernels.push_back(at(s, z, y, x));
}

void QTraining::Impl::prepare_weights(const QNetworkWeights& weights, bool first) {
  const TrainingKernels& k = training_kernels();
  const int edge = shape.kernel;
  const int window_extent[3] = {shape.dimension == 3 ? edge : 1, edge, edge};
  for (int layer = first ? 0 : 1; layer < 3; ++layer) {
    const Plan& p = plan[layer];
    const int count = inputs(layer) * kHidden, cells = weight_cells[layer];
    const float* w = weights.parameters.data() + parameter_offset(layer, false);
    float* planes = kernel_planes.need(taps * kCell);
    const Half half{kernel_half.need(Half::floats(p, cells, window_extent)), cells, window_extent};
    float* scratch = kernel_scratch.need(kernel_scratch_size(p, cells, window_extent));
    for (int j = 0; j < cells; ++j) {
      for (int r = 0; r < kCell; ++r) {
        const int q = j * kCell + r;
        for (std::size_t tap = 0; tap < taps; ++tap)
          planes[tap * kCell + size_of(r)] = q < count ? w[size_of(q) * taps + tap] : 0.0f;
      }
      along_x(p, false, planes, half, j, scratch);
    }
    const std::size_t pair = size_of(2 * cells * kCell);
    float* out = weight_spectrum[layer].need(size_of(p.pairs) * pair);
    const float scale = 1.0f / static_cast<float>(p.frequencies());
    sweep(p, half, nullptr, {nullptr, 0, window_extent}, scratch,
          [&](const Pairs& pairs, std::size_t first_pair, const float* spectrum, float*) {
            k.split(pairs, size_of(cells), spectrum, scale, out + first_pair * pair);
          });
  }
}

Box QTraining::Impl::box(int layer, const Arena& arena, bool masked) const {
  Box out{};
  const float* mask = arena.masks[layer].data();
  for (int d = 0; d < 3; ++d) {
    out.extent[d] = extent[layer][d];
    out.mask[d] = masked ? mask : nullptr;
    mask += extent[layer][d] * kCell;
  }
  return out;
}

/// Adds the images of one sample's atoms to its lanes of plane (species pairs, points) cells; with `gradient` the
/// derivative with respect to the plane is there instead, and each kernel's goes to gradient (species, used window).
void QTraining::Impl::splat(const Call& call, std::size_t lane, std::size_t sample, float* plane,
                            float* gradient) const {
  struct Hit {
    int index, offset;  // along one direction: point of the box, element of the kernel
  };
  std::vector<Hit> hits[3];
  const std::size_t part = lane % 8 + (lane < 8 ? 0 : kImaginary);
  int action[3], atom[3];
  position(call.pairs.actions[2 * sample + 1], action);
  const int edge_y = 2 * reach[1] + 1, edge_x = 2 * reach[2] + 1;
  const std::size_t size = size_of(2 * reach[0] + 1) * size_of(edge_y) * size_of(edge_x);
  for (std::int64_t row = call.pairs.offsets[sample]; row < call.pairs.offsets[sample + 1]; ++row) {
    const std::size_t species = size_of(call.pairs.placed[2 * static_cast<std::size_t>(row)]);
    position(call.pairs.placed[2 * static_cast<std::size_t>(row) + 1], atom);
    for (int d = 0; d < 3; ++d) {
      hits[d].clear();
      const int start = shape.dimension == 2 && d == 0 ? 0 : -step[d] * centre[0];
      const int finish = start + step[d] * (extent[0][d] - 1);
      for (int r = -reach[d]; r <= reach[d]; ++r) {
        const int place = atom[d] + r;
        if (!periodic[d] && (place < 0 || place >= grid[d])) continue;
        int along = place - action[d];
        if (!periodic[d]) {
          if (along >= start && along <= finish && (along - start) % step[d] == 0)
            hits[d].push_back({(along - start) / step[d], r + reach[d]});
          continue;
        }
        // every image within the box
        along = start + ((along - start) % grid[d] + grid[d]) % grid[d];
        for (; along <= finish; along += grid[d])
          if ((along - start) % step[d] == 0) hits[d].push_back({(along - start) / step[d], r + reach[d]});
      }
    }
    float* cells = plane + species / 2 * points(0) * kCell + species % 2 * kSecond + part;
    const float* kernel = kernels.data() + species * size;
    float* out = gradient == nullptr ? nullptr : gradient + species * size;
    for (const Hit& z : hits[0])
      for (const Hit& y : hits[1]) {
        float* line = cells + static_cast<std::size_t>((z.index * extent[0][1] + y.index) * extent[0][2]) * kCell;
        const std::size_t from = size_of((z.offset * edge_y + y.offset) * edge_x);
        if (out == nullptr)
          for (const Hit& x : hits[2]) line[x.index * kCell] += kernel[from + size_of(x.offset)];
        else
          for (const Hit& x : hits[2]) out[from + size_of(x.offset)] += line[x.index * kCell];
      }
  }
}

void QTraining::Impl::make_stamps(const QNetworkWeights& weights) {
  const TrainingKernels& k = training_kernels();
  const std::size_t species = size_of(shape.species);
  phases = 1;
  for (int d = 0; d < 3; ++d) {
    low[d] = reach[d] / step[d];
    stamp.kernel[d] = low[d] + (reach[d] + step[d] - 1) / step[d] + 1;
    stamp.taps[d] = shape.dimension == 2 && d == 0 ? 1 : shape.kernel;
    stamp.out[d] = stamp.kernel[d] + stamp.taps[d] - 1;
    phases *= step[d];
  }
  const int tap_width = (stamp.taps[2] + 7) / 8 * 8;
  stamp.out_row = (stamp.kernel[2] - 1 + tap_width + 7) / 8 * 8;
  stamp.tap_begin = stamp.kernel[2] - 1;
  stamp.tap_row = stamp.tap_begin + stamp.out_row;
  stamp_size = size_of(stamp.out[0]) * size_of(stamp.out[1]) * size_of(stamp.out_row);
  row_begin = 8;
  row_size = row_begin + (extent[1][2] + 7) / 8 * 8 + 8;
  slab_rows = std::max(1, (1 << 13) / (8 * row_size));  // 32 KB
  const std::size_t kernel_size = size_of(stamp.kernel[0]) * size_of(stamp.kernel[1]) * size_of(stamp.kernel[2]);
  const std::size_t tap_size = size_of(stamp.taps[0]) * size_of(stamp.taps[1]) * size_of(stamp.tap_row);

  lattice.assign(species * size_of(phases) * kernel_size + 8, 0.0f);  // the kernels look beyond the end
  const int edge_y = 2 * reach[1] + 1, edge_x = 2 * reach[2] + 1;
  std::size_t at = 0;
  for (std::size_t s = 0; s < species; ++s)
    for (int phase = 0; phase < phases; ++phase) {
      const int f[3] = {phase / (step[1] * step[2]), phase / step[2] % step[1], phase % step[2]};
      for (int z = 0; z < stamp.kernel[0]; ++z)
        for (int y = 0; y < stamp.kernel[1]; ++y)
          for (int x = 0; x < stamp.kernel[2]; ++x, ++at) {
            const int from = kernel_element(f, z, y, x);
            if (from >= 0) lattice[at] = kernels[s * size_of((2 * reach[0] + 1) * edge_y * edge_x) + size_of(from)];
          }
    }
  float* reversed = taps_reversed.need(species * kHidden * tap_size);
  std::memset(reversed, 0, species * kHidden * tap_size * sizeof(float));
  const float* w = weights.parameters.data();
  first_bias.assign(weights.parameters.begin() + static_cast<std::ptrdiff_t>(parameter_offset(0, true)),
                    weights.parameters.begin() + static_cast<std::ptrdiff_t>(parameter_offset(0, true)) + kHidden);
  for (std::size_t s = 0; s < species; ++s)
    for (std::size_t o = 0; o < kHidden; ++o) {
      const float* from = w + (o * species + s) * taps;
      float* to = reversed + (s * kHidden + o) * tap_size;
      double sum = 0;
      for (std::size_t t = 0; t < taps; ++t) {
        const std::size_t back = taps - 1 - t, line = back / size_of(stamp.taps[2]);
        to[line * size_of(stamp.tap_row) + size_of(stamp.tap_begin) + back % size_of(stamp.taps[2])] = from[t];
        sum += static_cast<double>(from[t]);
      }
      first_bias[o] += static_cast<float>(sum * static_cast<double>(weights.shift[s]));
    }
  float* out = stamps.need(species * size_of(phases) * kHidden * stamp_size);
  std::memset(out, 0, species * size_of(phases) * kHidden * stamp_size * sizeof(float));
  for (std::size_t s = 0; s < species; ++s)
    for (std::size_t phase = 0; phase < size_of(phases); ++phase)
      k.stamp(stamp, lattice.data() + (s * size_of(phases) + phase) * kernel_size, reversed + s * kHidden * tap_size,
              out + (s * size_of(phases) + phase) * kHidden * stamp_size);
}

/// Which element of a cropped kernel a lattice point of this phase meets; -1: none.
int QTraining::Impl::kernel_element(const int* phase, int z, int y, int x) const {
  const int point[3] = {z, y, x};
  int at = 0;
  for (int d = 0; d < 3; ++d) {
    const int r = step[d] * (point[d] - low[d]) - phase[d] + reach[d];
    if (r < 0 || r > 2 * reach[d]) return -1;
    at = at * (2 * reach[d] + 1) + r;
  }
  return at;
}

/// No kernel of the sample's atoms, and with `constant` no box around it, is cut off by a wall.
bool QTraining::Impl::is_clean(const StateActions& pairs, std::size_t sample, bool constant) const {
  int at[3];
  if (constant) {
    position(pairs.actions[2 * sample + 1], at);
    for (int d = 0; d < 3; ++d)
      if (!periodic[d] && (at[d] - step[d] * centre[0] < 0 || at[d] + step[d] * centre[0] >= grid[d])) return false;
  }
  for (std::int64_t row = pairs.offsets[sample]; row < pairs.offsets[sample + 1]; ++row) {
    position(pairs.placed[2 * static_cast<std::size_t>(row) + 1], at);
    for (int d = 0; d < 3; ++d)
      if (!periodic[d] && (at[d] < reach[d] || at[d] + reach[d] >= grid[d])) return false;
  }
  return true;
}

/// Appends the stamps of a sample's atoms. Their rows may stick out of the box by a stamp's width.
void QTraining::Impl::find_pieces(const Call& call, std::size_t lane, std::size_t sample,
                                  std::vector<std::vector<Piece>>& pieces) const {
  std::vector<Run> runs[3];
  int action[3], atom[3];
  position(call.pairs.actions[2 * sample + 1], action);
  for (std::int64_t row = call.pairs.offsets[sample]; row < call.pairs.offsets[sample + 1]; ++row) {
    const std::size_t species = size_of(call.pairs.placed[2 * static_cast<std::size_t>(row)]);
    position(call.pairs.placed[2 * static_cast<std::size_t>(row) + 1], atom);
    for (int d = 0; d < 3; ++d) {
      runs[d].clear();
      const bool flat = shape.dimension == 2 && d == 0;
      const int before = low[d] + (flat ? 0 : stamp.taps[d] / 2), middle = flat ? 0 : centre[1];
      // the stamp begins at floor(delta / step) + middle - before, delta = atom - action + images
      const int first = -step[d] * (middle - before + stamp.out[d]) - step[d];
      const int last = step[d] * (extent[1][d] - middle + before) + step[d];
      int delta = atom[d] - action[d];
      const int period = flat || !periodic[d] ? 0 : grid[d];
      if (period > 0) delta = first + ((delta - first) % period + period) % period;
      for (; delta <= last; delta += period) {
        const int lattice_point = (delta >= 0 ? delta : delta - step[d] + 1) / step[d];
        const int begin = lattice_point + middle - before;
        const int from = std::max(0, -begin), to = std::min(stamp.out[d], extent[1][d] - begin);
        if (from < to) runs[d].push_back({delta - step[d] * lattice_point, begin, from, to - from});
        if (period == 0) break;
      }
    }
    for (const Run& z : runs[0])
      for (const Run& y : runs[1])
        for (const Run& x : runs[2]) {
          const int phase = (z.phase * step[1] + y.phase) * step[2] + x.phase;
          const std::size_t base = (species * size_of(phases) + size_of(phase)) * kHidden * stamp_size;
          for (int i = 0; i < z.count; ++i) {
            const int row_at = (z.box + z.stamp + i) * extent[1][1] + y.box + y.stamp;
            // whole vectors of the columns that meet the box
            const int first = x.stamp / 8 * 8, end = (x.stamp + x.count + 7) / 8 * 8;
            std::size_t from =
                base + size_of((z.stamp + i) * stamp.out[1] + y.stamp) * size_of(stamp.out_row) + size_of(first);
            for (int r = row_at, left = y.count; left > 0;) {
              const int slab = r / slab_rows, count = std::min(left, (slab + 1) * slab_rows - r);
              const std::size_t line = lane * size_of(slab_rows) + size_of(r % slab_rows);
              pieces[size_of(slab)].push_back(
                  {from, line * size_of(row_size) + size_of(row_begin + x.box + first), count, end - first});
              from += size_of(count * stamp.out_row);
              r += count;
              left -= count;
            }
          }
        }
  }
}

/// spectra: whose sums of spectra the group's are put into, with `add` on top of what is there.
void QTraining::Impl::group(const Call& call, std::size_t g, Arena& arena, Slot& slot, Slot& spectra, bool add) {
  const TrainingKernels& k = training_kernels();
  const std::size_t begin = g * kGroup, count = std::min<std::size_t>(kGroup, call.pairs.size() - begin);
  const float* parameters = call.weights.parameters.data();
  float* scratch = arena.scratch.need(scratch_size);
  const bool stamped = begin + count <= call.stamped, few = stamped && count <= 8;
  const int hidden_cells = few ? kFewCells : kHiddenCells;
  // channel and samples of each eighth float of a cell
  const auto channel_of = [&](int cell, int part) { return few ? 4 * cell + part : 2 * cell + part % 2; };

  // what lies inside the grid
  bool masked = false;
  for (int layer = 0; layer < kLayers; ++layer) {
    float* mask = arena.masks[layer].need(size_of(extent[layer][0] + extent[layer][1] + extent[layer][2]) * kCell);
    for (int d = 0; d < 3; ++d)
      for (int i = 0; i < extent[layer][d]; ++i, mask += kCell) {
        std::fill(mask, mask + kCell, 1.0f);
        if (periodic[d]) continue;
        for (std::size_t l = 0; l < count; ++l) {
          int action[3];
          position(call.pairs.actions[2 * call.order[begin + l] + 1], action);
          const int at = coordinate(d, layer, i, action[d]);
          if (at >= 0 && at < grid[d]) continue;
          masked = true;
          float* m = mask + l % 8 + (l < 8 ? 0 : kImaginary);
          m[0] = m[kSecond] = 0.0f;
          if (few) m[kImaginary] = m[kImaginary + kSecond] = 0.0f;
        }
      }
  }

  // images, and their spectra
  const std::size_t image_plane = points(0) * kCell;
  const Box image_box = box(0, arena, masked);
  float* image = nullptr;
  float* spectrum[3] = {};
  const auto cells_of = [&](int layer) { return layer == 0 ? call.channel_pairs : hidden_cells; };
  for (int layer = stamped ? 1 : 0; layer < 3; ++layer)
    spectrum[layer] = arena.spectrum[layer].need(plan[layer].columns.size() * plan[layer].column(cells_of(layer)));
  // what a layer's transforms start from, and what they leave
  float *from = arena.half[0].need(half_size), *to = arena.half[1].need(half_size);
  if (!stamped) {
    image = arena.image.need(size_of(call.channel_pairs) * image_plane);
    std::memset(image, 0, size_of(call.channel_pairs) * image_plane * sizeof(float));
    for (std::size_t l = 0; l < count; ++l) splat(call, l, call.order[begin + l], image, nullptr);
    for (int s = 0; s < shape.species; ++s) {
      const float shift = call.weights.shift[size_of(s)];
      if (shift == 0) continue;
      float* p = image + size_of(s / 2) * image_plane + s % 2 * kSecond;
      for (int z = 0; z < extent[0][0]; ++z)
        for (int y = 0; y < extent[0][1]; ++y)
          for (int x = 0; x < extent[0][2]; ++x, p += kCell)
            for (int half = 0; half < kCell; half += kImaginary)
              for (int l = half; l < half + 8; ++l)
                p[l] += !masked ? shift
                                : shift * image_box.mask[0][z * kCell + l] * image_box.mask[1][y * kCell + l] *
                                      image_box.mask[2][x * kCell + l];
    }
    for (int j = 0; j < call.channel_pairs; ++j)
      along_x(plan[0], false, image + size_of(j) * image_plane, {from, call.channel_pairs, extent[0]}, j, scratch);
  }

  // forward
  std::size_t few_floats = 0;
  for (int layer = 1; layer < 3; ++layer)
    few_floats = std::max(few_floats, size_of(plan[layer].size[plan[layer].inner]) * kFewChannels * kCell);
  float *few_in = few ? arena.few[0].need(few_floats) : nullptr,
        *few_out = few ? arena.few[1].need(few_floats) : nullptr,
        *few_kept = few ? arena.few[2].need(few_floats) : nullptr;
  // The last layer knows full groups only: a cell of few samples from or to their planes.
  const auto move_few = [&](int cell, bool to_planes, float* few_plane, float* planes) {
    for (int part = 0; part < 4; ++part) {
      const int channel = channel_of(cell, part);
      float *own = few_plane + part * 8,
            *other = planes + size_of(channel / 2) * points(3) * kCell + channel % 2 * kSecond;
      for (std::size_t at = 0; at < points(3); ++at, own += kCell, other += kCell)
        if (!to_planes) {
          for (int l = 0; l < 8; ++l) own[l] = channel < kHidden ? other[l] : 0.0f;
        } else if (channel < kHidden) {
          std::copy(own, own + 8, other);
          std::fill(other + kImaginary, other + kImaginary + 8, 0.0f);
        }
    }
  };
  const int rows_of_a1 = extent[1][0] * extent[1][1], slabs = (rows_of_a1 + slab_rows - 1) / slab_rows;
  const std::size_t image_rows = size_of(slab_rows) * size_of(row_size);
  for (std::vector<std::vector<Piece>>& pieces : arena.pieces) {
    pieces.resize(size_of(slabs));
    for (std::vector<Piece>& slab : pieces) slab.clear();
  }
  if (stamped)
    for (std::size_t l = 0; l < count; ++l) find_pieces(call, l % 8, call.order[begin + l], arena.pieces[l / 8]);
  float* rows = stamped ? arena.rows.need(8 * image_rows) : nullptr;
  float* activation = arena.activation.need(std::max(points(1), points(2)) * kCell);  // one plane at a time
  float* last_activation = arena.last.need(kHiddenCells * points(3) * kCell);
  for (int layer = 0; layer < 3; ++layer) {
    const int n_in = inputs(layer);
    const bool by_stamps = layer == 0 && stamped;
    const std::size_t pair_weights = size_of(2 * weight_cells[layer] * kCell);
    if (!by_stamps) {
      sweep(plan[layer], {from, cells_of(layer), extent[layer]}, spectrum[layer], {to, hidden_cells, extent[layer + 1]},
            scratch, [&](const Pairs& pairs, std::size_t first, const float* in, float* out) {
              const float* w = weight_spectrum[layer].data() + first * pair_weights;
              if (few) {
                k.unpack(pairs, in, few_in);
                k.multiply_few(pairs.count, w, size_of(weight_cells[layer]), true, few_in, few_out);
                k.pack(pairs, few_out, out);
              } else {
                k.multiply(pairs, w, size_of(weight_cells[layer]), n_in, true, in, out);
              }
            });
      std::swap(from, to);
    }
    const std::size_t plane = points(layer + 1) * kCell;
    arena.signs[layer + 1].resize(kHiddenCells * points(layer + 1));
    const float* bias = by_stamps ? first_bias.data() : parameters + parameter_offset(layer, true);
    const Box inside = box(layer + 1, arena, masked);
    for (int j = 0; j < hidden_cells; ++j) {
      float* a = layer == 2 && !few ? last_activation + size_of(j) * plane : activation;
      if (by_stamps)
        for (int slab = 0; slab < slabs; ++slab)
          for (int part = 0; part < 4; ++part) {
            const std::vector<Piece>& pieces = arena.pieces[few ? 0 : part / 2][size_of(slab)];
            const int channel = channel_of(j, part);
            std::memset(rows, 0, 8 * image_rows * sizeof(float));
            if (channel < kHidden)
              k.add_rows(pieces.data(), static_cast<int>(pieces.size()), true,
                         stamps.data() + size_of(channel) * stamp_size, stamp.out_row, rows, row_size);
            k.interleave(
                std::min(slab_rows, rows_of_a1 - slab * slab_rows), extent[1][2], rows + row_begin,
                static_cast<std::ptrdiff_t>(image_rows), row_size,
                a + size_of(slab * slab_rows * extent[1][2]) * kCell + part % 2 * kSecond + part / 2 * kImaginary);
          }
      else
        along_x(plan[layer], true, a, {from, hidden_cells, extent[layer + 1]}, j, scratch);
      float biases[4];
      for (int part = 0; part < 4; ++part)
        biases[part] = channel_of(j, part) < kHidden ? bias[channel_of(j, part)] : 0.0f;
      k.activate(inside, biases, shape.slope, a, arena.signs[layer + 1].data() + size_of(j) * points(layer + 1));
      if (layer < 2)
        along_x(plan[layer + 1], false, a, {to, hidden_cells, extent[layer + 1]}, j, scratch);
      else if (few)
        move_few(j, true, a, last_activation);
    }
    std::swap(from, to);
  }
  const float* last = parameters + parameter_offset(3, false);
  const float* last_bias = parameters + parameter_offset(3, true);
  arena.u.assign(size_of(shape.species) * kGroup, 0.0f);
  arena.du.assign(size_of(shape.species) * kGroup, 0.0f);
  k.last(static_cast<int>(taps), shape.species, last, last_activation, arena.u.data());
  for (std::size_t l = 0; l < count; ++l) {
    const std::size_t sample = call.order[begin + l], s = size_of(call.pairs.actions[2 * sample]);
    // in double: 1 - q^2 of a saturated q would lose all digits
    const double q = std::tanh(static_cast<double>(arena.u[s * kGroup + l] + last_bias[s]));
    call.q[sample] = static_cast<float>(q);
    if (!call.backward) continue;
    double dq;
    if (call.pull.empty()) {
      const double error = q - static_cast<double>(call.targets[sample]);
      slot.loss += error * error * call.scale;
      dq = 2 * error * call.scale;
    } else {
      dq = call.pull[sample];
    }
    const double du = dq * std::max(1 - q * q, kLeastSlope);
    arena.du[s * kGroup + l] = static_cast<float>(du);
    slot.last_bias[s] += du;
  }
  if (!call.backward) return;

  // backward
  float* delta = arena.delta.need(std::max({points(0), points(1), points(2), kHiddenCells * points(3)}) * kCell);
  k.last_back(static_cast<int>(taps), shape.species, last, last_activation, arena.du.data(), delta, slot.last.data());
  for (int layer = 2; layer >= 0; --layer) {
    const std::size_t plane = points(layer + 1) * kCell;
    const Box inside = box(layer + 1, arena, masked);
    for (int j = 0; j < hidden_cells; ++j) {
      float* d = layer < 2 ? delta : few ? activation : delta + size_of(j) * plane;
      if (layer < 2)
        along_x(plan[layer + 1], true, d, {from, hidden_cells, extent[layer + 1]}, j, scratch);
      else if (few)
        move_few(j, false, d, delta);
      k.pull(inside, shape.slope, arena.signs[layer + 1].data() + size_of(j) * points(layer + 1), d);
      if (layer == 0 && stamped) {
        alignas(64) float sum[kCell];
        k.total(points(1), d, sum);
        for (int c = 0; c < kCell; ++c) {
          const int channel = channel_of(j, c / kSecond);
          if (channel >= kHidden) break;
          slot.bias[0][size_of(channel)] += static_cast<double>(sum[c]);
          slot.constant[size_of(channel)] += static_cast<double>(sum[c]);
        }
        float* delta_rows = arena.delta_rows.need(8 * image_rows);  // what lies beyond the box stays zero
        for (int slab = 0; slab < slabs; ++slab)
          for (int part = 0; part < 4; ++part) {
            const std::vector<Piece>& pieces = arena.pieces[few ? 0 : part / 2][size_of(slab)];
            const int channel = channel_of(j, part);
            if (channel >= kHidden) break;
            k.separate(
                std::min(slab_rows, rows_of_a1 - slab * slab_rows), extent[1][2],
                d + size_of(slab * slab_rows * extent[1][2]) * kCell + part % 2 * kSecond + part / 2 * kImaginary,
                delta_rows + row_begin, static_cast<std::ptrdiff_t>(image_rows), row_size);
            k.add_rows(pieces.data(), static_cast<int>(pieces.size()), false,
                       slot.stamps.data() + size_of(channel) * stamp_size, stamp.out_row, delta_rows, row_size);
          }
        continue;
      }
      along_x(plan[layer], false, d, {to, hidden_cells, extent[layer + 1]}, j, scratch);
    }
    if (layer == 0 && stamped) return;
    std::swap(from, to);
    const int n_in = inputs(layer);
    const std::size_t pair_sums = size_of(2 * 8 * sum_blocks(n_in)),
                      pair_weights = size_of(2 * weight_cells[layer] * kCell);
    float* sums = spectra.sums[layer].need(size_of(plan[layer].pairs) * pair_sums);
    const bool on_top = layer == 0 ? spectra.has_sums : add, go_on = layer > 0 || call.wants_kernels;
    if (layer == 0) spectra.has_sums = true;
    const std::size_t column = plan[layer].column(cells_of(layer));
    const float* kept = spectrum[layer];
    sweep(plan[layer], {from, hidden_cells, extent[layer + 1]}, nullptr,
          {go_on ? to : nullptr, cells_of(layer), extent[layer]}, scratch,
          [&](const Pairs& pairs, std::size_t first, const float* in, float* out) {
            if (first == 0)  // frequency zero is the sum over points
              for (int c = 0; c < kHidden; ++c)
                for (int l = 0; l < 8; ++l) {
                  if (few) {
                    slot.bias[size_of(layer)][size_of(c)] +=
                        static_cast<double>(in[c / 4 * pairs.plane + c % 4 * kSecond + l]);
                    continue;
                  }
                  const float* own = in + c / 2 * pairs.plane + c % 2 * kSecond + l;
                  slot.bias[size_of(layer)][size_of(c)] +=
                      static_cast<double>(own[0]) + static_cast<double>(own[kImaginary]);
                }
            float* s = sums + first * pair_sums;
            const float* w = weight_spectrum[layer].data() + first * pair_weights;
            if (few) {
              k.unpack(pairs, kept, few_kept);
              kept += column;
              k.unpack(pairs, in, few_in);
              k.correlate_few(pairs.count, few_kept, few_in, on_top, s);
              k.multiply_few(pairs.count, w, size_of(weight_cells[layer]), false, few_in, few_out);
              k.pack(pairs, few_out, out);
              return;
            }
            k.correlate(pairs, n_in, kept, static_cast<std::ptrdiff_t>(column), in, on_top, s);
            kept += column;
            if (!go_on) return;
            k.multiply(pairs, w, size_of(weight_cells[layer]), n_in, false, in, out);
          });
    std::swap(from, to);
  }
  if (!call.wants_kernels) return;
  for (int j = 0; j < call.channel_pairs; ++j)
    along_x(plan[0], true, image + size_of(j) * image_plane, {from, call.channel_pairs, extent[0]}, j, scratch);
  for (std::size_t l = 0; l < count; ++l) splat(call, l, call.order[begin + l], image, slot.kernels.data());
  for (int s = 0; s < shape.species; ++s) {
    const float* p = image + size_of(s / 2) * image_plane + s % 2 * kSecond;
    double sum = 0;
    for (int z = 0; z < extent[0][0]; ++z)
      for (int y = 0; y < extent[0][1]; ++y) {
        float row = 0;
        for (int x = 0; x < extent[0][2]; ++x, p += kCell)
          for (std::size_t l = 0; l < count; ++l) {
            const std::size_t at = l % 8 + (l < 8 ? 0 : kImaginary);
            row += !masked
                       ? p[at]
                       : p[at] * image_box.mask[0][size_of(z) * kCell + at] *
                             image_box.mask[1][size_of(y) * kCell + at] * image_box.mask[2][size_of(x) * kCell + at];
          }
        sum += static_cast<double>(row);
      }
    slot.shift[size_of(s)] += sum;
  }
}

double QTraining::Impl::run(const QNetworkWeights& weights, const StateActions& pairs, std::span<const float> targets,
                            std::span<const float> pull, std::span<float> q, const QNetworkGradient& out, bool backward,
                            int threads) {
  check(weights, pairs);
  const std::size_t n = pairs.size();
  const auto expect = [](const char* name, std::size_t wanted, std::size_t came) {
    if (wanted != came)
      throw Error(std::string(name) + " must hold " + std::to_string(wanted) + " values, but it holds " +
                  std::to_string(came));
  };
  expect("q", n, q.size());
  if (backward && pull.empty()) expect("targets", n, targets.size());
  if (backward && targets.empty()) expect("pull", n, pull.size());
  if (!out.parameters.empty()) expect("the gradient of parameters", weights.parameters.size(), out.parameters.size());
  if (!out.kernels.empty()) expect("the gradient of kernels", weights.kernels.size(), out.kernels.size());
  if (!out.shift.empty()) expect("the gradient of shift", weights.shift.size(), out.shift.size());
  for (const std::span<float> g : {out.parameters, out.kernels, out.shift}) std::fill(g.begin(), g.end(), 0.0f);
  if (n == 0) return 0;

  const TrainingKernels& k = training_kernels();
  const bool wants_kernels = backward && (!out.kernels.empty() || !out.shift.empty());
  crop_kernels(weights.kernels, wants_kernels && !out.kernels.empty());
  // Samples that need no images go first, so that few groups mix both kinds.
  const bool constant = std::any_of(weights.shift.begin(), weights.shift.end(), [](float v) { return v != 0; }) ||
                        (wants_kernels && !out.shift.empty());
  std::vector<std::size_t> order, rest;
  order.reserve(n);
  for (std::size_t i = 0; i < n; ++i) (is_clean(pairs, i, constant) ? order : rest).push_back(i);
  const std::size_t stamped = order.size();
  order.insert(order.end(), rest.begin(), rest.end());
  if (stamped > 0) make_stamps(weights);
  prepare_weights(weights, stamped < n);
  const Call call{
      weights, pairs,  targets, pull, q, backward, wants_kernels, (shape.species + 1) / 2, 1.0 / static_cast<double>(n),
      order,   stamped};

  const std::size_t groups = (n + kGroup - 1) / kGroup;
  const int n_slots = static_cast<int>(std::min<std::size_t>(groups, kMostSlots));
  if (threads <= 0) threads = default_threads();
  threads = std::min(threads, n_slots);
  if (arenas.size() < size_of(threads)) arenas.resize(size_of(threads));
  if (slots.size() < size_of(n_slots)) slots.resize(size_of(n_slots));
  for (int s = 0; s < n_slots; ++s) {
    Slot& slot = slots[size_of(s)];
    slot.loss = 0;
    slot.bias = {};
    slot.last.assign(backward ? size_of(shape.species) * kHidden * taps : 0, 0.0f);
    slot.kernels.assign(wants_kernels ? kernels.size() : 0, 0.0f);
    slot.has_sums = false;
    slot.constant = {};
    const std::size_t stamp_floats = size_of(shape.species) * size_of(phases) * kHidden * stamp_size;
    if (backward && stamped > 0) std::memset(slot.stamps.need(stamp_floats), 0, stamp_floats * sizeof(float));
    slot.last_bias.assign(size_of(shape.species), 0.0);
    slot.shift.assign(size_of(shape.species), 0.0);
  }
  // One group a slot, and one thread: sums of spectra pile up in the first slot in the order in which those of all
  // slots would be added up, bit for bit, and take a fraction of the memory.
  const bool pile = threads == 1 && size_of(n_slots) == groups;
  bool failed = false;  // an exception must not leave a parallel region
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
  for (int thread = 0; thread < threads; ++thread) try {
      for (int s = thread; s < n_slots; s += threads) {
        const std::size_t first = groups * size_of(s) / size_of(n_slots),
                          end = groups * size_of(s + 1) / size_of(n_slots);
        for (std::size_t g = first; g < end; ++g)
          group(call, g, arenas[size_of(thread)], slots[size_of(s)], slots[pile ? 0 : size_of(s)],
                g > (pile ? 0 : first));
      }
    } catch (...) {
#pragma omp atomic write
      failed = true;
    }
  if (failed) throw Error("not enough memory to train on this network; choose a smaller kernel or a dilation");
  if (!backward) return 0;

  double loss = 0;
  for (int s = 0; s < n_slots; ++s) loss += slots[size_of(s)].loss;
  const auto over_slots = [&](auto term) {
    double sum = 0;
    for (int i = 0; i < n_slots; ++i) sum += static_cast<double>(term(slots[size_of(i)]));
    return sum;
  };

  // stamps first: what they give is added to
  const std::size_t species = size_of(shape.species);
  const std::size_t kernel_size = size_of(stamp.kernel[0]) * size_of(stamp.kernel[1]) * size_of(stamp.kernel[2]);
  const std::size_t tap_size = size_of(stamp.taps[0]) * size_of(stamp.taps[1]) * size_of(stamp.tap_row);
  std::vector<float> by_taps, by_lattice;
  std::array<double, kHidden> by_constant{};
  if (stamped > 0) {
    const std::size_t floats = species * size_of(phases) * kHidden * stamp_size;
    float* sum = slots[0].stamps.data();
    for (int i = 1; i < n_slots; ++i) {
      const float* other = slots[size_of(i)].stamps.data();
      for (std::size_t at = 0; at < floats; ++at) sum[at] += other[at];
    }
    by_taps.assign(species * kHidden * tap_size, 0.0f);
    by_lattice.assign(wants_kernels ? lattice.size() : 0, 0.0f);
    for (std::size_t s = 0; s < species; ++s)
      for (std::size_t phase = 0; phase < size_of(phases); ++phase) {
        const std::size_t which = s * size_of(phases) + phase;
        k.stamp_taps(stamp, lattice.data() + which * kernel_size, sum + which * kHidden * stamp_size,
                     by_taps.data() + s * kHidden * tap_size);
        if (wants_kernels)
          k.stamp_kernel(stamp, taps_reversed.data() + s * kHidden * tap_size, sum + which * kHidden * stamp_size,
                         by_lattice.data() + which * kernel_size);
      }
    for (std::size_t o = 0; o < kHidden; ++o)
      by_constant[o] = over_slots([&](const Slot& slot) { return slot.constant[o]; });
  }
  if (wants_kernels) {
    const int half = shape.half_window, edge = 2 * half + 1, solid = shape.dimension == 3 ? half : 0;
    const int edge_y = 2 * reach[1] + 1, edge_x = 2 * reach[2] + 1;
    const std::size_t cropped = size_of((2 * reach[0] + 1) * edge_y * edge_x);
    std::vector<double> by_kernel(species * cropped);
    for (std::size_t at = 0; at < by_kernel.size(); ++at)
      by_kernel[at] = over_slots([&](const Slot& slot) { return slot.kernels[at]; });
    std::size_t from = 0;
    if (stamped > 0)
      for (std::size_t s = 0; s < species; ++s)
        for (int phase = 0; phase < phases; ++phase) {
          const int f[3] = {phase / (step[1] * step[2]), phase / step[2] % step[1], phase % step[2]};
          for (int z = 0; z < stamp.kernel[0]; ++z)
            for (int y = 0; y < stamp.kernel[1]; ++y)
              for (int x = 0; x < stamp.kernel[2]; ++x, ++from)
                if (const int to = kernel_element(f, z, y, x); to >= 0)
                  by_kernel[s * cropped + size_of(to)] += static_cast<double>(by_lattice[from]);
        }
    from = 0;
    for (std::size_t s = 0; s < species; ++s) {
      double total = over_slots([&](const Slot& slot) { return slot.shift[s]; });
      for (std::size_t o = 0; o < kHidden; ++o)
        for (std::size_t t = 0; t < taps; ++t)
          total += by_constant[o] * static_cast<double>(weights.parameters[(o * species + s) * taps + t]);
      if (!out.shift.empty()) out.shift[s] = static_cast<float>(total);
      if (out.kernels.empty()) continue;
      for (int z = -reach[0]; z <= reach[0]; ++z)
        for (int y = -used; y <= used; ++y)
          for (int x = -used; x <= used; ++x, ++from) {
            const int row = ((z + solid) * (solid > 0 ? edge : 1)) + y + half;
            out.kernels[s * window + size_of(row * edge + x + half)] = static_cast<float>(by_kernel[from]);
          }
    }
  }
  if (out.parameters.empty()) return loss;

  const int window_extent[3] = {shape.dimension == 3 ? shape.kernel : 1, shape.kernel, shape.kernel};
  for (int layer = 0; layer < 3; ++layer) {
    const Plan& p = plan[layer];
    const int channels = inputs(layer);
    const int cells = (sum_blocks(channels) + 3) / 4;
    const float* sums[kMostSlots];
    int n_sums = 0;
    for (int s = 0; s < (pile ? 1 : n_slots); ++s)
      if (layer > 0 || slots[size_of(s)].has_sums) sums[n_sums++] = slots[size_of(s)].sums[layer].data();
    float* bias = out.parameters.data() + parameter_offset(layer, true);
    for (std::size_t c = 0; c < kHidden; ++c)
      bias[c] = static_cast<float>(over_slots([&](const Slot& slot) { return slot.bias[size_of(layer)][c]; }));
    if (n_sums == 0) continue;
    const Half half{kernel_half.need(Half::floats(p, cells, window_extent)), cells, window_extent};
    float* planes = kernel_planes.need(taps * kCell);
    float* scratch = kernel_scratch.need(kernel_scratch_size(p, cells, window_extent));
    const float scale = 1.0f / static_cast<float>(p.frequencies());
    const std::size_t pair_sums = size_of(2 * 8 * sum_blocks(channels));
    sweep(p, {nullptr, 0, window_extent}, nullptr, half, scratch,
          [&](const Pairs& column, std::size_t first, const float*, float* spectrum) {
            const float* own[kMostSlots];
            for (int s = 0; s < n_sums; ++s) own[s] = sums[s] + first * pair_sums;
            k.join(column, channels, n_sums, own, size_of(cells), scale, spectrum);
          });
    float* w = out.parameters.data() + parameter_offset(layer, false);
    for (int j = 0; j < cells; ++j) {
      along_x(p, true, planes, half, j, scratch);
      for (int o = 0; o < kHidden; ++o)
        for (int c = 0; c < channels; ++c) {
          const std::size_t at = size_of(sum_at(channels, o, c));
          if (at / kCell != size_of(j)) continue;
          float* kernel = w + size_of(o * channels + c) * taps;
          for (std::size_t tap = 0; tap < taps; ++tap) kernel[tap] = planes[tap * kCell + at % kCell];
        }
    }
  }
  if (stamped > 0)
    for (std::size_t s = 0; s < species; ++s)
      for (std::size_t o = 0; o < kHidden; ++o) {
        float* w = out.parameters.data() + (o * species + s) * taps;
        const float* from = by_taps.data() + (s * kHidden + o) * tap_size;
        const float shift = static_cast<float>(static_cast<double>(weights.shift[s]) * by_constant[o]);
        for (std::size_t t = 0; t < taps; ++t) {
          const std::size_t back = taps - 1 - t, line = back / size_of(stamp.taps[2]);
          w[t] +=
              from[line * size_of(stamp.tap_row) + size_of(stamp.tap_begin) + back % size_of(stamp.taps[2])] + shift;
        }
      }
  float* last = out.parameters.data() + parameter_offset(3, false);
  for (std::size_t i = 0; i < size_of(shape.species) * kHidden * taps; ++i)
    for (int s = 0; s < n_slots; ++s) last[i] += slots[size_of(s)].last[i];
  float* last_bias = out.parameters.data() + parameter_offset(3, true);
  for (std::size_t s = 0; s < size_of(shape.species); ++s) {
    double sum = 0;
    for (int i = 0; i < n_slots; ++i) sum += slots[size_of(i)].last_bias[s];
    last_bias[s] = static_cast<float>(sum);
  }
  return loss;
}

QTraining::QTraining(const QNetworkShape& shape) : impl_(std::make_unique<Impl>(shape)) {}
QTraining::~QTraining() = default;
const QNetworkShape& QTraining::shape() const { return impl_->shape; }
std::size_t QTraining::parameters() const { return impl_->parameter_offset(kLayers, false); }
std::size_t QTraining::kernel_size() const { return impl_->window; }

void QTraining::evaluate(const QNetworkWeights& weights, const StateActions& pairs, std::span<float> q, int threads) {
  impl_->run(weights, pairs, {}, {}, q, {}, false, threads);
}

double QTraining::gradient(const QNetworkWeights& weights, const StateActions& pairs, std::span<const float> targets,
                           std::span<float> q, const QNetworkGradient& out, int threads) {
  return impl_->run(weights, pairs, targets, {}, q, out, true, threads);
}

void QTraining::pull_back(const QNetworkWeights& weights, const StateActions& pairs, std::span<const float> pull,
                          std::span<float> q, const QNetworkGradient& out, int threads) {
  if (pull.size() != pairs.size())
    throw Error("pull must hold " + std::to_string(pairs.size()) + " values, but it holds " +
                std::to_string(pull.size()));
  impl_->run(weights, pairs, {}, pull, q, out, true, threads);
}

void image_statistics(const QNetworkShape& shape, std::span<const float> kernels, const StateActions& pairs,
                      std::span<double> mean, std::span<double> variance) {
  QNetworkShape plain = shape;  // the smallest network on this grid: its checks and its directions are what is wanted
  plain.kernel = plain.dilation = 1;
  const QTraining::Impl frame(plain);
  const std::size_t species = size_of(shape.species);
  const std::vector<float> none(frame.parameter_offset(kLayers, false)), shift(species);
  std::vector<std::int32_t> actions(2 * pairs.size(), 0);
  frame.check({none, kernels, shift}, {pairs.placed, pairs.offsets, actions});
  if (mean.size() != species || variance.size() != species)
    throw Error("mean and variance must hold " + std::to_string(species) + " values, but they hold " +
                std::to_string(mean.size()) + " and " + std::to_string(variance.size()));
  const int half = shape.half_window, edge = 2 * half + 1, solid = shape.dimension == 3 ? half : 0;
  const int* grid = frame.grid;
  const std::size_t voxels = size_of(grid[0]) * size_of(grid[1]) * size_of(grid[2]);
  std::vector<float> field(species * voxels);
  std::vector<double> sum(species), squares(species);
  // where a line of the kernel begins, wrapped; -1: beyond a wall
  const auto along = [&](int d, int at) {
    if (frame.periodic[d]) return (at % grid[d] + grid[d]) % grid[d];
    return at >= 0 && at < grid[d] ? at : -1;
  };
  for (std::size_t i = 0; i < pairs.size(); ++i) {
    std::fill(field.begin(), field.end(), 0.0f);
    for (auto row = static_cast<std::size_t>(pairs.offsets[i]); row < static_cast<std::size_t>(pairs.offsets[i + 1]);
         ++row) {
      const std::size_t s = size_of(pairs.placed[2 * row]);
      int atom[3];
      frame.position(pairs.placed[2 * row + 1], atom);
      for (int z = -solid; z <= solid; ++z) {
        const int to_z = along(0, atom[0] + z);
        for (int y = -half; to_z >= 0 && y <= half; ++y) {
          const int to_y = along(1, atom[1] + y);
          if (to_y < 0) continue;
          float* line = field.data() + s * voxels + size_of((to_z * grid[1] + to_y) * grid[2]);
          const float* kernel = kernels.data() + s * frame.window + size_of(((z + solid) * edge + y + half) * edge);
          for (int x = -half; x <= half;) {
            const int to_x = along(2, atom[2] + x);
            if (to_x < 0) {
              ++x;
              continue;
            }
            const int count = std::min(half - x + 1, grid[2] - to_x);
            for (int k = 0; k < count; ++k) line[to_x + k] += kernel[x + half + k];
            x += count;
          }
        }
      }
    }
    for (std::size_t s = 0; s < species; ++s)
      for (std::size_t begin = 0; begin < voxels; begin += 64) {
        float a = 0, b = 0;
        for (std::size_t k = begin; k < std::min(begin + 64, voxels); ++k) {
          const float v = field[s * voxels + k];
          a += v;
          b += v * v;
        }
        sum[s] += static_cast<double>(a);
        squares[s] += static_cast<double>(b);
      }
  }
  const double count = static_cast<double>(voxels) * static_cast<double>(std::max<std::size_t>(pairs.size(), 1));
  for (std::size_t s = 0; s < species; ++s) {
    mean[s] = sum[s] / count;
    variance[s] = std::max(0.0, squares[s] / count - mean[s] * mean[s]);
  }
}

void adam_step(const AdamSettings& settings, std::int64_t update, std::span<const float> gradient,
               std::span<float> parameters, std::span<float> first_moment, std::span<float> second_moment) {
  const std::size_t n = parameters.size();
  if (gradient.size() != n || first_moment.size() != n || second_moment.size() != n)
    throw Error("gradient, parameters and both moments must be of equal length, but they have " +
                std::to_string(gradient.size()) + ", " + std::to_string(n) + ", " +
                std::to_string(first_moment.size()) + " and " + std::to_string(second_moment.size()));
  if (update < 1) throw Error("update must be at least 1, but it is " + std::to_string(update));
  const double t = static_cast<double>(update);
  training_kernels().adam(n, gradient.data(), static_cast<float>(settings.beta1), static_cast<float>(settings.beta2),
                          static_cast<float>(settings.rate / (1 - std::pow(settings.beta1, t))),
                          static_cast<float>(1 / std::sqrt(1 - std::pow(settings.beta2, t))),
                          static_cast<float>(settings.epsilon), parameters.data(), first_moment.data(),
                          second_moment.data());
}

}  // namespace thalweg
