// Fingerprint of Oganov and Valle (J. Chem. Phys. 130, 104504 (2009); thesis (2.20)), with the weights of AGOX/GOFEE.
//
//   feature vector = [ radial histogram of each species pair | angular histogram of each species triplet ]
//                      P2 x radial_bins                         P3 x angular_bins
//
// Radial: every ordered pair (a, b, image) with R < cutoff_radial + n_sigma sigma_radial adds
//   1 / (4 pi R^2 bin_width N^2 / V) x (integral over the bin of a normalised Gaussian of width sigma_radial at R).
// Angular: every centre and unordered pair of its neighbours within cutoff_angular adds
//   eta fc(R1) fc(R2) / (N^3 / V) x (integral over the bin of a Gaussian of width sigma_angular at the angle),
//   fc(R) = 1 + gamma (R/Rc)^(gamma + 1) - (gamma + 1) (R/Rc)^gamma.
// N: atoms; V: volume of the cell, for clusters too. Key of a triplet: (centre, sorted pair). Species are sorted by
// atomic number, blocks by key. For k copies of a cell the radial part stays the same, the angular part falls as 1/k.
//
// Two conventions. `agox`: the window of each Gaussian is cut off at +- n_sigma, bin -n reflects to n at angle 0, and a
// block exists only if the stoichiometry can fill it: values equal AGOX's to 1e-10. `smooth` (default): the Gaussian is
// lowered so that it meets zero with zero slope at +- n_sigma (two continuous derivatives, so the analytic forces are
// the derivative of the values everywhere), and bins reflect as -1 to 0 at angle 0, 30 to 29 at pi. (If cutoff_radial
// is no multiple of bin_width, `smooth` takes pairs up to n_sigma sigma_radial past the last bin, not past
// cutoff_radial.) A derivative comes out exact to rounding in both; in `agox` it jumps where the end of a window
// crosses the edge of a bin, by about exp(-n_sigma^2 / 2).
#pragma once

#include <memory>
#include <vector>

#include "thalweg/core.hpp"

namespace thalweg {

struct FingerprintTables;  // private to the core: fingerprint_tables.hpp

enum class FingerprintConvention { smooth, agox };

struct FingerprintSettings {
  double cutoff_radial = 6.0;   // angstrom
  double cutoff_angular = 4.0;  // angstrom
  double bin_width = 0.2;       // angstrom
  int angular_bins = 30;        // over 0..pi
  double sigma_radial = 0.2;    // angstrom
  double sigma_angular = 0.2;   // radian
  double gamma = 2.0;           // at least 1 (0, no cutoff function, in `agox` only)
  double eta = 20.0, n_sigma = 4.0;
  bool angular = true;
  FingerprintConvention convention = FingerprintConvention::smooth;
};

/// Immutable settings, tables and layout; share it between threads, give each thread its own Workspace.
class Fingerprint {
 public:
  /// numbers: atomic numbers of one structure, all atoms, any order. They fix which blocks exist: those that the
  /// counts can fill (periodic: any pair or triplet of present species). Throws Error on senseless settings.
  Fingerprint(const FingerprintSettings& settings, std::span<const std::int32_t> numbers, bool periodic);
  ~Fingerprint();

  std::size_t size() const;  // length of the feature vector
  const FingerprintSettings& settings() const;

  /// Scratch of one thread for one structure that moves: neighbour list, triplet arrays, tables of the last values().
  /// Serves the descriptor that made it, as long as it lives.
  class Workspace {
   public:
    /// skips_still: for relaxations in which most atoms are fixed. What atoms with all coordinates fixed make among
    /// themselves is found once, and contract() leaves their own derivatives incomplete; no jacobian().
    explicit Workspace(const Fingerprint& fingerprint, bool skips_still = false);
    ~Workspace();
    Workspace(Workspace&&) noexcept;
    struct State;
    std::unique_ptr<State> state;
  };

  /// Throws Error on a structure that values() could not take wherever its atoms are: species, counts, pbc, volume.
  void check(const StructureView& structure) const;
  /// A workspace that was given back, or a new one: a warm one spares short calls most of their time. Thread-safe.
  Workspace borrow() const;
  void give_back(Workspace&& workspace) const;

  /// features: (size()). Throws Error on a composition or periodicity that the layout was not made for, a cell without
  /// volume, or two atoms on one point.
  void values(const StructureView& structure, double* features, Workspace& workspace) const;
  /// Adds scale * d(weights . features)/dx to gradient (n, 3), at the positions of the last values() of this
  /// workspace, without forming the Jacobian: one backward pass over pairs and triplets.
  void contract(const double* weights, double scale, double* gradient, Workspace& workspace) const;
  /// jacobian: (n, 3, size()), d features / dx at the positions of the last values() of this workspace.
  void jacobian(double* jacobian, Workspace& workspace) const;

  struct Layout;  // defined in fingerprint.cpp

 private:
  friend FingerprintTables fingerprint_tables(const Fingerprint& fingerprint);
  std::unique_ptr<const Layout> layout_;
};

}  // namespace thalweg
