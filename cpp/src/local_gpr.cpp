#include "thalweg/local_gpr.hpp"

#include <algorithm>
#include <cmath>
#include <exception>
#include <limits>
#include <string>

#include "linalg.hpp"

namespace thalweg {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kNugget = 1e-6;             // on the diagonal of K_zz
constexpr double kSmallestVariance = 1e-10;  // of the amplitude
constexpr double kShortest = 0.3, kLongest = 12.0;
constexpr double kLeastNoise = 0.1, kMostNoise = 1e3;
// No more than this times what the energies of the data vary, per atom: forces that the model cannot follow would raise
// the amplitude without end, and with it sigma.
constexpr double kMostAmplitude = 10.0, kLeastBound = 0.1;
constexpr std::size_t kColumns = 64;  // columns are reserved in such steps
constexpr std::size_t kLargestTile = 8;

int lanes_for(std::size_t left) { return left > 4 ? 8 : left > 1 ? 4 : 1; }

const TileKernels& tile_of(int lanes) {
  const LinalgKernels& kernels = linalg_kernels();
  return lanes == 8 ? kernels.tile8 : lanes == 4 ? kernels.tile4 : kernels.tile1;
}

void expect_length(const char* name, std::size_t wanted, std::size_t came) {
  if (wanted != came)
    throw Error(std::string(name) + " must hold " + std::to_string(wanted) + " values, but it holds " +
                std::to_string(came));
}

void expect_positive(const char* name, double value) {
  if (!(value > 0 && std::isfinite(value)))
    throw Error(std::string(name) + " must be above 0, but it is " + std::to_string(value));
}

double squared_distance(const double* a, const double* b, std::size_t n) {
  double sum = 0;
  for (std::size_t k = 0; k < n; ++k) sum += (a[k] - b[k]) * (a[k] - b[k]);
  return sum;
}

KernelTerms unit_kernel(const LocalKernel& kernel, std::size_t dimension) {
  const double rate = -0.5 / (kernel.length * kernel.length * static_cast<double>(dimension));
  return {1.0, 0.0, rate, rate};
}

void check_structures(const Environments& environments, const BatchView& batch) {
  batch.check();
  for (std::size_t row = 0; row < batch.size(); ++row) {
    try {
      environments.check(batch[row]);
    } catch (const Error& error) {
      throw Error("structure " + std::to_string(row) + " of the batch: " + error.what());
    }
  }
}

}  // namespace

// What is kept of a structure that was learned: enough to compute its features' Jacobian again.
struct LocalGpr::Structure {
  std::vector<double> positions, features;  // (n, 3), (n, D) not scaled
  std::vector<std::int32_t> numbers;
  std::vector<std::size_t> species;
  double cell[9];
  std::uint8_t pbc[3];
  double energy;
  std::vector<std::size_t> coordinates;  // those whose force is learned
  std::vector<double> forces;            // (coordinates)

  StructureView view() const { return {numbers.size(), positions.data(), numbers.data(), cell, pbc, nullptr}; }
  std::size_t rows() const { return 1 + coordinates.size(); }
};

LocalGpr::LocalGpr(std::shared_ptr<const Environments> environments, const LocalSettings& settings)
    : environments_(std::move(environments)), settings_(settings), workspace_(*environments_) {
  expect_positive("noise_energy", settings.noise_energy);
  expect_positive("noise_force", settings.noise_force);
  expect_positive("tolerance", settings.tolerance);
  if (settings.max_inducing < 1) throw Error("max_inducing must be at least 1, but it is 0");
}

std::shared_ptr<const LocalGpr::Structure> LocalGpr::structure_of(const StructureView& view, double energy,
                                                                  const double* forces) {
  if (!std::isfinite(energy)) throw Error("an energy that is learned must be finite, but one is not");
  environments_->check(view);
  auto out = std::make_shared<Structure>();
  out->positions.assign(view.positions, view.positions + 3 * view.n);
  out->numbers.assign(view.numbers, view.numbers + view.n);
  for (const std::int32_t number : out->numbers) out->species.push_back(environments_->species_index(number));
  std::copy_n(view.cell, 9, out->cell);
  std::copy_n(view.pbc, 3, out->pbc);
  out->energy = energy;
  for (std::size_t k = 0; forces != nullptr && k < 3 * view.n; ++k)
    if (std::isfinite(forces[k]) && (view.fixed == nullptr || view.fixed[k] == 0)) {
      out->coordinates.push_back(k);
      out->forces.push_back(forces[k]);
    }
  out->features.resize(view.n * environments_->size());
  environments_->values(view, out->features.data(), workspace_);
  return out;
}

std::vector<std::shared_ptr<const LocalGpr::Structure>> LocalGpr::structures_of(const BatchView& batch,
                                                                                std::span<const double> energies,
                                                                                std::span<const double> forces) {
  batch.check();
  expect_length("energies", batch.size(), energies.size());
  if (!forces.empty()) expect_length("forces", batch.positions.size(), forces.size());
  std::vector<std::shared_ptr<const Structure>> out;
  for (std::size_t row = 0; row < batch.size(); ++row)
    out.push_back(
        structure_of(batch[row], energies[row], forces.empty() ? nullptr : forces.data() + 3 * batch.offsets[row]));
  return out;
}

void LocalGpr::fit(const BatchView& batch, std::span<const double> energies, std::span<const double> forces,
                   const LocalKernel& kernel) {
  expect_positive("length", kernel.length);
  expect_positive("amplitude", kernel.amplitude);
  expect_positive("noise_scale", kernel.noise_scale);
  if (batch.size() == 0) throw Error("fit needs at least one structure, but none came");
  auto structures = structures_of(batch, energies, forces);
  data_ = std::move(structures);
  kernel_ = kernel;
  set_scale();
  rebuild();
  solve();
}

void LocalGpr::append(const BatchView& batch, std::span<const double> energies, std::span<const double> forces) {
  if (data_.empty()) throw Error("append needs a model that was fitted; call fit first");
  auto structures = structures_of(batch, energies, forces);
  for (auto& structure : structures) learn(std::move(structure));
  solve();
}

// One over each feature's spread over the environments of the data; features that hardly vary are not blown up.
void LocalGpr::set_scale() {
  const std::size_t dimension = environments_->size();
  std::vector<double> mean(dimension, 0.0), spread(dimension, 0.0);
  double count = 0, largest = 0, largest_mean = 0;
  for (const auto& structure : data_) {
    for (std::size_t k = 0; k < structure->features.size(); ++k) mean[k % dimension] += structure->features[k];
    count += static_cast<double>(structure->numbers.size());
  }
  for (double& value : mean) value /= std::max(count, 1.0);
  for (const auto& structure : data_)
    for (std::size_t k = 0; k < structure->features.size(); ++k)
      spread[k % dimension] += std::pow(structure->features[k] - mean[k % dimension], 2);
  for (std::size_t d = 0; d < dimension; ++d) {
    spread[d] = std::sqrt(spread[d] / std::max(count, 1.0));
    largest = std::max(largest, spread[d]);
    largest_mean = std::max(largest_mean, std::abs(mean[d]));
  }
  const double floor = std::max({0.05 * largest, 0.02 * largest_mean, 1e-6});
  scale_.resize(dimension);
  for (std::size_t d = 0; d < dimension; ++d) scale_[d] = 1 / std::max(spread[d], floor);
}

void LocalGpr::scaled_features(const Structure& structure) {
  const std::size_t dimension = environments_->size();
  features_.resize(structure.features.size());
  for (std::size_t k = 0; k < features_.size(); ++k) features_[k] = structure.features[k] * scale_[k % dimension];
}

void LocalGpr::reserve_points(std::size_t points) {
  if (points <= ld_) return;
  const std::size_t ld = linalg::leading_dimension((points + kColumns - 1) / kColumns * kColumns);
  const auto widen = [&](std::vector<double>& matrix, std::size_t rows, std::size_t new_rows) {
    std::vector<double> out(new_rows * ld, 0.0);
    for (std::size_t i = 0; i < rows; ++i)
      std::copy_n(matrix.begin() + static_cast<std::ptrdiff_t>(i * ld_), ld_,
                  out.begin() + static_cast<std::ptrdiff_t>(i * ld));
    matrix = std::move(out);
  };
  widen(factor_, ld_, ld);
  widen(gram_, ld_, ld);
  widen(phi_, targets_.size(), targets_.size());
  ld_ = ld;
}

// Inducing points from the atoms of one structure, in their order. Returns how many.
std::size_t LocalGpr::add_points(const Structure& structure) {
  const LinalgKernels& kernels = linalg_kernels();
  const std::size_t dimension = environments_->size(), before = order_.size();
  const double rate = unit_kernel(kernel_, dimension).long_rate;
  scaled_features(structure);
  for (std::size_t i = 0; i < structure.numbers.size() && order_.size() < settings_.max_inducing; ++i) {
    const std::size_t species = structure.species[i], m = order_.size();
    const double* q = &features_[i * dimension];
    reserve_points(m + 1);
    double* row = &factor_[m * ld_];
    std::fill_n(row, m, 0.0);
    const std::vector<std::size_t>& place = place_[species];
    column_.resize(place.size());
    for (std::size_t k = 0; k < place.size(); ++k)
      column_[k] = rate * squared_distance(q, &points_[species][k * dimension], dimension);
    kernels.exponential(place.size(), column_.data(), column_.data());
    for (std::size_t k = 0; k < place.size(); ++k) row[place[k]] = column_[k];
    kernels.forward_one(m, 0, factor_.data(), ld_, row);
    double variance = 1 + kNugget;
    for (std::size_t k = 0; k < m; ++k) variance -= row[k] * row[k];
    if (m > 0 && !(variance > tolerance_)) continue;
    row[m] = std::sqrt(variance);
    points_[species].insert(points_[species].end(), q, q + dimension);
    place_[species].push_back(m);
    order_.push_back({species, place.size() - 1});
  }
  return order_.size() - before;
}

// Unit-amplitude covariances of the energy (row 0) and the forces of a structure with the points first_point ..:
// out (rows, points from first_point), not weighted.
void LocalGpr::kernel_rows(const Structure& structure, std::size_t first_point, double* out, std::size_t ld) {
  const std::size_t dimension = environments_->size(), columns = order_.size() - first_point,
                    n = structure.numbers.size();
  const double rate = unit_kernel(kernel_, dimension).long_rate;
  for (std::size_t row = 0; row < structure.rows(); ++row) std::fill_n(out + row * ld, columns, 0.0);
  const bool with_forces = !structure.coordinates.empty();
  scaled_features(structure);
  if (with_forces) {
    // The Jacobians are computed again instead of kept: they are larger than everything else.
    std::vector<double> again(structure.features.size());
    environments_->values(structure.view(), again.data(), workspace_);
  }
  std::vector<std::size_t> row_of(3 * n, 0);
  for (std::size_t k = 0; k < structure.coordinates.size(); ++k) row_of[structure.coordinates[k]] = k + 1;

  for (std::size_t species = 0; species < points_.size(); ++species) {
    const std::vector<std::size_t>& place = place_[species];
    const std::size_t begin =
        static_cast<std::size_t>(std::lower_bound(place.begin(), place.end(), first_point) - place.begin());
    const std::size_t m = place.size() - begin;
    if (m == 0) continue;
    const double* points = &points_[species][begin * dimension];
    for (std::size_t i = 0; i < n; ++i) {
      if (structure.species[i] != species) continue;
      const double* q = &features_[i * dimension];
      column_.resize(m);
      tile_of(1).squared_distances(m, dimension, points, q, column_.data());
      for (double& d2 : column_) d2 *= rate;
      linalg_kernels().exponential(m, column_.data(), column_.data());
      for (std::size_t k = 0; k < m; ++k) out[place[begin + k] - first_point] += column_[k];
      if (!with_forces) continue;
      const std::size_t neighbours = environments_->neighbors(i, workspace_), lines = 3 * neighbours;
      if (neighbours == 0) continue;
      jacobian_.resize(lines * dimension);
      environments_->jacobian(i, jacobian_.data(), workspace_);
      for (std::size_t line = 0; line < lines; ++line)
        for (std::size_t d = 0; d < dimension; ++d) jacobian_[line * dimension + d] *= scale_[d];
      // product = J (z - q): differences first, so that nothing cancels near a point
      transposed_.resize(m * dimension);
      for (std::size_t k = 0; k < m; ++k)
        for (std::size_t d = 0; d < dimension; ++d) transposed_[k * dimension + d] = points[k * dimension + d] - q[d];
      product_.assign(lines * m, 0.0);
      Product product;
      product.m = lines, product.n = m, product.k = dimension;
      product.a = jacobian_.data(), product.a_row = static_cast<std::ptrdiff_t>(dimension);
      product.b = transposed_.data(), product.b_row = 1, product.b_column = static_cast<std::ptrdiff_t>(dimension);
      product.c = product_.data(), product.c_row = m;
      linalg::multiply(product);
      for (double& value : column_) value *= -2 * rate;  // dk/dq = k (z - q) / length^2
      const std::int32_t* atoms = environments_->neighbor_atoms(i, workspace_);
      for (std::size_t line = 0; line < lines; ++line) {
        const std::size_t x = line % 3, to = row_of[3 * static_cast<std::size_t>(atoms[line / 3]) + x],
                          centre = row_of[3 * i + x];
        const double* values = &product_[line * m];
        for (std::size_t k = 0; k < m; ++k) {  // forces are minus the slope
          const double value = values[k] * column_[k];
          if (to) out[to * ld + place[begin + k] - first_point] -= value;
          if (centre) out[centre * ld + place[begin + k] - first_point] += value;
        }
      }
    }
  }
}

// The rows of a structure for all points there are: weighted, whitened, at the end of phi_.
void LocalGpr::add_rows(const Structure& structure) {
  const std::size_t first = targets_.size(), rows = structure.rows();
  phi_.resize((first + rows) * ld_, 0.0);
  kernel_rows(structure, 0, &phi_[first * ld_], ld_);
  for (std::size_t row = 0; row < rows; ++row) {
    const double weight = 1 / (row == 0 ? settings_.noise_energy : settings_.noise_force);
    double* values = &phi_[(first + row) * ld_];
    for (std::size_t k = 0; k < order_.size(); ++k) values[k] *= weight;
    linalg_kernels().forward_one(order_.size(), 0, factor_.data(), ld_, values);
    targets_.push_back(weight * (row == 0 ? structure.energy : structure.forces[row - 1]));
    atoms_.push_back(row == 0 ? weight * static_cast<double>(structure.numbers.size()) : 0.0);
    sum_log_weights_ += std::log(weight);
  }
}

void LocalGpr::rebuild() {
  const std::size_t kinds = environments_->species().size();
  // Where the points would not suffice, the tolerance grows: better a coarser net over all the data than a fine one
  // over the first of them.
  tolerance_ = settings_.tolerance;
  for (;; tolerance_ *= 2) {
    points_.assign(kinds, {});
    place_.assign(kinds, {});
    order_.clear();
    factor_.clear(), gram_.clear(), phi_.clear(), targets_.clear(), atoms_.clear();
    ld_ = 0;
    for (const auto& structure : data_) {
      add_points(*structure);
      if (order_.size() >= settings_.max_inducing) break;
    }
    if (order_.size() < settings_.max_inducing || tolerance_ >= 0.5) break;
  }
  sum_log_weights_ = 0;
  std::size_t rows = 0;
  for (const auto& structure : data_) rows += structure->rows();
  phi_.reserve(rows * ld_);
  for (const auto& structure : data_) add_rows(*structure);
  Product square;
  square.m = square.n = order_.size(), square.k = targets_.size();
  square.a = phi_.data(), square.a_row = 1, square.a_column = static_cast<std::ptrdiff_t>(ld_);
  square.b = phi_.data(), square.b_row = static_cast<std::ptrdiff_t>(ld_);
  square.c = gram_.data(), square.c_row = ld_;
  square.lower_result = true;
  linalg::multiply(square);
}

void LocalGpr::learn(std::shared_ptr<const Structure> structure) {
  const std::size_t old = order_.size(), added = add_points(*structure), rows = targets_.size();
  if (added > 0) {
    // New columns of phi for the rows there are: k_c = sum over j <= c of phi_j L_cj.
    std::size_t row = 0;
    std::vector<double> values;
    for (const auto& known : data_) {
      values.resize(known->rows() * added);
      kernel_rows(*known, old, values.data(), added);
      for (std::size_t k = 0; k < known->rows(); ++k, ++row) {
        const double weight = 1 / (k == 0 ? settings_.noise_energy : settings_.noise_force);
        for (std::size_t c = 0; c < added; ++c) phi_[row * ld_ + old + c] = weight * values[k * added + c];
      }
    }
    Product update;
    update.m = rows, update.n = added, update.k = old, update.scale = -1;
    update.a = phi_.data(), update.a_row = static_cast<std::ptrdiff_t>(ld_);
    update.b = &factor_[old * ld_], update.b_row = 1, update.b_column = static_cast<std::ptrdiff_t>(ld_);
    update.c = &phi_[old], update.c_row = ld_;
    if (old > 0) linalg::multiply(update);
    for (row = 0; row < rows; ++row) {
      double* own = &phi_[row * ld_ + old];
      for (std::size_t c = 0; c < added; ++c) {
        const double* l = &factor_[(old + c) * ld_ + old];
        for (std::size_t j = 0; j < c; ++j) own[c] -= own[j] * l[j];
        own[c] /= l[c];
      }
    }
    Product cross;  // the new rows of the lower triangle
    cross.m = added, cross.n = old + added, cross.k = rows;
    cross.a = &phi_[old], cross.a_row = 1, cross.a_column = static_cast<std::ptrdiff_t>(ld_);
    cross.b = phi_.data(), cross.b_row = static_cast<std::ptrdiff_t>(ld_);
    cross.c = &gram_[old * ld_], cross.c_row = ld_;
    linalg::multiply(cross);
  }
  add_rows(*structure);
  Product square;
  square.m = square.n = order_.size(), square.k = targets_.size() - rows;
  square.a = &phi_[rows * ld_], square.a_row = 1, square.a_column = static_cast<std::ptrdiff_t>(ld_);
  square.b = &phi_[rows * ld_], square.b_row = static_cast<std::ptrdiff_t>(ld_);
  square.c = gram_.data(), square.c_row = ld_;
  square.lower_result = true;
  linalg::multiply(square);
  data_.push_back(std::move(structure));
}

// For amplitude = ratio noise_scale: the log likelihood at the best noise scale within its bounds, which is known in
// closed form, given mean_ and what the data are.
double LocalGpr::best_noise(double ratio, double& noise_scale) const {
  const std::size_t m = order_.size(), rows = targets_.size();
  std::vector<double> a(m * ld_), b(m, 0.0);
  double square = 0, log_determinant = 0;
  for (std::size_t row = 0; row < rows; ++row) {
    const double y = targets_[row] - mean_ * atoms_[row];
    square += y * y;
    for (std::size_t k = 0; k < m; ++k) b[k] += y * phi_[row * ld_ + k];
  }
  for (std::size_t i = 0; i < m; ++i) {
    for (std::size_t j = 0; j <= i; ++j) a[i * ld_ + j] = ratio * gram_[i * ld_ + j];
    a[i * ld_ + i] += 1;
  }
  if (!linalg::cholesky(m, a.data(), ld_, 0.0)) return -std::numeric_limits<double>::infinity();
  linalg_kernels().forward_one(m, 0, a.data(), ld_, b.data());
  for (std::size_t i = 0; i < m; ++i) {
    square -= ratio * b[i] * b[i];
    log_determinant += 2 * std::log(a[i * ld_ + i]);
  }
  const double count = static_cast<double>(rows);
  square = std::max(square, 0.0);
  noise_scale = std::clamp(square / count, kLeastNoise, kMostNoise);
  return -0.5 * (square / noise_scale + count * std::log(2 * 3.14159265358979323846 * noise_scale) + log_determinant) +
         sum_log_weights_;
}

double LocalGpr::energy_per_atom() const {
  double energies = 0, atoms = 0;
  for (const auto& structure : data_) {
    const double n = static_cast<double>(structure->numbers.size());
    energies += structure->energy * n;
    atoms += n * n;
  }
  return energies / std::max(atoms, 1.0);
}

void LocalGpr::solve() {
  const std::size_t m = order_.size(), rows = targets_.size();
  mean_ = energy_per_atom();
  double noise = kernel_.noise_scale;

  // The factor of A, and weights = L^-T A^-1 Phi^T y / nu.
  std::vector<double> a(m * ld_), b(m, 0.0);
  double square = 0, log_determinant = static_cast<double>(m) * std::log(kernel_.amplitude);
  for (std::size_t row = 0; row < rows; ++row) {
    const double y = targets_[row] - mean_ * atoms_[row];
    square += y * y;
    for (std::size_t k = 0; k < m; ++k) b[k] += y * phi_[row * ld_ + k];
  }
  for (std::size_t i = 0; i < m; ++i) {
    for (std::size_t j = 0; j <= i; ++j) a[i * ld_ + j] = gram_[i * ld_ + j] / noise;
    a[i * ld_ + i] += 1 / kernel_.amplitude;
    b[i] /= noise;
  }
  // Every eigenvalue is at least 1 / amplitude, rounding aside.
  double jitter = 0;
  std::vector<double> factor = a;
  while (!linalg::cholesky(m, factor.data(), ld_, 0.0)) {
    jitter = jitter > 0 ? 10 * jitter : 1e-12 * a[0];
    factor = a;
    for (std::size_t i = 0; i < m; ++i) factor[i * ld_ + i] += jitter;
    if (!(jitter < 1e6 * std::abs(a[0]))) throw Error("the sparse GP has no factor; are energies and forces finite?");
  }
  const LinalgKernels& kernels = linalg_kernels();
  kernels.forward_one(m, 0, factor.data(), ld_, b.data());
  double explained = 0;
  for (std::size_t i = 0; i < m; ++i) {
    explained += b[i] * b[i];
    log_determinant += 2 * std::log(factor[i * ld_ + i]);
  }
  likelihood_ = -0.5 * (square / noise - explained +
                        static_cast<double>(rows) * std::log(2 * 3.14159265358979323846 * noise) + log_determinant) +
                sum_log_weights_;
  kernels.backward_one(m, factor.data(), ld_, b.data());
  weights_ = std::move(b);
  kernels.backward_one(m, factor_.data(), ld_, weights_.data());
  species_weights_.assign(points_.size(), {});
  for (std::size_t species = 0; species < points_.size(); ++species)
    for (const std::size_t k : place_[species]) species_weights_[species].push_back(weights_[k]);

  // spread = (L C)^-T (L C)^-1 - amplitude L^-T L^-1 with C the factor of A
  std::vector<double> both(m * ld_, 0.0),
      alone(factor_.begin(), factor_.begin() + static_cast<std::ptrdiff_t>(m * ld_)), scratch(m * m / 4 + m + 1),
      inverse(m * ld_, 0.0);
  Product product;
  product.m = product.n = product.k = m;
  product.a = factor_.data(), product.a_row = static_cast<std::ptrdiff_t>(ld_), product.a_shape = Product::lower;
  product.b = factor.data(), product.b_row = static_cast<std::ptrdiff_t>(ld_), product.b_shape = Product::lower;
  product.c = both.data(), product.c_row = ld_;
  linalg::multiply(product);
  linalg::inverse_from_factor(m, alone.data(), ld_, inverse.data(), ld_, scratch.data());
  spread_.assign(m * m, 0.0);
  linalg::inverse_from_factor(m, both.data(), ld_, spread_.data(), m, scratch.data());
  for (std::size_t i = 0; i < m; ++i)
    for (std::size_t j = 0; j <= i; ++j) {
      spread_[i * m + j] -= kernel_.amplitude * inverse[i * ld_ + j];
      spread_[j * m + i] = spread_[i * m + j];
    }
}

double LocalGpr::optimise(std::span<const double> factors) {
  if (data_.empty()) throw Error("optimise needs a model that was fitted; call fit first");
  const LocalKernel start = kernel_;
  LocalKernel best = start;
  double highest = -std::numeric_limits<double>::infinity(), last = -1;
  set_scale();
  for (const double factor : factors) {
    expect_positive("a factor of the length", factor);
    const double length = std::clamp(factor * start.length, kShortest, kLongest);
    if (length == last) continue;
    last = length;
    kernel_.length = length;
    rebuild();
    mean_ = energy_per_atom();
    double spread = 0;
    for (const auto& structure : data_) {
      const double n = static_cast<double>(structure->numbers.size()), off = structure->energy - mean_ * n;
      spread += off * off / std::max(n, 1.0) / static_cast<double>(data_.size());
    }
    const double most = kMostAmplitude * std::max(spread, kLeastBound);
    for (int step = -8; step <= 10; ++step) {
      const double ratio = std::pow(10.0, 0.5 * step);
      double noise = 1;
      const double value = best_noise(ratio, noise);
      if (value > highest && (ratio * noise <= most || step == -8)) {
        highest = value;
        best = {length, ratio * noise, noise};
      }
    }
  }
  kernel_ = best;
  rebuild();
  solve();
  return likelihood_;
}

// ---- prediction ---------------------------------------------------------------------------------------------------

// Energy and sigma of single structures; scratch of one thread. The atoms of a species share tiles, eight, four or one
// at a time (linalg.hpp), so a structure's result depends on nothing but the structure.
class LocalPredictor {
 public:
  explicit LocalPredictor(const LocalGpr& gpr)
      : gpr_(gpr),
        environments_(*gpr.environments_),
        dimension_(environments_.size()),
        terms_(unit_kernel(gpr.kernel_, dimension_)) {}

  struct Result {
    double energy = 0, sigma = 0;
  };
  /// False if the structure has no features. kappa_gradient: gradient() becomes that of energy - kappa sigma.
  bool predict(const StructureView& structure, Environments::Workspace& workspace, double kappa, bool want_sigma,
               bool want_gradient, bool want_sigma_gradient, Result& result, double* atom_sigmas);
  const double* gradient() const { return gradient_.data(); }              // (n, D), of features not scaled
  const double* sigma_gradient() const { return sigma_gradient_.data(); }  // (n, D)

 private:
  struct Tile {
    std::size_t species, count, first;  // first: in members_
    int lanes;
    std::size_t features, kernel;  // where its arrays begin
  };
  void lay_out(const StructureView& structure);
  void gradient_of(const double* coefficients, double* out);
  double same_species(std::size_t i, std::size_t j, double* slope) const;

  const LocalGpr& gpr_;
  const Environments& environments_;
  std::size_t dimension_;
  KernelTerms terms_;
  std::vector<double> features_, tile_features_, kernel_, slope_, combined_, tile_gradient_, phi_, turned_,
      coefficients_, gradient_, sigma_gradient_, between_, between_slope_, species_coefficients_;
  std::vector<std::size_t> members_, species_;
  std::vector<Tile> tiles_;
};

void LocalPredictor::lay_out(const StructureView& structure) {
  species_.resize(structure.n);
  for (std::size_t i = 0; i < structure.n; ++i) species_[i] = environments_.species_index(structure.numbers[i]);
  members_.clear();
  tiles_.clear();
  std::size_t features = 0, kernel = 0;
  for (std::size_t species = 0; species < gpr_.points_.size(); ++species) {
    const std::size_t begin = members_.size();
    for (std::size_t i = 0; i < structure.n; ++i)
      if (species_[i] == species) members_.push_back(i);
    for (std::size_t first = begin; first < members_.size();) {
      const int lanes = lanes_for(members_.size() - first);
      const std::size_t width = static_cast<std::size_t>(lanes), count = std::min(width, members_.size() - first);
      tiles_.push_back({species, count, first, lanes, features, kernel});
      features += width * dimension_;
      kernel += width * gpr_.place_[species].size();
      first += count;
    }
  }
  tile_features_.resize(features);
  tile_gradient_.resize(kLargestTile * dimension_);
  kernel_.resize(kernel);
  slope_.resize(kernel);
  combined_.resize(kernel);
}

// out (n, D) = sum over points of coefficient dk/dq, for scaled features.
void LocalPredictor::gradient_of(const double* coefficients, double* out) {
  const double ones[kLargestTile] = {};
  for (const Tile& tile : tiles_) {
    const std::vector<std::size_t>& place = gpr_.place_[tile.species];
    const std::size_t m = place.size(), width = static_cast<std::size_t>(tile.lanes);
    species_coefficients_.resize(m);
    for (std::size_t k = 0; k < m; ++k) species_coefficients_[k] = coefficients[place[k]];
    const TileKernels& kernels = tile_of(tile.lanes);
    kernels.combine(m, species_coefficients_.data(), ones, nullptr, &slope_[tile.kernel], &combined_[tile.kernel]);
    std::fill_n(tile_gradient_.data(), width * dimension_, 0.0);
    kernels.gradient(m, dimension_, gpr_.points_[tile.species].data(), &tile_features_[tile.features],
                     &combined_[tile.kernel], tile_gradient_.data());
    for (std::size_t lane = 0; lane < tile.count; ++lane) {
      double* row = out + members_[tile.first + lane] * dimension_;
      for (std::size_t d = 0; d < dimension_; ++d) row[d] = tile_gradient_[d * width + lane];
    }
  }
}

bool LocalPredictor::predict(const StructureView& structure, Environments::Workspace& workspace, double kappa,
                             bool want_sigma, bool want_gradient, bool want_sigma_gradient, Result& result,
                             double* atom_sigmas) {
  const std::size_t n = structure.n, m = gpr_.order_.size();
  for (std::size_t k = 0; k < 3 * n; ++k)
    if (!(std::abs(structure.positions[k]) <= 1e9)) return false;
  features_.resize(n * dimension_);
  try {
    environments_.values(structure, features_.data(), workspace);
  } catch (const Error&) {  // what does not depend on the positions was checked before
    return false;
  }
  for (std::size_t i = 0; i < n; ++i)
    for (std::size_t d = 0; d < dimension_; ++d) features_[i * dimension_ + d] *= gpr_.scale_[d];
  lay_out(structure);

  const bool sloped = want_gradient || want_sigma_gradient;
  phi_.assign(m, 0.0);
  result.energy = gpr_.mean_ * static_cast<double>(n);
  for (const Tile& tile : tiles_) {
    const std::vector<std::size_t>& place = gpr_.place_[tile.species];
    const std::size_t points = place.size(), width = static_cast<std::size_t>(tile.lanes);
    if (points == 0) continue;
    double* f = &tile_features_[tile.features];
    for (std::size_t lane = 0; lane < width; ++lane) {  // lanes without an atom repeat the first
      const double* q = &features_[members_[tile.first + (lane < tile.count ? lane : 0)] * dimension_];
      for (std::size_t d = 0; d < dimension_; ++d) f[d * width + lane] = q[d];
    }
    const TileKernels& kernels = tile_of(tile.lanes);
    double means[kLargestTile] = {};
    double* k = &kernel_[tile.kernel];
    kernels.squared_distances(points, dimension_, gpr_.points_[tile.species].data(), f, k);
    kernels.evaluate(points, terms_, gpr_.species_weights_[tile.species].data(), k,
                     sloped ? &slope_[tile.kernel] : nullptr, means);
    for (std::size_t lane = 0; lane < tile.count; ++lane) result.energy += means[lane];
    for (std::size_t p = 0; p < points; ++p)
      for (std::size_t lane = 0; lane < tile.count; ++lane) phi_[place[p]] += k[p * width + lane];
  }

  const double amplitude = gpr_.kernel_.amplitude, floor = kSmallestVariance * amplitude;
  double inverse_sigma = 0;
  if (want_sigma || want_sigma_gradient || (want_gradient && kappa != 0)) {
    // turned = spread phi, as a sum of rows: spread is symmetric
    turned_.assign(m, 0.0);
    Product product;
    product.m = 1, product.n = product.k = m;
    product.a = phi_.data(), product.a_row = static_cast<std::ptrdiff_t>(m);
    product.b = gpr_.spread_.data(), product.b_row = static_cast<std::ptrdiff_t>(m);
    product.c = turned_.data(), product.c_row = m;
    linalg::multiply(product);
    // covariances of the atoms of one species with each other
    between_.resize(n);
    double variance = 0;
    for (std::size_t i = 0; i < m; ++i) variance += phi_[i] * turned_[i];
    if (sloped) between_slope_.assign(n * dimension_, 0.0);
    for (std::size_t i = 0; i < n; ++i) {
      variance += amplitude;
      for (std::size_t j = 0; j < i; ++j)
        between_[j] =
            terms_.long_rate * squared_distance(&features_[i * dimension_], &features_[j * dimension_], dimension_);
      linalg_kernels().exponential(i, between_.data(), between_.data());
      for (std::size_t j = 0; j < i; ++j) {
        if (species_[i] != species_[j]) continue;
        variance += 2 * amplitude * between_[j];
        if (!sloped) continue;
        // half the slope of the variance
        const double factor = -2 * terms_.long_rate * amplitude * between_[j];
        for (std::size_t d = 0; d < dimension_; ++d) {
          const double delta = factor * (features_[j * dimension_ + d] - features_[i * dimension_ + d]);
          between_slope_[i * dimension_ + d] += delta;
          between_slope_[j * dimension_ + d] -= delta;
        }
      }
    }
    result.sigma = std::sqrt(std::max(variance, floor));
    inverse_sigma = variance > floor ? 1 / result.sigma : 0.0;
  }
  if (want_gradient) {
    gradient_.resize(n * dimension_);
    coefficients_ = gpr_.weights_;
    if (kappa != 0)
      for (std::size_t k = 0; k < m; ++k) coefficients_[k] -= kappa * inverse_sigma * turned_[k];
    gradient_of(coefficients_.data(), gradient_.data());
    if (kappa != 0)
      for (std::size_t k = 0; k < n * dimension_; ++k) gradient_[k] -= kappa * inverse_sigma * between_slope_[k];
    for (std::size_t i = 0; i < n; ++i)
      for (std::size_t d = 0; d < dimension_; ++d) gradient_[i * dimension_ + d] *= gpr_.scale_[d];
  }
  if (want_sigma_gradient) {
    sigma_gradient_.resize(n * dimension_);
    coefficients_.resize(m);
    for (std::size_t k = 0; k < m; ++k) coefficients_[k] = inverse_sigma * turned_[k];
    gradient_of(coefficients_.data(), sigma_gradient_.data());
    for (std::size_t i = 0; i < n; ++i)
      for (std::size_t d = 0; d < dimension_; ++d) {
        const std::size_t k = i * dimension_ + d;
        sigma_gradient_[k] = (sigma_gradient_[k] + inverse_sigma * between_slope_[k]) * gpr_.scale_[d];
      }
  }
  if (atom_sigmas != nullptr)
    for (const Tile& tile : tiles_) {
      const std::vector<std::size_t>& place = gpr_.place_[tile.species];
      const std::size_t width = static_cast<std::size_t>(tile.lanes);
      for (std::size_t lane = 0; lane < tile.count; ++lane) {
        double variance = amplitude;
        for (std::size_t p = 0; p < place.size(); ++p) {
          double sum = 0;
          for (std::size_t p2 = 0; p2 < place.size(); ++p2)
            sum += gpr_.spread_[place[p] * m + place[p2]] * kernel_[tile.kernel + p2 * width + lane];
          variance += sum * kernel_[tile.kernel + p * width + lane];
        }
        atom_sigmas[members_[tile.first + lane]] = std::sqrt(std::max(variance, floor));
      }
    }
  return true;
}

namespace {

std::vector<double> offsets_of(const BatchView& batch, const std::vector<std::pair<std::int32_t, double>>& energies) {
  std::vector<double> out(batch.size(), 0.0);
  for (std::size_t row = 0; row < batch.size() && !energies.empty(); ++row) {
    const StructureView structure = batch[row];
    for (const auto& [number, energy] : energies)
      out[row] += energy * static_cast<double>(std::count(structure.numbers, structure.numbers + structure.n, number));
  }
  return out;
}

}  // namespace

class LocalEvaluator : public Evaluator {
 public:
  LocalEvaluator(const LocalSurrogate& surrogate, const BatchView& batch, ForcesOn on)
      : gpr_(surrogate.gpr_),
        prior_(surrogate.prior_ ? surrogate.prior_->evaluator(batch, on) : nullptr),
        kappa_(surrogate.kappa_),
        batch_(batch),
        offsets_(offsets_of(batch, surrogate.atom_energies_)),
        workspaces_(batch.size()),
        predictor_(*gpr_) {}

  void evaluate(std::span<const std::int64_t> rows, const double* positions, double* energies,
                double* forces) override {
    if (prior_) prior_->evaluate(rows, positions, energies, forces);
    for (const std::int64_t at : rows) {
      const std::size_t row = static_cast<std::size_t>(at);
      StructureView structure = batch_[row];
      structure.positions = positions + 3 * batch_.offsets[row];
      double* f = forces + 3 * batch_.offsets[row];
      if (!workspaces_[row]) workspaces_[row] = std::make_unique<Environments::Workspace>(gpr_->environments());
      LocalPredictor::Result result;
      if (!predictor_.predict(structure, *workspaces_[row], kappa_, kappa_ != 0, true, false, result, nullptr)) {
        energies[row] = kNaN;
        std::fill_n(f, 3 * structure.n, kNaN);
        continue;
      }
      if (!prior_) {
        energies[row] = 0;
        std::fill_n(f, 3 * structure.n, 0.0);
      }
      energies[row] += result.energy + offsets_[row] - (kappa_ != 0 ? kappa_ * result.sigma : 0.0);
      gpr_->environments().contract(predictor_.gradient(), -1.0, f, *workspaces_[row]);
    }
  }

 private:
  std::shared_ptr<const LocalGpr> gpr_;
  std::unique_ptr<Evaluator> prior_;
  double kappa_;
  BatchView batch_;
  std::vector<double> offsets_;
  std::vector<std::unique_ptr<Environments::Workspace>> workspaces_;  // made when a row is first asked for
  LocalPredictor predictor_;
};

LocalSurrogate::LocalSurrogate(std::shared_ptr<const LocalGpr> gpr, std::shared_ptr<const Landscape> prior,
                               std::vector<std::pair<std::int32_t, double>> atom_energies, double kappa)
    : gpr_(std::move(gpr)), prior_(std::move(prior)), atom_energies_(std::move(atom_energies)), kappa_(kappa) {
  if (!gpr_ || gpr_->size() == 0) throw Error("a surrogate needs a GP with data; call fit first");
  if (!std::isfinite(kappa)) throw Error("kappa must be finite, but it is " + std::to_string(kappa));
}

std::unique_ptr<Evaluator> LocalSurrogate::evaluator(const BatchView& batch, ForcesOn on) const {
  check_structures(gpr_->environments(), batch);
  return std::make_unique<LocalEvaluator>(*this, batch, on);
}

void LocalSurrogate::predict(const BatchView& batch, std::span<double> energies, std::span<double> sigmas,
                             std::span<double> atom_sigmas, std::span<double> forces, std::span<double> sigma_forces,
                             int threads) const {
  check_structures(gpr_->environments(), batch);
  const std::size_t coordinates = batch.positions.size();
  expect_length("energies", batch.size(), energies.size());
  expect_length("sigmas", batch.size(), sigmas.size());
  if (!atom_sigmas.empty()) expect_length("atom_sigmas", batch.atoms(), atom_sigmas.size());
  if (!forces.empty()) expect_length("forces", coordinates, forces.size());
  if (!sigma_forces.empty()) expect_length("sigma_forces", coordinates, sigma_forces.size());
  if (threads == 0) threads = default_threads();
  std::fill(forces.begin(), forces.end(), 0.0);
  std::fill(energies.begin(), energies.end(), 0.0);
  std::fill(sigma_forces.begin(), sigma_forces.end(), 0.0);
  if (prior_) {
    std::vector<double> unused(forces.empty() ? coordinates : 0);
    thalweg::evaluate(*prior_, batch, energies, forces.empty() ? std::span<double>(unused) : forces, threads);
  }
  const std::vector<double> offsets = offsets_of(batch, atom_energies_);
  std::exception_ptr failure;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    LocalPredictor predictor(*gpr_);
    Environments::Workspace workspace(gpr_->environments());
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t at = 0; at < static_cast<std::int64_t>(batch.size()); ++at) {
      try {
        const std::size_t row = static_cast<std::size_t>(at), first = static_cast<std::size_t>(batch.offsets[row]);
        const StructureView structure = batch[row];
        LocalPredictor::Result result;
        double* atoms = atom_sigmas.empty() ? nullptr : atom_sigmas.data() + first;
        if (!predictor.predict(structure, workspace, 0.0, true, !forces.empty(), !sigma_forces.empty(), result,
                               atoms)) {
          energies[row] = sigmas[row] = kNaN;
          if (atoms != nullptr) std::fill_n(atoms, structure.n, kNaN);
          if (!forces.empty()) std::fill_n(forces.data() + 3 * first, 3 * structure.n, kNaN);
          if (!sigma_forces.empty()) std::fill_n(sigma_forces.data() + 3 * first, 3 * structure.n, kNaN);
          continue;
        }
        energies[row] += result.energy + offsets[row];
        sigmas[row] = result.sigma;
        if (!forces.empty())
          gpr_->environments().contract(predictor.gradient(), -1.0, forces.data() + 3 * first, workspace);
        if (!sigma_forces.empty())
          gpr_->environments().contract(predictor.sigma_gradient(), -1.0, sigma_forces.data() + 3 * first, workspace);
      } catch (...) {
#pragma omp critical(thalweg_local_predict)
        if (!failure) failure = std::current_exception();
      }
    }
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace thalweg
