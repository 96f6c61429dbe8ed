#include "thalweg/neighbors.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "lattice.hpp"

namespace thalweg {
namespace {

constexpr double kFarthest = 1e9;         // angstrom
constexpr double kMostImages = 1e6;       // per pair of atoms
constexpr std::size_t kBinsPayOff = 200;  // atoms from which on the search in bins is the faster one
// Ranges of images and bins are widened by this fraction of a lattice vector, so that rounding cannot lose a pair; the
// distance decides.
constexpr double kSlack = 1e-6;

struct Image {
  std::int64_t n[3];
};
bool operator<(const Image& a, const Image& b) { return std::lexicographical_compare(a.n, a.n + 3, b.n, b.n + 3); }

}  // namespace

struct NeighborList::Lattice : PeriodicLattice {
  using PeriodicLattice::PeriodicLattice;
  void shift(const Image& image, double* out) const { PeriodicLattice::shift(image.n, out); }
};

NeighborList::NeighborList(double cutoff, double skin, bool without_still)
    : cutoff_(cutoff), skin_(skin), without_still_(without_still) {
  if (!(cutoff > 0) || !std::isfinite(cutoff))
    throw Error("the cutoff of a neighbour list must be positive and finite, but it is " + std::to_string(cutoff));
  if (!(skin >= 0) || !std::isfinite(skin))
    throw Error("the skin of a neighbour list must be finite and not negative, but it is " + std::to_string(skin));
}

void NeighborList::update(const StructureView& structure) {
  const std::size_t n = structure.n;
  const double* x = structure.positions;
  bool stale = !built_ || reference_.size() != 3 * n || std::memcmp(cell_, structure.cell, sizeof(cell_)) != 0 ||
               std::memcmp(pbc_, structure.pbc, sizeof(pbc_)) != 0;
  if (!stale) {
    const double limit = 0.25 * skin_ * skin_;
    const double* r = reference_.data();
    for (std::size_t k = 0; k < 3 * n; k += 3) {
      const double dx = x[k] - r[k], dy = x[k + 1] - r[k + 1], dz = x[k + 2] - r[k + 2];
      stale |= !(dx * dx + dy * dy + dz * dz <= limit);  // true for a position that is not a number, too
    }
  }
  if (without_still_)
    for (std::size_t i = 0; i < n && !stale; ++i) stale = still_[i] != (structure.is_still(i) ? 1 : 0);
  if (stale) rebuild(structure);

  const double limit = cutoff_ * cutoff_;
  const std::size_t candidates = candidate_i_.size();
  const std::int32_t* ci = candidate_i_.data();
  const std::int32_t* cj = candidate_j_.data();
  const double* shift = candidate_shift_.data();
  std::int32_t* pi = i_.data();
  std::int32_t* pj = j_.data();
  double* d = d_.data();
  double* r = r_.data();
  std::size_t count = 0;
  for (std::size_t c = 0; c < candidates; ++c) {
    const double* a = x + 3 * static_cast<std::size_t>(ci[c]);
    const double* b = x + 3 * static_cast<std::size_t>(cj[c]);
    const double dx = (b[0] - a[0]) + shift[3 * c], dy = (b[1] - a[1]) + shift[3 * c + 1],
                 dz = (b[2] - a[2]) + shift[3 * c + 2];
    const double square = dx * dx + dy * dy + dz * dz;
    pi[count] = ci[c];
    pj[count] = cj[c];
    d[3 * count] = dx;
    d[3 * count + 1] = dy;
    d[3 * count + 2] = dz;
    r[count] = std::sqrt(square);
    count += square < limit;
  }
  count_ = count;
}

void NeighborList::check_cell(const StructureView& structure) const {
  const Lattice lattice(structure);
  const double reach = cutoff_ + skin_;
  double images = 1;
  for (int a = 0; a < 3; ++a)
    if (lattice.periodic[a]) images *= 2 * reach / lattice.height[a] + 1;
  if (images > kMostImages)
    throw Error("the cell is too thin: within " + std::to_string(reach) + " angstrom an atom would see about " +
                std::to_string(static_cast<long long>(std::min(images, 1e15))) + " images of another; check the cell");
}

void NeighborList::rebuild(const StructureView& structure) {
  built_ = false;
  count_ = 0;
  const std::size_t n = structure.n;
  for (std::size_t k = 0; k < 3 * n; ++k)
    if (!(std::abs(structure.positions[k]) <= kFarthest))
      throw Error("positions must be finite and within 1e9 angstrom of the origin, but atom " + std::to_string(k / 3) +
                  " has a coordinate of " + std::to_string(structure.positions[k]));
  check_cell(structure);
  const Lattice lattice(structure);
  if (without_still_) {
    still_.resize(n);
    for (std::size_t i = 0; i < n; ++i) still_[i] = structure.is_still(i) ? 1 : 0;
  }
  candidate_i_.clear();
  candidate_j_.clear();
  candidate_shift_.clear();
  fractional_.resize(3 * n);
  for (std::size_t i = 0; i < n; ++i) lattice.fractional(structure.positions + 3 * i, fractional_.data() + 3 * i);
  if (n > kBinsPayOff)
    find_in_bins(structure, lattice);
  else
    find_directly(structure, lattice);

  const std::size_t candidates = candidate_i_.size();
  i_.resize(candidates);
  j_.resize(candidates);
  d_.resize(3 * candidates);
  r_.resize(candidates);
  reference_.assign(structure.positions, structure.positions + 3 * n);
  std::memcpy(cell_, structure.cell, sizeof(cell_));
  std::memcpy(pbc_, structure.pbc, sizeof(pbc_));
  ++rebuilds_;
  built_ = true;
}

void NeighborList::add_candidate(std::size_t i, std::size_t j, const double* shift) {
  candidate_i_.push_back(static_cast<std::int32_t>(i));
  candidate_j_.push_back(static_cast<std::int32_t>(j));
  candidate_shift_.insert(candidate_shift_.end(), shift, shift + 3);
}

namespace {

bool within(const double* a, const double* b, const double* shift, double limit) {
  const double dx = (b[0] - a[0]) + shift[0], dy = (b[1] - a[1]) + shift[1], dz = (b[2] - a[2]) + shift[2];
  return dx * dx + dy * dy + dz * dz <= limit;
}

}  // namespace

// Every pair of atoms, and of its images those between the planes that the reach can touch.
void NeighborList::find_directly(const StructureView& structure, const Lattice& lattice) {
  const double reach = cutoff_ + skin_, limit = reach * reach * (1 + kSlack);
  for (std::size_t i = 0; i < structure.n; ++i) {
    for (std::size_t j = i; j < structure.n; ++j) {
      if (both_still(i, j)) continue;
      std::int64_t low[3] = {0, 0, 0}, high[3] = {0, 0, 0};
      for (int a = 0; a < 3; ++a) {
        if (!lattice.periodic[a]) continue;
        const double offset = fractional_[3 * i + a] - fractional_[3 * j + a];
        const double range = reach / lattice.height[a] + kSlack;
        low[a] = static_cast<std::int64_t>(std::ceil(offset - range));
        high[a] = static_cast<std::int64_t>(std::floor(offset + range));
      }
      Image image;
      for (image.n[0] = low[0]; image.n[0] <= high[0]; ++image.n[0])
        for (image.n[1] = low[1]; image.n[1] <= high[1]; ++image.n[1])
          for (image.n[2] = low[2]; image.n[2] <= high[2]; ++image.n[2]) {
            if (i == j && !(Image{{0, 0, 0}} < image)) continue;  // an atom and its images: half of them
            double shift[3];
            lattice.shift(image, shift);
            if (within(structure.positions + 3 * i, structure.positions + 3 * j, shift, limit))
              add_candidate(i, j, shift);
          }
    }
  }
}

// Atoms are wrapped into the cell and sorted into bins at least as high as the reach where there is room for more than
// one; what atom i finds in the bins around it is put in the order of the direct search.
void NeighborList::find_in_bins(const StructureView& structure, const Lattice& lattice) {
  const double reach = cutoff_ + skin_, limit = reach * reach * (1 + kSlack);
  const std::size_t n = structure.n;
  const std::int64_t most = 1 + 2 * static_cast<std::int64_t>(std::ceil(std::cbrt(static_cast<double>(n))));
  std::int64_t bins[3], around[3];
  double low[3] = {0, 0, 0}, scale[3];
  for (int a = 0; a < 3; ++a) {
    double extent = lattice.height[a];
    if (!lattice.periodic[a]) {
      double high = fractional_[a];
      low[a] = high;
      for (std::size_t i = 0; i < n; ++i) {
        low[a] = std::min(low[a], fractional_[3 * i + a]);
        high = std::max(high, fractional_[3 * i + a]);
      }
      extent = high - low[a];  // the vectors of open directions have length 1
    }
    bins[a] = static_cast<std::int64_t>(std::clamp(std::floor(extent / (reach * (1 + kSlack))), 1.0, double(most)));
    scale[a] =
        lattice.periodic[a] ? static_cast<double>(bins[a]) : (extent > 0 ? static_cast<double>(bins[a]) / extent : 0.0);
    around[a] = lattice.periodic[a] ? static_cast<std::int64_t>(std::ceil(reach * scale[a] / extent + kSlack))
                                    : (bins[a] > 1 ? 1 : 0);
  }
  // counting sort of the atoms by bin; wraps: the images by which atoms lie outside the cell
  std::vector<Image> wraps(n), place(n);
  std::vector<std::int32_t> first(static_cast<std::size_t>(bins[0] * bins[1] * bins[2]) + 1, 0), members(n);
  const auto bin_of = [&](const Image& p) {
    return static_cast<std::size_t>((p.n[0] * bins[1] + p.n[1]) * bins[2] + p.n[2]);
  };
  for (std::size_t i = 0; i < n; ++i) {
    for (int a = 0; a < 3; ++a) {
      const double f = fractional_[3 * i + a] - low[a];
      const double wrap = lattice.periodic[a] ? std::floor(f) : 0.0;
      wraps[i].n[a] = static_cast<std::int64_t>(wrap);
      place[i].n[a] = std::clamp<std::int64_t>(static_cast<std::int64_t>((f - wrap) * scale[a]), 0, bins[a] - 1);
    }
    ++first[bin_of(place[i]) + 1];
  }
  for (std::size_t b = 1; b < first.size(); ++b) first[b] += first[b - 1];
  std::vector<std::int32_t> next(first.begin(), first.end() - 1);
  for (std::size_t i = 0; i < n; ++i) members[next[bin_of(place[i])]++] = static_cast<std::int32_t>(i);

  struct Found {
    std::int32_t j;
    Image image;
    double shift[3];
  };
  std::vector<Found> found;
  // bin t along direction a, out of the cell or not: its place in the cell and the image that brings it there
  const auto fold = [&](std::int64_t t, int a, std::int64_t& inside, std::int64_t& image) {
    image = t >= 0 ? t / bins[a] : -((bins[a] - 1 - t) / bins[a]);
    inside = t - image * bins[a];
    return lattice.periodic[a] || image == 0;
  };
  for (std::size_t i = 0; i < n; ++i) {
    found.clear();
    Image bin, cell_image;
    for (std::int64_t p = -around[0]; p <= around[0]; ++p) {
      if (!fold(place[i].n[0] + p, 0, bin.n[0], cell_image.n[0])) continue;
      for (std::int64_t q = -around[1]; q <= around[1]; ++q) {
        if (!fold(place[i].n[1] + q, 1, bin.n[1], cell_image.n[1])) continue;
        for (std::int64_t s = -around[2]; s <= around[2]; ++s) {
          if (!fold(place[i].n[2] + s, 2, bin.n[2], cell_image.n[2])) continue;
          const std::size_t b = bin_of(bin);
          for (std::int32_t k = first[b]; k < first[b + 1]; ++k) {
            const std::int32_t j = members[k];
            if (static_cast<std::size_t>(j) < i || both_still(i, static_cast<std::size_t>(j))) continue;
            Found one;
            one.j = j;
            for (int a = 0; a < 3; ++a) one.image.n[a] = cell_image.n[a] - wraps[j].n[a] + wraps[i].n[a];
            if (static_cast<std::size_t>(j) == i && !(Image{{0, 0, 0}} < one.image)) continue;
            lattice.shift(one.image, one.shift);
            if (within(structure.positions + 3 * i, structure.positions + 3 * j, one.shift, limit))
              found.push_back(one);
          }
        }
      }
    }
    std::sort(found.begin(), found.end(),
              [](const Found& a, const Found& b) { return a.j != b.j ? a.j < b.j : a.image < b.image; });
    for (const Found& one : found) add_candidate(i, static_cast<std::size_t>(one.j), one.shift);
  }
}

}  // namespace thalweg
