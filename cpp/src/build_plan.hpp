// What random placement decides once for all structures, for another back end. Private to the core.
#pragma once

#include <vector>

#include "thalweg/build.hpp"

namespace thalweg {

/// Plain numbers, as build.cpp works them out (BoxedLattice, RandomPlan).
struct PlacementBox {
  int periodic;                            // translations: basis vectors 0 .. periodic - 1
  double basis[9], inverse[9], height[3];  // rows; rows: fraction k of x is inverse[k] . x; between lattice planes
  double low[3], high[3];                  // range of lattice fractions of the box
  double corner[3], vectors[9];
  bool folds[3];
  Walls walls;
  int flat;                       // direction along which the box is too thin for directions in space, or -1
  double plane_u[3], plane_v[3];  // its plane
  double largest;                 // covalent radius of the placed atoms
};
struct PlacementPlan {
  PlacementBox box;
  std::vector<double> radius;              // of the placed atoms
  std::vector<double> obstacles, anchors;  // x, y, z, radius of each template atom or image
};

/// Throws what random_structures throws.
PlacementPlan placement_plan(const StructureView& frame, std::span<const std::int32_t> placed,
                             const BuildSettings& settings);

}  // namespace thalweg
