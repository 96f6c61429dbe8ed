// Relaxes 500 random clusters of 13 Lennard-Jones atoms in one call, on all cores, and prints the lowest energy (the
// icosahedron has -44.3268 epsilon) and how many reached it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <vector>

#include "thalweg/build.hpp"
#include "thalweg/potentials.hpp"
#include "thalweg/relax.hpp"

int main() {
  using namespace thalweg;
  constexpr std::size_t atoms = 13, tries = 500;
  const std::vector<std::int32_t> argon(atoms, 18);
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
    // Row after row: positions (tries, atoms, 3); ok[row] is 0 where no place was found for an atom.
    const BuildResult built = random_structures(empty, argon, settings, tries, Key{2024, 1}, 0);

    // A batch is views of flat arrays, atoms of structure k in offsets[k] .. offsets[k + 1].
    std::vector<double> positions, cells;
    std::vector<std::int64_t> offsets{0};
    std::vector<std::uint8_t> periodic;
    for (std::size_t row = 0; row < tries; ++row) {
      if (!built.ok[row]) continue;
      const double* first = built.positions.data() + 3 * atoms * row;
      positions.insert(positions.end(), first, first + 3 * atoms);
      cells.insert(cells.end(), cell.begin(), cell.end());
      periodic.insert(periodic.end(), pbc.begin(), pbc.end());
      offsets.push_back(offsets.back() + static_cast<std::int64_t>(atoms));
    }
    const std::size_t count = offsets.size() - 1;
    if (count == 0) throw Error("no random structure was found");
    const std::vector<std::int32_t> numbers(count * atoms, 18);

    const BatchView batch{positions, numbers, offsets, cells, periodic, {}};
    const LennardJones potential({.sigma = 2.0, .epsilon = 1.0, .rc = 30.0});
    const RelaxResult relaxed = relax(potential, batch, {.steps = 1000, .force_tolerance = 1e-4}, settings.box);
    const double lowest = *std::min_element(relaxed.energies.begin(), relaxed.energies.end());
    const auto found = std::count_if(relaxed.energies.begin(), relaxed.energies.end(),
                                     [](double energy) { return std::abs(energy + 44.3268) < 1e-3; });
    const auto evaluations = std::accumulate(relaxed.evaluations.begin(), relaxed.evaluations.end(), 0ll);
    std::printf("%zu clusters, %lld evaluations, lowest %.4f eV, icosahedron found %lld times\n", count, evaluations,
                lowest, static_cast<long long>(found));
    return found > 0 ? 0 : 1;
  } catch (const Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
