#include <cmath>
#include <vector>

#include "minitest.hpp"
#include "structure.hpp"
#include "thalweg/density.hpp"

using namespace thalweg;

namespace {

Structure oxide() {
  return {{8, 22, 8}, {0.1, 0.2, 0.0, 2.3, 0.4, 0.6, 0.3, 2.4, 0.4}, {5.1, 0.2, 0, 1.9, 4.8, 0, 0, 0, 20}, {1, 1, 0}};
}

std::vector<double> values(const LocalDensity& density, const Structure& s) {
  LocalDensity::Workspace workspace(density);
  std::vector<double> features(s.numbers.size() * density.size());
  density.values(s.view(), features.data(), workspace);
  return features;
}

}  // namespace

TEST(two_atoms_by_hand) {
  const Structure s{{6, 1}, {0, 0, 0, 0, 0, 1.1}, {0, 0, 0, 0, 0, 0, 0, 0, 0}, {0, 0, 0}};
  const LocalDensity density({2.0, 4.0}, s.numbers);
  const double rho = std::exp(-1.1 / 2.0) * 0.5 * (std::cos(std::acos(-1.0) * 1.1 / 4.0) + 1.0);
  const std::vector<double> f = values(density, s), wanted = {rho, 0.0, 6.0, 0.0, rho, 1.0};
  for (std::size_t k = 0; k < f.size(); ++k) CLOSE(f[k], wanted[k], 1e-15);
}

TEST(contraction_and_jacobian_are_the_derivative) {
  const Structure s = oxide();
  const LocalDensity density({}, s.numbers);
  const std::size_t n = 3, D = density.size();
  std::vector<double> weights(n * D), gradient(3 * n, 0.0), jacobian(3 * n * D);
  for (std::size_t k = 0; k < weights.size(); ++k) weights[k] = std::sin(1.0 + 2.0 * static_cast<double>(k));
  LocalDensity::Workspace workspace(density);
  std::vector<double> features(n * D), whole(3 * n, 0.0);
  density.values(s.view(), features.data(), workspace);
  density.contract(weights.data(), 1.0, gradient.data(), workspace);
  for (std::size_t center = 0; center < n; ++center) {
    density.jacobian(center, jacobian.data(), workspace);
    for (std::size_t row = 0; row < 3 * n; ++row)
      for (std::size_t f = 0; f < D; ++f) whole[row] += jacobian[row * D + f] * weights[center * D + f];
  }
  const double h = 2e-4;
  for (std::size_t k = 0; k < 3 * n; ++k) {
    const auto at = [&](double step) {
      Structure moved = s;
      moved.positions[k] += step;
      const std::vector<double> f = values(density, moved);
      double e = 0;
      for (std::size_t i = 0; i < f.size(); ++i) e += weights[i] * f[i];
      return e;
    };
    CLOSE(gradient[k], (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h), 1e-9);
    CLOSE(gradient[k], whole[k], 1e-14);
  }
}

TEST(bad_input_is_refused) {
  Structure s = oxide();
  const std::vector<std::int32_t> none, oxygen = {8};
  THROWS(LocalDensity({0.0, 4.0}, oxygen), "decay");
  THROWS(LocalDensity({1.0, -4.0}, oxygen), "cutoff");
  THROWS(LocalDensity({}, none), "species");
  THROWS(values(LocalDensity({}, oxygen), s), "atomic number 22");
  s.positions[3] = s.positions[0], s.positions[4] = s.positions[1], s.positions[5] = s.positions[2];
  THROWS(values(LocalDensity({}, s.numbers), s), "one point");
}

MINITEST_MAIN
