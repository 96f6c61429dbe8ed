#include <cmath>

#include "neighbors.cuh"

namespace thalweg::cuda {
namespace {

/// energies (+)= mean + offset - kappa sigma; a structure without features is NaN.
__global__ void __launch_bounds__(kThreads)
    combine_energies(std::size_t n, const std::uint8_t* skip, bool has_prior, double kappa, const double* mean,
                     const double* sigma, const double* offsets, double* energies) {
  const std::size_t row = thread_index();
  if (row >= n || (skip != nullptr && skip[row])) return;
  double energy = mean[row] + offsets[row];
  if (kappa != 0) energy -= kappa * sigma[row];
  energies[row] = has_prior ? energies[row] + energy : energy;
}

/// Forces of structures that are evaluated begin at zero.
__global__ void __launch_bounds__(kThreads) clear_forces(Rows rows, double* forces) {
  const unsigned row = blockIdx.x;
  if (rows.skips(row)) return;
  for (std::int64_t k = 3 * rows.offsets[row] + threadIdx.x; k < 3 * rows.offsets[row + 1]; k += kThreads)
    forces[k] = 0;
}

}  // namespace

class SurrogateEvaluator : public Evaluator {
 public:
  SurrogateEvaluator(const Surrogate& surrogate, const BatchView& batch, Stream stream)
      : fingerprint_(surrogate.fingerprint_),
        gpr_(surrogate.gpr_),
        prior_(surrogate.prior_ ? surrogate.prior_->evaluator(batch, stream) : nullptr),
        kappa_(surrogate.kappa_),
        batch_(batch),
        workspace_(*fingerprint_, batch, stream),
        features_(batch.structures * fingerprint_->size()),
        gradient_(batch.structures * fingerprint_->size()),
        mean_(batch.structures),
        sigma_(batch.structures) {
    const HostBatch host(batch, stream);
    std::vector<double> offsets(batch.structures, 0.0);
    for (std::size_t row = 0; row < batch.structures; ++row) {
      const StructureView structure = host.view()[row];
      for (std::size_t i = 0; i < structure.n; ++i)
        for (const auto& [number, energy] : surrogate.atom_energies_)
          if (structure.numbers[i] == number) offsets[row] += energy;
    }
    offsets_ = Array<double>(std::span<const double>(offsets), stream);
    fill_bytes(features_.data(), 0, features_.size() * sizeof(double), stream);  // of rows that are always skipped
    copy_to_host(nullptr, nullptr, 0, stream);
  }

  void evaluate(const double* positions, double* energies, double* forces, const std::uint8_t* skip,
                Stream stream) override {
    if (batch_.structures == 0) return;
    const unsigned blocks = static_cast<unsigned>(batch_.structures);
    if (prior_)
      prior_->evaluate(positions, energies, forces, skip, stream);
    else
      THALWEG_LAUNCH(clear_forces, blocks, kThreads, 0, native(stream), Rows{batch_.offsets, skip}, forces);
    fingerprint_->values(positions, features_.data(), workspace_, skip, stream);
    gpr_->predict(batch_.structures, features_.data(), kappa_, mean_.data(), kappa_ != 0 ? sigma_.data() : nullptr,
                  gradient_.data(), nullptr, stream);
    THALWEG_LAUNCH(combine_energies, blocks_for(batch_.structures), kThreads, 0, native(stream), batch_.structures,
                   skip, prior_ != nullptr, kappa_, mean_.data(), sigma_.data(), offsets_.data(), energies);
    fingerprint_->contract(gradient_.data(), -1.0, forces, workspace_, skip, stream);
    check_launch("a surrogate");
  }

 private:
  std::shared_ptr<const Fingerprint> fingerprint_;
  std::shared_ptr<const Gpr> gpr_;
  std::unique_ptr<Evaluator> prior_;
  double kappa_;
  BatchView batch_;
  Fingerprint::Workspace workspace_;
  Array<double> features_, gradient_, mean_, sigma_, offsets_;
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

std::unique_ptr<Evaluator> Surrogate::evaluator(const BatchView& batch, Stream stream) const {
  return std::make_unique<SurrogateEvaluator>(*this, batch, stream);
}

}  // namespace thalweg::cuda
