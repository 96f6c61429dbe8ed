// The GP as a landscape: derivatives through features and prior, and bits that depend on nothing but the structure.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <ctime>

#include "minitest.hpp"
#include "thalweg/potentials.hpp"
#include "thalweg/random.hpp"
#include "thalweg/surrogate.hpp"

using namespace thalweg;

namespace {

// Structures of one composition, as arrays that a BatchView can look at.
struct Structures {
  std::vector<double> positions, cells;
  std::vector<std::int32_t> numbers;
  std::vector<std::int64_t> offsets{0};
  std::vector<std::uint8_t> pbc;
  BatchView view() const { return {positions, numbers, offsets, cells, pbc, {}}; }
};

// Atoms at least 2 angstrom apart (images included where periodic), like Au and Ni in a box.
Structures random_structures(std::size_t count, std::size_t atoms, bool periodic, std::uint64_t seed) {
  Structures out;
  const double edge = periodic ? 7.0 : 5.5, cell_edge = periodic ? 7.0 : 12.0;
  for (std::size_t k = 0; k < count; ++k) {
    Random random({seed, 11}, k);
    const double shear = periodic ? 1.0 : 0.0;
    const double cell[9] = {cell_edge, 0, 0, shear, cell_edge, 0, 0, shear, cell_edge};
    out.cells.insert(out.cells.end(), cell, cell + 9);
    std::vector<double> x;
    while (x.size() < 3 * atoms) {
      double s[3], p[3];
      for (double& v : s) v = random.uniform();
      for (int d = 0; d < 3; ++d)
        p[d] = periodic ? s[0] * cell[d] + s[1] * cell[3 + d] + s[2] * cell[6 + d] : 3 + edge * s[d];
      bool apart = true;
      for (std::size_t i = 0; i < x.size() && apart; i += 3)
        for (int a = -1; a <= 1; ++a)
          for (int b = -1; b <= 1; ++b)
            for (int c = -1; c <= 1; ++c) {
              if (!periodic && (a || b || c)) continue;
              double r2 = 0;
              for (int d = 0; d < 3; ++d) {
                const double delta =
                    x[i + static_cast<std::size_t>(d)] - p[d] + a * cell[d] + b * cell[3 + d] + c * cell[6 + d];
                r2 += delta * delta;
              }
              apart &= r2 > 4.0;
            }
      if (apart) x.insert(x.end(), p, p + 3);
    }
    out.positions.insert(out.positions.end(), x.begin(), x.end());
    for (std::size_t i = 0; i < atoms; ++i) out.numbers.push_back(i < atoms / 2 ? 28 : 79);
    out.offsets.push_back(static_cast<std::int64_t>(out.numbers.size()));
    for (int d = 0; d < 3; ++d) out.pbc.push_back(periodic);
  }
  return out;
}

struct Model {
  std::shared_ptr<Fingerprint> fingerprint;
  std::shared_ptr<Gpr> gpr;
  std::shared_ptr<const Landscape> prior;
  Surrogate surrogate(double kappa, bool with_prior = true) const {
    return Surrogate(fingerprint, gpr, with_prior ? prior : nullptr, {{28, -1.5}, {79, 0.25}}, kappa);
  }
};

// A GP trained on EMT energies minus the prior.
Model trained(std::size_t n, std::size_t atoms, bool periodic, std::uint64_t seed) {
  const Structures data = random_structures(n, atoms, periodic, seed);
  const BatchView batch = data.view();
  Model model;
  model.prior = std::make_shared<PairPrior>(PairPrior::Settings{});
  model.fingerprint =
      std::make_shared<Fingerprint>(FingerprintSettings{}, std::span(data.numbers).first(atoms), periodic);
  const std::size_t dimension = model.fingerprint->size();
  std::vector<double> features(n * dimension), energies(n), prior(n), forces(data.positions.size());
  Fingerprint::Workspace workspace(*model.fingerprint);
  for (std::size_t i = 0; i < n; ++i) model.fingerprint->values(batch[i], &features[i * dimension], workspace);
  evaluate(Emt(), batch, energies, forces, 1);
  evaluate(*model.prior, batch, prior, forces, 1);
  for (std::size_t i = 0; i < n; ++i) energies[i] -= prior[i];
  double distance = 0;
  for (std::size_t i = 1; i < n; ++i)
    for (std::size_t d = 0; d < dimension; ++d) distance += std::pow(features[i * dimension + d] - features[d], 2);
  distance = std::sqrt(distance / static_cast<double>(n - 1));
  Kernel kernel;
  kernel.length_long = distance, kernel.length_short = 0.2 * distance;
  model.gpr = std::make_shared<Gpr>(dimension, kernel);
  model.gpr->fit(features, energies);
  return model;
}

// Of this thread: the machine may be busy.
double cpu_seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

}  // namespace

TEST(asked_for_moving_atoms_only_the_rest_is_left_out_and_nothing_changes) {
  for (const bool periodic : {false, true}) {
    const std::size_t atoms = 12, count = 3;
    Model model = trained(9, atoms, periodic, 5);
    model.prior = std::make_shared<ManyBodyPrior>(
        std::vector<ManyBodyPrior::Pair>{
            {28, 28, 0.7, 2.4, 3.5, 2.2}, {28, 79, 0.9, 2.6, 4.0, 2.0}, {79, 79, 0.8, 2.8, 3.0, 2.5}},
        std::vector<ManyBodyPrior::Atom>{{28, 0.6}, {79, 0.9}});
    const Surrogate surrogate = model.surrogate(2.0);
    const Emt emt;
    Structures structures = random_structures(count, atoms, periodic, 6);
    // Row 0: three quarters are fixed; row 1: all, but for one coordinate of one atom; row 2: none.
    std::vector<std::uint8_t> fixed(3 * count * atoms, 0);
    for (std::size_t k = 0; k < 3 * atoms; ++k) fixed[k] = k % 12 < 9;
    for (std::size_t k = 0; k < 3 * atoms; ++k) fixed[3 * atoms + k] = k != 7;
    BatchView batch = structures.view();
    batch.fixed = fixed;
    const std::vector<double> begin = structures.positions;
    for (const Landscape* landscape :
         {static_cast<const Landscape*>(&surrogate), static_cast<const Landscape*>(&emt), model.prior.get()}) {
      const auto moving = landscape->evaluator(batch, ForcesOn::moving);
      std::vector<double> x = begin, energies(count), forces(x.size()), wanted(count), wanted_forces(x.size());
      const std::int64_t rows[] = {0, 1, 2};
      for (int step = 0; step < 6; ++step) {
        moving->evaluate(rows, x.data(), energies.data(), forces.data());
        landscape->evaluator(batch)->evaluate(rows, x.data(), wanted.data(), wanted_forces.data());
        for (std::size_t row = 0; row < count; ++row)
          CLOSE(energies[row], wanted[row], 1e-9 * (1 + std::abs(wanted[row])));
        for (std::size_t k = 0; k < x.size(); ++k)
          if (!batch[k / (3 * atoms)].is_still(k % (3 * atoms) / 3))
            CLOSE(forces[k], wanted_forces[k], 1e-8 * (1 + std::abs(wanted_forces[k])));
        Random random({7, 7}, static_cast<std::uint64_t>(step));
        for (std::size_t k = 0; k < x.size(); ++k)
          if (!fixed[k]) x[k] += 0.3 * (random.uniform() - 0.5);
      }
    }
  }
}

TEST(forces_are_the_derivative) {
  for (const bool periodic : {false, true}) {
    const std::size_t atoms = 8, count = 5;
    const Model model = trained(25, atoms, periodic, 1);
    Structures test = random_structures(count, atoms, periodic, 2);
    const Surrogate surrogate = model.surrogate(2.0);
    std::vector<double> energies(count), forces(test.positions.size());
    evaluate(surrogate, test.view(), energies, forces, 1);
    std::vector<double> means(count), sigmas(count), mean_forces(forces.size()), sigma_forces(forces.size());
    surrogate.predict(test.view(), means, sigmas, mean_forces, sigma_forces, 1);
    double largest = 0;
    for (const double f : forces) largest = std::max(largest, std::abs(f));
    for (std::size_t k = 0; k < forces.size(); ++k)
      CLOSE(forces[k], mean_forces[k] - 2.0 * sigma_forces[k], 1e-10 * largest);

    std::vector<double> direction(test.positions.size());
    Random random({4, 4}, 0);
    for (double& d : direction) d = random.uniform(-1, 1) / std::sqrt(static_cast<double>(atoms));
    const auto at = [&](double step) {
      Structures moved = test;
      for (std::size_t k = 0; k < direction.size(); ++k) moved.positions[k] += step * direction[k];
      std::vector<double> e(count), f(moved.positions.size());
      evaluate(surrogate, moved.view(), e, f, 1);
      return e;
    };
    // Sixth order, so that the step can be large against the rounding of the energies.
    const double h = 5e-4;
    const std::vector<double> p1 = at(h), m1 = at(-h), p2 = at(2 * h), m2 = at(-2 * h), p3 = at(3 * h), m3 = at(-3 * h);
    for (std::size_t i = 0; i < count; ++i) {
      double slope = 0;
      for (std::size_t k = 3 * atoms * i; k < 3 * atoms * (i + 1); ++k) slope -= forces[k] * direction[k];
      const double expected = (45 * (p1[i] - m1[i]) - 9 * (p2[i] - m2[i]) + (p3[i] - m3[i])) / (60 * h);
      CLOSE(slope, expected, 1e-8 * largest);
    }
  }
}

TEST(parts_of_the_energy_add_up) {
  const std::size_t atoms = 6, count = 3;
  const Model model = trained(12, atoms, false, 3);
  const Structures test = random_structures(count, atoms, false, 4);
  std::vector<double> with(count), without(count), prior(count), forces(test.positions.size()), sigmas(count);
  evaluate(model.surrogate(0.0), test.view(), with, forces, 1);
  evaluate(model.surrogate(0.0, false), test.view(), without, forces, 1);
  evaluate(*model.prior, test.view(), prior, forces, 1);
  for (std::size_t i = 0; i < count; ++i) CLOSE(with[i], without[i] + prior[i], 1e-12 * std::abs(prior[i]) + 1e-12);
  const std::size_t dimension = model.fingerprint->size();
  Fingerprint::Workspace workspace(*model.fingerprint);
  for (std::size_t i = 0; i < count; ++i) {
    std::vector<double> features(dimension);
    double mean = 0, sigma = 0;
    model.fingerprint->values(test.view()[i], features.data(), workspace);
    model.gpr->predict(1, features.data(), 0, &mean, &sigma, nullptr, nullptr);
    CLOSE(without[i], mean + 3 * -1.5 + 3 * 0.25, 1e-12 * std::abs(mean));
    std::vector<double> lcb(count);
    evaluate(model.surrogate(3.0), test.view(), lcb, forces, 1);
    CLOSE(lcb[i], with[i] - 3.0 * sigma, 1e-11 * std::abs(with[i]));
  }
}

TEST(bits_do_not_depend_on_company_or_threads) {
  const std::size_t atoms = 8, count = 21;
  const Model model = trained(30, atoms, false, 5);
  const Structures test = random_structures(count, atoms, false, 6);
  const Surrogate surrogate = model.surrogate(1.5);
  std::vector<double> e1(count), f1(test.positions.size()), e2(e1), f2(f1);
  evaluate(surrogate, test.view(), e1, f1, 1);
  evaluate(surrogate, test.view(), e2, f2, 2);
  CHECK(e1 == e2 && f1 == f2);
  const auto evaluator = surrogate.evaluator(test.view());
  for (const std::size_t size : {1u, 2u, 3u, 4u, 5u, 7u, 8u, 9u, 13u}) {
    std::vector<std::int64_t> rows;
    for (std::size_t k = 0; k < size; ++k) rows.push_back(static_cast<std::int64_t>((5 * k + size) % count));
    std::fill(e2.begin(), e2.end(), -1.0);
    std::fill(f2.begin(), f2.end(), -1.0);
    evaluator->evaluate(rows, test.positions.data(), e2.data(), f2.data());
    for (std::size_t row = 0; row < count; ++row) {
      const bool asked = std::find(rows.begin(), rows.end(), static_cast<std::int64_t>(row)) != rows.end();
      CHECK(e2[row] == (asked ? e1[row] : -1.0));
      for (std::size_t k = 3 * atoms * row; k < 3 * atoms * (row + 1); ++k) CHECK(f2[k] == (asked ? f1[k] : -1.0));
    }
  }
  std::vector<double> m1(count), s1(count), m2(count), s2(count), none;
  surrogate.predict(test.view(), m1, s1, f1, none, 1);
  surrogate.predict(test.view(), m2, s2, f2, none, 2);
  CHECK(m1 == m2 && s1 == s2 && f1 == f2);
}

TEST(permuted_and_rotated_structures_have_the_same_energy) {
  const std::size_t atoms = 8;
  const Model model = trained(20, atoms, false, 7);
  Structures test = random_structures(2, atoms, false, 8);
  std::copy_n(test.positions.begin(), 3 * atoms, test.positions.begin() + 3 * static_cast<std::ptrdiff_t>(atoms));
  double* second = test.positions.data() + 3 * atoms;
  for (int k = 0; k < 3; ++k) std::swap(second[k], second[3 + k]);  // two Ni
  for (std::size_t i = 0; i < atoms; ++i) {                         // a turn and a shift
    const double x = second[3 * i], y = second[3 * i + 1];
    second[3 * i] = 0.6 * x - 0.8 * y + 1;
    second[3 * i + 1] = 0.8 * x + 0.6 * y - 2;
  }
  std::vector<double> energies(2), forces(test.positions.size());
  evaluate(model.surrogate(2.0), test.view(), energies, forces, 1);
  CLOSE(energies[0], energies[1], 1e-9 * std::abs(energies[0]));
  const double *f = forces.data(), *g = forces.data() + 3 * atoms;
  CLOSE(g[3], 0.6 * f[0] - 0.8 * f[1], 1e-8);  // atom 0 became atom 1
}

TEST(a_broken_structure_leaves_the_others_alone) {
  const std::size_t atoms = 8, count = 4;
  const Model model = trained(15, atoms, false, 9);
  const Structures test = random_structures(count, atoms, false, 10);
  Structures broken = test;
  broken.positions[3 * atoms] = std::nan("");
  for (int k = 0; k < 3; ++k)  // two atoms on one point
    broken.positions[6 * atoms + static_cast<std::size_t>(k)] =
        broken.positions[6 * atoms + 3 + static_cast<std::size_t>(k)];
  const Surrogate surrogate = model.surrogate(1.0);
  std::vector<double> e(count), f(test.positions.size()), expected(e), expected_forces(f), sigmas(e), none;
  evaluate(surrogate, test.view(), expected, expected_forces, 1);
  evaluate(surrogate, broken.view(), e, f, 1);
  CHECK(e[0] == expected[0] && e[3] == expected[3]);
  CHECK(std::isnan(e[1]) && std::isnan(e[2]) && std::isnan(f[3 * atoms]) && std::isnan(f[6 * atoms]));
  CHECK(std::equal(f.begin(), f.begin() + 3 * atoms, expected_forces.begin()));
  surrogate.predict(broken.view(), e, sigmas, f, none, 1);
  CHECK(std::isnan(e[1]) && std::isnan(sigmas[2]) && std::isfinite(e[0]) && std::isfinite(sigmas[3]));
}

TEST(errors_say_what_to_do) {
  const Model model = trained(5, 6, false, 11);
  Structures other = random_structures(2, 6, false, 12);
  other.numbers[7] = 79;
  THROWS(model.surrogate(1.0).evaluator(other.view()), "structure 1 of the batch");
  THROWS(model.surrogate(std::nan("")), "kappa must be finite");
  const auto empty = std::make_shared<Gpr>(model.fingerprint->size(), Kernel{});
  THROWS(Surrogate(model.fingerprint, empty, nullptr, {}, 0.0), "call fit first");
  const auto narrow = std::make_shared<Gpr>(3, Kernel{});
  THROWS(Surrogate(model.fingerprint, narrow, nullptr, {}, 0.0), "the GP was made for 3");
}

// Speed, for the report: test_surrogate bench.
int main(int argc, char** argv) {
  if (argc < 2 || std::strcmp(argv[1], "bench") != 0) return minitest::run();
  const std::size_t atoms = 8, count = 8;
  for (const std::size_t n : {40u, 100u, 500u, 1000u, 2000u}) {
    const Model model = trained(n, atoms, false, 1);
    const Structures test = random_structures(count, atoms, false, 2);
    std::vector<double> energies(count), forces(test.positions.size());
    const auto time = [&](double kappa, std::size_t size) {
      const Surrogate surrogate = model.surrogate(kappa);
      const auto evaluator = surrogate.evaluator(test.view());
      std::vector<std::int64_t> rows;
      for (std::size_t k = 0; k < size; ++k) rows.push_back(static_cast<std::int64_t>(k));
      double least = 1e30;
      for (int k = 0; k < 40; ++k) {
        const double start = cpu_seconds();
        evaluator->evaluate(rows, test.positions.data(), energies.data(), forces.data());
        least = std::min(least, 1e6 * (cpu_seconds() - start));
      }
      return least / static_cast<double>(size);
    };
    Fingerprint::Workspace workspace(*model.fingerprint);
    std::vector<double> features(model.fingerprint->size()), gradient(3 * atoms);
    double fingerprint = 1e30;
    for (int k = 0; k < 40; ++k) {
      const double start = cpu_seconds();
      model.fingerprint->values(test.view()[0], features.data(), workspace);
      model.fingerprint->contract(features.data(), 1.0, gradient.data(), workspace);
      fingerprint = std::min(fingerprint, 1e6 * (cpu_seconds() - start));
    }
    std::printf(
        "n=%zu, Ni4Au4, D=%zu: per structure LCB of 8 %.1f us, of 4 %.1f, of 1 %.1f; energy of 8 %.1f us, of 1 %.1f; "
        "fingerprint alone %.1f us\n",
        n, features.size(), time(2, 8), time(2, 4), time(2, 1), time(0, 8), time(0, 1), fingerprint);
  }
  return 0;
}
