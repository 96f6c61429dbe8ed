// Twin of fingerprint.cpp. A block takes a structure, a warp a centre. Values: lanes find 32 samples (pairs or
// triplets) at a time, then all lanes deposit one sample after the other; place p of a histogram belongs to lane p mod
// 32, so that no two lanes ever meet and sums have a fixed order. Each warp has a histogram of its own; they are added
// at the end. Forces: each lane takes an edge and sums over its partners, then atoms gather edges (as in
// potentials.cu).
#include <algorithm>
#include <numbers>

#include "fingerprint_tables.hpp"
#include "neighbors.cuh"

namespace thalweg::cuda {
namespace {

/// One of the two histograms. A sample in bin `center` of block `block` adds to the places
/// block * length + center + column, column = 0 .. columns - 1; place `reach` of a block is its bin 0.
struct AxisView {
  std::int32_t bins, reach, centers, columns, padded_columns, pieces, length;
  double inverse_width;
  const double *breaks, *scale, *shift;  // (pieces - 1), (pieces), (pieces)
  const double* by_column;               // (pieces, padded_columns, kPowers)

  /// Bin, piece and place on the piece of a sample at q bins.
  __device__ void locate(double q, int& center, int& piece, double& t) const {
    center = static_cast<int>(q) < centers - 1 ? static_cast<int>(q) : centers - 1;
    const double place = q - center;
    piece = 0;
    for (int next = 1; next < pieces; ++next)
      if (place >= breaks[next - 1]) piece = next;
    t = place * scale[piece] + shift[piece];
  }
  __device__ const double* coefficients(int piece, int column) const {
    return by_column + (static_cast<std::size_t>(piece) * padded_columns + column) * kPowers;
  }
  /// What a sample of weight 1 at t adds to a column.
  __device__ double value(int piece, int column, double t) const {
    const double* c = coefficients(piece, column);
    double sum = c[kPowers - 1];
    for (int power = kPowers - 2; power >= 0; --power) sum = sum * t + c[power];
    return sum;
  }
};

struct View {
  AxisView radial, angular;
  const std::int32_t *pair_block, *triplet_block, *fold;
  std::int32_t species, radial_blocks, angular_blocks, size;
  std::int32_t histogram;  // places of one warp's histogram: radial, then angular
  double cutoff_angular, gamma;
  double radial_norm, angular_norm;  // times the volume
};

/// Samples of one warp in shared memory.
struct Sample {
  double t, weight;
  std::int32_t place, piece;  // place -1: none
};

__device__ void deposit(const AxisView& axis, const Sample* samples, double* histogram) {
  for (unsigned k = 0; k < kLanes; ++k) {
    const Sample& s = samples[k];
    if (s.place < 0) continue;
    const int first = (static_cast<int>(lane_index()) - s.place) & (kLanes - 1);
    for (int column = first; column < axis.columns; column += kLanes)
      histogram[s.place + column] += s.weight * axis.value(s.piece, column, s.t);
  }
}

/// A neighbour within the angular cutoff.
struct Near {
  double u[3], inverse_r, cutoff, cutoff_slope;
  __device__ Near(const View& v, const NeighborView& list, std::int64_t e) : inverse_r(1.0 / list.r[e]) {
    u[0] = list.x[e] * inverse_r;
    u[1] = list.y[e] * inverse_r;
    u[2] = list.z[e] * inverse_r;
    cutoff = 1.0;
    cutoff_slope = 0.0;
    if (v.gamma == 0) return;
    const double x = list.r[e] / v.cutoff_angular, power = v.gamma == 2.0 ? x : pow(x, v.gamma - 1);
    cutoff = 1.0 + (v.gamma * x - (v.gamma + 1)) * power * x;
    cutoff_slope = v.gamma * (v.gamma + 1) / v.cutoff_angular * power * (x - 1.0);
  }
};

/// Cosine of the angle between two neighbours, the angle, and sin^2 of its half if acute, else cos^2: precise near 0
/// and pi.
__device__ void angle_between(const Near& a, const Near& b, double& cosine, double& angle, double& half_square) {
  cosine = dot3(a.u, b.u);
  const double side = cosine >= 0.0 ? 1.0 : -1.0;
  const double e[3] = {a.u[0] - side * b.u[0], a.u[1] - side * b.u[1], a.u[2] - side * b.u[2]};
  half_square = 0.25 * dot3(e, e);
  const double acute = 2.0 * asin(sqrt(half_square));
  angle = cosine >= 0.0 ? acute : std::numbers::pi - acute;
}

/// The t-th pair (a < b) in the order (0, 1), (0, 2), (1, 2), (0, 3), ...
__device__ void pair_of(std::int64_t t, std::int64_t& a, std::int64_t& b) {
  b = static_cast<std::int64_t>((1.0 + sqrt(1.0 + 8.0 * static_cast<double>(t))) / 2.0);
  while (b * (b - 1) / 2 > t) --b;
  while ((b + 1) * b / 2 <= t) ++b;
  a = t - b * (b - 1) / 2;
}

__global__ void __launch_bounds__(kThreads)
    fingerprint_values(Rows rows, View v, NeighborView pairs, NeighborView near, const std::int32_t* species,
                       const double* volumes, double* histograms, double* features) {
  THALWEG_DYNAMIC_SHARED(double, shared);  // kWarps, then kThreads samples
  const unsigned row = blockIdx.x;
  if (rows.skips(row)) return;
  const std::int64_t first = rows.offsets[row], last = rows.offsets[row + 1];
  features += static_cast<std::size_t>(row) * static_cast<std::size_t>(v.size);
  if (without_features(rows, pairs, shared)) {
    for (int k = static_cast<int>(threadIdx.x); k < v.size; k += kThreads) features[k] = not_a_number();
    return;
  }
  Sample* samples = reinterpret_cast<Sample*>(shared + kWarps) + kLanes * warp_index();
  double* all = histograms + std::size_t{row} * kWarps * static_cast<std::size_t>(v.histogram);
  double* histogram = all + std::size_t{warp_index()} * static_cast<std::size_t>(v.histogram);
  double* angular = histogram + v.radial_blocks * v.radial.length;
  for (int p = static_cast<int>(lane_index()); p < v.radial_blocks * v.radial.length; p += kLanes) histogram[p] = 0;
  for (int p = static_cast<int>(lane_index()); p < v.angular_blocks * v.angular.length; p += kLanes) angular[p] = 0;
  const double volume = volumes[row];
  for (std::int64_t i = first + warp_index(); i < last; i += kWarps) {
    for (std::int64_t base = 0; base < pairs.count[i]; base += kLanes) {
      const std::int64_t e = i * pairs.capacity + base + lane_index();
      Sample mine{0.0, 0.0, -1, 0};
      if (base + lane_index() < pairs.count[i]) {
        const std::int64_t j = pairs.atom[e];
        const double x = pairs.x[e], y = pairs.y[e], z = pairs.z[e];
        // Every pair once, an atom and its own image, too.
        if (j > i || (j == i && (x > 0 || (x == 0 && (y > 0 || (y == 0 && z > 0)))))) {
          int center;
          v.radial.locate(pairs.r[e] * v.radial.inverse_width, center, mine.piece, mine.t);
          mine.weight = v.radial_norm * volume / (pairs.r[e] * pairs.r[e]);
          mine.place = v.pair_block[species[i] * v.species + species[j]] * v.radial.length + center;
        }
      }
      samples[lane_index()] = mine;
      __syncwarp();
      deposit(v.radial, samples, histogram);
      __syncwarp();
    }
    if (v.angular_blocks == 0) continue;
    const std::int64_t count = near.count[i], triplets = count * (count - 1) / 2;
    for (std::int64_t base = 0; base < triplets; base += kLanes) {
      Sample mine{0.0, 0.0, -1, 0};
      if (base + lane_index() < triplets) {
        std::int64_t a, b;
        pair_of(base + lane_index(), a, b);
        a += i * near.capacity;
        b += i * near.capacity;
        const Near to_a(v, near, a), to_b(v, near, b);
        double cosine, angle, half_square;
        angle_between(to_a, to_b, cosine, angle, half_square);
        int center;
        v.angular.locate(angle * v.angular.inverse_width, center, mine.piece, mine.t);
        mine.weight = to_a.cutoff * to_b.cutoff;
        mine.place =
            v.triplet_block[(species[i] * v.species + species[near.atom[a]]) * v.species + species[near.atom[b]]] *
                v.angular.length +
            center;
      }
      samples[lane_index()] = mine;
      __syncwarp();
      deposit(v.angular, samples, angular);
      __syncwarp();
    }
  }
  __syncthreads();
  const auto place_sum = [&](int place) {
    double sum = 0;
    for (unsigned warp = 0; warp < kWarps; ++warp)
      sum += all[std::size_t{warp} * static_cast<std::size_t>(v.histogram) + static_cast<std::size_t>(place)];
    return sum;
  };
  for (int f = static_cast<int>(threadIdx.x); f < v.size; f += kThreads) {
    if (f < v.radial_blocks * v.radial.bins) {
      features[f] = place_sum(f / v.radial.bins * v.radial.length + v.radial.reach + f % v.radial.bins);
      continue;
    }
    const int g = f - v.radial_blocks * v.radial.bins, bin = g % v.angular.bins;
    const int begin = v.radial_blocks * v.radial.length + g / v.angular.bins * v.angular.length;
    double sum = place_sum(begin + v.angular.reach + bin);
    for (int k = 0; k < v.angular.reach; ++k) {  // what reflects at the ends
      if (v.fold[k] == bin) sum += place_sum(begin + k);
      const int above = v.angular.bins + v.angular.reach + k;
      if (v.fold[above] == bin) sum += place_sum(begin + above);
    }
    features[f] = v.angular_norm * volume * sum;
  }
}

/// Value of the weighted features of a sample of weight 1 and its slope by q. weights: of its block, by bin.
__device__ void project(const AxisView& axis, const double* weights, const std::int32_t* fold, int center, int piece,
                        double t, double& value, double& slope) {
  value = slope = 0;
  for (int column = 0; column < axis.columns; ++column) {
    const int bin = fold != nullptr ? fold[center + column] : center + column - axis.reach;
    if (bin < 0 || bin >= axis.bins) continue;
    const double* c = axis.coefficients(piece, column);
    double p = c[kPowers - 1], d = 0;
    for (int power = kPowers - 2; power >= 0; --power) {
      d = d * t + p;
      p = p * t + c[power];
    }
    value += weights[bin] * p;
    slope += weights[bin] * d;
  }
  slope *= axis.scale[piece];
}

/// pull (3 planes of m * capacity): derivative by the position of a centre's neighbour of all triplets with both.
__global__ void __launch_bounds__(kThreads)
    pull_edges(Rows rows, View v, NeighborView near, const std::int32_t* species, const double* volumes,
               const double* weights, double* pull, std::size_t plane) {
  const unsigned row = blockIdx.x;
  if (rows.skips(row) || !near.usable[row]) return;
  weights += static_cast<std::size_t>(row) * static_cast<std::size_t>(v.size) +
             static_cast<std::size_t>(v.radial_blocks * v.radial.bins);
  const double norm = v.angular_norm * volumes[row];
  for (std::int64_t i = rows.offsets[row] + warp_index(); i < rows.offsets[row + 1]; i += kWarps) {
    const std::int64_t begin = i * near.capacity, end = begin + near.count[i];
    for (std::int64_t a = begin + lane_index(); a < end; a += kLanes) {
      const Near to_a(v, near, a);
      double sum[3] = {0, 0, 0};
      for (std::int64_t b = begin; b < end; ++b) {
        if (b == a) continue;
        const Near to_b(v, near, b);
        double cosine, angle, half_square, t, value, slope;
        int center, piece;
        angle_between(to_a, to_b, cosine, angle, half_square);
        v.angular.locate(angle * v.angular.inverse_width, center, piece, t);
        const int block =
            v.triplet_block[(species[i] * v.species + species[near.atom[a]]) * v.species + species[near.atom[b]]];
        project(v.angular, weights + block * v.angular.bins, v.fold, center, piece, t, value, slope);
        const double square = half_square * (1.0 - half_square);  // sin^2(angle) / 4; no slope at 0 and pi
        const double by_cosine = square > 1e-30 ? -0.5 * slope * v.angular.inverse_width * to_a.cutoff * to_b.cutoff /
                                                      sqrt(square) * to_a.inverse_r
                                                : 0.0;
        const double along = value * to_b.cutoff * to_a.cutoff_slope;
        for (int c = 0; c < 3; ++c) sum[c] += by_cosine * (to_b.u[c] - cosine * to_a.u[c]) + along * to_a.u[c];
      }
      for (int c = 0; c < 3; ++c)
        pull[static_cast<std::size_t>(c) * plane + static_cast<std::size_t>(a)] = norm * sum[c];
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    gather_gradient(Rows rows, View v, NeighborView pairs, NeighborView near, const std::int32_t* species,
                    const double* volumes, const double* weights, const double* pull, std::size_t plane, double scale,
                    double* gradient) {
  THALWEG_DYNAMIC_SHARED(double, scratch);  // kWarps
  const unsigned row = blockIdx.x;
  if (rows.skips(row)) return;
  const std::int64_t first = rows.offsets[row], last = rows.offsets[row + 1];
  if (without_features(rows, pairs, scratch)) {
    for (std::int64_t k = 3 * first + threadIdx.x; k < 3 * last; k += kThreads) gradient[k] = not_a_number();
    return;
  }
  weights += static_cast<std::size_t>(row) * static_cast<std::size_t>(v.size);
  for (std::int64_t i = first + warp_index(); i < last; i += kWarps) {
    double sum[3] = {0, 0, 0};
    for (std::int64_t e = i * pairs.capacity + lane_index(); e < i * pairs.capacity + pairs.count[i]; e += kLanes) {
      int center, piece;
      double t, value, slope;
      const double r = pairs.r[e];
      v.radial.locate(r * v.radial.inverse_width, center, piece, t);
      const int block = v.pair_block[species[i] * v.species + species[pairs.atom[e]]];
      project(v.radial, weights + block * v.radial.bins, nullptr, center, piece, t, value, slope);
      const double part =
          v.radial_norm * volumes[row] / (r * r) * (v.radial.inverse_width * slope - 2.0 * value / r) / r;
      sum[0] -= part * pairs.x[e];
      sum[1] -= part * pairs.y[e];
      sum[2] -= part * pairs.z[e];
    }
    if (v.angular_blocks > 0) gather_pulls(near, i, pull, plane, sum);
    write_vector(gradient, i, scale * sum[0], scale * sum[1], scale * sum[2], true);
  }
}

}  // namespace

struct Fingerprint::Tables {
  struct Axis {
    Axis(const HistogramAxis& host, std::int32_t length, Stream stream) {
      const auto pieces = static_cast<std::size_t>(host.pieces);
      if (pieces == 0) return;
      const auto upload = [&](const double* values, std::size_t size) {
        return Array<double>(std::span<const double>(values, size), stream);
      };
      breaks = upload(host.breaks, pieces - 1);
      scale = upload(host.scale, pieces);
      shift = upload(host.shift, pieces);
      by_column = upload(host.by_column, pieces * static_cast<std::size_t>(host.padded_columns) * kPowers);
      view = {host.bins, host.reach,         host.centers,  host.columns, host.padded_columns, host.pieces,
              length,    host.inverse_width, breaks.data(), scale.data(), shift.data(),        by_column.data()};
    }
    Array<double> breaks, scale, shift, by_column;
    AxisView view{};
  };

  Tables(const FingerprintTables& host, Stream stream)
      : radial(host.radial, host.radial.centers + host.radial.columns - 1, stream),
        angular(host.angular, host.angular.centers + host.angular.columns - 1, stream),
        pair_block(host.pair_block, stream),
        triplet_block(host.triplet_block, stream),
        fold(host.fold, stream) {
    const FingerprintSettings& s = host.settings;
    const double n = static_cast<double>(host.atoms);
    view.radial = radial.view;
    view.angular = angular.view;
    view.pair_block = pair_block.data();
    view.triplet_block = triplet_block.data();
    view.fold = fold.data();
    view.species = static_cast<std::int32_t>(host.species);
    view.radial_blocks = static_cast<std::int32_t>(host.radial_blocks);
    view.angular_blocks = s.angular ? static_cast<std::int32_t>(host.angular_blocks) : 0;
    view.size = static_cast<std::int32_t>(host.size);
    view.histogram =
        view.radial_blocks * view.radial.length + (view.angular_blocks ? view.angular_blocks * view.angular.length : 0);
    view.cutoff_angular = s.cutoff_angular;
    view.gamma = s.gamma;
    view.radial_norm = 2.0 / (4.0 * std::numbers::pi * s.bin_width * n * n);
    view.angular_norm = s.eta / (n * n * n);
  }

  Axis radial, angular;
  Array<std::int32_t> pair_block, triplet_block, fold;
  View view{};
};

struct Fingerprint::Workspace::State {
  State(const thalweg::Fingerprint& fingerprint, const FingerprintTables& tables, const BatchView& batch,
        const HostBatch& host, Stream stream)
      : structures(batch.structures),
        atoms(batch.atoms),
        offsets(batch.offsets),
        pairs(host, tables.reach, stream),
        near(host, tables.settings.angular ? tables.settings.cutoff_angular : tables.reach, stream) {
    std::vector<std::int32_t> of_atom;
    std::vector<double> volume;
    check_each(fingerprint, host);
    for (std::size_t row = 0; row < structures; ++row) volume.push_back(cell_volume(host.view()[row].cell));
    for (const std::int32_t number : host.numbers)
      of_atom.push_back(tables.species_of[static_cast<std::size_t>(number)]);
    species = Array<std::int32_t>(std::span<const std::int32_t>(of_atom), stream);
    volumes = Array<double>(std::span<const double>(volume), stream);
    copy_to_host(nullptr, nullptr, 0, stream);  // until the copies are done
  }

  std::size_t structures, atoms;
  const std::int64_t* offsets;
  NeighborList pairs, near;
  Array<std::int32_t> species;
  Array<double> volumes, histograms, pull;
  bool ready = false;
};

Fingerprint::Fingerprint(std::shared_ptr<const thalweg::Fingerprint> host, Stream stream) : host_(std::move(host)) {
  require();
  if (!host_) throw Error("a fingerprint on the device needs one of the host");
  tables_ = std::make_unique<Tables>(fingerprint_tables(*host_), stream);
}
Fingerprint::~Fingerprint() = default;

Fingerprint::Workspace::Workspace(const Fingerprint& fingerprint, const BatchView& batch, Stream stream)
    : state(std::make_unique<State>(*fingerprint.host_, fingerprint_tables(*fingerprint.host_), batch,
                                    HostBatch(batch, stream), stream)) {}
Fingerprint::Workspace::~Workspace() = default;

void Fingerprint::values(const double* positions, double* features, Workspace& workspace, const std::uint8_t* skip,
                         Stream stream) const {
  Workspace::State& s = *workspace.state;
  const View& v = tables_->view;
  const Rows rows{s.offsets, skip};
  s.ready = false;
  if (s.structures > 0) {
    s.pairs.update(rows, positions, stream);
    if (v.angular_blocks > 0) s.near.update(rows, positions, stream);
  }
  s.ready = true;
  if (s.structures == 0) return;
  double* histograms = s.histograms.need(s.structures * kWarps * static_cast<std::size_t>(v.histogram));
  THALWEG_LAUNCH(fingerprint_values, static_cast<unsigned>(s.structures), kThreads,
                 kWarps * sizeof(double) + kThreads * sizeof(Sample), native(stream), rows, v, s.pairs.view(),
                 s.near.view(), s.species.data(), s.volumes.data(), histograms, features);
  check_launch("a fingerprint");
}

void Fingerprint::contract(const double* weights, double scale, double* gradient, Workspace& workspace,
                           const std::uint8_t* skip, Stream stream) const {
  Workspace::State& s = *workspace.state;
  if (!s.ready) throw Error("contract() needs values() of the same batch and workspace first");
  if (s.structures == 0) return;
  const View& v = tables_->view;
  const Rows rows{s.offsets, skip};
  const NeighborView near = s.near.view();
  const std::size_t plane = s.atoms * static_cast<std::size_t>(near.capacity);
  double* pull = s.pull.need(3 * plane);
  const unsigned blocks = static_cast<unsigned>(s.structures);
  if (v.angular_blocks > 0)
    THALWEG_LAUNCH(pull_edges, blocks, kThreads, 0, native(stream), rows, v, near, s.species.data(), s.volumes.data(),
                   weights, pull, plane);
  THALWEG_LAUNCH(gather_gradient, blocks, kThreads, kWarps * sizeof(double), native(stream), rows, v, s.pairs.view(),
                 near, s.species.data(), s.volumes.data(), weights, pull, plane, scale, gradient);
  check_launch("forces of a fingerprint");
}

}  // namespace thalweg::cuda
