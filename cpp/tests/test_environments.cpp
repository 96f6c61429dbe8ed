// Descriptors of atomic surroundings: against sums over pairs and triplets, derivatives, laws, bad input.
#include <algorithm>
#include <cmath>

#include "minitest.hpp"
#include "thalweg/environments.hpp"
#include "thalweg/random.hpp"

using namespace thalweg;

namespace {

struct Cluster {
  std::vector<double> positions;
  std::vector<std::int32_t> numbers;
  double cell[9] = {5.5, 0, 0, 1.0, 5.8, 0, 0.3, 0.9, 6.1};
  std::uint8_t pbc[3] = {0, 0, 0};
  StructureView view() const { return {numbers.size(), positions.data(), numbers.data(), cell, pbc, nullptr}; }
};

// Three species, atoms at least 1.9 angstrom apart (images left out: short distances are no harm here).
Cluster random_cluster(std::size_t atoms, bool periodic, std::uint64_t seed) {
  Cluster out;
  Random random({seed, 3}, 0);
  while (out.numbers.size() < atoms) {
    double p[3];
    for (double& x : p) x = random.uniform(0.0, 5.0);
    bool apart = true;
    for (std::size_t i = 0; i < out.numbers.size(); ++i)
      apart &= std::hypot(p[0] - out.positions[3 * i], p[1] - out.positions[3 * i + 1],
                          p[2] - out.positions[3 * i + 2]) > 1.9;
    if (!apart) continue;
    out.positions.insert(out.positions.end(), p, p + 3);
    constexpr std::int32_t kNumbers[3] = {79, 28, 8};
    out.numbers.push_back(kNumbers[out.numbers.size() % 3]);
  }
  for (std::uint8_t& flag : out.pbc) flag = periodic;
  out.pbc[2] = 0;  // a slab
  return out;
}

Environments environments() {
  const std::int32_t species[3] = {28, 8, 79};
  return Environments(EnvironmentSettings{}, species);
}

std::vector<double> features_of(const Environments& e, const Cluster& cluster) {
  std::vector<double> out(cluster.numbers.size() * e.size());
  Environments::Workspace workspace(e);
  e.values(cluster.view(), out.data(), workspace);
  return out;
}

// The definition of environments.hpp, angle by angle, over all images within reach.
std::vector<double> by_definition(const Environments& e, const Cluster& cluster) {
  const EnvironmentSettings& s = e.settings();
  const double diameter = 2 * covalent_radius(8), pi = std::acos(-1.0);
  const auto gaussian = [&](double r, double cutoff, double start, int count, int k) {
    if (r >= cutoff) return 0.0;
    const double step = (cutoff - start) / count, z = (r - start - k * step) / (0.9 * step);
    return std::exp(-z * z / 2) * 0.5 * (1 + std::cos(pi * r / cutoff));
  };
  const std::size_t n = cluster.numbers.size();
  std::vector<double> out(n * e.size(), 0.0);
  struct Neighbour {
    std::size_t species;
    double r, d[3];
  };
  for (std::size_t i = 0; i < n; ++i) {
    std::vector<Neighbour> all;
    const int reach_a = cluster.pbc[0] ? 3 : 0, reach_b = cluster.pbc[1] ? 3 : 0;
    for (std::size_t j = 0; j < n; ++j)
      for (int a = -reach_a; a <= reach_a; ++a)
        for (int b = -reach_b; b <= reach_b; ++b) {
          Neighbour o{e.species_index(cluster.numbers[j]), 0, {}};
          for (std::size_t x = 0; x < 3; ++x)
            o.d[x] = cluster.positions[3 * j + x] + a * cluster.cell[x] + b * cluster.cell[3 + x] -
                     cluster.positions[3 * i + x];
          o.r = std::hypot(o.d[0], o.d[1], o.d[2]);
          if (o.r > 0 && o.r < s.radial_cutoff) all.push_back(o);
        }
    double* q = &out[i * e.size()];
    const double first = s.radial_start * diameter, first_angular = s.angular_start * diameter;
    for (const Neighbour& o : all)
      for (int k = 0; k < s.n_radial; ++k)
        q[o.species * static_cast<std::size_t>(s.n_radial) + static_cast<std::size_t>(k)] +=
            gaussian(o.r, s.radial_cutoff, first, s.n_radial, k);
    double* f = q + 3 * s.n_radial;
    for (std::size_t t = 0; t < 3; ++t)
      for (std::size_t u = t; u < 3; ++u)
        for (int k = 0; k < s.n_angular; ++k)
          for (int k2 = t == u ? k : 0; k2 < s.n_angular; ++k2)
            for (int l = 0; l <= s.l_max; ++l, ++f)
              for (std::size_t a = 0; a < all.size(); ++a)
                for (std::size_t b = 0; b < all.size(); ++b) {
                  if (a == b || all[a].species != t || all[b].species != u) continue;
                  double cosine = 0;
                  for (std::size_t x = 0; x < 3; ++x) cosine += all[a].d[x] * all[b].d[x];
                  cosine = std::clamp(cosine / (all[a].r * all[b].r), -1.0, 1.0);
                  *f += (t == u && k == k2 ? 0.5 : 1.0) *
                        gaussian(all[a].r, s.angular_cutoff, first_angular, s.n_angular, k) *
                        gaussian(all[b].r, s.angular_cutoff, first_angular, s.n_angular, k2) *
                        std::legendre(static_cast<unsigned>(l), cosine);
                }
  }
  return out;
}

double largest_of(const std::vector<double>& values) {
  double out = 0;
  for (const double v : values) out = std::max(out, std::abs(v));
  return out;
}

}  // namespace

TEST(values_are_the_sums_of_the_definition) {
  for (const bool periodic : {false, true}) {
    const Environments e = environments();
    const Cluster cluster = random_cluster(7, periodic, 1);
    const std::vector<double> ours = features_of(e, cluster), expected = by_definition(e, cluster);
    const double largest = largest_of(expected);
    for (std::size_t k = 0; k < ours.size(); ++k) CLOSE(ours[k], expected[k], 1e-12 * largest);
    CHECK(largest > 1.0);
  }
}

TEST(contraction_and_jacobian_are_the_derivatives) {
  for (const bool periodic : {false, true}) {
    const Environments e = environments();
    Cluster cluster = random_cluster(6, periodic, 2);
    const std::size_t n = cluster.numbers.size(), size = n * e.size();
    Random random({9, 9}, 1);
    std::vector<double> weights(size), slope(3 * n, 0.0), dense(3 * n, 0.0), scratch(size);
    for (double& w : weights) w = random.uniform(-1.0, 1.0);
    Environments::Workspace workspace(e);
    e.values(cluster.view(), scratch.data(), workspace);
    e.contract(weights.data(), 1.0, slope.data(), workspace);
    for (std::size_t i = 0; i < n; ++i) {
      std::vector<double> jacobian(3 * e.neighbors(i, workspace) * e.size());
      e.jacobian(i, jacobian.data(), workspace);
      for (std::size_t k = 0; k < e.neighbors(i, workspace); ++k)
        for (std::size_t x = 0; x < 3; ++x) {
          double sum = 0;
          for (std::size_t d = 0; d < e.size(); ++d)
            sum += jacobian[(3 * k + x) * e.size() + d] * weights[i * e.size() + d];
          dense[3 * static_cast<std::size_t>(e.neighbor_atoms(i, workspace)[k]) + x] += sum;
          dense[3 * i + x] -= sum;
        }
    }
    const double largest = largest_of(slope);
    for (std::size_t k = 0; k < 3 * n; ++k) {
      CLOSE(dense[k], slope[k], 1e-12 * largest);
      const double before = cluster.positions[k], h = 2e-4;
      double value[4];  // fourth-order differences
      for (int step = 0; step < 4; ++step) {
        cluster.positions[k] = before + h * (step < 2 ? step - 2 : step - 1);
        const std::vector<double> f = features_of(e, cluster);
        value[step] = 0;
        for (std::size_t d = 0; d < size; ++d) value[step] += weights[d] * f[d];
      }
      cluster.positions[k] = before;
      const double difference = (8 * (value[2] - value[1]) - (value[3] - value[0])) / (12 * h);
      CLOSE(slope[k], difference, 1e-8 * largest);
    }
  }
}

TEST(rotation_and_order_of_atoms_change_nothing) {
  const Environments e = environments();
  const Cluster cluster = random_cluster(8, false, 3);
  const std::vector<double> before = features_of(e, cluster);
  Cluster turned = cluster;
  const double c = std::cos(0.7), s = std::sin(0.7);
  for (std::size_t i = 0; i < 8; ++i) {  // turned about z, mirrored in x, backwards
    const double* p = &cluster.positions[3 * (7 - i)];
    turned.positions[3 * i] = -(c * p[0] - s * p[1]) + 3;
    turned.positions[3 * i + 1] = s * p[0] + c * p[1] - 2;
    turned.positions[3 * i + 2] = p[2] + 1;
    turned.numbers[i] = cluster.numbers[7 - i];
  }
  const std::vector<double> after = features_of(e, turned);
  for (std::size_t i = 0; i < 8; ++i)
    for (std::size_t d = 0; d < e.size(); ++d)
      CLOSE(after[i * e.size() + d], before[(7 - i) * e.size() + d], 1e-12 * largest_of(before));
}

TEST(bad_input_is_named) {
  const std::int32_t species[1] = {28};
  EnvironmentSettings settings;
  settings.n_radial = 0;
  THROWS(Environments(settings, species), "n_radial must be 1 to 16");
  settings = {};
  settings.angular_cutoff = 7;
  THROWS(Environments(settings, species), "angular_cutoff must not be above radial_cutoff");
  settings = {};
  settings.radial_cutoff = 1;
  THROWS(Environments(settings, species), "radial_cutoff must be above");
  THROWS(Environments(EnvironmentSettings{}, std::span<const std::int32_t>{}), "at least one species");
  const Environments e(EnvironmentSettings{}, species);
  const Cluster cluster = random_cluster(3, false, 4);
  THROWS(e.check(cluster.view()), "an atom is Au");
}

MINITEST_MAIN
