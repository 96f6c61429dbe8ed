// Twin of soap.cpp: formulas as in soap_kernels.hpp and soap_isa.cpp. A block takes a centre (of any structure: small
// ones fill a device, too), and its neighbours a tile at a time, species after species. In device memory:
//
//   order         (m, capacity)             entries of an atom's list, sorted by species, else in the order of the list
//   starts        (m, species + 1)          where each species begins in `order`
//   coefficients  (m, harmonics, channels)  c of every centre; channels = species * n_max; the state between values()
//                                           and contract()
//   pull          (3, m, capacity)          derivatives by the vectors from a centre to its neighbours
//
// and in shared memory, a tile being `width` neighbours:
//
//   terms     (harmonics, n_max)           sums over neighbours of one species (values), slopes by them (contract)
//   geometry  (6, width)                   x, y, z, square of the distance, weight, its slope
//   rows      (width, stride)              values:   radial functions (exponents) | harmonics
//                                          contract: radial functions | what they change by (exponents each)
//   parts     (3, l_max + 1, width)        contract: derivatives by x, y, z, of each m
//
// stride is odd: neither threads that fill a column (one neighbour each) nor those that read along a row meet in a
// bank. Parts lie beyond what the next species begins to write while they are still summed: that saves a barrier.
//
// What limits it: shared memory. The width shrinks from 32 to 4 neighbours to stay within kShared where it can (n_max
// 16, l_max 12 takes 45 of the 48 kB that a launch may have), of which six blocks fit on an H100 and four on an A100
// (n_max 6, l_max 4: 32 neighbours, 16 kB for values and 20 kB for forces; n_max 8, l_max 6: 30 kB, and 16 neighbours
// for forces). Registers come second, 40 and 80 a thread (nvcc 13.0, -Xptxas -v): no thread keeps an array, each runs
// up the degrees l of one m with the last two polynomials at hand. Sums over neighbours cost a multiplication per term
// and neighbour, from two reads of shared memory; to keep several sums of one harmonic in a thread would halve these,
// and waits for a device to measure on.
#include <cmath>

#include "neighbors.cuh"
#include "soap_tables.hpp"

namespace thalweg::cuda {
namespace {

constexpr std::size_t kShared = 32 * 1024, kMostShared = 48 * 1024;
constexpr int kGeometry = 6;

/// The two channels and the degree of a feature.
struct Product {
  std::int16_t degree, a, b;
};

struct View {
  std::int32_t n_max, l_max, harmonics, exponents, species, channels, padded_n, size;
  std::int32_t terms;  // harmonics * n_max
  bool smooth;
  double r_cut, reach;
  const double *gamma, *to_basis, *norm, *factor;  // soap_kernels.hpp
  const std::int32_t* exponent_of;
  const std::int32_t* degree;   // (harmonics)
  const double* inverse;        // (l_max + 2): 1 / k
  const Product* products;      // (size)
  const std::int32_t* feature;  // (channels, channels): of degree 0
  /// From a product of two channels to that of the next degree.
  __device__ int apart(int a, int b) const { return a / n_max == b / n_max ? n_max * (n_max + 1) / 2 : n_max * n_max; }
};

/// Neighbours of one centre at a time in shared memory.
struct Tile {
  std::int32_t width, stride, parts;  // the last: where the parts begin, behind geometry and rows
  std::size_t bytes;
};

struct Groups {
  std::int32_t *order, *starts;
};

/// The weight of a neighbour at square distance s, and twice its derivative with respect to s.
__device__ void fade(const View& v, double s, double& weight, double& slope) {
  weight = 1.0;
  slope = 0.0;
  if (!v.smooth) return;
  const double width = v.reach - v.r_cut, r = sqrt(s > 1e-12 ? s : 1e-12);
  const double u = fmin(fmax((r - v.r_cut) / width, 0.0), 1.0);
  weight = 1.0 - u * u * u * (10.0 + u * (6.0 * u - 15.0));
  slope = -30.0 / width * (u * (1.0 - u)) * (u * (1.0 - u)) / r;
}

/// (x + i y)^m and (2 m - 1)!!.
__device__ void begin_order(int m, double x, double y, double& cosine, double& sine, double& top) {
  cosine = 1.0;
  sine = 0.0;
  top = 1.0;
  for (int k = 1; k <= m; ++k) {
    const double turned = x * cosine - y * sine;
    sine = x * sine + y * cosine;
    cosine = turned;
    top *= 2 * k - 1;
  }
}

/// Q_lm from Q_l-1,m and Q_l-2,m, for l > m.
__device__ double next_degree(const View& v, int l, int m, double z, double s, double q, double below) {
  return ((2 * l - 1) * z * q - (l + m - 1) * s * below) * v.inverse[l - m];
}

/// Neighbours of species s of a centre go into the tile from place `first` of their order on; returns how many.
__device__ int load_geometry(const View& v, const Tile& tile, const NeighborView& list, const Groups& groups,
                             std::int64_t i, int first, int last, double* geometry) {
  const int count = last - first < tile.width ? last - first : tile.width, j = static_cast<int>(threadIdx.x);
  if (j < count) {
    const std::int64_t e = i * list.capacity + groups.order[i * list.capacity + first + j];
    const double x = list.x[e], y = list.y[e], z = list.z[e], s = x * x + y * y + z * z;
    double* g = geometry + j;
    g[0] = x;
    g[tile.width] = y;
    g[2 * tile.width] = z;
    g[3 * tile.width] = s;
    fade(v, s, g[4 * tile.width], g[5 * tile.width]);
  }
  __syncthreads();
  return count;
}

// A block a structure, a warp an atom.
__global__ void __launch_bounds__(kThreads)
    sort_by_species(Rows rows, NeighborView list, const std::int32_t* species, int kinds, Groups out) {
  const unsigned row = blockIdx.x;
  if (rows.skips(row)) return;
  const int lane = static_cast<int>(lane_index());
  for (std::int64_t i = rows.offsets[row] + warp_index(); i < rows.offsets[row + 1]; i += kWarps) {
    std::int32_t *order = out.order + i * list.capacity, *starts = out.starts + i * (kinds + 1);
    int found = 0;
    for (int s = 0; s < kinds; ++s) {
      if (lane == 0) starts[s] = found;
      for (int base = 0; base < list.count[i]; base += kLanes) {
        const int k = base + lane;
        const bool mine = k < list.count[i] && species[list.atom[i * list.capacity + k]] == s;
        const int until = warp_scan(mine ? 1 : 0);
        if (mine) order[found + until - 1] = k;
        found += __shfl_sync(kAllLanes, until, kLanes - 1);
      }
    }
    if (lane == 0) starts[kinds] = found;
  }
}

__global__ void __launch_bounds__(kThreads)
    soap_values(Rows rows, View v, Tile tile, NeighborView list, Groups groups, const std::int32_t* row_of,
                const std::int32_t* species, double* coefficients, double* features) {
  THALWEG_DYNAMIC_SHARED(double, terms);
  double *geometry = terms + v.terms, *table = geometry + kGeometry * tile.width;
  const std::int64_t i = blockIdx.x;
  const auto row = static_cast<unsigned>(row_of[i]);
  const int t = static_cast<int>(threadIdx.x);
  if (rows.skips(row)) return;
  features += i * v.size;
  if (!list.usable[row]) {
    for (int f = t; f < v.size; f += kThreads) features[f] = not_a_number();
    return;
  }
  double* c = coefficients + i * v.harmonics * v.channels;
  const std::int32_t* starts = groups.starts + i * (v.species + 1);
  for (int s = 0; s < v.species; ++s) {
    // The centre sees itself, too: there only the harmonic of l = 0 is not zero, and everything else is one.
    for (int o = t; o < v.terms; o += kThreads) terms[o] = s == species[i] && o < v.n_max ? 1.0 : 0.0;
    for (int first = starts[s]; first < starts[s + 1]; first += tile.width) {
      const int count = load_geometry(v, tile, list, groups, i, first, starts[s + 1], geometry);
      // Orders first, the longest ahead; then exponentials.
      for (int task = t; task < tile.width * (v.l_max + 1 + v.exponents); task += kThreads) {
        const int j = task % tile.width, m = task / tile.width;
        if (j >= count) continue;
        double* to = table + j * tile.stride;
        const double square = geometry[3 * tile.width + j];
        if (m > v.l_max) {
          const int k = m - v.l_max - 1;
          to[k] = geometry[4 * tile.width + j] * exp(-v.gamma[k] * square);
          continue;
        }
        const double z = geometry[2 * tile.width + j];
        double cosine, sine, q, below = 0;
        begin_order(m, geometry[j], geometry[tile.width + j], cosine, sine, q);
        to += v.exponents;
        for (int l = m; l <= v.l_max; ++l) {
          to[l * l + l + m] = q * cosine;
          if (m > 0) to[l * l + l - m] = q * sine;
          if (l == v.l_max) break;
          const double next = next_degree(v, l + 1, m, z, square, q, below);
          below = q;
          q = next;
        }
      }
      __syncthreads();
      for (int o = t; o < v.terms; o += kThreads) {
        const int lm = o / v.n_max, k = o % v.n_max;
        const double* radial = table + v.exponent_of[v.degree[lm] * v.n_max + k];
        const double* harmonic = table + v.exponents + lm;
        double sum = terms[o];
        for (int j = 0; j < count; ++j) sum += radial[j * tile.stride] * harmonic[j * tile.stride];
        terms[o] = sum;
      }
    }
    __syncthreads();
    for (int o = t; o < v.terms; o += kThreads) {
      const int lm = o / v.n_max, n = o % v.n_max;
      const double* matrix = v.to_basis + v.degree[lm] * v.n_max * v.padded_n + n;
      double sum = 0;
      for (int k = 0; k < v.n_max; ++k) sum += matrix[k * v.padded_n] * terms[lm * v.n_max + k];
      c[lm * v.channels + s * v.n_max + n] = v.norm[lm] * sum;
    }
    __syncthreads();
  }
  for (int f = t; f < v.size; f += kThreads) {
    const Product p = v.products[f];
    double sum = 0;
    for (int lm = p.degree * p.degree; lm < (p.degree + 1) * (p.degree + 1); ++lm)
      sum += c[lm * v.channels + p.a] * c[lm * v.channels + p.b];
    features[f] = v.factor[p.degree] * sum;
  }
}

// A block a structure.
__global__ void __launch_bounds__(kThreads)
    average(Rows rows, int size, bool mean, const double* each, double* features) {
  const unsigned row = blockIdx.x;
  if (rows.skips(row)) return;
  const std::int64_t first = rows.offsets[row], last = rows.offsets[row + 1];
  const double share = mean ? 1.0 / static_cast<double>(last - first) : 1.0;
  for (int f = static_cast<int>(threadIdx.x); f < size; f += kThreads) {
    double sum = 0;
    for (std::int64_t i = first; i < last; ++i) sum += each[i * size + f];
    features[std::int64_t{row} * size + f] = share * sum;
  }
}

__global__ void __launch_bounds__(kThreads)
    soap_pulls(Rows rows, View v, Tile tile, NeighborView list, Groups groups, const std::int32_t* row_of,
               const double* coefficients, const double* weights, bool averaged, double* pull, std::size_t plane) {
  THALWEG_DYNAMIC_SHARED(double, terms);
  double *geometry = terms + v.terms, *table = geometry + kGeometry * tile.width;
  double *parts = geometry + tile.parts, *of_c = geometry;  // of_c (harmonics, n_max): before the tiles, beside parts
  const std::int64_t i = blockIdx.x;
  const auto row = static_cast<unsigned>(row_of[i]);
  const int t = static_cast<int>(threadIdx.x);
  if (rows.skips(row) || !list.usable[row]) return;
  weights += (averaged ? std::int64_t{row} : i) * v.size;
  const double* c = coefficients + i * v.harmonics * v.channels;
  const std::int32_t* starts = groups.starts + i * (v.species + 1);
  for (int s = 0; s < v.species; ++s) {
    if (starts[s] == starts[s + 1]) continue;
    for (int o = t; o < v.terms; o += kThreads) {
      const int lm = o / v.n_max, l = v.degree[lm], a = s * v.n_max + o % v.n_max;
      double sum = 0;
      for (int b = 0; b < v.channels; ++b) {
        const double w = weights[v.feature[a * v.channels + b] + l * v.apart(a, b)] * c[lm * v.channels + b];
        sum += a == b ? 2.0 * w : w;
      }
      of_c[o] = v.factor[l] * v.norm[lm] * sum;
    }
    __syncthreads();
    for (int o = t; o < v.terms; o += kThreads) {
      const int lm = o / v.n_max;
      const double* matrix = v.to_basis + (v.degree[lm] * v.n_max + o % v.n_max) * v.padded_n;
      double sum = 0;
      for (int n = 0; n < v.n_max; ++n) sum += matrix[n] * of_c[lm * v.n_max + n];
      terms[o] = sum;
    }
    __syncthreads();
    for (int first = starts[s]; first < starts[s + 1]; first += tile.width) {
      const int count = load_geometry(v, tile, list, groups, i, first, starts[s + 1], geometry);
      for (int task = t; task < tile.width * v.exponents; task += kThreads) {
        const int j = task % tile.width, k = task / tile.width;
        if (j >= count) continue;
        const double *g = geometry + j, gamma = v.gamma[k], e = exp(-gamma * g[3 * tile.width]);
        double* to = table + j * tile.stride + k;
        to[0] = g[4 * tile.width] * e;
        to[v.exponents] = (g[5 * tile.width] - 2.0 * gamma * g[4 * tile.width]) * e;
      }
      __syncthreads();
      for (int task = t; task < tile.width * (v.l_max + 1); task += kThreads) {
        const int j = task % tile.width, m = task / tile.width;
        if (j >= count) continue;
        const double *radial = table + j * tile.stride, *g = geometry + j;
        const double x = g[0], y = g[tile.width], z = g[2 * tile.width], square = g[3 * tile.width];
        double cosine, sine, top, below_cosine = 0, below_sine = 0;
        begin_order(m > 0 ? m - 1 : 0, x, y, cosine, sine, top);
        if (m > 0) {
          below_cosine = cosine;
          below_sine = sine;
          cosine = x * below_cosine - y * below_sine;
          sine = x * below_sine + y * below_cosine;
          top *= 2 * m - 1;
        }
        double q = top, q_below = 0, up = 0, up_below = 0;  // Q of (l, m), (l - 1, m), (l - 1, m + 1), (l - 2, m + 1)
        // Of the radial functions and of r^2 in the polynomials, along the vector; of the rest, along x, y, z.
        double along = 0, along_xy = 0, to_x = 0, to_y = 0, to_z = 0;
        for (int l = m; l <= v.l_max; ++l) {
          const double *of_cosine = terms + (l * l + l + m) * v.n_max, *of_sine = terms + (l * l + l - m) * v.n_max;
          const std::int32_t* which = v.exponent_of + l * v.n_max;
          double a = 0, da = 0, b = 0, db = 0;
          for (int k = 0; k < v.n_max; ++k) {
            const double e = radial[which[k]], de = radial[v.exponents + which[k]];
            a += of_cosine[k] * e;
            da += of_cosine[k] * de;
            b += of_sine[k] * e;
            db += of_sine[k] * de;
          }
          double part = a, d_part = da;
          if (m > 0) {
            part = a * cosine + b * sine;
            d_part = da * cosine + db * sine;
            to_x += m * q * (a * below_cosine + b * below_sine);
            to_y += m * q * (b * below_cosine - a * below_sine);
          }
          along += d_part * q;
          to_z += part * (l + m) * q_below;
          along_xy -= part * up;
          const double next_up = l == m       ? 0.0
                                 : l == m + 1 ? (2 * m + 1) * top
                                              : next_degree(v, l, m + 1, z, square, up, up_below);
          const double next = next_degree(v, l + 1, m, z, square, q, q_below);
          up_below = up;
          up = next_up;
          q_below = q;
          q = next;
        }
        along_xy += along;
        double* to = parts + m * tile.width + j;
        const int axis = (v.l_max + 1) * tile.width;
        to[0] = to_x + x * along_xy;
        to[axis] = to_y + y * along_xy;
        to[2 * axis] = to_z + z * along;
      }
      __syncthreads();
      for (int task = t; task < 3 * count; task += kThreads) {
        const int axis = task / count, j = task % count;
        double sum = 0;
        for (int m = 0; m <= v.l_max; ++m) sum += parts[(axis * (v.l_max + 1) + m) * tile.width + j];
        const std::int64_t e = i * list.capacity + groups.order[i * list.capacity + first + j];
        pull[static_cast<std::size_t>(axis) * plane + static_cast<std::size_t>(e)] = sum;
      }
    }
  }
}

// A block a structure, a warp an atom.
__global__ void __launch_bounds__(kThreads)
    gather_gradient(Rows rows, NeighborView list, const double* pull, std::size_t plane, double scale, bool mean,
                    double* gradient) {
  const unsigned row = blockIdx.x;
  if (rows.skips(row)) return;
  const std::int64_t first = rows.offsets[row], last = rows.offsets[row + 1];
  if (!list.usable[row]) {
    for (std::int64_t k = 3 * first + threadIdx.x; k < 3 * last; k += kThreads) gradient[k] = not_a_number();
    return;
  }
  if (mean) scale /= static_cast<double>(last - first);
  for (std::int64_t i = first + warp_index(); i < last; i += kWarps) {
    double sum[3] = {0, 0, 0};
    gather_pulls(list, i, pull, plane, sum);
    write_vector(gradient, i, scale * sum[0], scale * sum[1], scale * sum[2], true);
  }
}

/// The widest tile that fits, where each neighbour takes a row of `columns` and `parts` more; `least`: numbers that
/// must find room where geometry and rows are.
Tile tile_for(const View& v, int columns, int parts, int least) {
  Tile tile{32, columns | 1, 0, 0};
  for (;; tile.width /= 2) {
    tile.parts = std::max((tile.stride + kGeometry) * tile.width, least);
    tile.bytes = static_cast<std::size_t>(v.terms + tile.parts + parts * tile.width) * sizeof(double);
    if (tile.bytes <= kShared || (tile.width == 4 && tile.bytes <= kMostShared)) return tile;
    if (tile.width == 4) throw Error("n_max and l_max of this SOAP need more shared memory than a device lends");
  }
}

}  // namespace

struct Soap::Tables {
  Tables(const thalweg::Soap& soap, Stream stream) {
    const SoapBasis& b = soap_basis(soap);
    const auto upload = [&]<class T>(Array<T>& to, const T* values, std::size_t size) {
      to = Array<T>(std::span<const T>(values, size), stream);
      return to.data();
    };
    const auto whole = [](std::size_t x) { return static_cast<std::int32_t>(x); };
    view.n_max = whole(b.n_max);
    view.l_max = whole(b.l_max);
    view.harmonics = whole(b.harmonics);
    view.exponents = whole(b.exponents);
    view.species = whole(b.species);
    view.channels = whole(b.species * b.n_max);
    view.padded_n = whole(b.padded_n);
    view.size = whole(b.size);
    view.terms = whole(b.harmonics * b.n_max);
    view.smooth = b.smooth;
    view.r_cut = b.r_cut;
    view.reach = b.reach;
    view.gamma = upload(gamma, b.gamma, b.exponents);
    view.to_basis = upload(to_basis, b.to_basis, (b.l_max + 1) * b.n_max * b.padded_n);
    view.norm = upload(norm, b.norm, b.harmonics);
    view.factor = upload(factor, b.factor, b.l_max + 1);
    view.exponent_of = upload(exponent_of, b.exponent_of, (b.l_max + 1) * b.n_max);
    std::vector<std::int32_t> degrees, features(b.species * b.n_max * b.species * b.n_max);
    std::vector<double> inverses(b.l_max + 2, 0.0);
    std::vector<Product> all;
    for (std::size_t l = 0; l <= b.l_max; ++l) degrees.insert(degrees.end(), 2 * l + 1, whole(l));
    for (std::size_t k = 1; k < inverses.size(); ++k) inverses[k] = 1.0 / static_cast<double>(k);
    for (std::size_t s = 0; s < b.species; ++s)
      for (std::size_t u = s; u < b.species; ++u)
        for (std::size_t l = 0; l <= b.l_max; ++l)
          for (std::size_t n = 0; n < b.n_max; ++n)
            for (std::size_t other = s == u ? n : 0; other < b.n_max; ++other) {
              const std::size_t first = s * b.n_max + n, second = u * b.n_max + other;
              if (l == 0)
                features[first * b.species * b.n_max + second] = features[second * b.species * b.n_max + first] =
                    whole(all.size());
              all.push_back(
                  {static_cast<std::int16_t>(l), static_cast<std::int16_t>(first), static_cast<std::int16_t>(second)});
            }
    view.degree = upload(degree, degrees.data(), degrees.size());
    view.inverse = upload(inverse, inverses.data(), inverses.size());
    view.products = upload(products, all.data(), all.size());
    view.feature = upload(feature, features.data(), features.size());
    copy_to_host(nullptr, nullptr, 0, stream);  // until the copies are done
    for_values = tile_for(view, view.exponents + view.harmonics, 0, 0);
    for_pulls = tile_for(view, 2 * view.exponents, 3 * (view.l_max + 1), view.terms);
  }

  Array<double> gamma, to_basis, norm, factor, inverse;
  Array<std::int32_t> exponent_of, degree, feature;
  Array<Product> products;
  View view{};
  Tile for_values{}, for_pulls{};
};

struct Soap::Workspace::State {
  State(const thalweg::Soap& soap, const BatchView& batch, const HostBatch& host, Stream stream)
      : structures(batch.structures), atoms(batch.atoms), offsets(batch.offsets), list(host, soap.reach(), stream) {
    check_each(soap, host);
    const std::vector<std::int32_t> of_atom = places_among(soap.species(), host);
    std::vector<std::int32_t> rows;
    for (std::size_t row = 0; row < structures; ++row)
      rows.insert(rows.end(), host.view()[row].n, static_cast<std::int32_t>(row));
    species = Array<std::int32_t>(std::span<const std::int32_t>(of_atom), stream);
    row_of = Array<std::int32_t>(std::span<const std::int32_t>(rows), stream);
    copy_to_host(nullptr, nullptr, 0, stream);  // until the copies are done
  }

  Groups groups() { return {order.data(), starts.data()}; }

  std::size_t structures, atoms;
  const std::int64_t* offsets;
  NeighborList list;
  Array<std::int32_t> species, row_of, order, starts;
  Array<double> coefficients, each, pull;
  bool ready = false;
};

Soap::Soap(std::shared_ptr<const thalweg::Soap> host, Stream stream) : host_(std::move(host)) {
  require();
  if (!host_) throw Error("a SOAP on the device needs one of the host");
  tables_ = std::make_unique<Tables>(*host_, stream);
}
Soap::~Soap() = default;

Soap::Workspace::Workspace(const Soap& soap, const BatchView& batch, Stream stream)
    : state(std::make_unique<State>(*soap.host_, batch, HostBatch(batch, stream), stream)) {}
Soap::Workspace::~Workspace() = default;

void Soap::values(const double* positions, double* features, Workspace& workspace, const std::uint8_t* skip,
                  Stream stream) const {
  Workspace::State& s = *workspace.state;
  s.ready = s.structures == 0;
  if (s.structures == 0) return;
  const View& v = tables_->view;
  const Rows rows{s.offsets, skip};
  const SoapAverage kind = host_->settings().average;
  s.list.update(rows, positions, stream);
  const NeighborView list = s.list.view();
  s.order.need(s.atoms * static_cast<std::size_t>(list.capacity));
  s.starts.need(s.atoms * static_cast<std::size_t>(v.species + 1));
  double* coefficients = s.coefficients.need(s.atoms * static_cast<std::size_t>(v.harmonics * v.channels));
  double* each = kind == SoapAverage::off ? features : s.each.need(s.atoms * host_->size());
  THALWEG_LAUNCH(sort_by_species, static_cast<unsigned>(s.structures), kThreads, 0, native(stream), rows, list,
                 s.species.data(), v.species, s.groups());
  if (s.atoms > 0)
    THALWEG_LAUNCH(soap_values, static_cast<unsigned>(s.atoms), kThreads, tables_->for_values.bytes, native(stream),
                   rows, v, tables_->for_values, list, s.groups(), s.row_of.data(), s.species.data(), coefficients,
                   each);
  if (kind != SoapAverage::off)
    THALWEG_LAUNCH(average, static_cast<unsigned>(s.structures), kThreads, 0, native(stream), rows, v.size,
                   kind == SoapAverage::mean, each, features);
  check_launch("SOAP");
  s.ready = true;
}

void Soap::contract(const double* weights, double scale, double* gradient, Workspace& workspace,
                    const std::uint8_t* skip, Stream stream) const {
  Workspace::State& s = *workspace.state;
  if (!s.ready) throw Error("contract() needs values() of the same batch and workspace first");
  if (s.atoms == 0) return;
  const Rows rows{s.offsets, skip};
  const SoapAverage kind = host_->settings().average;
  const NeighborView list = s.list.view();
  const std::size_t plane = s.atoms * static_cast<std::size_t>(list.capacity);
  double* pull = s.pull.need(3 * plane);
  THALWEG_LAUNCH(soap_pulls, static_cast<unsigned>(s.atoms), kThreads, tables_->for_pulls.bytes, native(stream), rows,
                 tables_->view, tables_->for_pulls, list, s.groups(), s.row_of.data(), s.coefficients.data(), weights,
                 kind != SoapAverage::off, pull, plane);
  THALWEG_LAUNCH(gather_gradient, static_cast<unsigned>(s.structures), kThreads, 0, native(stream), rows, list, pull,
                 plane, scale, kind == SoapAverage::mean, gradient);
  check_launch("forces of SOAP");
}

}  // namespace thalweg::cuda
