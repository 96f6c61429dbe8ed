// One structure that owns its arrays.
#pragma once
#include <cstdint>
#include <vector>

#include "thalweg/core.hpp"

struct Structure {
  std::vector<std::int32_t> numbers;
  std::vector<double> positions;
  double cell[9];
  std::uint8_t pbc[3];

  thalweg::StructureView view() const { return {numbers.size(), positions.data(), numbers.data(), cell, pbc, nullptr}; }
};
