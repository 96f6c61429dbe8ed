// Which species a descriptor of atoms knows. Private.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "thalweg/core.hpp"

namespace thalweg {

class SpeciesTable {
 public:
  SpeciesTable() = default;
  /// what: the descriptor, for messages; species: atomic numbers in any order. Throws Error where there is none, or a
  /// number that no element has.
  SpeciesTable(const char* what, std::span<const std::int32_t> species)
      : what_(what), numbers_(species.begin(), species.end()) {
    std::sort(numbers_.begin(), numbers_.end());
    numbers_.erase(std::unique(numbers_.begin(), numbers_.end()), numbers_.end());
    if (numbers_.empty()) throw Error(what_ + " needs at least one species, but none came");
    index_.fill(-1);
    for (std::size_t k = 0; k < numbers_.size(); ++k) {
      if (numbers_[k] < 1 || numbers_[k] > 118)
        throw Error("atomic numbers must be between 1 and 118, but one is " + std::to_string(numbers_[k]));
      index_[static_cast<std::size_t>(numbers_[k])] = static_cast<std::int16_t>(k);
    }
  }

  const std::vector<std::int32_t>& numbers() const { return numbers_; }  // rising
  /// Throws Error for a species that is not in the table.
  std::size_t operator()(std::int32_t number) const {
    const std::int16_t s = number >= 0 && number < 128 ? index_[static_cast<std::size_t>(number)] : -1;
    if (s >= 0) return static_cast<std::size_t>(s);
    std::string text;
    for (const std::int32_t known : numbers_) text += (text.empty() ? "" : ", ") + std::string(chemical_symbol(known));
    throw Error("this " + what_ + " was made for " + text + ", but a structure has atomic number " +
                std::to_string(number) + "; name all species when you make one");
  }

 private:
  std::string what_;
  std::vector<std::int32_t> numbers_;
  std::array<std::int16_t, 128> index_{};  // by atomic number; -1: not there
};

}  // namespace thalweg
