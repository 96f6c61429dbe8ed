// Counter-based random numbers: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC'11).
//
// Everything that is constexpr also runs on CUDA devices, with the same bits.
//
// A stream is named, not seeded in order: key = 128 bits derived (in Python: randomness.py) from seed, iteration, stage
// and name; `row` is the structure. Two streams that differ in either share nothing, so rows can be drawn in any order,
// by any number of threads, and a larger batch leaves the rows that were there unchanged.
//
//   key (128 bit) = k0 k1 k2 k3        Philox key     = k0, k1
//                                      Philox counter = (block, row_low ^ k2, row_high ^ k3, 0)
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

namespace thalweg {

struct Key {
  std::uint64_t low = 0, high = 0;
};

class Random {
 public:
  constexpr Random(Key key, std::uint64_t row)
      : key_{static_cast<std::uint32_t>(key.low), static_cast<std::uint32_t>(key.low >> 32)},
        counter_{0, static_cast<std::uint32_t>(row) ^ static_cast<std::uint32_t>(key.high),
                 static_cast<std::uint32_t>(row >> 32) ^ static_cast<std::uint32_t>(key.high >> 32), 0} {}

  constexpr std::uint32_t bits32() {
    if (used_ == 4) refill();
    return block_[used_++];
  }
  constexpr std::uint64_t bits64() {
    const std::uint64_t high = bits32();
    return (high << 32) | bits32();
  }
  /// Uniform in [0, 1) with 53 random bits.
  constexpr double uniform() { return static_cast<double>(bits64() >> 11) * 0x1.0p-53; }
  constexpr double uniform(double low, double high) { return low + (high - low) * uniform(); }
  /// Uniform integer in [0, n), n >= 1 (multiply-shift; bias below 2^-32 n).
  constexpr std::uint32_t below(std::uint32_t n) {
    return static_cast<std::uint32_t>((static_cast<std::uint64_t>(bits32()) * n) >> 32);
  }
  /// Unit vector, uniform on the sphere (Archimedes: z is uniform).
  std::array<double, 3> direction() {
    const double z = uniform(-1.0, 1.0), phi = 6.283185307179586 * uniform(), s = std::sqrt(1.0 - z * z);
    return {s * std::cos(phi), s * std::sin(phi), z};
  }

  /// One Philox4x32-10 block (public so that a test can compare it with the published vectors).
  static constexpr std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> c, std::array<std::uint32_t, 2> k) {
    for (int round = 0; round < 10; ++round) {
      const std::uint64_t a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
      c = {static_cast<std::uint32_t>(b >> 32) ^ c[1] ^ k[0], static_cast<std::uint32_t>(b),
           static_cast<std::uint32_t>(a >> 32) ^ c[3] ^ k[1], static_cast<std::uint32_t>(a)};
      k[0] += 0x9E3779B9u;
      k[1] += 0xBB67AE85u;
    }
    return c;
  }

 private:
  constexpr void refill() {
    block_ = philox(counter_, key_);
    ++counter_[0];
    used_ = 0;
  }
  std::array<std::uint32_t, 2> key_;
  std::array<std::uint32_t, 4> counter_, block_{};
  int used_ = 4;
};

}  // namespace thalweg
