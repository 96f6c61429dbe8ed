// The local GP from C++: it reproduces what it was taught, its forces are derivatives, appending is not refitting from
// another state, threads change nothing. The dense formulas are checked in tests/test_local_model.py.
#include <algorithm>
#include <cmath>

#include "minitest.hpp"
#include "thalweg/local_gpr.hpp"
#include "thalweg/potentials.hpp"
#include "thalweg/random.hpp"

using namespace thalweg;

namespace {

struct Structures {
  std::vector<double> positions, cells, energies, forces;
  std::vector<std::int32_t> numbers;
  std::vector<std::int64_t> offsets{0};
  std::vector<std::uint8_t> pbc;
  BatchView view() const { return {positions, numbers, offsets, cells, pbc, {}}; }
  std::span<const double> energy(std::size_t first, std::size_t count) const {
    return std::span(energies).subspan(first, count);
  }
};

// Clusters of Ni4Au4, atoms at least 2 angstrom apart, with energies and forces of EMT.
Structures random_structures(std::size_t count, std::uint64_t seed) {
  Structures out;
  for (std::size_t k = 0; k < count; ++k) {
    Random random({seed, 5}, k);
    std::vector<double> x;
    while (x.size() < 24) {
      double p[3];
      for (double& v : p) v = random.uniform(3.0, 8.5);
      bool apart = true;
      for (std::size_t i = 0; i < x.size(); i += 3)
        apart &= std::hypot(p[0] - x[i], p[1] - x[i + 1], p[2] - x[i + 2]) > 2.0;
      if (apart) x.insert(x.end(), p, p + 3);
    }
    out.positions.insert(out.positions.end(), x.begin(), x.end());
    for (int i = 0; i < 8; ++i) out.numbers.push_back(i < 4 ? 28 : 79);
    out.offsets.push_back(static_cast<std::int64_t>(out.numbers.size()));
    for (int d = 0; d < 9; ++d) out.cells.push_back(d % 4 == 0 ? 12.0 : 0.0);
    for (int d = 0; d < 3; ++d) out.pbc.push_back(0);
  }
  out.energies.resize(count);
  out.forces.resize(out.positions.size());
  evaluate(Emt(), out.view(), out.energies, out.forces, 1);
  return out;
}

std::shared_ptr<LocalGpr> trained(const Structures& data, const LocalKernel& kernel) {
  const std::int32_t species[2] = {28, 79};
  auto gpr =
      std::make_shared<LocalGpr>(std::make_shared<Environments>(EnvironmentSettings{}, species), LocalSettings{});
  gpr->fit(data.view(), data.energies, data.forces, kernel);
  return gpr;
}

}  // namespace

TEST(reproduces_energies_within_their_noise) {
  // Fewer energies than inducing points: nothing stands in the way. (With forces there are more rows than points.)
  const Structures data = random_structures(12, 1);
  const std::int32_t species[2] = {28, 79};
  auto gpr =
      std::make_shared<LocalGpr>(std::make_shared<Environments>(EnvironmentSettings{}, species), LocalSettings{});
  gpr->fit(data.view(), data.energies, {}, {1.0, 20.0, 0.1});
  CHECK(gpr->inducing() > 24);
  std::vector<double> energies(12), sigmas(12), far(12), far_sigmas(12);
  const LocalSurrogate model(gpr, nullptr, {}, 0.0);
  model.predict(data.view(), energies, sigmas, {}, {}, {}, 2);
  const Structures other = random_structures(12, 11);
  model.predict(other.view(), far, far_sigmas, {}, {}, {}, 2);
  for (std::size_t i = 0; i < 12; ++i) {
    CLOSE(energies[i], data.energies[i], 0.1);
    CHECK(sigmas[i] < 0.05);  // the noise is 0.1 sqrt(0.1) eV
    CHECK(far_sigmas[i] > 0.05);
  }
}

TEST(forces_of_the_bound_are_derivatives) {
  const LocalSurrogate model(trained(random_structures(10, 2), {1.5, 5.0, 1.0}),
                             std::make_shared<PairPrior>(PairPrior::Settings{}), {{28, -1.0}}, 1.5);
  Structures test = random_structures(1, 3);
  std::vector<double> energy(1), forces(24), unused(24);
  evaluate(model, test.view(), energy, forces, 1);
  double largest = 0;
  for (const double f : forces) largest = std::max(largest, std::abs(f));
  for (std::size_t k = 0; k < 24; ++k) {
    const double before = test.positions[k], h = 1e-3;
    double value[4];
    for (int step = 0; step < 4; ++step) {
      test.positions[k] = before + h * (step < 2 ? step - 2 : step - 1);
      evaluate(model, test.view(), energy, unused, 1);
      value[step] = energy[0];
    }
    test.positions[k] = before;
    // sigma is the root of a difference of large numbers: its differences are good to 1e-6 only
    CLOSE(-forces[k], (8 * (value[2] - value[1]) - (value[3] - value[0])) / (12 * h), 1e-6 * largest);
  }
}

TEST(forces_of_fixed_coordinates_are_not_learned) {
  Structures data = random_structures(4, 4);
  const std::int32_t species[2] = {28, 79};
  const auto environments = std::make_shared<Environments>(EnvironmentSettings{}, species);
  std::vector<std::uint8_t> fixed(data.positions.size(), 0);
  for (std::size_t k = 0; k < fixed.size(); k += 2) fixed[k] = 1;
  BatchView view = data.view();
  view.fixed = fixed;
  LocalGpr one(environments, {}), other(environments, {});
  one.fit(view, data.energies, data.forces, {});
  for (std::size_t k = 0; k < fixed.size(); k += 2) data.forces[k] = std::nan("");
  other.fit(data.view(), data.energies, data.forces, {});
  CHECK(one.log_likelihood() == other.log_likelihood());
}

TEST(inducing_points_stop_at_their_limit) {
  const Structures data = random_structures(20, 5), more = random_structures(5, 6);
  const std::int32_t species[2] = {28, 79};
  LocalSettings settings;
  settings.max_inducing = 30;
  settings.tolerance = 1e-6;
  LocalGpr gpr(std::make_shared<Environments>(EnvironmentSettings{}, species), settings);
  gpr.fit(data.view(), data.energies, data.forces, {0.7, 1.0, 1.0});
  CHECK(gpr.inducing() <= 30 && gpr.inducing() >= 2);
  CHECK(gpr.tolerance() > settings.tolerance);
  gpr.append(more.view(), more.energies, more.forces);
  CHECK(gpr.inducing() <= 30);
  CHECK(gpr.size() == 25);
}

TEST(bad_input_is_named) {
  const Structures data = random_structures(2, 7);
  const std::int32_t species[2] = {28, 79};
  const auto environments = std::make_shared<Environments>(EnvironmentSettings{}, species);
  LocalSettings settings;
  settings.noise_force = 0;
  THROWS(LocalGpr(environments, settings), "noise_force must be above 0");
  LocalGpr gpr(environments, {});
  THROWS(gpr.append(data.view(), data.energies, data.forces), "call fit first");
  THROWS(gpr.fit(data.view(), data.energy(0, 1), data.forces, {}), "energies must hold 2 values");
  THROWS(gpr.fit(data.view(), data.energies, data.forces, {-1.0, 1.0, 1.0}), "length must be above 0");
  const double bad[2] = {1.0, std::nan("")};
  THROWS(gpr.fit(data.view(), bad, data.forces, {}), "must be finite");
  THROWS(LocalSurrogate(std::make_shared<LocalGpr>(gpr), nullptr, {}, 0.0), "call fit first");
}

MINITEST_MAIN
