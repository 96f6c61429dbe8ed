#include "thalweg/fchl.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "buffer.hpp"
#include "centers.hpp"
#include "expect.hpp"
#include "fchl_kernels.hpp"
#include "isa.hpp"
#include "spare.hpp"
#include "species_table.hpp"
#include "thalweg/neighbors.hpp"

namespace thalweg {

THALWEG_DISPATCH(Fchl19Kernels, fchl19_kernels)

namespace {

void expect(bool good, const char* name, const char* wanted, double came) {
  expect_setting(good, "FCHL19", name, wanted, came);
}

constexpr double kPi = 3.14159265358979323846;
constexpr double kOnOnePoint = 1e-6;  // angstrom
constexpr double kChunk = 8.0;  // how far chunks of Gaussians reach, in units of eta^-1/2: fchl_isa.cpp needs < 10

}  // namespace

struct Fchl19::Layout {
  Fchl19Settings settings;
  SpeciesTable species;
  Fchl19Basis basis{};
  std::size_t of_pairs = 0;  // features of pairs, which come first
  std::vector<double> log_grid, inverse_grid, order_weight;

  mutable Spare<Workspace> spare;

  double reach() const { return std::max(settings.cutoff_pairs, settings.cutoff_triplets); }
};

Fchl19::Fchl19(const Fchl19Settings& settings, std::span<const std::int32_t> species) {
  auto layout = std::make_unique<Layout>();
  Layout& l = *layout;
  const Fchl19Settings& s = settings;
  const auto expect_length = [](const char* name, double value) {
    expect(value > 0 && value < 100, name, "above 0 and below 100 angstrom", value);
  };
  expect_length("cutoff_pairs", s.cutoff_pairs);
  expect_length("cutoff_triplets", s.cutoff_triplets);
  expect(s.n_pairs >= 1 && s.n_pairs <= 128, "n_pairs", "1 to 128", s.n_pairs);
  expect(s.n_triplets >= 1 && s.n_triplets <= 128, "n_triplets", "1 to 128", s.n_triplets);
  expect(s.n_fourier >= 1 && s.n_fourier <= 8, "n_fourier", "1 to 8", s.n_fourier);
  const char* const width = "between 0.0001 and 10000";
  expect(s.eta_pairs >= 1e-4 && s.eta_pairs <= 1e4, "eta_pairs", width, s.eta_pairs);
  expect(s.eta_triplets >= 1e-4 && s.eta_triplets <= 1e4, "eta_triplets", width, s.eta_triplets);
  expect(s.zeta >= 0 && s.zeta < 1e3, "zeta", "0 or more and below 1000", s.zeta);
  const char* const power = "0 to 20";
  expect(s.decay_pairs >= 0 && s.decay_pairs <= 20, "decay_pairs", power, s.decay_pairs);
  expect(s.decay_triplets >= 0 && s.decay_triplets <= 20, "decay_triplets", power, s.decay_triplets);
  expect(std::isfinite(s.weight_triplets), "weight_triplets", "finite", s.weight_triplets);
  static_assert(kFchlMostRadial == 128 && kFchlMostAngles == 16);
  l.settings = settings;
  l.species = SpeciesTable("FCHL19", species);

  Fchl19Basis& b = l.basis;
  b.species = l.species.numbers().size();
  b.n_pairs = static_cast<std::size_t>(s.n_pairs);
  b.n_triplets = static_cast<std::size_t>(s.n_triplets);
  b.n_angles = 2 * static_cast<std::size_t>(s.n_fourier);
  b.padded_pairs = (b.n_pairs + kFchlLanes - 1) / kFchlLanes * kFchlLanes;
  l.of_pairs = b.species * b.n_pairs;
  b.size = l.of_pairs + b.species * (b.species + 1) / 2 * b.n_triplets * b.n_angles;
  b.cutoff_pairs = s.cutoff_pairs;
  b.cutoff_triplets = s.cutoff_triplets;
  b.eta_pairs = s.eta_pairs;
  b.eta_triplets = s.eta_triplets;
  b.step = s.cutoff_triplets / s.n_triplets;
  b.shrink = std::exp(-2.0 * s.eta_triplets * b.step * b.step);
  b.chunk = static_cast<std::size_t>(
      std::clamp(kChunk / (std::sqrt(s.eta_triplets) * b.step), 1.0, static_cast<double>(b.n_triplets)));
  b.decay_pairs = s.decay_pairs;
  b.decay_triplets = s.decay_triplets;
  l.log_grid.assign(b.padded_pairs, 0.0);
  l.inverse_grid.assign(b.padded_pairs, 0.0);
  for (std::size_t k = 0; k < b.n_pairs; ++k) {
    const double place = s.cutoff_pairs * static_cast<double>(k + 1) / s.n_pairs;
    l.log_grid[k] = std::log(place);
    l.inverse_grid[k] = 1.0 / (place * std::sqrt(2.0 * kPi));
  }
  for (int order = 1; order < 2 * s.n_fourier; order += 2)
    l.order_weight.push_back(2.0 * s.weight_triplets * std::sqrt(s.eta_triplets / kPi) *
                             std::exp(-0.5 * (s.zeta * order) * (s.zeta * order)));
  b.log_grid = l.log_grid.data();
  b.inverse_grid = l.inverse_grid.data();
  b.order_weight = l.order_weight.data();
  layout_ = std::move(layout);
}

Fchl19::~Fchl19() = default;
std::size_t Fchl19::size() const { return layout_->basis.size; }
std::span<const std::int32_t> Fchl19::species() const { return layout_->species.numbers(); }
const Fchl19Settings& Fchl19::settings() const { return layout_->settings; }

// Neighbours of atom i and species s within the triplets' cutoff: first[i species + s], `count` of them, in the order
// of the list, then padding. Planes x, y, z, r, f, df of `room` numbers. slot_of[2 p], [2 p + 1]: where pair p of the
// list stands as a neighbour of its i, of its j; -1: beyond that cutoff.
struct Fchl19::Workspace::State {
  explicit State(const Layout& layout) : neighbors(layout.reach()), maker(&layout) {}

  NeighborList neighbors;
  const Layout* maker;
  std::size_t n = 0, room = 0;
  bool ready = false;
  Buffer<std::int32_t> species, atom, slot_of;
  Buffer<std::size_t> first, count;
  Buffer<double> planes, pulls, scratch, of_pair;

  Fchl19Neighbors near(std::size_t center, std::size_t kinds) {
    const double* p = planes.data();
    return {first.data() + center * kinds,
            count.data() + center * kinds,
            p,
            p + room,
            p + 2 * room,
            p + 3 * room,
            p + 4 * room,
            p + 5 * room};
  }
};

Fchl19::Workspace::Workspace(const Fchl19& fchl) : state(std::make_unique<State>(*fchl.layout_)) {}
Fchl19::Workspace::~Workspace() = default;
Fchl19::Workspace::Workspace(Workspace&&) noexcept = default;

Fchl19::Workspace Fchl19::borrow() const {
  if (auto spare = layout_->spare.take()) return std::move(*spare);
  return Workspace(*this);
}

void Fchl19::give_back(Workspace&& workspace) const { layout_->spare.give(std::move(workspace)); }

void Fchl19::check(const StructureView& structure) const {
  for (std::size_t i = 0; i < structure.n; ++i) (void)layout_->species(structure.numbers[i]);
  NeighborList(layout_->reach()).check_cell(structure);
}

namespace {

using State = Fchl19::Workspace::State;

/// Sorts the ends of all pairs within the triplets' cutoff by centre and species.
void find_neighbors(const Fchl19::Layout& layout, const StructureView& structure, State& state) {
  const std::size_t n = structure.n, kinds = layout.basis.species;
  const double cutoff = layout.settings.cutoff_triplets, turn = kPi / cutoff, decay = layout.settings.decay_triplets;
  std::int32_t* species = state.species.need(n);
  for (std::size_t i = 0; i < n; ++i) species[i] = static_cast<std::int32_t>(layout.species(structure.numbers[i]));
  state.neighbors.update(structure);
  const std::size_t pairs = state.neighbors.size();
  const std::int32_t *i = state.neighbors.i(), *j = state.neighbors.j();
  const double *d = state.neighbors.d(), *r = state.neighbors.r();

  std::size_t* first = state.first.need(n * kinds + 1);
  std::size_t* count = state.count.need(n * kinds);
  std::fill_n(count, n * kinds, 0);
  const auto group = [&](std::int32_t center, std::int32_t neighbor) {
    return static_cast<std::size_t>(center) * kinds + static_cast<std::size_t>(species[neighbor]);
  };
  for (std::size_t p = 0; p < pairs; ++p) {
    if (!(r[p] > kOnOnePoint))
      throw Error("atoms " + std::to_string(i[p]) + " and " + std::to_string(j[p]) +
                  " lie on one point, where FCHL19 is infinite; move them apart");
    if (r[p] >= cutoff) continue;
    ++count[group(i[p], j[p])];
    ++count[group(j[p], i[p])];
  }
  std::size_t room = 0;
  for (std::size_t g = 0; g < n * kinds; ++g) {
    first[g] = room;
    room += (count[g] + kFchlLanes - 1) / kFchlLanes * kFchlLanes;
    count[g] = 0;
  }
  first[n * kinds] = room;
  state.room = room;
  double* planes = state.planes.need(6 * room);
  std::int32_t* atom = state.atom.need(room);
  std::int32_t* slot = state.slot_of.need(2 * pairs);
  const auto set = [&](std::size_t at, double x, double y, double z, double length, double f, double df) {
    const double all[6] = {x, y, z, length, f, df};
    for (std::size_t k = 0; k < 6; ++k) planes[k * room + at] = all[k];
  };
  for (std::size_t p = 0; p < pairs; ++p) {
    slot[2 * p] = slot[2 * p + 1] = -1;
    if (r[p] >= cutoff) continue;
    const double power = std::pow(r[p], -decay), cut = 0.5 * (1.0 + std::cos(turn * r[p])), f = power * cut,
                 df = -power * (0.5 * turn * std::sin(turn * r[p]) + decay * cut / r[p]);
    for (int side = 0; side < 2; ++side) {
      const std::int32_t center = side == 0 ? i[p] : j[p], neighbor = side == 0 ? j[p] : i[p];
      const double sign = side == 0 ? 1.0 : -1.0;
      const std::size_t g = group(center, neighbor), at = first[g] + count[g]++;
      set(at, sign * d[3 * p], sign * d[3 * p + 1], sign * d[3 * p + 2], r[p], f, df);
      atom[at] = neighbor;
      slot[2 * p + static_cast<std::size_t>(side)] = static_cast<std::int32_t>(at);
    }
  }
  for (std::size_t g = 0; g < n * kinds; ++g)
    for (std::size_t at = first[g] + count[g]; at < first[g + 1]; ++at) {
      const double away = cutoff * static_cast<double>(2 + at - first[g] - count[g]);
      set(at, away, 0.0, 0.0, away, 0.0, 0.0);
      atom[at] = 0;
    }
}

}  // namespace

void Fchl19::values(const StructureView& structure, double* features, Workspace& workspace, int threads) const {
  const Layout& layout = *layout_;
  const Fchl19Basis& basis = layout.basis;
  const Fchl19Kernels& kernels = fchl19_kernels();
  State& state = own_state(workspace, layout_.get());
  state.ready = false;
  state.n = structure.n;
  find_neighbors(layout, structure, state);
  const std::size_t D = basis.size, of_scratch = kernels.scratch(basis);
  double* scratch = state.scratch.need(of_scratch * static_cast<std::size_t>(center_parts(state.n, threads)));
  for_each_center(state.n, threads, [&](std::size_t center, std::size_t part) {
    double* row = features + center * D;
    std::fill_n(row, layout.of_pairs, 0.0);
    kernels.triplets(basis, state.near(center, basis.species), row + layout.of_pairs, scratch + part * of_scratch);
  });
  double* value = state.of_pair.need(2 * basis.padded_pairs);
  const std::int32_t *i = state.neighbors.i(), *j = state.neighbors.j(), *species = state.species.data();
  for (std::size_t p = 0; p < state.neighbors.size(); ++p) {
    if (state.neighbors.r()[p] >= basis.cutoff_pairs) continue;
    kernels.pair(basis, state.neighbors.r()[p], value, value + basis.padded_pairs);
    double* at_i =
        features + static_cast<std::size_t>(i[p]) * D + static_cast<std::size_t>(species[j[p]]) * basis.n_pairs;
    double* at_j =
        features + static_cast<std::size_t>(j[p]) * D + static_cast<std::size_t>(species[i[p]]) * basis.n_pairs;
    for (std::size_t k = 0; k < basis.n_pairs; ++k) {
      at_i[k] += value[k];
      at_j[k] += value[k];
    }
  }
  state.ready = true;
}

void Fchl19::contract(const double* weights, double scale, double* gradient, Workspace& workspace, int threads) const {
  const Layout& layout = *layout_;
  const Fchl19Basis& basis = layout.basis;
  const Fchl19Kernels& kernels = fchl19_kernels();
  State& state = own_state(workspace, layout_.get());
  if (!state.ready) throw Error("contract() needs values() of the same structure and workspace first");
  const std::size_t D = basis.size;
  double* gx = state.pulls.need(3 * state.room);
  double *gy = gx + state.room, *gz = gy + state.room;
  for_each_center(state.n, threads, [&](std::size_t center, std::size_t) {
    kernels.pull(basis, state.near(center, basis.species), weights + center * D + layout.of_pairs, gx, gy, gz);
  });
  // What pairs do to their ends, in the order of the list: the same bits for any number of threads.
  double* slope = state.of_pair.data() + basis.padded_pairs;
  const std::int32_t *i = state.neighbors.i(), *j = state.neighbors.j(), *species = state.species.data();
  for (std::size_t p = 0; p < state.neighbors.size(); ++p) {
    const double r = state.neighbors.r()[p], *d = state.neighbors.d() + 3 * p;
    const auto from = static_cast<std::size_t>(i[p]), to = static_cast<std::size_t>(j[p]);
    double along = 0.0;
    if (r < basis.cutoff_pairs) {
      kernels.pair(basis, r, state.of_pair.data(), slope);
      const double* at_i = weights + from * D + static_cast<std::size_t>(species[to]) * basis.n_pairs;
      const double* at_j = weights + to * D + static_cast<std::size_t>(species[from]) * basis.n_pairs;
      for (std::size_t k = 0; k < basis.n_pairs; ++k) along += slope[k] * (at_i[k] + at_j[k]);
      along /= r;
    }
    double pull[3] = {along * d[0], along * d[1], along * d[2]};
    if (state.slot_of.data()[2 * p] >= 0) {
      const auto a = static_cast<std::size_t>(state.slot_of.data()[2 * p]),
                 b = static_cast<std::size_t>(state.slot_of.data()[2 * p + 1]);
      pull[0] += gx[a] - gx[b];
      pull[1] += gy[a] - gy[b];
      pull[2] += gz[a] - gz[b];
    }
    for (std::size_t axis = 0; axis < 3; ++axis) {
      gradient[3 * from + axis] -= scale * pull[axis];
      gradient[3 * to + axis] += scale * pull[axis];
    }
  }
}

void Fchl19::jacobian(std::size_t center, double* out, Workspace& workspace) const {
  const Layout& layout = *layout_;
  const Fchl19Basis& basis = layout.basis;
  const Fchl19Kernels& kernels = fchl19_kernels();
  State& state = own_state(workspace, layout_.get());
  if (!state.ready) throw Error("jacobian() needs values() of the same structure and workspace first");
  if (center >= state.n)
    throw Error("there are " + std::to_string(state.n) + " atoms, but number " + std::to_string(center) +
                " was asked for");
  const std::size_t D = basis.size, n = state.n;
  std::fill_n(out, 3 * n * D, 0.0);
  kernels.jacobian(basis, state.near(center, basis.species), state.atom.data(), out, layout.of_pairs,
                   state.scratch.need(kernels.scratch(basis)));
  double* slope = state.of_pair.data() + basis.padded_pairs;
  for (std::size_t p = 0; p < state.neighbors.size(); ++p) {
    const auto i = static_cast<std::size_t>(state.neighbors.i()[p]),
               j = static_cast<std::size_t>(state.neighbors.j()[p]);
    const double r = state.neighbors.r()[p];
    if (i == j || (i != center && j != center) || r >= basis.cutoff_pairs) continue;
    kernels.pair(basis, r, state.of_pair.data(), slope);
    const std::size_t other = i == center ? j : i;
    for (std::size_t axis = 0; axis < 3; ++axis) {
      const double part = (i == center ? 1.0 : -1.0) * state.neighbors.d()[3 * p + axis] / r;
      double* row =
          out + (3 * other + axis) * D + static_cast<std::size_t>(state.species.data()[other]) * basis.n_pairs;
      for (std::size_t k = 0; k < basis.n_pairs; ++k) row[k] += part * slope[k];
    }
  }
  // Moving everything changes nothing; what images of the centre do goes with the centre.
  double* own = out + 3 * center * D;
  std::fill_n(own, 3 * D, 0.0);
  for (std::size_t atom = 0; atom < n; ++atom)
    if (atom != center)
      for (std::size_t k = 0; k < 3 * D; ++k) own[k] -= out[3 * atom * D + k];
}

}  // namespace thalweg
