// Convolutions of boxes of a grid, by sums and by Fourier transforms: what the Q-map is made of.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <numbers>
#include <utility>
#include <vector>

#include "buffer.hpp"
#include "qmap_kernels.hpp"
#include "thalweg/qmap.hpp"  // QBox

namespace thalweg::convolution {

using std::int64_t;

// Everything below works in three directions z, y, x. A grid of two directions has one voxel along y: it keeps its
// layout, and transforms along z and x are the ones that the code is fastest at.
using Three = std::array<int, 3>;

inline int64_t product_of(const Three& n) { return int64_t{1} * n[0] * n[1] * n[2]; }
inline int modulo(int a, int n) { return (a % n + n) % n; }

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
inline bool smooth(int n) {
  for (const int p : {2, 3, 5})
    while (n % p == 0) n /= p;
  return n == 1;
}
inline int smooth_from(int n) {
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
  mutable Floats spectrum;

  int64_t cells() const { return int64_t{1} * axis[0].cells * axis[1].cells * axis[2].cells; }
};

// Lays out the transforms of boxes of up to `count` voxels; null if a direction needs more than kMostFft cells.
// whole: boxes are the whole grid, and results are wanted inside it only.
inline std::unique_ptr<LayerFft> plan_fft(const Layer& layer, const Grid& grid, const Three& count, bool whole) {
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
  Floats buffer, row, column[2], column_out[2], padded;
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

inline const float* spectrum_of(const LayerFft& f, const Layer& layer, const QmapKernels& kernels) {
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
    float* out = f.spectrum.need(columns * cells[0] * step + kernels.lanes);
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
  return f.spectrum.data();
}

// A stretch of a row of cells that goes to, or comes from, consecutive voxels of a phase, or of so many phases.
struct Stretch {
  int cell, count, voxel, phases;
};

// The layer applied to in, without bias, for `states` arrays of the same box. Calls done(state, z, y, row) once for
// every row of the result (coordinates in its box), (n_x, outputs) numbers of `out` that it may change: at once where
// rows come whole, else at the end, when their parts are added up.
template <class Done>
void convolve_fft(const LayerFft& f, const Layer& layer, const Grid& grid, const QmapKernels& kernels, Scratch& scratch,
                  int states, const float* const* in, const QBox& in_box, float* const* out, const QBox& out_box,
                  Done done) {
  const float* w = spectrum_of(f, layer, kernels);
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
    whole_rows = whole_rows && axis.tiles == 1 && targets == out_box.count[a] &&
                 std::all_of(given[a].begin(), given[a].end(), [](int cells) { return cells > 0; });
  }
  const int64_t row_size = int64_t{out_box.count[2]} * outputs;
  if (!whole_rows)
    for (int s = 0; s < states; ++s) std::fill_n(out[s], out_box.voxels() * outputs, 0.0f);
  // Per phase, and of what the phases have in common in the first one.
  std::vector<std::vector<Stretch>> stretches(static_cast<std::size_t>(ax->subs())), shared = stretches;
  const auto extend = [&](std::vector<Stretch>& list, int cell, int voxel, int phases) {
    if (!list.empty() && list.back().cell + list.back().count == cell && list.back().phases == phases &&
        list.back().voxel + list.back().count * ax->dilation == voxel)
      ++list.back().count;
    else
      list.push_back({cell, 1, voxel, phases});
  };
  for (int cell = from[2]; cell < to[2]; ++cell) {
    const auto voxel = [&](int sub) { return target[2][static_cast<std::size_t>(sub * ax->cells + cell)]; };
    bool common = whole_rows && voxel(0) >= 0;
    for (int sub = 1; sub < ax->subs(); ++sub) common = common && voxel(sub) == voxel(0) + sub;
    if (common) extend(shared[0], cell, voxel(0), ax->subs());
    for (int sub = 0; sub < ax->subs(); ++sub) {
      if (voxel(sub) < 0) continue;
      extend(stretches[static_cast<std::size_t>(sub)], cell, voxel(sub), 1);
      if (!common) extend(shared[static_cast<std::size_t>(sub)], cell, voxel(sub), 1);
    }
  }

  // Phases along x lie side by side in rows as in lanes: `together` of them are copied as one run as far as all have
  // cells.
  const auto each_sub = [&](auto body) {
    for (int sz = 0; sz < az->subs(); ++sz)
      for (int sy = 0; sy < ay->subs(); ++sy)
        for (int sx = 0; sx < ax->subs();) {
          const int sub = (sz * ay->subs() + sy) * ax->subs() + sx, lane = sub % f.half_subs;
          const int together = ax->tiles == 1 && sx == 0 && lane + ax->subs() <= f.half_subs ? ax->subs() : 1;
          body(sz, sy, sx, together, lane, sub < f.half_subs ? int64_t{0} : t.part);
          sx += together;
        }
  };
  const int64_t step = 2 * t.part;
  if (f.subs % 2 != 0)  // the imaginary part without a sub
    for (int x = 0; x < valid[2]; ++x)
      for (int s = 0; s < states; ++s)
        std::fill_n(t.row_data + x * step + t.part + ((s + 1) * f.half_subs - 1) * inputs, inputs, 0.0f);
  const int64_t ahead = int64_t{ay->dilation} * in_box.count[2] * inputs;  // what the next y needs
  for (int z = 0; z < valid[0]; ++z) {
    for (int y = 0; y < valid[1]; ++y) {
      each_sub([&](int sz, int sy, int sx, int together, int lane, int64_t part) {
        const int iz = az->first(sz) + z * az->dilation, iy = ay->first(sy) + y * ay->dilation;
        const bool inside = z < given[0][sz] && y < given[1][sy];
        const int64_t start = ((int64_t{iz} * in_box.count[1] + iy) * in_box.count[2] + ax->first(sx)) * inputs;
        const int64_t in_step = int64_t{ax->dilation} * inputs;
        const int all = inside ? given[2][sx + together - 1] : 0;  // the last one has the fewest
        for (int s = 0; s < states; ++s) {
          float* row = t.row_data + part + (s * f.half_subs + lane) * inputs;
          if (all > 0) kernels.copy_runs(all, together * inputs, in[s] + start, in_step, ahead, row, step);
          for (int k = 0; k < together; ++k) {
            const int count = inside ? given[2][sx + k] : 0;
            for (int x = all; x < valid[2]; ++x) {
              float* cell = row + x * step + k * inputs;
              if (x < count)
                std::copy_n(in[s] + start + x * in_step + k * inputs, inputs, cell);
              else
                std::fill_n(cell, inputs, 0.0f);
            }
          }
        }
      });
      t.row_in(z, y, valid[2]);
    }
    t.plane_in(z, valid[1]);
  }

  const int nz = az->cells;
  const int64_t w_step = 2 * int64_t{inputs} * outputs;
  SpectrumProduct job{};
  job.count = nz;
  job.columns = columns;
  job.inputs = inputs;
  job.outputs = outputs;
  job.weight_step = w_step;
  job.weights_ahead = f.spectrum.size() > (std::size_t{1} << 18) ? 3 * w_step : 0;  // a smaller one stays in the cache
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

  for (int z = from[0]; z < to[0]; ++z) {
    t.plane_out(z, from[1], to[1]);
    for (int y = from[1]; y < to[1]; ++y) {
      t.row_out(z, y, from[2], to[2]);
      each_sub([&](int sz, int sy, int sx, int together, int lane, int64_t part) {
        const int oz = target[0][sz * az->cells + z], oy = target[1][sy * ay->cells + y];
        if (oz < 0 || oy < 0) return;
        for (int s = 0; s < states; ++s) {
          float* row = out[s] + (int64_t{oz} * out_box.count[1] + oy) * row_size;
          const float* cells = t.row_data + part + (s * f.half_subs + lane) * outputs;
          const int64_t to_step = int64_t{ax->dilation} * outputs;
          for (int k = 0; k < together; ++k)
            for (const Stretch& stretch : (together > 1 ? shared : stretches)[static_cast<std::size_t>(sx + k)]) {
              const float* from_cell = cells + stretch.cell * step + k * outputs;
              float* to_voxel = row + int64_t{stretch.voxel} * outputs;
              if (whole_rows)
                kernels.copy_runs(stretch.count, stretch.phases * outputs, from_cell, step, 0, to_voxel, to_step);
              else
                kernels.add_runs(stretch.count, outputs, from_cell, step, to_voxel, to_step);
            }
          if (whole_rows && sx + together == ax->subs()) done(s, oz, oy, row);
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
inline void convolve_direct(const Layer& layer, const PackedLayer& packed, const Grid& grid, const QmapKernels& kernels,
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

}  // namespace thalweg::convolution
