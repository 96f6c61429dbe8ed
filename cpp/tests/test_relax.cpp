#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "minitest.hpp"
#include "thalweg/random.hpp"
#include "thalweg/relax.hpp"

using namespace thalweg;

namespace {

using Surface = double (*)(const StructureView& s, const double* x, double* forces);

// One structure at a time, so that a row cannot depend on the others; counts its calls.
class Toy : public Landscape {
 public:
  explicit Toy(Surface surface) : surface_(surface) {}
  std::unique_ptr<Evaluator> evaluator(const BatchView& batch, ForcesOn) const override {
    struct Each : Evaluator {
      BatchView batch;
      Surface surface;
      Each(const BatchView& b, Surface s) : batch(b), surface(s) {}
      void evaluate(std::span<const std::int64_t> rows, const double* positions, double* energies,
                    double* forces) override {
        for (const std::int64_t row : rows) {
          const std::size_t i = static_cast<std::size_t>(row);
          const std::int64_t first = 3 * batch.offsets[i];
          energies[i] = surface(batch[i], positions + first, forces + first);
        }
      }
    };
    return std::make_unique<Each>(batch, surface_);
  }

 private:
  Surface surface_;
};

// Springs to (1, 2, 3) of 5, 1 and 0.2 eV/angstrom^2.
double springs(const StructureView& s, const double* x, double* f) {
  const double k[3] = {5, 1, 0.2}, at[3] = {1, 2, 3};
  double e = 0;
  for (std::size_t i = 0; i < 3 * s.n; ++i) {
    const double d = x[i] - at[i % 3];
    e += 0.5 * k[i % 3] * d * d;
    f[i] = -k[i % 3] * d;
  }
  return e;
}

// Every atom wants to go far along +x and sits in wells of 1 angstrom along y and z (Rastrigin).
double slope(const StructureView& s, const double* x, double* f) {
  double e = 0;
  for (std::size_t a = 0; a < s.n; ++a) {
    e -= 2 * x[3 * a];
    f[3 * a] = 2;
    for (std::size_t c = 1; c < 3; ++c) {
      const double t = 6.283185307179586 * x[3 * a + c];
      e += x[3 * a + c] * x[3 * a + c] - std::cos(t);
      f[3 * a + c] = -2 * x[3 * a + c] - 6.283185307179586 * std::sin(t);
    }
  }
  return e;
}

// Morse pairs (1 eV, a = 4 / r0, r0 = 2.5 angstrom) with a ripple that makes the surface rough.
double rough_morse(const StructureView& s, const double* x, double* f) {
  double e = 0;
  std::fill(f, f + 3 * s.n, 0.0);
  for (std::size_t i = 0; i < s.n; ++i)
    for (std::size_t j = 0; j < i; ++j) {
      double d[3], r2 = 0;
      for (std::size_t c = 0; c < 3; ++c) d[c] = x[3 * i + c] - x[3 * j + c], r2 += d[c] * d[c];
      const double r = std::sqrt(r2), u = std::exp(-1.6 * (r - 2.5));
      e += u * u - 2 * u + 0.005 * std::sin(15 * r);
      const double g = (-3.2 * (u * u - u) + 0.075 * std::cos(15 * r)) / r;
      for (std::size_t c = 0; c < 3; ++c) f[3 * i + c] -= g * d[c], f[3 * j + c] += g * d[c];
    }
  return e;
}

double lennard_jones(const StructureView& s, const double* x, double* f) {
  double e = 0;
  std::fill(f, f + 3 * s.n, 0.0);
  for (std::size_t i = 0; i < s.n; ++i)
    for (std::size_t j = 0; j < i; ++j) {
      double d[3], r2 = 0;
      for (std::size_t c = 0; c < 3; ++c) d[c] = x[3 * i + c] - x[3 * j + c], r2 += d[c] * d[c];
      const double t = 1 / (r2 * r2 * r2), g = 24 * (2 * t * t - t) / r2;
      e += 4 * (t * t - t);
      for (std::size_t c = 0; c < 3; ++c) f[3 * i + c] += g * d[c], f[3 * j + c] -= g * d[c];
    }
  return e;
}

// Not a number beyond 1 angstrom from the origin, a bowl inside.
double walled_bowl(const StructureView& s, const double* x, double* f) {
  double e = 0;
  for (std::size_t i = 0; i < 3 * s.n; ++i) {
    e += std::abs(x[i]) > 1 ? std::numeric_limits<double>::quiet_NaN() : 50 * x[i] * x[i] - 60 * x[i];
    f[i] = 60 - 100 * x[i];
  }
  return e;
}

// A crease: the forces point at a minimum that the energy does not have.
double liar(const StructureView& s, const double* x, double* f) {
  for (std::size_t i = 0; i < 3 * s.n; ++i) f[i] = -1;
  return -x[0];
}

struct Structures {
  std::vector<double> positions, cells;
  std::vector<std::int32_t> numbers;
  std::vector<std::int64_t> offsets{0};
  std::vector<std::uint8_t> pbc, fixed;
  void add(const std::vector<double>& x) {
    positions.insert(positions.end(), x.begin(), x.end());
    numbers.resize(positions.size() / 3, 79);
    fixed.resize(positions.size(), 0);
    offsets.push_back(static_cast<std::int64_t>(numbers.size()));
    for (int k = 0; k < 9; ++k) cells.push_back(k % 4 == 0 ? 20.0 : 0.0);
    pbc.resize(pbc.size() + 3, 0);
  }
  BatchView view() const { return {positions, numbers, offsets, cells, pbc, fixed}; }
};

// n atoms, none closer than 0.75 d, each within 1.25 d of another.
std::vector<double> blob(std::size_t n, double d, std::uint64_t seed) {
  Random random({seed, 9}, 0);
  std::vector<double> x(3 * n, 0.0);
  for (std::size_t i = 1; i < n;) {
    const std::size_t j = random.below(static_cast<std::uint32_t>(i));
    const auto u = random.direction();
    const double r = d * random.uniform(0.8, 1.2);
    bool clear = true;
    for (std::size_t c = 0; c < 3; ++c) x[3 * i + c] = x[3 * j + c] + r * u[c];
    for (std::size_t p = 0; p < i; ++p)
      clear =
          clear && std::hypot(x[3 * i] - x[3 * p], x[3 * i + 1] - x[3 * p + 1], x[3 * i + 2] - x[3 * p + 2]) > .75 * d;
    if (clear) ++i;
  }
  return x;
}

Confinement box(std::vector<double> corner, std::vector<double> vectors) {
  Confinement out;
  out.active = true;
  std::copy(corner.begin(), corner.end(), out.corner);
  std::copy(vectors.begin(), vectors.end(), out.vectors);
  return out;
}
const std::vector<double> kCube = {4, 0, 0, 0, 4, 0, 0, 0, 4};

}  // namespace

TEST(quadratic_minimum_is_found) {
  Structures s;
  s.add({0, 0, 0, 4, 4, 4});
  RelaxSettings settings;
  settings.force_tolerance = 1e-6;
  const RelaxResult r = relax(Toy(springs), s.view(), settings, {});
  CHECK(r.converged[0]);
  CHECK(r.evaluations[0] < 60);
  for (std::size_t i = 0; i < 6; ++i) CLOSE(r.positions[i], static_cast<double>(i % 3 + 1), 1e-5);
  CLOSE(r.energies[0], 0.0, 1e-10);
}

TEST(fixed_coordinates_never_move_and_do_not_count) {
  Structures s;
  s.add({0, 0, 0, 4, 4, 4});
  s.fixed = {1, 1, 1, 0, 1, 0};
  RelaxSettings settings;
  settings.force_tolerance = 1e-6;
  const RelaxResult r = relax(Toy(springs), s.view(), settings, {});
  CHECK(r.converged[0]);
  CHECK(r.positions[0] == 0 && r.positions[1] == 0 && r.positions[2] == 0 && r.positions[4] == 4);
  CLOSE(r.positions[3], 1.0, 1e-6);
  CLOSE(r.positions[5], 3.0, 1e-5);
  CLOSE(r.forces[0], 0.0, 1e-12);  // an evaluator need not give those on atoms that are fixed for good
  CLOSE(r.forces[4], -2.0, 1e-12);
}

TEST(no_atom_moves_further_than_max_step) {
  const std::vector<double> start = blob(8, 2.5, 3);
  StructureView view;
  view.n = 8;
  view.positions = start.data();
  RelaxSettings settings;
  settings.steps = 300;
  Minimiser m(settings, view, {});
  std::vector<double> forces(24), before;
  while (!m.done()) {
    before = m.best_positions();
    const double e = rough_morse(view, m.positions().data(), forces.data());
    for (std::size_t a = 0; a < 8; ++a)
      CHECK(std::hypot(m.positions()[3 * a] - before[3 * a], m.positions()[3 * a + 1] - before[3 * a + 1],
                       m.positions()[3 * a + 2] - before[3 * a + 2]) < settings.max_step + 1e-9 ||
            m.evaluations() == 0);
    const double kept = m.best_energy();
    const bool first = m.evaluations() == 0;
    m.tell(e, forces.data());
    CHECK(first || m.best_energy() <= kept + 1e-8 * std::max(1.0, std::abs(kept)));
  }
  CHECK(m.converged());
}

TEST(steps_are_evaluations_beyond_the_first) {
  Structures s;
  s.add(blob(13, 1.12, 1));
  for (const int steps : {0, 1, 7}) {
    RelaxSettings settings;
    settings.steps = steps;
    settings.force_tolerance = 1e-9;
    const RelaxResult r = relax(Toy(lennard_jones), s.view(), settings, {});
    CHECK(r.evaluations[0] == steps + 1);
    CHECK(!r.converged[0]);
  }
}

TEST(rough_surfaces_converge) {
  Structures s;
  for (std::uint64_t seed = 0; seed < 40; ++seed) s.add(blob(8, 2.5, seed));
  RelaxSettings settings;
  settings.steps = 400;
  settings.force_tolerance = 0.01;
  const RelaxResult r = relax(Toy(rough_morse), s.view(), settings, {});
  for (std::size_t i = 0; i < 40; ++i) {
    CHECK(r.converged[i]);
    double largest = 0, again[24];
    CLOSE(rough_morse(s.view()[i], r.positions.data() + 24 * i, again), r.energies[i], 1e-12);
    for (std::size_t a = 0; a < 8; ++a)
      largest = std::max(largest, std::hypot(again[3 * a], again[3 * a + 1], again[3 * a + 2]));
    CHECK(largest < 0.01);
  }
}

TEST(lj13_reaches_known_minima) {
  Structures s;
  for (std::uint64_t seed = 0; seed < 60; ++seed) s.add(blob(13, 1.12, seed));
  RelaxSettings settings;
  settings.steps = 1000;
  settings.force_tolerance = 1e-4;
  const RelaxResult r = relax(Toy(lennard_jones), s.view(), settings, {});
  double least = 0, evaluations = 0;
  for (std::size_t i = 0; i < 60; ++i) {
    CHECK(r.converged[i]);
    least = std::min(least, r.energies[i]);
    evaluations += r.evaluations[i] / 60.0;
  }
  CLOSE(least, -44.326801, 1e-5);  // Cambridge Cluster Database
  CHECK(evaluations < 220);        // 160 when written
}

TEST(walls_hold_and_their_push_does_not_count) {
  Structures s;
  s.add({1, 1.1, 1.2, 3, 3.1, 2.9});
  RelaxSettings settings;
  settings.steps = 300;
  settings.force_tolerance = 1e-4;
  const RelaxResult r = relax(Toy(slope), s.view(), settings, box({0, 0, 0}, kCube));
  CHECK(r.converged[0]);
  for (std::size_t i = 0; i < 6; ++i) CHECK(r.positions[i] > -1e-9 && r.positions[i] < 4 + 1e-9);
  CLOSE(r.positions[0], 4.0, 1e-9);
  CLOSE(r.positions[3], 4.0, 1e-9);
  CLOSE(r.forces[0], 2.0, 1e-12);
}

TEST(open_directions_have_no_walls) {
  Structures s;
  s.add({3.9, 1, 1});
  RelaxSettings settings;
  settings.steps = 60;
  Confinement c = box({0, 0, 0}, kCube);
  c.open[0] = 1;
  const RelaxResult r = relax(Toy(slope), s.view(), settings, c);
  CHECK(r.positions[0] > 6 && !r.converged[0]);
}

TEST(skewed_box_minimum_lies_on_its_walls) {
  // Springs pull to (1, 2, 3); the wall y = 1 - x / 2 is in the way. Oracle: minimum of the quadratic on that plane.
  Structures s;
  s.add({0.2, 0.2, 0.5});
  RelaxSettings settings;
  settings.steps = 300;
  settings.force_tolerance = 1e-7;
  const Confinement c = box({-4, 0, 0}, {8, -4, 0, 0, 3, 0, 0, 0, 6});  // its upper wall is y = 1 - x / 2
  const RelaxResult r = relax(Toy(springs), s.view(), settings, c);
  CHECK(r.converged[0]);
  // minimise 2.5 (x-1)^2 + 0.5 (y-2)^2 with y = 1 - x/2: 5 (x-1) + 0.5 (1 + x/2) = 0
  const double x = 4.5 / 5.25;
  CLOSE(r.positions[0], x, 1e-6);
  CLOSE(r.positions[1], 1 - x / 2, 1e-6);
  CLOSE(r.positions[2], 3.0, 1e-5);
}

TEST(flat_box_keeps_its_plane) {
  Structures s;
  s.add({0, 0, 0.5, 3, 1, 0.5});
  RelaxSettings settings;
  settings.steps = 300;
  settings.force_tolerance = 1e-6;
  const RelaxResult r = relax(Toy(springs), s.view(), settings, box({-1, -1, 0.5}, {6, 0, 0, 0, 6, 0, 0, 0, 0}));
  CHECK(r.converged[0]);
  CLOSE(r.positions[2], 0.5, 1e-12);
  CLOSE(r.positions[5], 0.5, 1e-12);
  CLOSE(r.positions[0], 1.0, 1e-6);
  CLOSE(r.positions[4], 2.0, 1e-5);
}

TEST(atoms_outside_are_not_teleported_and_only_come_closer) {
  // Starts 1 beyond the upper x wall; the slope pushes it further out: it must stay, converged in y and z.
  const std::vector<double> start = {5, 1.1, 1.2, -2, 1.1, 1.2};
  StructureView view;
  view.n = 2;
  view.positions = start.data();
  RelaxSettings settings;
  settings.steps = 300;
  settings.force_tolerance = 1e-4;
  Minimiser m(settings, view, box({0, 0, 0}, kCube));
  std::vector<double> forces(6);
  double most = -2;
  while (!m.done()) {
    const double e = slope(view, m.positions().data(), forces.data());
    m.tell(e, forces.data());
    CHECK(m.positions()[0] <= 5 + 1e-12);
    CHECK(m.best_positions()[3] >= most - 1e-12);
    most = std::max(most, m.best_positions()[3]);
  }
  CHECK(m.converged());
  CLOSE(m.best_positions()[0], 5.0, 1e-9);
  CLOSE(m.best_positions()[3], 4.0, 1e-9);  // the other one came in through the lower wall and crossed the box
}

TEST(what_is_not_finite_is_a_step_too_long) {
  Structures s;
  s.add({0, 0.1, -0.2});
  RelaxSettings settings;
  settings.max_step = 5;
  settings.first_curvature = 10;
  settings.force_tolerance = 1e-6;
  const RelaxResult r = relax(Toy(walled_bowl), s.view(), settings, {});
  CHECK(r.converged[0]);
  for (std::size_t i = 0; i < 3; ++i) CLOSE(r.positions[i], 0.6, 1e-6);
  s.positions = {2, 0, 0};  // no energy at the start: given up at once
  const RelaxResult lost = relax(Toy(walled_bowl), s.view(), settings, {});
  CHECK(lost.evaluations[0] == 1 && !lost.converged[0] && std::isnan(lost.energies[0]));
  CHECK(lost.positions[0] == 2);
}

TEST(a_surface_that_lies_ends_the_relaxation) {
  Structures s;
  s.add({0, 0, 0});
  RelaxSettings settings;
  settings.steps = 1000;
  const RelaxResult r = relax(Toy(liar), s.view(), settings, {});
  CHECK(!r.converged[0] && r.evaluations[0] < 20);
  CHECK(r.positions[0] == 0 && r.energies[0] == 0);
}

TEST(same_bits_for_any_batch_and_thread_count) {
  Structures s;
  for (std::uint64_t seed = 0; seed < 150; ++seed) s.add(blob(5 + seed % 9, 2.5, seed));
  RelaxSettings settings;
  settings.steps = 60;
  const Confinement c = box({-4, -4, -4}, {8, 0, 0, 1, 8, 0, 0, 1, 8});
  const RelaxResult one = relax(Toy(rough_morse), s.view(), settings, c, 1);
  for (const int threads : {2, 3}) {
    const RelaxResult many = relax(Toy(rough_morse), s.view(), settings, c, threads);
    CHECK(many.positions == one.positions && many.energies == one.energies && many.forces == one.forces);
    CHECK(many.evaluations == one.evaluations && many.converged == one.converged);
  }
  for (const std::size_t i : {std::size_t{0}, std::size_t{77}, std::size_t{149}}) {
    const auto first = s.positions.begin() + 3 * s.offsets[i], last = s.positions.begin() + 3 * s.offsets[i + 1];
    Structures alone;
    alone.add(std::vector<double>(first, last));
    const RelaxResult r = relax(Toy(rough_morse), alone.view(), settings, c, 1);
    CHECK(r.energies[0] == one.energies[i] && r.evaluations[0] == one.evaluations[i]);
    CHECK(std::equal(r.positions.begin(), r.positions.end(), one.positions.begin() + 3 * s.offsets[i]));
  }
}

TEST(errors_of_a_landscape_come_through_threads) {
  struct Refuses : Landscape {
    std::unique_ptr<Evaluator> evaluator(const BatchView&, ForcesOn) const override {
      throw Error("no such species here");
    }
  };
  Structures s;
  s.add({0, 0, 0});
  s.add({0, 0, 0});
  THROWS(relax(Refuses(), s.view(), {}, {}, 2), "no such species");
}

TEST(bad_settings_are_named) {
  Structures s;
  s.add({0, 0, 0});
  RelaxSettings settings;
  settings.force_tolerance = 0;
  THROWS(relax(Toy(springs), s.view(), settings, {}), "force_tolerance above 0");
  THROWS(relax(Toy(springs), s.view(), {}, box({0, 0, 0}, {1, 0, 0, 2, 0, 0, 0, 0, 1})), "span a volume");
  s.positions[1] = std::numeric_limits<double>::infinity();
  THROWS(relax(Toy(springs), s.view(), {}, {}), "finite positions");
}

TEST(empty_batches_and_structures) {
  Structures s;
  CHECK(relax(Toy(springs), s.view(), {}, {}).energies.empty());
  s.add({});
  const RelaxResult r = relax(Toy(springs), s.view(), {}, {});
  CHECK(r.converged[0] && r.evaluations[0] == 1);
}

MINITEST_MAIN
