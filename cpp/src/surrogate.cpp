#include "thalweg/surrogate.hpp"

#include <algorithm>
#include <cmath>
#include <exception>
#include <limits>
#include <string>

#include "gpr_tile.hpp"

namespace thalweg {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr std::size_t kLargestTile = 8;

// False if the structure has no features: atoms on one point, coordinates that are not finite.
bool features_of(const Fingerprint& fingerprint, const StructureView& structure, double* features,
                 Fingerprint::Workspace& workspace) {
  for (std::size_t k = 0; k < 3 * structure.n; ++k)
    if (!(std::abs(structure.positions[k]) <= 1e9)) return false;
  try {
    fingerprint.values(structure, features, workspace);
  } catch (const Error&) {  // what does not depend on the positions was checked before
    return false;
  }
  return true;
}

// Scratch of one thread: one tile of the GP and one feature vector.
struct TileScratch {
  explicit TileScratch(const Gpr& gpr) : tile(gpr), vector(gpr.features()) {}

  // Lanes without a structure repeat the first one.
  void pad(std::size_t used, int lanes) {
    const std::size_t width = static_cast<std::size_t>(lanes);
    double* features = tile.features();
    for (std::size_t d = 0; d < vector.size(); ++d)
      for (std::size_t lane = used; lane < width; ++lane) features[d * width + lane] = features[d * width];
  }
  const double* column(const double* values, std::size_t lane, int lanes) {
    for (std::size_t d = 0; d < vector.size(); ++d) vector[d] = values[d * static_cast<std::size_t>(lanes) + lane];
    return vector.data();
  }

  GprTile tile;
  std::vector<double> vector;
};

std::vector<double> offsets_of(const BatchView& batch, const std::vector<std::pair<std::int32_t, double>>& energies) {
  std::vector<double> out(batch.size(), 0.0);
  if (energies.empty()) return out;
  for (std::size_t row = 0; row < batch.size(); ++row) {
    const StructureView structure = batch[row];
    for (const auto& [number, energy] : energies)
      out[row] += energy * static_cast<double>(std::count(structure.numbers, structure.numbers + structure.n, number));
  }
  return out;
}

void check_structures(const Fingerprint& fingerprint, const BatchView& batch) {
  batch.check();
  for (std::size_t row = 0; row < batch.size(); ++row) {
    try {
      fingerprint.check(batch[row]);
    } catch (const Error& error) {
      throw Error("structure " + std::to_string(row) + " of the batch: " + error.what());
    }
  }
}

}  // namespace

class SurrogateEvaluator : public Evaluator {
 public:
  SurrogateEvaluator(const Surrogate& surrogate, const BatchView& batch, ForcesOn on)
      : fingerprint_(surrogate.fingerprint_),
        gpr_(surrogate.gpr_),
        prior_(surrogate.prior_ ? surrogate.prior_->evaluator(batch, on) : nullptr),
        kappa_(surrogate.kappa_),
        on_(on),
        batch_(batch),
        offsets_(offsets_of(batch, surrogate.atom_energies_)),
        workspaces_(batch.size()),
        scratch_(*gpr_) {}

  void evaluate(std::span<const std::int64_t> rows, const double* positions, double* energies,
                double* forces) override {
    if (prior_) prior_->evaluate(rows, positions, energies, forces);
    for (std::size_t first = 0; first < rows.size();) {
      const int lanes = GprTile::lanes_for(rows.size() - first);
      const std::size_t count = std::min(static_cast<std::size_t>(lanes), rows.size() - first);
      evaluate_tile(rows.subspan(first, count), lanes, positions, energies, forces);
      first += count;
    }
  }

 private:
  void evaluate_tile(std::span<const std::int64_t> rows, int lanes, const double* positions, double* energies,
                     double* forces) {
    bool has_features[kLargestTile];
    for (std::size_t lane = 0; lane < rows.size(); ++lane) {
      const std::size_t row = static_cast<std::size_t>(rows[lane]);
      StructureView structure = batch_[row];
      structure.positions = positions + 3 * batch_.offsets[row];
      if (!workspaces_[row])
        workspaces_[row] = std::make_unique<Fingerprint::Workspace>(*fingerprint_, on_ == ForcesOn::moving);
      has_features[lane] = features_of(*fingerprint_, structure, scratch_.vector.data(), *workspaces_[row]);
      if (!has_features[lane]) std::fill(scratch_.vector.begin(), scratch_.vector.end(), 0.0);
      scratch_.tile.set_features(lane, lanes, scratch_.vector.data());
    }
    scratch_.pad(rows.size(), lanes);
    scratch_.tile.predict(*gpr_, lanes, kappa_, {kappa_ != 0, true, false});
    for (std::size_t lane = 0; lane < rows.size(); ++lane) {
      const std::size_t row = static_cast<std::size_t>(rows[lane]), n = batch_[row].n;
      double* f = forces + 3 * batch_.offsets[row];
      if (!has_features[lane]) {
        energies[row] = kNaN;
        std::fill_n(f, 3 * n, kNaN);
        continue;
      }
      double energy = scratch_.tile.mean()[lane] + offsets_[row];
      if (kappa_ != 0) energy -= kappa_ * scratch_.tile.sigma()[lane];
      if (prior_) {
        energy += energies[row];
      } else {
        std::fill_n(f, 3 * n, 0.0);
      }
      energies[row] = energy;
      fingerprint_->contract(scratch_.column(scratch_.tile.gradient(), lane, lanes), -1.0, f, *workspaces_[row]);
    }
  }

  std::shared_ptr<const Fingerprint> fingerprint_;
  std::shared_ptr<const Gpr> gpr_;
  std::unique_ptr<Evaluator> prior_;
  double kappa_;
  ForcesOn on_;
  BatchView batch_;
  std::vector<double> offsets_;                                      // (n) sums of atom energies
  std::vector<std::unique_ptr<Fingerprint::Workspace>> workspaces_;  // (n), made when a row is first asked for
  TileScratch scratch_;
};

Surrogate::Surrogate(std::shared_ptr<const Fingerprint> fingerprint, std::shared_ptr<const Gpr> gpr,
                     std::shared_ptr<const Landscape> prior, std::vector<std::pair<std::int32_t, double>> atom_energies,
                     double kappa)
    : fingerprint_(std::move(fingerprint)),
      gpr_(std::move(gpr)),
      prior_(std::move(prior)),
      atom_energies_(std::move(atom_energies)),
      kappa_(kappa) {
  if (!fingerprint_ || !gpr_) throw Error("a surrogate needs a fingerprint and a GP, but one of them is missing");
  if (fingerprint_->size() != gpr_->features())
    throw Error("the fingerprint has " + std::to_string(fingerprint_->size()) + " features, but the GP was made for " +
                std::to_string(gpr_->features()));
  if (gpr_->size() == 0) throw Error("a surrogate needs a GP with data; call fit first");
  if (!std::isfinite(kappa)) throw Error("kappa must be finite, but it is " + std::to_string(kappa));
}

std::unique_ptr<Evaluator> Surrogate::evaluator(const BatchView& batch, ForcesOn on) const {
  check_structures(*fingerprint_, batch);
  return std::make_unique<SurrogateEvaluator>(*this, batch, on);
}

void Surrogate::predict(const BatchView& batch, std::span<double> energies, std::span<double> sigmas,
                        std::span<double> forces, std::span<double> sigma_forces, int threads) const {
  check_structures(*fingerprint_, batch);
  const auto expect = [](const char* name, std::size_t wanted, std::size_t came) {
    if (wanted != came)
      throw Error(std::string(name) + " must hold " + std::to_string(wanted) + " values, but it holds " +
                  std::to_string(came));
  };
  const std::size_t n = batch.size(), coordinates = batch.positions.size();
  expect("energies", n, energies.size());
  expect("sigmas", n, sigmas.size());
  if (!forces.empty()) expect("forces", coordinates, forces.size());
  if (!sigma_forces.empty()) expect("sigma_forces", coordinates, sigma_forces.size());
  if (threads < 0) throw Error("threads must be 0 (choose) or positive, but it is " + std::to_string(threads));
  if (threads == 0) threads = default_threads();
  const std::int64_t tiles = static_cast<std::int64_t>((n + kLargestTile - 1) / kLargestTile);
  // Threads that have less than a millisecond of work together cost more than they save.
  const double points = static_cast<double>(gpr_->rows()), features = static_cast<double>(gpr_->features());
  const double seconds = static_cast<double>(n) * (1e-5 + points * (points + 2 * features) / 2e10);
  threads = seconds < 1e-3 ? 1 : static_cast<int>(std::clamp<std::int64_t>(tiles, 1, threads));

  if (prior_) {
    std::vector<double> own;
    if (forces.empty()) own.resize(coordinates);
    thalweg::evaluate(*prior_, batch, energies, forces.empty() ? std::span<double>(own) : forces, threads);
  } else {
    std::fill(energies.begin(), energies.end(), 0.0);
    std::fill(forces.begin(), forces.end(), 0.0);
  }
  std::fill(sigma_forces.begin(), sigma_forces.end(), 0.0);
  const std::vector<double> offsets = offsets_of(batch, atom_energies_);

  const auto predict_tile = [&](std::size_t first, TileScratch& scratch,
                                std::vector<Fingerprint::Workspace>& workspaces) {
    const int lanes = GprTile::lanes_for(n - first);
    const std::size_t count = std::min(static_cast<std::size_t>(lanes), n - first);
    bool has_features[kLargestTile];
    for (std::size_t lane = 0; lane < count; ++lane) {
      has_features[lane] = features_of(*fingerprint_, batch[first + lane], scratch.vector.data(), workspaces[lane]);
      if (!has_features[lane]) std::fill(scratch.vector.begin(), scratch.vector.end(), 0.0);
      scratch.tile.set_features(lane, lanes, scratch.vector.data());
    }
    scratch.pad(count, lanes);
    scratch.tile.predict(*gpr_, lanes, 0.0, {true, !forces.empty(), !sigma_forces.empty()});
    for (std::size_t lane = 0; lane < count; ++lane) {
      const std::size_t row = first + lane, begin = static_cast<std::size_t>(3 * batch.offsets[row]);
      const std::size_t size = 3 * batch[row].n;
      if (!has_features[lane]) {
        energies[row] = sigmas[row] = kNaN;
        if (!forces.empty()) std::fill_n(forces.begin() + static_cast<std::ptrdiff_t>(begin), size, kNaN);
        if (!sigma_forces.empty()) std::fill_n(sigma_forces.begin() + static_cast<std::ptrdiff_t>(begin), size, kNaN);
        continue;
      }
      energies[row] += scratch.tile.mean()[lane] + offsets[row];
      sigmas[row] = scratch.tile.sigma()[lane];
      if (!forces.empty())
        fingerprint_->contract(scratch.column(scratch.tile.gradient(), lane, lanes), -1.0, forces.data() + begin,
                               workspaces[lane]);
      if (!sigma_forces.empty())
        fingerprint_->contract(scratch.column(scratch.tile.gradient_sigma(), lane, lanes), -1.0,
                               sigma_forces.data() + begin, workspaces[lane]);
    }
  };

  std::exception_ptr failure;
  // A tile is the unit of work: who shares one does not matter to the bits.
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::unique_ptr<TileScratch> scratch;
    std::vector<Fingerprint::Workspace> workspaces;
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t t = 0; t < tiles; ++t) {
      try {
        if (!scratch) {
          scratch = std::make_unique<TileScratch>(*gpr_);
          for (std::size_t lane = 0; lane < kLargestTile; ++lane) workspaces.emplace_back(*fingerprint_);
        }
        predict_tile(kLargestTile * static_cast<std::size_t>(t), *scratch, workspaces);
      } catch (...) {
#pragma omp critical(thalweg_surrogate_predict)
        if (!failure) failure = std::current_exception();
      }
    }
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace thalweg
