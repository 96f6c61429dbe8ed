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
// A box vector marked open that is a lattice translation of the structure has no walls: atoms that leave there come
// back on the other side. A vector marked open that is none keeps its walls here.

struct BuildResult {
  std::vector<double> positions;  // (n, atoms, 3); rows that failed hold the template / parent positions
  std::vector<std::uint8_t> ok;   // (n)
};

/// `count` structures: the template (may have 0 atoms; its cell and pbc are the structure's) plus `placed` atoms in a
/// random order of placement: the first anywhere in the box (or, on a template that the box can touch, next to it),
/// each next one on a uniform direction at a distance uniform in volume between c1 and c2 times the covalent sum from a
/// random atom present, inside the box, no atom (images included) closer than c1. Of the template only atoms from which
/// the box can be reached are drawn. In a flat box (thinner than a fifth of the shortest bond) directions are uniform
/// in its plane and distances uniform in area. Positions come back in the order template, placed; the placed atoms of a
/// row that failed lie at the centre of the box. Throws Error if there is no box, if it is too small (spheres of radius
/// c1 R around the placed atoms beyond the volume of the box grown by the largest of these radii, in which they all
/// lie), if a species is closer than c1 to its own image, or if the template overlaps itself (atoms closer than half
/// their covalent sum).
BuildResult random_structures(const StructureView& frame, std::span<const std::int32_t> placed,
                              const BuildSettings& settings, std::size_t count, Key key, std::uint64_t first_row,
                              int threads = 0);

/// Rattle: of each parent's n free atoms each moves with probability `moved` / n (at least one) by a vector uniform in
/// a ball of radius `amplitude` (its part along fixed coordinates dropped), retried until it lies in the box, no atom
/// is closer than c1 and one is within c2. When all have moved each of them must still have one within c2. An atom is
/// free if one of its coordinates is. Row i of the result comes from structure i of the batch; parents may differ in
/// size. Fails (ok = 0) where nothing is free or all tries are used up. Throws Error if there is no box.
BuildResult rattle(const BatchView& parents, const BuildSettings& settings, double amplitude, double moved, Key key,
                   std::uint64_t first_row, int threads = 0);

/// Permute: swaps the positions of pairs of free atoms of different species, all such pairs alike; 1 + a geometric
/// number of swaps (each further one with probability `again`), and one more if those restored the parent. Only atoms
/// without any fixed coordinate take part. Fails (ok = 0) when there is no such pair.
BuildResult permute(const BatchView& parents, double again, Key key, std::uint64_t first_row, int threads = 0);

/// Per structure the smallest distance over the sum of covalent radii (images included, an atom's own as well); pairs
/// of atoms that are both fixed in all coordinates do not count. Infinity where no pair is left. (n)
std::vector<double> closest_contacts(const BatchView& batch, int threads = 0);

/// Per structure the number of pieces that hang together by distances of at most c2 times the covalent sum (images
/// included); atoms fixed in all coordinates count as one piece. (n)
std::vector<std::int32_t> fragments(const BatchView& batch, double c2 = 1.25, int threads = 0);

}  // namespace thalweg
