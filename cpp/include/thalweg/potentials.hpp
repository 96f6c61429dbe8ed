// Built-in potentials and pair priors as landscapes. A structure with a position that is not finite (or beyond 1e9
// angstrom) has energy and forces NaN; atoms on top of each other give an energy (Lennard-Jones, Tersoff) or forces
// that are not finite. Neither throws.
#pragma once

#include <array>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "thalweg/landscape.hpp"

namespace thalweg {

/// Effective medium theory (Jacobsen, Stoltze, Norskov, Surf. Sci. 366, 394 (1996)); values of ASE's `EMT()`: Al, Cu,
/// Ag, Au, Ni, Pd, Pt, H, C, N, O. Throws Error for other species.
class Emt : public Landscape {
 public:
  Emt() = default;
  std::unique_ptr<Evaluator> evaluator(const BatchView& batch, ForcesOn on = ForcesOn::all) const override;
};

/// Lennard-Jones, one species or all alike; values of ASE's `LennardJones(sigma, epsilon, rc, ro, smooth)`:
/// rc = 0 means 3 sigma; not smooth: energy shifted to zero at rc; smooth: switched to zero between ro (0: 0.66 rc) and
/// rc. Throws Error unless sigma > 0 and 0 <= ro < rc.
class LennardJones : public Landscape {
 public:
  struct Settings {
    double sigma = 1.0;    // angstrom
    double epsilon = 1.0;  // eV
    double rc = 0.0, ro = 0.0;
    bool smooth = false;
  };
  explicit LennardJones(const Settings& settings);
  std::unique_ptr<Evaluator> evaluator(const BatchView& batch, ForcesOn on = ForcesOn::all) const override;
  const Settings& settings() const { return settings_; }

 private:
  Settings settings_;
};

/// Tersoff's bond-order potential in the general three-species form (J. Tersoff, Phys. Rev. B 37, 6991 (1988); 39, 5566
/// (1989)) and with the numbering of LAMMPS' `pair_style tersoff`. For every ordered pair i, j (images included):
///   E      = 1/2 sum_ij fc(r_ij) [A e^(-lambda1 r_ij) - b_ij B e^(-lambda2 r_ij)]                  numbers of (i, j,
///   j) b_ij   = (1 + (beta zeta_ij)^n)^(-1/2n)                                                        numbers of (i,
///   j, j) zeta_ij = sum_k fc(r_ik) g(cos theta_ijk) e^(lambda3^m (r_ij - r_ik)^m)                         numbers of
///   (i, j, k) g(x)   = gamma (1 + c^2/d^2 - c^2 / (d^2 + (h - x)^2)) fc(r)  = 1 below R - D, 0 above R + D, 1/2 - 1/2
///   sin(pi (r - R) / 2D) between
/// Energy and forces are continuous; the second derivative is not at the ends of fc, and has no bound where the last k
/// leaves with n < 1. Values of ASE's `Tersoff`, and of LAMMPS wherever A, lambda1, R and D of (i, j, j) and (j, i, i)
/// agree, as in every published set: LAMMPS takes the repulsion of a pair from one of the two, chosen by the order of
/// the atoms, and here each gives half. Atoms on one point: energy and forces of that structure are NaN.
class Tersoff : public Landscape {
 public:
  /// In the order of a line of a LAMMPS file.
  struct Entry {
    std::int32_t first = 0, second = 0, third = 0;  // atomic numbers: i, j, k
    double m = 3.0;                                 // 1 or 3
    double gamma = 1.0;
    double lambda3 = 0.0;  // 1/angstrom
    double c = 0.0, d = 1.0, h = 0.0;
    double n = 1.0, beta = 0.0;
    double lambda2 = 0.0, B = 0.0;  // 1/angstrom, eV
    double R = 0.0, D = 0.0;        // angstrom, D <= R
    double lambda1 = 0.0, A = 0.0;  // 1/angstrom, eV
  };
  /// Throws Error if there is no entry, one comes twice, or a number makes no sense.
  explicit Tersoff(std::vector<Entry> entries);
  /// Throws Error when a structure of the batch has species i, j, k without an entry (i, j, k).
  std::unique_ptr<Evaluator> evaluator(const BatchView& batch, ForcesOn on = ForcesOn::all) const override;
  /// In rising order of (i, j, k).
  const std::vector<Entry>& entries() const { return entries_; }

  /// Published sets: names, and the entries of one. Sources stand beside the numbers in potentials.cpp.
  ///   "C"       carbon (Tersoff 1988)
  ///   "C-2010"  carbon, refitted to graphene's phonons (Lindsay, Broido 2010)
  ///   "BN"      boron and nitrogen (Los et al. 2017) without its corrections for coordination, which vanish in hBN,
  ///   cBN "BNC"     boron, nitrogen, carbon (Kinaci et al. 2012): for sheets; B-B and N-N attract down to zero
  ///   distance
  static std::vector<std::string> names();
  static std::vector<Entry> published(const std::string& name);

 private:
  std::vector<Entry> entries_;
};

/// A smooth model of carbon, for statistics and tests of agents that learn from structures far from any minimum: where
/// a bond-order potential is flat or harsh it has a slope. Morse pairs and a term for the angle at each atom with two
/// neighbours,
///   E = sum_{i<j} depth ((1 - e^{-a (r - r0)})^2 - 1) w(r) + sum_i sum_{j<k} angle (cos theta_jik + 1/2)^2 w(r_ij)
///   w(r_ik),
/// w from 1 at `inner` to 0 at `outer` with two continuous derivatives. Threefold coordination with 120 degrees is its
/// ideal; the lowest structures in the plane are those of graphene.
class SmoothCarbon : public Landscape {
 public:
  struct Settings {
    double depth = 3.0, stiffness = 2.0, r0 = 1.45;  // eV, 1/angstrom, angstrom
    double angle = 2.0;                              // eV
    double inner = 1.8, outer = 2.5;                 // angstrom
  };
  /// Throws Error for numbers that make no sense.
  explicit SmoothCarbon(const Settings& settings);
  /// Throws Error where a structure has atoms other than carbon.
  std::unique_ptr<Evaluator> evaluator(const BatchView& batch, ForcesOn on = ForcesOn::all) const override;
  const Settings& settings() const { return settings_; }

 private:
  Settings settings_;
};

/// Pair prior of a surrogate, from covalent radii alone; defined for every species with a covalent radius. Every pair,
/// images included, counts once. Both forms have two continuous derivatives: a quintic switch takes them to zero
/// between
///   bonding    1.6 r0 (at most 0.64 cutoff) and the pair's cutoff: the well itself is untouched
///   repulsive  0.75 cutoff and cutoff; closer than r_min - 0.5 the pole is replaced by a parabola of equal value,
///   slope
///              and curvature, so that the energy always rises as atoms approach
class PairPrior : public Landscape {
 public:
  enum class Form {
    repulsive,  // 1/2 sum 1 / (r + 1 - r_min)^12, r_min = 0.7 (R_i + R_j), to zero smoothly at `cutoff` (METHODS 4)
    bonding,    // Morse well per pair: depth (e^{-2a(r-r0)} - 2 e^{-a(r-r0)}), r0 = R_i + R_j, a = stiffness / r0
  };
  struct Settings {
    Form form = Form::bonding;
    double depth = 0.8;             // eV, bonding
    double stiffness = 4.0;         // a r0, bonding
    double radius_scale = 1.0;      // scales every covalent radius
    double cutoff = 0.0;            // angstrom, of all pairs; 0: 3 (repulsive), 2.5 r0 of each pair (bonding)
    double repulsive_factor = 0.7;  // r_min = repulsive_factor (R_i + R_j)
    bool sharp_cutoff = false;      // repulsive: AGOX's jump at the cutoff and its pole (`convention="agox"`)
  };
  explicit PairPrior(const Settings& settings);
  std::unique_ptr<Evaluator> evaluator(const BatchView& batch, ForcesOn on = ForcesOn::all) const override;
  const Settings& settings() const { return settings_; }

 private:
  Settings settings_;
};

/// Wells whose bonds may weaken each other: pair wells at one end of the family, the second-moment (Gupta,
/// Finnis-Sinclair) form of metals at the other (Cleri, Rosato, PRB 48, 22 (1993)). With x = r_ij / r0 - 1 and q, p =
/// stiffness, ratio q of the pair of species:
///   E = sum_i [ sum_j A e^{-p x} - Z^{1 - g_i} (sum_j (B e^{-q x})^{1 / g_i})^{g_i} ],
///   A = 1/2 depth q / (p - q),  B = 1/2 depth p / (p - q),  Z = kCoordination
/// exponent g = 1: pair wells of that depth at r0 (ratio 2: Morse wells, stiffness = a r0); g = 1/2: square roots of
/// coordination. An atom with Z like neighbours at r0 is in equilibrium and has Z depth / 2 for every g, so that all
/// numbers keep their meaning. A smooth cutoff of 2.2 times the longest r0. Data do not say what happens where atoms
/// are crushed and a search would go and look, so every pair also has a wall, kWallHeight (1 - r / r_w)^3 closer than
/// r_w = kWall covalent sums: 0.4 eV at 0.7 sums, 10 eV at 0.6.
class ManyBodyPrior : public Landscape {
 public:
  static constexpr double kCoordination = 6.0, kWall = 0.75, kWallHeight = 1250.0;  // -, covalent sums, eV
  struct Pair {
    std::int32_t first = 0, second = 0;  // atomic numbers, in any order
    double depth = 0.8;                  // eV, at least 0
    double r0 = 0.0;                     // angstrom
    double stiffness = 4.0;              // q
    double ratio = 2.0;                  // p / q, above 1
  };
  struct Atom {
    std::int32_t number = 0;
    double exponent = 1.0;  // g
  };
  /// Throws Error if a pair or an atom comes twice, an atom of a pair is missing, or a number makes no sense.
  ManyBodyPrior(std::vector<Pair> pairs, std::vector<Atom> atoms);
  /// Throws Error when a structure of the batch has two species without an entry; its own pair counts for each species.
  std::unique_ptr<Evaluator> evaluator(const BatchView& batch, ForcesOn on = ForcesOn::all) const override;
  /// In rising order, first <= second.
  const std::vector<Pair>& pairs() const { return pairs_; }
  const std::vector<Atom>& atoms() const { return atoms_; }

 private:
  std::vector<Pair> pairs_;
  std::vector<Atom> atoms_;
};

/// Tight binding of the valence electrons of free molecules: s and p orbitals, one s orbital on hydrogen, orthogonal,
/// in the form of W. A. Harrison, Elementary Electronic Structure (1999), and a repulsion. Valence, angles and
/// conjugation follow from it, which pair wells do not know. With x = r / r0 - 1 and q, p = stiffness, ratio q of the
/// pair of species:
///   H_ij = V e^{-q x},  E = 2 sum_k f_k e_k - T S + sum_pairs A e^{-p x},
/// V the couplings in bonds (ss sigma, sp sigma, pp sigma, pp pi); both go smoothly to 0 between 1.3 and 2.1 r0. The
/// levels are filled at kT = 0.2 eV, so that energies are smooth where they cross. The wall of ManyBodyPrior is added.
class TightBinding : public Landscape {
 public:
  struct Pair {
    std::int32_t first = 0, second = 0;                        // atomic numbers, in any order
    std::array<double, 4> couplings = {-4.4, 4.7, 7.3, -2.1};  // V at r0 [eV]
    double r0 = 0.0;                                           // angstrom
    double stiffness = 2.0;                                    // q
    double repulsion = 6.0;                                    // A [eV]
    double ratio = 2.0;                                        // p / q
  };
  struct Atom {
    std::int32_t number = 0;
    double s = 0.0, p = 0.0;  // levels [eV]; hydrogen has the first alone
  };
  /// Throws Error if a pair or an atom comes twice, an atom of a pair is missing, an element is not covered, or a
  /// number makes no sense.
  TightBinding(std::vector<Pair> pairs, std::vector<Atom> atoms);
  /// Throws Error for periodic structures and where two species have no entry.
  std::unique_ptr<Evaluator> evaluator(const BatchView& batch, ForcesOn on = ForcesOn::all) const override;
  /// In rising order, first <= second.
  const std::vector<Pair>& pairs() const { return pairs_; }
  const std::vector<Atom>& atoms() const { return atoms_; }
  /// The levels of a free atom (Hartree-Fock term values, Harrison 1999): of H, B to F, Al to Cl. Throws Error for
  /// others.
  static Atom free_atom(std::int32_t number);
  /// H, B, C, N, O, F, Si, P, S, Cl.
  static std::vector<std::int32_t> elements();

 private:
  std::vector<Pair> pairs_;
  std::vector<Atom> atoms_;
};

/// Another landscape plus a linear function of the positions, shift . x: what makes the forces of a surrogate right at
/// one point. For batches whose atoms are those of `shift` (m, 3) [eV/angstrom], in order.
class Tilted : public Landscape {
 public:
  /// Throws Error if there is no landscape or a shift is not finite.
  Tilted(std::shared_ptr<const Landscape> landscape, std::vector<double> shift);
  /// Throws Error for a batch with another number of atoms.
  std::unique_ptr<Evaluator> evaluator(const BatchView& batch, ForcesOn on = ForcesOn::all) const override;

 private:
  std::shared_ptr<const Landscape> landscape_;
  std::vector<double> shift_;
};

}  // namespace thalweg
