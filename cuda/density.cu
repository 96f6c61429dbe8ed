// Twin of density.cpp. A block takes a structure, a warp an atom, a lane a neighbour. Values: lanes find what 32
// neighbours add, then lane s adds up, in the order of the list, what belongs to species s, s + 32, ... Forces: every
// pair is seen from both of its ends, and each end takes its own share.
#include <numbers>

#include "neighbors.cuh"
#include "thalweg/density.hpp"

namespace thalweg::cuda {
namespace {

struct View {
  double fall, turn;  // 1 / decay, pi / cutoff
  std::int32_t species;
  const std::int32_t* numbers;  // (species)
  __device__ std::int64_t size() const { return species + 1; }
};

/// What one neighbour adds; species -1: none. In shared memory.
struct Share {
  double value;
  std::int32_t species;
};

__global__ void __launch_bounds__(kThreads)
    density_values(Rows rows, View v, NeighborView list, const std::int32_t* species, double* features) {
  THALWEG_DYNAMIC_SHARED(double, shared);  // kWarps, then kThreads shares
  const unsigned row = blockIdx.x;
  if (rows.skips(row)) return;
  const std::int64_t first = rows.offsets[row], last = rows.offsets[row + 1];
  if (without_features(rows, list, shared)) {
    for (std::int64_t k = first * v.size() + threadIdx.x; k < last * v.size(); k += kThreads)
      features[k] = not_a_number();
    return;
  }
  Share* shares = reinterpret_cast<Share*>(shared + kWarps) + kLanes * warp_index();
  const int lane = static_cast<int>(lane_index());
  for (std::int64_t i = first + warp_index(); i < last; i += kWarps) {
    double* of_atom = features + i * v.size();
    for (int s = lane; s < v.species; s += kLanes) of_atom[s] = 0.0;
    if (lane == 0) of_atom[v.species] = v.numbers[species[i]];
    for (int base = 0; base < list.count[i]; base += kLanes) {
      const std::int64_t e = i * list.capacity + base + lane;
      Share mine{0.0, -1};
      if (base + lane < list.count[i])
        mine = {0.5 * exp(-v.fall * list.r[e]) * (cos(v.turn * list.r[e]) + 1.0), species[list.atom[e]]};
      shares[lane] = mine;
      __syncwarp();
      for (int s = lane; s < v.species; s += kLanes) {
        double sum = 0;
        for (unsigned k = 0; k < kLanes; ++k)
          if (shares[k].species == s) sum += shares[k].value;
        of_atom[s] += sum;
      }
      __syncwarp();
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    density_gradient(Rows rows, View v, NeighborView list, const std::int32_t* species, const double* weights,
                     double scale, double* gradient) {
  THALWEG_DYNAMIC_SHARED(double, scratch);  // kWarps
  const unsigned row = blockIdx.x;
  if (rows.skips(row)) return;
  const std::int64_t first = rows.offsets[row], last = rows.offsets[row + 1];
  if (without_features(rows, list, scratch)) {
    for (std::int64_t k = 3 * first + threadIdx.x; k < 3 * last; k += kThreads) gradient[k] = not_a_number();
    return;
  }
  for (std::int64_t i = first + warp_index(); i < last; i += kWarps) {
    double sum[3] = {0, 0, 0};
    for (std::int64_t e = i * list.capacity + lane_index(); e < i * list.capacity + list.count[i]; e += kLanes) {
      const std::int64_t j = list.atom[e];
      const double r = list.r[e], cut = cos(v.turn * r) + 1.0;
      const double slope = -0.5 * exp(-v.fall * r) * (v.fall * cut + v.turn * sin(v.turn * r)) / r;
      const double pull = slope * (weights[i * v.size() + species[j]] + weights[j * v.size() + species[i]]);
      sum[0] -= pull * list.x[e];
      sum[1] -= pull * list.y[e];
      sum[2] -= pull * list.z[e];
    }
    write_vector(gradient, i, scale * sum[0], scale * sum[1], scale * sum[2], true);
  }
}

}  // namespace

struct LocalDensity::Tables {
  Tables(const thalweg::LocalDensity& host, Stream stream)
      : numbers(host.species(), stream),
        view{1.0 / host.settings().decay, std::numbers::pi / host.settings().cutoff,
             static_cast<std::int32_t>(host.species().size()), numbers.data()} {}

  Array<std::int32_t> numbers;
  View view;
};

struct LocalDensity::Workspace::State {
  State(const thalweg::LocalDensity& density, const BatchView& batch, const HostBatch& host, Stream stream)
      : structures(batch.structures), offsets(batch.offsets), list(host, density.settings().cutoff, stream) {
    check_each(density, host);
    const std::vector<std::int32_t> of_atom = places_among(density.species(), host);
    species = Array<std::int32_t>(std::span<const std::int32_t>(of_atom), stream);
    copy_to_host(nullptr, nullptr, 0, stream);  // until the copy is done
  }

  std::size_t structures;
  const std::int64_t* offsets;
  NeighborList list;
  Array<std::int32_t> species;
  bool ready = false;
};

LocalDensity::LocalDensity(std::shared_ptr<const thalweg::LocalDensity> host, Stream stream) : host_(std::move(host)) {
  require();
  if (!host_) throw Error("a local density on the device needs one of the host");
  tables_ = std::make_unique<Tables>(*host_, stream);
}
LocalDensity::~LocalDensity() = default;

LocalDensity::Workspace::Workspace(const LocalDensity& density, const BatchView& batch, Stream stream)
    : state(std::make_unique<State>(*density.host_, batch, HostBatch(batch, stream), stream)) {}
LocalDensity::Workspace::~Workspace() = default;

void LocalDensity::values(const double* positions, double* features, Workspace& workspace, const std::uint8_t* skip,
                          Stream stream) const {
  Workspace::State& s = *workspace.state;
  s.ready = false;
  const Rows rows{s.offsets, skip};
  if (s.structures > 0) s.list.update(rows, positions, stream);
  s.ready = true;
  if (s.structures == 0) return;
  THALWEG_LAUNCH(density_values, static_cast<unsigned>(s.structures), kThreads,
                 kWarps * sizeof(double) + kThreads * sizeof(Share), native(stream), rows, tables_->view, s.list.view(),
                 s.species.data(), features);
  check_launch("a local density");
}

void LocalDensity::contract(const double* weights, double scale, double* gradient, Workspace& workspace,
                            const std::uint8_t* skip, Stream stream) const {
  Workspace::State& s = *workspace.state;
  if (!s.ready) throw Error("contract() needs values() of the same batch and workspace first");
  if (s.structures == 0) return;
  THALWEG_LAUNCH(density_gradient, static_cast<unsigned>(s.structures), kThreads, kWarps * sizeof(double),
                 native(stream), Rows{s.offsets, skip}, tables_->view, s.list.view(), s.species.data(), weights, scale,
                 gradient);
  check_launch("forces of a local density");
}

}  // namespace thalweg::cuda
