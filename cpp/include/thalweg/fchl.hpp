// FCHL19: how many neighbours of each species an atom has at which distance, and which triangles they make with it
// (Christensen, Bratholm, Faber, von Lilienfeld, J. Chem. Phys. 152, 044107 (2020)), with the values of qmllib's
// `generate_fchl19` where nothing is periodic. Any mixture of periodic and open directions.
//
//   pairs     sum over j of s of  g(r_ij) r_ij^-n2 LogNormal_k(r_ij),        LogNormal_k(r) = exp(-(ln R_k - mu)^2 /
//             2 v) / (R_k sqrt(2 pi v)),  v = ln(1 + eta2 / r^2), mu = ln r - v / 2;   R_k = k r_c / n, k = 1 .. n
//   triplets  sum over j of s, k of t, each {j, k} once, of
//             g(r_ij) g(r_ik) xi_ijk exp(-eta3 ((r_ij + r_ik) / 2 - R_l)^2) 2 exp(-(zeta o)^2 / 2) [cos | sin](o theta)
//             xi_ijk = w (eta3 / pi)^1/2 (1 + 3 cos theta_i cos theta_j cos theta_k) (r_ij r_ik r_jk)^-n3
//             theta = theta_i the angle at i, o = 1, 3, .. 2 n_fourier - 1
//   g(r)      1/2 (cos(pi r / cutoff) + 1) below the cutoff, 0 beyond; r_jk has none
//
// Images count as neighbours, those of the atom itself, too. Order of the features of one atom, D = size() numbers:
//   for s [ for k ]; then for s <= t (rising atomic numbers) [ for l [ for o [ cos, sin ] ] ]
//
// sin(o theta) has a cone where three atoms are on a line: it has no derivative there. Within 1e-6 of a line that of
// the angle counts as zero, the mean over all directions. Elsewhere first derivatives are exact and continuous; second
// ones jump at the cutoffs.
#pragma once

#include <memory>

#include "thalweg/core.hpp"

namespace thalweg {

struct Fchl19Settings {
  double cutoff_pairs = 8.0, cutoff_triplets = 8.0;  // r_c, angstrom
  int n_pairs = 24;                                  // of the R_k: 1 .. 128
  int n_triplets = 20;                               // of the R_l: 1 .. 128
  int n_fourier = 1;                                 // 1 .. 8
  double eta_pairs = 0.32;                           // eta2, angstrom^2
  double eta_triplets = 2.7;                         // eta3, 1/angstrom^2
  double zeta = 3.14159265358979323846;              // radian
  double decay_pairs = 1.8, decay_triplets = 0.57;   // n2, n3
  double weight_triplets = 13.4;                     // w
};

/// Immutable settings and tables; share it between threads, give each thread its own Workspace.
class Fchl19 {
 public:
  /// species: atomic numbers that may occur, in any order. Throws Error on senseless settings.
  Fchl19(const Fchl19Settings& settings, std::span<const std::int32_t> species);
  ~Fchl19();

  std::size_t size() const;                                    // D
  std::size_t rows(std::size_t atoms) const { return atoms; }  // of a structure's features
  std::span<const std::int32_t> species() const;               // rising
  const Fchl19Settings& settings() const;

  /// Neighbour list of the last values() and scratch. Serves the descriptor that made it, as long as it lives.
  class Workspace {
   public:
    explicit Workspace(const Fchl19& fchl);
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
  /// features: (n, D). threads share out the atoms; the bits do not depend on them. Throws Error on a species that is
  /// not covered, a cell that cannot be used, positions that are not finite or two atoms on one point.
  void values(const StructureView& structure, double* features, Workspace& workspace, int threads = 1) const;
  /// Adds scale * d(weights . features)/dx to gradient (n, 3), at the positions of the last values() of this workspace.
  /// weights: (n, D).
  void contract(const double* weights, double scale, double* gradient, Workspace& workspace, int threads = 1) const;
  /// out: (n, 3, D), d(features of one atom)/dx of every atom, at the positions of the last values().
  void jacobian(std::size_t center, double* out, Workspace& workspace) const;

  struct Layout;  // defined in fchl.cpp

 private:
  std::unique_ptr<const Layout> layout_;
};

}  // namespace thalweg
