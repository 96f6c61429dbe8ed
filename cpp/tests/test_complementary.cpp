#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "minitest.hpp"
#include "structure.hpp"
#include "thalweg/complementary.hpp"
#include "thalweg/relax.hpp"

using namespace thalweg;

namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Two structures of a slab, periodic in a skewed plane, as one batch.
struct Slabs {
  std::vector<std::int32_t> numbers = {8, 22, 8, 22, 8, 22, 8, 22};
  std::vector<double> positions = {0.1, 0.2, 0.0, 2.3, 0.4, 0.6, 0.3, 2.4, 0.4, 2.6, 2.9, 1.7,
                                   0.3, 0.1, 0.1, 2.2, 0.6, 0.4, 0.2, 2.6, 0.5, 2.5, 2.5, 1.4};
  std::vector<std::int64_t> offsets = {0, 4, 8};
  std::vector<double> cells = {5.1, 0.2, 0, 1.9, 4.8, 0, 0, 0, 20, 5.1, 0.2, 0, 1.9, 4.8, 0, 0, 0, 20};
  std::vector<std::uint8_t> pbc = {1, 1, 0, 1, 1, 0}, fixed = std::vector<std::uint8_t>(24, 0);

  BatchView view() const { return {positions, numbers, offsets, cells, pbc, fixed}; }
  void hold(std::size_t atom) { fixed[3 * atom] = fixed[3 * atom + 1] = fixed[3 * atom + 2] = 1; }
};

// Attractors near the features that atoms have, other ones for each.
std::vector<double> attractors(const Slabs& s, const LocalDensity& density) {
  std::vector<double> out(s.numbers.size() * density.size());
  LocalDensity::Workspace workspace(density);
  for (std::size_t row = 0; row < 2; ++row)
    density.values(s.view()[row], out.data() + 4 * row * density.size(), workspace);
  for (std::size_t k = 0; k < out.size(); ++k)
    if (k % density.size() + 1 != density.size()) out[k] += 0.2 * std::sin(1.0 + 2.0 * static_cast<double>(k));
  return out;
}

std::vector<double> run(const Landscape& landscape, const BatchView& batch, std::vector<double>* forces = nullptr) {
  std::vector<double> energies(batch.size()), unused(3 * batch.atoms());
  evaluate(landscape, batch, energies, forces ? *forces : unused, 1);
  return energies;
}

}  // namespace

TEST(energy_by_hand) {
  const Slabs s;
  const auto density = std::make_shared<LocalDensity>(DensitySettings{1.2, 6.0}, s.numbers);
  std::vector<double> wanted = attractors(s, *density), features(12);
  for (std::size_t k = 0; k < 3; ++k) wanted[3 * 2 + k] = kNaN;  // the third atom does not count
  LocalDensity::Workspace workspace(*density);
  const std::vector<double> energies = run(ComplementaryEnergy(density, wanted, 0.02), s.view());
  for (std::size_t row = 0; row < 2; ++row) {
    density->values(s.view()[row], features.data(), workspace);
    double energy = 0;
    for (std::size_t i = 0; i < 4; ++i) {
      if (row == 0 && i == 2) continue;
      const double* a = wanted.data() + 3 * (4 * row + i);
      energy += std::sqrt(std::pow(features[3 * i] - a[0], 2) + std::pow(features[3 * i + 1] - a[1], 2) + 4e-4) - 0.02;
    }
    CLOSE(energies[row], energy, 1e-13);
  }
}

TEST(forces_are_the_derivative) {
  const Slabs s;
  const auto density = std::make_shared<LocalDensity>(DensitySettings{}, s.numbers);
  const ComplementaryEnergy landscape(density, attractors(s, *density), 0.01);
  std::vector<double> forces(24);
  run(landscape, s.view(), &forces);
  double largest = 0;
  for (const double f : forces) largest = std::max(largest, std::abs(f));
  const double h = 2e-4;
  for (std::size_t k = 0; k < 24; ++k) {
    const auto at = [&](double step) {
      Slabs moved = s;
      moved.positions[k] += step;
      return run(landscape, moved.view())[k / 12];
    };
    CLOSE(-forces[k], (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h), 1e-8 * largest);
  }
}

TEST(a_smooth_minimum_where_an_atom_has_arrived) {
  const Slabs s;
  const auto density = std::make_shared<LocalDensity>(DensitySettings{}, s.numbers);
  std::vector<double> reached = attractors(s, *density), forces(24);
  LocalDensity::Workspace workspace(*density);
  for (std::size_t row = 0; row < 2; ++row) density->values(s.view()[row], reached.data() + 12 * row, workspace);
  const std::vector<double> energies = run(ComplementaryEnergy(density, reached, 0.01), s.view(), &forces);
  for (const double e : energies) CLOSE(e, 0.0, 1e-15);
  for (const double f : forces) CLOSE(f, 0.0, 1e-12);
}

TEST(a_relaxation_leaves_out_what_fixed_atoms_make_among_themselves) {
  // Both ways to the same path: fixed atoms that count make the evaluator see all pairs, the others only some.
  Slabs s;
  for (const std::size_t atom : {0, 1, 4, 5}) s.hold(atom);
  const auto density = std::make_shared<LocalDensity>(DensitySettings{}, s.numbers);
  const std::vector<double> all = attractors(s, *density);
  std::vector<double> moving = all;
  for (const std::size_t atom : {0, 1, 4, 5})
    for (std::size_t k = 0; k < 3; ++k) moving[3 * atom + k] = kNaN;
  const ComplementaryEnergy counted(density, all, 0.01), part(density, moving, 0.01);
  for (const ComplementaryEnergy* landscape : {&counted, &part}) {
    const std::vector<std::int64_t> rows = {0, 1};
    std::vector<double> fast(2), forces(24), slow(2), all_forces(24);
    landscape->evaluator(s.view(), ForcesOn::moving)->evaluate(rows, s.positions.data(), fast.data(), forces.data());
    landscape->evaluator(s.view(), ForcesOn::all)->evaluate(rows, s.positions.data(), slow.data(), all_forces.data());
    for (std::size_t row = 0; row < 2; ++row) CLOSE(fast[row], slow[row], 1e-14);
    for (const std::size_t atom : {2, 3, 6, 7})
      for (std::size_t k = 0; k < 3; ++k) CLOSE(forces[3 * atom + k], all_forces[3 * atom + k], 1e-14);
  }
  RelaxSettings settings;
  settings.first_curvature = 1.0, settings.force_tolerance = 1e-4;
  const RelaxResult result = relax(part, s.view(), settings, {}, 2);
  const std::vector<double> before = run(part, s.view());
  for (std::size_t row = 0; row < 2; ++row) CHECK(result.energies[row] < 0.6 * before[row]);
  const RelaxResult again = relax(part, s.view(), settings, {}, 1);
  CHECK(again.positions == result.positions);
}

TEST(a_structure_without_features_leaves_the_others_alone) {
  Slabs s;
  const auto density = std::make_shared<LocalDensity>(DensitySettings{}, s.numbers);
  const ComplementaryEnergy landscape(density, attractors(s, *density), 0.01);
  const double untouched = run(landscape, s.view())[1];
  for (std::size_t k = 0; k < 3; ++k) s.positions[k] = s.positions[3 + k];
  std::vector<double> forces(24);
  std::vector<double> energies = run(landscape, s.view(), &forces);
  CHECK(std::isnan(energies[0]) && std::isnan(forces[7]) && energies[1] == untouched && std::isfinite(forces[13]));
  s.positions[0] = kNaN;
  energies = run(landscape, s.view());
  CHECK(std::isnan(energies[0]) && energies[1] == untouched);
}

TEST(bad_input_is_refused) {
  const Slabs s;
  const auto density = std::make_shared<LocalDensity>(DensitySettings{}, s.numbers);
  std::vector<double> good = attractors(s, *density);
  THROWS(ComplementaryEnergy(nullptr, good, 0.01), "local density");
  THROWS(ComplementaryEnergy(density, good, 0.0), "softening");
  THROWS(ComplementaryEnergy(density, {1.0, 2.0}, 0.01), "3 columns");
  THROWS(run(ComplementaryEnergy(density, std::vector<double>(good.begin(), good.end() - 3), 0.01), s.view()),
         "batches of 7 atoms");
  good[5] = 8.0;
  THROWS(run(ComplementaryEnergy(density, good, 0.01), s.view()), "own species");
  good[5] = kNaN;
  THROWS(ComplementaryEnergy(density, good, 0.01), "row 1 is neither");
}

MINITEST_MAIN
