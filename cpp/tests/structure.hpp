// One structure that owns its arrays, and what tests of descriptors share.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "thalweg/core.hpp"

struct Structure {
  std::vector<std::int32_t> numbers;
  std::vector<double> positions;
  double cell[9];
  std::uint8_t pbc[3];

  thalweg::StructureView view() const { return {numbers.size(), positions.data(), numbers.data(), cell, pbc, nullptr}; }
};

/// Six atoms of three species in a skewed cell.
inline Structure skewed_oxide(std::uint8_t third = 1) {
  return {{8, 22, 8, 8, 22, 38},
          {0.1, 0.2, 0.0, 2.3, 0.4, 0.6, 0.3, 2.4, 0.4, 2.6, 2.2, 1.9, 0.2, 0.9, 2.5, 3.6, 3.4, 3.1},
          {5.1, 0.2, 0.1, 1.9, 4.8, -0.3, -1.2, 1.4, 5.3},
          {1, 1, third}};
}

inline std::vector<double> random_vector(std::size_t n, unsigned seed) {
  std::mt19937_64 rng(seed);
  std::normal_distribution<double> normal;
  std::vector<double> v(n);
  for (double& x : v) x = normal(rng);
  return v;
}

/// Of the absolute values.
inline double largest(const std::vector<double>& v) {
  double out = 0;
  for (const double x : v) out = std::max(out, std::abs(x));
  return out;
}
