// Relaxes a random cluster of 13 Lennard-Jones atoms and prints its energy (the icosahedron has -44.3268 epsilon).
#include <cmath>
#include <cstdio>
#include <vector>

#include "thalweg/build.hpp"
#include "thalweg/potentials.hpp"
#include "thalweg/relax.hpp"

int main() {
  using namespace thalweg;
  const std::vector<std::int32_t> argon(13, 18);
  const std::vector<double> cell = {30, 0, 0, 0, 30, 0, 0, 0, 30};
  const std::vector<std::uint8_t> pbc = {0, 0, 0};
  const StructureView empty{0, nullptr, nullptr, cell.data(), pbc.data(), nullptr};
  try {
    BuildSettings settings;
    settings.box.active = true;
    for (int k = 0; k < 3; ++k) {
      settings.box.corner[k] = 10.0;
      settings.box.vectors[4 * k] = 10.0;
    }
    const BuildResult built = random_structures(empty, argon, settings, 1, Key{2024, 1}, 0);
    if (!built.ok[0]) throw Error("no random structure was found");

    const std::vector<std::int64_t> offsets = {0, 13};
    const BatchView batch{built.positions, argon, offsets, cell, pbc, {}};
    const LennardJones potential({.sigma = 2.0, .epsilon = 1.0, .rc = 30.0});
    const RelaxResult relaxed = relax(potential, batch, {.steps = 1000, .force_tolerance = 1e-4}, settings.box);
    const double energy = relaxed.energies[0];
    std::printf("%.6f eV after %d evaluations\n", energy, relaxed.evaluations[0]);
    return std::isfinite(energy) ? 0 : 1;
  } catch (const Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
