// SOAP power spectrum: what surrounds each atom, in numbers that do not change when the structure is turned
// (Bartok, Kondor, Csanyi, PRB 87, 184115 (2013)), with the radial basis and the values of dscribe's `SOAP(rbf="gto")`
// (Himanen et al., Comput. Phys. Commun. 247, 106949 (2020)). Any mixture of periodic and open directions.
//
//   rho_s(r)  = sum over atoms j of species s, images and the centre itself included, of exp(-|r - r_j|^2 / 2 sigma^2)
//   g_nl(r)   = sum_k beta_l,nk r^l exp(-alpha_kl r^2); alpha_kl: r^l exp(-alpha r^2) has fallen to 1e-3 at a_k, the
//   k-th
//               of n_max points from 1 angstrom to r_cut; beta_l = S_l^-1/2 (Loewdin), S_l the overlaps of the k
//   c_s,nlm   = integral of rho_s g_nl Y_lm around the centre
//             = sum_j R_nl(|r_j|) r_j^l Y_lm(r_j),  R_nl(r) = sum_k b_l,nk exp(-gamma_kl r^2): no quadrature
//   features  = pi sqrt(8 / (2 l + 1)) sum_m c_s,nlm c_s',n'lm
//
// Order of the features of one centre, D = size() numbers:
//   for s <= s' (rising atomic numbers) [ for l = 0 .. l_max [ for n [ for n' (s = s': n' >= n) ] ] ]
//
// Forces never need the Jacobian: from the slope dE/dfeatures follows dE/dc of each centre, and from that, in one pass
// over neighbours that costs about twice what the values do, dE/dr_j.
#pragma once

#include <memory>

#include "thalweg/core.hpp"

namespace thalweg {

struct SoapBasis;  // private to the core: soap_tables.hpp

/// Neighbours count up to reach() = r_cut + sigma sqrt(2 ln 1000), where their Gaussians have faded at r_cut.
enum class SoapCutoff {
  smooth,  // those beyond r_cut count with a weight that falls to zero at reach() with two continuous derivatives
  hard     // all count fully and jump at reach(): the values of dscribe
};

/// What a structure's features are: those of every atom (n, D), or one row, their mean or sum.
enum class SoapAverage { off, mean, sum };

struct SoapSettings {
  double r_cut = 6.0;  // angstrom, above 1
  int n_max = 6;       // 1 .. 16
  int l_max = 4;       // 0 .. 12
  double sigma = 0.5;  // angstrom
  SoapCutoff cutoff = SoapCutoff::smooth;
  SoapAverage average = SoapAverage::off;
};

/// Immutable settings and tables; share it between threads, give each thread its own Workspace.
class Soap {
 public:
  /// species: atomic numbers that may occur, in any order. Throws Error on senseless settings, and where n_max
  /// functions are too alike within r_cut to be told apart in double precision.
  Soap(const SoapSettings& settings, std::span<const std::int32_t> species);
  ~Soap();

  std::size_t size() const;                       // D
  std::size_t rows(std::size_t atoms) const;      // of a structure's features: atoms, or 1
  std::span<const std::int32_t> species() const;  // rising
  const SoapSettings& settings() const;
  double reach() const;  // angstrom

  /// Neighbour list, coefficients of the last values() and scratch. Serves the descriptor that made it, as long
  /// as it lives.
  class Workspace {
   public:
    explicit Workspace(const Soap& soap);
    ~Workspace();
    Workspace(Workspace&&) noexcept;
    struct State;
    std::unique_ptr<State> state;
  };
  /// A workspace that was given back, or a new one: a warm one keeps its neighbour list. Thread-safe.
  Workspace borrow() const;
  void give_back(Workspace&& workspace) const;

  /// Throws Error if values() could not take the structure wherever its atoms are.
  void check(const StructureView& structure) const;
  /// features: (rows(n), D). threads share out the centres; the bits do not depend on them. Throws Error on a species
  /// that is not covered, a cell that cannot be used, or positions that are not finite.
  void values(const StructureView& structure, double* features, Workspace& workspace, int threads = 1) const;
  /// Adds scale * d(weights . features)/dx to gradient (n, 3), at the positions of the last values() of this workspace.
  /// weights: (rows(n), D).
  void contract(const double* weights, double scale, double* gradient, Workspace& workspace, int threads = 1) const;
  /// out: (n, 3, D), d(features of one centre)/dx of every atom, at the positions of the last values(); average does
  /// not matter here.
  void jacobian(std::size_t center, double* out, Workspace& workspace) const;

  struct Layout;  // defined in soap.cpp

 private:
  friend const SoapBasis& soap_basis(const Soap& soap);
  std::unique_ptr<const Layout> layout_;
};

}  // namespace thalweg
