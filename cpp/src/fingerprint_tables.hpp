// Layout and tables of a fingerprint, for another back end. Private to the core; views into the fingerprint.
#pragma once

#include <span>

#include "fingerprint_kernels.hpp"
#include "thalweg/fingerprint.hpp"

namespace thalweg {

struct FingerprintTables {
  FingerprintSettings settings;
  std::size_t atoms = 0, species = 0, size = 0;
  double reach = 0;                   // of the radial part, angstrom
  HistogramAxis radial{}, angular{};  // arrays as in fingerprint_kernels.hpp
  std::size_t radial_blocks = 0, angular_blocks = 0;
  std::span<const std::int16_t> species_of;     // (128) by atomic number
  std::span<const std::int32_t> pair_block;     // (species, species)
  std::span<const std::int32_t> triplet_block;  // (species of the centre, species, species)
  std::span<const std::int32_t> fold;           // angular bin that each padded one reflects to
};

FingerprintTables fingerprint_tables(const Fingerprint& fingerprint);

}  // namespace thalweg
