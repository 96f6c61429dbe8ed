// A sparse Gaussian process over atomic environments, taught energies and forces:
//   E(x) = sum over atoms of f(q_i),   cov f(q), f(q') = amplitude exp(-|q - q'|^2 / 2 length^2) within a species, else
//   0
// with q the scaled features of environments.hpp. Inducing environments z_1 .. z_M are chosen one by one from the data:
// one is added when its variance given the others exceeds `tolerance` (of the prior's). The rest is the deterministic
// training conditional (Quinonero-Candela, Rasmussen, JMLR 6, 1939 (2005), (20)): with K the unit-amplitude kernel,
//   Phi = K_data,z L^-T (L L^T = K_zz), weighted rows, noise variances nu = noise_scale x those of the settings
//   A = 1 / amplitude + Phi^T Phi / nu
//   mean(x)     = k_x L^-T A^-1 Phi^T y / nu
//   variance(x) = amplitude (k_xx - |L^-1 k_x|^2) + |chol(A)^-1 L^-1 k_x|^2,  k_x = sum over the atoms of x
// In these whitened coordinates A is well conditioned (its eigenvalues are at least 1 / amplitude).
//
//   points_[species]   (m, D) row-major, scaled; order_ says which point is the k-th inducing one
//   factor_            (M, ld) lower L
//   phi_               (rows, ld) Phi, one energy row and one row per force component of each structure, weighted
//   gram_              (M, ld) lower triangle of Phi^T Phi: a structure adds its rows, an inducing point adds a column
//   spread_            (M, M)  L^-T (A^-1 - amplitude) L^-1, so that variance = amplitude k_xx + k_x . spread k_x
// Targets are what a prior and atom energies leave over; the constant per atom that fits the energies best is mean().
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "thalweg/environments.hpp"
#include "thalweg/landscape.hpp"

namespace thalweg {

struct LocalKernel {
  double length = 1.5;       // in units of sqrt(D); features are scaled to a spread of about 1
  double amplitude = 1.0;    // eV^2, of one atom's energy
  double noise_scale = 1.0;  // multiplies both noise variances
};

struct LocalSettings {
  double noise_energy = 0.1;       // eV per structure
  double noise_force = 0.1;        // eV/angstrom per component
  double tolerance = 1e-3;         // of the prior variance: how new an environment must be to become an inducing one
  std::size_t max_inducing = 400;  // fitting raises the tolerance until they suffice; appending just stops there
};

class LocalGpr {
 public:
  LocalGpr(std::shared_ptr<const Environments> environments, const LocalSettings& settings);

  /// Forgets everything and learns these structures with this kernel. energies (n): targets; forces (m, 3): targets, a
  /// component that is not finite or belongs to a fixed coordinate is left out. The scale of the features is taken from
  /// these structures. The same bits for the same input. Throws Error for other species, lengths that disagree,
  /// energies that are not finite and kernels that are not above 0.
  void fit(const BatchView& batch, std::span<const double> energies, std::span<const double> forces,
           const LocalKernel& kernel);
  /// Learns more structures, one by one, with the kernel and the scale as they are; equal to a fit with the same scale.
  void append(const BatchView& batch, std::span<const double> energies, std::span<const double> forces);
  /// Maximises the marginal likelihood over lengths (`factors` times the present one, kept within 0.3 to 12), the ratio
  /// amplitude / noise_scale on a grid (1e-4 .. 1e5, amplitude at most ten times the spread of the energies) and
  /// noise_scale in closed form (kept within 0.1 .. 1000), and fits
  /// with the best. Returns its log likelihood.
  double optimise(std::span<const double> factors);

  std::size_t size() const { return data_.size(); }  // structures
  std::size_t inducing() const { return order_.size(); }
  const Environments& environments() const { return *environments_; }
  const LocalSettings& settings() const { return settings_; }
  const LocalKernel& kernel() const { return kernel_; }
  double tolerance() const { return tolerance_; }  // in use
  double mean() const { return mean_; }            // eV per atom
  double log_likelihood() const { return likelihood_; }
  std::span<const double> scale() const { return scale_; }  // (D)

 private:
  friend class LocalPredictor;
  struct Structure;
  struct Point {
    std::size_t species, index;
  };
  std::shared_ptr<const Structure> structure_of(const StructureView& view, double energy, const double* forces);
  std::vector<std::shared_ptr<const Structure>> structures_of(const BatchView& batch, std::span<const double> energies,
                                                              std::span<const double> forces);
  void set_scale();
  void rebuild();
  void learn(std::shared_ptr<const Structure> structure);
  std::size_t add_points(const Structure& structure);
  void scaled_features(const Structure& structure);
  void kernel_rows(const Structure& structure, std::size_t first_point, double* out, std::size_t ld);
  void add_rows(const Structure& structure);
  void reserve_points(std::size_t points);
  void solve();
  double best_noise(double ratio, double& noise_scale) const;
  double energy_per_atom() const;  // the constant per atom that fits the energies best

  std::shared_ptr<const Environments> environments_;
  LocalSettings settings_;
  LocalKernel kernel_;
  double tolerance_ = 0, mean_ = 0, likelihood_ = 0;
  std::vector<std::shared_ptr<const Structure>> data_;
  std::vector<double> scale_;
  std::vector<std::vector<double>> points_;
  std::vector<std::vector<std::size_t>> place_;  // (species) -> k of each of its points
  std::vector<Point> order_;
  std::size_t ld_ = 0;
  std::vector<double> factor_, phi_, gram_;
  std::vector<double> targets_, atoms_;  // (rows) weighted: energy or force; number of atoms (0 for forces)
  double sum_log_weights_ = 0;
  // after solve(): weights_ (M) by k and by species, spread_ (M, M)
  std::vector<double> weights_, spread_;
  std::vector<std::vector<double>> species_weights_;
  // scratch
  Environments::Workspace workspace_;
  std::vector<double> features_, jacobian_, transposed_, product_, column_;
};

/// The model as a landscape: prior(x) + atom energies + mean - kappa sigma(x). A structure without an energy
/// (coordinates not finite, atoms on one point) gets NaN and leaves the others alone.
class LocalSurrogate : public Landscape {
 public:
  /// prior may be null. atom_energies: (atomic number, eV). Throws Error if the model has no data or kappa is not
  /// finite.
  LocalSurrogate(std::shared_ptr<const LocalGpr> gpr, std::shared_ptr<const Landscape> prior,
                 std::vector<std::pair<std::int32_t, double>> atom_energies, double kappa);

  std::unique_ptr<Evaluator> evaluator(const BatchView& batch, ForcesOn on = ForcesOn::all) const override;

  /// Energies and sigmas (n); if wanted (else empty): sigma of each atom's energy (m), forces and forces of sigma
  /// (m, 3): -d energy/dx, -d sigma/dx. kappa is not applied. sigma is at least 1e-5 sqrt(amplitude): there it is
  /// constant. threads = 0: default_threads(). Same bits for any number of threads.
  void predict(const BatchView& batch, std::span<double> energies, std::span<double> sigmas,
               std::span<double> atom_sigmas, std::span<double> forces, std::span<double> sigma_forces,
               int threads = 0) const;

 private:
  friend class LocalEvaluator;
  std::shared_ptr<const LocalGpr> gpr_;
  std::shared_ptr<const Landscape> prior_;
  std::vector<std::pair<std::int32_t, double>> atom_energies_;
  double kappa_;
};

}  // namespace thalweg
