// The GP against Eigen's dense formulas, its derivatives, and the laws of append, remove and tiles.
#include <Eigen/Dense>
#include <cstring>
#include <ctime>

#include "minitest.hpp"
#include "thalweg/gpr.hpp"
#include "thalweg/random.hpp"

using namespace thalweg;
using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

namespace {

struct Data {
  Matrix x;
  Eigen::VectorXd y;
  std::span<const double> features(std::size_t first, std::size_t count) const {
    return {x.data() + first * static_cast<std::size_t>(x.cols()), count * static_cast<std::size_t>(x.cols())};
  }
  std::span<const double> targets(std::size_t first, std::size_t count) const { return {y.data() + first, count}; }
};

// A smooth function of the features, so that the likelihood has an inner maximum.
Data smooth_data(std::size_t n, std::size_t dimension, std::uint64_t seed, double origin = 0) {
  Random random({seed, 3}, 0);
  Data data{Matrix(n, dimension), Eigen::VectorXd(n)};
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t d = 0; d < dimension; ++d) data.x(i, d) = origin + random.uniform(-1, 1);
    data.y[i] = 5 * std::sin(2 * (data.x(i, 0) - origin)) + std::pow(data.x(i, 1 % dimension) - origin, 2) - 20;
  }
  return data;
}

Kernel test_kernel(std::size_t dimension) {
  const double scale = std::sqrt(2.0 / 3.0 * static_cast<double>(dimension));  // root mean square distance
  Kernel k;
  k.amplitude = 20, k.length_long = scale, k.length_short = 0.3 * scale, k.weight_long = 0.9, k.weight_short = 0.1;
  k.noise = 1e-4;
  return k;
}

double covariance(const Kernel& k, double d2) {
  return k.amplitude * (k.weight_long * std::exp(-d2 / (2 * k.length_long * k.length_long)) +
                        k.weight_short * std::exp(-d2 / (2 * k.length_short * k.length_short)));
}

Matrix covariance_matrix(const Kernel& k, const Matrix& x) {
  Matrix out(x.rows(), x.rows());
  for (Eigen::Index i = 0; i < x.rows(); ++i)
    for (Eigen::Index j = 0; j < x.rows(); ++j)
      out(i, j) = covariance(k, (x.row(i) - x.row(j)).squaredNorm()) + (i == j ? k.noise : 0);
  return out;
}

struct Prediction {
  std::vector<double> mean, sigma, gradient, gradient_sigma;
};

Prediction predict(const Gpr& gpr, std::span<const double> features, double kappa) {
  const std::size_t count = features.size() / gpr.features();
  Prediction p{std::vector<double>(count), std::vector<double>(count), std::vector<double>(features.size()),
               std::vector<double>(features.size())};
  gpr.predict(count, features.data(), kappa, p.mean.data(), p.sigma.data(), p.gradient.data(), p.gradient_sigma.data());
  return p;
}

double relative(std::span<const double> a, std::span<const double> b) {
  double difference = 0, size = 0;
  for (std::size_t k = 0; k < a.size(); ++k) {
    difference = std::max(difference, std::abs(a[k] - b[k]));
    size = std::max(size, std::abs(b[k]));
  }
  return a.size() == b.size() ? difference / size : 1e300;
}

// Of this thread: the machine may be busy.
double cpu_seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

}  // namespace

// A mean without sigma is read off block by block.
TEST(a_mean_alone_is_the_same_bits) {
  const std::size_t n = 300, dimension = 270;
  const Data train = smooth_data(n, dimension, 1), other = smooth_data(13, dimension, 2);
  Gpr gpr(dimension, test_kernel(dimension));
  gpr.fit(train.features(0, n), train.targets(0, n));
  for (const std::size_t count : {1u, 4u, 8u, 13u}) {
    const Prediction all = predict(gpr, other.features(0, count), 0);
    std::vector<double> mean(count), gradient(count * dimension);
    gpr.predict(count, other.features(0, count).data(), 0, mean.data(), nullptr, gradient.data(), nullptr);
    CHECK(mean == all.mean);
    CHECK(gradient == all.gradient);
    gpr.predict(count, other.features(0, count).data(), 0, mean.data(), nullptr, nullptr, nullptr);
    CHECK(mean == all.mean);
  }
}

TEST(mean_sigma_and_likelihood_match_dense_formulas) {
  const std::size_t n = 90, dimension = 12;
  const Data train = smooth_data(n, dimension, 1), other = smooth_data(11, dimension, 2);
  const Kernel kernel = test_kernel(dimension);
  Gpr gpr(dimension, kernel);
  gpr.fit(train.features(0, n), train.targets(0, n));
  CHECK(gpr.jitter() == 0 && gpr.size() == n);
  const Matrix k = covariance_matrix(kernel, train.x);
  const double mean = train.y.mean();
  const Eigen::VectorXd centred = train.y.array() - mean, alpha = k.llt().solve(centred);
  const Prediction p = predict(gpr, other.features(0, 11), 0);
  for (Eigen::Index c = 0; c < 11; ++c) {
    Eigen::VectorXd row(n);
    for (Eigen::Index i = 0; i < row.size(); ++i)
      row[i] = covariance(kernel, (other.x.row(c) - train.x.row(i)).squaredNorm());
    const std::size_t at = static_cast<std::size_t>(c);
    CLOSE(p.mean[at], mean + row.dot(alpha), 1e-10);
    CLOSE(p.sigma[at], std::sqrt(kernel.amplitude - row.dot(k.llt().solve(row))), 1e-8);
  }
  const double likelihood = -0.5 * centred.dot(alpha) - 0.5 * static_cast<double>(n) * std::log(2 * M_PI) -
                            k.llt().matrixLLT().diagonal().array().log().sum();
  CLOSE(gpr.likelihood(kernel).value, likelihood, 1e-9 * std::abs(likelihood));
  CLOSE(gpr.log_likelihood(), likelihood, 1e-9 * std::abs(likelihood));
}

TEST(likelihood_gradient_is_the_derivative) {
  const std::size_t n = 150, dimension = 6;  // more than one block of the recursions
  const Data data = smooth_data(n, dimension, 4);
  Kernel kernel = test_kernel(dimension);
  kernel.noise = 1e-2;
  Gpr gpr(dimension, kernel);
  gpr.fit(data.features(0, n), data.targets(0, n));
  const Likelihood l = gpr.likelihood(kernel);
  const auto central = [&](auto change) {  // fourth order
    const double h = 1e-3;
    const auto at = [&](double step) {
      Kernel k = kernel;
      change(k, step);
      return gpr.likelihood(k).value;
    };
    return (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h);
  };
  const double expected[5] = {
      central([](Kernel& k, double t) { k.amplitude *= std::exp(t); }),
      central([](Kernel& k, double t) { k.length_long *= std::exp(t); }),
      central([](Kernel& k, double t) { k.length_short *= std::exp(t); }),
      central([](Kernel& k, double t) { k.noise *= std::exp(t); }), central([](Kernel& k, double t) {
        const double sum = k.weight_long + k.weight_short, ratio = k.weight_short / k.weight_long * std::exp(t);
        k.weight_short = sum * ratio / (1 + ratio), k.weight_long = sum - k.weight_short;
      })};
  const double came[5] = {l.d_amplitude, l.d_length_long, l.d_length_short, l.d_noise, l.d_weight};
  double largest = 0;
  for (const double e : expected) largest = std::max(largest, std::abs(e));
  for (int k = 0; k < 5; ++k) CLOSE(came[k], expected[k], 1e-8 * largest);
}

TEST(gradients_are_the_derivatives) {
  const std::size_t n = 60, dimension = 9;
  const Data train = smooth_data(n, dimension, 5), other = smooth_data(6, dimension, 6);
  Gpr gpr(dimension, test_kernel(dimension));
  gpr.fit(train.features(0, n), train.targets(0, n));
  const double kappa = 1.7, h = 1e-3;
  const Prediction here = predict(gpr, other.features(0, 6), kappa);
  double largest = 0;
  for (const double g : here.gradient) largest = std::max(largest, std::abs(g));
  Random random({8, 8}, 0);
  for (std::size_t c = 0; c < 6; ++c) {
    Eigen::VectorXd direction(dimension);
    for (double& d : direction) d = random.uniform(-1, 1);
    direction.normalize();
    const auto at = [&](double step) {
      const Eigen::VectorXd point = other.x.row(static_cast<Eigen::Index>(c)).transpose() + step * direction;
      return predict(gpr, {point.data(), dimension}, kappa);
    };
    const Prediction p1 = at(h), m1 = at(-h), p2 = at(2 * h), m2 = at(-2 * h);
    const auto central = [&](auto value) { return (8 * (value(p1) - value(m1)) - (value(p2) - value(m2))) / (12 * h); };
    double lcb = 0, sigma = 0;
    for (std::size_t d = 0; d < dimension; ++d) {
      lcb += here.gradient[c * dimension + d] * direction[static_cast<Eigen::Index>(d)];
      sigma += here.gradient_sigma[c * dimension + d] * direction[static_cast<Eigen::Index>(d)];
    }
    CLOSE(lcb, central([&](const Prediction& p) { return p.mean[0] - kappa * p.sigma[0]; }), 1e-8 * largest);
    CLOSE(sigma, central([&](const Prediction& p) { return p.sigma[0]; }), 1e-8 * largest);
  }
}

TEST(append_and_remove_equal_a_refit) {
  const std::size_t n = 130, dimension = 20;
  const Data data = smooth_data(n, dimension, 7), other = smooth_data(5, dimension, 8);
  const Kernel kernel = test_kernel(dimension);
  Gpr refit(dimension, kernel), grown(dimension, kernel);
  refit.fit(data.features(0, n), data.targets(0, n));
  grown.fit(data.features(0, 10), data.targets(0, 10));
  for (std::size_t i = 10; i < n; ++i) grown.append(data.features(i, 1), data.y[static_cast<Eigen::Index>(i)]);
  CLOSE(relative(grown.weights(), refit.weights()), 0, 1e-10);
  CLOSE(grown.mean(), refit.mean(), 1e-12);
  const Prediction a = predict(grown, other.features(0, 5), 1), b = predict(refit, other.features(0, 5), 1);
  CLOSE(relative(a.mean, b.mean), 0, 1e-10);
  CLOSE(relative(a.sigma, b.sigma), 0, 1e-10);
  CLOSE(relative(a.gradient, b.gradient), 0, 1e-10);
  CLOSE(grown.log_likelihood(), refit.log_likelihood(), 1e-10 * std::abs(refit.log_likelihood()));

  // Removing rows 0, 64 and the last one, and appending row 0 again.
  for (const std::size_t row : {std::size_t{0}, std::size_t{64}, n - 3}) grown.remove(row);
  grown.append(data.features(0, 1), data.y[0]);
  std::vector<double> x, y;
  for (std::size_t i = 1; i + 1 <= n; ++i) {
    if (i == 65 || i == n - 1) continue;
    const auto f = data.features(i, 1);
    x.insert(x.end(), f.begin(), f.end());
    y.push_back(data.y[static_cast<Eigen::Index>(i)]);
  }
  const auto f = data.features(0, 1);
  x.insert(x.end(), f.begin(), f.end());
  y.push_back(data.y[0]);
  refit.fit(x, y);
  CHECK(grown.size() == n - 2);
  CHECK(std::equal(x.begin(), x.end(), grown.training().begin(), grown.training().end()));
  CLOSE(relative(grown.weights(), refit.weights()), 0, 1e-10);
  grown.set_kernel(kernel);  // from the cached distances
  CHECK(std::equal(grown.weights().begin(), grown.weights().end(), refit.weights().begin()));  // same bits
}

TEST(new_targets_equal_a_refit) {
  const std::size_t n = 40, dimension = 5;
  const Data data = smooth_data(n, dimension, 9);
  Gpr gpr(dimension, test_kernel(dimension)), refit(dimension, test_kernel(dimension));
  gpr.fit(data.features(0, n), data.targets(0, n));
  std::vector<double> targets(n);
  for (std::size_t i = 0; i < n; ++i) targets[i] = std::cos(static_cast<double>(i));
  gpr.set_targets(targets);
  refit.fit(data.features(0, n), targets);
  CHECK(std::equal(gpr.weights().begin(), gpr.weights().end(), refit.weights().begin()));
}

TEST(results_do_not_depend_on_batch_or_threads) {
  const std::size_t n = 301, dimension = 33;
  const Data data = smooth_data(n, dimension, 10), other = smooth_data(13, dimension, 11);
  Gpr gpr(dimension, test_kernel(dimension)), threaded(dimension, test_kernel(dimension));
  gpr.fit(data.features(0, n), data.targets(0, n), 1);
  threaded.fit(data.features(0, n), data.targets(0, n), 2);
  CHECK(std::equal(gpr.weights().begin(), gpr.weights().end(), threaded.weights().begin()));
  const Prediction all = predict(gpr, other.features(0, 13), 2);
  for (const std::size_t count : {1u, 2u, 4u, 5u, 7u, 8u, 9u}) {
    const std::size_t first = 13 - count;
    const Prediction part = predict(gpr, other.features(first, count), 2);
    for (std::size_t c = 0; c < count; ++c) {
      CHECK(part.mean[c] == all.mean[first + c]);
      CHECK(part.sigma[c] == all.sigma[first + c]);
    }
    CHECK(std::equal(part.gradient.begin(), part.gradient.end(),
                     all.gradient.begin() + static_cast<long>(first * dimension)));
    CHECK(std::equal(part.gradient_sigma.begin(), part.gradient_sigma.end(),
                     all.gradient_sigma.begin() + static_cast<long>(first * dimension)));
  }
}

TEST(smooth_and_symmetric_at_near_duplicates_far_from_the_origin) {
  // Features of size 1e3 with distances of 1e-6: |x|^2 + |x'|^2 - 2 x.x' would be noise of 1e-9 against 1e-12.
  const std::size_t n = 30, dimension = 10;
  Data data = smooth_data(n, dimension, 12, 1000.0);
  Gpr gpr(dimension, test_kernel(dimension));
  gpr.fit(data.features(0, n), data.targets(0, n));
  const Prediction at = predict(gpr, data.features(4, 1), 0);
  Eigen::VectorXd direction = Eigen::VectorXd::Zero(dimension);
  direction[2] = 1;
  double slope = 0;
  for (std::size_t d = 0; d < dimension; ++d) slope += at.gradient[d] * direction[static_cast<Eigen::Index>(d)];
  for (const double step : {0x1.0p-20, 0x1.0p-16}) {
    const Eigen::VectorXd up = data.x.row(4).transpose() + step * direction,
                          down = data.x.row(4).transpose() - step * direction;
    const double rise =
        predict(gpr, {up.data(), dimension}, 0).mean[0] - predict(gpr, {down.data(), dimension}, 0).mean[0];
    CLOSE(rise / (2 * step), slope, 1e-13 * 25 / step);  // rounding of the energies themselves, nothing more
  }
  // sigma at a training point: finite derivative; the same for a point and its twin.
  const Prediction train = predict(gpr, data.features(0, n), 1);
  for (const double s : train.sigma) CHECK(s > 0 && s < 2 * std::sqrt(1e-4));
  for (const double g : train.gradient_sigma) CHECK(std::isfinite(g));
  Kernel exact = test_kernel(dimension);
  exact.noise = 1e-12;
  gpr.set_kernel(exact);
  const Prediction noiseless = predict(gpr, data.features(0, n), 1);
  for (const double s : noiseless.sigma) CHECK(s > 0);
  for (const double g : noiseless.gradient) CHECK(std::isfinite(g) && std::abs(g) < 1e6);
}

TEST(duplicates_need_jitter_and_append_copes) {
  const std::size_t n = 20, dimension = 4;
  const Data data = smooth_data(n, dimension, 13);
  Kernel kernel = test_kernel(dimension);
  kernel.noise = 1e-300;
  Gpr gpr(dimension, kernel);
  gpr.fit(data.features(0, n), data.targets(0, n));
  for (int repeat = 0; repeat < 3; ++repeat) gpr.append(data.features(2, 1), data.y[2]);
  CHECK(gpr.size() == n + 3);
  CHECK(gpr.jitter() > 0 && gpr.jitter() <= 1.1e-6 * kernel.amplitude);
  const Prediction p = predict(gpr, data.features(2, 1), 0);
  CLOSE(p.mean[0], data.y[2], 1e-3);
}

TEST(optimise_reaches_a_stationary_point_and_respects_bounds) {
  const std::size_t n = 80, dimension = 4;
  const Data data = smooth_data(n, dimension, 14);
  Kernel kernel = test_kernel(dimension);
  Gpr gpr(dimension, kernel);
  gpr.fit(data.features(0, n), data.targets(0, n));
  KernelBounds bounds;
  bounds.length_long[0] = bounds.length_short[0] = 0.02;
  bounds.length_long[1] = bounds.length_short[1] = 30;
  bounds.optimise_noise = bounds.optimise_weight = true;
  const double before = gpr.log_likelihood();
  Kernel other = kernel;
  other.length_short = other.length_long;
  const double best = gpr.optimise(bounds, std::span<const Kernel>(&other, 1), 100);
  CHECK(best > before + 1);
  CLOSE(gpr.log_likelihood(), best, 1e-7 * std::abs(best));
  const Kernel& found = gpr.kernel();
  CHECK(found.length_short <= found.length_long && found.length_long <= 30 * 1.0001 && found.length_short >= 0.0199);
  CHECK(found.noise >= 0.999e-8 && found.amplitude <= 1.001e6);
  // No random neighbour inside the bounds is better.
  Random random({2, 6}, 0);
  for (int trial = 0; trial < 60; ++trial) {
    Kernel k = found;
    const double size = trial < 30 ? 0.03 : 0.3;
    k.amplitude = std::min(k.amplitude * std::exp(random.uniform(-size, size)), 1e6);
    k.length_long = std::clamp(k.length_long * std::exp(random.uniform(-size, size)), 0.02, 30.0);
    k.length_short = std::clamp(k.length_short * std::exp(random.uniform(-size, size)), 0.02, k.length_long);
    k.noise = std::clamp(k.noise * std::exp(random.uniform(-size, size)), 1e-8, 1.0);
    CHECK(gpr.likelihood(k).value <= best + 1e-2);
  }
  const Kernel first = gpr.kernel();
  Gpr again(dimension, kernel);
  again.fit(data.features(0, n), data.targets(0, n));
  again.optimise(bounds, std::span<const Kernel>(&other, 1), 100);
  CHECK(std::memcmp(&first, &again.kernel(), sizeof(Kernel)) == 0);  // deterministic
}

TEST(optimise_never_collapses) {
  // Targets without any relation to the features: the likelihood favours a kernel that predicts a constant.
  const std::size_t n = 25, dimension = 6;
  Data data = smooth_data(n, dimension, 15);
  Random random({5, 5}, 1);
  for (double& y : data.y) y = random.uniform(-1, 1);
  const Kernel kernel = test_kernel(dimension);
  Gpr gpr(dimension, kernel);
  gpr.fit(data.features(0, n), data.targets(0, n));
  KernelBounds bounds;
  bounds.length_long[0] = bounds.length_short[0] = 0.02;
  bounds.length_long[1] = bounds.length_short[1] = 60;
  gpr.optimise(bounds, {}, 60);
  const Data other = smooth_data(10, dimension, 16);
  const Prediction p = predict(gpr, other.features(0, 10), 0);
  const auto [low, high] = std::minmax_element(p.mean.begin(), p.mean.end());
  CHECK(*high - *low > 1e-3);
  CHECK(gpr.kernel().length_long > 0.5);
}

// ---- slopes ----------------------------------------------------------------------------------------------------
namespace {

// The smooth function above and its slopes along random directions: counts 0, 1, 2, 3, 0, ... at the points.
struct SlopedData : Data {
  std::vector<std::int64_t> counts;
  std::vector<std::size_t> first;  // direction where each point begins
  Matrix directions;
  Eigen::VectorXd values;
  Slopes slopes(std::size_t points) const {
    return {{counts.data(), points},
            {directions.data(), first[points] * static_cast<std::size_t>(x.cols())},
            {values.data(), first[points]}};
  }
};

SlopedData sloped_data(std::size_t n, std::size_t dimension, std::uint64_t seed, std::size_t most = 3) {
  SlopedData data{smooth_data(n, dimension, seed), {}, {0}, {}, {}};
  for (std::size_t i = 0; i < n; ++i) {
    data.counts.push_back(static_cast<std::int64_t>(i % (most + 1)));
    data.first.push_back(data.first.back() + i % (most + 1));
  }
  data.directions.resize(data.first.back(), dimension);
  data.values.resize(data.first.back());
  Random random({seed, 7}, 0);
  for (std::size_t i = 0; i < n; ++i)
    for (std::size_t c = data.first[i]; c < data.first[i + 1]; ++c) {
      for (std::size_t d = 0; d < dimension; ++d) data.directions(c, d) = random.uniform(-2, 2);
      data.values[c] = 10 * std::cos(2 * data.x(i, 0)) * data.directions(c, 0) +
                       2 * data.x(i, 1 % dimension) * data.directions(c, 1 % dimension) + random.uniform(-0.01, 0.01);
    }
  return data;
}

constexpr double kNoiseSlope = 0.03;

// One row of the dense kernel matrix: a value (direction = null) or a slope, at a point.
struct Observation {
  Eigen::VectorXd x, t;  // t empty: a value
};

double observed_covariance(const Kernel& k, const Observation& a, const Observation& b) {
  const Eigen::VectorXd r = a.x - b.x;
  double value = 0, slope = 0, bend = 0;
  for (const auto& [weight, length] :
       {std::pair{k.weight_long, k.length_long}, std::pair{k.weight_short, k.length_short}}) {
    const double e = k.amplitude * weight * std::exp(-r.squaredNorm() / (2 * length * length));
    value += e, slope += e / std::pow(length, 2), bend += e / std::pow(length, 4);
  }
  if (a.t.size() == 0) return b.t.size() == 0 ? value : slope * b.t.dot(r);
  if (b.t.size() == 0) return -slope * a.t.dot(r);
  return slope * a.t.dot(b.t) - bend * a.t.dot(r) * b.t.dot(r);
}

struct Dense {
  std::vector<Observation> rows;
  Eigen::VectorXd targets;
  Matrix k;
  Dense(const SlopedData& data, const Kernel& kernel) {
    std::vector<double> y;
    for (Eigen::Index i = 0; i < data.x.rows(); ++i) {
      const std::size_t at = static_cast<std::size_t>(i);
      rows.push_back({data.x.row(i).transpose(), {}});
      y.push_back(data.y[i] - data.y.mean());
      for (std::size_t c = data.first[at]; c < data.first[at + 1]; ++c) {
        rows.push_back({data.x.row(i).transpose(), data.directions.row(static_cast<Eigen::Index>(c)).transpose()});
        y.push_back(data.values[static_cast<Eigen::Index>(c)]);
      }
    }
    const Eigen::Index size = static_cast<Eigen::Index>(rows.size());
    targets = Eigen::Map<Eigen::VectorXd>(y.data(), size);
    k.resize(size, size);
    for (Eigen::Index i = 0; i < size; ++i)
      for (Eigen::Index j = 0; j < size; ++j)
        k(i, j) = observed_covariance(kernel, rows[static_cast<std::size_t>(i)], rows[static_cast<std::size_t>(j)]) +
                  (i != j                                       ? 0
                   : rows[static_cast<std::size_t>(i)].t.size() ? kNoiseSlope * kNoiseSlope
                                                                : kernel.noise);
  }
};

Gpr fitted(const SlopedData& data, const Kernel& kernel, std::size_t points, int threads = 1) {
  Gpr gpr(static_cast<std::size_t>(data.x.cols()), kernel, kNoiseSlope);
  gpr.fit(data.features(0, points), data.targets(0, points), data.slopes(points), threads);
  return gpr;
}

}  // namespace

TEST(slopes_match_dense_formulas) {
  const std::size_t n = 31, dimension = 7;
  const SlopedData data = sloped_data(n, dimension, 21, 10);
  const Data other = smooth_data(5, dimension, 22);
  const Kernel kernel = test_kernel(dimension);
  const Gpr gpr = fitted(data, kernel, n);
  const Dense dense(data, kernel);
  CHECK(gpr.size() == n && gpr.rows() == dense.rows.size() && gpr.jitter() == 0);
  const Eigen::LLT<Matrix> factor(dense.k);
  const Eigen::VectorXd alpha = factor.solve(dense.targets);
  const Prediction p = predict(gpr, other.features(0, 5), 0);
  std::vector<double> whitened(5 * gpr.rows());
  gpr.whitened(5, other.x.data(), whitened.data());
  for (Eigen::Index c = 0; c < 5; ++c) {
    const Observation here{other.x.row(c).transpose(), {}};
    Eigen::VectorXd row(alpha.size());
    for (Eigen::Index i = 0; i < row.size(); ++i)
      row[i] = observed_covariance(kernel, here, dense.rows[static_cast<std::size_t>(i)]);
    const std::size_t at = static_cast<std::size_t>(c);
    CLOSE(p.mean[at], data.y.mean() + row.dot(alpha), 1e-9);
    const Eigen::VectorXd solved = factor.matrixL().solve(row);
    CLOSE(p.sigma[at], std::sqrt(kernel.amplitude - solved.squaredNorm()), 1e-8);
    for (std::size_t i = 0; i < gpr.rows(); ++i)
      CLOSE(whitened[at * gpr.rows() + i], solved[static_cast<Eigen::Index>(i)], 1e-9);
  }
  const double likelihood = -0.5 * dense.targets.dot(alpha) -
                            0.5 * static_cast<double>(alpha.size()) * std::log(2 * M_PI) -
                            factor.matrixLLT().diagonal().array().log().sum();
  CLOSE(gpr.likelihood(kernel).value, likelihood, 1e-9 * std::abs(likelihood));
  CLOSE(gpr.log_likelihood(), likelihood, 1e-9 * std::abs(likelihood));
}

TEST(gradients_with_slopes_are_the_derivatives) {
  const std::size_t n = 40, dimension = 6;
  const SlopedData data = sloped_data(n, dimension, 23);
  const Data other = smooth_data(5, dimension, 24);
  Kernel kernel = test_kernel(dimension);
  kernel.noise = 1e-2;
  const Gpr gpr = fitted(data, kernel, n);
  const double h = 1e-3, kappa = 1.7;
  const Prediction here = predict(gpr, other.features(0, 5), kappa);
  double largest = 0;
  for (const double g : here.gradient) largest = std::max(largest, std::abs(g));
  for (std::size_t c = 0; c < 5; ++c)
    for (std::size_t d = 0; d < dimension; ++d) {
      const auto at = [&](double step) {
        Eigen::VectorXd point = other.x.row(static_cast<Eigen::Index>(c)).transpose();
        point[static_cast<Eigen::Index>(d)] += step;
        return predict(gpr, {point.data(), dimension}, kappa);
      };
      const Prediction p1 = at(h), m1 = at(-h), p2 = at(2 * h), m2 = at(-2 * h);
      const auto central = [&](auto value) {
        return (8 * (value(p1) - value(m1)) - (value(p2) - value(m2))) / (12 * h);
      };
      CLOSE(here.gradient[c * dimension + d],
            central([&](const Prediction& p) { return p.mean[0] - kappa * p.sigma[0]; }), 1e-8 * largest);
      CLOSE(here.gradient_sigma[c * dimension + d], central([&](const Prediction& p) { return p.sigma[0]; }),
            1e-8 * largest);
    }
  // The model meets the slopes that it was taught.
  const Prediction at_data = predict(gpr, data.features(0, n), 0);
  for (std::size_t i = 0; i < n; ++i)
    for (std::size_t s = data.first[i]; s < data.first[i + 1]; ++s) {
      double slope = 0;
      for (std::size_t d = 0; d < dimension; ++d)
        slope += at_data.gradient[i * dimension + d] *
                 data.directions(static_cast<Eigen::Index>(s), static_cast<Eigen::Index>(d));
      CLOSE(slope, data.values[static_cast<Eigen::Index>(s)], 5 * kNoiseSlope);
    }

  const Likelihood l = gpr.likelihood(kernel);
  const auto central = [&](auto change) {
    const auto at = [&](double step) {
      Kernel k = kernel;
      change(k, step);
      return gpr.likelihood(k).value;
    };
    return (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h);
  };
  const double expected[5] = {
      central([](Kernel& k, double t) { k.amplitude *= std::exp(t); }),
      central([](Kernel& k, double t) { k.length_long *= std::exp(t); }),
      central([](Kernel& k, double t) { k.length_short *= std::exp(t); }),
      central([](Kernel& k, double t) { k.noise *= std::exp(t); }), central([](Kernel& k, double t) {
        const double sum = k.weight_long + k.weight_short, ratio = k.weight_short / k.weight_long * std::exp(t);
        k.weight_short = sum * ratio / (1 + ratio), k.weight_long = sum - k.weight_short;
      })};
  const double came[5] = {l.d_amplitude, l.d_length_long, l.d_length_short, l.d_noise, l.d_weight};
  double most = 0;
  for (const double e : expected) most = std::max(most, std::abs(e));
  for (int k = 0; k < 5; ++k) CLOSE(came[k], expected[k], 1e-7 * most);
}

TEST(slopes_appended_and_removed_equal_a_refit) {
  const std::size_t n = 37, dimension = 9;
  const SlopedData data = sloped_data(n, dimension, 25, 12);
  const Data other = smooth_data(5, dimension, 26);
  const Kernel kernel = test_kernel(dimension);
  const Gpr refit = fitted(data, kernel, n);
  const auto grow = [&](Gpr& gpr, std::size_t from) {
    for (std::size_t i = from; i < n; ++i) {
      const std::size_t begin = data.first[i], count = data.first[i + 1] - begin;
      gpr.append(data.features(i, 1), data.y[static_cast<Eigen::Index>(i)],
                 {data.directions.data() + begin * dimension, count * dimension}, {data.values.data() + begin, count});
    }
  };
  Gpr grown(dimension, kernel, kNoiseSlope);
  grow(grown, 0);  // the first point has no slope, the second is the first that has
  CHECK(grown.rows() == refit.rows());
  CLOSE(relative(grown.weights(), refit.weights()), 0, 1e-9);
  const Prediction a = predict(grown, other.features(0, 5), 1), b = predict(refit, other.features(0, 5), 1);
  CLOSE(relative(a.mean, b.mean), 0, 1e-10);
  CLOSE(relative(a.sigma, b.sigma), 0, 1e-9);
  CLOSE(relative(a.gradient, b.gradient), 0, 1e-9);
  CLOSE(grown.log_likelihood(), refit.log_likelihood(), 1e-9 * std::abs(refit.log_likelihood()));
  grown.set_kernel(kernel);  // from the cached geometry: the same bits as that of the refit
  CHECK(std::equal(grown.weights().begin(), grown.weights().end(), refit.weights().begin()));

  // Without point 5, which has slopes, and back again at the end.
  Gpr shorter = refit;
  shorter.remove(5);
  CHECK(shorter.size() == n - 1 && shorter.rows() == refit.rows() - 6);
  shorter.append(data.features(5, 1), data.y[5], {data.directions.data() + data.first[5] * dimension, 5 * dimension},
                 {data.values.data() + data.first[5], 5});
  const Prediction c = predict(shorter, other.features(0, 5), 1);
  CLOSE(relative(c.mean, b.mean), 0, 1e-10);
  CLOSE(relative(c.sigma, b.sigma), 0, 1e-9);
}

TEST(results_with_slopes_do_not_depend_on_batch_or_threads) {
  const std::size_t n = 60, dimension = 33;
  const SlopedData data = sloped_data(n, dimension, 27, 19);
  const Data other = smooth_data(13, dimension, 28);
  const Gpr gpr = fitted(data, test_kernel(dimension), n, 1), threaded = fitted(data, test_kernel(dimension), n, 3);
  CHECK(std::equal(gpr.weights().begin(), gpr.weights().end(), threaded.weights().begin()));
  const Prediction all = predict(gpr, other.features(0, 13), 2);
  for (const std::size_t count : {1u, 2u, 5u, 8u, 9u}) {
    const std::size_t first = 13 - count;
    const Prediction part = predict(gpr, other.features(first, count), 2);
    for (std::size_t c = 0; c < count; ++c)
      CHECK(part.mean[c] == all.mean[first + c] && part.sigma[c] == all.sigma[first + c]);
    CHECK(std::equal(part.gradient.begin(), part.gradient.end(),
                     all.gradient.begin() + static_cast<long>(first * dimension)));
    CHECK(std::equal(part.gradient_sigma.begin(), part.gradient_sigma.end(),
                     all.gradient_sigma.begin() + static_cast<long>(first * dimension)));
  }
}

TEST(optimise_with_slopes_is_never_worse_than_before) {
  const std::size_t n = 30, dimension = 5;
  const SlopedData data = sloped_data(n, dimension, 29);
  Gpr gpr = fitted(data, test_kernel(dimension), n);
  const double before = gpr.log_likelihood();
  const double best = gpr.optimise({}, {}, 60);
  CHECK(best > before + 1);
  CLOSE(gpr.log_likelihood(), best, 1e-7 * std::abs(best));
  // Bounds that exclude what is better: all stays as it is.
  const Kernel found = gpr.kernel();
  KernelBounds narrow;
  narrow.length_long[0] = narrow.length_short[0] = 50 * found.length_long;
  narrow.length_long[1] = narrow.length_short[1] = 60 * found.length_long;
  gpr.optimise(narrow, {}, 20);
  CHECK(std::memcmp(&found, &gpr.kernel(), sizeof(Kernel)) == 0);
}

TEST(errors_say_what_to_do) {
  Kernel kernel;
  kernel.length_short = 20;
  THROWS(Gpr(3, kernel), "length_short must not exceed length_long");
  THROWS(Gpr(0, Kernel{}), "at least one feature");
  Gpr gpr(3, Kernel{});
  const double x[6] = {1, 2, 3, 4, 5, 6}, y[2] = {1, NAN};
  double mean = 0;
  THROWS(gpr.predict(1, x, 0, &mean, nullptr, nullptr, nullptr), "call fit first");
  THROWS(gpr.fit(x, y), "targets must be finite");
  THROWS(gpr.fit(x, std::span<const double>(y, 1)), "1 x 3 values");
  gpr.append(std::span<const double>(x, 3), 1.0);
  THROWS(gpr.remove(1), "below the number of points 1");
  THROWS(gpr.remove(0), "last point");
  THROWS(gpr.append(std::span<const double>(x, 2), 1.0), "3 values");
  const std::int64_t counts[1] = {2};
  THROWS(gpr.fit(std::span(x, 3), std::span(x, 1), Slopes{counts, x, std::span(x, 1)}), "1 x 3 values");
  THROWS(gpr.fit(std::span(x, 3), std::span(x, 1), Slopes{counts, std::span(x, 3), std::span(x, 1)}), "add up to 2");
  THROWS(gpr.fit(std::span(x, 3), std::span(x, 1), Slopes{{}, std::span(x, 3), std::span(x, 1)}), "counts must say");
  THROWS(Gpr(3, Kernel{}, 0.0), "noise_slope must be positive");
}

// Speed, for the report: test_gpr bench.
int main(int argc, char** argv) {
  if (argc < 2 || std::strcmp(argv[1], "bench") != 0) return minitest::run();
  const auto best = [](int repeats, auto body) {
    double least = 1e30;
    for (int k = 0; k < repeats; ++k) {
      const double start = cpu_seconds();
      body();
      least = std::min(least, 1e3 * (cpu_seconds() - start));
    }
    return least;
  };
  const std::size_t dimension = 270;
  for (const std::size_t n : {40u, 100u, 500u, 1000u, 2000u}) {
    const Data data = smooth_data(n + 12, dimension, 1), other = smooth_data(16, dimension, 2);
    const Kernel kernel = test_kernel(dimension);
    Gpr gpr(dimension, kernel);
    const int few = n > 1000 ? 5 : 20;
    const double t_fit = best(few, [&] { gpr.fit(data.features(0, n), data.targets(0, n)); });
    const double t_refit = best(few, [&] { gpr.set_kernel(kernel); });
    const double t_likelihood = best(few, [&] { (void)gpr.likelihood(kernel); });
    std::size_t next = n;
    const double t_append = best(12, [&] {
      gpr.append(data.features(next, 1), data.y[static_cast<Eigen::Index>(next)]);
      ++next;
    });
    const double t_remove = best(12, [&] { gpr.remove(n / 3); });
    Prediction p = predict(gpr, other.features(0, 16), 1);
    if (n <= 100) {  // 24 slopes each, as of eight free atoms
      SlopedData sloped = sloped_data(n, dimension, 1, 24);
      Gpr with_slopes = fitted(sloped, kernel, n);
      std::printf(
          "n=%zu with %zu slopes: fit %.1f ms, likelihood + gradient %.1f ms; LCB of 8 %.1f us each, mean %.1f\n", n,
          with_slopes.rows() - n, best(3, [&] { with_slopes = fitted(sloped, kernel, n); }),
          best(3, [&] { (void)with_slopes.likelihood(kernel); }),
          125 * best(5, [&] { predict(with_slopes, other.features(0, 8), 2); }),
          125 * best(5, [&] {
            with_slopes.predict(8, other.x.data(), 0, p.mean.data(), nullptr, p.gradient.data(), nullptr);
          }));
    }
    const auto time_predict = [&](std::size_t count, double kappa, bool sigma) {
      return 1e3 *
             best(20,
                  [&] {
                    gpr.predict(count, other.x.data(), kappa, p.mean.data(), sigma ? p.sigma.data() : nullptr,
                                p.gradient.data(), nullptr);
                  }) /
             static_cast<double>(count);
    };
    std::printf(
        "n=%zu D=270 %s: fit %.2f ms, refit %.2f, likelihood + gradient %.2f, append %.3f, remove "
        "%.3f ms; predict per candidate: LCB of 16 %.1f us, of 4 %.1f, of 1 %.1f; mean of 16 %.1f us\n",
        n, active_isa(), t_fit, t_refit, t_likelihood, t_append, t_remove, time_predict(16, 2, true),
        time_predict(4, 2, true), time_predict(1, 2, true), time_predict(16, 0, false));
  }
  return 0;
}
