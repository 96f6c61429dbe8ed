#include "thalweg/environments.hpp"

#include <algorithm>
#include <cmath>
#include <string>

namespace thalweg {
namespace {

constexpr double kPi = 3.14159265358979323846;
constexpr double kWidth = 0.9;        // of a Gaussian, in steps between their centres
constexpr double kOnOnePoint = 1e-6;  // angstrom
constexpr int kMostRadial = 16, kMostAngular = 8, kMostDegree = 6;

void expect_range(const char* name, int value, int least, int most) {
  if (value < least || value > most)
    throw Error(std::string(name) + " must be " + std::to_string(least) + " to " + std::to_string(most) +
                ", but it is " + std::to_string(value));
}

// Gaussians (first + k step) times the cutoff function, and their slopes.
void gaussians(double r, double cutoff, double first, double step, int count, double* value, double* slope) {
  if (r >= cutoff) {
    std::fill_n(value, count, 0.0);
    std::fill_n(slope, count, 0.0);
    return;
  }
  const double cut = 0.5 * (1 + std::cos(kPi * r / cutoff)), d_cut = -0.5 * kPi / cutoff * std::sin(kPi * r / cutoff);
  const double width = kWidth * step;
  for (int k = 0; k < count; ++k) {
    const double z = (r - first - k * step) / width, e = std::exp(-0.5 * z * z);
    value[k] = e * cut;
    slope[k] = e * (d_cut - cut * z / width);
  }
}

}  // namespace

Environments::Environments(const EnvironmentSettings& settings, std::span<const std::int32_t> species)
    : settings_(settings), species_(species.begin(), species.end()) {
  expect_range("n_radial", settings.n_radial, 1, kMostRadial);
  expect_range("n_angular", settings.n_angular, 0, kMostAngular);
  expect_range("l_max", settings.l_max, 0, kMostDegree);
  std::sort(species_.begin(), species_.end());
  species_.erase(std::unique(species_.begin(), species_.end()), species_.end());
  if (species_.empty()) throw Error("environments need at least one species, but none came");
  double diameter = 1e300;
  for (const std::int32_t number : species_) diameter = std::min(diameter, 2 * covalent_radius(number));
  radial_first_ = settings.radial_start * diameter;
  angular_first_ = settings.angular_start * diameter;
  const auto check_cutoff = [](const char* name, double cutoff, double first) {
    if (!(cutoff > first && std::isfinite(cutoff) && first > 0))
      throw Error(std::string(name) + " must be above the start of its Gaussians, " + std::to_string(first) +
                  " angstrom, but it is " + std::to_string(cutoff));
  };
  check_cutoff("radial_cutoff", settings.radial_cutoff, radial_first_);
  if (settings.n_angular > 0) {
    check_cutoff("angular_cutoff", settings.angular_cutoff, angular_first_);
    if (settings.angular_cutoff > settings.radial_cutoff)
      throw Error("angular_cutoff must not be above radial_cutoff, but it is " +
                  std::to_string(settings.angular_cutoff));
  }
  radial_step_ = (settings.radial_cutoff - radial_first_) / settings.n_radial;
  angular_step_ = (settings.angular_cutoff - angular_first_) / std::max(1, settings.n_angular);

  const std::size_t kinds = species_.size(), a = static_cast<std::size_t>(settings.n_angular),
                    orders = static_cast<std::size_t>(settings.l_max) + 1;
  size_ = kinds * static_cast<std::size_t>(settings.n_radial);
  stride_ = 2 * (static_cast<std::size_t>(settings.n_radial) + a);
  angular_offset_.assign(kinds * kinds, 0);
  for (std::size_t s = 0; s < kinds; ++s)
    for (std::size_t t = s; t < kinds; ++t) {
      angular_offset_[s * kinds + t] = angular_offset_[t * kinds + s] = size_;
      size_ += orders * (s == t ? a * (a + 1) / 2 : a * a);
    }

  // Monomials x^a y^b z^c by degree; each is its parent times one coordinate.
  const auto find = [this](const int* exponent) {
    for (std::size_t k = 0; k < monomials_.size(); ++k)
      if (std::equal(exponent, exponent + 3, monomials_[k].exponent)) return k;
    return std::size_t{0};
  };
  const auto factorial = [](int n) {
    double out = 1;
    for (int k = 2; k <= n; ++k) out *= k;
    return out;
  };
  for (int degree = 0; degree <= settings.l_max; ++degree)
    for (int x = degree; x >= 0; --x)
      for (int y = degree - x; y >= 0; --y) {
        Monomial m{degree, {x, y, degree - x - y}, 0, {0, 0, 0}, 0, 0};
        m.multiplicity = factorial(degree) / (factorial(x) * factorial(y) * factorial(degree - x - y));
        for (int axis = 0; axis < 3; ++axis)
          if (m.exponent[axis] > 0) {
            int lower[3] = {m.exponent[0], m.exponent[1], m.exponent[2]};
            --lower[axis];
            m.lowered[axis] = find(lower);
            m.parent = m.lowered[axis];
            m.axis = axis;
          }
        monomials_.push_back(m);
      }
  legendre_.assign(orders * orders, 0.0);
  legendre_[0] = 1;
  if (orders > 1) legendre_[orders + 1] = 1;
  for (std::size_t l = 2; l < orders; ++l)  // l P_l = (2 l - 1) x P_l-1 - (l - 1) P_l-2
    for (std::size_t p = 0; p <= l; ++p) {
      const double order = static_cast<double>(l);
      legendre_[l * orders + p] = ((p > 0 ? (2 * order - 1) * legendre_[(l - 1) * orders + p - 1] : 0.0) -
                                   (order - 1) * legendre_[(l - 2) * orders + p]) /
                                  order;
    }
}

std::size_t Environments::species_index(std::int32_t number) const {
  const auto at = std::lower_bound(species_.begin(), species_.end(), number);
  if (at == species_.end() || *at != number) {
    std::string known;
    for (const std::int32_t z : species_) known += std::string(known.empty() ? "" : ", ") + chemical_symbol(z);
    throw Error("the environments were made for " + known + ", but an atom is " + chemical_symbol(number) +
                "; fit on structures that hold it");
  }
  return static_cast<std::size_t>(at - species_.begin());
}

void Environments::check(const StructureView& structure) const {
  for (std::size_t i = 0; i < structure.n; ++i) species_index(structure.numbers[i]);
  NeighborList(settings_.radial_cutoff).check_cell(structure);
}

void Environments::radial_functions(double r, double* out) const {
  const int k = settings_.n_radial, a = settings_.n_angular;
  gaussians(r, settings_.radial_cutoff, radial_first_, radial_step_, k, out, out + k);
  gaussians(r, settings_.angular_cutoff, angular_first_, angular_step_, a, out + 2 * k, out + 2 * k + a);
}

void Environments::values(const StructureView& structure, double* features, Workspace& w) const {
  w.list.update(structure);
  const std::size_t n = structure.n, pairs = w.list.size(), kinds = species_.size(), count = monomials_.size();
  const std::size_t radials = static_cast<std::size_t>(settings_.n_radial),
                    a = static_cast<std::size_t>(settings_.n_angular),
                    orders = static_cast<std::size_t>(settings_.l_max) + 1;
  w.n = n;
  w.first.assign(n + 1, 0);
  for (std::size_t p = 0; p < pairs; ++p) {
    if (!(w.list.r()[p] > kOnOnePoint)) throw Error("two atoms are on one point: they have no environments");
    ++w.first[static_cast<std::size_t>(w.list.i()[p]) + 1];
    ++w.first[static_cast<std::size_t>(w.list.j()[p]) + 1];
  }
  for (std::size_t i = 0; i < n; ++i) w.first[i + 1] += w.first[i];
  w.fill.assign(w.first.begin(), w.first.end() - 1);
  const std::size_t neighbours = w.first[n];
  w.radial.resize(stride_ * pairs);
  w.pair.resize(neighbours);
  w.atom.resize(neighbours);
  w.species.resize(neighbours);
  w.unit.resize(3 * neighbours);
  w.monomials.resize(count * neighbours);
  w.moments.assign(n * kinds * a * count, 0.0);

  for (std::size_t p = 0; p < pairs; ++p) {
    const double r = w.list.r()[p], *d = w.list.d() + 3 * p;
    radial_functions(r, &w.radial[stride_ * p]);
    const std::int32_t ends[2] = {w.list.i()[p], w.list.j()[p]};
    for (int side = 0; side < 2; ++side) {
      const std::size_t k = w.fill[static_cast<std::size_t>(ends[side])]++;
      w.pair[k] = p;
      w.atom[k] = ends[1 - side];
      w.species[k] = static_cast<std::int32_t>(species_index(structure.numbers[ends[1 - side]]));
      for (std::size_t x = 0; x < 3; ++x) w.unit[3 * k + x] = (side == 0 ? d[x] : -d[x]) / r;
    }
  }

  std::fill_n(features, n * size_, 0.0);
  for (std::size_t i = 0; i < n; ++i) {
    double* q = features + i * size_;
    double* moments = w.moments.data() + i * kinds * a * count;
    for (std::size_t k = w.first[i]; k < w.first[i + 1]; ++k) {
      const std::size_t s = static_cast<std::size_t>(w.species[k]);
      const double* radial = &w.radial[stride_ * w.pair[k]];
      for (std::size_t m = 0; m < radials; ++m) q[s * radials + m] += radial[m];
      if (a == 0 || w.list.r()[w.pair[k]] >= settings_.angular_cutoff) continue;
      const double *u = &w.unit[3 * k], *angular = radial + 2 * radials;
      double* mono = &w.monomials[count * k];
      mono[0] = 1;
      for (std::size_t c = 1; c < count; ++c) mono[c] = mono[monomials_[c].parent] * u[monomials_[c].axis];
      for (std::size_t m = 0; m < a; ++m) {
        double* out = moments + (s * a + m) * count;
        for (std::size_t c = 0; c < count; ++c) out[c] += angular[m] * mono[c];
      }
      // An angle takes two neighbours: each one's product with itself (all powers of cos 0 = 1) is taken out again.
      double* f = q + pair_offset(s, s);
      for (std::size_t m = 0; m < a; ++m)
        for (std::size_t m2 = m; m2 < a; ++m2)
          for (std::size_t l = 0; l < orders; ++l) *f++ -= (m == m2 ? 0.5 : 1.0) * angular[m] * angular[m2];
    }
    for (std::size_t s = 0; s < kinds && a > 0; ++s)
      for (std::size_t t = s; t < kinds; ++t) {
        double* f = q + pair_offset(s, t);
        for (std::size_t m = 0; m < a; ++m)
          for (std::size_t m2 = s == t ? m : 0; m2 < a; ++m2) {
            const double *one = moments + (s * a + m) * count, *two = moments + (t * a + m2) * count;
            double powers[kMostDegree + 1] = {};
            for (std::size_t c = 0; c < count; ++c)
              powers[monomials_[c].degree] += monomials_[c].multiplicity * one[c] * two[c];
            const double factor = s == t && m == m2 ? 0.5 : 1.0;
            for (std::size_t l = 0; l < orders; ++l, ++f)
              for (std::size_t p = l % 2; p <= l; p += 2) *f += factor * legendre_[l * orders + p] * powers[p];
          }
      }
  }
}

void Environments::contract(const double* gradient, double scale, double* out, Workspace& w) const {
  const std::size_t kinds = species_.size(), count = monomials_.size(),
                    radials = static_cast<std::size_t>(settings_.n_radial),
                    a = static_cast<std::size_t>(settings_.n_angular),
                    orders = static_cast<std::size_t>(settings_.l_max) + 1;
  w.weights.resize(kinds * a * count);
  w.turned.resize(kinds * a * a);
  for (std::size_t i = 0; i < w.n; ++i) {
    const double *g = gradient + i * size_, *moments = w.moments.data() + i * kinds * a * count;
    // weights = dE/d moments; turned = the sum over l of dE/d feature of equal species: what the taken-out products
    // of a neighbour with itself weigh.
    std::fill(w.weights.begin(), w.weights.end(), 0.0);
    for (std::size_t s = 0; s < kinds && a > 0; ++s)
      for (std::size_t t = s; t < kinds; ++t) {
        const double* f = g + pair_offset(s, t);
        for (std::size_t m = 0; m < a; ++m)
          for (std::size_t m2 = s == t ? m : 0; m2 < a; ++m2, f += orders) {
            double powers[kMostDegree + 1] = {}, sum = 0;
            for (std::size_t l = 0; l < orders; ++l) {
              sum += f[l];
              for (std::size_t p = l % 2; p <= l; p += 2) powers[p] += legendre_[l * orders + p] * f[l];
            }
            double *one = &w.weights[(s * a + m) * count], *two = &w.weights[(t * a + m2) * count];
            const double *from_one = moments + (s * a + m) * count, *from_two = moments + (t * a + m2) * count;
            if (s == t) w.turned[(s * a + m) * a + m2] = sum;
            if (s == t && m == m2) {
              for (std::size_t c = 0; c < count; ++c)
                one[c] += powers[monomials_[c].degree] * monomials_[c].multiplicity * from_one[c];
            } else {
              for (std::size_t c = 0; c < count; ++c) {
                const double weight = powers[monomials_[c].degree] * monomials_[c].multiplicity;
                one[c] += weight * from_two[c];
                two[c] += weight * from_one[c];
              }
            }
          }
      }
    for (std::size_t k = w.first[i]; k < w.first[i + 1]; ++k) {
      const std::size_t s = static_cast<std::size_t>(w.species[k]);
      const double r = w.list.r()[w.pair[k]], *u = &w.unit[3 * k], *radial = &w.radial[stride_ * w.pair[k]];
      double along = 0, force[3] = {};  // dE / d (r along u) and dE / d (vector to the neighbour)
      for (std::size_t m = 0; m < radials; ++m) along += g[s * radials + m] * radial[radials + m];
      if (a > 0 && r < settings_.angular_cutoff) {
        const double *value = radial + 2 * radials, *slope = value + a, *mono = &w.monomials[count * k];
        for (std::size_t c = 0; c < count; ++c) {
          double by_value = 0, by_slope = 0;
          for (std::size_t m = 0; m < a; ++m) {
            const double weight = w.weights[(s * a + m) * count + c];
            by_value += weight * value[m];
            by_slope += weight * slope[m];
          }
          const Monomial& monomial = monomials_[c];
          by_value /= r;
          along += mono[c] * (by_slope - monomial.degree * by_value);
          for (int x = 0; x < 3; ++x) force[x] += by_value * monomial.exponent[x] * mono[monomial.lowered[x]];
        }
        for (std::size_t m = 0; m < a; ++m) {
          along -= w.turned[(s * a + m) * a + m] * value[m] * slope[m];
          for (std::size_t m2 = m + 1; m2 < a; ++m2)
            along -= w.turned[(s * a + m) * a + m2] * (value[m] * slope[m2] + slope[m] * value[m2]);
        }
      }
      double *to = out + 3 * static_cast<std::size_t>(w.atom[k]), *centre = out + 3 * i;
      for (std::size_t x = 0; x < 3; ++x) {
        const double f = scale * (force[x] + along * u[x]);
        to[x] += f;
        centre[x] -= f;
      }
    }
  }
}

void Environments::jacobian(std::size_t i, double* out, Workspace& w) const {
  const std::size_t kinds = species_.size(), count = monomials_.size(),
                    radials = static_cast<std::size_t>(settings_.n_radial),
                    a = static_cast<std::size_t>(settings_.n_angular),
                    orders = static_cast<std::size_t>(settings_.l_max) + 1;
  std::fill_n(out, 3 * size_ * neighbors(i, w), 0.0);
  const double* moments = w.moments.data() + i * kinds * a * count;
  // weights = moments times multiplicity: d powers / d moment of the other factor.
  w.weights.resize(kinds * a * count);
  for (std::size_t k = 0; k < kinds * a; ++k)
    for (std::size_t c = 0; c < count; ++c)
      w.weights[k * count + c] = monomials_[c].multiplicity * moments[k * count + c];
  // slopes: d powers[p] of (own function m, species t, function m2) / d vector to the neighbour, (a, kinds a, orders)
  const std::size_t others = kinds * a;
  w.slopes.resize(a * others * orders);
  w.turned.resize(std::max(w.turned.size(), 2 * count));
  double *along = w.turned.data(), *across = along + count;
  for (std::size_t k = w.first[i]; k < w.first[i + 1]; ++k, out += 3 * size_) {
    const std::size_t s = static_cast<std::size_t>(w.species[k]);
    const double r = w.list.r()[w.pair[k]], *u = &w.unit[3 * k], *radial = &w.radial[stride_ * w.pair[k]];
    const bool angular = a > 0 && r < settings_.angular_cutoff;
    const double *value = radial + 2 * radials, *slope = value + a, *mono = &w.monomials[count * k];
    for (std::size_t x = 0; x < 3; ++x) {
      double* q = out + x * size_;
      for (std::size_t m = 0; m < radials; ++m) q[s * radials + m] = radial[radials + m] * u[x];
      if (!angular) continue;
      for (std::size_t c = 0; c < count; ++c) {
        const Monomial& monomial = monomials_[c];
        along[c] = mono[c] * u[x];
        across[c] = (monomial.exponent[x] * mono[monomial.lowered[x]] - monomial.degree * mono[c] * u[x]) / r;
      }
      std::fill(w.slopes.begin(), w.slopes.end(), 0.0);
      for (std::size_t m = 0; m < a; ++m)
        for (std::size_t other = 0; other < others; ++other) {
          double* powers = &w.slopes[(m * others + other) * orders];
          const double* weight = &w.weights[other * count];
          for (std::size_t c = 0; c < count; ++c)
            powers[monomials_[c].degree] += (slope[m] * along[c] + value[m] * across[c]) * weight[c];
        }
      for (std::size_t t = 0; t < kinds; ++t) {
        double* f = q + pair_offset(s, t);
        for (std::size_t m = 0; m < a; ++m)
          for (std::size_t m2 = s == t ? m : 0; m2 < a; ++m2, f += orders) {
            // In features of two species the first function belongs to the lower one.
            const std::size_t own = s <= t ? m : m2, theirs = s <= t ? m2 : m;
            const double* one = &w.slopes[(own * others + t * a + theirs) * orders];
            const double* two = s == t && m != m2 ? &w.slopes[(m2 * others + t * a + m) * orders] : nullptr;
            const double self = s != t    ? 0.0
                                : m == m2 ? value[m] * slope[m] * u[x]
                                          : (value[m] * slope[m2] + slope[m] * value[m2]) * u[x];
            for (std::size_t l = 0; l < orders; ++l) {
              double sum = -self;
              for (std::size_t p = l % 2; p <= l; p += 2)
                sum += legendre_[l * orders + p] * (one[p] + (two ? two[p] : 0.0));
              f[l] = sum;
            }
          }
      }
    }
  }
}

}  // namespace thalweg
