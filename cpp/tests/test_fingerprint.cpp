#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "minitest.hpp"
#include "structure.hpp"
#include "thalweg/fingerprint.hpp"

using namespace thalweg;

namespace {

/// Atoms at random places of a box of this edge in the cell, no two closer than 1.6 angstrom (images apart).
Structure random_structure(std::vector<std::int32_t> numbers, std::vector<double> cell, bool periodic, unsigned seed) {
  Structure s{std::move(numbers), {}, {}, {}};
  std::copy(cell.begin(), cell.end(), s.cell);
  std::fill_n(s.pbc, 3, static_cast<std::uint8_t>(periodic));
  std::mt19937_64 rng(seed);
  std::uniform_real_distribution<double> uniform(periodic ? 0.0 : 0.2, periodic ? 1.0 : 0.7);
  while (s.positions.size() < 3 * s.numbers.size()) {
    const double f[3] = {uniform(rng), uniform(rng), uniform(rng)};
    double x[3];
    for (int k = 0; k < 3; ++k) x[k] = f[0] * cell[k] + f[1] * cell[3 + k] + f[2] * cell[6 + k];
    bool apart = true;
    for (std::size_t a = 0; a < s.positions.size(); a += 3)
      apart &= std::hypot(x[0] - s.positions[a], x[1] - s.positions[a + 1], x[2] - s.positions[a + 2]) > 1.6;
    if (apart) s.positions.insert(s.positions.end(), x, x + 3);
  }
  return s;
}

Structure cluster() {
  return random_structure({79, 28, 79, 28, 79, 28, 79, 28}, {12, 0, 0, 0, 12, 0, 0, 0, 12}, false, 1);
}
Structure skewed() {
  return random_structure({8, 22, 8, 8, 22, 8, 38}, {5.1, 0.2, 0.1, 1.9, 4.8, -0.3, -1.2, 1.4, 5.3}, true, 2);
}

std::vector<double> values(const Fingerprint& fingerprint, const Structure& s) {
  Fingerprint::Workspace workspace(fingerprint);
  std::vector<double> features(fingerprint.size());
  fingerprint.values(s.view(), features.data(), workspace);
  return features;
}

double dot(const std::vector<double>& a, const std::vector<double>& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

/// Largest difference between contract() and central differences (fourth order) of weights . features along every
/// coordinate, over the largest derivative.
double derivative_error(const Fingerprint& fingerprint, const Structure& s, unsigned seed, double step,
                        double sign = 1.0) {
  const std::vector<double> weights = random_vector(fingerprint.size(), seed);
  Fingerprint::Workspace workspace(fingerprint);
  std::vector<double> features(fingerprint.size()), gradient(3 * s.numbers.size(), 0.0);
  fingerprint.values(s.view(), features.data(), workspace);
  fingerprint.contract(weights.data(), sign, gradient.data(), workspace);
  double worst = 0, largest = 0;
  for (std::size_t k = 0; k < gradient.size(); ++k) {
    Structure moved = s;
    const auto at = [&](double shift) {
      moved.positions[k] = s.positions[k] + shift;
      return dot(weights, values(fingerprint, moved));
    };
    const double numeric = (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step);
    worst = std::max(worst, std::abs(numeric - gradient[k]));
    largest = std::max(largest, std::abs(gradient[k]));
  }
  return worst / largest;
}

FingerprintSettings with(FingerprintConvention convention) {
  FingerprintSettings settings;
  settings.convention = convention;
  return settings;
}

}  // namespace

TEST(lengths_follow_the_stoichiometry) {
  const FingerprintSettings s;
  const auto size = [&](std::vector<std::int32_t> numbers, bool periodic) {
    return Fingerprint(s, numbers, periodic).size();
  };
  CHECK(size({79, 79, 79, 28, 28, 28}, false) == 270);
  CHECK(size({79, 79, 79}, false) == 60);
  CHECK(size({79, 79}, false) == 30);
  CHECK(size({79}, true) == 60);
  CHECK(size({79, 28}, true) == 270);
  CHECK(size({6, 6, 6, 6, 6, 6, 1, 1, 1, 1, 1, 1, 1, 7}, false) == 540);
}

TEST(contraction_is_the_derivative) {
  const FingerprintSettings s;
  for (const Structure& structure : {cluster(), skewed()}) {
    const Fingerprint fingerprint(s, structure.numbers, structure.view().periodic());
    CHECK(derivative_error(fingerprint, structure, 5, 2e-4) < 1e-8);
    CHECK(derivative_error(fingerprint, structure, 5, 2e-4, -1.0) > 1.0);  // the check sees a wrong sign
  }
}

TEST(contraction_is_the_derivative_for_other_settings) {
  FingerprintSettings s;
  s.cutoff_radial = 5.1;  // not a multiple of the bin width
  s.bin_width = 0.17;
  s.angular_bins = 23;
  s.sigma_radial = 0.13;
  s.sigma_angular = 0.31;
  s.gamma = 3.5;
  s.n_sigma = 3.3;
  const Structure structure = skewed();
  CHECK(derivative_error(Fingerprint(s, structure.numbers, true), structure, 6, 2e-4) < 1e-8);
  s.angular = false;
  CHECK(derivative_error(Fingerprint(s, structure.numbers, true), structure, 6, 2e-4) < 1e-8);
}

TEST(agox_contraction_is_the_derivative_away_from_kinks) {
  // Steps so short that no window end crosses a bin edge here (chance about 1e-3 per sample and coordinate).
  const Structure structure = cluster();
  const Fingerprint fingerprint(with(FingerprintConvention::agox), structure.numbers, false);
  CHECK(derivative_error(fingerprint, structure, 5, 1e-5) < 1e-8);
}

TEST(derivative_near_collinear_triplets) {
  const FingerprintSettings s;
  for (const double bend : {0.0, 1e-12, 1e-9, 1e-7, 1e-5, 1e-4, 1e-3, 1e-2, 0.1}) {
    const Structure straight{
        {47, 47, 47}, {5, 5, 5, 7.5, 5, 5, 2.4, 5 + bend, 5}, {10, 0, 0, 0, 10, 0, 0, 0, 10}, {0, 0, 0}};
    const Structure folded{
        {47, 47, 47}, {5, 5, 5, 6.7, 5, 5, 8.6, 5, 5 + bend}, {12, 0, 0, 0, 10, 0, 0, 0, 10}, {0, 0, 0}};
    for (const Structure& structure : {straight, folded})
      CHECK(derivative_error(Fingerprint(s, structure.numbers, false), structure, 7, 2e-4) < 1e-8);
  }
}

// The derivative of the smooth convention is continuous: along a path past all bin edges and out of the cutoffs, its
// second differences vanish with the step. The cut Gaussian of the other convention jumps.
TEST(smooth_gradient_has_no_jumps) {
  double roughest[2] = {0, 0}, largest = 0;
  for (const int agox : {0, 1}) {
    Structure s{{29, 29, 29}, {5, 5, 5, 0, 0, 0, 5, 7.2, 5}, {12, 0, 0, 0, 12, 0, 0, 0, 12}, {0, 0, 0}};
    const Fingerprint fingerprint(with(agox ? FingerprintConvention::agox : FingerprintConvention::smooth), s.numbers,
                                  false);
    const std::vector<double> weights = random_vector(fingerprint.size(), 3);
    Fingerprint::Workspace workspace(fingerprint);
    std::vector<double> features(fingerprint.size()), before(9), last(9), gradient(9);
    const int steps = 200000;
    for (int k = 0; k <= steps; ++k) {
      const double r = 2.0 + 5.2 * k / steps, angle = 1.2 + 1.9 * k / steps;
      s.positions[3] = 5 + r * std::sin(angle);
      s.positions[4] = 5 + r * std::cos(angle);
      s.positions[5] = 5;
      std::fill(gradient.begin(), gradient.end(), 0.0);
      fingerprint.values(s.view(), features.data(), workspace);
      fingerprint.contract(weights.data(), 1.0, gradient.data(), workspace);
      for (std::size_t c = 0; c < 9 && k > 1; ++c)
        roughest[agox] = std::max(roughest[agox], std::abs(gradient[c] - 2 * last[c] + before[c]));
      for (std::size_t c = 0; c < 9; ++c) largest = std::max(largest, std::abs(gradient[c]));
      before = last;
      last = gradient;
    }
  }
  CHECK(roughest[0] < 3e-5 * largest);  // the second derivative of fc at its cutoff, times the step of 3e-5 angstrom
  CHECK(roughest[1] > 1e-4 * largest);  // about exp(-8) of a bin, whatever the step
}

TEST(jacobian_agrees_with_contraction) {
  for (const auto convention : {FingerprintConvention::smooth, FingerprintConvention::agox}) {
    for (const Structure& s : {cluster(), skewed()}) {
      const Fingerprint fingerprint(with(convention), s.numbers, s.view().periodic());
      Fingerprint::Workspace workspace(fingerprint);
      const std::size_t size = fingerprint.size(), n = s.numbers.size();
      std::vector<double> features(size), jacobian(3 * n * size), gradient(3 * n, 1.0);
      fingerprint.values(s.view(), features.data(), workspace);
      fingerprint.jacobian(jacobian.data(), workspace);
      const std::vector<double> weights = random_vector(size, 9);
      fingerprint.contract(weights.data(), 0.5, gradient.data(), workspace);
      double largest = 0;
      for (const double g : gradient) largest = std::max(largest, std::abs(g));
      for (std::size_t row = 0; row < 3 * n; ++row) {
        double whole = 0;
        for (std::size_t f = 0; f < size; ++f) whole += jacobian[row * size + f] * weights[f];
        CLOSE(gradient[row], 1.0 + 0.5 * whole, 1e-13 * largest);
      }
    }
  }
}

TEST(reused_workspace_gives_the_same_bits) {
  const Structure s = skewed();
  const Fingerprint fingerprint({}, s.numbers, true);
  const std::vector<double> weights = random_vector(fingerprint.size(), 4);
  Fingerprint::Workspace reused(fingerprint);
  Structure moving = s;
  const std::vector<double> direction = random_vector(s.positions.size(), 8);
  for (int step = 0; step < 30; ++step) {
    for (std::size_t k = 0; k < direction.size(); ++k)
      moving.positions[k] = s.positions[k] + 0.02 * step * direction[k];
    Fingerprint::Workspace fresh(fingerprint);
    std::vector<double> one(fingerprint.size()), two(fingerprint.size()), g1(3 * s.numbers.size()), g2(g1);
    fingerprint.values(moving.view(), one.data(), reused);
    fingerprint.values(moving.view(), two.data(), fresh);
    fingerprint.contract(weights.data(), 1.0, g1.data(), reused);
    fingerprint.contract(weights.data(), 1.0, g2.data(), fresh);
    CHECK(one == two);
    CHECK(g1 == g2);
  }
}

TEST(instruction_sets_agree) {
  const std::string before = active_isa();
  for (const Structure& s : {cluster(), skewed()}) {
    const Fingerprint fingerprint({}, s.numbers, s.view().periodic());
    const std::vector<double> reference = values(fingerprint, s);
    const double largest = *std::max_element(reference.begin(), reference.end());
    for (const char* isa : {"x86-64-v2", "x86-64-v3", "x86-64-v4"}) {
      if (!force_isa(isa)) continue;
      const std::vector<double> other = values(fingerprint, s);
      for (std::size_t f = 0; f < other.size(); ++f) CLOSE(other[f], reference[f], 1e-13 * largest);
      CHECK(derivative_error(fingerprint, s, 5, 2e-4) < 1e-8);
    }
    CHECK(force_isa(before.c_str()));
  }
}

TEST(permutation_changes_nothing) {
  const Structure s = skewed();
  Structure other = s;
  std::reverse(other.numbers.begin(), other.numbers.end());
  const std::size_t n = s.numbers.size();
  for (std::size_t i = 0; i < n; ++i) std::copy_n(&s.positions[3 * i], 3, &other.positions[3 * (n - 1 - i)]);
  const Fingerprint fingerprint({}, s.numbers, true);
  const std::vector<double> a = values(fingerprint, s), b = values(fingerprint, other);
  const double largest = *std::max_element(a.begin(), a.end());
  for (std::size_t f = 0; f < a.size(); ++f) CLOSE(a[f], b[f], 1e-13 * largest);
}

TEST(bad_input_is_refused) {
  const Structure s = cluster();
  const auto make = [&](auto change) {
    FingerprintSettings settings;
    change(settings);
    return Fingerprint(settings, s.numbers, false).size();
  };
  THROWS(make([](auto& x) { x.bin_width = 0; }), "bin_width");
  THROWS(make([](auto& x) { x.sigma_radial = -1; }), "sigma_radial");
  THROWS(make([](auto& x) { x.sigma_angular = 1.0; }), "sigma_angular");
  THROWS(make([](auto& x) { x.gamma = 0; }), "gamma");
  THROWS(make([](auto& x) { x.cutoff_angular = 9; }), "cutoff_angular");
  THROWS(make([](auto& x) { x.bin_width = 5.0; }), "smearing");
  const std::vector<std::int32_t> one = {6}, none = {0, 6};
  THROWS(Fingerprint({}, one, false), "two atoms");
  THROWS(Fingerprint({}, none, false), "atomic numbers");

  const Fingerprint fingerprint({}, s.numbers, false);
  Fingerprint::Workspace workspace(fingerprint);
  std::vector<double> features(fingerprint.size());
  THROWS(fingerprint.contract(features.data(), 1.0, features.data(), workspace), "values()");
  Structure other = s;
  other.numbers[0] = 28;
  THROWS(fingerprint.values(other.view(), features.data(), workspace), "Ni4Au4");
  other = s;
  other.pbc[1] = 1;
  THROWS(fingerprint.values(other.view(), features.data(), workspace), "periodic");
  other = s;
  std::fill_n(other.cell, 9, 0.0);
  THROWS(fingerprint.values(other.view(), features.data(), workspace), "volume");
  other = s;
  std::copy_n(&s.positions[0], 3, &other.positions[9]);
  THROWS(fingerprint.values(other.view(), features.data(), workspace), "one point");
  other = s;
  other.positions[4] = std::nan("");
  THROWS(fingerprint.values(other.view(), features.data(), workspace), "finite");
  fingerprint.values(s.view(), features.data(), workspace);  // a workspace survives errors
  CHECK(features == values(fingerprint, s));
  const Fingerprint another({}, s.numbers, false);
  THROWS(another.values(s.view(), features.data(), workspace), "another descriptor");
  THROWS(another.contract(features.data(), 1.0, features.data(), workspace), "another descriptor");
}

MINITEST_MAIN
