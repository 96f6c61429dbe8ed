#include "thalweg/fingerprint.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "buffer.hpp"
#include "expect.hpp"
#include "fingerprint_kernels.hpp"
#include "fingerprint_tables.hpp"
#include "isa.hpp"
#include "spare.hpp"
#include "thalweg/neighbors.hpp"

namespace thalweg {

THALWEG_DISPATCH(FingerprintKernels, fingerprint_kernels)

namespace {

constexpr double kPi = 3.141592653589793;
constexpr std::size_t kMostColumns = 256;  // of a window; also in fingerprint_isa.cpp
constexpr double kLongestPiece = 0.25;     // in sigma: a polynomial of degree 7 is then off by 3e-13
constexpr double kClosest = 1e-6;          // angstrom, between two atoms
constexpr std::size_t kMostPieces = 64;

std::size_t padded(std::size_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

/// Integral of the smearing kernel from 0 to a (in sigma), odd, 1/2 at m and constant beyond.
long double half_integral(long double a, long double m, FingerprintConvention convention) {
  a = std::clamp(a, -m, m);
  const auto gauss = [](long double x) { return std::erf(x / std::sqrt(2.0L)); };
  if (convention == FingerprintConvention::agox) return 0.5L * gauss(a) / gauss(m);
  const long double root = std::sqrt(std::acos(-1.0L) / 2), tail = std::exp(-m * m / 2);
  const auto integral = [&](long double x) { return root * gauss(x) - tail * (x * (1 + m * m / 2) - x * x * x / 6); };
  return 0.5L * integral(a) / integral(m);
}

/// Coefficients of the polynomial through (nodes, values): divided differences, then expanded.
std::array<long double, kPowers> interpolate(const std::array<long double, kPowers>& nodes,
                                             std::array<long double, kPowers> values) {
  for (int order = 1; order < kPowers; ++order)
    for (int k = kPowers - 1; k >= order; --k) values[k] = (values[k] - values[k - 1]) / (nodes[k] - nodes[k - order]);
  std::array<long double, kPowers> coefficients{};
  for (int k = kPowers - 1; k >= 0; --k) {
    for (int power = kPowers - 1; power > 0; --power)
      coefficients[power] = coefficients[power - 1] - nodes[k] * coefficients[power];
    coefficients[0] = values[k] - nodes[k] * coefficients[0];
  }
  return coefficients;
}

/// A HistogramAxis and the memory behind it.
struct Axis {
  HistogramAxis view{};
  std::size_t blocks = 0;
  std::vector<double> breaks, scale, shift;
  Buffer<double> by_power, by_column;
  std::vector<SlotPlace> places;

  std::size_t slots() const { return blocks * static_cast<std::size_t>(view.centers * view.pieces); }
  /// of a padded histogram with all blocks
  std::size_t length() const { return blocks * static_cast<std::size_t>(view.stride); }

  /// open_ended: samples may sit in the `reach` bins past the last one, too.
  void build(std::size_t block_count, std::size_t bins, double width, double sigma, double n_sigma, bool open_ended,
             FingerprintConvention convention) {
    blocks = block_count;
    const double half_window = n_sigma * sigma / width;  // in bins
    const double whole = std::round(half_window);
    const bool aligned = std::abs(half_window - whole) < 1e-9;
    const auto reach = static_cast<std::int32_t>(aligned ? whole : std::ceil(half_window));
    view.bins = static_cast<std::int32_t>(bins);
    view.reach = reach;
    view.centers = view.bins + (open_ended ? reach : 0);
    view.columns = 2 * reach + 1;
    view.padded_columns = static_cast<std::int32_t>(padded(static_cast<std::size_t>(view.columns)));
    view.stride = static_cast<std::int32_t>(padded(static_cast<std::size_t>(view.centers + 2 + view.padded_columns)));
    view.inverse_width = 1.0 / width;

    std::vector<long double> kinks = {0.0L, 1.0L};  // places in a bin where the end of the window crosses a bin edge
    if (!aligned) {
      const long double kink = half_window - reach + 1;
      kinks = {0.0L, std::min(kink, 1 - kink), std::max(kink, 1 - kink), 1.0L};
    }
    std::vector<long double> ends = {0.0L};
    for (std::size_t k = 1; k < kinks.size(); ++k) {
      const long double length = kinks[k] - kinks[k - 1];
      if (length < 1e-12L) continue;
      const int parts = std::max(1, static_cast<int>(std::ceil(length * width / sigma / kLongestPiece - 1e-9L)));
      for (int part = 1; part <= parts; ++part) ends.push_back(kinks[k - 1] + length * part / parts);
    }
    const std::size_t pieces = ends.size() - 1;
    if (pieces > kMostPieces || static_cast<std::size_t>(view.padded_columns) > kMostColumns)
      throw Error("the width of the smearing must be between 1/16 and 100 / n_sigma bins or so, but it is " +
                  std::to_string(sigma / width) + " bins; change sigma or the bin width");
    view.pieces = static_cast<std::int32_t>(pieces);

    std::array<long double, kPowers> nodes, values;
    for (int k = 0; k < kPowers; ++k) nodes[k] = std::cos(std::acos(-1.0L) * k / (kPowers - 1));
    const std::size_t columns = static_cast<std::size_t>(view.padded_columns);
    double* power_table = by_power.need(pieces * kPowers * columns);
    double* column_table = by_column.need(pieces * kPowers * columns);
    for (std::size_t piece = 0; piece < pieces; ++piece) {
      const long double low = ends[piece], high = ends[piece + 1];
      if (piece > 0) breaks.push_back(static_cast<double>(low));
      scale.push_back(static_cast<double>(2 / (high - low)));
      shift.push_back(static_cast<double>(-(high + low) / (high - low)));
      for (std::int32_t column = 0; column < view.columns; ++column) {
        for (int k = 0; k < kPowers; ++k) {
          const long double place = 0.5L * (low + high) + 0.5L * (high - low) * nodes[k];
          const long double from = (column - reach - place) * width / sigma, to = from + width / sigma;
          values[k] = half_integral(to, n_sigma, convention) - half_integral(from, n_sigma, convention);
        }
        const auto coefficients = interpolate(nodes, values);
        for (std::size_t power = 0; power < kPowers; ++power) {
          const std::size_t c = static_cast<std::size_t>(column);
          power_table[(piece * kPowers + power) * columns + c] = static_cast<double>(coefficients[power]);
          column_table[(piece * columns + c) * kPowers + power] = static_cast<double>(coefficients[power]);
        }
      }
    }
    const auto copy = static_cast<std::int32_t>(length());
    for (std::int32_t block = 0; block < static_cast<std::int32_t>(blocks); ++block)
      for (std::int32_t bin = 0; bin < view.centers; ++bin)
        for (std::int32_t piece = 0; piece < view.pieces; ++piece)
          places.push_back(
              {block * view.stride + bin, (bin & 3) * copy + block * view.stride + (bin + 3) / 4 * 4, piece});
    view.places = places.data();
    view.breaks = breaks.data();
    view.scale = scale.data();
    view.shift = shift.data();
    view.by_power = by_power.data();
    view.by_column = by_column.data();
  }
};

void expect_setting(bool good, const char* name, const char* wanted, double came) {
  if (!good)
    throw Error(std::string("fingerprint: ") + name + " must be " + wanted + ", but it is " + std::to_string(came));
}

}  // namespace

struct Fingerprint::Layout {
  FingerprintSettings settings;
  bool periodic = false;
  std::size_t n_atoms = 0, n_species = 0, size = 0;
  double reach = 0;                            // of the radial part, angstrom
  std::array<std::int16_t, 128> species_of{};  // by atomic number; -1: not there
  std::vector<std::int32_t> numbers, counts;   // by species
  std::vector<std::int32_t> pair_block;        // (species, species)
  std::vector<std::int32_t> triplet_block;     // (species of the centre, species, species)
  Axis radial, angular;
  std::vector<std::int32_t> fold;  // bin of the angular histogram that each padded one reflects to

  mutable Spare<Workspace> spare;

  std::string formula() const {
    std::string text;
    for (std::size_t s = 0; s < n_species; ++s) text += chemical_symbol(numbers[s]) + std::to_string(counts[s]);
    return text;
  }
};

Fingerprint::Fingerprint(const FingerprintSettings& settings, std::span<const std::int32_t> numbers, bool periodic) {
  auto layout = std::make_unique<Layout>();
  Layout& l = *layout;
  const FingerprintSettings& s = settings;
  const auto positive = [](double x) { return x > 0 && std::isfinite(x); };
  expect_setting(positive(s.cutoff_radial), "cutoff_radial", "positive and finite", s.cutoff_radial);
  expect_setting(positive(s.bin_width), "bin_width", "positive and finite", s.bin_width);
  expect_setting(s.cutoff_radial / s.bin_width < 1e4, "bin_width", "above cutoff_radial / 10000", s.bin_width);
  expect_setting(positive(s.sigma_radial), "sigma_radial", "positive and finite", s.sigma_radial);
  expect_setting(s.n_sigma >= 1 && s.n_sigma <= 8, "n_sigma", "between 1 and 8", s.n_sigma);
  expect_setting(std::isfinite(s.eta), "eta", "finite", s.eta);
  if (s.angular) {
    expect_setting(s.angular_bins >= 1 && s.angular_bins <= 10000, "angular_bins", "between 1 and 10000",
                   s.angular_bins);
    expect_setting(positive(s.sigma_angular), "sigma_angular", "positive and finite", s.sigma_angular);
    expect_setting(s.n_sigma * s.sigma_angular < kPi * (s.angular_bins - 1) / s.angular_bins, "sigma_angular",
                   "so small that n_sigma sigma_angular stays below pi by a bin", s.sigma_angular);
    expect_setting(positive(s.cutoff_angular) && s.cutoff_angular <= s.cutoff_radial + s.n_sigma * s.sigma_radial,
                   "cutoff_angular", "positive and at most cutoff_radial + n_sigma sigma_radial", s.cutoff_angular);
    const bool agox = s.convention == FingerprintConvention::agox;
    expect_setting((s.gamma >= 1 && s.gamma <= 100) || (agox && s.gamma == 0), "gamma",
                   agox ? "0 or between 1 and 100" : "between 1 and 100", s.gamma);
  }
  if (numbers.size() < 2 && !(periodic && numbers.size() == 1))
    throw Error("a fingerprint needs at least two atoms, or one in a periodic cell, but there are " +
                std::to_string(numbers.size()));
  l.settings = settings;
  l.periodic = periodic;
  l.n_atoms = numbers.size();
  std::array<std::int32_t, 128> count{};
  for (const std::int32_t number : numbers) {
    if (number < 1 || number > 118)
      throw Error("atomic numbers must be between 1 and 118, but one is " + std::to_string(number));
    ++count[static_cast<std::size_t>(number)];
  }
  l.species_of.fill(-1);
  for (std::size_t number = 0; number < count.size(); ++number) {
    if (count[number] == 0) continue;
    l.species_of[number] = static_cast<std::int16_t>(l.n_species++);
    l.numbers.push_back(static_cast<std::int32_t>(number));
    l.counts.push_back(count[number]);
  }

  const std::size_t n = l.n_species;
  // Atoms of each species that a pair or triplet takes must be there; a periodic atom is its own neighbour.
  const auto enough = [&](std::initializer_list<std::size_t> wanted) {
    return periodic || std::all_of(wanted.begin(), wanted.end(), [&](std::size_t species) {
             return l.counts[species] >= std::count(wanted.begin(), wanted.end(), species);
           });
  };
  l.pair_block.assign(n * n, -1);
  l.triplet_block.assign(n * n * n, -1);
  std::int32_t pairs = 0, triplets = 0;
  for (std::size_t a = 0; a < n; ++a)
    for (std::size_t b = a; b < n; ++b)
      if (enough({a, b})) l.pair_block[a * n + b] = l.pair_block[b * n + a] = pairs++;
  for (std::size_t center = 0; center < n; ++center)
    for (std::size_t a = 0; a < n; ++a)
      for (std::size_t b = a; b < n; ++b)
        if (enough({center, a, b}))
          l.triplet_block[(center * n + a) * n + b] = l.triplet_block[(center * n + b) * n + a] = triplets++;
  if (!s.angular) triplets = 0;

  const double bins = std::ceil(s.cutoff_radial / s.bin_width - 1e-9);
  l.reach =
      (s.convention == FingerprintConvention::agox ? s.cutoff_radial : bins * s.bin_width) + s.n_sigma * s.sigma_radial;
  l.radial.build(static_cast<std::size_t>(pairs), static_cast<std::size_t>(bins), s.bin_width, s.sigma_radial,
                 s.n_sigma, true, s.convention);
  if (s.angular) {
    const auto angular_bins = static_cast<std::size_t>(s.angular_bins);
    l.angular.build(static_cast<std::size_t>(triplets), angular_bins, kPi / s.angular_bins, s.sigma_angular, s.n_sigma,
                    false, s.convention);
    const std::int32_t reach = l.angular.view.reach;
    for (std::int32_t bin = -reach; bin < s.angular_bins + reach; ++bin) {
      const std::int32_t low = s.convention == FingerprintConvention::agox ? -bin : -bin - 1;
      l.fold.push_back(bin < 0 ? low : bin >= s.angular_bins ? 2 * s.angular_bins - bin - 1 : bin);
    }
  }
  l.size = l.radial.blocks * static_cast<std::size_t>(bins) +
           l.angular.blocks * static_cast<std::size_t>(s.angular ? s.angular_bins : 0);
  layout_ = std::move(layout);
}

Fingerprint::~Fingerprint() = default;
std::size_t Fingerprint::size() const { return layout_->size; }
const FingerprintSettings& Fingerprint::settings() const { return layout_->settings; }

FingerprintTables fingerprint_tables(const Fingerprint& fingerprint) {
  const Fingerprint::Layout& l = *fingerprint.layout_;
  return {l.settings,      l.n_atoms,        l.n_species,  l.size,       l.reach,         l.radial.view, l.angular.view,
          l.radial.blocks, l.angular.blocks, l.species_of, l.pair_block, l.triplet_block, l.fold};
}

namespace {

/// Memory of one histogram: its samples, moments and polynomials.
struct HistogramMemory {
  Buffer<double> t, weight, value, slope, moments, histogram, weights, polynomials;
  Buffer<std::int32_t> block, slot, slots;
  Buffer<std::uint8_t> in_use;
  Samples samples{};
  SlotsInUse used{};

  /// Room for n samples, kLanes more at the end.
  void room_for_samples(std::size_t n, std::size_t slots_in_all) {
    const std::size_t room = n + 2 * kLanes;
    samples = {n, t.need(room), weight.need(room), block.need(room), slot.need(room)};
    used = {0, slots.need(slots_in_all + 1), in_use.need(slots_in_all)};
    moments.need(slots_in_all * kPowers);
  }
  /// The histogram [block][stride], in copy 0.
  double* make_histogram(const Axis& axis, const FingerprintKernels& kernels) {
    const std::size_t copy = axis.length();
    double* h = histogram.need(4 * copy + kLanes);
    std::memset(h, 0, (4 * copy + kLanes) * sizeof(double));
    kernels.deposit(samples, moments.data(), used);
    kernels.expand(axis.view, used, moments.data(), h);
    const double* second = h + copy + 3;
    const double* third = h + 2 * copy + 2;
    const double* fourth = h + 3 * copy + 1;
    for (std::size_t k = 0; k + 3 < copy; ++k) h[k] = (h[k] + second[k]) + (third[k] + fourth[k]);
    return h;
  }
  void project(const Axis& axis, const FingerprintKernels& kernels) {
    double* p = polynomials.need(axis.slots() * 2 * kPowers);
    kernels.project(axis.view, used, weights.data(), p);
    const std::size_t room = samples.n + 3 * kLanes;
    kernels.evaluate(samples, p, value.need(room) + kLanes, slope.need(room) + kLanes);
  }
};

}  // namespace

struct Fingerprint::Workspace::State {
  State(const Layout& layout, bool without_still)
      : neighbors(layout.reach, 0.5, without_still), maker(&layout), skips_still(without_still) {}

  NeighborList neighbors;
  const Layout* maker;
  HistogramMemory radial, angular;
  Buffer<std::int32_t> species, first, last, partners, near_species, near_atom;
  Buffer<double> near_values, cosine, half_square, pull, rows;
  NearNeighbors near{};
  Triplets triplets{};
  std::size_t n = 0, near_room = 0;
  double angular_norm = 0;
  bool ready = false;

  // Pairs and triplets of still atoms alone add the same to every structure of a relaxation: found once, and again when
  // one of the numbers below differs.
  const bool skips_still;
  struct Still {
    std::vector<double> positions, cell;  // (atoms, 3), (3, 3)
    std::vector<std::int32_t> numbers;    // (atoms)
    std::vector<std::uint8_t> pbc;        // (3)
    std::size_t n = 0;                    // atoms of the whole structure
    std::vector<std::int32_t> index;      // (n) place among the still atoms; -1: moves
    std::vector<double> radial, angular;  // histograms
    std::unique_ptr<State> state;         // of the still atoms alone
    bool operator==(const Still& other) const {
      return n == other.n && index == other.index && numbers == other.numbers && pbc == other.pbc &&
             cell == other.cell && positions == other.positions;
    }
  };
  Still still, trial;
};

Fingerprint::Workspace::Workspace(const Fingerprint& fingerprint, bool skips_still)
    : state(std::make_unique<State>(*fingerprint.layout_, skips_still)) {}
Fingerprint::Workspace::~Workspace() = default;
Fingerprint::Workspace::Workspace(Workspace&&) noexcept = default;

Fingerprint::Workspace Fingerprint::borrow() const {
  if (auto spare = layout_->spare.take()) return std::move(*spare);
  return Workspace(*this);
}

void Fingerprint::give_back(Workspace&& workspace) const { layout_->spare.give(std::move(workspace)); }

namespace {

using State = Fingerprint::Workspace::State;

/// Species of each atom; throws unless the structure is one that the layout was made for.
void find_species(const Fingerprint::Layout& layout, const StructureView& structure, State& state) {
  if (structure.periodic() != layout.periodic)
    throw Error(std::string("this fingerprint was made for ") + (layout.periodic ? "periodic" : "non-periodic") +
                " structures, but a structure is " + (layout.periodic ? "not periodic" : "periodic") +
                "; bind one to its numbers and pbc");
  std::int32_t* species = state.species.need(structure.n);
  std::array<std::int32_t, 128> counts{};
  bool same = structure.n == layout.n_atoms;
  for (std::size_t i = 0; i < structure.n && same; ++i) {
    const std::int32_t number = structure.numbers[i];
    species[i] = number >= 0 && number < 128 ? layout.species_of[static_cast<std::size_t>(number)] : -1;
    same = species[i] >= 0;
    if (same) ++counts[static_cast<std::size_t>(species[i])];
  }
  for (std::size_t s = 0; s < layout.n_species && same; ++s) same = counts[s] == layout.counts[s];
  if (!same)
    throw Error("this fingerprint was made for " + layout.formula() + ", but a structure of " +
                std::to_string(structure.n) + " atoms has another composition; bind one to its numbers");
}

/// Neighbours within the angular cutoff, by centre, and how many triplets they make.
std::size_t find_near(const Fingerprint::Layout& layout, State& state) {
  const std::size_t n = state.n, pairs = state.neighbors.size();
  const std::int32_t *i = state.neighbors.i(), *j = state.neighbors.j();
  const double *r = state.neighbors.r(), *d = state.neighbors.d();
  const double cutoff = layout.settings.cutoff_angular, gamma = layout.settings.gamma;
  std::int32_t* first = state.first.need(n + 1);
  std::int32_t* last = state.last.need(n + 1);
  std::int32_t* partners = state.partners.need(n + 1);
  std::fill_n(last, n, 0);
  for (std::size_t p = 0; p < pairs; ++p) {
    const std::int32_t is_near = r[p] < cutoff;
    last[i[p]] += is_near;
    last[j[p]] += is_near;
  }
  // Still neighbours of a still centre: only beside one that moves, and after those.
  const NearNeighbors* still = state.skips_still && state.still.state ? &state.still.state->near : nullptr;
  const auto still_of = [&](std::size_t center, std::int32_t moving) -> std::pair<std::int32_t, std::int32_t> {
    const std::int32_t at = still != nullptr && moving > 0 ? state.still.index[center] : -1;
    return at < 0 ? std::pair(0, 0) : std::pair(still->first[at], still->last[at]);
  };
  std::size_t room = 0, triplets = 0;
  for (std::size_t center = 0; center < n; ++center) {
    const auto count = static_cast<std::size_t>(last[center]);
    const auto [from, to] = still_of(center, last[center]);
    const auto more = static_cast<std::size_t>(to - from);
    first[center] = last[center] = static_cast<std::int32_t>(room);
    partners[center] = static_cast<std::int32_t>(room + count);
    room += padded(count + more);
    triplets += count * (count - (count > 0)) / 2 + count * more;
  }
  const std::size_t stride = room + kLanes;  // a last row may read past its end
  double* values = state.near_values.need(6 * stride);
  double *ux = values, *uy = values + stride, *uz = values + 2 * stride, *inverse_r = values + 3 * stride,
         *fc = values + 4 * stride, *slope = values + 5 * stride;
  std::int32_t* species = state.near_species.need(stride);
  std::int32_t* atom = state.near_atom.need(stride);
  for (std::size_t p = 0; p < pairs; ++p) {
    if (!(r[p] < cutoff)) continue;
    const double inverse = 1.0 / r[p], x = r[p] / cutoff;
    double value = 1.0, derivative = 0.0;
    if (gamma != 0) {
      const double power = gamma == 2.0 ? x : std::pow(x, gamma - 1);
      value = 1.0 + (gamma * x - (gamma + 1)) * power * x;
      derivative = gamma * (gamma + 1) / cutoff * power * (x - 1.0);
    }
    const double u[3] = {d[3 * p] * inverse, d[3 * p + 1] * inverse, d[3 * p + 2] * inverse};
    const auto add = [&](std::int32_t center, std::int32_t neighbor, double sign) {
      const std::int32_t at = last[center]++;
      ux[at] = sign * u[0];
      uy[at] = sign * u[1];
      uz[at] = sign * u[2];
      inverse_r[at] = inverse;
      fc[at] = value;
      slope[at] = derivative;
      species[at] = state.species.data()[neighbor];
      atom[at] = neighbor;
    };
    add(i[p], j[p], 1.0);
    add(j[p], i[p], -1.0);
  }
  for (std::size_t center = 0; center < n; ++center) {
    const auto [from, to] = still_of(center, last[center] - first[center]);
    for (std::int32_t k = from; k < to; ++k) {
      const std::int32_t at = last[center]++;
      ux[at] = still->ux[k];
      uy[at] = still->uy[k];
      uz[at] = still->uz[k];
      inverse_r[at] = still->inverse_r[k];
      fc[at] = still->cutoff[k];
      slope[at] = still->cutoff_slope[k];
      species[at] = still->species[k];
      atom[at] = state.still.state->near_atom.data()[k];
    }
    const std::size_t end = center + 1 < n ? static_cast<std::size_t>(first[center + 1]) : stride;
    for (std::size_t at = static_cast<std::size_t>(last[center]); at < end; ++at) {
      ux[at] = uy[at] = uz[at] = inverse_r[at] = fc[at] = slope[at] = 0.0;
      species[at] = atom[at] = 0;
    }
  }
  state.near = {n, first, last, partners, species, ux, uy, uz, inverse_r, fc, slope};
  state.near_room = room;
  return triplets;
}

}  // namespace

namespace {

double find_species_and_volume(const Fingerprint::Layout& layout, const StructureView& structure, State& state) {
  find_species(layout, structure, state);
  const double volume = cell_volume(structure.cell);
  if (!(volume > 0) || !std::isfinite(volume))
    throw Error("a fingerprint is normalised by the volume of the cell, but this is " + std::to_string(volume) +
                " angstrom^3; give the structure a cell (clusters, too)");
  return volume;
}

}  // namespace

void Fingerprint::check(const StructureView& structure) const {
  State state(*layout_, false);
  find_species_and_volume(*layout_, structure, state);
}

namespace {

/// The padded radial histogram of the pairs at hand.
double* radial_histogram(const Fingerprint::Layout& l, State& state, double volume) {
  const FingerprintKernels& kernels = fingerprint_kernels();
  const std::size_t pairs = state.neighbors.size();
  const std::int32_t *i = state.neighbors.i(), *j = state.neighbors.j();
  const std::int32_t* species = state.species.data();
  const double* r = state.neighbors.r();
  const double n = static_cast<double>(l.n_atoms);
  state.radial.room_for_samples(pairs, l.radial.slots());
  for (std::size_t p = 0; p < pairs; ++p) {
    if (!(r[p] > kClosest))
      throw Error("atoms " + std::to_string(i[p]) + " and " + std::to_string(j[p]) +
                  " lie on one point; a fingerprint needs atoms that are apart");
    state.radial.samples.block[p] =
        l.pair_block[static_cast<std::size_t>(species[i[p]]) * l.n_species + static_cast<std::size_t>(species[j[p]])];
  }
  // Each pair counts twice, once from either end.
  const double radial_norm = 2.0 * volume / (4.0 * kPi * l.settings.bin_width * n * n);
  kernels.locate_pairs(l.radial.view, r, radial_norm, state.radial.samples);
  return state.radial.make_histogram(l.radial, kernels);
}

/// The padded angular histogram of the triplets at hand, without angular_norm.
double* angular_histogram(const Fingerprint::Layout& l, State& state) {
  const FingerprintKernels& kernels = fingerprint_kernels();
  const std::size_t triplets = find_near(l, state);
  const std::size_t room = triplets + 3 * kLanes;
  state.angular.room_for_samples(triplets, l.angular.slots());
  state.triplets = {state.angular.samples, state.cosine.need(room) + kLanes, state.half_square.need(room) + kLanes};
  kernels.find_triplets(state.near, state.species.data(), static_cast<std::int32_t>(l.n_species),
                        l.triplet_block.data(), state.triplets);
  kernels.locate_triplets(l.angular.view, state.triplets);
  return state.angular.make_histogram(l.angular, kernels);
}

/// Brings state.still up to date.
void find_still(const Fingerprint::Layout& l, const StructureView& structure, State& state, double volume) {
  State::Still& now = state.trial;
  now.n = structure.n;
  now.positions.clear();
  now.numbers.clear();
  now.index.assign(structure.n, -1);
  now.cell.assign(structure.cell, structure.cell + 9);
  now.pbc.assign(structure.pbc, structure.pbc + 3);
  for (std::size_t i = 0; i < structure.n; ++i) {
    if (!structure.is_still(i)) continue;
    now.index[i] = static_cast<std::int32_t>(now.numbers.size());
    now.numbers.push_back(structure.numbers[i]);
    now.positions.insert(now.positions.end(), structure.positions + 3 * i, structure.positions + 3 * i + 3);
  }
  if (now == state.still) return;
  std::swap(state.still, state.trial);
  State::Still& still = state.still;
  still.state.reset();
  still.radial.clear();
  still.angular.clear();
  const std::size_t n = still.numbers.size();
  if (n == 0) return;
  auto of_still = std::make_unique<State>(l, false);
  std::int32_t* species = of_still->species.need(n);
  for (std::size_t i = 0; i < structure.n; ++i)
    if (still.index[i] >= 0) species[still.index[i]] = state.species.data()[i];
  of_still->n = n;
  of_still->neighbors.update(
      {n, still.positions.data(), still.numbers.data(), still.cell.data(), still.pbc.data(), nullptr});
  const double* radial = radial_histogram(l, *of_still, volume);
  still.radial.assign(radial, radial + l.radial.length());
  if (l.settings.angular) {
    const double* angular = angular_histogram(l, *of_still);
    still.angular.assign(angular, angular + l.angular.length());
    std::vector<std::int32_t> atoms;  // from places among the still atoms to places in the structure
    for (std::size_t i = 0; i < structure.n; ++i)
      if (still.index[i] >= 0) atoms.push_back(static_cast<std::int32_t>(i));
    for (std::size_t k = 0; k < of_still->near_room; ++k)
      of_still->near_atom.data()[k] = atoms[static_cast<std::size_t>(of_still->near_atom.data()[k])];
  }
  still.state = std::move(of_still);
}

}  // namespace

void Fingerprint::values(const StructureView& structure, double* features, Workspace& workspace) const {
  const Layout& l = *layout_;
  State& state = own_state(workspace, layout_.get());
  state.ready = false;
  const double volume = find_species_and_volume(l, structure, state);
  if (state.skips_still) find_still(l, structure, state, volume);
  state.neighbors.update(structure);
  state.n = structure.n;
  const double n = static_cast<double>(structure.n);

  double* histogram = radial_histogram(l, state, volume);
  for (std::size_t k = 0; k < state.still.radial.size(); ++k) histogram[k] += state.still.radial[k];
  const auto bins = static_cast<std::size_t>(l.radial.view.bins);
  for (std::size_t block = 0; block < l.radial.blocks; ++block)
    std::memcpy(features + block * bins,
                histogram + block * static_cast<std::size_t>(l.radial.view.stride) + l.radial.view.reach,
                bins * sizeof(double));

  if (l.settings.angular) {
    features += l.radial.blocks * bins;
    histogram = angular_histogram(l, state);
    for (std::size_t k = 0; k < state.still.angular.size(); ++k) histogram[k] += state.still.angular[k];
    state.angular_norm = l.settings.eta * volume / (n * n * n);
    const auto angular_bins = static_cast<std::size_t>(l.angular.view.bins);
    const auto reach = static_cast<std::size_t>(l.angular.view.reach);
    for (std::size_t block = 0; block < l.angular.blocks; ++block) {
      double* to = features + block * angular_bins;
      const double* from = histogram + block * static_cast<std::size_t>(l.angular.view.stride);
      for (std::size_t b = 0; b < angular_bins; ++b) to[b] = state.angular_norm * from[b + reach];
      for (std::size_t b = 0; b < reach; ++b) {
        to[l.fold[b]] += state.angular_norm * from[b];
        const std::size_t above = angular_bins + reach + b;
        to[l.fold[above]] += state.angular_norm * from[above];
      }
    }
  }
  state.ready = true;
}

void Fingerprint::contract(const double* weights, double scale, double* gradient, Workspace& workspace) const {
  const Layout& l = *layout_;
  State& state = own_state(workspace, layout_.get());
  if (!state.ready) throw Error("contract() needs values() of this workspace first");
  const FingerprintKernels& kernels = fingerprint_kernels();
  const auto bins = static_cast<std::size_t>(l.radial.view.bins);
  double* padded_weights = state.radial.weights.need(l.radial.length());
  for (std::size_t block = 0; block < l.radial.blocks; ++block) {
    double* to = padded_weights + block * static_cast<std::size_t>(l.radial.view.stride) + l.radial.view.reach;
    for (std::size_t b = 0; b < bins; ++b) to[b] = scale * weights[block * bins + b];
  }
  state.radial.project(l.radial, kernels);
  kernels.pair_gradient(state.radial.samples, state.neighbors.i(), state.neighbors.j(), state.neighbors.d(),
                        state.neighbors.r(), l.radial.view.inverse_width, state.radial.value.data() + kLanes,
                        state.radial.slope.data() + kLanes, gradient);
  if (!l.settings.angular) return;

  weights += l.radial.blocks * bins;
  const auto angular_bins = static_cast<std::size_t>(l.angular.view.bins);
  padded_weights = state.angular.weights.need(l.angular.length());
  for (std::size_t block = 0; block < l.angular.blocks; ++block) {
    double* to = padded_weights + block * static_cast<std::size_t>(l.angular.view.stride);
    const double* from = weights + block * angular_bins;
    for (std::size_t b = 0; b < l.fold.size(); ++b) to[b] = scale * state.angular_norm * from[l.fold[b]];
  }
  state.angular.project(l.angular, kernels);
  const std::size_t room = state.near_room;
  double* pull = state.pull.need(10 * room);
  kernels.triplet_gradient(state.near, state.triplets, l.angular.view.inverse_width,
                           state.angular.value.data() + kLanes, state.angular.slope.data() + kLanes, pull, room);
  const std::int32_t* atom = state.near_atom.data();
  for (std::size_t center = 0; center < state.n; ++center) {
    double total[3] = {0, 0, 0};
    for (std::int32_t at = state.near.first[center]; at < state.near.last[center]; ++at) {
      double* to = gradient + 3 * static_cast<std::size_t>(atom[at]);
      for (std::size_t k = 0; k < 3; ++k) {
        const double part = pull[k * room + static_cast<std::size_t>(at)];
        to[k] += part;
        total[k] += part;
      }
    }
    for (std::size_t k = 0; k < 3; ++k) gradient[3 * center + k] -= total[k];
  }
}

void Fingerprint::jacobian(double* jacobian, Workspace& workspace) const {
  const Layout& l = *layout_;
  State& state = own_state(workspace, layout_.get());
  if (!state.ready) throw Error("jacobian() needs values() of this workspace first");
  if (state.skips_still) throw Error("jacobian() needs a workspace that does not skip still atoms");
  const FingerprintKernels& kernels = fingerprint_kernels();
  const std::size_t row_stride = l.radial.length() + (l.settings.angular ? l.angular.length() : 0);
  double* rows = state.rows.need(3 * state.n * row_stride);
  std::memset(rows, 0, 3 * state.n * row_stride * sizeof(double));
  kernels.pair_jacobian(l.radial.view, state.radial.samples, state.neighbors.i(), state.neighbors.j(),
                        state.neighbors.d(), state.neighbors.r(), rows, row_stride);
  if (l.settings.angular)
    kernels.triplet_jacobian(l.angular.view, state.near, state.triplets, state.near_atom.data(),
                             rows + l.radial.length(), row_stride);
  const auto bins = static_cast<std::size_t>(l.radial.view.bins);
  for (std::size_t row = 0; row < 3 * state.n; ++row) {
    double* to = jacobian + row * l.size;
    const double* from = rows + row * row_stride;
    for (std::size_t block = 0; block < l.radial.blocks; ++block, to += bins, from += l.radial.view.stride)
      std::memcpy(to, from + l.radial.view.reach, bins * sizeof(double));
    if (!l.settings.angular) continue;
    const auto angular_bins = static_cast<std::size_t>(l.angular.view.bins);
    const auto reach = static_cast<std::size_t>(l.angular.view.reach);
    for (std::size_t block = 0; block < l.angular.blocks; ++block) {
      for (std::size_t b = 0; b < angular_bins; ++b) to[b] = state.angular_norm * from[b + reach];
      for (std::size_t b = 0; b < reach; ++b) {
        to[l.fold[b]] += state.angular_norm * from[b];
        to[l.fold[angular_bins + reach + b]] += state.angular_norm * from[angular_bins + reach + b];
      }
      to += angular_bins;
      from += l.angular.view.stride;
    }
  }
}

}  // namespace thalweg
