// Building structures: random placement in a bond-length window, rattling, permutation. Every structure draws from its
// own stream (key, row): batches can grow, and be split between threads, without changing a structure.
#pragma once

#include <vector>

#include "thalweg/core.hpp"
#include "thalweg/random.hpp"
#include "thalweg/relax.hpp"  // Confinement

namespace thalweg {

/// Where and how atoms may be placed.
struct BuildSettings {
  double c1 = 0.75, c2 = 1.25;  // bond-length window in units of the sum of covalent radii
  int tries_per_atom = 100;
  int tries_per_structure = 20;  // fresh starts of one row before it is given up
  Confinement box;               // atoms are placed inside; must be active
};

struct BuildResult {
  std::vector<double> positions;   // (n, atoms, 3); rows that failed hold the template / parent positions
  std::vector<std::uint8_t> ok;    // (n)
};

/// `count` structures: the template (may have 0 atoms; its cell and pbc are the structure's) plus `placed` atoms in a
/// random order of placement: the first anywhere in the box (or, on a template, next to it), each next one on a uniform
/// direction at a distance uniform in volume between c1 and c2 times the covalent sum from a random atom present, inside
/// the box, no atom (images included) closer than c1. Positions come back in the order template, placed.
/// Throws Error if the box is too small to hold the atoms (volume of spheres of radius c1 R beyond the box's volume) or
/// the template overlaps itself.
BuildResult random_structures(const StructureView& frame, std::span<const std::int32_t> placed,
                              const BuildSettings& settings, std::size_t count, Key key, std::uint64_t first_row,
                              int threads = 0);

/// Rattle: of each parent's free atoms each moves with probability `moved` / n (at least one) by a vector uniform in a
/// ball of radius `amplitude`, retried until it lies in the box, no atom is closer than c1 and one is within c2.
/// Row i of the result comes from structure i of the batch.
BuildResult rattle(const BatchView& parents, const BuildSettings& settings, double amplitude, double moved, Key key,
                   std::uint64_t first_row, int threads = 0);

/// Permute: swaps the positions of pairs of free atoms of different species; 1 + floor of a geometric number of swaps
/// (each further one with probability `again`). Fails (ok = 0) when there is no such pair.
BuildResult permute(const BatchView& parents, double again, Key key, std::uint64_t first_row, int threads = 0);

}  // namespace thalweg
