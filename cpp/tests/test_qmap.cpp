#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "minitest.hpp"
#include "thalweg/qmap.hpp"
#include "thalweg/random.hpp"

using namespace thalweg;

namespace {

constexpr double kClose = 3e-6;  // of Q, which is at most 1
constexpr QMethod kMethods[] = {QMethod::direct, QMethod::local_fft, QMethod::grid_fft};

using Shape = std::vector<std::int64_t>;
using Flags = std::vector<std::uint8_t>;
using Ints = std::vector<std::int32_t>;

std::size_t power(std::size_t k, int dimension) { return dimension == 2 ? k * k : k * k * k; }

/// A net with weights of He's size, so that no layer's values vanish or saturate the tanh.
std::shared_ptr<const QNetwork> network(int dimension, const Ints& kernels, const Ints& dilations, int species,
                                        int width, int channels = 10, std::uint64_t seed = 1, int images = 0) {
  Random random(Key{seed, 2}, 0);
  std::vector<QLayer> layers;
  if (images == 0) images = species;
  int inputs = images;
  for (std::size_t l = 0; l < kernels.size(); ++l) {
    QLayer layer;
    layer.inputs = inputs;
    layer.outputs = l + 1 == kernels.size() ? species : channels;
    layer.kernel = kernels[l];
    layer.dilation = dilations[l];
    const std::size_t fan = static_cast<std::size_t>(inputs) * power(static_cast<std::size_t>(layer.kernel), dimension);
    const double scale = std::sqrt(6.0 / static_cast<double>(fan));
    layer.weights.resize(fan * static_cast<std::size_t>(layer.outputs));
    layer.bias.resize(static_cast<std::size_t>(layer.outputs));
    for (float& w : layer.weights) w = static_cast<float>(random.uniform(-scale, scale));
    for (float& b : layer.bias) b = static_cast<float>(random.uniform(-0.2, 0.2));
    inputs = layer.outputs;
    layers.push_back(std::move(layer));
  }
  QRepresentation r;
  r.channels = images;
  r.species = species;
  r.width = width;
  r.kernel.resize(static_cast<std::size_t>(images) * static_cast<std::size_t>(species) *
                  power(static_cast<std::size_t>(width), dimension));
  for (float& k : r.kernel) k = static_cast<float>(random.uniform(-0.2, 1.0));
  for (int c = 0; c < images; ++c) r.bias.push_back(-0.1f * static_cast<float>(c + 1));
  return std::make_shared<QNetwork>(dimension, std::move(layers), std::move(r));
}

/// The definition in float64: every output voxel, every tap; 2D grids have one voxel along the first direction.
std::vector<double> naive(const QNetwork& net, const Shape& shape, const Flags& periodic,
                          std::span<const Placed> placed) {
  const bool flat = net.dimension() == 2;
  const int n[3] = {flat ? 1 : static_cast<int>(shape[0]), static_cast<int>(shape[shape.size() - 2]),
                    static_cast<int>(shape.back())};
  const bool round[3] = {!flat && periodic[0], periodic[shape.size() - 2] != 0, periodic.back() != 0};
  const int voxels = n[0] * n[1] * n[2];
  // The voxel at a distance from another, or -1 outside.
  const auto at = [&](int v, int dz, int dy, int dx) {
    int u[3] = {v / n[2] / n[1] + dz, v / n[2] % n[1] + dy, v % n[2] + dx};
    for (int a = 0; a < 3; ++a) {
      if (round[a]) u[a] = (u[a] % n[a] + n[a]) % n[a];
      if (u[a] < 0 || u[a] >= n[a]) return -1;
    }
    return (u[0] * n[1] + u[1]) * n[2] + u[2];
  };
  const auto taps = [&](int k, int d, const std::function<void(int, int, int, int)>& body) {
    const int h = k / 2, kz = flat ? 1 : k;
    for (int z = 0, t = 0; z < kz; ++z)
      for (int y = 0; y < k; ++y)
        for (int x = 0; x < k; ++x, ++t) body(t, flat ? 0 : (z - h) * d, (y - h) * d, (x - h) * d);
  };
  const QRepresentation& r = net.representation();
  std::vector<double> in(static_cast<std::size_t>(r.channels * voxels));
  const int volume = static_cast<int>(power(static_cast<std::size_t>(r.width), net.dimension()));
  for (int c = 0; c < r.channels; ++c) {
    std::fill_n(in.begin() + c * voxels, voxels, r.bias[static_cast<std::size_t>(c)]);
    for (const Placed& atom : placed)
      taps(r.width, 1, [&](int t, int dz, int dy, int dx) {
        const int u = at(static_cast<int>(atom.voxel), dz, dy, dx);
        if (u >= 0)
          in[static_cast<std::size_t>(c * voxels + u)] +=
              r.kernel[static_cast<std::size_t>((c * r.species + atom.species) * volume + t)];
      });
  }
  for (std::size_t l = 0; l < net.layers().size(); ++l) {
    const QLayer& layer = net.layers()[l];
    const int size = static_cast<int>(power(static_cast<std::size_t>(layer.kernel), net.dimension()));
    std::vector<double> out(static_cast<std::size_t>(layer.outputs * voxels));
    for (int o = 0; o < layer.outputs; ++o)
      for (int v = 0; v < voxels; ++v) {
        double sum = layer.bias[static_cast<std::size_t>(o)];
        taps(layer.kernel, layer.dilation, [&](int t, int dz, int dy, int dx) {
          const int u = at(v, dz, dy, dx);
          for (int i = 0; i < layer.inputs && u >= 0; ++i)
            sum += double{layer.weights[static_cast<std::size_t>((o * layer.inputs + i) * size + t)]} *
                   in[static_cast<std::size_t>(i * voxels + u)];
        });
        const bool last = l + 1 == net.layers().size();
        out[static_cast<std::size_t>(o * voxels + v)] = last ? std::tanh(sum) : std::max(sum, 0.01 * sum);
      }
    in = std::move(out);
  }
  return in;
}

template <class A, class B>
double difference(const A& a, const B& b) {
  double most = a.size() == b.size() ? 0 : 1e30;
  for (std::size_t k = 0; k < std::min(a.size(), b.size()); ++k)
    most = std::max(most, std::abs(static_cast<double>(a[k]) - static_cast<double>(b[k])));
  return most;
}

std::vector<Placed> atoms(const QMap& map, int n, std::uint64_t seed) {
  Random random(Key{seed, 5}, 0);
  std::vector<Placed> out;
  for (int k = 0; k < n; ++k)
    out.push_back({static_cast<std::int32_t>(random.uniform(0, map.network().species())),
                   static_cast<std::int64_t>(random.uniform(0, static_cast<double>(map.voxels())))});
  return out;
}

struct Case {
  const char* name;
  int dimension;
  Ints kernels, dilations;
  int species, width;
  Shape shape;
  Flags periodic;
  int channels = 10;
  int images = 0;  // channels of the representation; 0: one for each species
};

// Directions that are even, odd, prime; periodic, open, mixed; shorter than a kernel; not divisible by the dilation.
const Case kCases[] = {
    {"2D periodic", 2, {5, 5, 5, 5}, {1, 1, 1, 1}, 1, 1, {12, 15}, {1, 1}},
    {"2D open", 2, {5, 5, 5, 5}, {1, 1, 1, 1}, 3, 5, {13, 17}, {0, 0}},
    {"2D mixed, d = 2", 2, {3, 5, 3, 3}, {2, 2, 2, 2}, 2, 3, {19, 16}, {1, 0}},
    {"2D mixed, d = 3", 2, {3, 3, 3, 5}, {3, 3, 3, 3}, 2, 5, {18, 22}, {0, 1}},
    {"2D a dilation per layer", 2, {3, 5, 7, 3}, {2, 3, 1, 2}, 2, 3, {20, 17}, {1, 0}},
    {"2D kernels wider than the grid", 2, {9, 9, 9, 9}, {1, 1, 1, 1}, 1, 5, {5, 24}, {1, 1}},
    {"2D many channels", 2, {3, 5, 3, 3}, {1, 1, 1, 1}, 2, 3, {14, 13}, {1, 0}, 19},
    {"2D few channels, two layers", 2, {5, 3}, {1, 2}, 2, 3, {14, 13}, {1, 0}, 3},
    {"2D five layers", 2, {3, 3, 3, 3, 3}, {1, 1, 2, 1, 1}, 1, 1, {14, 15}, {0, 0}},
    {"3D periodic", 3, {3, 3, 3, 3}, {1, 1, 1, 1}, 2, 3, {8, 9, 10}, {1, 1, 1}},
    {"3D open, d = 2", 3, {3, 3, 3, 3}, {2, 2, 2, 2}, 2, 3, {12, 13, 9}, {0, 0, 0}},
    {"3D open and large, d = 2", 3, {3, 3, 3, 3}, {2, 2, 2, 2}, 1, 1, {18, 23, 19}, {0, 0, 0}, 4},
    {"3D mixed, d = 2", 3, {3, 5, 3, 3}, {2, 2, 2, 2}, 2, 5, {10, 12, 9}, {1, 1, 0}},
    {"3D mixed, d = 3", 3, {3, 3, 3, 3}, {3, 3, 3, 3}, 1, 3, {9, 13, 14}, {0, 1, 1}},
    {"3D thin", 3, {5, 3, 5, 3}, {1, 1, 1, 1}, 2, 3, {3, 30, 6}, {1, 0, 1}},
    {"3D last layer kept, d = 2", 3, {3, 3, 3, 7}, {2, 2, 2, 2}, 2, 3, {21, 18, 20}, {0, 1, 0}},
    {"3D last layer of another dilation", 3, {3, 3, 3, 7}, {2, 2, 2, 1}, 2, 3, {21, 18, 20}, {0, 0, 0}},
    {"3D last layer of half the dilation", 3, {3, 3, 3, 3}, {4, 4, 4, 2}, 1, 3, {21, 18, 20}, {0, 0, 0}},
    {"2D one row, periodic", 2, {3, 3, 3, 3}, {1, 1, 1, 1}, 2, 3, {1, 30}, {1, 1}},
    {"2D one cell a phase", 2, {3, 3, 3, 3}, {5, 5, 5, 5}, 2, 3, {30, 5}, {0, 1}},
    {"2D kernels of one voxel", 2, {1, 1, 3}, {1, 1, 1}, 2, 1, {20, 20}, {0, 0}},
    {"2D change smaller than the dilation", 2, {3, 3, 3}, {1, 5, 1}, 1, 1, {9, 9}, {1, 1}},
    {"2D more images than channels", 2, {3, 5, 3}, {1, 1, 1}, 2, 5, {14, 13}, {0, 0}, 3, 7},
};

std::shared_ptr<const QNetwork> network(const Case& c) {
  return network(c.dimension, c.kernels, c.dilations, c.species, c.width, c.channels, 1, c.images);
}

void expect(const Case& c, const char* what, double difference) {
  if (!(difference <= kClose))
    minitest::fail(__FILE__, __LINE__, std::string(c.name) + ", " + what + ": off by " + std::to_string(difference));
}

}  // namespace

TEST(dense_is_the_definition) {
  for (const Case& c : kCases) {
    const auto net = network(c);
    const QMap map(net, c.shape, c.periodic);
    for (const int n : {0, 4}) {
      const auto placed = atoms(map, n, 3);
      const auto q = map.dense(placed);
      expect(c, "dense", difference(q, naive(*net, c.shape, c.periodic, placed)));
      double largest = 0;
      for (const float v : q) largest = std::max(largest, std::abs(static_cast<double>(v)));
      CHECK(largest > 0.03 && largest < 0.9999);  // the comparison means something
    }
  }
}

TEST(every_method_is_dense) {
  for (const Case& c : kCases) {
    const auto map = std::make_shared<QMap>(network(c), c.shape, c.periodic);
    const auto placed = atoms(*map, 5, 7);
    const std::vector<std::int64_t> offsets = {0, 0, 5};
    const auto empty = map->dense({}), full = map->dense(placed), both = map->batch(offsets, placed, 1);
    expect(c, "batch", difference(std::vector(both.begin(), both.begin() + empty.size()), empty));
    expect(c, "batch", difference(std::vector(both.begin() + empty.size(), both.end()), full));
    for (const QMethod method : kMethods) {
      QState state(map, method);
      CHECK(state.method() == method);
      expect(c, "empty", difference(state.q(), empty));
      for (const Placed& atom : placed) state.place(atom.species, atom.voxel);
      expect(c, "incremental", difference(state.q(), full));
    }
  }
}

TEST(the_rim_of_a_gaussian_is_left_out) {
  // Windows of 25 x 25 and 15 x 15 hold the same Gaussian but for values below 1e-8; atoms lie near walls and inside.
  const auto with_window = [](int width) {
    const auto net = network(2, {5, 3, 5, 3}, {1, 1, 1, 1}, 2, width);
    QRepresentation r = net->representation();
    for (int c = 0, k = 0; c < 4; ++c)
      for (int y = -width / 2; y <= width / 2; ++y)
        for (int x = -width / 2; x <= width / 2; ++x, ++k)
          r.kernel[static_cast<std::size_t>(k)] =
              c % 3 == 0 ? static_cast<float>(std::exp(-(x * x + y * y) / (2 * 1.25 * 1.25))) : 0.0f;
    return std::make_shared<const QNetwork>(2, net->layers(), r);
  };
  const Shape shape = {31, 28};
  const Flags open = {0, 0};
  const std::vector<Placed> placed = {{0, 14 * 28 + 13}, {1, 3 * 28 + 26}, {0, 30 * 28}};
  const auto wide = with_window(25);
  const auto map = std::make_shared<QMap>(wide, shape, open),
             narrow = std::make_shared<QMap>(with_window(15), shape, open);
  const auto exact = naive(*wide, shape, open, placed);
  const std::vector<std::int64_t> offsets = {0, 3};
  const Case c{"Gaussian", 2, {}, {}, 2, 25, shape, open};
  expect(c, "dense", difference(map->dense(placed), exact));
  expect(c, "batch", difference(map->batch(offsets, placed, 1), exact));
  for (const QMethod method : kMethods) {
    QState state(map, method), other(narrow, method);
    for (const Placed& atom : placed) state.place(atom.species, atom.voxel);
    expect(c, "incremental", difference(state.q(), exact));
    state.undo();
    CHECK(state.expand(1, 400).bytes() == other.expand(1, 400).bytes());
  }
}

TEST(chosen_voxels) {
  const Case& c = kCases[12];
  const auto map = std::make_shared<QMap>(network(c), c.shape, c.periodic);
  Random random(Key{9, 9}, 0);
  for (const QMethod method : kMethods) {
    QState state(map, method);
    state.place(1, 77);
    state.place(0, 500);
    const auto all = state.q();
    std::vector<std::int64_t> voxels;
    for (int k = 0; k < 101; ++k)
      voxels.push_back(static_cast<std::int64_t>(random.uniform(0, static_cast<double>(map->voxels()))));
    std::vector<float> some(2 * voxels.size());
    state.q(voxels, some);
    for (std::size_t s = 0; s < 2; ++s)
      for (std::size_t k = 0; k < voxels.size(); ++k)
        CHECK(some[s * voxels.size() + k] == all[s * static_cast<std::size_t>(map->voxels()) + voxels[k]]);
    state.q({}, {});
  }
}

TEST(undo_and_apply_are_exact) {
  for (const Case& c : kCases) {
    const auto map = std::make_shared<QMap>(network(c), c.shape, c.periodic);
    const auto placed = atoms(*map, 3, 11);
    for (const QMethod method : kMethods) {
      QState state(map, method);
      const auto empty = state.q();
      state.place(placed[0].species, placed[0].voxel);
      const auto one = state.q();
      const QDelta second = state.expand(placed[1].species, placed[1].voxel);
      CHECK(state.q() == one && state.placed().size() == 1);
      CHECK(second.bytes() > 0 && second.placed().voxel == placed[1].voxel);
      state.place(placed[1].species, placed[1].voxel);
      const auto two = state.q();
      state.undo();
      state.apply(second);
      CHECK(state.q() == two && state.placed().size() == 2);
      state.undo();
      CHECK(state.q() == one);
      state.place(placed[2].species, placed[2].voxel);
      CHECK(state.q() != one);
      state.undo();
      state.undo();
      CHECK(state.q() == empty && state.placed().empty());
      // A delta serves any number of states with the same atoms.
      QState other(map, method);
      other.place(placed[0].species, placed[0].voxel);
      other.apply(second);
      CHECK(other.q() == two);
    }
  }
}

TEST(no_drift_over_twenty_atoms) {
  for (const Case& c : {kCases[0], kCases[12], kCases[11], kCases[15]}) {
    const auto map = std::make_shared<QMap>(network(c), c.shape, c.periodic);
    for (const QMethod method : kMethods) {
      QState state(map, method);
      Random random(Key{21, 4}, 0);
      for (const Placed& atom : atoms(*map, 20, 13)) {
        state.place(atom.species, atom.voxel);
        while (random.uniform() < 0.5 && !state.placed().empty()) {  // back some way and forth again
          QDelta delta = state.retract();
          if (random.uniform() < 0.5) state.place(0, static_cast<std::int64_t>(random.uniform(0, 100))), state.undo();
          state.apply(std::move(delta));
        }
      }
      CHECK(state.placed().size() == 20);
      expect(c, "after 20 atoms", difference(state.q(), map->dense(state.placed())));
    }
  }
}

TEST(batch_does_not_depend_on_threads_or_company) {
  for (const std::size_t k : {1ul, 12ul}) {
    const Case& c = kCases[k];
    const auto map = std::make_shared<QMap>(network(c), c.shape, c.periodic);
    const auto placed = atoms(*map, 40, 17);
    std::vector<std::int64_t> offsets{0};
    for (int i = 0; i < 19; ++i) offsets.push_back(std::min<std::int64_t>(40, offsets.back() + i % 4));
    offsets.back() = 40;
    const auto one = map->batch(offsets, placed, 1), three = map->batch(offsets, placed, 3);
    CHECK(one == three);
    const std::size_t size = one.size() / 19;
    for (std::size_t i = 0; i < 19; ++i) {
      const std::size_t n = static_cast<std::size_t>(offsets[i + 1] - offsets[i]);
      const auto own = std::span(placed).subspan(static_cast<std::size_t>(offsets[i]), n);
      const std::vector<std::int64_t> single = {0, static_cast<std::int64_t>(n)};
      const auto alone = map->batch(single, own, 1);
      CHECK(std::equal(alone.begin(), alone.end(), one.begin() + i * size));
      expect(c, "batch", difference(alone, map->dense(own)));
    }
    CHECK(map->batch(std::vector<std::int64_t>{0}, {}, 2).empty());
  }
}

TEST(all_instruction_sets_agree) {
  const std::string before = active_isa();
  for (const std::size_t k : {1ul, 6ul, 7ul, 12ul, 13ul, 15ul}) {
    const Case& c = kCases[k];
    for (const char* isa : {"x86-64-v2", "x86-64-v3", "x86-64-v4"}) {
      if (!force_isa(isa)) continue;
      const auto map = std::make_shared<QMap>(network(c), c.shape, c.periodic);
      const auto placed = atoms(*map, 3, 5);
      const auto q = map->dense(placed);
      expect(c, isa, difference(q, naive(map->network(), c.shape, c.periodic, placed)));
      for (const QMethod method : kMethods) {
        QState state(map, method);
        for (const Placed& atom : placed) state.place(atom.species, atom.voxel);
        expect(c, isa, difference(state.q(), q));
      }
    }
    force_isa(before.c_str());
  }
}

TEST(transforms_of_every_length) {
  // Periodic directions whose length has no factors but 2, 3, 5 are transformed at their own length.
  const auto net = network(2, {3, 3}, {1, 1}, 1, 1, 2);
  for (const std::int64_t n :
       {2,  3,  4,  5,  6,  8,  9,  10, 12, 15, 16,  18,  20,  24,  25,  27,  30,  32,  36,  40,  45,
        48, 54, 60, 64, 72, 75, 80, 81, 90, 96, 100, 125, 128, 144, 150, 180, 216, 240, 243, 250, 256}) {
    const auto map = std::make_shared<QMap>(net, Shape{4, n}, Flags{1, 1});
    QState state(map, QMethod::grid_fft);
    state.place(0, n + n / 2);
    CHECK(difference(state.q(), map->dense(state.placed())) <= kClose);
  }
}

TEST(weights_and_receptive_fields) {
  const auto count = [](int dimension, int kernel, int species) {
    return q_weight_count(dimension, Ints{species, 10, 10, 10, species}, Ints(4, kernel));
  };
  CHECK(count(2, 15, 1) == 49531);
  CHECK(count(3, 11, 2) == 319472);
  CHECK(count(3, 7, 2) == 82352);
  CHECK(count(3, 5, 2) == 30032);
  CHECK(q_receptive_radius(Ints(4, 11), Ints(4, 1)) == 20);
  CHECK(q_receptive_radius(Ints(4, 7), Ints(4, 2)) == 24);
  CHECK(q_receptive_radius(Ints(4, 5), Ints(4, 3)) == 24);
  const auto net = network(3, {5, 5, 5, 5}, {3, 3, 3, 3}, 2, 1);
  CHECK(net->weight_count() == 30032 && net->receptive_radius() == 24);

  // An atom changes Q as far as the radius says and no farther.
  const auto flat = network(2, {3, 5, 3, 3}, {2, 1, 2, 1}, 1, 3);
  const int radius = flat->receptive_radius() + 1;
  const auto map = std::make_shared<QMap>(flat, Shape{1, 41}, Flags{0, 0});
  const auto without = map->dense({}), with = map->dense(std::vector<Placed>{{0, 20}});
  for (int x = 0; x < 41; ++x) CHECK((without[x] == with[x]) == (std::abs(x - 20) > radius));
}

TEST(automatic_choices) {
  const auto flat = std::make_shared<QMap>(network(2, Ints(4, 15), Ints(4, 1), 1, 7), Shape{41, 36}, Flags{1, 1});
  CHECK(QState(flat).method() == QMethod::grid_fft);
  const QMap large(network(3, Ints(4, 7), Ints(4, 2), 2, 9), Shape{60, 60, 60}, Flags{0, 0, 0});
  CHECK(large.choose(20000) == QMethod::local_fft);
  // Whether the last layer is kept shows in the size of a change.
  const auto bytes = [](const Case& c, QMethod method) {
    return QState(std::make_shared<QMap>(network(c), c.shape, c.periodic), method).expand(0, 0).bytes();
  };
  CHECK(bytes(kCases[15], QMethod::local_fft) > bytes(kCases[15], QMethod::direct));
  CHECK(bytes(kCases[9], QMethod::local_fft) == bytes(kCases[9], QMethod::direct));
}

TEST(bad_input) {
  const auto net = network(2, {3, 3}, {1, 1}, 2, 1, 4);
  const auto layers = net->layers();
  const auto with = [&](auto change) {
    auto copy = layers;
    change(copy);
    return QNetwork(2, copy, net->representation());
  };
  THROWS(QNetwork(4, layers, net->representation()), "dimension must be 2 or 3, but it is 4");
  THROWS(with([](auto& l) { l.pop_back(); }), "at least two layers");
  THROWS(with([](auto& l) { l[1].inputs = 5; }), "layer 2 must have 4 inputs");
  THROWS(with([](auto& l) { l[0].kernel = 4; }), "the kernel of layer 1 must be odd");
  THROWS(with([](auto& l) { l[0].dilation = 0; }), "the dilation of layer 1 must be from 1 to 16");
  THROWS(with([](auto& l) { l[0].weights.pop_back(); }), "weights of layer 1 must hold 72 values");
  THROWS(with([](auto& l) { l[1].bias.clear(); }), "the bias of layer 2 must hold 2 values");
  THROWS(with([](auto& l) { l[1].bias[0] = NAN; }), "must be finite");
  THROWS(QNetwork(2, layers, QRepresentation::one_hot(3)), "layer 1 must have 3 inputs");
  auto narrow = QRepresentation::one_hot(2);
  narrow.width = 3;
  THROWS(QNetwork(2, layers, narrow), "the representation's kernel must hold 36 values");

  THROWS(QMap(nullptr, Shape{4, 4}, Flags{1, 1}), "needs a network");
  THROWS(QMap(net, Shape{4, 4, 4}, Flags{1, 1, 1}), "one entry per direction of the network, 2");
  THROWS(QMap(net, Shape{4, 0}, Flags{1, 1}), "1 to 2000 voxels per direction");
  const auto map = std::make_shared<QMap>(net, Shape{4, 4}, Flags{1, 1});
  const std::vector<Placed> outside = {{0, 16}}, unknown = {{2, 0}};
  THROWS(map->dense(outside), "voxels of this grid are 0 to 15, but one is 16");
  THROWS(map->dense(unknown), "species must be from 0 to 1, but one is 2");
  THROWS(map->batch(std::vector<std::int64_t>{0, 2}, outside),
         "offsets must rise from 0 to the number of placed atoms");
  THROWS(map->batch(std::vector<std::int64_t>{0, 1}, outside), "but one is 16");

  THROWS(QState(nullptr), "needs a Q-map");
  QState state(map, QMethod::direct);
  THROWS(state.undo(), "no atom is placed");
  THROWS(state.place(0, -1), "but one is -1");
  const QDelta delta = state.expand(0, 3);
  state.place(1, 1);
  THROWS(state.apply(delta), "with other atoms placed");
  QState elsewhere(std::make_shared<QMap>(net, Shape{9, 4}, Flags{1, 1}), QMethod::direct);
  THROWS(elsewhere.apply(delta), "of another map");
  std::vector<float> out(3);
  THROWS(state.q(std::vector<std::int64_t>{1, 2}, out), "out must hold species x voxels, 4 values");
  THROWS(state.q(std::vector<std::int64_t>{99}, std::span(out).first(2)), "but one is 99");
  const auto deep = std::make_shared<QMap>(network(2, {3, 3, 3}, {1, 1, 1}, 2, 1), Shape{4, 4}, Flags{1, 1});
  QState direct(deep, QMethod::direct), whole(deep, QMethod::grid_fft);
  THROWS(whole.apply(direct.expand(0, 3)), "another method");
  const auto wide = std::make_shared<QMap>(net, Shape{2, 601}, Flags{1, 0});
  THROWS(QState(wide, QMethod::grid_fft), "choose the method `direct`");
  CHECK(difference(wide->batch(std::vector<std::int64_t>{0, 1}, outside, 1), wide->dense(outside)) == 0);
}

MINITEST_MAIN
