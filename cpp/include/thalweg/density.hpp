// Local density feature of each atom (Meldgaard, Kolsbjerg, Hammer, J. Chem. Phys. 149, 134104 (2018); thesis (2.19)):
// how many neighbours of each species there are, near ones counting more.
//
//   f_i = [ rho_i^A | rho_i^B | ... | Z_i ]                        D = species + 1 numbers, species rising
//   rho_i^s = sum over j of s, images included, j not i itself, of exp(-r_ij / lambda) g_c(r_ij)
//   g_c(r)  = 1/2 (cos(pi r / r_c) + 1) for r < r_c, else 0
//
// Any mixture of periodic and open directions. Z_i has no derivative.
#pragma once

#include <memory>
#include <vector>

#include "thalweg/core.hpp"
#include "thalweg/neighbors.hpp"

namespace thalweg {

struct DensitySettings {
  double decay = 1.0;    // lambda, angstrom
  double cutoff = 11.9;  // r_c, angstrom
};

class LocalDensity {
 public:
  /// species: atomic numbers that may occur, in any order. Throws Error on senseless settings.
  LocalDensity(const DensitySettings& settings, std::span<const std::int32_t> species);

  std::size_t size() const { return species_.size() + 1; }            // D
  std::size_t rows(std::size_t atoms) const { return atoms; }         // of a structure's features
  std::span<const std::int32_t> species() const { return species_; }  // rising
  const DensitySettings& settings() const { return settings_; }

  /// Neighbour list and the pairs of the last values(); one per thread.
  class Workspace {
   public:
    /// without_still: atoms that are fixed in all coordinates do not see one another.
    explicit Workspace(const LocalDensity& density, bool without_still = false)
        : list_(density.settings().cutoff, 0.5, without_still) {}

   private:
    friend class LocalDensity;
    NeighborList list_;
    std::size_t n_ = 0;
    bool ready_ = false;
    std::vector<std::size_t> species_;   // (n)
    std::vector<double> value_, slope_;  // (pairs): what a pair adds, and its derivative over r
  };
  Workspace borrow() const { return Workspace(*this); }
  void give_back(Workspace&&) const {}

  /// Throws Error if values() could not take the structure wherever its atoms are.
  void check(const StructureView& structure) const;
  /// features: (n, D). Throws Error on a species that is not covered, a cell that cannot be used, positions that are
  /// not finite or two atoms on one point.
  void values(const StructureView& structure, double* features, Workspace& workspace, int threads = 1) const;
  /// Adds scale * d(weights . features)/dx to gradient (n, 3), after values(). weights: (n, D).
  void contract(const double* weights, double scale, double* gradient, Workspace& workspace, int threads = 1) const;
  /// out: (n, 3, D), d(features of one atom)/dx of every atom, after values().
  void jacobian(std::size_t center, double* out, Workspace& workspace) const;

 private:
  std::size_t species_index(std::int32_t number) const;

  DensitySettings settings_;
  std::vector<std::int32_t> species_;
};

}  // namespace thalweg
