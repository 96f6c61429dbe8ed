// Dense algebra against Eigen, and the law that a lane's bits do not depend on the width of its tile.
#include <Eigen/Dense>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <memory>

#include "../src/linalg.hpp"
#include "minitest.hpp"
#include "thalweg/core.hpp"
#include "thalweg/random.hpp"

using namespace thalweg;
using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

namespace {

constexpr const char* kLevels[] = {"x86-64-v2", "x86-64-v3", "x86-64-v4", "portable"};

// Runs the body at every instruction set that this machine has.
template <class Body>
void at_every_level(Body body) {
  const std::string before = active_isa();
  for (const char* level : kLevels)
    if (force_isa(level)) body();
  force_isa(before.c_str());
}

Matrix random_matrix(std::size_t rows, std::size_t columns, std::uint64_t seed) {
  Matrix m(rows, columns);
  Random random({seed, 7}, 0);
  for (Eigen::Index k = 0; k < m.size(); ++k) m.data()[k] = random.uniform(-1, 1);
  return m;
}

Matrix positive_definite(std::size_t n, std::uint64_t seed) {
  const Matrix x = random_matrix(n, n + 20, seed);
  return x * x.transpose() / static_cast<double>(n) + 0.1 * Matrix::Identity(n, n);
}

double largest(const Matrix& m) { return m.cwiseAbs().maxCoeff(); }

std::size_t row_of(const Matrix& m) { return static_cast<std::size_t>(m.cols()); }

// Of this thread: the machine may be busy.
double cpu_seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

}  // namespace

TEST(product_of_every_shape) {
  at_every_level([] {
    for (const std::size_t m : {1u, 5u, 37u, 130u, 300u})
      for (const int shape : {0, 1, 2, 3, 4}) {
        const bool square = shape != 0;
        const std::size_t n = square ? m : m + 3, k = square ? m : 2 * m + 1;
        Matrix a = random_matrix(m, k, m), b = random_matrix(k, n, m + 1), c = random_matrix(m, n, m + 2);
        Matrix expected = c;
        Product p;
        p.m = m, p.n = n, p.k = k, p.scale = -0.5;
        p.a = a.data(), p.a_row = static_cast<std::ptrdiff_t>(k);
        p.b = b.data(), p.b_row = static_cast<std::ptrdiff_t>(n);
        p.c = c.data(), p.c_row = n;
        Matrix left = a, right = b;
        if (shape == 1) p.a_shape = Product::lower, left = a.triangularView<Eigen::Lower>();
        if (shape == 2) p.a_shape = Product::upper, left = a.triangularView<Eigen::Upper>();
        if (shape == 3) p.b_shape = Product::lower, right = b.triangularView<Eigen::Lower>();
        if (shape == 4) p.b_shape = Product::upper, right = b.triangularView<Eigen::Upper>();
        expected += -0.5 * left * right;
        const Matrix before = c;
        linalg::multiply(p);
        CLOSE(largest(c - expected), 0.0, 1e-13 * static_cast<double>(k + 10));
        if (square) {  // only the lower triangle may change
          c = before;
          p.lower_result = true;
          linalg::multiply(p);
          for (std::size_t i = 0; i < m; ++i)
            for (std::size_t j = 0; j < n; ++j)
              CHECK(j > i ? c(i, j) == before(i, j) : std::abs(c(i, j) - expected(i, j)) < 1e-13 * double(k + 10));
        }
      }
  });
}

TEST(cholesky_and_inverse_match_eigen) {
  at_every_level([] {
    for (const std::size_t n : {1u, 2u, 31u, 64u, 65u, 97u, 200u, 333u}) {
      const Matrix a = positive_definite(n, n);
      Matrix factor = a, threaded = a;
      CHECK(linalg::cholesky(n, factor.data(), row_of(factor), 0.0));
      CHECK(linalg::cholesky(n, threaded.data(), row_of(threaded), 0.0, 2));
      const Matrix expected = a.llt().matrixL();
      Matrix lower = factor.triangularView<Eigen::Lower>();
      CLOSE(largest(lower - expected), 0.0, 1e-12);
      const Matrix lower_threaded = threaded.triangularView<Eigen::Lower>();
      CHECK(lower == lower_threaded);  // bit for bit
      std::vector<double> scratch(n * n / 4 + n + 4096);
      Matrix inverse = Matrix::Zero(n, n);
      linalg::inverse_from_factor(n, factor.data(), n, inverse.data(), n, scratch.data());
      lower = inverse.triangularView<Eigen::Lower>();
      const Matrix whole = a.llt().solve(Matrix::Identity(a.rows(), a.rows()));
      const Matrix expected_inverse = whole.triangularView<Eigen::Lower>();
      CLOSE(largest(lower - expected_inverse), 0.0, 1e-11);
    }
  });
}

TEST(cholesky_refuses_what_is_not_positive_definite) {
  for (const std::size_t n : {3u, 150u}) {
    Matrix a = positive_definite(n, 3);
    a(n - 1, n - 1) = -1;
    CHECK(!linalg::cholesky(n, a.data(), n, 0.0));
  }
}

TEST(exponential_is_within_one_and_a_half_units) {
  at_every_level([] {
    Random random({3, 4}, 0);
    std::vector<double> x(4001), y(4001);
    for (double& v : x) v = random.uniform(-700, 1);
    for (std::size_t k = 0; k < 1000; ++k) x[k] = random.uniform(-1, 0.01);
    x[0] = 0, x[1] = -1e-300, x[2] = -709, x[3] = -1e6, x[4] = -1e308, x[5] = -707.9;
    linalg_kernels().exponential(x.size(), x.data(), y.data());
    double worst = 0;
    for (std::size_t k = 0; k < x.size(); ++k) {
      if (x[k] < -708) {
        CHECK(y[k] == 0);
        continue;
      }
      const long double exact = std::exp(static_cast<long double>(x[k]));
      const double unit = std::nextafter(y[k], 1e300) - y[k];
      worst = std::max(worst, static_cast<double>(std::abs(static_cast<long double>(y[k]) - exact)) / unit);
    }
    CHECK(y[0] == 1);
    CLOSE(worst, 0.0, 1.5);
  });
}

TEST(tiles_match_formulas_and_do_not_depend_on_their_width) {
  at_every_level([] {
    const LinalgKernels& kernels = linalg_kernels();
    for (const std::size_t n : {1u, 3u, 13u, 66u, 83u}) {
      const std::size_t dimension = 29;
      const Matrix x = random_matrix(n, dimension, 5), points = random_matrix(8, dimension, 6);
      const Matrix factor = positive_definite(n, 8).llt().matrixL();
      const Matrix weights = random_matrix(1, n, 9);
      const KernelTerms terms{3.0, 0.2, -0.5 / 9.0, -0.5 / 0.64};
      const double coefficient[8] = {1, 2, 0.5, -1, 3, 0.1, 0.2, 0.3};
      struct Result {
        std::vector<double> mean, norm, gradient, products;
      };
      const auto run = [&](const TileKernels& tile, std::size_t lanes, std::size_t first) {
        std::vector<double> f(dimension * lanes), k(n * lanes), slope(n * lanes), g(n * lanes);
        Result out{std::vector<double>(lanes), std::vector<double>(lanes), std::vector<double>(dimension * lanes),
                   std::vector<double>(n * lanes)};
        for (std::size_t d = 0; d < dimension; ++d)
          for (std::size_t lane = 0; lane < lanes; ++lane) f[d * lanes + lane] = points(first + lane, d);
        tile.products(n, dimension, x.data(), f.data(), out.products.data());
        tile.squared_distances(n, dimension, x.data(), f.data(), k.data());
        // mean and gradient add up: in two parts as at once
        const std::size_t half = n / 2, rest = n - half, at = half * lanes;
        tile.evaluate(half, terms, weights.data(), k.data(), slope.data(), out.mean.data());
        tile.evaluate(rest, terms, weights.data() + half, k.data() + at, slope.data() + at, out.mean.data());
        tile.forward(n, factor.data(), n, k.data(), out.norm.data());
        tile.backward(n, factor.data(), n, k.data());
        tile.combine(n, weights.data(), coefficient + first, k.data(), slope.data(), g.data());
        tile.gradient(half, dimension, x.data(), f.data(), g.data(), out.gradient.data());
        tile.gradient(rest, dimension, x.data() + half * dimension, f.data(), g.data() + at, out.gradient.data());
        return out;
      };
      const Result wide = run(kernels.tile8, 8, 0);
      for (std::size_t lane = 0; lane < 8; ++lane)
        for (const std::size_t lanes : {4u, 1u}) {
          const std::size_t first = lane / lanes * lanes, at = lane - first;
          const Result narrow = run(lanes == 4 ? kernels.tile4 : kernels.tile1, lanes, first);
          CHECK(wide.mean[lane] == narrow.mean[at]);
          CHECK(wide.norm[lane] == narrow.norm[at]);
          for (std::size_t d = 0; d < dimension; ++d)
            CHECK(wide.gradient[d * 8 + lane] == narrow.gradient[d * lanes + at]);
          for (std::size_t i = 0; i < n; ++i) CHECK(wide.products[i * 8 + lane] == narrow.products[i * lanes + at]);
        }
      for (std::size_t lane = 0; lane < 8; ++lane) {
        Eigen::VectorXd k(n), slope(n);
        for (std::size_t i = 0; i < n; ++i) {
          CLOSE(wide.products[i * 8 + lane], x.row(i).dot(points.row(lane)), 1e-13);
          const double d2 = (x.row(i) - points.row(lane)).squaredNorm();
          k[i] = 3.0 * (0.8 * std::exp(-d2 / 18) + 0.2 * std::exp(-d2 / 1.28));
          slope[i] = 3.0 * (0.8 * std::exp(-d2 / 18) / 9 + 0.2 * std::exp(-d2 / 1.28) / 0.64);
        }
        CLOSE(wide.mean[lane], (weights * k)(0), 1e-13);
        const Eigen::VectorXd v = factor.triangularView<Eigen::Lower>().solve(k);
        CLOSE(wide.norm[lane], v.squaredNorm(), 1e-11 * v.squaredNorm());
        const Eigen::VectorXd u = factor.transpose().triangularView<Eigen::Upper>().solve(v);
        Eigen::VectorXd expected = Eigen::VectorXd::Zero(dimension);
        for (std::size_t i = 0; i < n; ++i)
          expected += slope[i] * (weights(0, i) + coefficient[lane] * u[i]) * (x.row(i) - points.row(lane)).transpose();
        for (std::size_t d = 0; d < dimension; ++d) CLOSE(wide.gradient[d * 8 + lane], expected[d], 1e-11);
      }
    }
  });
}

TEST(kernel_derivatives_match_formulas_wherever_they_stand) {
  at_every_level([] {
    const KernelTerms terms{3.0, 0.2, -0.5 / 9.0, -0.5 / 0.64};
    const std::size_t n = 13;
    double d2[n], k[n], slope[n], bend[n];
    for (std::size_t i = 0; i < n; ++i) d2[i] = 0.37 * static_cast<double>(i * i);
    linalg_kernels().kernel_derivatives(n, terms, d2, k, slope, bend);
    for (std::size_t i = 0; i < n; ++i) {
      const double e_long = 2.4 * std::exp(-d2[i] / 18), e_short = 0.6 * std::exp(-d2[i] / 1.28);
      CLOSE(k[i], e_long + e_short, 1e-14);
      CLOSE(slope[i], e_long / 9 + e_short / 0.64, 1e-14);
      CLOSE(bend[i], e_long / 81 + e_short / (0.64 * 0.64), 1e-14);
      double one[3];
      linalg_kernels().kernel_derivatives(1, terms, d2 + i, one, one + 1, one + 2);
      CHECK(one[0] == k[i] && one[1] == slope[i] && one[2] == bend[i]);
    }
  });
}

TEST(single_right_hand_sides_match_eigen) {
  at_every_level([] {
    for (const std::size_t n : {1u, 4u, 7u, 63u, 130u}) {
      const Matrix factor = positive_definite(n, 11).llt().matrixL();
      const Eigen::VectorXd b = random_matrix(n, 1, 12).col(0);
      Eigen::VectorXd v = b;
      linalg_kernels().forward_one(n, 0, factor.data(), n, v.data());
      CLOSE((v - factor.triangularView<Eigen::Lower>().solve(b)).norm(), 0.0, 1e-12 * b.norm());
      v = b;
      linalg_kernels().backward_one(n, factor.data(), n, v.data());
      CLOSE((v - factor.transpose().triangularView<Eigen::Upper>().solve(b)).norm(), 0.0, 1e-12 * b.norm());
    }
  });
}

TEST(removed_row_equals_factor_of_the_smaller_matrix) {
  at_every_level([] {
    for (const std::size_t n : {2u, 9u, 41u, 90u})
      for (const std::size_t row : {std::size_t{0}, n / 3, n - 1}) {
        const Matrix a = positive_definite(n, 21), right = random_matrix(2, n, 22);
        Matrix factor = a.llt().matrixL(), solved(2, n);
        for (int e = 0; e < 2; ++e)
          solved.row(e) = factor.triangularView<Eigen::Lower>().solve(right.row(e).transpose()).transpose();
        double* const extra[2] = {solved.data(), solved.data() + n};
        std::vector<double> workspace(2 * n);
        linalg_kernels().remove_row(n, row, factor.data(), n, extra, workspace.data());
        Matrix smaller(n - 1, n - 1), smaller_right(2, n - 1);
        const auto old = [row](std::size_t i) { return i + (i >= row); };
        for (std::size_t i = 0; i + 1 < n; ++i) {
          for (std::size_t j = 0; j + 1 < n; ++j) smaller(i, j) = a(old(i), old(j));
          for (int e = 0; e < 2; ++e) smaller_right(e, i) = right(e, old(i));
        }
        const Matrix expected = smaller.llt().matrixL();
        for (std::size_t i = 0; i + 1 < n; ++i)
          for (std::size_t j = 0; j <= i; ++j) CLOSE(factor(i, j), expected(i, j), 1e-12);
        for (int e = 0; e < 2; ++e) {
          const Eigen::VectorXd z = expected.triangularView<Eigen::Lower>().solve(smaller_right.row(e).transpose());
          for (std::size_t i = 0; i + 1 < n; ++i) CLOSE(solved(e, i), z[i], 1e-11);
        }
      }
  });
}

TEST(pair_distances_are_exact_for_near_duplicates) {
  const std::size_t n = 21, dimension = 40;
  Matrix x = random_matrix(n, dimension, 31).array() + 1000.0;
  x.row(7) = x.row(2);
  x.row(9) = x.row(2);
  x(9, 3) += 0x1.0p-30;
  std::vector<double> packed(n * (n + 1) / 2), threaded(packed.size());
  linalg::pair_distances(n, dimension, x.data(), packed.data());
  linalg::pair_distances(n, dimension, x.data(), threaded.data(), 2);
  CHECK(packed == threaded);
  CHECK(packed[7 * 8 / 2 + 2] == 0);
  CHECK(packed[9 * 10 / 2 + 2] == 0x1.0p-60);
  CLOSE(packed[20 * 21 / 2 + 4], (x.row(20) - x.row(4)).squaredNorm(), 1e-12);
}

// Speed, for the report: test_linalg bench.
int main(int argc, char** argv) {
  if (argc < 2 || std::strcmp(argv[1], "bench") != 0) return minitest::run();
  const auto best = [](auto body) {
    double least = 1e30;
    for (int k = 0; k < 12; ++k) {
      const double start = cpu_seconds();
      body();
      least = std::min(least, cpu_seconds() - start);
    }
    return least;
  };
  for (const std::size_t n : {500u, 1000u, 2000u}) {
    const Matrix x = random_matrix(n, 270, 5);
    const std::size_t ld = linalg::leading_dimension(n);
    std::vector<double> packed(n * (n + 1) / 2), a(n * ld), gram(n * ld), inverse(n * ld), scratch(n * n / 4 + 4096);
    const double t_distance = best([&] { linalg::pair_distances(n, 270, x.data(), packed.data()); });
    const KernelTerms terms{100, 0.01, -0.5 / 400, -0.5 / 25};
    const double t_gram = best([&] { linalg::gram(n, terms, 1e-2, packed.data(), gram.data(), ld); });
    const double t_copy = best([&] { a = gram; });
    const double t_cholesky = best([&] { a = gram, linalg::cholesky(n, a.data(), ld, 0.0); }) - t_copy;
    std::vector<double> factor = a;
    const double t_inverse =
        best([&] { a = factor, linalg::inverse_from_factor(n, a.data(), ld, inverse.data(), ld, scratch.data()); }) -
        t_copy;
    std::vector<double> square(n * ld);
    Product p;
    p.m = p.n = n, p.k = 270, p.a = x.data(), p.a_row = 270, p.b = x.data(), p.b_row = 1, p.b_column = 270;
    p.c = square.data(), p.c_row = ld;
    const double t_product = best([&] { linalg::multiply(p); });
    p.lower_result = true;
    const double t_rank = best([&] { linalg::multiply(p); });
    const auto aligned = [](std::size_t size) {
      return std::unique_ptr<double[], void (*)(void*)>(
          static_cast<double*>(std::aligned_alloc(64, (size * 8 + 63) / 64 * 64)), std::free);
    };
    auto v = aligned(8 * n), norm = aligned(8), f = aligned(8 * 270), out = aligned(8 * n), w = aligned(8 * 270),
         slope = aligned(8 * n);
    std::fill_n(v.get(), 8 * n, 1.0);
    std::fill_n(f.get(), 8 * 270, 0.1);
    std::fill_n(out.get(), 8 * n, 0.5);
    std::fill_n(norm.get(), 8, 0.0);
    std::fill_n(w.get(), 8 * 270, 0.0);
    const auto& tile = linalg_kernels().tile8;
    const double t_forward = best([&] { tile.forward(n, factor.data(), ld, v.get(), norm.get()); });
    const double t_backward = best([&] { tile.backward(n, factor.data(), ld, v.get()); });
    const double t_d2 = best([&] { tile.squared_distances(n, 270, x.data(), f.get(), out.get()); });
    const double t_eval = best([&] { tile.evaluate(n, terms, v.get(), out.get(), slope.get(), norm.get()); });
    const double t_gradient = best([&] { tile.gradient(n, 270, x.data(), f.get(), out.get(), w.get()); });
    const double nn = static_cast<double>(n), cube = nn * nn * nn;
    std::printf(
        "n=%zu %s: distances %.2f ms, gram %.2f, cholesky %.2f (%.1f GFLOP/s), inverse %.2f (%.1f), X X^T full %.2f "
        "(%.1f) lower %.2f (%.1f)\n   tile of 8: forward %.1f us (%.1f), backward %.1f (%.1f), distances %.1f, kernel "
        "%.1f, gradient %.1f us\n",
        n, active_isa(), 1e3 * t_distance, 1e3 * t_gram, 1e3 * t_cholesky, cube / 3e9 / t_cholesky, 1e3 * t_inverse,
        cube * 2 / 3e9 / t_inverse, 1e3 * t_product, 2 * 270 * nn * nn / 1e9 / t_product, 1e3 * t_rank,
        270 * nn * nn / 1e9 / t_rank, 1e6 * t_forward, 8 * nn * nn / 1e9 / t_forward, 1e6 * t_backward,
        8 * nn * nn / 1e9 / t_backward, 1e6 * t_d2, 1e6 * t_eval, 1e6 * t_gradient);
  }
  return 0;
}
