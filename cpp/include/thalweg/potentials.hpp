// Built-in potentials and pair priors as landscapes.
#pragma once

#include <vector>

#include "thalweg/landscape.hpp"

namespace thalweg {

/// Effective medium theory (Jacobsen, Stoltze, Norskov, Surf. Sci. 366, 394 (1996)); values of ASE's `EMT()`: Al, Cu,
/// Ag, Au, Ni, Pd, Pt, H, C, N, O.
class Emt : public Landscape {
 public:
  Emt();
  std::unique_ptr<Evaluator> evaluator(const BatchView& batch) const override;
};

/// Lennard-Jones, one species or all alike; values of ASE's `LennardJones(sigma, epsilon, rc, ro, smooth)`:
/// rc = 0 means 3 sigma; not smooth: energy shifted to zero at rc.
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

 private:
  Settings settings_;
};

/// Pair prior of a surrogate, from covalent radii alone; defined for every species with a covalent radius.
class PairPrior : public Landscape {
 public:
  enum class Form {
    repulsive,  // 1/2 sum 1 / (r + 1 - r_min)^12, r_min = 0.7 (R_i + R_j), to zero smoothly at `cutoff` (METHODS 4)
    bonding,    // Morse well per pair: depth (e^{-2a(r-r0)} - 2 e^{-a(r-r0)}), r0 = R_i + R_j, a = stiffness / r0
  };
  struct Settings {
    Form form = Form::bonding;
    double depth = 0.8;            // eV, bonding
    double stiffness = 4.0;        // a r0, bonding
    double radius_scale = 1.0;     // scales every covalent radius
    double cutoff = 0.0;           // angstrom; 0: 3 (repulsive), 2.5 r0 of the largest pair (bonding)
    double repulsive_factor = 0.7; // r_min = repulsive_factor (R_i + R_j)
    bool sharp_cutoff = false;     // repulsive: AGOX's jump at the cutoff (`convention="agox"`)
  };
  explicit PairPrior(const Settings& settings);
  std::unique_ptr<Evaluator> evaluator(const BatchView& batch) const override;
  const Settings& settings() const { return settings_; }

 private:
  Settings settings_;
};

}  // namespace thalweg
