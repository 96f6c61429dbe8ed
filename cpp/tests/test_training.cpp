#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "minitest.hpp"
#include "thalweg/random.hpp"
#include "thalweg/training.hpp"

using namespace thalweg;

namespace {

constexpr const char* kLevels[] = {"x86-64-v2", "x86-64-v3", "x86-64-v4", "portable"};
constexpr int kHidden = QNetworkShape::kHidden;

template <class Body>
void at_every_level(Body body) {
  const std::string before = active_isa();
  for (const char* level : kLevels)
    if (force_isa(level)) body();
  force_isa(before.c_str());
}

struct Example {
  QNetworkShape shape;
  std::vector<float> parameters, kernels, shift, targets;
  std::vector<std::int32_t> placed, actions;
  std::vector<std::int64_t> offsets{0};
  QNetworkWeights weights() const { return {parameters, kernels, shift}; }
  StateActions pairs() const { return {placed, offsets, actions}; }
  std::size_t size() const { return offsets.size() - 1; }
};

int voxels(const QNetworkShape& s) { return s.grid[0] * s.grid[1] * s.grid[2]; }

Example example(const QNetworkShape& shape, int n, int atoms, std::uint64_t seed) {
  Example e;
  e.shape = shape;
  Random random({seed, 11}, 0);
  const QTraining training(shape);
  const auto fill = [&](std::vector<float>& v, std::size_t count, double low, double high) {
    v.resize(count);
    for (float& x : v) x = static_cast<float>(random.uniform(low, high));
  };
  const double spread = 1.5 / std::sqrt(static_cast<double>(training.parameters()) / (20.0 * kHidden));
  fill(e.parameters, training.parameters(), -spread, spread);
  fill(e.kernels, static_cast<std::size_t>(shape.species) * training.kernel_size(), -0.5, 1.0);
  fill(e.shift, static_cast<std::size_t>(shape.species), -0.3, 0.3);
  fill(e.targets, static_cast<std::size_t>(n), -1, 1);
  const auto row = [&](std::vector<std::int32_t>& v) {
    v.push_back(static_cast<std::int32_t>(random.uniform(0, shape.species)));
    v.push_back(static_cast<std::int32_t>(random.uniform(0, voxels(shape))));
  };
  for (int i = 0; i < n; ++i) {
    const int count = static_cast<int>(random.uniform(0, atoms + 1));
    for (int k = 0; k < count; ++k) row(e.placed);
    row(e.actions);
    e.offsets.push_back(static_cast<std::int64_t>(e.placed.size() / 2));
  }
  return e;
}

struct Reference {
  double loss = 0;
  std::vector<double> q, parameters, kernels, shift;
};

// The network on whole grids in double precision, and its derivative by walking every sum backwards.
Reference reference(const Example& e) {
  const QNetworkShape& s = e.shape;
  const int nd = s.dimension, n0 = nd == 3 ? s.grid[0] : 1, n1 = s.grid[static_cast<std::size_t>(nd - 2)],
            n2 = s.grid[static_cast<std::size_t>(nd - 1)], size = n0 * n1 * n2;
  const int grid[3] = {n0, n1, n2};
  const bool wraps[3] = {nd == 3 && s.periodic[0], s.periodic[static_cast<std::size_t>(nd - 2)],
                         s.periodic[static_cast<std::size_t>(nd - 1)]};
  // voxel at + scale (tap - middle), or -1 beyond a wall
  const auto moved = [&](int voxel, int tap, int edge, int scale) {
    int at[3] = {voxel / (n1 * n2), voxel / n2 % n1, voxel % n2};
    int t[3] = {nd == 3 ? tap / (edge * edge) : edge / 2, tap / edge % edge, tap % edge};
    for (int d = 0; d < 3; ++d) {
      at[d] += scale * (t[d] - edge / 2);
      if (wraps[d]) at[d] = (at[d] % grid[d] + grid[d]) % grid[d];
      if (at[d] < 0 || at[d] >= grid[d]) return -1;
    }
    return (at[0] * n1 + at[1]) * n2 + at[2];
  };
  const int edge = 2 * s.half_window + 1, window = nd == 3 ? edge * edge * edge : edge * edge;
  const int k = s.kernel, taps = nd == 3 ? k * k * k : k * k;
  const int channels[5] = {s.species, kHidden, kHidden, kHidden, s.species};
  std::size_t start[4][2], at = 0;
  for (int l = 0; l < 4; ++l) {
    start[l][0] = at;
    at += static_cast<std::size_t>(channels[l] * channels[l + 1] * taps);
    start[l][1] = at;
    at += static_cast<std::size_t>(channels[l + 1]);
  }
  Reference r;
  r.parameters.resize(at);
  r.kernels.resize(e.kernels.size());
  r.shift.resize(e.shift.size());
  const std::size_t n = e.size();
  for (std::size_t i = 0; i < n; ++i) {
    std::vector<std::vector<double>> a(5), d(5);
    for (std::size_t l = 0; l < 5; ++l) {
      a[l].assign(static_cast<std::size_t>(channels[l] * size), 0.0);
      d[l] = a[l];
    }
    const auto each_splat = [&](auto body) {
      for (auto row = static_cast<std::size_t>(e.offsets[i]); row < static_cast<std::size_t>(e.offsets[i + 1]); ++row)
        for (int w = 0; w < window; ++w) {
          const int to = moved(e.placed[2 * row + 1], w, edge, 1);
          if (to >= 0)
            body(static_cast<std::size_t>(e.placed[2 * row] * window + w),
                 static_cast<std::size_t>(e.placed[2 * row] * size + to));
        }
    };
    for (int c = 0; c < s.species; ++c)
      for (int x = 0; x < size; ++x)
        a[0][static_cast<std::size_t>(c * size + x)] = static_cast<double>(e.shift[static_cast<std::size_t>(c)]);
    each_splat([&](std::size_t w, std::size_t to) { a[0][to] += static_cast<double>(e.kernels[w]); });
    const auto each_tap = [&](std::size_t l, auto body) {
      for (int x = 0; x < size; ++x)
        for (int t = 0; t < taps; ++t) {
          const int from = moved(x, t, k, s.dilation);
          if (from < 0) continue;
          for (int o = 0; o < channels[l + 1]; ++o)
            for (int c = 0; c < channels[l]; ++c)
              body(start[l][0] + static_cast<std::size_t>((o * channels[l] + c) * taps + t),
                   static_cast<std::size_t>(o * size + x), static_cast<std::size_t>(c * size + from));
        }
    };
    for (std::size_t l = 0; l < 4; ++l) {
      for (int o = 0; o < channels[l + 1]; ++o)
        for (int x = 0; x < size; ++x)
          a[l + 1][static_cast<std::size_t>(o * size + x)] =
              static_cast<double>(e.parameters[start[l][1] + static_cast<std::size_t>(o)]);
      each_tap(l, [&](std::size_t w, std::size_t out, std::size_t in) {
        a[l + 1][out] += static_cast<double>(e.parameters[w]) * a[l][in];
      });
      if (l < 3)
        for (double& v : a[l + 1]) v = v > 0 ? v : static_cast<double>(s.slope) * v;
    }
    const auto action = static_cast<std::size_t>(e.actions[2 * i] * size + e.actions[2 * i + 1]);
    const double q = std::tanh(a[4][action]), error = q - static_cast<double>(e.targets[i]);
    r.q.push_back(q);
    r.loss += error * error / static_cast<double>(n);
    d[4][action] = 2 * error / static_cast<double>(n) * std::max(1 - q * q, 1e-3);  // training.hpp says why
    for (std::size_t l = 4; l-- > 0;) {
      for (int o = 0; o < channels[l + 1]; ++o)
        for (int x = 0; x < size; ++x)
          r.parameters[start[l][1] + static_cast<std::size_t>(o)] += d[l + 1][static_cast<std::size_t>(o * size + x)];
      each_tap(l, [&](std::size_t w, std::size_t out, std::size_t in) {
        r.parameters[w] += d[l + 1][out] * a[l][in];
        d[l][in] += d[l + 1][out] * static_cast<double>(e.parameters[w]);
      });
      if (l > 0)
        for (std::size_t x = 0; x < d[l].size(); ++x) d[l][x] *= a[l][x] > 0 ? 1.0 : static_cast<double>(s.slope);
    }
    each_splat([&](std::size_t w, std::size_t to) { r.kernels[w] += d[0][to]; });
    for (int c = 0; c < s.species; ++c)
      for (int x = 0; x < size; ++x)
        r.shift[static_cast<std::size_t>(c)] += d[0][static_cast<std::size_t>(c * size + x)];
  }
  return r;
}

struct Result {
  double loss = 0;
  std::vector<float> q, parameters, kernels, shift;
};

Result step(QTraining& training, const Example& e, int threads = 1) {
  Result r;
  r.q.resize(e.size());
  r.parameters.resize(e.parameters.size());
  r.kernels.resize(e.kernels.size());
  r.shift.resize(e.shift.size());
  r.loss = training.gradient(e.weights(), e.pairs(), e.targets, r.q, {r.parameters, r.kernels, r.shift}, threads);
  return r;
}

double difference(const std::vector<float>& came, const std::vector<double>& wanted) {
  double error = 0, largest = 0;
  for (std::size_t k = 0; k < wanted.size(); ++k) {
    error = std::max(error, std::abs(static_cast<double>(came[k]) - wanted[k]));
    largest = std::max(largest, std::abs(wanted[k]));
  }
  return largest > 0 ? error / largest : error;
}

QNetworkShape shape_of(int dimension, int species, int kernel, int dilation, int half, std::array<int, 3> grid,
                       std::array<bool, 3> periodic) {
  QNetworkShape s;
  s.dimension = dimension, s.species = species, s.kernel = kernel, s.dilation = dilation, s.half_window = half;
  s.grid = grid, s.periodic = periodic;
  return s;
}

// Boxes smaller and larger than the grid, folded (10, 9, 12) and unfolded (7, 11), walls, one to three species, groups
// that are not full, dilation with and without seams.
const QNetworkShape kShapes[] = {
    shape_of(2, 1, 3, 1, 2, {14, 15, 1}, {true, true, false}),
    shape_of(2, 2, 5, 1, 3, {10, 9, 1}, {true, true, false}),
    shape_of(2, 3, 5, 1, 4, {7, 11, 1}, {true, true, false}),
    shape_of(2, 2, 5, 1, 2, {8, 13, 1}, {false, false, false}),
    shape_of(2, 1, 3, 2, 3, {12, 9, 1}, {true, true, false}),
    shape_of(2, 2, 3, 2, 3, {11, 12, 1}, {false, true, false}),
    shape_of(2, 1, 1, 1, 0, {5, 6, 1}, {true, false, false}),
    shape_of(3, 1, 3, 1, 1, {6, 7, 5}, {true, true, true}),
    shape_of(3, 2, 3, 2, 2, {6, 7, 8}, {true, false, false}),
    shape_of(3, 2, 3, 3, 2, {9, 6, 7}, {false, true, true}),
    shape_of(2, 1, 7, 1, 2, {14, 26, 1}, {false, true, false}),
    shape_of(2, 1, 11, 1, 2, {16, 12, 1}, {true, false, false}),
};

}  // namespace

TEST(gradients_are_those_of_whole_grids) {
  for (const QNetworkShape& shape : kShapes) {
    const Example e = example(shape, 18, 4, 1);
    const Reference wanted = reference(e);
    at_every_level([&] {
      QTraining training(shape);
      const Result came = step(training, e);
      CLOSE(came.loss, wanted.loss, 1e-6 * wanted.loss);
      CLOSE(difference(came.q, wanted.q), 0, 5e-6);
      CLOSE(difference(came.parameters, wanted.parameters), 0, 1e-5);
      CLOSE(difference(came.kernels, wanted.kernels), 0, 1e-5);
      CLOSE(difference(came.shift, wanted.shift), 0, 1e-5);
    });
  }
}

static void expect_gradients_without_constants(const QNetworkShape& shape, Example e) {
  std::fill(e.shift.begin(), e.shift.end(), 0.0f);
  const Reference wanted = reference(e);
  at_every_level([&] {
    QTraining training(shape);
    std::vector<float> q(e.size()), gradient(e.parameters.size()), kernels(e.kernels.size());
    training.gradient(e.weights(), e.pairs(), e.targets, q, {gradient, kernels, {}});
    CLOSE(difference(q, wanted.q), 0, 5e-6);
    CLOSE(difference(gradient, wanted.parameters), 0, 1e-5);
    CLOSE(difference(kernels, wanted.kernels), 0, 1e-5);
  });
}

// Without constants and their gradient, atoms away from the walls are stamped and the others go through images.
TEST(gradients_without_images_are_the_same) {
  for (const QNetworkShape& shape : kShapes) expect_gradients_without_constants(shape, example(shape, 24, 3, 4));
}

// Eight actions or fewer make another kind of group, where none needs images. The lengths of the thesis' network.
TEST(gradients_of_a_few_actions_are_the_same) {
  const QNetworkShape shapes[] = {shape_of(2, 1, 15, 1, 2, {36, 41, 1}, {true, true, false}),
                                  shape_of(2, 2, 5, 1, 0, {9, 12, 1}, {false, true, false}),
                                  shape_of(3, 2, 3, 2, 0, {6, 7, 8}, {false, false, true})};
  for (const QNetworkShape& shape : shapes)
    for (const int n : {3, 24}) {
      if (n > 8 && shape.kernel > 5) continue;  // the reference would take long
      expect_gradients_without_constants(shape, example(shape, n, 4, 12));
    }
}

TEST(the_reference_is_the_derivative_of_its_loss) {
  Example e = example(kShapes[5], 5, 4, 2);
  const Reference r = reference(e);
  Random random({3, 11}, 0);
  for (std::vector<float>* values : {&e.parameters, &e.kernels, &e.shift}) {
    const std::vector<double>& gradient =
        values == &e.parameters ? r.parameters : (values == &e.kernels ? r.kernels : r.shift);
    const std::vector<float> before = *values;
    double loss[2], slope = 0;
    std::vector<float> direction(before.size());
    for (float& v : direction) v = random.uniform(0, 1) < 0.5 ? -0x1p-14f : 0x1p-14f;
    for (const int sign : {0, 1}) {
      for (std::size_t k = 0; k < before.size(); ++k)
        (*values)[k] = sign == 0 ? before[k] + direction[k] : before[k] - direction[k];
      loss[sign] = reference(e).loss;
    }
    for (std::size_t k = 0; k < before.size(); ++k) slope += 2 * static_cast<double>(direction[k]) * gradient[k];
    *values = before;
    CLOSE((loss[0] - loss[1]) / slope, 1.0, 1e-2);
  }
}

TEST(threads_change_no_bit_and_calls_leave_nothing_behind) {
  const QNetworkShape shape = kShapes[3];
  const Example few = example(shape, 21, 4, 5), many = example(shape, 170, 4, 6);
  QTraining one(shape), three(shape);
  const Result a = step(one, many, 1);
  step(three, few, 2);
  for (const int threads : {3, 8, 1}) {
    const Result b = step(three, many, threads);
    CHECK(a.loss == b.loss && a.q == b.q && a.parameters == b.parameters && a.kernels == b.kernels);
    CHECK(a.shift == b.shift);
  }
  const Example some = example(shape, 100, 4, 13);  // no more groups than partial sums
  const Result c = step(one, some, 1), d = step(three, some, 3);
  CHECK(c.loss == d.loss && c.q == d.q && c.parameters == d.parameters && c.kernels == d.kernels);
  const Reference wanted = reference(many);
  CLOSE(difference(a.parameters, wanted.parameters), 0, 1e-5);
}

TEST(a_pull_is_the_transpose_of_q) {
  const Example e = example(kShapes[8], 18, 4, 7);
  QTraining training(e.shape);
  const Result whole = step(training, e);
  std::vector<float> pull(e.size()), q(e.size()), only(e.size());
  for (std::size_t i = 0; i < e.size(); ++i) pull[i] = 2 * (whole.q[i] - e.targets[i]) / static_cast<float>(e.size());
  std::vector<float> gradient(e.parameters.size()), shift(e.shift.size());
  training.pull_back(e.weights(), e.pairs(), pull, q, {gradient, {}, shift});
  training.evaluate(e.weights(), e.pairs(), only);
  CHECK(q == whole.q && only == whole.q);
  for (std::size_t k = 0; k < gradient.size(); k += 7) CLOSE(gradient[k], whole.parameters[k], 1e-6);
  for (std::size_t k = 0; k < shift.size(); ++k) CLOSE(shift[k], whole.shift[k], 1e-5);
}

TEST(small_tails_of_kernels_are_left_out) {
  Example e = example(kShapes[1], 9, 4, 8);
  Example wide = e;
  wide.shape.half_window = 6;
  wide.kernels.assign(2 * 13 * 13, 1e-12f);
  for (std::size_t s = 0; s < 2; ++s)
    for (std::size_t y = 0; y < 7; ++y)
      for (std::size_t x = 0; x < 7; ++x) wide.kernels[s * 169 + (y + 3) * 13 + x + 3] = e.kernels[s * 49 + y * 7 + x];
  QTraining a(e.shape), b(wide.shape);
  std::vector<float> qa(9), qb(9), ga(e.parameters.size()), gb(e.parameters.size());
  a.gradient(e.weights(), e.pairs(), e.targets, qa, {ga, {}, {}});
  b.gradient(wide.weights(), wide.pairs(), e.targets, qb, {gb, {}, {}});
  CHECK(qa == qb && ga == gb);
}

TEST(statistics_are_those_of_every_voxel) {
  for (const QNetworkShape& shape : kShapes) {
    const Example e = example(shape, 3, 4, 9);
    const std::size_t species = static_cast<std::size_t>(shape.species);
    std::vector<double> mean(species), variance(species);
    image_statistics(shape, e.kernels, {e.placed, e.offsets, {}}, mean, variance);
    const int edge = 2 * shape.half_window + 1;
    std::vector<double> image(species * e.size() * static_cast<std::size_t>(voxels(shape)));
    for (std::size_t i = 0; i < e.size(); ++i)
      for (auto row = static_cast<std::size_t>(e.offsets[i]); row < static_cast<std::size_t>(e.offsets[i + 1]); ++row) {
        const int window = static_cast<int>(e.kernels.size() / species), s = e.placed[2 * row];
        for (int w = 0; w < window; ++w) {
          int rest = w, voxel = e.placed[2 * row + 1], to = 0, unit = 1;
          bool inside = true;
          for (int d = shape.dimension - 1; d >= 0; --d) {
            const int n = shape.grid[static_cast<std::size_t>(d)];
            int at = voxel % n + rest % edge - shape.half_window;
            if (shape.periodic[static_cast<std::size_t>(d)]) at = (at % n + n) % n;
            inside = inside && at >= 0 && at < n;
            to += at * unit;
            unit *= n;
            voxel /= n;
            rest /= edge;
          }
          if (inside)
            image[(static_cast<std::size_t>(s) * e.size() + i) * static_cast<std::size_t>(voxels(shape)) +
                  static_cast<std::size_t>(to)] +=
                static_cast<double>(e.kernels[static_cast<std::size_t>(s * window + w)]);
        }
      }
    const std::size_t count = image.size() / species;
    for (std::size_t s = 0; s < species; ++s) {
      double sum = 0, squares = 0;
      for (std::size_t k = 0; k < count; ++k) sum += image[s * count + k];
      for (std::size_t k = 0; k < count; ++k)
        squares += (image[s * count + k] - sum / static_cast<double>(count)) *
                   (image[s * count + k] - sum / static_cast<double>(count));
      CLOSE(mean[s], sum / static_cast<double>(count), 1e-6);
      CLOSE(variance[s], squares / static_cast<double>(count), 1e-5);
    }
  }
}

TEST(no_pairs_are_no_work) {
  Example e = example(kShapes[0], 0, 1, 1);
  QTraining training(e.shape);
  const Result r = step(training, e);
  CHECK(r.loss == 0 && std::all_of(r.parameters.begin(), r.parameters.end(), [](float v) { return v == 0; }));
}

TEST(wrong_input_is_told) {
  const auto with = [](auto change) {
    QNetworkShape s = kShapes[0];
    change(s);
    QTraining training(s);
  };
  THROWS(with([](QNetworkShape& s) { s.kernel = 4; }), "kernel must be odd");
  THROWS(with([](QNetworkShape& s) { s.dimension = 1; }), "dimension must be 2 or 3");
  THROWS(with([](QNetworkShape& s) { s.species = 0; }), "species must be 1 to");
  THROWS(with([](QNetworkShape& s) { s.grid[1] = 0; }), "at least one voxel");
  THROWS(with([](QNetworkShape& s) { s.dilation = 0; }), "dilation must be");
  Example e = example(kShapes[0], 3, 2, 1);
  QTraining training(e.shape);
  e.actions[1] = 14 * 15;
  THROWS(step(training, e), "actions row 0 is species 0, voxel 210");
  e.actions[1] = 0;
  e.targets.pop_back();
  THROWS(step(training, e), "targets must hold 3 values");
  std::vector<float> v(3), w(2);
  THROWS(adam_step({}, 1, v, v, v, w), "equal length");
}

TEST(adam_follows_its_paper) {
  at_every_level([] {
    std::vector<float> x{1.0f, -2.0f, 0.5f}, m(3), v(3);
    std::vector<double> y{1.0, -2.0, 0.5}, p(3), r(3);
    for (int t = 1; t <= 4; ++t) {
      std::vector<float> g{0.3f, -0.1f * static_cast<float>(t), 1e-3f};
      adam_step({}, t, g, x, m, v);
      for (std::size_t k = 0; k < 3; ++k) {
        const double gk = static_cast<double>(g[k]);
        p[k] = 0.9 * p[k] + 0.1 * gk;
        r[k] = 0.999 * r[k] + 0.001 * gk * gk;
        y[k] -= 1e-3 * (p[k] / (1 - std::pow(0.9, t))) / (std::sqrt(r[k] / (1 - std::pow(0.999, t))) + 1e-8);
        CLOSE(x[k], y[k], 1e-6);
      }
    }
  });
}

MINITEST_MAIN
