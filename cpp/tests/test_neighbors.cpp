#include <array>
#include <limits>
#include <tuple>

#include "minitest.hpp"
#include "thalweg/neighbors.hpp"
#include "thalweg/random.hpp"

using namespace thalweg;

namespace {

struct Box {
  std::vector<double> positions;
  std::vector<std::int32_t> numbers;
  double cell[9];
  std::uint8_t pbc[3];
  StructureView view() const { return {numbers.size(), positions.data(), numbers.data(), cell, pbc, nullptr}; }
};

// Atoms of fractional coordinates in [-spread, 1 + spread] of a random, skewed cell.
Box random_box(std::uint64_t seed, std::size_t n, double length, double skew, int pbc, double spread) {
  Random rng(Key{seed, 1}, 0);
  Box box;
  for (int a = 0; a < 3; ++a)
    for (int k = 0; k < 3; ++k)
      box.cell[3 * a + k] = (a == k ? length * rng.uniform(0.7, 1.3) : 0.0) + skew * length * rng.uniform(-1.0, 1.0);
  for (int a = 0; a < 3; ++a) box.pbc[a] = static_cast<std::uint8_t>(pbc >> a & 1);
  for (std::size_t i = 0; i < n; ++i) {
    double f[3];
    for (double& x : f) x = rng.uniform(-spread, 1 + spread);
    for (int k = 0; k < 3; ++k)
      box.positions.push_back(f[0] * box.cell[k] + f[1] * box.cell[3 + k] + f[2] * box.cell[6 + k]);
    box.numbers.push_back(1);
  }
  return box;
}

using Pair = std::tuple<int, int, double, double, double>;

std::vector<Pair> pairs_of(const NeighborList& list) {
  std::vector<Pair> out;
  for (std::size_t p = 0; p < list.size(); ++p)
    out.emplace_back(list.i()[p], list.j()[p], list.d()[3 * p], list.d()[3 * p + 1], list.d()[3 * p + 2]);
  return out;
}

// Every image in a generous range, both directions; then one of each pair of opposite ones is dropped.
std::vector<Pair> brute_force(const Box& box, double cutoff, int range) {
  std::vector<Pair> out;
  const int n = static_cast<int>(box.numbers.size());
  int most[3];
  for (int a = 0; a < 3; ++a) most[a] = box.pbc[a] ? range : 0;
  for (int i = 0; i < n; ++i)
    for (int j = i; j < n; ++j)
      for (int p = -most[0]; p <= most[0]; ++p)
        for (int q = -most[1]; q <= most[1]; ++q)
          for (int s = -most[2]; s <= most[2]; ++s) {
            if (i == j && std::array{p, q, s} <= std::array{0, 0, 0}) continue;
            double d[3], square = 0;
            for (int k = 0; k < 3; ++k) {
              d[k] = box.positions[3 * j + k] - box.positions[3 * i + k] + p * box.cell[k] + q * box.cell[3 + k] +
                     s * box.cell[6 + k];
              square += d[k] * d[k];
            }
            if (square < cutoff * cutoff) out.emplace_back(i, j, d[0], d[1], d[2]);
          }
  return out;
}

bool same(const std::vector<Pair>& a, const std::vector<Pair>& b, double tolerance) {
  if (a.size() != b.size()) return false;
  for (std::size_t p = 0; p < a.size(); ++p) {
    const auto& [ai, aj, ax, ay, az] = a[p];
    const auto& [bi, bj, bx, by, bz] = b[p];
    if (ai != bi || aj != bj) return false;
    if (!(std::abs(ax - bx) + std::abs(ay - by) + std::abs(az - bz) <= tolerance)) return false;
  }
  return true;
}

}  // namespace

TEST(agrees_with_brute_force_for_all_boundaries_and_skewed_cells) {
  for (int pbc = 0; pbc < 8; ++pbc)
    for (std::uint64_t seed = 0; seed < 6; ++seed) {
      const double length = seed < 3 ? 5.0 : 2.2;  // in the small cell an atom sees several of its own images
      const Box box = random_box(seed, 7, length, 0.35, pbc, 0.8);
      NeighborList list(4.1, 0.5);
      list.update(box.view());
      const auto expected = brute_force(box, 4.1, 14);
      CHECK(same(pairs_of(list), expected, 1e-11));
      for (std::size_t p = 0; p < list.size(); ++p)
        CLOSE(list.r()[p], std::hypot(list.d()[3 * p], list.d()[3 * p + 1], list.d()[3 * p + 2]), 1e-12);
    }
}

TEST(search_in_bins_agrees_with_brute_force) {
  for (int pbc = 0; pbc < 8; ++pbc) {
    const Box box = random_box(40 + static_cast<std::uint64_t>(pbc), 230, 17.0, 0.15, pbc, 0.15);
    NeighborList list(4.2, 0.4);
    list.update(box.view());
    CHECK(list.size() > 200);
    CHECK(same(pairs_of(list), brute_force(box, 4.2, 3), 1e-11));
  }
  const Box thin = random_box(77, 210, 6.0, 0.2, 5, 0.1);  // reach beyond the cell: several images in the bins
  NeighborList list(5.5, 0.5);
  list.update(thin.view());
  CHECK(same(pairs_of(list), brute_force(thin, 5.5, 5), 1e-11));
}

TEST(a_tiny_cubic_cell_counts_its_own_images) {
  Box box{{0.3, -4.0, 11.0}, {1}, {1, 0, 0, 0, 1, 0, 0, 0, 1}, {1, 1, 1}};
  NeighborList list(2.3, 0.3);
  list.update(box.view());
  CHECK(list.size() == (6 + 12 + 8 + 6 + 24) / 2);  // shells at 1, sqrt 2, sqrt 3, 2, sqrt 5
}

TEST(pairs_do_not_depend_on_when_the_candidates_were_found) {
  for (const std::size_t n : {9ul, 240ul})
    for (const int pbc : {0, 3, 7}) {
      Box box = random_box(9, n, n > 100 ? 15.0 : 5.0, 0.2, pbc, 0.3);
      NeighborList kept(4.0, 0.6);
      kept.update(box.view());
      Random rng(Key{3, 3}, 0);
      for (int step = 0; step < 12; ++step) {
        for (double& x : box.positions) x += rng.uniform(-0.06, 0.06);
        kept.update(box.view());
        NeighborList fresh(4.0, 0.6), bare(4.0, 0.0);
        fresh.update(box.view());
        bare.update(box.view());
        CHECK(pairs_of(kept) == pairs_of(fresh));
        CHECK(pairs_of(kept) == pairs_of(bare));
      }
      CHECK(kept.rebuilds() >= 2);
      CHECK(kept.rebuilds() < 10);
    }
}

TEST(rebuilds_only_when_it_must) {
  Box box = random_box(4, 8, 6.0, 0.1, 7, 0.0);
  NeighborList list(4.0, 0.5);
  list.update(box.view());
  box.positions[0] += 0.24;
  list.update(box.view());
  CHECK(list.rebuilds() == 1);
  box.positions[0] += 0.02;
  list.update(box.view());
  CHECK(list.rebuilds() == 2);
  box.cell[0] += 1e-3;
  list.update(box.view());
  CHECK(list.rebuilds() == 3);
  box.pbc[1] = 0;
  list.update(box.view());
  CHECK(list.rebuilds() == 4);
  NeighborList moved(std::move(list));
  moved.update(box.view());
  CHECK(moved.rebuilds() == 4);
  CHECK(same(pairs_of(moved), brute_force(box, 4.0, 6), 1e-11));
}

TEST(open_directions_need_no_lattice_vector_and_nothing_is_fine) {
  Box box{{0, 0, 0, 1, 0, 0, 0, 0, 3}, {1, 1, 1}, {0, 0, 0, 0, 0, 0, 0, 0, 0}, {0, 0, 0}};
  NeighborList list(2.0);
  list.update(box.view());
  CHECK(list.size() == 1);
  Box empty{{}, {}, {0, 0, 0, 0, 0, 0, 0, 0, 0}, {0, 0, 0}};
  list.update(empty.view());
  CHECK(list.size() == 0);
}

TEST(bad_input_is_refused_and_the_list_recovers) {
  THROWS(NeighborList(0.0), "cutoff");
  THROWS(NeighborList(2.0, -1.0), "skin");
  Box box = random_box(5, 5, 5.0, 0.1, 7, 0.0);
  NeighborList list(3.0);
  list.update(box.view());
  const auto before = pairs_of(list);
  Box zero = box;
  zero.cell[3] = zero.cell[4] = zero.cell[5] = 0.0;
  THROWS(list.update(zero.view()), "direction 1");
  Box flat = box;
  for (int k = 0; k < 3; ++k) flat.cell[6 + k] = flat.cell[k] + flat.cell[3 + k];
  THROWS(list.update(flat.view()), "one plane");
  Box tiny{{0, 0, 0}, {1}, {1e-3, 0, 0, 0, 1e-3, 0, 0, 0, 1e-3}, {1, 1, 1}};
  THROWS(list.update(tiny.view()), "too thin");
  for (const double bad : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(), 1e30}) {
    Box broken = box;
    broken.positions[7] = bad;
    THROWS(list.update(broken.view()), "atom 2");
  }
  list.update(box.view());
  CHECK(pairs_of(list) == before);
}

MINITEST_MAIN
