#include "thalweg/soap.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "buffer.hpp"
#include "centers.hpp"
#include "expect.hpp"
#include "isa.hpp"
#include "soap_tables.hpp"
#include "spare.hpp"
#include "species_table.hpp"
#include "thalweg/neighbors.hpp"

namespace thalweg {

THALWEG_DISPATCH(SoapKernels, soap_kernels)

namespace {

void expect(bool good, const char* name, const char* wanted, double came) {
  expect_setting(good, "SOAP", name, wanted, came);
}

constexpr long double kPi = 3.14159265358979323846264338327950288L;
constexpr double kLogThreshold = 6.907755278982137;  // ln 1000: where basis functions and neighbours have faded
constexpr int kMostRadial = 16, kMostDegree = 12;    // also in soap_isa.cpp
constexpr long double kLeastEigenvalue = 1e-14L;     // of S_l with unit diagonal; dscribe's double precision ends there

/// Eigenvalues and eigenvectors (columns) of a symmetric matrix (n, n): Jacobi's rotations in extended precision.
void eigen(std::size_t n, std::vector<long double>& matrix, std::vector<long double>& vectors) {
  vectors.assign(n * n, 0.0L);
  for (std::size_t k = 0; k < n; ++k) vectors[k * n + k] = 1.0L;
  for (int sweep = 0; sweep < 60; ++sweep) {
    long double off = 0;
    for (std::size_t p = 0; p < n; ++p)
      for (std::size_t q = p + 1; q < n; ++q) {
        const long double apq = matrix[p * n + q];
        off += apq * apq;
        if (apq == 0) continue;
        const long double theta = (matrix[q * n + q] - matrix[p * n + p]) / (2 * apq);
        const long double t = (theta >= 0 ? 1 : -1) / (std::abs(theta) + std::sqrt(theta * theta + 1));
        const long double cosine = 1 / std::sqrt(t * t + 1), sine = t * cosine;
        for (std::size_t k = 0; k < n; ++k) {
          const long double kp = matrix[k * n + p], kq = matrix[k * n + q];
          matrix[k * n + p] = cosine * kp - sine * kq;
          matrix[k * n + q] = sine * kp + cosine * kq;
        }
        for (std::size_t k = 0; k < n; ++k) {
          const long double pk = matrix[p * n + k], qk = matrix[q * n + k];
          matrix[p * n + k] = cosine * pk - sine * qk;
          matrix[q * n + k] = sine * pk + cosine * qk;
          const long double vp = vectors[k * n + p], vq = vectors[k * n + q];
          vectors[k * n + p] = cosine * vp - sine * vq;
          vectors[k * n + q] = sine * vp + cosine * vq;
        }
      }
    if (off < 1e-40L) break;
  }
}

/// Exponents alpha and the orthonormalising matrix beta = S^-1/2 (n, k) of one l.
void radial_basis(double r_cut, std::size_t n_max, std::size_t l, std::vector<long double>& alpha,
                  std::vector<long double>& beta) {
  alpha.resize(n_max);
  for (std::size_t k = 0; k < n_max; ++k) {
    const long double a = n_max == 1 ? 1.0L : 1.0L + (r_cut - 1.0L) * k / (n_max - 1.0L);
    alpha[k] = (std::log(1000.0L) + static_cast<long double>(l) * std::log(a)) / (a * a);
  }
  const long double power = static_cast<long double>(l) + 1.5L, half_gamma = 0.5L * std::tgamma(power);
  std::vector<long double> overlaps(n_max * n_max), vectors;
  for (std::size_t i = 0; i < n_max; ++i)
    for (std::size_t j = 0; j < n_max; ++j)
      overlaps[i * n_max + j] = half_gamma * std::pow(alpha[i] + alpha[j], -power);
  eigen(n_max, overlaps, vectors);
  long double least = 1e300L, most = 0;
  for (std::size_t k = 0; k < n_max; ++k) {
    least = std::min(least, overlaps[k * n_max + k]);
    most = std::max(most, overlaps[k * n_max + k]);
  }
  if (!(least > kLeastEigenvalue * most))
    throw Error("SOAP: " + std::to_string(n_max) + " radial functions are too alike within r_cut = " +
                std::to_string(r_cut) + " angstrom; take a smaller n_max or a larger r_cut");
  beta.assign(n_max * n_max, 0.0L);
  for (std::size_t i = 0; i < n_max; ++i)
    for (std::size_t j = 0; j < n_max; ++j)
      for (std::size_t k = 0; k < n_max; ++k)
        beta[i * n_max + j] += vectors[i * n_max + k] * vectors[j * n_max + k] / std::sqrt(overlaps[k * n_max + k]);
}

}  // namespace

struct Soap::Layout {
  SoapSettings settings;
  SpeciesTable species;
  SoapBasis basis{};
  std::vector<double> gamma, to_basis, from_basis, norm, factor;
  std::vector<std::int32_t> exponent_of;

  mutable Spare<Workspace> spare;
};

Soap::Soap(const SoapSettings& settings, std::span<const std::int32_t> species) {
  auto layout = std::make_unique<Layout>();
  Layout& l = *layout;
  const SoapSettings& s = settings;
  expect(s.r_cut > 1 && s.r_cut < 1e3, "r_cut", "above 1 and below 1000 angstrom", s.r_cut);
  expect(s.sigma > 1e-2 && s.sigma < 1e2, "sigma", "between 0.01 and 100 angstrom", s.sigma);
  expect(s.n_max >= 1 && s.n_max <= kMostRadial, "n_max", "1 to 16", s.n_max);
  expect(s.l_max >= 0 && s.l_max <= kMostDegree, "l_max", "0 to 12", s.l_max);
  l.settings = settings;
  l.species = SpeciesTable("SOAP", species);

  SoapBasis& b = l.basis;
  b.n_max = static_cast<std::size_t>(s.n_max);
  b.l_max = static_cast<std::size_t>(s.l_max);
  b.harmonics = (b.l_max + 1) * (b.l_max + 1);
  b.species = l.species.numbers().size();
  b.padded_n = (b.n_max + 3) / 4 * 4;
  b.channels = b.species * b.padded_n;
  b.size = (b.l_max + 1) * (b.species * b.n_max) * (b.species * b.n_max + 1) / 2;
  b.r_cut = s.r_cut;
  b.reach = s.r_cut + s.sigma * std::sqrt(2 * kLogThreshold);
  b.smooth = s.cutoff == SoapCutoff::smooth;
  const long double eta = 0.5L / (static_cast<long double>(s.sigma) * s.sigma);
  l.to_basis.assign((b.l_max + 1) * b.n_max * b.padded_n, 0.0);
  l.from_basis = l.to_basis;
  for (std::size_t degree = 0; degree <= b.l_max; ++degree) {
    std::vector<long double> alpha, beta;
    radial_basis(s.r_cut, b.n_max, degree, alpha, beta);
    for (std::size_t k = 0; k < b.n_max; ++k) {
      const double gamma = static_cast<double>(eta * alpha[k] / (eta + alpha[k]));
      const auto known = std::find(l.gamma.begin(), l.gamma.end(), gamma);
      l.exponent_of.push_back(static_cast<std::int32_t>(known - l.gamma.begin()));
      if (known == l.gamma.end()) l.gamma.push_back(gamma);
      const long double smeared =
          std::pow(kPi / (eta + alpha[k]), 1.5L) * std::pow(eta / (eta + alpha[k]), static_cast<long double>(degree));
      for (std::size_t n = 0; n < b.n_max; ++n) {
        const double value = static_cast<double>(beta[n * b.n_max + k] * smeared);
        l.to_basis[(degree * b.n_max + k) * b.padded_n + n] = value;
        l.from_basis[(degree * b.n_max + n) * b.padded_n + k] = value;
      }
    }
    l.factor.push_back(static_cast<double>(kPi * std::sqrt(8.0L / (2.0L * degree + 1.0L))));
    for (std::size_t lm = 0; lm <= 2 * degree; ++lm) {
      const std::size_t m = lm < degree ? degree - lm : lm - degree;
      long double ratio = (2.0L * degree + 1.0L) / (4 * kPi) * (m > 0 ? 2 : 1);  // (l - m)! / (l + m)!
      for (std::size_t k = degree - m + 1; k <= degree + m; ++k) ratio /= static_cast<long double>(k);
      l.norm.push_back(static_cast<double>(std::sqrt(ratio)));
    }
  }
  b.exponents = l.gamma.size();
  b.gamma = l.gamma.data();
  b.exponent_of = l.exponent_of.data();
  b.to_basis = l.to_basis.data();
  b.from_basis = l.from_basis.data();
  b.norm = l.norm.data();
  b.factor = l.factor.data();
  layout_ = std::move(layout);
}

Soap::~Soap() = default;
std::size_t Soap::size() const { return layout_->basis.size; }
std::size_t Soap::rows(std::size_t atoms) const { return layout_->settings.average == SoapAverage::off ? atoms : 1; }
std::span<const std::int32_t> Soap::species() const { return layout_->species.numbers(); }
const SoapSettings& Soap::settings() const { return layout_->settings; }
double Soap::reach() const { return layout_->basis.reach; }
const SoapBasis& soap_basis(const Soap& soap) { return soap.layout_->basis; }

// Neighbours of atom i and species s, the atom itself included: first[i species + s], `count` of them, in x, y, z and
// atom, then padding. slot_of[2 p], [2 p + 1]: where pair p of the list stands as a neighbour of its i, of its j.
struct Soap::Workspace::State {
  explicit State(const Layout& layout) : neighbors(layout.basis.reach), maker(&layout) {}

  NeighborList neighbors;
  const Layout* maker;
  std::size_t n = 0, room = 0;
  bool ready = false;
  Buffer<std::int32_t> species, atom, slot_of;
  Buffer<std::size_t> first, count;
  Buffer<double> vectors, coefficients, features, matrices, pulls, scratch, rows;

  SoapNeighbors near(std::size_t group) {
    const std::size_t at = first.data()[group];
    const double* x = vectors.data() + at;
    return {(count.data()[group] + kSoapLanes - 1) / kSoapLanes * kSoapLanes, x, x + room, x + 2 * room};
  }
};

Soap::Workspace::Workspace(const Soap& soap) : state(std::make_unique<State>(*soap.layout_)) {}
Soap::Workspace::~Workspace() = default;
Soap::Workspace::Workspace(Workspace&&) noexcept = default;

Soap::Workspace Soap::borrow() const {
  if (auto spare = layout_->spare.take()) return std::move(*spare);
  return Workspace(*this);
}

void Soap::give_back(Workspace&& workspace) const { layout_->spare.give(std::move(workspace)); }

void Soap::check(const StructureView& structure) const {
  for (std::size_t i = 0; i < structure.n; ++i) (void)layout_->species(structure.numbers[i]);
  NeighborList(reach()).check_cell(structure);
}

namespace {

using State = Soap::Workspace::State;

/// Sorts the ends of all pairs by centre and species.
void find_neighbors(const Soap::Layout& layout, const StructureView& structure, State& state) {
  const std::size_t n = structure.n, kinds = layout.basis.species;
  std::int32_t* species = state.species.need(n);
  for (std::size_t i = 0; i < n; ++i) species[i] = static_cast<std::int32_t>(layout.species(structure.numbers[i]));
  state.neighbors.update(structure);
  const std::size_t pairs = state.neighbors.size();
  const std::int32_t *i = state.neighbors.i(), *j = state.neighbors.j();
  const double* d = state.neighbors.d();

  std::size_t* first = state.first.need(n * kinds + 1);
  std::size_t* count = state.count.need(n * kinds);
  std::fill_n(count, n * kinds, 0);
  const auto group = [&](std::int32_t center, std::int32_t neighbor) {
    return static_cast<std::size_t>(center) * kinds + static_cast<std::size_t>(species[neighbor]);
  };
  for (std::size_t k = 0; k < n; ++k) ++count[group(static_cast<std::int32_t>(k), static_cast<std::int32_t>(k))];
  for (std::size_t p = 0; p < pairs; ++p) {
    ++count[group(i[p], j[p])];
    ++count[group(j[p], i[p])];
  }
  std::size_t room = 0;
  for (std::size_t g = 0; g < n * kinds; ++g) {
    first[g] = room;
    room += (count[g] + kSoapLanes - 1) / kSoapLanes * kSoapLanes;
    count[g] = 0;
  }
  first[n * kinds] = room;
  state.room = room;
  double* x = state.vectors.need(3 * room);
  double *y = x + room, *z = y + room;
  std::int32_t* atom = state.atom.need(room);
  std::int32_t* slot = state.slot_of.need(2 * pairs);
  const auto add = [&](std::int32_t center, std::int32_t neighbor, double dx, double dy, double dz) {
    const std::size_t g = group(center, neighbor), at = first[g] + count[g]++;
    x[at] = dx;
    y[at] = dy;
    z[at] = dz;
    atom[at] = neighbor;
    return static_cast<std::int32_t>(at);
  };
  for (std::size_t k = 0; k < n; ++k) {
    const auto center = static_cast<std::int32_t>(k);
    add(center, center, 0.0, 0.0, 0.0);
  }
  for (std::size_t p = 0; p < pairs; ++p) {
    const double dx = d[3 * p], dy = d[3 * p + 1], dz = d[3 * p + 2];
    slot[2 * p] = add(i[p], j[p], dx, dy, dz);
    slot[2 * p + 1] = add(j[p], i[p], -dx, -dy, -dz);
  }
  for (std::size_t g = 0; g < n * kinds; ++g)
    for (std::size_t at = first[g] + count[g]; at < first[g + 1]; ++at) {
      x[at] = 2.0 * layout.basis.reach;  // out of reach: weight 0
      y[at] = z[at] = 0.0;
      atom[at] = 0;
    }
}

/// Calls work(center, scratch) for every centre.
template <class Work>
void for_each_center(const SoapBasis& basis, State& state, int threads, const Work& work) {
  const std::size_t length = (soap_kernels().scratch(basis) + 15) / 8 * 8;
  double* scratch = state.scratch.need(length * static_cast<std::size_t>(center_parts(state.n, threads)));
  thalweg::for_each_center(state.n, threads,
                           [&](std::size_t center, std::size_t part) { work(center, scratch + length * part); });
}

}  // namespace

void Soap::values(const StructureView& structure, double* features, Workspace& workspace, int threads) const {
  const Layout& layout = *layout_;
  const SoapBasis& basis = layout.basis;
  const SoapKernels& kernels = soap_kernels();
  State& state = own_state(workspace, layout_.get());
  state.ready = false;
  state.n = structure.n;
  find_neighbors(layout, structure, state);
  const std::size_t of_center = basis.harmonics * basis.channels, n = state.n;
  const bool averaged = layout.settings.average != SoapAverage::off;
  double* coefficients = state.coefficients.need(n * of_center + 4);  // rows are read four numbers at a time
  double* each = averaged ? state.features.need(n * basis.size) : features;
  for_each_center(basis, state, threads, [&](std::size_t center, double* scratch) {
    double* c = coefficients + center * of_center;
    for (std::size_t s = 0; s < basis.species; ++s)
      kernels.expand(basis, state.near(center * basis.species + s), c + s * basis.padded_n, scratch);
    kernels.spectrum(basis, c, each + center * basis.size, scratch);
  });
  if (averaged) {
    const double share = layout.settings.average == SoapAverage::mean ? 1.0 / static_cast<double>(n) : 1.0;
    std::fill_n(features, basis.size, 0.0);
    for (std::size_t center = 0; center < n; ++center)
      for (std::size_t f = 0; f < basis.size; ++f) features[f] += each[center * basis.size + f];
    for (std::size_t f = 0; f < basis.size; ++f) features[f] *= share;
  }
  state.ready = true;
}

void Soap::contract(const double* weights, double scale, double* gradient, Workspace& workspace, int threads) const {
  const Layout& layout = *layout_;
  const SoapBasis& basis = layout.basis;
  const SoapKernels& kernels = soap_kernels();
  State& state = own_state(workspace, layout_.get());
  if (!state.ready) throw Error("contract() needs values() of the same structure and workspace first");
  const std::size_t of_center = basis.harmonics * basis.channels;
  const std::size_t of_matrices = (basis.l_max + 1) * basis.channels * basis.channels;
  const bool averaged = layout.settings.average != SoapAverage::off;
  if (layout.settings.average == SoapAverage::mean) scale /= static_cast<double>(state.n);
  // One set of matrices for all centres if they share their weights, else one for each thread.
  double* matrices = state.matrices.need(of_matrices * (averaged ? 1 : static_cast<std::size_t>(std::max(threads, 1))));
  if (averaged) kernels.unfold(basis, weights, matrices);
  double* gx = state.pulls.need(3 * state.room);
  double *gy = gx + state.room, *gz = gy + state.room;
  const double* scratch_begin = nullptr;
  const std::size_t length = (kernels.scratch(basis) + 15) / 8 * 8;
  scratch_begin = state.scratch.need(length * static_cast<std::size_t>(std::max(threads, 1)));
  for_each_center(basis, state, threads, [&](std::size_t center, double* scratch) {
    double* slope = scratch + length - of_center - 8;
    const double* matrix = matrices;
    if (!averaged) {
      double* own = matrices + static_cast<std::size_t>(scratch - scratch_begin) / length * of_matrices;
      kernels.unfold(basis, weights + center * basis.size, own);
      matrix = own;
    }
    kernels.backward(basis, matrix, state.coefficients.data() + center * of_center, slope, scratch);
    for (std::size_t s = 0; s < basis.species; ++s) {
      const std::size_t group = center * basis.species + s, at = state.first.data()[group];
      kernels.pull(basis, state.near(group), slope + s * basis.padded_n, gx + at, gy + at, gz + at, scratch);
    }
  });
  // What pairs do to their ends, in the order of the list: the same bits for any number of threads.
  const std::size_t pairs = state.neighbors.size();
  const std::int32_t *i = state.neighbors.i(), *j = state.neighbors.j(), *slot = state.slot_of.data();
  for (std::size_t p = 0; p < pairs; ++p) {
    const std::size_t a = static_cast<std::size_t>(slot[2 * p]), b = static_cast<std::size_t>(slot[2 * p + 1]);
    const double pull[3] = {scale * (gx[a] - gx[b]), scale * (gy[a] - gy[b]), scale * (gz[a] - gz[b])};
    double* at_i = gradient + 3 * static_cast<std::size_t>(i[p]);
    double* at_j = gradient + 3 * static_cast<std::size_t>(j[p]);
    for (int axis = 0; axis < 3; ++axis) {
      at_i[axis] -= pull[axis];
      at_j[axis] += pull[axis];
    }
  }
}

void Soap::jacobian(std::size_t center, double* out, Workspace& workspace) const {
  const SoapBasis& basis = layout_->basis;
  const SoapKernels& kernels = soap_kernels();
  State& state = own_state(workspace, layout_.get());
  if (!state.ready) throw Error("jacobian() needs values() of the same structure and workspace first");
  if (center >= state.n)
    throw Error("there are " + std::to_string(state.n) + " centres, but number " + std::to_string(center) +
                " was asked for");
  const std::size_t row = basis.harmonics * basis.padded_n, n = state.n, D = basis.size;
  const double* c = state.coefficients.data() + center * basis.harmonics * basis.channels;
  double* scratch = state.scratch.need(kernels.scratch(basis));
  double* sums = state.rows.need(3 * n * row);
  std::fill_n(out, 3 * n * D, 0.0);
  for (std::size_t s = 0; s < basis.species; ++s) {
    const std::size_t group = center * basis.species + s, at = state.first.data()[group];
    std::fill_n(sums, 3 * n * row, 0.0);
    kernels.sum_slopes(basis, state.near(group), state.count.data()[group], state.atom.data() + at, sums, scratch);
    for (std::size_t atom = 0; atom < n; ++atom) {
      // An atom and its images move together with the centre that it is: they do not change what it sees.
      if (atom == center || static_cast<std::size_t>(state.species.data()[atom]) != s) continue;
      for (std::size_t axis = 0; axis < 3; ++axis)
        kernels.spectrum_slope(basis, c, s, sums + (3 * atom + axis) * row, out + (3 * atom + axis) * D, scratch);
    }
  }
  double* own = out + 3 * center * D;
  for (std::size_t atom = 0; atom < n; ++atom)
    if (atom != center)
      for (std::size_t k = 0; k < 3 * D; ++k) own[k] -= out[3 * atom * D + k];
}

}  // namespace thalweg
