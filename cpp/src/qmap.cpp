#include "thalweg/qmap.hpp"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <numbers>
#include <string>
#include <utility>

#include "qmap_kernels.hpp"

namespace thalweg {
namespace {

using std::int64_t;

// Everything below works in three directions z, y, x. A grid of two directions has one voxel along y: it keeps its
// layout, and transforms along z and x are the ones that the code is fastest at.
using Three = std::array<int, 3>;

int64_t product_of(const Three& n) { return int64_t{1} * n[0] * n[1] * n[2]; }
int modulo(int a, int n) { return (a % n + n) % n; }
std::string text(int64_t n) { return std::to_string(n); }

constexpr std::size_t kHugePage = std::size_t{1} << 21;

// Floats on a cache line, zeroed when first had. Grows, never shrinks.
class Floats {
 public:
  Floats() = default;
  Floats(Floats&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Floats& operator=(Floats&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Floats() { std::free(data_); }
  float* need(int64_t size) {
    if (size > size_) {
      std::free(data_);
      size_ = 0;
      const std::size_t wanted = static_cast<std::size_t>(size) * sizeof(float) + 64;
      const std::size_t page = wanted > kHugePage / 2 ? kHugePage : 64, bytes = (wanted + page - 1) / page * page;
      data_ = static_cast<float*>(std::aligned_alloc(page, bytes));
      if (data_ == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
      if (page == kHugePage)
        madvise(data_, bytes, MADV_HUGEPAGE);  // boxes touch a page per row: small ones would thrash
#endif
      std::memset(data_, 0, bytes);
      size_ = size;
    }
    return data_;
  }
  float* data() { return data_; }
  const float* data() const { return data_; }
  int64_t size() const { return size_; }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

struct Layer {
  int inputs = 0, outputs = 0;
  Three kernel{1, 1, 1}, dilation{1, 1, 1};
  const float* weights = nullptr;  // (outputs, inputs, kernel)
  const float* bias = nullptr;

  int half(int axis) const { return kernel[axis] / 2; }
  int reach(int axis) const { return half(axis) * dilation[axis]; }
  Three reach() const { return {reach(0), reach(1), reach(2)}; }
  int64_t taps() const { return product_of(kernel); }
};

struct Grid {
  Three n{1, 1, 1};
  std::array<bool, 3> periodic{};

  int64_t voxels() const { return product_of(n); }
  QBox whole() const { return {{0, 0, 0}, {n[0], n[1], n[2]}}; }
  // A box that may stick out of the grid: cut at open walls, at most once round periodic directions.
  QBox fold(const QBox& box) const {
    QBox out = box;
    for (int a = 0; a < 3; ++a) {
      if (!periodic[a]) {
        const int first = std::max(0, box.first[a]), last = std::min(n[a], box.first[a] + box.count[a]);
        out.first[a] = first;
        out.count[a] = std::max(0, last - first);
      } else if (box.count[a] >= n[a]) {
        out.first[a] = 0;
        out.count[a] = n[a];
      } else {
        out.first[a] = modulo(box.first[a], n[a]);
      }
    }
    return out;
  }
  static QBox grown(const QBox& box, const Three& by) {
    QBox out = box;
    for (int a = 0; a < 3; ++a) {
      out.first[a] -= by[a];
      out.count[a] += 2 * by[a];
    }
    return out;
  }
  // Index in the box of coordinate u, which may lie outside the grid; -1 if the box does not hold it.
  int index(const QBox& box, int axis, int u) const {
    const int i = periodic[axis] ? modulo(u - box.first[axis], n[axis]) : u - box.first[axis];
    return i >= 0 && i < box.count[axis] ? i : -1;
  }
};

// ---- transforms ---------------------------------------------------------------------------------------------
bool smooth(int n) {
  for (const int p : {2, 3, 5})
    while (n % p == 0) n /= p;
  return n == 1;
}
int smooth_from(int n) {
  while (!smooth(n)) ++n;
  return n;
}

struct Fft {
  FftPlan plan{};
  std::vector<float> twiddle;

  explicit Fft(int n = 1) {
    plan.n = n;
    int left = n;
    for (const int radix : {5, 6, 4, 3, 2})
      while (left % radix == 0) {
        plan.radix[plan.passes++] = radix;
        left /= radix;
      }
    if (n == 1) return;
    for (int pass = 0, length = n; pass < plan.passes; ++pass) {
      const int radix = plan.radix[pass], m = length / radix;
      for (int p = 0; p < m; ++p)
        for (int j = 1; j < radix; ++j) {
          const double angle = 2 * std::numbers::pi * p * j / length;
          twiddle.push_back(static_cast<float>(std::cos(angle)));
          twiddle.push_back(static_cast<float>(-std::sin(angle)));
        }
      length = m;
    }
  }
  FftPlan view() const {
    FftPlan out = plan;
    out.twiddle = twiddle.data();
    return out;
  }
};

// How one direction of a box is transformed. Voxel t tile + c dilation + q of the box is cell c of phase q in tile t.
// All phases and tiles see the same kernel: they are transformed side by side, half of them as real, half as imaginary
// parts. Tiles are made where there is but one phase.
struct FftAxis {
  int cells = 1;  // length of the transform
  int tiles = 1, tile = 1;
  int dilation = 1, half = 0;
  bool circular = false;  // the transform goes round the grid, else results are folded when they are added up

  int subs() const { return tiles * dilation; }
  int first(int sub) const { return sub / dilation * tile + sub % dilation; }
};

// The transforms of one layer for boxes up to a given size.
//
//   buffer[block][z][y][x][re | im]   a block: as many numbers as a register holds, channels of all subs
//   lane of (state, sub, channel):    (state half_subs + sub % half_subs) channels + channel, re or im by sub /
//   half_subs spectrum[column][z][i][o], re then im; columns (y, x): one of each pair f, -f, whose spectra are
//   conjugate
struct LayerFft {
  FftAxis axis[3];
  Fft fft[3];
  int subs = 1, half_subs = 1;
  mutable std::once_flag made;
  mutable std::vector<float> spectrum;

  int64_t cells() const { return int64_t{1} * axis[0].cells * axis[1].cells * axis[2].cells; }
};

// Lays out the transforms of boxes of up to `count` voxels; null if a direction needs more than kMostFft cells.
// whole: boxes are the whole grid, and results are wanted inside it only.
std::unique_ptr<LayerFft> plan_fft(const Layer& layer, const Grid& grid, const Three& count, bool whole) {
  const auto direction = [&](int a, int tiles) {
    FftAxis out;
    out.dilation = layer.dilation[a];
    out.half = layer.half(a);
    out.tiles = tiles;
    const int cells = (count[a] + out.dilation - 1) / out.dilation, per_tile = (cells + tiles - 1) / tiles;
    out.tile = per_tile * out.dilation;
    if (tiles == 1 && grid.periodic[a] && count[a] == grid.n[a] && grid.n[a] % out.dilation == 0 && smooth(cells)) {
      out.circular = true;
      out.cells = cells;
    } else if (tiles == 1 && whole && !grid.periodic[a]) {
      out.cells = smooth_from(cells + out.half);  // what wraps round falls outside the grid
    } else {
      out.cells = smooth_from(per_tile + 2 * out.half);
    }
    return out;
  };
  auto out = std::make_unique<LayerFft>();
  out->subs = layer.dilation[0] * layer.dilation[1] * layer.dilation[2];
  for (int a = 0; a < 3; ++a) out->axis[a] = direction(a, 1);
  if (out->subs == 1) {
    int best = -1;
    int64_t least = 0;
    for (int a = 0; a < 3; ++a) {
      if (count[a] < 2) continue;
      const int64_t cells = out->cells() / out->axis[a].cells * direction(a, 2).cells;
      if (best < 0 || cells < least) best = a, least = cells;
    }
    if (best >= 0) {
      out->axis[best] = direction(best, 2);
      out->subs = 2;
    }
  }
  out->half_subs = (out->subs + 1) / 2;
  for (int a = 0; a < 3; ++a) {
    if (out->axis[a].cells > kMostFft) return nullptr;
    out->fft[a] = Fft(out->axis[a].cells);
  }
  return out;
}

// Working memory of one thread.
struct Scratch {
  Floats buffer, row, line, column[2], column_out[2], padded;
  Floats box[2];  // changes of a layer, and of the next
};

// The buffer and the strides of one set of transforms.
struct Transform {
  const QmapKernels& kernels;
  const LayerFft& f;
  int lanes, blocks_in, blocks_out;
  int64_t part, element, row, plane, block;  // floats: between re and im of a row or column; strides of the buffer
  FftPlan plan[3];
  float *buffer, *row_data, *column[2], *column_out[2];

  // in, out: numbers per cell before and behind the product
  Transform(const QmapKernels& k, const LayerFft& layer, int in, int out, Scratch& scratch)
      : kernels(k), f(layer), lanes(k.lanes) {
    blocks_in = (in + lanes - 1) / lanes;
    blocks_out = (out + lanes - 1) / lanes;
    const int blocks = std::max(blocks_in, blocks_out);
    part = int64_t{blocks + 1} * lanes;
    element = 2 * lanes;
    // One element more than needed: else strides are powers of two, and all of a column falls into one set of the
    // cache.
    row = (f.axis[2].cells + 1) * element;
    plane = f.axis[1].cells * row + element;
    block = f.axis[0].cells * plane;
    buffer = scratch.buffer.need(block * blocks);
    row_data = scratch.row.need(f.axis[2].cells * 2 * part);
    for (int side = 0; side < 2; ++side) {
      column[side] = scratch.column[side].need(f.axis[0].cells * 2 * part);
      column_out[side] = scratch.column_out[side].need(f.axis[0].cells * 2 * part);
    }
    for (int a = 0; a < 3; ++a) plan[a] = f.fft[a].view();
  }

  // The row (z, y) from row_data, of whose cells the first `valid` are given.
  void row_in(int z, int y, int valid) const {
    float* out = buffer + z * plane + y * row;
    kernels.fft(plan[2], {blocks_in, row_data, row_data + part, lanes, 2 * part, valid, out, out + lanes, block,
                          element, 0, f.axis[2].cells, 0});
  }
  void row_out(int z, int y, int from, int to) const {
    const float* in = buffer + z * plane + y * row;
    kernels.fft(plan[2], {blocks_out, in + lanes, in, block, element, f.axis[2].cells, row_data + part, row_data, lanes,
                          2 * part, from, to, 0});
  }
  void plane_in(int z, int valid) const {
    if (f.axis[1].cells == 1) return;
    for (int b = 0; b < blocks_in; ++b) {
      float* x = buffer + b * block + z * plane;
      kernels.fft(plan[1], {f.axis[2].cells, x, x + lanes, element, row, valid, x, x + lanes, element, row, 0,
                            f.axis[1].cells, 0});
    }
  }
  void plane_out(int z, int from, int to) const {
    if (f.axis[1].cells == 1) return;
    for (int b = 0; b < blocks_out; ++b) {
      float* x = buffer + b * block + z * plane;
      kernels.fft(plan[1], {f.axis[2].cells, x + lanes, x, element, row, f.axis[1].cells, x + lanes, x, element, row,
                            from, to, 0});
    }
  }
  void column_in(int y, int x, int valid, float* out, int64_t ahead) const {
    const float* in = buffer + y * row + x * element;
    kernels.fft(plan[0], {blocks_in, in, in + lanes, block, plane, valid, out, out + part, lanes, 2 * part, 0,
                          f.axis[0].cells, ahead});
  }
  void column_back(int y, int x, int from, int to, const float* in) const {
    float* out = buffer + y * row + x * element;
    kernels.fft(plan[0], {blocks_out, in + part, in, lanes, 2 * part, f.axis[0].cells, out + lanes, out, block, plane,
                          from, to, 0});
  }
  // Calls body(y, x, y of -f, x of -f) for one column of each pair.
  template <class Body>
  void pairs(Body body) const {
    const int ny = f.axis[1].cells, nx = f.axis[2].cells;
    for (int y = 0; y < ny; ++y)
      for (int x = 0; x < nx; ++x) {
        const int my = (ny - y) % ny, mx = (nx - x) % nx;
        if (y * nx + x <= my * nx + mx) body(y, x, my, mx);
      }
  }
};

const std::vector<float>& spectrum_of(const LayerFft& f, const Layer& layer, const QmapKernels& kernels) {
  std::call_once(f.made, [&] {
    // Kernels of (input, output) pairs are the signals: the first half of them real, the second half imaginary parts.
    const int inputs = layer.inputs, outputs = layer.outputs, half = (inputs * outputs + 1) / 2;
    Scratch scratch;
    const Transform t(kernels, f, half, half, scratch);
    const Three cells{f.axis[0].cells, f.axis[1].cells, f.axis[2].cells};
    Three valid;
    for (int a = 0; a < 3; ++a) valid[a] = std::min(layer.kernel[a], cells[a]);
    const double scale = 1.0 / static_cast<double>(f.cells());
    for (int z = 0; z < valid[0]; ++z) {
      for (int y = 0; y < valid[1]; ++y) {
        std::memset(t.row_data, 0, static_cast<std::size_t>(2 * t.part * cells[2]) * sizeof(float));
        // Layers correlate: the transform's kernel is turned round. It may be longer than a periodic grid.
        for (int kz = layer.kernel[0] - 1 - z; kz >= 0; kz -= cells[0])
          for (int ky = layer.kernel[1] - 1 - y; ky >= 0; ky -= cells[1])
            for (int kx = 0; kx < layer.kernel[2]; ++kx) {
              float* at = t.row_data + 2 * t.part * ((layer.kernel[2] - 1 - kx) % cells[2]);
              const float* w = layer.weights + (kz * layer.kernel[1] + ky) * layer.kernel[2] + kx;
              for (int i = 0; i < inputs; ++i)
                for (int o = 0; o < outputs; ++o) {
                  const int signal = i * outputs + o;
                  at[signal < half ? signal : signal - half + t.part] +=
                      static_cast<float>(scale * w[(o * inputs + i) * layer.taps()]);
                }
            }
        t.row_in(z, y, valid[2]);
      }
      t.plane_in(z, valid[1]);
    }
    const int64_t step = 2 * int64_t{inputs} * outputs;
    int64_t columns = 0;
    t.pairs([&](int, int, int, int) { ++columns; });
    f.spectrum.assign(static_cast<std::size_t>(columns * cells[0] * step + kernels.lanes), 0.0f);
    float* out = f.spectrum.data();
    t.pairs([&](int y, int x, int my, int mx) {
      t.column_in(y, x, valid[0], t.column[0], 0);
      t.column_in(my, mx, valid[0], t.column[1], 0);
      for (int z = 0; z < cells[0]; ++z, out += step) {
        const float *a = t.column[0] + 2 * t.part * z, *b = t.column[1] + 2 * t.part * ((cells[0] - z) % cells[0]);
        for (int s = 0; s < half; ++s) {
          const float re = 0.5f * (a[s] + b[s]), im = 0.5f * (a[s + t.part] - b[s + t.part]);
          out[s] = re;
          out[s + step / 2] = im;
          if (s + half >= inputs * outputs) continue;
          out[s + half] = 0.5f * (a[s + t.part] + b[s + t.part]);
          out[s + half + step / 2] = -0.5f * (a[s] - b[s]);
        }
      }
    });
  });
  return f.spectrum;
}

// A stretch of a row of cells that goes to, or comes from, consecutive voxels of a phase.
struct Stretch {
  int cell, count, voxel;
};

// The layer applied to in, without bias, for `states` arrays of the same box. Calls done(state, z, y, row) once for
// every row of the result (coordinates in its box), (n_x, outputs) numbers that it may change: at once where rows come
// whole, else at the end, from `out`, in which their parts are added up.
template <class Done>
void convolve_fft(const LayerFft& f, const Layer& layer, const Grid& grid, const QmapKernels& kernels, Scratch& scratch,
                  int states, const float* const* in, const QBox& in_box, float* const* out, const QBox& out_box,
                  Done done) {
  const std::vector<float>& spectrum = spectrum_of(f, layer, kernels);
  const int inputs = layer.inputs, outputs = layer.outputs, columns = states * f.half_subs;
  const Transform t(kernels, f, columns * inputs, columns * outputs, scratch);
  const FftAxis *az = f.axis, *ay = f.axis + 1, *ax = f.axis + 2;

  // Per direction and sub: how many cells the box has, and to which voxel of the result each cell goes.
  std::vector<int> given[3], target[3];
  Three valid{0, 0, 0}, from{0, 0, 0}, to{0, 0, 0};
  bool whole_rows = true;  // every voxel of the result gets one cell: no tiles, no images, no phase without input
  for (int a = 0; a < 3; ++a) {
    const FftAxis& axis = f.axis[a];
    from[a] = axis.cells;
    for (int sub = 0; sub < axis.subs(); ++sub) {
      const int end =
          std::min(in_box.count[a], axis.tiles == 1 ? in_box.count[a] : (sub / axis.dilation + 1) * axis.tile);
      given[a].push_back(std::max(0, (end - axis.first(sub) + axis.dilation - 1) / axis.dilation));
      valid[a] = std::max(valid[a], given[a].back());
    }
    const int reached = axis.circular ? axis.cells : std::min(axis.cells, valid[a] + 2 * axis.half);
    int targets = 0;
    for (int sub = 0; sub < axis.subs(); ++sub)
      for (int cell = 0; cell < axis.cells; ++cell) {
        const int u = in_box.first[a] + axis.first(sub) + (cell - axis.half) * axis.dilation;
        const int voxel = cell < reached && given[a][sub] > 0 ? grid.index(out_box, a, u) : -1;
        target[a].push_back(voxel);
        if (voxel < 0) continue;
        from[a] = std::min(from[a], cell);
        to[a] = std::max(to[a], cell + 1);
        ++targets;
      }
    whole_rows = whole_rows && axis.tiles == 1 && targets == out_box.count[a];
  }
  const int64_t row_size = int64_t{out_box.count[2]} * outputs;
  float* lines = scratch.line.need(states * row_size);  // a row of each state, put together from its phases along x
  if (!whole_rows)
    for (int s = 0; s < states; ++s) std::fill_n(out[s], out_box.voxels() * outputs, 0.0f);
  std::vector<std::vector<Stretch>> stretches(static_cast<std::size_t>(ax->subs()));
  for (int sub = 0; sub < ax->subs(); ++sub)
    for (int cell = from[2]; cell < to[2]; ++cell) {
      const int voxel = target[2][sub * ax->cells + cell];
      auto& list = stretches[sub];
      if (voxel < 0) continue;
      if (!list.empty() && list.back().cell + list.back().count == cell &&
          list.back().voxel + list.back().count * ax->dilation == voxel)
        ++list.back().count;
      else
        list.push_back({cell, 1, voxel});
    }

  const auto each_sub = [&](auto body) {
    int sub = 0;
    for (int sz = 0; sz < az->subs(); ++sz)
      for (int sy = 0; sy < ay->subs(); ++sy)
        for (int sx = 0; sx < ax->subs(); ++sx, ++sub)
          body(sz, sy, sx, sub % f.half_subs, sub < f.half_subs ? int64_t{0} : t.part);
  };
  const int64_t step = 2 * t.part;
  if (f.subs % 2 != 0)  // the imaginary part without a sub
    for (int x = 0; x < valid[2]; ++x)
      for (int s = 0; s < states; ++s)
        std::fill_n(t.row_data + x * step + t.part + ((s + 1) * f.half_subs - 1) * inputs, inputs, 0.0f);
  for (int z = 0; z < valid[0]; ++z) {
    for (int y = 0; y < valid[1]; ++y) {
      each_sub([&](int sz, int sy, int sx, int lane, int64_t part) {
        const int iz = az->first(sz) + z * az->dilation, iy = ay->first(sy) + y * ay->dilation;
        const int count = z < given[0][sz] && y < given[1][sy] ? given[2][sx] : 0;
        const int64_t start = ((int64_t{iz} * in_box.count[1] + iy) * in_box.count[2] + ax->first(sx)) * inputs;
        for (int s = 0; s < states; ++s) {
          float* row = t.row_data + part + (s * f.half_subs + lane) * inputs;
          if (count > 0) kernels.copy_runs(count, inputs, in[s] + start, int64_t{ax->dilation} * inputs, row, step);
          for (int x = count; x < valid[2]; ++x) std::fill_n(row + x * step, inputs, 0.0f);
        }
      });
      t.row_in(z, y, valid[2]);
    }
    t.plane_in(z, valid[1]);
  }

  const int nz = az->cells;
  const float* w = spectrum.data();
  const int64_t w_step = 2 * int64_t{inputs} * outputs;
  SpectrumProduct job{};
  job.count = nz;
  job.columns = columns;
  job.inputs = inputs;
  job.outputs = outputs;
  job.weight_step = w_step;
  for (int side = 0; side < 2; ++side) {
    job.in[side] = t.column[side];
    job.out[side] = t.column_out[side];
  }
  job.in_step = job.out_step = step;
  job.in_im = job.out_im = t.part;
  t.pairs([&](int y, int x, int my, int mx) {
    job.paired = my != y || mx != x;
    t.column_in(y, x, valid[0], t.column[0], t.element);
    if (job.paired) t.column_in(my, mx, valid[0], t.column[1], -t.element);
    job.weights = w;
    kernels.product(job);
    t.column_back(y, x, from[0], to[0], t.column_out[0]);
    if (job.paired) t.column_back(my, mx, from[0], to[0], t.column_out[1]);
    w += nz * w_step;
  });

  const auto put_runs = whole_rows ? kernels.copy_runs : kernels.add_runs;
  for (int z = from[0]; z < to[0]; ++z) {
    t.plane_out(z, from[1], to[1]);
    for (int y = from[1]; y < to[1]; ++y) {
      t.row_out(z, y, from[2], to[2]);
      each_sub([&](int sz, int sy, int sx, int lane, int64_t part) {
        const int oz = target[0][sz * az->cells + z], oy = target[1][sy * ay->cells + y];
        if (oz < 0 || oy < 0) return;
        for (int s = 0; s < states; ++s) {
          float* row = whole_rows ? lines + s * row_size : out[s] + (int64_t{oz} * out_box.count[1] + oy) * row_size;
          const float* cells = t.row_data + part + (s * f.half_subs + lane) * outputs;
          for (const Stretch& stretch : stretches[sx])
            put_runs(stretch.count, outputs, cells + stretch.cell * step, step, row + int64_t{stretch.voxel} * outputs,
                     int64_t{ax->dilation} * outputs);
          if (whole_rows && sx + 1 == ax->subs()) done(s, oz, oy, row);
        }
      });
    }
  }
  if (whole_rows) return;
  for (int s = 0; s < states; ++s)
    for (int z = 0; z < out_box.count[0]; ++z)
      for (int y = 0; y < out_box.count[1]; ++y) done(s, z, y, out[s] + (int64_t{z} * out_box.count[1] + y) * row_size);
}

// ---- sums ---------------------------------------------------------------------------------------------------
// Weights (tap, input, output), outputs padded with zeros to whole registers; bias likewise.
struct PackedLayer {
  int padded = 0;
  std::vector<float> weights, bias, no_bias;

  PackedLayer(const Layer& layer, int lanes) {
    padded = (layer.outputs + lanes - 1) / lanes * lanes;
    weights.assign(static_cast<std::size_t>(layer.taps() * layer.inputs * padded), 0.0f);
    no_bias.assign(static_cast<std::size_t>(padded), 0.0f);
    bias = no_bias;
    std::copy_n(layer.bias, layer.outputs, bias.begin());
    for (int o = 0; o < layer.outputs; ++o)
      for (int i = 0; i < layer.inputs; ++i)
        for (int64_t t = 0; t < layer.taps(); ++t)
          weights[static_cast<std::size_t>((t * layer.inputs + i) * padded + o)] =
              layer.weights[(int64_t{o} * layer.inputs + i) * layer.taps() + t];
  }
};

// out = layer applied to in (zero outside its box), plus the bias if wanted.
void convolve_direct(const Layer& layer, const PackedLayer& packed, const Grid& grid, const QmapKernels& kernels,
                     Scratch& scratch, const float* in, const QBox& in_box, float* out, const QBox& out_box,
                     bool with_bias) {
  // Rows of the input, spread along x over all that the kernel reads for the output.
  const int reach = layer.reach(2), width = out_box.count[2] + 2 * reach;
  const int64_t row_floats = int64_t{width} * layer.inputs, rows = int64_t{in_box.count[0]} * in_box.count[1];
  float* padded = scratch.padded.need(rows * row_floats);
  for (int e = 0; e < width; ++e) {
    const int x = grid.index(in_box, 2, out_box.first[2] + e - reach);
    for (int64_t r = 0; r < rows; ++r) {
      float* to = padded + r * row_floats + int64_t{e} * layer.inputs;
      if (x < 0)
        std::fill_n(to, layer.inputs, 0.0f);
      else
        std::copy_n(in + (r * in_box.count[2] + x) * layer.inputs, layer.inputs, to);
    }
  }
  std::vector<int64_t> in_rows, weight_rows;
  DirectRow job{0, layer.kernel[2], layer.inputs, layer.outputs, packed.padded, nullptr, nullptr, 0, nullptr, nullptr};
  job.tap_step = int64_t{layer.dilation[2]} * layer.inputs;
  job.weights = packed.weights.data();
  job.bias = with_bias ? packed.bias.data() : packed.no_bias.data();
  for (int z = 0; z < out_box.count[0]; ++z) {
    for (int y = 0; y < out_box.count[1]; ++y) {
      in_rows.clear();
      weight_rows.clear();
      for (int kz = 0; kz < layer.kernel[0]; ++kz) {
        const int iz = grid.index(in_box, 0, out_box.first[0] + z + (kz - layer.half(0)) * layer.dilation[0]);
        for (int ky = 0; ky < layer.kernel[1] && iz >= 0; ++ky) {
          const int iy = grid.index(in_box, 1, out_box.first[1] + y + (ky - layer.half(1)) * layer.dilation[1]);
          if (iy < 0) continue;
          in_rows.push_back((int64_t{iz} * in_box.count[1] + iy) * row_floats);
          weight_rows.push_back(int64_t{kz * layer.kernel[1] + ky} * layer.kernel[2]);
        }
      }
      job.rows = static_cast<int>(in_rows.size());
      job.in_row = in_rows.data();
      job.weight_row = weight_rows.data();
      kernels.direct_row(job, padded, out + (int64_t{z} * out_box.count[1] + y) * out_box.count[2] * layer.outputs,
                         out_box.count[2]);
    }
  }
}

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

// Runs work(first, last) on `threads` threads over groups of a fixed size: shares never depend on the thread count.
template <class Work>
void in_groups(int64_t n, int64_t group, int threads, Work work) {
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex guard;
  const auto loop = [&] {
    try {
      Scratch scratch;
      for (int64_t first; (first = next.fetch_add(group)) < n;) work(first, std::min(n, first + group), scratch);
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
  Three width{1, 1, 1};  // of the representation
  std::uint64_t id = 0;  // no other map of this process has it

  std::vector<std::unique_ptr<LayerFft>> local, whole;  // per layer from the second on; null: not possible
  std::vector<QBox> largest;                            // unfolded boxes that one atom changes, at the origin

  // Activations of the hidden layers without atoms: values[l] on a smaller grid, to which index leads.
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
  mutable std::once_flag packed_made, stamps_made, empty_made, gather_made;
  mutable std::vector<PackedLayer> packed;
  mutable std::vector<std::vector<float>> stamps;  // per species: change of layer 1 far from walls, (box, outputs)
  mutable Empty empty;
  mutable Floats gather_weights;
  int gather_padded = 0;
  Layout gather_layout;
  std::vector<int64_t> gather_plane, gather_row, gather_column;

  int species() const { return network->species(); }
  int hidden() const { return static_cast<int>(layers.size()) - 1; }

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
    const QRepresentation& r = network->representation();
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
  void add_atom(const Placed& atom, const QBox& box, float* out, Floats& clipped) const {
    const Three at = position(atom.voxel);
    const QBox& unfolded = largest[0];
    const int outputs = layers[0].outputs;
    Three first, last;
    bool whole_stamp = true;
    for (int a = 0; a < 3; ++a) {
      first[a] = -(width[a] / 2);
      last[a] = width[a] / 2 + 1;
      if (grid.periodic[a]) continue;
      if (at[a] + first[a] < 0) first[a] = -at[a], whole_stamp = false;
      if (at[a] + last[a] > grid.n[a]) last[a] = grid.n[a] - at[a], whole_stamp = false;
    }
    const float* stamp;
    if (whole_stamp) {
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

  std::vector<float> dense(std::span<const Placed> placed) const;
  const Empty& empty_state() const;

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
  const QRepresentation& r = network->representation();
  const QBox all = grid.whole();
  std::vector<float> input(static_cast<std::size_t>(grid.voxels() * r.channels));
  for (int64_t v = 0; v < grid.voxels(); ++v) std::copy(r.bias.begin(), r.bias.end(), input.begin() + v * r.channels);
  const int64_t volume = product_of(width);
  for (const Placed& atom : placed) {
    check(atom);
    const Three at = position(atom.voxel);
    for (int64_t k = 0; k < volume; ++k) {
      const int z = grid.index(all, 0, at[0] + static_cast<int>(k / width[2] / width[1]) - width[0] / 2),
                y = grid.index(all, 1, at[1] + static_cast<int>(k / width[2] % width[1]) - width[1] / 2),
                x = grid.index(all, 2, at[2] + static_cast<int>(k % width[2]) - width[2] / 2);
      if (z < 0 || y < 0 || x < 0) continue;
      const int64_t voxel = (int64_t{z} * grid.n[1] + y) * grid.n[2] + x;
      for (int c = 0; c < r.channels; ++c)
        input[static_cast<std::size_t>(voxel * r.channels + c)] +=
            r.kernel[static_cast<std::size_t>((int64_t{c} * r.species + atom.species) * volume + k)];
    }
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
      // Counted in steps of the dilation where all layers share it, else in voxels.
      const int d = layers[0].dilation[a];
      const bool shared =
          std::all_of(layers.begin(), layers.end() - 1, [&](const Layer& l) { return l.dilation[a] == d; });
      const int step = shared ? d : 1;
      int reach = 0;
      for (int l = 0; l < hidden(); ++l) reach += layers[static_cast<std::size_t>(l)].reach(a) / step;
      const int enough = grid.periodic[a] ? 1 : 2 * reach + 1;
      const bool reduced = grid.periodic[a] || grid.n[a] / step >= enough;
      if (reduced) {
        small.n[a] = enough;
        for (Layer& layer : small_layers) layer.dilation[a] /= grid.periodic[a] ? layer.dilation[a] : step;
      }
      for (int x = 0; x < grid.n[a]; ++x) {
        const int low = x / step, high = (grid.n[a] - 1 - x) / step;
        empty.index[a].push_back(!reduced           ? x
                                 : grid.periodic[a] ? 0
                                 : low < reach      ? low
                                 : high < reach     ? enough - 1 - high
                                                    : reach);
      }
    }
    empty.grid = small;
    const QRepresentation& r = network->representation();
    std::vector<float> in(static_cast<std::size_t>(small.voxels() * r.channels));
    for (int64_t v = 0; v < small.voxels(); ++v) std::copy(r.bias.begin(), r.bias.end(), in.begin() + v * r.channels);
    Scratch scratch;
    const QBox all = small.whole();
    for (int l = 0; l < hidden(); ++l) {
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
      kernels.leaky(static_cast<int64_t>(out.size()), out.data());
      empty.values.push_back(out);
      in = std::move(out);
    }
  });
  return empty;
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
  m.width = along(m.network->representation().width, 1);
  QBox box;
  for (int a = 0; a < 3; ++a) {
    box.first[a] = -(m.width[a] / 2);
    box.count[a] = m.width[a];
  }
  for (const Layer& layer : m.layers) {
    Three count;
    for (int a = 0; a < 3; ++a) count[a] = std::min(box.count[a], m.grid.n[a]);
    m.local.push_back(m.largest.empty() ? nullptr : plan_fft(layer, m.grid, count, false));
    m.whole.push_back(m.largest.empty() ? nullptr : plan_fft(layer, m.grid, m.grid.n, true));
    box = Grid::grown(box, layer.reach());
    m.largest.push_back(box);
  }
  m.make_gather();
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
  if (!m.grid_fft_possible()) {
    in_groups(n, 1, threads, [&](int64_t first, int64_t, Scratch&) {
      const std::vector<float> q = m.dense(atoms(first));
      std::copy(q.begin(), q.end(), out.begin() + first * map);
    });
    return out;
  }
  // Enough states to fill the registers, few enough to stay in the cache.
  const LayerFft& plan = *m.whole[1];
  const int64_t fill = std::max(1, 80 / (plan.half_subs * m.layers[1].inputs)),
                fit = std::max<int64_t>(1, (1 << 15) / plan.cells()), group = std::min(fill, fit);
  int most = 0;
  for (const Layer& layer : m.layers) most = std::max(most, layer.outputs);
  // Pre-activations without atoms, from which leaky ReLU is undone: every state adds a stamp per atom to them.
  const Impl::Empty& empty = m.empty_state();
  const int channels = m.layers[0].outputs;
  std::vector<float> start(static_cast<std::size_t>(voxels * channels));
  for (int64_t v = 0; v < voxels; ++v) {
    const Three at = m.position(v);
    const float* a = empty.at(0, channels, at[0], at[1], at[2]);
    for (int c = 0; c < channels; ++c)
      start[static_cast<std::size_t>(v * channels + c)] = a[c] > 0 ? a[c] : a[c] * 100.0f;
  }
  in_groups(n, group, threads, [&](int64_t first, int64_t last, Scratch& scratch) {
    const int states = static_cast<int>(last - first);
    const int64_t size = voxels * most;
    float* memory = scratch.box[0].need(2 * group * size);
    std::vector<float*> in, spare, q;
    const QBox all = m.grid.whole();
    for (int s = 0; s < states; ++s) {
      in.push_back(memory + 2 * s * size);
      spare.push_back(in.back() + size);
      q.push_back(out.data() + (first + s) * map);
      std::copy(start.begin(), start.end(), in[s]);
      for (const Placed& atom : atoms(first + s)) m.add_atom(atom, all, in[s], scratch.box[1]);
      m.kernels.leaky(voxels * channels, in[s]);
    }
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

QMethod QMap::choose(std::int64_t asked) const {
  const Impl& m = *impl_;
  double direct = 0, local = 0, whole = 0;
  for (int l = 1; l < m.hidden(); ++l) {
    direct += m.direct_cost(l);
    local += m.cost(m.local[l].get(), m.layers[l]);
  }
  for (std::size_t l = 1; l < m.layers.size(); ++l) whole += m.cost(m.whole[l].get(), m.layers[l]);
  const Layer& last = m.layers.back();
  const double gather = 2.0 * static_cast<double>(asked * last.taps()) * last.inputs * last.outputs / 25e9;
  if (whole <= std::min(direct, local) + gather) return QMethod::grid_fft;
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
  std::vector<Layout> layouts;  // of the activations that are kept: all hidden layers, or layer 1
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
    if (method == QMethod::automatic) method = owner->choose(std::min<int64_t>(25000, m.grid.voxels()));
    if ((method == QMethod::grid_fft && !m.grid_fft_possible()) ||
        (method == QMethod::local_fft && !m.local_fft_possible()))
      throw Error("this grid needs Fourier transforms of more than " + text(kMostFft) +
                  " cells; choose the method `direct`");
    const int kept = method == QMethod::grid_fft ? 1 : m.hidden();
    const QMap::Impl::Empty& empty = m.empty_state();
    for (int l = 0; l < kept; ++l) {
      const bool last = method != QMethod::grid_fft && l + 1 == m.hidden();
      const int channels = m.layers[static_cast<std::size_t>(l)].outputs;
      layouts.push_back(last ? m.gather_layout : Layout::plain(m.grid, channels));
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
        m.kernels.update(box.count[2], layout.channels, offsets.data(), data, ahead * layout.row, row,
                         saved.data() + position);
        repeat_images(m.grid, layout, box, data);
        if (row != change + position && l + 1 < layouts.size()) std::copy_n(row, size, change + position);
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
    voxels.resize(static_cast<std::size_t>(3 * n));
    for (int64_t k = 0; k < n; ++k) {
      const Three at = m.position(asked[k]);
      std::copy(at.begin(), at.end(), voxels.begin() + 3 * k);
    }
    values.resize(static_cast<std::size_t>(n * species));
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
