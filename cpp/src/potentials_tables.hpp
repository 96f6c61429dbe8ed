// Numbers of the built-in potentials for the species of one batch, as the CPU's evaluators use them and as they are
// handed to a CUDA device. Private to the core; plain structs that device code can read.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numbers>
#include <vector>

#include "potentials_kernels.hpp"
#include "thalweg/landscape.hpp"

namespace thalweg {

/// height (1 - r / radius)^3 closer than the radius.
struct EmbeddedWall {
  double radius, height;
};
/// One species of an embedded-atom potential: EMT if exponent is 0, else -e0 density^exponent.
struct EmbeddedAtom {
  double e0, six_v0, kappa, lambda, beta_eta, inverse_12_gamma1;
  double exponent;
};
struct EmbeddedTables {
  double slope, middle;             // of the cutoff function
  std::vector<EmbeddedPair> pairs;  // (types, types)
  std::vector<EmbeddedWall> walls;  // the same, or none
  std::vector<EmbeddedAtom> atoms;  // (types)
};

// Angle and cutoff of a triplet of species (i, j, k); bond of a pair (i, j): from the entry (i, j, j).
struct TersoffTriplet {
  double gamma, h, inverse_d2, c2_by_d2;  // g(x) = gamma (1 + c2_by_d2 u / (1 + u)), u = (h - x)^2 / d^2
  double lambda3;                         // lambda3^m
  bool cubic;
  int window;  // of fc(r_ik)
};
struct TersoffBond {
  double A, lambda1, B, lambda2, beta, n;
  int window;      // of fc(r_ij)
  bool symmetric;  // (j, i) has the same A, lambda1, B, lambda2
};
// fc differs between species as R and D do: each different (R, D) once.
struct TersoffWindow {
  double R, D;
  // sin^2 instead of 1/2 - 1/2 sin: keeps its digits near the end
  void at(double r, double& fc, double& slope) const {
    fc = r < R - D ? 1.0 : 0.0;
    slope = 0.0;
    if (r < R - D || r >= R + D) return;
    const double quarter = 0.25 * std::numbers::pi / D, x = quarter * (R + D - r), s = std::sin(x);
    fc = s * s;
    slope = -2.0 * quarter * s * std::cos(x);
  }
};
struct TersoffTables {
  std::vector<TersoffTriplet> triplets;  // (species i, j, k)
  std::vector<TersoffBond> bonds;        // (species i, j)
  std::vector<TersoffWindow> windows;
};

struct PotentialTables {
  double cutoff = 0;                       // of the whole batch, angstrom
  std::size_t types = 0;                   // species of the batch
  std::vector<std::int32_t> type_of_atom;  // (m)
  // Of these the ones that belong to the potential:
  LennardJonesCoefficients lennard_jones{};
  EmbeddedTables embedded{};
  TersoffTables tersoff;
  std::vector<PriorPair> prior;  // (types, types)
  bool repulsive = false, sharp = false;
};

/// Refuses what landscape.evaluator(batch) refuses.
PotentialTables potential_tables(const Landscape& landscape, const BatchView& batch);

}  // namespace thalweg
