// What surrounds each atom, as numbers: how many neighbours of each species at which distance, and which angles they
// make (two- and three-body symmetry functions; Behler, Parrinello, PRL 98, 146401 (2007); Bartok, Kondor, Csanyi,
// PRB 87, 184115 (2013)). Any mixture of periodic and open directions, any number of species.
//
//   features of one atom, D = size() numbers, row-major (n, D) for a structure:
//     for each species s:               radial_k     = sum_a R_k(r_a),                       k = 0 .. n_radial - 1
//     for each pair of species s <= s': angular_nml  = sum_ab A_n(r_a) A_m(r_b) P_l(cos ab), a of s, b of s', a != b;
//       all (n, m) if s < s', else n <= m with every pair of neighbours counted once; l = 0 .. l_max fastest
//
// R and A are Gaussians times 1/2 (1 + cos(pi r / cutoff)). Angles are never computed: sums of monomials of the unit
// vectors, M_n,abc = sum A_n x^a y^b z^c, give every power of every cosine, so the cost grows with the number of
// neighbours, not with that of their pairs.
#pragma once

#include <memory>
#include <vector>

#include "thalweg/core.hpp"
#include "thalweg/neighbors.hpp"

namespace thalweg {

struct EnvironmentSettings {
  int n_radial = 6, n_angular = 3, l_max = 3;
  double radial_cutoff = 6.0, angular_cutoff = 5.0;  // angstrom; angular <= radial
  // Where the Gaussians begin, as a fraction of the smallest covalent diameter of the species.
  double radial_start = 0.73, angular_start = 0.80;
};

class Environments {
 public:
  /// species: atomic numbers that may occur, in any order. Throws Error for settings outside n_radial 1..16,
  /// n_angular 0..8 (0: no angular part), l_max 0..6 or cutoffs that are not above the start of their Gaussians.
  Environments(const EnvironmentSettings& settings, std::span<const std::int32_t> species);

  std::size_t size() const { return size_; }                          // D
  std::span<const std::int32_t> species() const { return species_; }  // rising
  std::size_t species_index(std::int32_t number) const;               // throws Error for others
  const EnvironmentSettings& settings() const { return settings_; }

  /// Neighbour lists and intermediate sums of one structure; one per thread.
  class Workspace {
   public:
    explicit Workspace(const Environments& environments) : list(environments.settings().radial_cutoff) {}

   private:
    friend class Environments;
    NeighborList list;
    std::size_t n = 0;
    std::vector<double> radial;                   // per pair: R, dR, A, dA
    std::vector<std::size_t> first, fill;         // (n + 1) neighbours of each atom
    std::vector<std::size_t> pair;                // per neighbour
    std::vector<std::int32_t> atom, species;      // per neighbour
    std::vector<double> unit;                     // (neighbours, 3) towards the neighbour
    std::vector<double> monomials;                // (neighbours, monomials)
    std::vector<double> moments;                  // (n, species, n_angular, monomials)
    std::vector<double> weights, turned, slopes;  // scratch of the backward passes
  };

  /// Throws Error if a species is not covered or the cell cannot be used.
  void check(const StructureView& structure) const;
  /// features (n, D). Throws Error for positions that are not finite or two atoms on one point.
  void values(const StructureView& structure, double* features, Workspace& workspace) const;
  /// out (n, 3) += scale * sum_i gradient_i . d features_i / d position, with gradient (n, D); after values().
  void contract(const double* gradient, double scale, double* out, Workspace& workspace) const;

  /// Derivatives of the features of one atom; after values().
  std::size_t neighbors(std::size_t atom, const Workspace& workspace) const {
    return workspace.first[atom + 1] - workspace.first[atom];
  }
  const std::int32_t* neighbor_atoms(std::size_t atom, const Workspace& workspace) const {
    return workspace.atom.data() + workspace.first[atom];
  }
  /// out (neighbours, 3, D): with respect to the position of each neighbour (an image moves its atom); that with
  /// respect to the atom itself is minus their sum.
  void jacobian(std::size_t atom, double* out, Workspace& workspace) const;

 private:
  void radial_functions(double r, double* values) const;
  std::size_t pair_offset(std::size_t s, std::size_t t) const { return angular_offset_[s * species_.size() + t]; }

  struct Monomial {
    int degree, exponent[3];
    std::size_t parent, lowered[3];  // parent: with one factor `axis` fewer
    int axis;
    double multiplicity;  // degree! / (a! b! c!)
  };
  EnvironmentSettings settings_;
  std::vector<std::int32_t> species_;
  std::size_t size_ = 0, stride_ = 0;  // stride_: numbers per pair in Workspace::radial
  double radial_first_ = 0, radial_step_ = 0, angular_first_ = 0, angular_step_ = 0;
  std::vector<std::size_t> angular_offset_;  // (species, species)
  std::vector<Monomial> monomials_;          // by degree
  std::vector<double> legendre_;             // (l_max + 1, l_max + 1): P_l = sum_p legendre_[l][p] x^p
};

}  // namespace thalweg
