#include "minitest.hpp"
#include "thalweg/core.hpp"
#include "thalweg/random.hpp"

using namespace thalweg;

TEST(philox_published_vectors) {
  // Random123's known answers (kat_vectors, philox4x32-10).
  const auto zero = Random::philox({0, 0, 0, 0}, {0, 0});
  CHECK(zero[0] == 0x6627e8d5u && zero[1] == 0xe169c58du && zero[2] == 0xbc57ac4cu && zero[3] == 0x9b00dbd8u);
  const auto ones = Random::philox({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u});
  CHECK(ones[0] == 0x408f276du && ones[1] == 0x41c83b0eu && ones[2] == 0xa20bc7c6u && ones[3] == 0x6d5451fdu);
}

TEST(directions_are_uniform) {
  double mean[3] = {0, 0, 0}, second = 0;
  const int n = 200000;
  for (int row = 0; row < n; ++row) {
    Random random({1, 2}, static_cast<std::uint64_t>(row));
    const auto d = random.direction();
    for (int k = 0; k < 3; ++k) mean[k] += d[static_cast<std::size_t>(k)] / n;
    second += d[2] * d[2] / n;
  }
  for (double m : mean) CLOSE(m, 0.0, 0.01);
  CLOSE(second, 1.0 / 3.0, 0.005);  // AGOX's directions give 0.50
}

TEST(batch_check_names_the_array) {
  const double x[6] = {}, cell[9] = {};
  const std::int32_t z[2] = {1, 1};
  const std::int64_t offsets[2] = {0, 2};
  const std::uint8_t pbc[3] = {};
  BatchView batch{x, z, offsets, cell, pbc, {}};
  batch.check();
  batch.positions = std::span<const double>(x, 3);
  THROWS(batch.check(), "positions must hold 6 values, but it holds 3");
}

TEST(radii_and_symbols) {
  CLOSE(covalent_radius(79), 1.36, 1e-12);
  CLOSE(covalent_radius(28), 1.24, 1e-12);
  THROWS(covalent_radius(0), "1 to 96");
  CHECK(std::string(chemical_symbol(28)) == "Ni");
}

TEST(isa_can_be_forced) {
  const std::string first = active_isa();
  CHECK(!force_isa("mmx"));
  CHECK(force_isa(first.c_str()));
  CHECK(default_threads() >= 1);
}

MINITEST_MAIN
