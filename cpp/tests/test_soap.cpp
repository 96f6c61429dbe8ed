#include <algorithm>
#include <cmath>

#include "minitest.hpp"
#include "structure.hpp"
#include "thalweg/soap.hpp"

using namespace thalweg;

namespace {

std::vector<double> values(const Soap& soap, const Structure& s, int threads = 1) {
  Soap::Workspace workspace(soap);
  std::vector<double> features(soap.rows(s.numbers.size()) * soap.size());
  soap.values(s.view(), features.data(), workspace, threads);
  return features;
}

std::vector<double> contracted(const Soap& soap, const Structure& s, const std::vector<double>& weights,
                               int threads = 1) {
  Soap::Workspace workspace(soap);
  std::vector<double> features(soap.rows(s.numbers.size()) * soap.size()), gradient(s.positions.size(), 0.0);
  soap.values(s.view(), features.data(), workspace, threads);
  soap.contract(weights.data(), 1.0, gradient.data(), workspace, threads);
  return gradient;
}

SoapSettings with(double r_cut, int n_max, int l_max, double sigma, SoapAverage average = SoapAverage::off) {
  SoapSettings s;
  s.r_cut = r_cut, s.n_max = n_max, s.l_max = l_max, s.sigma = sigma, s.average = average;
  return s;
}

const SoapSettings kAll[] = {with(4, 3, 2, 1.0),
                             with(3.5, 5, 3, 0.4),
                             with(3, 4, 4, 0.5, SoapAverage::mean),
                             with(3, 2, 6, 0.5, SoapAverage::sum),
                             with(4, 6, 8, 0.4),
                             with(2.5, 1, 0, 0.9)};

}  // namespace

// One neighbour at distance r: with l = 0 and n = 1 everything is a product of two exponentials.
TEST(two_atoms_by_hand) {
  SoapSettings settings = with(3, 1, 0, 0.5);
  settings.cutoff = SoapCutoff::hard;
  const double r = 1.7, eta = 2.0, alpha = std::log(1000.0), pi = std::acos(-1.0);
  const Structure s{{6, 6}, {1, 1, 1, 1, 1, 1 + r}, {0, 0, 0, 0, 0, 0, 0, 0, 0}, {0, 0, 0}};
  const double beta = 1 / std::sqrt(0.5 * std::tgamma(1.5) * std::pow(2 * alpha, -1.5));
  const double c = beta * std::pow(pi / (eta + alpha), 1.5) * (1 + std::exp(-eta * alpha / (eta + alpha) * r * r)) /
                   std::sqrt(4 * pi);
  const std::vector<std::int32_t> carbon = {6};
  for (const double f : values(Soap(settings, carbon), s)) CLOSE(f, pi * std::sqrt(8.0) * c * c, 1e-14 * c * c);
}

TEST(contraction_is_the_derivative) {
  for (const std::uint8_t third : {1, 0})
    for (const SoapSettings& settings : kAll) {
      const Structure s = skewed_oxide(third);
      const Soap soap(settings, s.numbers);
      const auto weights = random_vector(soap.rows(s.numbers.size()) * soap.size(), 3);
      const auto gradient = contracted(soap, s, weights);
      const double h = 2e-4;
      for (std::size_t k = 0; k < s.positions.size(); k += 2) {
        const auto at = [&](double step) {
          Structure moved = s;
          moved.positions[k] += step;
          const auto f = values(soap, moved);
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
  for (SoapSettings settings : kAll) {
    settings.average = SoapAverage::off;
    const Structure s = skewed_oxide();
    const std::size_t n = s.numbers.size();
    const Soap soap(settings, s.numbers);
    const std::size_t D = soap.size();
    const auto weights = random_vector(n * D, 9);
    Soap::Workspace workspace(soap);
    std::vector<double> features(n * D), gradient(3 * n, 1.0), whole(3 * n, 0.0), jacobian(3 * n * D);
    soap.values(s.view(), features.data(), workspace);
    soap.contract(weights.data(), 0.5, gradient.data(), workspace);
    for (std::size_t center = 0; center < n; ++center) {
      soap.jacobian(center, jacobian.data(), workspace);
      for (std::size_t row = 0; row < 3 * n; ++row)
        for (std::size_t f = 0; f < D; ++f) whole[row] += jacobian[row * D + f] * weights[center * D + f];
    }
    for (std::size_t row = 0; row < 3 * n; ++row) CLOSE(gradient[row], 1.0 + 0.5 * whole[row], 1e-12 * largest(whole));
  }
}

TEST(threads_and_warm_workspaces_do_not_change_a_bit) {
  Structure s = skewed_oxide();
  for (const SoapSettings& settings : kAll) {
    const Soap soap(settings, s.numbers);
    const auto weights = random_vector(soap.rows(s.numbers.size()) * soap.size(), 4);
    CHECK(values(soap, s) == values(soap, s, 2));
    CHECK(contracted(soap, s, weights) == contracted(soap, s, weights, 4));
    Soap::Workspace warm(soap);
    std::vector<double> features(soap.rows(s.numbers.size()) * soap.size());
    for (int step = 0; step < 20; ++step) {
      Structure moving = s;
      for (double& x : moving.positions) x += 0.02 * step;
      std::vector<double> gradient(s.positions.size(), 0.0);
      soap.values(moving.view(), features.data(), warm);
      soap.contract(weights.data(), 1.0, gradient.data(), warm);
      CHECK(features == values(soap, moving));
      CHECK(gradient == contracted(soap, moving, weights));
    }
  }
}

TEST(instruction_sets_agree) {
  const std::string before = active_isa();
  const Structure s = skewed_oxide();
  for (const SoapSettings& settings : kAll) {
    const Soap soap(settings, s.numbers);
    const auto weights = random_vector(soap.rows(s.numbers.size()) * soap.size(), 4);
    const auto reference = values(soap, s), gradient = contracted(soap, s, weights);
    for (const char* isa : {"x86-64-v2", "x86-64-v3", "x86-64-v4"}) {
      if (!force_isa(isa)) continue;
      const auto other = values(soap, s), pulled = contracted(soap, s, weights);
      // Radial functions are far from orthogonal before they are made so: digits cancel.
      for (std::size_t f = 0; f < other.size(); ++f) CLOSE(other[f], reference[f], 1e-11 * largest(reference));
      for (std::size_t k = 0; k < pulled.size(); ++k) CLOSE(pulled[k], gradient[k], 1e-11 * largest(gradient));
    }
    CHECK(force_isa(before.c_str()));
  }
}

TEST(coinciding_atoms_are_no_trouble) {
  Structure s = skewed_oxide();
  std::copy_n(&s.positions[0], 3, &s.positions[3]);
  const Soap soap(kAll[0], s.numbers);
  const auto features = values(soap, s);
  const auto gradient = contracted(soap, s, random_vector(features.size(), 1));
  for (const double x : features) CHECK(std::isfinite(x));
  for (const double x : gradient) CHECK(std::isfinite(x));
}

TEST(bad_input_is_refused) {
  const Structure s = skewed_oxide();
  const auto make = [&](auto change) {
    SoapSettings settings;
    change(settings);
    return Soap(settings, s.numbers).size();
  };
  THROWS(make([](auto& x) { x.r_cut = 1; }), "r_cut");
  THROWS(make([](auto& x) { x.sigma = -1; }), "sigma");
  THROWS(make([](auto& x) { x.n_max = 17; }), "n_max");
  THROWS(make([](auto& x) { x.n_max = 16; }), "too alike");
  THROWS(make([](auto& x) { x.l_max = -1; }), "l_max");
  const std::vector<std::int32_t> none, zero = {0}, oxygen = {8};
  THROWS(Soap({}, none), "species");
  THROWS(Soap({}, zero), "atomic numbers");
  const Soap soap({}, oxygen);
  Soap::Workspace workspace(soap);
  std::vector<double> features(6 * soap.size());
  THROWS(soap.contract(features.data(), 1.0, features.data(), workspace), "values()");
  THROWS(soap.values(s.view(), features.data(), workspace), "atomic number 22");
  THROWS(soap.check(s.view()), "atomic number 22");
  const Soap another({}, s.numbers);
  THROWS(another.values(s.view(), features.data(), workspace), "another descriptor");
  THROWS(another.contract(features.data(), 1.0, features.data(), workspace), "another descriptor");
}

MINITEST_MAIN
