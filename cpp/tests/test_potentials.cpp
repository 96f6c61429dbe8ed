#include <algorithm>
#include <array>
#include <limits>

#include "minitest.hpp"
#include "thalweg/potentials.hpp"
#include "thalweg/random.hpp"
#include "thalweg/relax.hpp"

using namespace thalweg;

namespace {

// n structures of the same atoms at different random places, in a cell that is periodic as told.
struct Structures {
  std::vector<double> positions, cells;
  std::vector<std::int32_t> numbers;
  std::vector<std::int64_t> offsets{0};
  std::vector<std::uint8_t> pbc;

  void add(const std::vector<std::int32_t>& species, std::uint64_t seed, double edge, double closest, int periodic) {
    Random rng(Key{seed, 5}, 0);
    const double cell[9] = {edge, 0, 0, 0.2 * edge, edge, 0, -0.1 * edge, 0.15 * edge, edge};
    const std::size_t first = positions.size() / 3;
    while (positions.size() / 3 < first + species.size()) {
      const double f[3] = {rng.uniform(), rng.uniform(), rng.uniform()};
      double x[3];
      for (int k = 0; k < 3; ++k) x[k] = f[0] * cell[k] + f[1] * cell[3 + k] + f[2] * cell[6 + k];
      bool free = true;
      for (std::size_t j = first; j < positions.size() / 3; ++j)
        for (int image = 0; image < 27; ++image) {
          double square = 0;
          for (int k = 0; k < 3; ++k) {
            const double shift =
                (image % 3 - 1) * cell[k] + (image / 3 % 3 - 1) * cell[3 + k] + (image / 9 - 1) * cell[6 + k];
            square += std::pow(x[k] - positions[3 * j + static_cast<std::size_t>(k)] + shift, 2);
          }
          free &= square > closest * closest;
        }
      if (free) positions.insert(positions.end(), x, x + 3);
    }
    numbers.insert(numbers.end(), species.begin(), species.end());
    offsets.push_back(static_cast<std::int64_t>(numbers.size()));
    cells.insert(cells.end(), cell, cell + 9);
    for (int a = 0; a < 3; ++a) pbc.push_back(static_cast<std::uint8_t>(periodic >> a & 1));
  }
  BatchView view() const { return {positions, numbers, offsets, cells, pbc, {}}; }
};

struct Result {
  std::vector<double> energies, forces;
  bool operator==(const Result&) const = default;
};
Result run(const Landscape& landscape, const BatchView& batch, int threads = 1) {
  Result out{std::vector<double>(batch.size()), std::vector<double>(batch.positions.size())};
  evaluate(landscape, batch, out.energies, out.forces, threads);
  return out;
}

// Every pair of the species below with numbers of its own, and exponents from the square root to beyond pair wells.
ManyBodyPrior every_pair() {
  std::vector<ManyBodyPrior::Pair> pairs;
  std::vector<ManyBodyPrior::Atom> atoms;
  const std::int32_t species[] = {79, 1, 8, 13, 28, 29, 46, 47, 78};
  for (const std::int32_t a : species) {
    atoms.push_back({a, 0.4 + 0.1 * (a % 8)});
    for (const std::int32_t b : species)
      if (a <= b)
        pairs.push_back({b, a, 0.3 + 0.01 * (a % 7),
                         (0.9 + 0.001 * (b % 11)) * (covalent_radius(a) + covalent_radius(b)), 3.0 + 0.1 * (a + b) / 10,
                         1.5 + 0.1 * (b % 9)});
  }
  return ManyBodyPrior(pairs, atoms);
}

// Every triplet of the species below with numbers of its own; bonds of metals, all parts of the formula at work.
std::vector<Tersoff::Entry> every_triplet() {
  std::vector<Tersoff::Entry> entries;
  const std::int32_t species[] = {1, 8, 13, 28, 29, 46, 47, 78, 79};
  for (const std::int32_t a : species)
    for (const std::int32_t b : species)
      for (const std::int32_t c : species)
        entries.push_back({c, a, b, (a + b + c) % 2 ? 1.0 : 3.0, 0.9 + 0.01 * (a % 5), 0.1 * (b % 4), 30.0 + a % 7, 5.0,
                           -0.5 + 0.01 * (c % 11), 0.7 + 0.02 * (b % 9), 0.02, 1.4 + 0.01 * (a % 6), 100.0 + c,
                           2.8 + 0.02 * (a % 3), 0.3 + 0.01 * (b % 3), 2.2, 500.0 + a});
  return entries;
}

std::vector<std::unique_ptr<Landscape>> landscapes() {
  std::vector<std::unique_ptr<Landscape>> out;
  out.push_back(std::make_unique<Emt>());
  out.push_back(std::make_unique<LennardJones>(LennardJones::Settings{2.4, 0.7, 0, 0, true}));
  out.push_back(std::make_unique<PairPrior>(PairPrior::Settings{}));
  PairPrior::Settings repulsive;
  repulsive.form = PairPrior::Form::repulsive;
  out.push_back(std::make_unique<PairPrior>(repulsive));
  out.push_back(std::make_unique<ManyBodyPrior>(every_pair()));
  out.push_back(std::make_unique<Tersoff>(every_triplet()));
  return out;
}

const std::vector<std::int32_t> kAu4Ni4 = {79, 79, 79, 79, 28, 28, 28, 28};

Structures mixture() {
  Structures s;
  s.add(kAu4Ni4, 1, 6.0, 2.1, 0);
  s.add({79, 13, 8, 1, 1, 47}, 2, 5.0, 1.2, 7);
  s.add({29, 29, 29, 78}, 3, 4.2, 2.0, 3);
  s.add({46}, 4, 3.9, 2.0, 7);
  s.add(std::vector<std::int32_t>(110, 28), 5, 14.0, 1.9, 0);
  return s;
}

}  // namespace

TEST(emt_energies_are_relative_to_the_bulk) {
  Structures copper;
  const double a = 3.59;
  copper.numbers = {29};
  copper.offsets = {0, 1};
  copper.positions = {0.1, 0.2, 0.3};
  copper.cells = {0, a / 2, a / 2, a / 2, 0, a / 2, a / 2, a / 2, 0};
  copper.pbc = {1, 1, 1};
  // zero for the perfect crystal, up to what lies between the three shells of gamma and the cutoff
  CLOSE(run(Emt(), copper.view()).energies[0], 0.0, 0.01);
  copper.pbc = {0, 0, 0};
  CLOSE(run(Emt(), copper.view()).energies[0], 3.51, 1e-12);
}

TEST(lennard_jones_equals_its_formula_with_and_without_a_list) {
  for (const std::size_t n : {2ul, 5ul, 8ul, 13ul, 38ul, 99ul, 100ul, 101ul, 120ul}) {
    Structures s;
    s.add(std::vector<std::int32_t>(n, 18), n, 1.1 * std::cbrt(static_cast<double>(n)), 0.7, 0);
    for (const bool smooth : {false, true}) {
      const double rc2 = 2.2 * 2.2, ro2 = 1.7 * 1.7;
      double expected = 0, largest = 0;
      for (std::size_t i = 0; i < n; ++i)
        for (std::size_t j = 0; j < i; ++j) {
          double r2 = 0;
          for (std::size_t k = 0; k < 3; ++k) r2 += std::pow(s.positions[3 * i + k] - s.positions[3 * j + k], 2);
          if (r2 > rc2) continue;
          const double cut = r2 < ro2 ? 1 : std::pow(rc2 - r2, 2) * (rc2 + 2 * r2 - 3 * ro2) / std::pow(rc2 - ro2, 3);
          const double pair = 4 * (std::pow(r2, -6) - std::pow(r2, -3));
          const double shift = 4 * (std::pow(rc2, -6) - std::pow(rc2, -3));
          expected += smooth ? pair * cut : pair - shift;
          largest += std::abs(pair);
        }
      const LennardJones lj({1.0, 1.0, 2.2, 1.7, smooth});
      CLOSE(run(lj, s.view()).energies[0], expected, 1e-13 * largest + 1e-13);
    }
  }
}

TEST(forces_are_the_derivative_of_the_energy) {
  for (const auto& landscape : landscapes()) {
    Structures s = mixture();
    const Result at = run(*landscape, s.view());
    Random rng(Key{8, 8}, 0);
    std::vector<double> direction(s.positions.size());
    for (double& u : direction) u = rng.uniform(-1, 1);
    const std::vector<double> start = s.positions;
    const auto energies = [&](double step) {
      for (std::size_t k = 0; k < start.size(); ++k) s.positions[k] = start[k] + step * direction[k];
      return run(*landscape, s.view()).energies;
    };
    const double h = 2e-4;
    const auto e1 = energies(h), e2 = energies(-h), e3 = energies(2 * h), e4 = energies(-2 * h);
    for (std::size_t row = 0; row < at.energies.size(); ++row) {
      double analytic = 0, largest = 1;
      for (std::size_t k = 3 * static_cast<std::size_t>(s.offsets[row]);
           k < 3 * static_cast<std::size_t>(s.offsets[row + 1]); ++k) {
        analytic -= at.forces[k] * direction[k];
        largest = std::max(largest, std::abs(at.forces[k]));
      }
      const double numerical = (4 * (e1[row] - e2[row]) / (2 * h) - (e3[row] - e4[row]) / (4 * h)) / 3;
      CLOSE(analytic, numerical, 1e-8 * largest * std::sqrt(static_cast<double>(s.offsets[row + 1] - s.offsets[row])));
    }
  }
}

namespace {

// The formula in potentials.hpp for an open cluster, with the switch of potentials_kernels.hpp in each sum.
double many_body_formula(const ManyBodyPrior& prior, const Structures& s) {
  double longest = 0;
  for (const ManyBodyPrior::Pair& pair : prior.pairs()) longest = std::max(longest, pair.r0);
  double energy = 0;
  for (std::size_t i = 0; i < s.numbers.size(); ++i) {
    double g = 0, repulsion = 0, density = 0;
    for (const ManyBodyPrior::Atom& atom : prior.atoms())
      if (atom.number == s.numbers[i]) g = atom.exponent;
    for (std::size_t j = 0; j < s.numbers.size(); ++j) {
      if (i == j) continue;
      double square = 0;
      for (std::size_t k = 0; k < 3; ++k) square += std::pow(s.positions[3 * i + k] - s.positions[3 * j + k], 2);
      const double r = std::sqrt(square), w = 1 / (1 + std::exp(11.5 * (r - 2.2 * longest) / (0.6 * longest)));
      if (r > 2.8 * longest) continue;
      const double wall = 0.75 * (covalent_radius(s.numbers[i]) + covalent_radius(s.numbers[j]));
      if (r < wall) repulsion += 0.5 * 1250.0 * std::pow(1 - r / wall, 3);
      for (const ManyBodyPrior::Pair& pair : prior.pairs()) {
        if (std::minmax(pair.first, pair.second) != std::minmax(s.numbers[i], s.numbers[j])) continue;
        const double q = pair.stiffness, p = pair.ratio * q, x = r / pair.r0 - 1;
        repulsion += w * 0.5 * pair.depth * q / (p - q) * std::exp(-p * x);
        density += w * std::pow(0.5 * pair.depth * p / (p - q) * std::exp(-q * x), 1 / g);
      }
    }
    energy += repulsion - std::pow(6.0, 1 - g) * std::pow(density, g);
  }
  return energy;
}

// Gold and nickel of one exponent; the pairs differ.
ManyBodyPrior gold_nickel(double exponent, double ratio) {
  return ManyBodyPrior({{79, 79, 0.7, 2.8, 4.2, ratio}, {79, 28, 0.6, 2.6, 4.5, ratio}, {28, 28, 0.9, 2.4, 3.9, ratio}},
                       {{28, exponent}, {79, exponent}});
}

}  // namespace

TEST(many_body_prior_equals_its_formula) {
  for (const std::size_t n : {1ul, 2ul, 3ul, 8ul, 30ul}) {
    Structures s;
    std::vector<std::int32_t> species;
    for (std::size_t k = 0; k < n; ++k) species.push_back(std::array{79, 28, 28}[k % 3]);
    s.add(species, n, 2.6 * std::cbrt(static_cast<double>(n)) + 1, 1.8, 0);
    for (const double exponent : {0.14, 0.5, 0.7, 1.0, 1.3})
      for (const double ratio : {1.2, 2.0, 3.5}) {
        const ManyBodyPrior prior = gold_nickel(exponent, ratio);
        const double expected = many_body_formula(prior, s);
        CHECK(n == 1 ? expected == 0 : std::abs(expected) > 1e-3);
        CLOSE(run(prior, s.view()).energies[0], expected, 1e-11 * std::max(1.0, std::abs(expected)));
      }
    // species of different exponents
    const ManyBodyPrior mixed(gold_nickel(0.5, 2.0).pairs(), {{79, 0.5}, {28, 0.9}});
    const double expected = many_body_formula(mixed, s);
    CLOSE(run(mixed, s.view()).energies[0], expected, 1e-11 * std::max(1.0, std::abs(expected)));
  }
}

TEST(many_body_prior_of_exponent_one_and_ratio_two_is_morse) {
  const double depth = 0.7, r0 = 2.8, q = 4.2;
  const ManyBodyPrior prior({{79, 79, depth, r0, q, 2.0}}, {{79, 1.0}});
  Structures s;
  s.numbers = {79, 79, 79};
  s.offsets = {0, 3};
  s.cells.assign(9, 0.0);
  s.pbc = {0, 0, 0};
  for (const double r : {2.1, 2.4, 2.8, 3.1}) {  // 2.04: the wall
    s.positions = {0, 0, 0, r, 0, 0, 0, 40, 0};
    const double u = std::exp(-q * (r / r0 - 1));
    CLOSE(run(prior, s.view()).energies[0], depth * (u * u - 2 * u), 1e-8);  // of the switch 1e-10 is left at r0
  }
  // a bond more or less changes nothing about another
  s.positions = {0, 0, 0, 2.8, 0, 0, 0, 2.8, 0};
  const double u = std::exp(-q * (std::sqrt(2.0) - 1));
  CLOSE(run(prior, s.view()).energies[0], -2 * depth + depth * (u * u - 2 * u), 1e-6);
}

TEST(six_neighbours_at_r0_are_an_equilibrium_of_the_same_energy_for_every_exponent) {
  // the neighbours do not bind each other, and share their bond with the middle as in a pair well
  const double depth = 0.8, r0 = 2.6;
  Structures s;
  s.numbers = {79, 28, 28, 28, 28, 28, 28};
  s.offsets = {0, 7};
  s.cells.assign(9, 0.0);
  s.pbc = {0, 0, 0};
  s.positions.assign(21, 0.0);
  for (std::size_t k = 0; k < 6; ++k) s.positions[3 * (k + 1) + k / 2] = k % 2 ? r0 : -r0;
  for (const double exponent : {0.3, 0.5, 0.7, 1.0, 1.4})
    for (const double ratio : {1.3, 2.0, 3.0}) {
      const ManyBodyPrior prior(
          {{79, 79, 0.5, 2.6, 4.0, 2.0}, {79, 28, depth, r0, 4.0, ratio}, {28, 28, 0.0, 2.6, 4.0, 2.0}},
          {{79, exponent}, {28, 1.0}});
      const Result at = run(prior, s.view());
      CLOSE(at.energies[0] + 6 * 0.5 * depth, -3 * depth, 1e-8);
      for (const double f : at.forces) CLOSE(f, 0.0, 1e-7);
    }
}

TEST(many_body_prior_ends_smoothly_at_its_cutoff) {
  // An atom that leaves: nothing is left of the energy where the list ends; the force is smooth on the way.
  for (const double exponent : {0.5, 0.7, 1.0}) {
    const ManyBodyPrior prior = gold_nickel(exponent, 2.0);
    Structures s;
    s.numbers = {79, 79, 28};
    s.offsets = {0, 3};
    s.cells.assign(9, 0.0);
    s.pbc = {0, 0, 0};
    const auto at = [&](double r) {
      s.positions = {0, 0, 0, 0, 2.7, 0, r, 0, 0};
      return run(prior, s.view());
    };
    const double end = 2.8 * 2.8, bound = at(20.0).energies[0];
    const Result below = at(end - 1e-9), above = at(end + 1e-9);
    CLOSE(below.energies[0], above.energies[0], 1e-5);
    for (std::size_t k = 0; k < 9; ++k) CLOSE(below.forces[k], above.forces[k], 1e-4);
    CLOSE(above.energies[0], bound, 1e-5);
    double before = at(2.0).forces[6];
    for (double r = 2.001; r < end - 0.01; r += 0.001) {
      const double force = at(r).forces[6];
      CHECK(std::abs(force - before) < 0.001 * 60);  // a curvature, not a jump
      before = force;
    }
  }
}

TEST(many_body_prior_refuses_what_makes_no_sense) {
  const Structures s = mixture();
  using Pairs = std::vector<ManyBodyPrior::Pair>;
  using Atoms = std::vector<ManyBodyPrior::Atom>;
  const Atoms both = {{79, 0.5}, {28, 0.6}};
  const auto made = [&](Pairs pairs) { return ManyBodyPrior(std::move(pairs), both); };
  const double nan = std::nan(""), infinite = std::numeric_limits<double>::infinity();
  THROWS(run(made({{79, 79, 0.8, 2.7, 4.0, 2.0}}), s.view()), "ManyBodyPrior has no entry for the pair Ni-Ni");
  THROWS(run(made({{79, 79, 0.8, 2.7, 4.0, 2.0}}), s.view(), 3), "ManyBodyPrior has no entry for the pair");
  THROWS(made({{79, 28, 0.8, 2.7, 4.0, 2.0}, {28, 79, 0.8, 2.7, 4.0, 2.0}}), "Ni-Au comes twice");
  THROWS(ManyBodyPrior({}, {{79, 0.5}, {28, 0.5}, {79, 0.6}}), "Au comes twice");
  THROWS(made({{79, 29, 0.8, 2.7, 4.0, 2.0}}), "no exponent for Cu, which is in a pair");
  THROWS(made({{79, 28, -0.8, 2.7, 4.0, 2.0}}), "depth of at least 0");
  THROWS(made({{79, 28, nan, 2.7, 4.0, 2.0}}), "depth");
  THROWS(made({{79, 28, 0.8, 0.0, 4.0, 2.0}}), "r0");
  THROWS(made({{79, 28, 0.8, nan, 4.0, 2.0}}), "r0");
  THROWS(made({{79, 28, 0.8, 2.7, nan, 2.0}}), "stiffness");
  for (const double ratio : {1.0, 0.5, nan, infinite})
    THROWS(made({{79, 28, 0.8, 2.7, 4.0, ratio}}), "ratio above 1, but it is");
  for (const double exponent : {0.0, -1.0, nan, infinite}) THROWS(ManyBodyPrior({}, {{79, exponent}}), "exponent");
  THROWS(ManyBodyPrior({}, {{400, 0.5}}), "400");
  // in rising order, whatever the order they came in
  const ManyBodyPrior sorted = made({{79, 28, 0.8, 2.7, 4.0, 2.0}, {28, 28, 0.7, 2.4, 4.0, 2.0}});
  CHECK(sorted.pairs()[0].second == 28 && sorted.pairs()[1].first == 28 && sorted.pairs()[1].second == 79);
  CHECK(sorted.atoms()[0].number == 28 && sorted.atoms()[1].exponent == 0.5);
}

TEST(tilted_adds_a_linear_function) {
  const Structures s = mixture();
  Random rng(Key{3, 3}, 0);
  std::vector<double> shift(s.positions.size());
  for (double& x : shift) x = rng.uniform(-2, 2);
  for (auto& landscape : landscapes()) {
    const Result plain = run(*landscape, s.view());
    const std::shared_ptr<const Landscape> inner = std::move(landscape);
    const Tilted tilted(inner, shift);
    const Result at = run(tilted, s.view());
    for (std::size_t row = 0; row < plain.energies.size(); ++row) {
      double sum = plain.energies[row], size = std::abs(sum) + 1;
      for (std::size_t k = 3 * static_cast<std::size_t>(s.offsets[row]);
           k < 3 * static_cast<std::size_t>(s.offsets[row + 1]); ++k) {
        sum += shift[k] * s.positions[k];
        size += std::abs(shift[k] * s.positions[k]);
        CHECK(at.forces[k] == plain.forces[k] - shift[k]);
      }
      CLOSE(at.energies[row], sum, 1e-14 * size);
    }
    CHECK(run(tilted, s.view(), 3) == at);
    CHECK(run(Tilted(inner, std::vector<double>(shift.size(), 0.0)), s.view()) == plain);
    // an evaluator of some rows leaves the others alone
    Result some{std::vector<double>(5, 7.0), std::vector<double>(s.positions.size(), 7.0)};
    const std::int64_t rows[] = {3, 1};
    tilted.evaluator(s.view())->evaluate(rows, s.positions.data(), some.energies.data(), some.forces.data());
    for (std::size_t row = 0; row < 5; ++row)
      CHECK(some.energies[row] == (row == 1 || row == 3 ? at.energies[row] : 7.0));
  }
}

TEST(tilted_is_relaxed_to_where_the_forces_are_the_shift) {
  Structures s;
  for (const double r : {2.2, 2.9, 3.0}) {
    s.positions.insert(s.positions.end(), {0, 0, 0, r, 0, 0});
    s.numbers.insert(s.numbers.end(), {79, 79});
    s.offsets.push_back(static_cast<std::int64_t>(s.numbers.size()));
    s.cells.insert(s.cells.end(), 9, 0.0);
    s.pbc.insert(s.pbc.end(), 3, 0);
  }
  const std::vector<double> shift = {-0.2, 0, 0, 0.2, 0, 0, 0.3, 0, 0, -0.3, 0, 0, 0, 0, 0, 0, 0, 0};
  const auto inner = std::make_shared<PairPrior>(PairPrior::Settings{});
  const Tilted tilted(inner, shift);
  RelaxSettings settings;
  settings.steps = 200;
  settings.force_tolerance = 1e-6;
  const RelaxResult found = relax(tilted, s.view(), settings, {}, 1);
  CHECK(relax(tilted, s.view(), settings, {}, 3).positions == found.positions);
  s.positions = found.positions;
  const Result at = run(*inner, s.view());
  for (std::size_t row = 0; row < 3; ++row) CHECK(found.converged[row]);
  for (std::size_t k = 0; k < shift.size(); ++k) CLOSE(at.forces[k], shift[k], 2e-6);
}

TEST(tilted_refuses_what_does_not_fit) {
  const Structures s = mixture();
  const auto inner = std::make_shared<PairPrior>(PairPrior::Settings{});
  THROWS(run(Tilted(inner, std::vector<double>(9, 0.0)), s.view()), "batches of 3 atoms, but this one has");
  THROWS(run(Tilted(inner, std::vector<double>(s.positions.size() + 3, 0.0)), s.view(), 2), "Tilted is for batches of");
  THROWS(Tilted(nullptr, {}), "needs a landscape");
  THROWS(Tilted(inner, {0.0, std::nan(""), 0.0}), "finite shift");
}

namespace {

// The formula in potentials.hpp for an open cluster, triplet by triplet.
double tersoff_formula(const std::vector<Tersoff::Entry>& entries, const Structures& s) {
  const auto entry = [&](std::size_t i, std::size_t j, std::size_t k) {
    for (const Tersoff::Entry& e : entries)
      if (e.first == s.numbers[i] && e.second == s.numbers[j] && e.third == s.numbers[k]) return e;
    return Tersoff::Entry{};
  };
  const auto dot = [&](std::size_t i, std::size_t j, std::size_t k) {
    double sum = 0;
    for (std::size_t x = 0; x < 3; ++x)
      sum += (s.positions[3 * j + x] - s.positions[3 * i + x]) * (s.positions[3 * k + x] - s.positions[3 * i + x]);
    return sum;
  };
  const auto cut = [](double r, const Tersoff::Entry& e) {
    return r < e.R - e.D ? 1 : r > e.R + e.D ? 0 : 0.5 - 0.5 * std::sin(M_PI * (r - e.R) / (2 * e.D));
  };
  double energy = 0;
  for (std::size_t i = 0; i < s.numbers.size(); ++i)
    for (std::size_t j = 0; j < s.numbers.size(); ++j) {
      if (i == j) continue;
      const Tersoff::Entry e = entry(i, j, j);
      const double r = std::sqrt(dot(i, j, j));
      double zeta = 0;
      for (std::size_t k = 0; k < s.numbers.size(); ++k) {
        if (k == i || k == j) continue;
        const Tersoff::Entry t = entry(i, j, k);
        const double rk = std::sqrt(dot(i, k, k)), x = t.h - dot(i, j, k) / (r * rk);
        zeta += cut(rk, t) * t.gamma * (1 + t.c * t.c / (t.d * t.d) - t.c * t.c / (t.d * t.d + x * x)) *
                std::exp(std::pow(t.lambda3 * (r - rk), t.m));
      }
      const double order = std::pow(1 + std::pow(e.beta * zeta, e.n), -1 / (2 * e.n));
      energy += 0.5 * cut(r, e) * (e.A * std::exp(-e.lambda1 * r) - order * e.B * std::exp(-e.lambda2 * r));
    }
  return energy;
}

}  // namespace

TEST(tersoff_equals_its_formula) {
  for (const std::size_t n : {1ul, 2ul, 3ul, 9ul, 30ul}) {
    const double edge = 1.9 * std::cbrt(static_cast<double>(n)) + 0.5;
    Structures metals, carbon, nitride;
    std::vector<std::int32_t> species;
    for (std::size_t k = 0; k < n; ++k) species.push_back(std::array{79, 28, 13, 8}[k % 4]);
    metals.add(species, n, edge, 1.2, 0);
    carbon.add(std::vector<std::int32_t>(n, 6), n, edge, 1.1, 0);
    for (std::size_t k = 0; k < n; ++k) species[k] = std::array{5, 7, 6}[k % 3];
    nitride.add(species, n, edge, 1.1, 0);
    const auto check = [](const std::vector<Tersoff::Entry>& entries, const Structures& s) {
      const double expected = tersoff_formula(entries, s);
      CLOSE(run(Tersoff(entries), s.view()).energies[0], expected, 1e-11 * std::max(1.0, std::abs(expected)));
    };
    check(every_triplet(), metals);
    check(Tersoff::published("C"), carbon);
    check(Tersoff::published("C-2010"), carbon);
    check(Tersoff::published("BNC"), nitride);
  }
}

TEST(tersoff_sheets_have_their_known_energies) {
  const auto sheet = [](const char* name, std::int32_t one, std::int32_t other, double bond) {
    Structures s;
    s.numbers = {one, other};
    s.offsets = {0, 2};
    s.positions = {0, 0, 0, bond, 0, 0};
    s.cells = {1.5 * bond, std::sqrt(0.75) * bond, 0, 1.5 * bond, -std::sqrt(0.75) * bond, 0, 0, 0, 12};
    s.pbc = {1, 1, 0};
    return run(Tersoff(Tersoff::published(name)), s.view()).energies[0] / 2;
  };
  // eV/atom, angstrom; hBN as Los et al. give it
  const struct {
    const char* name;
    std::int32_t one, other;
    double energy, bond;
  } cases[] = {{"C", 6, 6, -7.3955, 1.4605},
               {"C-2010", 6, 6, -7.9777, 1.4388},
               {"BN", 5, 7, -6.6900, 1.4457},
               {"BNC", 5, 7, -7.5069, 1.4421}};
  for (const auto& c : cases) {
    CLOSE(sheet(c.name, c.one, c.other, c.bond), c.energy, 1e-4);
    CHECK(sheet(c.name, c.one, c.other, c.bond - 1e-3) > sheet(c.name, c.one, c.other, c.bond));
    CHECK(sheet(c.name, c.one, c.other, c.bond + 1e-3) > sheet(c.name, c.one, c.other, c.bond));
  }
}

TEST(tersoff_ends_smoothly_at_its_cutoff) {
  // an atom that leaves a trimer: energy and force have no jump; the force changes like distance^0.455 (2n - 1)
  for (const double angle : {0.6, 1.1, 2.1}) {
    Structures s;
    s.add({6, 6, 6}, 1, 4.0, 0.5, 0);
    const Tersoff carbon(Tersoff::published("C"));
    const auto at = [&](double r) {
      s.positions = {0, 0, 0, 1.45, 0, 0, r * std::cos(angle), r * std::sin(angle), 0};
      return run(carbon, s.view());
    };
    for (const double end : {1.8, 2.1}) {
      const Result below = at(end - 1e-13), above = at(end + 1e-13);
      CLOSE(below.energies[0], above.energies[0], 1e-10);
      for (std::size_t k = 0; k < 9; ++k) CLOSE(below.forces[k], above.forces[k], 1e-3);
    }
  }
  Structures gone;
  gone.add({6, 6, 6}, 1, 4.0, 0.5, 0);
  gone.positions = {0, 0, 0, 1.45, 0, 0, -2.1, 0, 0};
  for (std::size_t k = 6; k < 9; ++k) CHECK(run(Tersoff(Tersoff::published("C")), gone.view()).forces[k] == 0.0);
}

TEST(tersoff_refuses_what_makes_no_sense) {
  const Structures s = mixture();
  THROWS(run(Tersoff(Tersoff::published("C")), s.view()), "Tersoff has no entry for");
  THROWS(Tersoff::published("D"), "it knows 'C', 'C-2010', 'BN', 'BNC'");
  THROWS(Tersoff({}), "there is no entry");
  const auto with = [](auto change) {
    std::vector<Tersoff::Entry> entries = Tersoff::published("C");
    change(entries[0]);
    return entries;
  };
  THROWS(Tersoff(with([](Tersoff::Entry& e) { e.m = 2; })), "m = 1 or m = 3");
  THROWS(Tersoff(with([](Tersoff::Entry& e) { e.d = 0; })), "Tersoff C-C-C needs a positive, finite d");
  THROWS(Tersoff(with([](Tersoff::Entry& e) { e.n = 0; })), "n");
  THROWS(Tersoff(with([](Tersoff::Entry& e) { e.h = std::nan(""); })), "finite h");
  THROWS(Tersoff(with([](Tersoff::Entry& e) { e.D = 2.5; })), "D <= R");
  THROWS(Tersoff(with([](Tersoff::Entry& e) { e.A = -1; })), "A of at least 0");
  std::vector<Tersoff::Entry> twice = Tersoff::published("C");
  twice.push_back(twice[0]);
  THROWS(Tersoff(twice), "comes twice");
}

TEST(tersoff_atoms_on_one_point_are_not_a_number_in_their_row_alone) {
  Structures s;
  for (std::uint64_t seed = 1; seed < 4; ++seed) s.add({6, 6, 6, 6}, seed, 4.0, 1.2, seed == 3 ? 7 : 0);
  const Tersoff carbon(Tersoff::published("C"));
  const Result before = run(carbon, s.view());
  std::copy_n(s.positions.begin() + 12, 3, s.positions.begin() + 15);
  const Result after = run(carbon, s.view());
  CHECK(std::isnan(after.energies[1]));
  for (std::size_t k = 0; k < 36; ++k)
    CHECK(k >= 12 && k < 24 ? std::isnan(after.forces[k]) : after.forces[k] == before.forces[k]);
  CHECK(after.energies[0] == before.energies[0] && after.energies[2] == before.energies[2]);
}

TEST(rows_do_not_depend_on_threads_or_company_or_history) {
  const Structures s = mixture();
  Structures many;
  for (int k = 0; k < 6; ++k) {
    many.positions.insert(many.positions.end(), s.positions.begin(), s.positions.end());
    many.numbers.insert(many.numbers.end(), s.numbers.begin(), s.numbers.end());
    many.cells.insert(many.cells.end(), s.cells.begin(), s.cells.end());
    many.pbc.insert(many.pbc.end(), s.pbc.begin(), s.pbc.end());
    for (std::size_t row = 1; row < s.offsets.size(); ++row)
      many.offsets.push_back(s.offsets[row] + static_cast<std::int64_t>(k) * s.offsets.back());
  }
  for (const auto& landscape : landscapes()) {
    const Result one = run(*landscape, many.view(), 1);
    CHECK(run(*landscape, many.view(), 2) == one);
    CHECK(run(*landscape, many.view(), 5) == one);
    const Result few = run(*landscape, s.view(), 1);
    CHECK(std::equal(few.energies.begin(), few.energies.end(), one.energies.begin()));
    CHECK(std::equal(few.forces.begin(), few.forces.end(), one.forces.begin() + few.forces.size()));

    // an evaluator that has followed the structures gives what a fresh one gives
    const auto evaluator = landscape->evaluator(s.view());
    Structures moved = s;
    Random rng(Key{2, 2}, 0);
    Result kept{std::vector<double>(s.offsets.size() - 1), std::vector<double>(s.positions.size())};
    for (int step = 0; step < 5; ++step) {
      for (double& x : moved.positions) x += rng.uniform(-0.05, 0.05);
      const std::int64_t odd[] = {3, 1}, even[] = {0, 2, 4};
      evaluator->evaluate(odd, moved.positions.data(), kept.energies.data(), kept.forces.data());
      evaluator->evaluate(even, moved.positions.data(), kept.energies.data(), kept.forces.data());
      CHECK(kept == run(*landscape, moved.view()));
    }
  }
}

TEST(every_instruction_set_agrees) {
  const Structures s = mixture();
  const std::string best = active_isa();
  for (const auto& landscape : landscapes()) {
    force_isa(best.c_str());
    const Result reference = run(*landscape, s.view());
    for (const char* name : {"x86-64-v2", "x86-64-v3", "x86-64-v4"}) {
      if (!force_isa(name)) continue;
      const Result other = run(*landscape, s.view());
      double largest = 1;
      for (const double f : reference.forces) largest = std::max(largest, std::abs(f));
      for (std::size_t row = 0; row < reference.energies.size(); ++row)
        CLOSE(other.energies[row], reference.energies[row], 1e-12 * std::max(1.0, std::abs(reference.energies[row])));
      for (std::size_t k = 0; k < reference.forces.size(); ++k)
        CLOSE(other.forces[k], reference.forces[k], 1e-12 * largest);
    }
  }
  force_isa(best.c_str());
}

TEST(senseless_positions_and_coinciding_atoms_are_not_finite) {
  for (const auto& landscape : landscapes())
    for (const double bad : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(), 1e30}) {
      Structures s = mixture();
      s.positions[4] = bad;
      s.positions[30] = bad;
      const Result r = run(*landscape, s.view(), 2);
      CHECK(std::isnan(r.energies[0]) && std::isnan(r.energies[1]) && std::isfinite(r.energies[2]));
      CHECK(std::isnan(r.forces[0]) && std::isnan(r.forces[3]));
    }
  Structures same;
  same.add({18, 18, 18}, 1, 3.0, 0.5, 0);
  std::copy_n(same.positions.begin(), 3, same.positions.begin() + 3);
  CHECK(!std::isfinite(run(LennardJones({}), same.view()).energies[0]));
  same.pbc = {1, 1, 1};
  CHECK(!std::isfinite(run(LennardJones({}), same.view()).energies[0]));
}

TEST(bad_input_is_refused) {
  Structures iron;
  iron.add({26, 79}, 1, 5.0, 1.0, 0);
  THROWS(run(Emt(), iron.view()), "no parameters for Fe (atomic number 26); it knows Al, Cu");
  THROWS(run(Emt(), iron.view(), 4), "no parameters for Fe");
  Structures s = mixture();
  std::vector<double> energies(2), forces(s.positions.size());
  THROWS(evaluate(Emt(), s.view(), energies, forces), "energies must hold 5");
  energies.resize(5);
  THROWS(evaluate(Emt(), s.view(), energies, std::span(forces).first(6)), "forces must hold");
  THROWS(evaluate(Emt(), s.view(), energies, forces, -1), "threads");
  std::fill_n(s.cells.begin() + 9, 3, 0.0);
  for (const auto& landscape : landscapes()) THROWS(landscape->evaluator(s.view()), "direction 0 is periodic");
  THROWS(LennardJones({0.0, 1.0, 0, 0, false}), "sigma");
  THROWS(LennardJones({1.0, 1.0, 2.0, 3.0, true}), "ro < rc");
  PairPrior::Settings settings;
  settings.depth = -1;
  THROWS(PairPrior(settings), "depth");
}

MINITEST_MAIN
