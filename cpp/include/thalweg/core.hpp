// The records that every kernel takes: views of plain arrays that the caller owns. Standard library only.
//
//   positions  x0 y0 z0 x1 y1 z1 ...   float64, angstrom     |  structure i owns the atoms
//   numbers    Z0 Z1 ...               int32                 |  offsets[i] .. offsets[i + 1] - 1
//   fixed      3 flags per atom        uint8, 1 = this coordinate does not move
//   cells      9 numbers per structure float64, angstrom; rows are lattice vectors, as in ASE
//   pbc        3 flags per structure   uint8
//
// Forces are -dE/dx in eV/angstrom, energies are in eV.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>

namespace thalweg {

/// The one exception family of the core: what was expected, what came, what to do.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// One structure of n atoms; every pointer belongs to the caller.
struct StructureView {
  std::size_t n = 0;
  const double* positions = nullptr;      // (n, 3)
  const std::int32_t* numbers = nullptr;  // (n)
  const double* cell = nullptr;           // (3, 3)
  const std::uint8_t* pbc = nullptr;      // (3)
  const std::uint8_t* fixed = nullptr;    // (n, 3); may be null: nothing is fixed

  bool periodic() const { return pbc[0] || pbc[1] || pbc[2]; }
  /// All three coordinates of the atom are fixed.
  bool is_still(std::size_t atom) const {
    return fixed != nullptr && fixed[3 * atom] && fixed[3 * atom + 1] && fixed[3 * atom + 2];
  }
};

/// n structures packed into plain arrays; the C++ face of Python's `Batch`.
struct BatchView {
  std::span<const double> positions;      // (m, 3)
  std::span<const std::int32_t> numbers;  // (m)
  std::span<const std::int64_t> offsets;  // (n + 1)
  std::span<const double> cells;          // (n, 3, 3)
  std::span<const std::uint8_t> pbc;      // (n, 3)
  std::span<const std::uint8_t> fixed;    // (m, 3); may be empty: nothing is fixed

  std::size_t size() const { return offsets.empty() ? 0 : offsets.size() - 1; }
  std::size_t atoms() const { return numbers.size(); }
  StructureView operator[](std::size_t i) const {
    const std::size_t first = static_cast<std::size_t>(offsets[i]);
    return {static_cast<std::size_t>(offsets[i + 1]) - first,
            positions.data() + 3 * first,
            numbers.data() + first,
            cells.data() + 9 * i,
            pbc.data() + 3 * i,
            fixed.empty() ? nullptr : fixed.data() + 3 * first};
  }
  /// Throws Error unless all lengths agree with `offsets` and offsets rise from 0.
  void check() const;
};

/// Absolute volume of a cell [angstrom^3].
double cell_volume(const double* cell);

/// Covalent radius [angstrom] of an atomic number (Cordero et al., Dalton Trans. 2008, 2832; the table of ASE).
/// Throws Error for numbers outside 1..96.
double covalent_radius(std::int32_t number);

/// Chemical symbol of an atomic number 1..118; "X" otherwise.
const char* chemical_symbol(std::int32_t number);

/// Name of the instruction set in use: "x86-64-v2", "x86-64-v3", "x86-64-v4" or "portable".
const char* active_isa() noexcept;
/// Chooses an instruction set (for tests); false if this machine or build does not have it.
bool force_isa(const char* name) noexcept;

/// Threads a call uses when its `threads` argument is 0: THALWEG_NUM_THREADS if set, else the cores that affinity and
/// cgroup quota leave to this process.
int default_threads();
/// More threads than this are a mistake; where they cannot be started, OpenMP ends the process.
inline constexpr int kMostThreads = 1024;

}  // namespace thalweg
