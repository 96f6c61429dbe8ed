// Built-in potentials and pair priors as landscapes. A structure with a position that is not finite (or beyond 1e9
// angstrom) has energy and forces NaN; atoms on top of each other give an energy (Lennard-Jones) or forces that are not
// finite. Neither throws.
#pragma once

#include <vector>

#include "thalweg/landscape.hpp"

namespace thalweg {

/// Effective medium theory (Jacobsen, Stoltze, Norskov, Surf. Sci. 366, 394 (1996)); values of ASE's `EMT()`: Al, Cu,
/// Ag, Au, Ni, Pd, Pt, H, C, N, O. Throws Error for other species.
class Emt : public Landscape {
 public:
  Emt() = default;
  std::unique_ptr<Evaluator> evaluator(const BatchView& batch) const override;
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
  std::unique_ptr<Evaluator> evaluator(const BatchView& batch) const override;
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
  std::unique_ptr<Evaluator> evaluator(const BatchView& batch) const override;
  const Settings& settings() const { return settings_; }

 private:
  Settings settings_;
};

}  // namespace thalweg
