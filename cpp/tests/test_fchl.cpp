#include <algorithm>
#include <cmath>

#include "minitest.hpp"
#include "structure.hpp"
#include "thalweg/fchl.hpp"

using namespace thalweg;

namespace {

std::vector<double> values(const Fchl19& fchl, const Structure& s, int threads = 1) {
  Fchl19::Workspace workspace(fchl);
  std::vector<double> features(s.numbers.size() * fchl.size());
  fchl.values(s.view(), features.data(), workspace, threads);
  return features;
}

std::vector<double> contracted(const Fchl19& fchl, const Structure& s, const std::vector<double>& weights,
                               int threads = 1) {
  Fchl19::Workspace workspace(fchl);
  std::vector<double> features(s.numbers.size() * fchl.size()), gradient(s.positions.size(), 0.0);
  fchl.values(s.view(), features.data(), workspace, threads);
  fchl.contract(weights.data(), 1.0, gradient.data(), workspace, threads);
  return gradient;
}

Fchl19Settings with(double pairs, double triplets, int n_pairs, int n_triplets, int n_fourier, double eta,
                    double zeta) {
  Fchl19Settings s;
  s.cutoff_pairs = pairs, s.cutoff_triplets = triplets, s.n_pairs = n_pairs, s.n_triplets = n_triplets;
  s.n_fourier = n_fourier, s.eta_triplets = eta, s.zeta = zeta;
  return s;
}

// As published but for the cutoffs; Gaussians so narrow that each has an exponential of its own; so wide that one is
// enough for all.
const Fchl19Settings kAll[] = {with(6, 5, 24, 20, 1, 2.7, 3.14), with(4, 4.5, 9, 11, 2, 400, 0.5),
                               with(5, 3.5, 1, 33, 8, 0.1, 0.2)};

}  // namespace

TEST(two_atoms_and_a_third_by_hand) {
  const double pi = std::acos(-1.0), r = 1.7, cutoff = 4.0, eta = 0.32, n2 = 1.8;
  Fchl19Settings settings;
  settings.cutoff_pairs = settings.cutoff_triplets = cutoff;
  settings.n_pairs = settings.n_triplets = 1;  // at the cutoff
  const std::vector<std::int32_t> carbon = {6};
  const Fchl19 fchl(settings, carbon);
  const Structure two{{6, 6}, {1, 1, 1, 1, 1, 1 + r}, {0, 0, 0, 0, 0, 0, 0, 0, 0}, {0, 0, 0}};
  const auto cut = [&](double x) { return 0.5 * (std::cos(pi * x / cutoff) + 1); };
  const auto pair = [&](double x) {
    const double v = std::log(1 + eta / (x * x)), t = std::log(cutoff) - std::log(x) + v / 2;
    return cut(x) / std::pow(x, n2) * std::exp(-t * t / (2 * v)) / (cutoff * std::sqrt(2 * pi * v));
  };
  auto f = values(fchl, two);
  CHECK(f.size() == 6);
  for (const std::size_t atom : {0, 1}) {
    CLOSE(f[3 * atom], pair(r), 1e-15);
    CHECK(f[3 * atom + 1] == 0 && f[3 * atom + 2] == 0);
  }
  // a right angle at the first of three
  const Structure three{{6, 6, 6}, {0, 0, 0, r, 0, 0, 0, r, 0}, {0, 0, 0, 0, 0, 0, 0, 0, 0}, {0, 0, 0}};
  f = values(fchl, three);
  CLOSE(f[0], 2 * pair(r), 1e-15);
  const double triplet = 13.4 * std::sqrt(2.7 / pi) * std::pow(r * r * r * std::sqrt(2.0), -0.57) * cut(r) * cut(r) *
                         std::exp(-2.7 * (r - cutoff) * (r - cutoff)) * 2 * std::exp(-pi * pi / 2);
  CLOSE(f[1], 0.0, 1e-15);
  CLOSE(f[2], triplet, 1e-14 * triplet);
}

TEST(contraction_is_the_derivative) {
  for (const std::uint8_t third : {1, 0})
    for (const Fchl19Settings& settings : kAll) {
      const Structure s = skewed_oxide(third);
      const Fchl19 fchl(settings, s.numbers);
      const auto weights = random_vector(s.numbers.size() * fchl.size(), 3);
      const auto gradient = contracted(fchl, s, weights);
      const double h = 2e-4;
      for (std::size_t k = 0; k < s.positions.size(); k += 2) {
        const auto at = [&](double step) {
          Structure moved = s;
          moved.positions[k] += step;
          const auto f = values(fchl, moved);
          double e = 0;
          for (std::size_t i = 0; i < f.size(); ++i) e += weights[i] * f[i];
          return e;
        };
        const double numeric = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h);
        CLOSE(numeric, gradient[k], 1e-8 * largest(gradient));
      }
    }
}

TEST(jacobian_agrees_with_contraction) {
  for (const Fchl19Settings& settings : kAll) {
    const Structure s = skewed_oxide();
    const std::size_t n = s.numbers.size();
    const Fchl19 fchl(settings, s.numbers);
    const std::size_t D = fchl.size();
    const auto weights = random_vector(n * D, 9);
    Fchl19::Workspace workspace(fchl);
    std::vector<double> features(n * D), gradient(3 * n, 1.0), whole(3 * n, 0.0), jacobian(3 * n * D);
    fchl.values(s.view(), features.data(), workspace);
    fchl.contract(weights.data(), 0.5, gradient.data(), workspace);
    for (std::size_t center = 0; center < n; ++center) {
      fchl.jacobian(center, jacobian.data(), workspace);
      for (std::size_t row = 0; row < 3 * n; ++row)
        for (std::size_t f = 0; f < D; ++f) whole[row] += jacobian[row * D + f] * weights[center * D + f];
    }
    for (std::size_t row = 0; row < 3 * n; ++row) CLOSE(gradient[row], 1.0 + 0.5 * whole[row], 1e-12 * largest(whole));
    THROWS(fchl.jacobian(n, jacobian.data(), workspace), "6 atoms");
  }
}

TEST(threads_and_warm_workspaces_do_not_change_a_bit) {
  Structure s = skewed_oxide();
  for (const Fchl19Settings& settings : kAll) {
    const Fchl19 fchl(settings, s.numbers);
    const auto weights = random_vector(s.numbers.size() * fchl.size(), 4);
    CHECK(values(fchl, s) == values(fchl, s, 2));
    CHECK(contracted(fchl, s, weights) == contracted(fchl, s, weights, 4));
    Fchl19::Workspace warm(fchl);
    std::vector<double> features(s.numbers.size() * fchl.size());
    for (int step = 0; step < 20; ++step) {
      Structure moving = s;
      for (double& x : moving.positions) x += 0.02 * step;
      std::vector<double> gradient(s.positions.size(), 0.0);
      fchl.values(moving.view(), features.data(), warm);
      fchl.contract(weights.data(), 1.0, gradient.data(), warm);
      CHECK(features == values(fchl, moving));
      CHECK(gradient == contracted(fchl, moving, weights));
    }
  }
}

TEST(instruction_sets_agree) {
  const std::string before = active_isa();
  const Structure s = skewed_oxide();
  for (const Fchl19Settings& settings : kAll) {
    const Fchl19 fchl(settings, s.numbers);
    const auto weights = random_vector(s.numbers.size() * fchl.size(), 4);
    const auto reference = values(fchl, s), gradient = contracted(fchl, s, weights);
    for (const char* isa : {"x86-64-v2", "x86-64-v3", "x86-64-v4"}) {
      if (!force_isa(isa)) continue;
      const auto other = values(fchl, s), pulled = contracted(fchl, s, weights);
      for (std::size_t f = 0; f < other.size(); ++f) CLOSE(other[f], reference[f], 1e-12 * largest(reference));
      for (std::size_t k = 0; k < pulled.size(); ++k) CLOSE(pulled[k], gradient[k], 1e-12 * largest(gradient));
    }
    CHECK(force_isa(before.c_str()));
  }
}

TEST(bad_input_is_refused) {
  Structure s = skewed_oxide();
  const auto make = [&](auto change) {
    Fchl19Settings settings;
    change(settings);
    return Fchl19(settings, s.numbers).size();
  };
  THROWS(make([](auto& x) { x.cutoff_pairs = -1; }), "cutoff_pairs");
  THROWS(make([](auto& x) { x.cutoff_triplets = 0; }), "cutoff_triplets");
  THROWS(make([](auto& x) { x.n_triplets = 129; }), "n_triplets");
  THROWS(make([](auto& x) { x.n_fourier = 0; }), "n_fourier");
  THROWS(make([](auto& x) { x.eta_pairs = 0; }), "eta_pairs");
  const std::vector<std::int32_t> none, zero = {0}, oxygen = {8};
  THROWS(Fchl19({}, none), "species");
  THROWS(Fchl19({}, zero), "atomic numbers");
  const Fchl19 fchl({}, oxygen);
  Fchl19::Workspace workspace(fchl);
  std::vector<double> features(6 * fchl.size());
  THROWS(fchl.contract(features.data(), 1.0, features.data(), workspace), "values()");
  THROWS(fchl.jacobian(0, features.data(), workspace), "values()");
  THROWS(fchl.values(s.view(), features.data(), workspace), "atomic number 22");
  THROWS(fchl.check(s.view()), "atomic number 22");
  const Fchl19 another({}, s.numbers);
  THROWS(another.values(s.view(), features.data(), workspace), "another descriptor");
  THROWS(another.contract(features.data(), 1.0, features.data(), workspace), "another descriptor");
  std::copy_n(&s.positions[0], 3, &s.positions[3]);
  THROWS(values(Fchl19({}, s.numbers), s), "one point");
  s.positions[3] = std::nan("");
  THROWS(values(Fchl19({}, s.numbers), s), "finite");
}

MINITEST_MAIN
