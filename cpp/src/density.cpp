#include "thalweg/density.hpp"

#include <algorithm>
#include <cmath>
#include <string>

#include "potentials_kernels.hpp"

namespace thalweg {
namespace {

constexpr double kPi = 3.14159265358979323846;
constexpr double kOnOnePoint = 1e-6;  // angstrom

void expect_length(const char* name, double value) {
  if (!(value > 0) || !std::isfinite(value))
    throw Error(std::string("local density: ") + name + " must be a length above 0 in angstrom, but it is " +
                std::to_string(value));
}

}  // namespace

LocalDensity::LocalDensity(const DensitySettings& settings, std::span<const std::int32_t> species)
    : settings_(settings), species_(species.begin(), species.end()) {
  expect_length("decay", settings.decay);
  expect_length("cutoff", settings.cutoff);
  std::sort(species_.begin(), species_.end());
  species_.erase(std::unique(species_.begin(), species_.end()), species_.end());
  if (species_.empty()) throw Error("a local density needs at least one species, but none came");
  if (species_.front() < 1 || species_.back() > 118)
    throw Error("atomic numbers must be between 1 and 118, but one is " +
                std::to_string(species_.front() < 1 ? species_.front() : species_.back()));
}

std::size_t LocalDensity::species_index(std::int32_t number) const {
  const auto found = std::lower_bound(species_.begin(), species_.end(), number);
  if (found == species_.end() || *found != number)
    throw Error("this local density was not made for atomic number " + std::to_string(number) +
                "; name all species when you make one");
  return static_cast<std::size_t>(found - species_.begin());
}

void LocalDensity::check(const StructureView& structure) const {
  for (std::size_t i = 0; i < structure.n; ++i) (void)species_index(structure.numbers[i]);
  NeighborList(settings_.cutoff).check_cell(structure);
}

void LocalDensity::values(const StructureView& structure, double* features, Workspace& workspace, int) const {
  Workspace& w = workspace;
  w.ready_ = false;
  w.n_ = structure.n;
  w.species_.resize(w.n_);
  const std::size_t D = size();
  std::fill_n(features, w.n_ * D, 0.0);
  for (std::size_t i = 0; i < w.n_; ++i) {
    w.species_[i] = species_index(structure.numbers[i]);
    features[i * D + D - 1] = structure.numbers[i];
  }
  w.list_.update(structure);
  const std::size_t pairs = w.list_.size();
  const double* r = w.list_.r();
  w.value_.resize(std::max(w.value_.size(), pairs));
  w.slope_.resize(w.value_.size());
  potential_kernels().screened_pairs(pairs, r, 1.0 / settings_.decay, kPi / settings_.cutoff, w.value_.data(),
                                     w.slope_.data());
  for (std::size_t p = 0; p < pairs; ++p) {
    const auto i = static_cast<std::size_t>(w.list_.i()[p]), j = static_cast<std::size_t>(w.list_.j()[p]);
    if (!(r[p] > kOnOnePoint))
      throw Error("atoms " + std::to_string(i) + " and " + std::to_string(j) +
                  " lie on one point, where the local density has no derivative; move them apart");
    features[i * D + w.species_[j]] += w.value_[p];
    features[j * D + w.species_[i]] += w.value_[p];
  }
  w.ready_ = true;
}

void LocalDensity::contract(const double* weights, double scale, double* gradient, Workspace& workspace, int) const {
  const Workspace& w = workspace;
  if (!w.ready_) throw Error("contract() needs values() of the same structure and workspace first");
  const std::size_t D = size(), pairs = w.list_.size();
  const double* d = w.list_.d();
  for (std::size_t p = 0; p < pairs; ++p) {
    const auto i = static_cast<std::size_t>(w.list_.i()[p]), j = static_cast<std::size_t>(w.list_.j()[p]);
    const double pull = scale * w.slope_[p] * (weights[i * D + w.species_[j]] + weights[j * D + w.species_[i]]);
    for (std::size_t axis = 0; axis < 3; ++axis) {
      gradient[3 * i + axis] -= pull * d[3 * p + axis];
      gradient[3 * j + axis] += pull * d[3 * p + axis];
    }
  }
}

void LocalDensity::jacobian(std::size_t center, double* out, Workspace& workspace) const {
  const Workspace& w = workspace;
  if (!w.ready_) throw Error("jacobian() needs values() of the same structure and workspace first");
  if (center >= w.n_)
    throw Error("there are " + std::to_string(w.n_) + " atoms, but number " + std::to_string(center) +
                " was asked for");
  const std::size_t D = size(), pairs = w.list_.size();
  std::fill_n(out, w.n_ * 3 * D, 0.0);
  for (std::size_t p = 0; p < pairs; ++p) {
    const auto i = static_cast<std::size_t>(w.list_.i()[p]), j = static_cast<std::size_t>(w.list_.j()[p]);
    if (i == j || (i != center && j != center)) continue;
    const std::size_t column = w.species_[i == center ? j : i];
    for (std::size_t axis = 0; axis < 3; ++axis) {
      const double part = w.slope_[p] * w.list_.d()[3 * p + axis];
      out[(3 * i + axis) * D + column] -= part;
      out[(3 * j + axis) * D + column] += part;
    }
  }
}

}  // namespace thalweg
