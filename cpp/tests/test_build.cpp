#include <algorithm>
#include <cmath>
#include <vector>

#include "minitest.hpp"
#include "thalweg/build.hpp"

using namespace thalweg;

namespace {

const std::uint8_t kNone[3] = {0, 0, 0}, kPlane[3] = {1, 1, 0}, kAll[3] = {1, 1, 1};
const double kLarge[9] = {30, 0, 0, 0, 30, 0, 0, 0, 30};
const Key kKey{11, 12};

Confinement box(std::vector<double> corner, std::vector<double> vectors, std::vector<std::uint8_t> open = {0, 0, 0}) {
  Confinement out;
  out.active = true;
  std::copy(corner.begin(), corner.end(), out.corner);
  std::copy(vectors.begin(), vectors.end(), out.vectors);
  std::copy(open.begin(), open.end(), out.open);
  return out;
}

BuildSettings in_box(const Confinement& c) {
  BuildSettings settings;
  settings.box = c;
  return settings;
}
BuildSettings in_cube(double edge) { return in_box(box({0, 0, 0}, {edge, 0, 0, 0, edge, 0, 0, 0, edge})); }

// Distance of the closest images by brute force over 7^3 cells.
double image_distance(const double* a, const double* b, const double* cell, const std::uint8_t* pbc, bool own = false) {
  double least = 1e300;
  const int m[3] = {pbc[0] ? 3 : 0, pbc[1] ? 3 : 0, pbc[2] ? 3 : 0};
  for (int i = -m[0]; i <= m[0]; ++i)
    for (int j = -m[1]; j <= m[1]; ++j)
      for (int k = -m[2]; k <= m[2]; ++k) {
        if (own && i == 0 && j == 0 && k == 0) continue;
        double square = 0;
        for (int c = 0; c < 3; ++c) {
          const double d = a[c] - b[c] + i * cell[c] + j * cell[3 + c] + k * cell[6 + c];
          square += d * d;
        }
        least = std::min(least, square);
      }
  return std::sqrt(least);
}

// Two layers of gold (111), 3 x 3, in a hexagonal cell whose second vector leans far over.
struct Slab {
  std::vector<double> positions;
  std::vector<std::int32_t> numbers;
  double cell[9];
  double top;
  Slab() {
    const double a = 2.884, h = a * std::sqrt(2.0 / 3.0), u[3] = {a, 0, 0}, v[3] = {a / 2, a * std::sqrt(0.75), 0};
    for (int layer = 0; layer < 2; ++layer)
      for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j) {
          for (int c = 0; c < 3; ++c)
            positions.push_back((i + layer / 3.0) * u[c] + (j + layer / 3.0) * v[c] + (c == 2 ? layer * h : 0));
          numbers.push_back(79);
        }
    for (int c = 0; c < 3; ++c) {
      cell[c] = 3 * u[c];
      cell[3 + c] = 3 * v[c] + 6 * u[c];  // the same lattice as 3 v, badly skewed
      cell[6 + c] = c == 2 ? 20 : 0;
    }
    top = h;
  }
  StructureView view() const { return {numbers.size(), positions.data(), numbers.data(), cell, kPlane, nullptr}; }
};

StructureView empty_frame(const double* cell = kLarge, const std::uint8_t* pbc = kNone) {
  return {0, nullptr, nullptr, cell, pbc, nullptr};
}

std::vector<std::int32_t> au4ni4() { return {79, 79, 79, 79, 28, 28, 28, 28}; }

// Smallest r / (R_i + R_j), and whether every atom of `from` on has one within c2.
void inspect(const double* x, const std::vector<std::int32_t>& z, const double* cell, const std::uint8_t* pbc,
             std::size_t from, double c2, double& closest, bool& bonded) {
  closest = 1e300;
  bonded = true;
  for (std::size_t i = from; i < z.size(); ++i) {
    double nearest = 1e300;
    for (std::size_t j = 0; j < z.size(); ++j) {
      if (i == j) continue;
      const double ratio =
          image_distance(x + 3 * i, x + 3 * j, cell, pbc) / (covalent_radius(z[i]) + covalent_radius(z[j]));
      nearest = std::min(nearest, ratio);
    }
    const double own = image_distance(x + 3 * i, x + 3 * i, cell, pbc, true) / (2 * covalent_radius(z[i]));
    closest = std::min({closest, nearest, own});
    bonded = bonded && nearest <= c2 + 1e-12;
  }
}

struct Structures {
  std::vector<double> positions, cells;
  std::vector<std::int32_t> numbers;
  std::vector<std::int64_t> offsets{0};
  std::vector<std::uint8_t> pbc, fixed;
  void add(const std::vector<double>& x, const std::vector<std::int32_t>& z, const double* cell = kLarge,
           const std::uint8_t* periodic = kNone, std::size_t fixed_atoms = 0) {
    positions.insert(positions.end(), x.begin(), x.end());
    numbers.insert(numbers.end(), z.begin(), z.end());
    for (std::size_t i = 0; i < 3 * z.size(); ++i) fixed.push_back(i < 3 * fixed_atoms);
    offsets.push_back(static_cast<std::int64_t>(numbers.size()));
    cells.insert(cells.end(), cell, cell + 9);
    pbc.insert(pbc.end(), periodic, periodic + 3);
  }
  BatchView view() const { return {positions, numbers, offsets, cells, pbc, fixed}; }
};

}  // namespace

TEST(random_clusters_respect_window_and_box) {
  const auto z = au4ni4();
  const BuildResult r = random_structures(empty_frame(), z, in_cube(6), 500, kKey, 0);
  for (std::size_t row = 0; row < 500; ++row) {
    CHECK(r.ok[row]);
    double closest;
    bool bonded;
    inspect(r.positions.data() + 24 * row, z, kLarge, kNone, 0, 1.25, closest, bonded);
    CHECK(closest >= 0.75 - 1e-12 && bonded);
    for (std::size_t i = 0; i < 24; ++i)
      CHECK(r.positions[24 * row + i] > -1e-9 && r.positions[24 * row + i] < 6 + 1e-9);
  }
}

TEST(random_clusters_are_connected) {
  const auto z = au4ni4();
  const BuildResult r = random_structures(empty_frame(), z, in_cube(7), 200, kKey, 0);
  Structures s;
  for (std::size_t row = 0; row < 200; ++row)
    s.add({r.positions.begin() + 24 * static_cast<long>(row), r.positions.begin() + 24 * static_cast<long>(row + 1)},
          z);
  for (const std::int32_t pieces : fragments(s.view(), 1.25)) CHECK(pieces == 1);
  const std::vector<double> closest = closest_contacts(s.view());
  CHECK(*std::min_element(closest.begin(), closest.end()) >= 0.75 - 1e-12);
}

TEST(directions_and_distances_of_pairs) {
  // In a wide box a dimer shows the law of placement: <z^2> = 1/3, distance uniform in volume.
  const std::vector<std::int32_t> z = {79, 28};
  const std::size_t count = 20000;
  const BuildResult r = random_structures(
      empty_frame(), z, in_box(box({-500, -500, -500}, {1000, 0, 0, 0, 1000, 0, 0, 0, 1000})), count, kKey, 0);
  const double sum = covalent_radius(79) + covalent_radius(28), a = std::pow(.75 * sum, 3), b = std::pow(1.25 * sum, 3);
  double second[3] = {0, 0, 0}, mean[3] = {0, 0, 0}, quantile[4] = {0, 0, 0, 0};
  for (std::size_t row = 0; row < count; ++row) {
    const double* x = r.positions.data() + 6 * row;
    const double d[3] = {x[3] - x[0], x[4] - x[1], x[5] - x[2]}, length = std::hypot(d[0], d[1], d[2]);
    for (int c = 0; c < 3; ++c) {
      second[c] += d[c] * d[c] / (length * length) / count;
      mean[c] += d[c] / length / count;
    }
    const double u = (length * length * length - a) / (b - a);
    CHECK(u > -1e-9 && u < 1 + 1e-9);
    quantile[std::min(3, static_cast<int>(4 * u))] += 1.0 / count;
  }
  for (int c = 0; c < 3; ++c) {
    CLOSE(second[c], 1.0 / 3.0, 0.012);  // 5 sigma
    CLOSE(mean[c], 0.0, 0.02);
  }
  for (const double q : quantile) CLOSE(q, 0.25, 0.016);
}

TEST(slabs_in_skewed_cells_keep_true_distances) {
  const Slab slab;
  const std::vector<std::int32_t> placed(6, 28);
  const BuildSettings settings =
      in_box(box({-3, 2, slab.top + 1}, {slab.cell[0], 0, 0, slab.cell[3], slab.cell[4], 0, 0, 0, 5}, {1, 1, 0}));
  const BuildResult r = random_structures(slab.view(), placed, settings, 200, kKey, 0);
  std::vector<std::int32_t> z = slab.numbers;
  z.insert(z.end(), 6, 28);
  Structures s;
  for (std::size_t row = 0; row < 200; ++row) {
    const double* x = r.positions.data() + 3 * 24 * row;
    CHECK(r.ok[row]);
    CHECK(std::equal(x, x + 54, slab.positions.begin()));
    double closest;
    bool bonded;
    inspect(x, z, slab.cell, kPlane, 18, 1.25, closest, bonded);
    CHECK(closest >= 0.75 - 1e-9 && bonded);
    for (std::size_t i = 18; i < 24; ++i)
      CHECK(x[3 * i + 2] > slab.top + 1 - 1e-9 && x[3 * i + 2] < slab.top + 6 + 1e-9);
    s.add({x, x + 72}, z, slab.cell, kPlane, 18);
  }
  for (const std::int32_t pieces : fragments(s.view(), 1.25)) CHECK(pieces == 1);
  // The same numbers from closest_contacts as from brute force, fixed pairs left out.
  const std::vector<double> contacts = closest_contacts(s.view());
  for (std::size_t row = 0; row < 20; ++row) {
    double closest;
    bool bonded;
    inspect(s.positions.data() + 72 * row, z, slab.cell, kPlane, 18, 1.25, closest, bonded);
    CLOSE(contacts[row], closest, 1e-12);
  }
}

TEST(crystals_fill_their_cell) {
  const double cell[9] = {4.2, 0, 0, 1.9, 4.0, 0, -1.5, 0.8, 4.4};
  const std::vector<std::int32_t> z = {22, 22, 8, 8, 8, 8};
  const BuildSettings settings = in_box(box({0, 0, 0}, std::vector<double>(cell, cell + 9), {1, 1, 1}));
  const BuildResult r = random_structures(empty_frame(cell, kAll), z, settings, 100, kKey, 0);
  std::size_t good = 0;
  for (std::size_t row = 0; row < 100; ++row) {
    if (!r.ok[row]) continue;
    ++good;
    double closest;
    bool bonded;
    inspect(r.positions.data() + 18 * row, z, cell, kAll, 0, 1.25, closest, bonded);
    CHECK(closest >= 0.75 - 1e-9 && bonded);
  }
  CHECK(good > 90);
}

TEST(walls_in_a_periodic_cell_hold) {
  // A box inside the cell: bonds across the cell's border do not carry atoms through the box's walls.
  const double cell[9] = {6, 0, 0, 0, 6, 0, 0, 0, 20};
  const BuildSettings settings = in_box(box({0.5, 0.5, 5}, {5, 0, 0, 0, 5, 0, 0, 0, 5}));
  const std::vector<std::int32_t> z(5, 28);
  const BuildResult r = random_structures(empty_frame(cell, kPlane), z, settings, 100, kKey, 0);
  for (std::size_t row = 0; row < 100; ++row) {
    CHECK(r.ok[row]);
    double closest;
    bool bonded;
    inspect(r.positions.data() + 15 * row, z, cell, kPlane, 0, 1.25, closest, bonded);
    CHECK(closest >= 0.75 - 1e-9);
    for (std::size_t i = 0; i < 5; ++i) {
      const double* x = r.positions.data() + 15 * row + 3 * i;
      for (int c = 0; c < 3; ++c) CHECK(x[c] > (c == 2 ? 5 : 0.5) - 1e-9 && x[c] < (c == 2 ? 10 : 5.5) + 1e-9);
    }
  }
}

TEST(flat_boxes_give_planar_structures) {
  const std::vector<std::int32_t> z(8, 6);
  for (const double height : {0.0, 0.05}) {
    const BuildResult r =
        random_structures(empty_frame(), z, in_box(box({1, 1, 2}, {7, 0, 0, 0, 7, 0, 0, 0, height})), 50, kKey, 0);
    for (std::size_t row = 0; row < 50; ++row) {
      CHECK(r.ok[row]);
      double closest;
      bool bonded;
      inspect(r.positions.data() + 24 * row, z, kLarge, kNone, 0, 1.25, closest, bonded);
      CHECK(closest >= 0.75 - 1e-9 && bonded);
      for (std::size_t i = 0; i < 8; ++i) {
        const double h = r.positions[24 * row + 3 * i + 2];
        CHECK(h > 2 - 1e-9 && h < 2 + height + 1e-9);
      }
    }
  }
}

TEST(rows_do_not_depend_on_count_or_threads_or_where_they_start) {
  const Slab slab;
  const std::vector<std::int32_t> placed(4, 28);
  const BuildSettings settings =
      in_box(box({0, 0, slab.top + 1}, {slab.cell[0], 0, 0, slab.cell[3], slab.cell[4], 0, 0, 0, 5}, {1, 1, 0}));
  const BuildResult all = random_structures(slab.view(), placed, settings, 100, kKey, 5, 1);
  const BuildResult threads = random_structures(slab.view(), placed, settings, 100, kKey, 5, 3);
  CHECK(all.positions == threads.positions && all.ok == threads.ok);
  const BuildResult later = random_structures(slab.view(), placed, settings, 30, kKey, 45, 2);
  CHECK(std::equal(later.positions.begin(), later.positions.end(), all.positions.begin() + 40 * 66));
  const BuildResult other = random_structures(slab.view(), placed, settings, 100, Key{11, 13}, 5, 1);
  CHECK(other.positions != all.positions);

  std::vector<std::int32_t> z = slab.numbers;
  z.insert(z.end(), 4, 28);
  Structures s, few;
  for (std::size_t row = 0; row < 100; ++row) {
    const auto first = all.positions.begin() + 66 * static_cast<long>(row);
    s.add({first, first + 66}, z, slab.cell, kPlane, 17);
    if (row >= 60) few.add({first, first + 66}, z, slab.cell, kPlane, 17);
  }
  const BuildResult one = rattle(s.view(), settings, 3, 3, kKey, 7, 1),
                    two = rattle(s.view(), settings, 3, 3, kKey, 7, 2);
  const BuildResult tail = rattle(few.view(), settings, 3, 3, kKey, 67, 2);
  CHECK(one.positions == two.positions && one.ok == two.ok);
  CHECK(std::equal(tail.positions.begin(), tail.positions.end(), one.positions.begin() + 60 * 66));
  const BuildResult swapped = permute(s.view(), 0.5, kKey, 7, 1), swapped2 = permute(s.view(), 0.5, kKey, 7, 2);
  const BuildResult swapped3 = permute(few.view(), 0.5, kKey, 67, 1);
  CHECK(swapped.positions == swapped2.positions);
  CHECK(std::equal(swapped3.positions.begin(), swapped3.positions.end(), swapped.positions.begin() + 60 * 66));
  CHECK(closest_contacts(s.view(), 1) == closest_contacts(s.view(), 2));
}

TEST(rattle_moves_free_atoms_within_reach) {
  const auto z = au4ni4();
  const BuildSettings settings = in_cube(7);
  const std::size_t count = 2000;
  const BuildResult parents = random_structures(empty_frame(), z, settings, count, kKey, 0);
  Structures s;
  for (std::size_t row = 0; row < count; ++row) {
    const auto first = parents.positions.begin() + 24 * static_cast<long>(row);
    s.add({first, first + 24}, z, kLarge, kNone, 2);
    if (row % 3 == 0) {  // parents of another size in between
      s.add({first, first + 15}, {z.begin(), z.begin() + 5}, kLarge, kNone, 1);
    }
  }
  const BuildResult r = rattle(s.view(), settings, 2.0, 3.0, kKey, 0);
  double moved = 0, rows = 0;
  for (std::size_t row = 0; row + 1 < s.offsets.size(); ++row) {
    if (!r.ok[row]) continue;
    const StructureView parent = s.view()[row];
    const double* x = r.positions.data() + 3 * s.offsets[row];
    const std::vector<std::int32_t> numbers(parent.numbers, parent.numbers + parent.n);
    std::size_t here = 0;
    for (std::size_t i = 0; i < parent.n; ++i) {
      const double* from = parent.positions + 3 * i;
      const double length = std::hypot(x[3 * i] - from[0], x[3 * i + 1] - from[1], x[3 * i + 2] - from[2]);
      if (length == 0) continue;
      ++here;
      CHECK(!parent.fixed[3 * i] && length < 2.0 + 1e-9);
      for (int c = 0; c < 3; ++c) CHECK(x[3 * i + c] > -1e-9 && x[3 * i + c] < 7 + 1e-9);
      double nearest = 1e300;
      for (std::size_t j = 0; j < parent.n; ++j)
        if (j != i)
          nearest = std::min(nearest, image_distance(x + 3 * i, x + 3 * j, kLarge, kNone) /
                                          (covalent_radius(numbers[i]) + covalent_radius(numbers[j])));
      CHECK(nearest >= 0.75 - 1e-12 && nearest <= 1.25 + 1e-12);
    }
    CHECK(here >= 1);
    if (parent.n == 8) moved += static_cast<double>(here), ++rows;
  }
  CHECK(rows > 0.95 * count);
  CLOSE(moved / rows, 3.0, 0.5);  // 6 free atoms, each with probability 1/2; restarts favour fewer a little
}

TEST(rattle_keeps_partly_fixed_coordinates) {
  Structures s;
  s.add({2, 2, 2, 4.4, 2, 2, 2, 4.4, 2}, {79, 79, 79});
  for (std::size_t i = 0; i < 3; ++i) s.fixed[3 * i + 2] = 1;
  const BuildResult r = rattle(s.view(), in_cube(7), 3, 3, kKey, 0);
  CHECK(r.ok[0] && r.positions != s.positions);
  for (std::size_t i = 0; i < 3; ++i) CHECK(r.positions[3 * i + 2] == 2);
}

TEST(rows_that_fail_hold_the_parent) {
  Structures s;
  s.add({2, 2, 2, 4.4, 2, 2}, {79, 79}, kLarge, kNone, 2);  // nothing is free
  s.add({2, 2, 2, 4.4, 2, 2}, {79, 79});
  const BuildResult r = rattle(s.view(), in_cube(7), 3, 3, kKey, 0);
  CHECK(!r.ok[0] && r.ok[1]);
  CHECK(std::equal(r.positions.begin(), r.positions.begin() + 6, s.positions.begin()));
  const BuildResult p = permute(s.view(), 0.3, kKey, 0);
  CHECK(!p.ok[0] && !p.ok[1] && p.positions == s.positions);
  // Five gold atoms fit this box by volume but hardly ever by chance.
  BuildSettings tight = in_cube(2.2);
  tight.tries_per_atom = 2;
  tight.tries_per_structure = 1;
  const std::vector<std::int32_t> gold(6, 79);
  const BuildResult crowded = random_structures(empty_frame(), gold, tight, 50, kKey, 0);
  CHECK(std::count(crowded.ok.begin(), crowded.ok.end(), 0) == 50);
  for (const double x : crowded.positions) CLOSE(x, 1.1, 1e-12);
}

TEST(permute_keeps_sites_and_changes_species) {
  const auto z = au4ni4();
  const BuildResult parents = random_structures(empty_frame(), z, in_cube(7), 1000, kKey, 0);
  Structures s;
  for (std::size_t row = 0; row < 1000; ++row) {
    const auto first = parents.positions.begin() + 24 * static_cast<long>(row);
    s.add({first, first + 24}, z, kLarge, kNone, 1);
  }
  const BuildResult r = permute(s.view(), 0.3, kKey, 0);
  double changed = 0;
  for (std::size_t row = 0; row < 1000; ++row) {
    CHECK(r.ok[row]);
    const double *x = r.positions.data() + 24 * row, *from = s.positions.data() + 24 * row;
    CHECK(std::equal(x, x + 3, from));
    std::vector<std::vector<double>> before, after;
    int differ = 0;
    for (std::size_t i = 0; i < 8; ++i) {
      before.emplace_back(from + 3 * i, from + 3 * i + 3);
      after.emplace_back(x + 3 * i, x + 3 * i + 3);
    }
    for (std::size_t i = 0; i < 8; ++i) {
      const std::size_t site =
          static_cast<std::size_t>(std::find(before.begin(), before.end(), after[i]) - before.begin());
      CHECK(site < 8);
      differ += site < 8 && z[site] != z[i];
    }
    CHECK(differ >= 2 && differ % 2 == 0);
    changed += differ / 1000.0;
    std::sort(before.begin(), before.end());
    std::sort(after.begin(), after.end());
    CHECK(before == after);
  }
  CHECK(changed > 2.2 && changed < 3.2);
}

TEST(permute_of_a_single_pair_never_returns_the_parent) {
  Structures s;
  for (int row = 0; row < 200; ++row) s.add({1, 1, 1, 3, 1, 1}, {79, 28});
  const BuildResult r = permute(s.view(), 0.6, kKey, 0);
  for (std::size_t row = 0; row < 200; ++row) CHECK(r.positions[6 * row] == 3 && r.positions[6 * row + 3] == 1);
}

TEST(contacts_and_fragments_of_known_structures) {
  Structures s;
  s.add({0, 0, 0, 2, 0, 0, 12, 0, 0, 14, 0, 0}, {6, 6, 6, 6});
  s.add({0, 0, 0}, {6});
  const double chain[9] = {1.5, 0, 0, 0, 20, 0, 0, 0, 20};
  const std::uint8_t along[3] = {1, 0, 0};
  s.add({0, 0, 0}, {6}, chain, along);
  s.add({0, 0, 0, 2, 0, 0, 12, 0, 0}, {6, 6, 6}, kLarge, kNone, 3);
  const std::vector<double> closest = closest_contacts(s.view());
  CLOSE(closest[0], 2 / 1.52, 1e-12);
  CHECK(std::isinf(closest[1]));
  CLOSE(closest[2], 1.5 / 1.52, 1e-12);
  CHECK(std::isinf(closest[3]));
  const std::vector<std::int32_t> narrow = fragments(s.view(), 1.25), wide = fragments(s.view(), 1.4);
  CHECK(narrow[0] == 4 && wide[0] == 2 && narrow[1] == 1 && narrow[2] == 1 && narrow[3] == 1);
}

TEST(bad_input_says_what_to_do) {
  const auto z = au4ni4();
  BuildSettings none;
  THROWS(random_structures(empty_frame(), z, none, 1, kKey, 0), "needs a box");
  THROWS(random_structures(empty_frame(), z, in_cube(0.8), 1, kKey, 0), "box is too small: 8 atoms");
  BuildSettings window = in_cube(6);
  window.c1 = 1.3;
  THROWS(random_structures(empty_frame(), z, window, 1, kKey, 0), "0 <= c1 < c2");
  const double tiny[9] = {1.8, 0, 0, 0, 20, 0, 0, 0, 20};
  const std::uint8_t along[3] = {1, 0, 0};
  THROWS(random_structures(empty_frame(tiny, along), z, in_cube(9), 1, kKey, 0), "cell is too small: an atom of Au");
  const double flat[9] = {0, 0, 0, 0, 20, 0, 0, 0, 20};
  THROWS(random_structures(empty_frame(flat, along), z, in_cube(9), 1, kKey, 0), "lattice vector");
  Slab slab;
  slab.numbers[4] = 28;
  for (int c = 0; c < 3; ++c)
    slab.positions[3 * 4 + static_cast<std::size_t>(c)] =
        slab.positions[static_cast<std::size_t>(c)] - slab.cell[c] + (c == 2 ? 0.4 : 0.0);
  THROWS(random_structures(slab.view(), z, in_cube(9), 1, kKey, 0), "atoms 0 (Au) and 4 (Ni) are 0.400 angstrom apart");
  const std::vector<std::int32_t> unknown = {0};
  THROWS(random_structures(empty_frame(), unknown, in_cube(9), 1, kKey, 0), "atomic number 0");
  Structures s;
  s.add({0, 0, 0, 2, 0, 0}, {6, 6});
  THROWS(rattle(s.view(), none, 3, 3, kKey, 0), "needs a box");
  THROWS(rattle(s.view(), in_cube(9), 0, 3, kKey, 0), "amplitude above 0");
  THROWS(permute(s.view(), 1, kKey, 0), "again < 1");
}

MINITEST_MAIN
