#include <cmath>
#include <cstdint>

#include "fingerprint_kernels.hpp"

namespace thalweg::THALWEG_ISA {
namespace {

using Vector = double __attribute__((vector_size(8 * kLanes)));
using Unaligned = double __attribute__((vector_size(8 * kLanes), aligned(8), may_alias));
using Mask = long long __attribute__((vector_size(8 * kLanes)));
using Integers = std::int32_t __attribute__((vector_size(4 * kLanes)));
using UnalignedIntegers = std::int32_t __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

constexpr std::size_t kLanesU = kLanes;
constexpr std::size_t kPowersU = kPowers;
constexpr double kPi = 3.141592653589793;

inline Vector load(const double* p) { return *reinterpret_cast<const Unaligned*>(p); }
inline void store(double* p, Vector v) { *reinterpret_cast<Unaligned*>(p) = v; }
inline Vector spread(double x) { return Vector{x, x, x, x}; }
inline Vector where(Mask mask, Vector v) { return reinterpret_cast<Vector>(mask & reinterpret_cast<Mask>(v)); }
/// mask ? yes : no (written with bits: the ternary operator falls apart into scalars where vectors are narrower).
inline Vector choose(Mask mask, Vector yes, Vector no) {
  return reinterpret_cast<Vector>((mask & reinterpret_cast<Mask>(yes)) | (~mask & reinterpret_cast<Mask>(no)));
}
inline Integers load_integers(const std::int32_t* p) { return *reinterpret_cast<const UnalignedIntegers*>(p); }
inline Vector square_root(Vector v) {
  return Vector{std::sqrt(v[0]), std::sqrt(v[1]), std::sqrt(v[2]), std::sqrt(v[3])};
}
inline double sum(Vector v) { return (v[0] + v[2]) + (v[1] + v[3]); }

/// {sum(a), sum(b), sum(c), sum(d)}
inline Vector sums(Vector a, Vector b, Vector c, Vector d) {
  const Vector ab = __builtin_shuffle(a, b, Mask{0, 4, 2, 6}) + __builtin_shuffle(a, b, Mask{1, 5, 3, 7});
  const Vector cd = __builtin_shuffle(c, d, Mask{0, 4, 2, 6}) + __builtin_shuffle(c, d, Mask{1, 5, 3, 7});
  return __builtin_shuffle(ab, cd, Mask{0, 1, 4, 5}) + __builtin_shuffle(ab, cd, Mask{2, 3, 6, 7});
}

inline std::size_t padded(std::size_t n) { return (n + kLanesU - 1) / kLanesU * kLanesU; }

/// t .. t^7 of a sample as two vectors.
inline void powers(double t, Vector& low, Vector& high) {
  const double t2 = t * t;
  low = Vector{1.0, t, t2, t2 * t};
  high = low * spread(t2 * t2);
}

// ---- where samples sit ------------------------------------------------------------------------------------------

/// Finds t and slot of the kLanes samples from `first` on, which sit at q.
inline void locate(const HistogramAxis& axis, Vector q, std::size_t first, Samples& samples) {
  const Vector last_center = spread(axis.centers - 1);
  Vector bin = __builtin_convertvector(__builtin_convertvector(q, Integers), Vector);
  bin = choose(bin < last_center, bin, last_center);
  const Vector place = q - bin;
  Vector scale = spread(axis.scale[0]), shift = spread(axis.shift[0]), piece = spread(0.0);
  for (std::int32_t next = 1; next < axis.pieces; ++next) {
    const Mask beyond = place >= spread(axis.breaks[next - 1]);
    scale = choose(beyond, spread(axis.scale[next]), scale);
    shift = choose(beyond, spread(axis.shift[next]), shift);
    piece = choose(beyond, spread(next), piece);
  }
  const Vector block = __builtin_convertvector(load_integers(samples.block + first), Vector);
  const Vector slot = (block * spread(axis.centers) + bin) * spread(axis.pieces) + piece;
  store(samples.t + first, place * scale + shift);
  *reinterpret_cast<UnalignedIntegers*>(samples.slot + first) = __builtin_convertvector(slot, Integers);
}

// Both run over the padding, too, and then point it at slot 0.
inline void pad(Samples& samples) {
  for (std::size_t k = samples.n; k < padded(samples.n); ++k) {
    samples.t[k] = 0.0;
    samples.slot[k] = 0;
  }
}

void locate_pairs(const HistogramAxis& axis, const double* r, double norm, Samples& samples) {
  const Vector whole_norm = spread(norm), inverse_width = spread(axis.inverse_width);
  std::size_t first = 0;
  const auto add = [&](Vector distance) {
    store(samples.weight + first, whole_norm / (distance * distance));
    locate(axis, distance * inverse_width, first, samples);
  };
  for (; first + kLanesU <= samples.n; first += kLanesU) add(load(r + first));
  if (first < samples.n) {
    Vector rest = spread(1.0);
    for (std::size_t lane = 0; first + lane < samples.n; ++lane) rest[lane] = r[first + lane];
    add(rest);
  }
  pad(samples);
}

// asin(sqrt(z)) / sqrt(z) on 0 <= z <= 1/2: interpolated at 18 Chebyshev nodes, relative error 2.4e-16 with rounding.
constexpr double kArcsine[] = {0.9999999999999999,    0.166666666666762,    0.07499999997954958,  0.04464285887635292,
                               0.03038186720347429,   0.022374245713577247, 0.01731559954431618,  0.014425198539078435,
                               0.0074446285203378345, 0.0367584181543663,   -0.12408231204352456, 0.4950065878219169,
                               -1.3361380175788327,   2.73332796871551,     -3.974232006625552,   3.9651660247789393,
                               -2.421334511698546,    0.7052735073244607};

/// asin(sqrt(z)) / sqrt(z), by Estrin's scheme: short chains of dependent operations.
inline Vector arcsine_ratio(Vector z) {
  const Vector z2 = z * z, z4 = z2 * z2, z8 = z4 * z4;
  const auto four = [&](int k) {
    return (spread(kArcsine[k]) + z * kArcsine[k + 1]) + z2 * (spread(kArcsine[k + 2]) + z * kArcsine[k + 3]);
  };
  const Vector top = spread(kArcsine[16]) + z * kArcsine[17];
  return (four(0) + z4 * four(4)) + z8 * ((four(8) + z4 * four(12)) + z8 * top);
}

void locate_triplets(const HistogramAxis& axis, Triplets& triplets) {
  const Vector two = spread(2.0), pi = spread(kPi), inverse_width = spread(axis.inverse_width);
  for (std::size_t first = 0; first < triplets.samples.n; first += kLanesU) {
    const Vector z = load(triplets.half_square + first);
    const Vector acute = two * square_root(z) * arcsine_ratio(z);
    const Vector angle = choose(load(triplets.cosine + first) >= 0.0, acute, pi - acute);
    locate(axis, angle * inverse_width, first, triplets.samples);
  }
  pad(triplets.samples);
}

std::size_t find_triplets(const NearNeighbors& near, const std::int32_t* center_species, std::int32_t n_species,
                          const std::int32_t* block_of, Triplets& triplets) {
  std::size_t n = 0;
  const Vector quarter = spread(0.25), one = spread(1.0);
  for (std::size_t center = 0; center < near.centers; ++center) {
    const std::int32_t last = near.last[center];
    for (std::int32_t a = near.first[center]; a + 1 < last && a < near.partners[center]; ++a) {
      const Vector ax = spread(near.ux[a]), ay = spread(near.uy[a]), az = spread(near.uz[a]);
      const Vector cutoff = spread(near.cutoff[a]);
      const std::int32_t* blocks =
          block_of + (static_cast<std::ptrdiff_t>(center_species[center]) * n_species + near.species[a]) * n_species;
      for (std::int32_t b = a + 1; b < last; b += kLanes) {
        const std::size_t to = n + static_cast<std::size_t>(b - a - 1);
        const Vector bx = load(near.ux + b), by = load(near.uy + b), bz = load(near.uz + b);
        const Vector cosine = ax * bx + ay * by + az * bz;
        const Vector side = choose(cosine >= 0.0, one, -one);
        const Vector ex = ax - side * bx, ey = ay - side * by, ez = az - side * bz;
        store(triplets.cosine + to, cosine);
        store(triplets.half_square + to, quarter * (ex * ex + ey * ey + ez * ez));
        store(triplets.samples.weight + to, cutoff * load(near.cutoff + b));
        for (std::int32_t lane = 0; lane < kLanes; ++lane)
          triplets.samples.block[to + static_cast<std::size_t>(lane)] = blocks[near.species[b + lane]];
      }
      n += static_cast<std::size_t>(last - a - 1);
    }
  }
  return n;
}

// ---- forward ----------------------------------------------------------------------------------------------------

void deposit(const Samples& samples, double* moments, SlotsInUse& used) {
  std::size_t count = used.n;
  for (std::size_t k = 0; k < samples.n; ++k) {
    const std::int32_t slot = samples.slot[k];
    used.slots[count] = slot;
    count += used.in_use[slot] == 0;
    used.in_use[slot] = 1;
    double* moment = moments + kPowersU * static_cast<std::size_t>(slot);
    Vector low, high;
    powers(samples.t[k], low, high);
    const Vector weight = spread(samples.weight[k]);
    store(moment, load(moment) + weight * low);
    store(moment + kLanes, load(moment + kLanes) + weight * high);
  }
  used.n = count;
}

void expand(const HistogramAxis& axis, const SlotsInUse& used, double* moments, double* histogram) {
  const std::size_t columns = static_cast<std::size_t>(axis.padded_columns);
  const Vector zero = spread(0.0);
  for (std::size_t k = 0; k < used.n; ++k) {
    const std::int32_t slot = used.slots[k];
    const SlotPlace at = axis.places[slot];
    double* moment = moments + kPowersU * static_cast<std::size_t>(slot);
    Vector m[kPowers];
    for (int power = 0; power < kPowers; ++power) m[power] = spread(moment[power]);
    store(moment, zero);
    store(moment + kLanes, zero);
    used.in_use[slot] = 0;
    const double* table = axis.by_power + static_cast<std::size_t>(at.piece) * kPowersU * columns;
    double* window = histogram + at.histogram;
    for (std::size_t column = 0; column < columns; column += kLanesU) {
      Vector even = m[0] * load(table + column), odd = m[1] * load(table + columns + column);
      for (std::size_t power = 2; power < kPowersU; power += 2) {
        even += m[power] * load(table + power * columns + column);
        odd += m[power + 1] * load(table + (power + 1) * columns + column);
      }
      store(window + column, load(window + column) + (even + odd));
    }
  }
}

// ---- backward ---------------------------------------------------------------------------------------------------

void project(const HistogramAxis& axis, const SlotsInUse& used, const double* weights, double* polynomials) {
  const std::size_t columns = static_cast<std::size_t>(axis.columns);
  const std::size_t table_size = static_cast<std::size_t>(axis.padded_columns) * kPowersU;
  const Vector zero = spread(0.0), factors_low = {1.0, 2.0, 3.0, 4.0}, factors_high = {5.0, 6.0, 7.0, 0.0};
  for (std::size_t k = 0; k < used.n; ++k) {
    const std::int32_t slot = used.slots[k];
    const SlotPlace at = axis.places[slot];
    const double* window = weights + at.window;
    const double* table = axis.by_column + static_cast<std::size_t>(at.piece) * table_size;
    Vector low = zero, high = zero, low_odd = zero, high_odd = zero;
    std::size_t column = 0;
    for (; column + 1 < columns; column += 2) {
      const Vector w = spread(window[column]), w_odd = spread(window[column + 1]);
      const double* row = table + kPowersU * column;
      low += w * load(row);
      high += w * load(row + kLanes);
      low_odd += w_odd * load(row + kPowers);
      high_odd += w_odd * load(row + kPowers + kLanes);
    }
    if (column < columns) {
      const Vector w = spread(window[column]);
      low += w * load(table + kPowersU * column);
      high += w * load(table + kPowersU * column + kLanes);
    }
    low += low_odd;
    high += high_odd;
    const Vector scale = spread(axis.scale[at.piece]);
    double* polynomial = polynomials + 2 * kPowersU * static_cast<std::size_t>(slot);
    store(polynomial, low);
    store(polynomial + kLanes, high);
    store(polynomial + 2 * kLanes, scale * factors_low * __builtin_shuffle(low, high, Mask{1, 2, 3, 4}));
    store(polynomial + 3 * kLanes, scale * factors_high * __builtin_shuffle(high, high, Mask{1, 2, 3, 3}));
  }
}

void evaluate(const Samples& samples, const double* polynomials, double* value, double* slope) {
  for (std::size_t first = 0; first < samples.n; first += kLanesU) {
    Vector values[kLanes], slopes[kLanes];
    for (std::size_t lane = 0; lane < kLanesU; ++lane) {
      const double* polynomial = polynomials + 2 * kPowersU * static_cast<std::size_t>(samples.slot[first + lane]);
      Vector low, high;
      powers(samples.t[first + lane], low, high);
      values[lane] = low * load(polynomial) + high * load(polynomial + kLanes);
      slopes[lane] = low * load(polynomial + 2 * kLanes) + high * load(polynomial + 3 * kLanes);
    }
    store(value + first, sums(values[0], values[1], values[2], values[3]));
    store(slope + first, sums(slopes[0], slopes[1], slopes[2], slopes[3]));
  }
}

/// slope := -weight * slope * slope_scale / sin(angle), 0 where the angle is 0 or pi to rounding.
void divide_by_sine(const Triplets& triplets, double slope_scale, double* slope) {
  const Vector one = spread(1.0), tiny = spread(1e-30), factor = spread(-0.5 * slope_scale);
  for (std::size_t k = 0; k < triplets.samples.n; k += kLanesU) {
    const Vector z = load(triplets.half_square + k), square = z * (one - z);
    const Mask open = square > tiny;
    const Vector inverse = where(open, one / square_root(choose(open, square, one)));
    store(slope + k, load(slope + k) * load(triplets.samples.weight + k) * (factor * inverse));
  }
}

inline void store4(double* rows, std::size_t stride, std::int32_t at, Vector v) {
  for (std::size_t row = 0; row < 4; ++row) rows[row * stride + static_cast<std::size_t>(at)] = v[row];
}

// With c the cosine and g = dE/dc of a triplet, a's position gets g (u_b - c u_a) / r_a and, through the cutoff
// function, value fc_b fc'_a u_a. Sums over b stay in registers, those over a in rows that are read and written at
// multiples of kLanes only (a load that overlaps a recent store of another shape waits for it).
void triplet_gradient(const NearNeighbors& near, const Triplets& triplets, double slope_scale, double* value,
                      double* slope, double* pull, std::size_t neighbors) {
  divide_by_sine(triplets, slope_scale, slope);
  double *x = pull, *y = pull + neighbors, *z = pull + 2 * neighbors, *along = pull + 3 * neighbors,
         *cut = pull + 4 * neighbors, *own = pull + 5 * neighbors;
  for (std::size_t k = 0; k < 10 * neighbors; k += kLanesU) store(pull + k, spread(0.0));
  const Mask lanes = {0, 1, 2, 3};
  std::ptrdiff_t row = 0;
  for (std::size_t center = 0; center < near.centers; ++center) {
    const std::int32_t last = near.last[center];
    for (std::int32_t a = near.first[center]; a + 1 < last && a < near.partners[center]; ++a) {
      const Vector ax = spread(near.ux[a]), ay = spread(near.uy[a]), az = spread(near.uz[a]);
      const Vector a_cutoff = spread(near.cutoff[a]);
      Vector sum_x = spread(0.0), sum_y = sum_x, sum_z = sum_x, sum_along = sum_x, sum_cut = sum_x;
      for (std::int32_t b = (a + 1) / kLanes * kLanes; b < last; b += kLanes) {
        const std::ptrdiff_t at = row + (b - a - 1);  // from -3: the arrays start kLanes before their first triplet
        const Mask number = lanes + b;
        const Mask mask = (number > a) & (number < last);
        const Vector g = where(mask, load(slope + at)), v = where(mask, load(value + at));
        const Vector g_cosine = g * where(mask, load(triplets.cosine + at));
        sum_x += g * load(near.ux + b);
        sum_y += g * load(near.uy + b);
        sum_z += g * load(near.uz + b);
        sum_along += g_cosine;
        sum_cut += v * load(near.cutoff + b);
        store(x + b, load(x + b) + g * ax);
        store(y + b, load(y + b) + g * ay);
        store(z + b, load(z + b) + g * az);
        store(along + b, load(along + b) + g_cosine);
        store(cut + b, load(cut + b) + v * a_cutoff);
      }
      store4(own, neighbors, a, sums(sum_x, sum_y, sum_z, sum_along));
      own[4 * neighbors + static_cast<std::size_t>(a)] = sum(sum_cut);
      row += last - a - 1;
    }
  }
  for (std::size_t b = 0; b < neighbors; b += kLanesU) {
    const auto total = [&](std::size_t part) {
      return load(pull + part * neighbors + b) + load(own + part * neighbors + b);
    };
    const Vector inverse_r = load(near.inverse_r + b);
    const Vector radial = total(4) * load(near.cutoff_slope + b) - inverse_r * total(3);
    store(x + b, inverse_r * total(0) + radial * load(near.ux + b));
    store(y + b, inverse_r * total(1) + radial * load(near.uy + b));
    store(z + b, inverse_r * total(2) + radial * load(near.uz + b));
  }
}

void pair_gradient(const Samples& samples, const std::int32_t* i, const std::int32_t* j, const double* d,
                   const double* r, double slope_scale, const double* value, const double* slope, double* gradient) {
  for (std::size_t k = 0; k < samples.n; ++k) {
    const double inverse_r = 1.0 / r[k];
    const double pull =
        samples.weight[k] * (slope_scale * slope[k] - 2.0 * value[k] * inverse_r) * inverse_r;  // of d, not of d / r
    double* at_i = gradient + 3 * static_cast<std::size_t>(i[k]);
    double* at_j = gradient + 3 * static_cast<std::size_t>(j[k]);
    for (int axis = 0; axis < 3; ++axis) {
      const double part = pull * d[3 * k + static_cast<std::size_t>(axis)];
      at_i[axis] -= part;
      at_j[axis] += part;
    }
  }
}

// ---- Jacobian ---------------------------------------------------------------------------------------------------

constexpr std::size_t kMostColumns = 256;  // fingerprint.cpp checks

/// Each column's value and derivative with respect to q, for weight 1.
inline void window_at(const HistogramAxis& axis, std::int32_t piece, double t, double* value, double* slope) {
  const std::size_t columns = static_cast<std::size_t>(axis.padded_columns);
  const double* table = axis.by_power + static_cast<std::size_t>(piece) * kPowersU * columns;
  const Vector place = spread(t), scale = spread(axis.scale[piece]);
  for (std::size_t column = 0; column < columns; column += kLanesU) {
    Vector v = load(table + (kPowersU - 1) * columns + column), s = v;
    v = v * place + load(table + (kPowersU - 2) * columns + column);
    for (std::size_t power = kPowersU - 2; power-- > 0;) {
      s = s * place + v;
      v = v * place + load(table + power * columns + column);
    }
    store(value + column, v);
    store(slope + column, scale * s);
  }
}

void pair_jacobian(const HistogramAxis& axis, const Samples& samples, const std::int32_t* i, const std::int32_t* j,
                   const double* d, const double* r, double* rows, std::size_t row_stride) {
  double value[kMostColumns], slope[kMostColumns];
  const std::size_t columns = static_cast<std::size_t>(axis.padded_columns);
  for (std::size_t k = 0; k < samples.n; ++k) {
    if (i[k] == j[k]) continue;  // an atom and its image move together
    const SlotPlace at = axis.places[samples.slot[k]];
    window_at(axis, at.piece, samples.t[k], value, slope);
    const double inverse_r = 1.0 / r[k];
    const Vector of_value = spread(-2.0 * samples.weight[k] * inverse_r * inverse_r),
                 of_slope = spread(samples.weight[k] * axis.inverse_width * inverse_r);
    for (std::size_t column = 0; column < columns; column += kLanesU)
      store(value + column, of_value * load(value + column) + of_slope * load(slope + column));
    const std::ptrdiff_t window = at.window;
    double* at_i = rows + 3 * static_cast<std::size_t>(i[k]) * row_stride + window;
    double* at_j = rows + 3 * static_cast<std::size_t>(j[k]) * row_stride + window;
    for (std::size_t dimension = 0; dimension < 3; ++dimension) {
      const Vector part = spread(d[3 * k + dimension]);
      double* to_i = at_i + dimension * row_stride;
      double* to_j = at_j + dimension * row_stride;
      for (std::size_t column = 0; column < columns; column += kLanesU) {
        const Vector v = part * load(value + column);
        store(to_i + column, load(to_i + column) - v);
        store(to_j + column, load(to_j + column) + v);
      }
    }
  }
}

void triplet_jacobian(const HistogramAxis& axis, const NearNeighbors& near, const Triplets& triplets,
                      const std::int32_t* neighbor_atom, double* rows, std::size_t row_stride) {
  double value[kMostColumns], slope[kMostColumns];
  const std::size_t columns = static_cast<std::size_t>(axis.padded_columns);
  std::size_t k = 0;
  for (std::size_t center = 0; center < near.centers; ++center) {
    for (std::int32_t a = near.first[center]; a + 1 < near.last[center]; ++a) {
      for (std::int32_t b = a + 1; b < near.last[center]; ++b, ++k) {
        const SlotPlace at = axis.places[triplets.samples.slot[k]];
        window_at(axis, at.piece, triplets.samples.t[k], value, slope);
        const double c = triplets.cosine[k], z = triplets.half_square[k], square = z * (1.0 - z);
        const double g =
            square > 1e-30 ? -0.5 / std::sqrt(square) * axis.inverse_width * triplets.samples.weight[k] : 0.0;
        const double ua[3] = {near.ux[a], near.uy[a], near.uz[a]}, ub[3] = {near.ux[b], near.uy[b], near.uz[b]};
        const std::ptrdiff_t window = at.window;
        double* to_center = rows + 3 * center * row_stride + window;
        double* to_a = rows + 3 * static_cast<std::size_t>(neighbor_atom[a]) * row_stride + window;
        double* to_b = rows + 3 * static_cast<std::size_t>(neighbor_atom[b]) * row_stride + window;
        for (std::size_t dimension = 0; dimension < 3; ++dimension) {
          const double value_a = near.cutoff_slope[a] * near.cutoff[b] * ua[dimension];
          const double value_b = near.cutoff_slope[b] * near.cutoff[a] * ub[dimension];
          const double slope_a = g * near.inverse_r[a] * (ub[dimension] - c * ua[dimension]);
          const double slope_b = g * near.inverse_r[b] * (ua[dimension] - c * ub[dimension]);
          for (std::size_t column = 0; column < columns; column += kLanesU) {
            const Vector v = load(value + column), s = load(slope + column);
            const Vector part_a = value_a * v + slope_a * s, part_b = value_b * v + slope_b * s;
            // One after the other: a, b and the centre may be images of one atom.
            store(to_a + column, load(to_a + column) + part_a);
            store(to_b + column, load(to_b + column) + part_b);
            store(to_center + column, load(to_center + column) - (part_a + part_b));
          }
          to_center += row_stride;
          to_a += row_stride;
          to_b += row_stride;
        }
      }
    }
  }
}

}  // namespace

const FingerprintKernels& fingerprint_kernels() {
  static constexpr FingerprintKernels table = {find_triplets, locate_pairs,  locate_triplets, deposit,
                                               expand,        project,       evaluate,        triplet_gradient,
                                               pair_gradient, pair_jacobian, triplet_jacobian};
  return table;
}

}  // namespace thalweg::THALWEG_ISA
