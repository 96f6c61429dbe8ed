#include "thalweg/build.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <exception>
#include <limits>
#include <mutex>
#include <numeric>
#include <string>

#include "build_plan.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace thalweg {
namespace {

constexpr double kPi = 3.14159265358979323846;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

using Vec = std::array<double, 3>;

double dot3(const double* a, const double* b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; }
double norm3(const double* a) { return std::sqrt(dot3(a, a)); }
void cross3(const double* a, const double* b, double* c) {
  c[0] = a[1] * b[2] - a[2] * b[1];
  c[1] = a[2] * b[0] - a[0] * b[2];
  c[2] = a[0] * b[1] - a[1] * b[0];
}

std::string number_text(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.3f", value);
  return text;
}

// Rows 0 .. n - 1 in blocks, each thread with a worker of its own. The first exception is passed on.
template <class MakeWorker>
void for_rows(std::size_t n, int threads, MakeWorker make_worker) {
  constexpr std::size_t block = 16;
  if (threads <= 0) threads = default_threads();
  threads = static_cast<int>(std::min<std::size_t>(static_cast<std::size_t>(threads), (n + block - 1) / block));
  std::atomic<std::size_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  const auto work = [&] {
    try {
      auto worker = make_worker();
      for (std::size_t first; (first = next.fetch_add(block)) < n;)
        for (std::size_t row = first; row < std::min(first + block, n); ++row) worker(row);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
      next = n;
    }
  };
  if (threads <= 1) {
    work();
  } else {
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
#endif
    work();
  }
  if (error) std::rethrow_exception(error);
}

// The translations of a structure in a basis that is as little skewed as pairwise reduction makes it; directions that
// are not periodic are filled up with unit vectors perpendicular to the others.
struct Lattice {
  int periodic = 0;             // basis vectors 0 .. periodic - 1 are translations
  double basis[9] = {};         // rows
  double inverse[9] = {};       // rows: fractional coordinate k of x is inverse[k] . x
  double height[3] = {};        // distance between the planes of whole fractional coordinates k
  double shortest = kInfinity;  // length of the shortest translation
  std::vector<Vec> shifts;      // translations that can bring a vector of rounded coordinates closer to zero

  Lattice(const double* cell, const std::uint8_t* pbc) {
    for (int k = 0; k < 3; ++k)
      if (pbc[k]) std::copy(cell + 3 * k, cell + 3 * k + 3, basis + 3 * periodic++);
    reduce();
    complete();
    for (int k = 0; k < 3; ++k) {
      double* row = inverse + 3 * k;
      cross3(basis + 3 * ((k + 1) % 3), basis + 3 * ((k + 2) % 3), row);
      const double volume = dot3(row, basis + 3 * k);
      for (int c = 0; c < 3; ++c) row[c] /= volume;
      height[k] = 1.0 / norm3(row);
    }
    find_shifts();
  }

  double fraction(int k, const double* x) const { return dot3(inverse + 3 * k, x); }

  // Squared length of the shortest image of d.
  double squared(const double* d_in) const {
    double d[3] = {d_in[0], d_in[1], d_in[2]};
    for (int k = 0; k < periodic; ++k) {
      const double whole = std::nearbyint(fraction(k, d_in));
      for (int c = 0; c < 3; ++c) d[c] -= whole * basis[3 * k + c];
    }
    double least = dot3(d, d);
    if (4 * least <= shortest * shortest) return least;  // no image can be closer
    for (const Vec& s : shifts) {
      const double image[3] = {d[0] + s[0], d[1] + s[1], d[2] + s[2]};
      least = std::min(least, dot3(image, image));
    }
    return least;
  }

 private:
  void reduce() {
    for (int round = 0; round < 100; ++round) {
      bool changed = false;
      for (int i = 0; i < periodic; ++i) {
        for (int j = 0; j < periodic; ++j) {
          if (i == j) continue;
          double *a = basis + 3 * i, *b = basis + 3 * j;
          const double whole = std::nearbyint(dot3(a, b) / dot3(b, b));
          // Halves would flip back and forth.
          if (!(std::abs(dot3(a, b)) > 0.5000001 * dot3(b, b))) continue;
          for (int c = 0; c < 3; ++c) a[c] -= whole * b[c];
          changed = true;
        }
      }
      if (!changed) return;
    }
  }

  void complete() {
    double scale = 0;
    for (int k = 0; k < periodic; ++k) scale = std::max(scale, norm3(basis + 3 * k));
    const char* degenerate =
        "a periodic direction needs a lattice vector that is finite, not zero and independent of the other periodic "
        "ones; correct the cell or switch off pbc along it";
    if (periodic == 0) {
      basis[0] = basis[4] = basis[8] = 1;
      return;
    }
    if (!(scale > 0) || !std::isfinite(scale)) throw Error(degenerate);
    if (periodic == 1) {
      double helper[3] = {0, 0, 0};
      int least = 0;
      for (int c = 1; c < 3; ++c)
        if (std::abs(basis[c]) < std::abs(basis[least])) least = c;
      helper[least] = 1;
      cross3(basis, helper, basis + 3);
      const double length = norm3(basis + 3);
      for (int c = 0; c < 3; ++c) basis[3 + c] /= length;
    }
    if (periodic < 3) {
      cross3(basis, basis + 3, basis + 6);
      const double length = norm3(basis + 6);
      if (!(length > 1e-8 * norm3(basis) * norm3(basis + 3))) throw Error(degenerate);
      for (int c = 0; c < 3; ++c) basis[6 + c] /= length;
    }
    double product = 1;
    for (int k = 0; k < 3; ++k) product *= norm3(basis + 3 * k);
    if (!(cell_volume(basis) > 1e-8 * product)) throw Error(degenerate);
  }

  void find_shifts() {
    if (periodic == 0) return;
    double half_diagonal = 0, least = kInfinity;
    for (int k = 0; k < periodic; ++k) {
      half_diagonal += 0.5 * norm3(basis + 3 * k);
      least = std::min(least, norm3(basis + 3 * k));
    }
    int most[3] = {0, 0, 0};
    for (int k = 0; k < periodic; ++k)
      most[k] = static_cast<int>(std::ceil(std::max(half_diagonal / height[k] + 0.5, least / height[k])));
    for (int i = -most[0]; i <= most[0]; ++i) {
      for (int j = -most[1]; j <= most[1]; ++j) {
        for (int k = -most[2]; k <= most[2]; ++k) {
          if (i == 0 && j == 0 && k == 0) continue;
          Vec s;
          for (std::size_t c = 0; c < 3; ++c) s[c] = i * basis[c] + j * basis[3 + c] + k * basis[6 + c];
          const double square = dot3(s.data(), s.data());
          shortest = std::min(shortest, std::sqrt(square));
          // |d + s| < |d| needs 2 d.s < -|s|^2; over rounded coordinates the least 2 d.s is -sum |basis . s|.
          double reach = 0;
          for (int b = 0; b < periodic; ++b) reach += std::abs(dot3(basis + 3 * b, s.data()));
          if (reach > square * (1 + 1e-12)) shifts.push_back(s);
        }
      }
    }
  }
};

// The box together with the lattice: sampling, folding, and which images of an atom are near.
struct BoxedLattice {
  Lattice lattice;
  Walls walls;
  double corner[3], vectors[9];
  bool folds[3] = {};      // open, and a lattice translation: atoms that leave come back on the other side
  double low[3], high[3];  // range of lattice fractions of the box

  BoxedLattice(const double* cell, const std::uint8_t* pbc, const Confinement& box) : lattice(cell, pbc), walls(box) {
    std::copy(box.corner, box.corner + 3, corner);
    std::copy(box.vectors, box.vectors + 9, vectors);
    for (int k = 0; k < 3; ++k) {
      if (!box.open[k] || lattice.periodic == 0 || walls.thickness[k] == 0) continue;
      folds[k] = true;
      for (int b = 0; b < 3; ++b) {
        const double f = lattice.fraction(b, vectors + 3 * k), wanted = b < lattice.periodic ? std::nearbyint(f) : 0.0;
        folds[k] = folds[k] && std::abs(f - wanted) * lattice.height[b] < 1e-6;
      }
    }
    for (int b = 0; b < 3; ++b) {
      low[b] = high[b] = lattice.fraction(b, corner);
      for (int k = 0; k < 3; ++k) {
        const double f = lattice.fraction(b, vectors + 3 * k);
        (f < 0 ? low[b] : high[b]) += f;
      }
    }
  }

  // Brings x into the box along directions that fold; true if it is inside then (to rounding: a flat box has no
  // inside).
  bool fold(double* x) const {
    for (int k = 0; k < 3; ++k) {
      const double h = walls.height(k, x), thickness = walls.thickness[k];
      if (h >= -1e-12 && h <= thickness + 1e-12) continue;
      if (!folds[k]) return false;
      const double whole = std::floor(h / thickness);
      for (int c = 0; c < 3; ++c) x[c] -= whole * vectors[3 * k + c];
    }
    return true;
  }

  Vec anywhere(Random& random) const {
    Vec x = {corner[0], corner[1], corner[2]};
    for (std::size_t k = 0; k < 3; ++k) {
      const double u = random.uniform();
      for (std::size_t c = 0; c < 3; ++c) x[c] += u * vectors[3 * k + c];
    }
    return x;
  }

  // Calls visit(image) for x and its images up to `reach` from the box (a few more near its edges).
  template <class Visit>
  void images(const double* x, double reach, Visit visit) const {
    int first[3] = {0, 0, 0}, last[3] = {0, 0, 0};
    for (int k = 0; k < lattice.periodic; ++k) {
      const double f = lattice.fraction(k, x), margin = reach / lattice.height[k];
      first[k] = static_cast<int>(std::ceil(low[k] - margin - f));
      last[k] = static_cast<int>(std::floor(high[k] + margin - f));
    }
    for (int i = first[0]; i <= last[0]; ++i)
      for (int j = first[1]; j <= last[1]; ++j)
        for (int k = first[2]; k <= last[2]; ++k) {
          Vec image;
          for (std::size_t c = 0; c < 3; ++c)
            image[c] = x[c] + i * lattice.basis[c] + j * lattice.basis[3 + c] + k * lattice.basis[6 + c];
          if (walls.outside_closed(image.data()) <= reach) visit(image);
        }
  }
};

// Atoms and images around the box, one array per coordinate so that distance checks run in vector registers.
struct Cloud {
  std::vector<double> x, y, z, radius;
  std::vector<std::int32_t> owner;

  std::size_t size() const { return x.size(); }
  void add(const Vec& p, double r, std::int32_t who) {
    x.push_back(p[0]);
    y.push_back(p[1]);
    z.push_back(p[2]);
    radius.push_back(r);
    owner.push_back(who);
  }
  void resize(std::size_t n) {
    x.resize(n);
    y.resize(n);
    z.resize(n);
    radius.resize(n);
    owner.resize(n);
  }
  void clear() { resize(0); }
  void remove(std::int32_t who) {
    std::size_t kept = 0;
    for (std::size_t k = 0; k < size(); ++k) {
      if (owner[k] == who) continue;
      x[kept] = x[k], y[kept] = y[k], z[kept] = z[k], radius[kept] = radius[k], owner[kept] = owner[k];
      ++kept;
    }
    resize(kept);
  }
  // Smallest r^2 - (scale (R_i + R))^2 over the cloud: below 0 where one is closer than scale times the covalent sum.
  double clearance(const double* p, double r, double scale) const {
    double least = kInfinity;
    const std::size_t n = size();
    std::size_t k = 0;
    for (; k + 8 <= n && least >= 0; k += 8) {
      double part[8];
      for (std::size_t l = 0; l < 8; ++l) {
        const double dx = x[k + l] - p[0], dy = y[k + l] - p[1], dz = z[k + l] - p[2];
        const double sum = scale * (radius[k + l] + r);
        part[l] = dx * dx + dy * dy + dz * dz - sum * sum;
      }
      for (const double value : part) least = std::min(least, value);
    }
    for (; k < n && least >= 0; ++k) {
      const double dx = x[k] - p[0], dy = y[k] - p[1], dz = z[k] - p[2], sum = scale * (radius[k] + r);
      least = std::min(least, dx * dx + dy * dy + dz * dz - sum * sum);
    }
    return least;
  }
};

void check_settings(const BuildSettings& s) {
  if (!s.box.active)
    throw Error("placing atoms needs a box, but there is none; give box=(corner (3,), vectors (3, 3), open (3,))");
  if (!(s.c1 >= 0 && s.c1 < s.c2 && std::isfinite(s.c2)))
    throw Error("the bond-length window needs 0 <= c1 < c2, but c1 is " + number_text(s.c1) + " and c2 is " +
                number_text(s.c2));
  if (s.tries_per_atom < 1 || s.tries_per_structure < 1)
    throw Error("tries_per_atom and tries_per_structure must be at least 1, but they are " +
                std::to_string(s.tries_per_atom) + " and " + std::to_string(s.tries_per_structure));
}

void check_finite(const char* name, const double* x, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i)
    if (!std::isfinite(x[i]))
      throw Error(std::string(name) + " must be finite, but value " + std::to_string(i) + " is not");
}

void check_template(const StructureView& frame, const Lattice& lattice, const std::vector<double>& radius) {
  for (std::size_t i = 0; i < frame.n; ++i) {
    for (std::size_t j = 0; j < i; ++j) {
      const double d[3] = {frame.positions[3 * i] - frame.positions[3 * j],
                           frame.positions[3 * i + 1] - frame.positions[3 * j + 1],
                           frame.positions[3 * i + 2] - frame.positions[3 * j + 2]};
      const double limit = 0.5 * (radius[i] + radius[j]), square = lattice.squared(d);
      if (square < limit * limit)
        throw Error("the template overlaps itself: atoms " + std::to_string(j) + " (" +
                    chemical_symbol(frame.numbers[j]) + ") and " + std::to_string(i) + " (" +
                    chemical_symbol(frame.numbers[i]) + ") are " + number_text(std::sqrt(square)) +
                    " angstrom apart, less than half the sum of their covalent radii (" + number_text(limit) +
                    "); check its positions and cell");
    }
  }
}

void check_room(std::span<const std::int32_t> placed, const std::vector<double>& radius, const BuildSettings& settings,
                const BoxedLattice& box) {
  double filled = 0, largest = 0;
  for (const double r : radius) {
    filled += 4.0 / 3.0 * kPi * std::pow(settings.c1 * r, 3);
    largest = std::max(largest, settings.c1 * r);
  }
  const double shear = 1.0 / cell_volume(box.walls.normals);  // volume = shear * product of the thicknesses
  double room = shear, own = shear;
  for (int k = 0; k < 3; ++k) {
    own *= box.walls.thickness[k];
    room *= box.walls.thickness[k] + (box.folds[k] ? 0.0 : 2 * largest);
  }
  if (filled > room)
    throw Error("the box is too small: " + std::to_string(placed.size()) + " atoms need at least " +
                number_text(filled) + " angstrom^3 (spheres of radius c1 R), but the box has " + number_text(own) +
                " (" + number_text(room) +
                " with the spheres' overhang); make it larger, place fewer atoms or lower c1");
  for (std::size_t i = 0; i < placed.size(); ++i)
    if (box.lattice.shortest < 2 * settings.c1 * radius[i])
      throw Error("the cell is too small: an atom of " + std::string(chemical_symbol(placed[i])) + " would be " +
                  number_text(box.lattice.shortest) +
                  " angstrom from its own image, closer than c1 times twice its "
                  "covalent radius (" +
                  number_text(2 * settings.c1 * radius[i]) + "); use a larger cell");
}

// What every row of random_structures shares.
struct RandomPlan {
  StructureView frame;
  std::span<const std::int32_t> placed;
  BuildSettings settings;
  BoxedLattice box;
  std::vector<double> radius;  // of the placed atoms
  double largest = 0;
  Cloud obstacles;  // template atoms and images that can overlap an atom in the box
  Cloud anchors;    // those from which the box can be reached, one image each where the box folds
  int flat = -1;    // the direction along which the box is too thin for directions in space, and its plane
  double plane_u[3] = {}, plane_v[3] = {};

  RandomPlan(const StructureView& frame_, std::span<const std::int32_t> placed_, const BuildSettings& settings_)
      : frame(frame_), placed(placed_), settings(settings_), box(frame_.cell, frame_.pbc, settings_.box) {
    std::vector<double> template_radius(frame.n);
    for (std::size_t i = 0; i < frame.n; ++i) template_radius[i] = covalent_radius(frame.numbers[i]);
    double smallest = kInfinity;
    for (const std::int32_t number : placed) {
      radius.push_back(covalent_radius(number));
      largest = std::max(largest, radius.back());
      smallest = std::min(smallest, radius.back());
    }
    check_finite("template_positions", frame.positions, 3 * frame.n);
    check_template(frame, box.lattice, template_radius);
    check_room(placed, radius, settings, box);
    for (int k = 0; k < 3; ++k)
      if (!box.folds[k] && box.walls.thickness[k] < 0.2 * 2 * settings.c1 * smallest) flat = flat < 0 ? k : 3;
    if (flat == 3) flat = -1;  // a thread: directions in space, most are refused
    if (flat >= 0) {
      const double *normal = box.walls.normals + 3 * flat, *edge = settings.box.vectors + 3 * ((flat + 1) % 3);
      cross3(normal, edge, plane_v);
      const double length = norm3(plane_v);
      for (double& c : plane_v) c /= length;
      cross3(plane_v, normal, plane_u);
    }
    for (std::size_t i = 0; i < frame.n; ++i) {
      const double near = settings.c1 * (template_radius[i] + largest),
                   far = settings.c2 * (template_radius[i] + largest);
      box.images(frame.positions + 3 * i, far, [&](const Vec& image) {
        if (box.walls.outside_closed(image.data()) <= near)
          obstacles.add(image, template_radius[i], static_cast<std::int32_t>(i));
        for (int k = 0; k < 3; ++k) {
          const double f =
              box.walls.thickness[k] > 0 ? box.walls.height(k, image.data()) / box.walls.thickness[k] : 0.0;
          if (box.folds[k] && (f < -1e-6 || f >= 1 - 1e-6)) return;
        }
        anchors.add(image, template_radius[i], static_cast<std::int32_t>(i));
      });
    }
  }

  // A point at a bond length from the anchor; false if it is outside the box.
  bool propose(Random& random, const double* anchor, double anchor_radius, double r, double* p) const {
    const double shortest = settings.c1 * (anchor_radius + r), longest = settings.c2 * (anchor_radius + r);
    if (flat >= 0) {
      const double rise = random.uniform() * box.walls.thickness[flat] - box.walls.height(flat, anchor);
      const double inner = std::max(0.0, shortest * shortest - rise * rise), outer = longest * longest - rise * rise;
      if (outer <= inner) return false;
      const double distance = std::sqrt(inner + random.uniform() * (outer - inner)), phi = 2 * kPi * random.uniform();
      const double along_u = distance * std::cos(phi), along_v = distance * std::sin(phi);
      const double* normal = box.walls.normals + 3 * flat;
      for (int c = 0; c < 3; ++c) p[c] = anchor[c] + along_u * plane_u[c] + along_v * plane_v[c] + rise * normal[c];
      return box.fold(p);
    }
    const double a = shortest * shortest * shortest, b = longest * longest * longest;
    const Vec direction = random.direction();
    const double distance = std::cbrt(a + random.uniform() * (b - a));
    for (std::size_t c = 0; c < 3; ++c) p[c] = anchor[c] + distance * direction[c];
    return box.fold(p);
  }
};

// One row after the other; the clouds keep their memory.
class RandomWorker {
 public:
  RandomWorker(const RandomPlan& plan, Key key, std::uint64_t first_row, BuildResult& result)
      : plan_(plan),
        key_(key),
        first_row_(first_row),
        result_(result),
        obstacles_(plan.obstacles),
        anchors_(plan.anchors),
        order_(plan.placed.size()) {}

  void operator()(std::size_t row) {
    const std::size_t frame_n = plan_.frame.n, n = frame_n + plan_.placed.size();
    double* out = result_.positions.data() + 3 * n * row;
    std::copy(plan_.frame.positions, plan_.frame.positions + 3 * frame_n, out);
    double* added = out + 3 * frame_n;
    Random random(key_, first_row_ + row);
    for (int attempt = 0; attempt < plan_.settings.tries_per_structure; ++attempt) {
      if (build(random, added)) {
        result_.ok[row] = 1;
        return;
      }
    }
    for (std::size_t i = 0; i < plan_.placed.size(); ++i)
      for (std::size_t c = 0; c < 3; ++c)
        added[3 * i + c] =
            plan_.box.corner[c] + 0.5 * (plan_.box.vectors[c] + plan_.box.vectors[3 + c] + plan_.box.vectors[6 + c]);
  }

 private:
  bool build(Random& random, double* added) {
    obstacles_.resize(plan_.obstacles.size());
    anchors_.resize(plan_.anchors.size());
    std::iota(order_.begin(), order_.end(), std::size_t{0});
    for (std::size_t k = order_.size(); k > 1; --k)
      std::swap(order_[k - 1], order_[random.below(static_cast<std::uint32_t>(k))]);
    for (const std::size_t atom : order_) {
      const double r = plan_.radius[atom];
      Vec p;
      bool found = false;
      for (int attempt = 0; attempt < plan_.settings.tries_per_atom && !found; ++attempt) {
        if (anchors_.size() == 0) {
          p = plan_.box.anywhere(random);
        } else {
          const std::size_t k = random.below(static_cast<std::uint32_t>(anchors_.size()));
          const double anchor[3] = {anchors_.x[k], anchors_.y[k], anchors_.z[k]};
          if (!plan_.propose(random, anchor, anchors_.radius[k], r, p.data())) continue;
        }
        found = obstacles_.clearance(p.data(), r, plan_.settings.c1) >= 0;
      }
      if (!found) return false;
      const std::int32_t who = static_cast<std::int32_t>(plan_.frame.n + atom);
      std::copy(p.begin(), p.end(), added + 3 * atom);
      anchors_.add(p, r, who);
      if (plan_.box.lattice.periodic == 0) {
        obstacles_.add(p, r, who);
      } else {
        plan_.box.images(p.data(), plan_.settings.c1 * (r + plan_.largest),
                         [&](const Vec& image) { obstacles_.add(image, r, who); });
      }
    }
    return true;
  }

  const RandomPlan& plan_;
  Key key_;
  std::uint64_t first_row_;
  BuildResult& result_;
  Cloud obstacles_, anchors_;
  std::vector<std::size_t> order_;
};

bool any_fixed(const StructureView& s, std::size_t atom) {
  return s.fixed != nullptr && (s.fixed[3 * atom] || s.fixed[3 * atom + 1] || s.fixed[3 * atom + 2]);
}

class RattleWorker {
 public:
  RattleWorker(const BatchView& parents, const BuildSettings& settings, double amplitude, double moved, Key key,
               std::uint64_t first_row, BuildResult& result)
      : parents_(parents),
        settings_(settings),
        amplitude_(amplitude),
        moved_(moved),
        key_(key),
        first_row_(first_row),
        result_(result) {}

  void operator()(std::size_t row) {
    const StructureView parent = parents_[row];
    double* out = result_.positions.data() + 3 * parents_.offsets[row];
    const double* positions = parent.positions;
    radius_.resize(parent.n);
    free_.clear();
    double largest = 0;
    for (std::size_t i = 0; i < parent.n; ++i) {
      radius_[i] = covalent_radius(parent.numbers[i]);
      largest = std::max(largest, radius_[i]);
      if (!parent.is_still(i)) free_.push_back(i);
    }
    if (free_.empty()) return;
    check_finite("positions", positions, 3 * parent.n);
    const BoxedLattice box(parent.cell, parent.pbc, settings_.box);
    cloud_.clear();
    for (std::size_t i = 0; i < parent.n; ++i) add(box, i, positions + 3 * i, largest);
    before_ = cloud_;
    Random random(key_, first_row_ + row);
    for (int attempt = 0; attempt < settings_.tries_per_structure; ++attempt) {
      cloud_ = before_;
      if (move(parent, box, largest, random, out)) {
        result_.ok[row] = 1;
        return;
      }
      std::copy(positions, positions + 3 * parent.n, out);
    }
  }

 private:
  void add(const BoxedLattice& box, std::size_t i, const double* p, double largest) {
    box.images(p, settings_.c2 * (radius_[i] + largest),
               [&](const Vec& image) { cloud_.add(image, radius_[i], static_cast<std::int32_t>(i)); });
  }

  bool move(const StructureView& parent, const BoxedLattice& box, double largest, Random& random, double* out) {
    chosen_.clear();
    for (const std::size_t i : free_)
      if (random.uniform() * static_cast<double>(free_.size()) < moved_) chosen_.push_back(i);
    if (chosen_.empty()) chosen_.push_back(free_[random.below(static_cast<std::uint32_t>(free_.size()))]);
    for (const std::size_t i : chosen_) {
      cloud_.remove(static_cast<std::int32_t>(i));
      const double* start = parent.positions + 3 * i;
      bool found = false;
      for (int attempt = 0; attempt < settings_.tries_per_atom && !found; ++attempt) {
        const Vec direction = random.direction();
        const double distance = amplitude_ * std::cbrt(random.uniform());
        double p[3];
        for (std::size_t c = 0; c < 3; ++c) {
          const bool held = parent.fixed != nullptr && parent.fixed[3 * i + c];
          p[c] = start[c] + (held ? 0.0 : distance * direction[c]);
        }
        if (!box.fold(p)) continue;
        if (parent.n > 1 && (cloud_.clearance(p, radius_[i], settings_.c1) < 0 ||
                             !(cloud_.clearance(p, radius_[i], settings_.c2) <= 0)))
          continue;
        std::copy(p, p + 3, out + 3 * i);
        add(box, i, p, largest);
        found = true;
      }
      if (!found) return false;
    }
    // A neighbour may have left since.
    for (const std::size_t i : chosen_) {
      bool held = parent.n == 1;
      for (std::size_t k = 0; k < cloud_.size() && !held; ++k) {
        if (cloud_.owner[k] == static_cast<std::int32_t>(i)) continue;
        const double d[3] = {cloud_.x[k] - out[3 * i], cloud_.y[k] - out[3 * i + 1], cloud_.z[k] - out[3 * i + 2]};
        const double longest = settings_.c2 * (cloud_.radius[k] + radius_[i]);
        held = dot3(d, d) <= longest * longest;
      }
      if (!held) return false;
    }
    return true;
  }

  const BatchView& parents_;
  const BuildSettings& settings_;
  double amplitude_, moved_;
  Key key_;
  std::uint64_t first_row_;
  BuildResult& result_;
  Cloud cloud_, before_;
  std::vector<double> radius_;
  std::vector<std::size_t> free_, chosen_;
};

class PermuteWorker {
 public:
  PermuteWorker(const BatchView& parents, double again, Key key, std::uint64_t first_row, BuildResult& result)
      : parents_(parents), again_(again), key_(key), first_row_(first_row), result_(result) {}

  void operator()(std::size_t row) {
    const StructureView parent = parents_[row];
    const std::int32_t* z = parent.numbers;
    double* out = result_.positions.data() + 3 * parents_.offsets[row];
    free_.clear();
    for (std::size_t i = 0; i < parent.n; ++i)
      if (!any_fixed(parent, i)) free_.push_back(i);
    // partners_[k]: free atoms of another species than the k-th free atom; a swap draws its first atom with these
    // weights.
    partners_.assign(free_.size(), 0);
    std::uint64_t pairs = 0;
    for (std::size_t k = 0; k < free_.size(); ++k) {
      for (const std::size_t other : free_) partners_[k] += z[other] != z[free_[k]];
      pairs += partners_[k];
    }
    if (pairs == 0) return;
    site_.resize(parent.n);
    std::iota(site_.begin(), site_.end(), std::size_t{0});
    Random random(key_, first_row_ + row);
    const auto swap_one = [&] {
      std::uint64_t draw = static_cast<std::uint64_t>(random.uniform() * static_cast<double>(pairs));
      std::size_t k = 0;
      while (k + 1 < free_.size() && draw >= partners_[k]) draw -= partners_[k++];
      std::uint32_t other = random.below(static_cast<std::uint32_t>(partners_[k]));
      for (const std::size_t j : free_) {
        if (z[j] == z[free_[k]] || other-- > 0) continue;
        std::swap(site_[free_[k]], site_[j]);
        return;
      }
    };
    do swap_one();
    while (random.uniform() < again_);
    bool same = true;  // does every site hold the species it held?
    for (std::size_t i = 0; i < parent.n; ++i) same = same && z[site_[i]] == z[i];
    if (same) swap_one();
    for (std::size_t i = 0; i < parent.n; ++i)
      std::copy(parent.positions + 3 * site_[i], parent.positions + 3 * site_[i] + 3, out + 3 * i);
    result_.ok[row] = 1;
  }

 private:
  const BatchView& parents_;
  double again_;
  Key key_;
  std::uint64_t first_row_;
  BuildResult& result_;
  std::vector<std::size_t> free_, site_;
  std::vector<std::uint64_t> partners_;
};

// Calls visit(i, j, squared distance of the closest images) for every pair i > j.
template <class Visit>
void for_pairs(const StructureView& s, const Lattice& lattice, Visit visit) {
  for (std::size_t i = 0; i < s.n; ++i)
    for (std::size_t j = 0; j < i; ++j) {
      const double d[3] = {s.positions[3 * i] - s.positions[3 * j], s.positions[3 * i + 1] - s.positions[3 * j + 1],
                           s.positions[3 * i + 2] - s.positions[3 * j + 2]};
      visit(i, j, lattice.squared(d));
    }
}

BuildResult copy_of(const BatchView& parents) {
  BuildResult result;
  result.positions.assign(parents.positions.begin(), parents.positions.end());
  result.ok.assign(parents.size(), 0);
  return result;
}

}  // namespace

PlacementPlan placement_plan(const StructureView& frame, std::span<const std::int32_t> placed,
                             const BuildSettings& settings) {
  check_settings(settings);
  const RandomPlan plan(frame, placed, settings);
  PlacementPlan out;
  PlacementBox& b = out.box;
  const Lattice& lattice = plan.box.lattice;
  b.periodic = lattice.periodic;
  std::copy_n(lattice.basis, 9, b.basis);
  std::copy_n(lattice.inverse, 9, b.inverse);
  std::copy_n(lattice.height, 3, b.height);
  std::copy_n(plan.box.low, 3, b.low);
  std::copy_n(plan.box.high, 3, b.high);
  std::copy_n(plan.box.corner, 3, b.corner);
  std::copy_n(plan.box.vectors, 9, b.vectors);
  std::copy_n(plan.box.folds, 3, b.folds);
  b.walls = plan.box.walls;
  b.flat = plan.flat;
  std::copy_n(plan.plane_u, 3, b.plane_u);
  std::copy_n(plan.plane_v, 3, b.plane_v);
  b.largest = plan.largest;
  out.radius = plan.radius;
  const auto list = [](const Cloud& cloud) {
    std::vector<double> points;
    for (std::size_t k = 0; k < cloud.size(); ++k)
      points.insert(points.end(), {cloud.x[k], cloud.y[k], cloud.z[k], cloud.radius[k]});
    return points;
  };
  out.obstacles = list(plan.obstacles);
  out.anchors = list(plan.anchors);
  return out;
}

BuildResult random_structures(const StructureView& frame, std::span<const std::int32_t> placed,
                              const BuildSettings& settings, std::size_t count, Key key, std::uint64_t first_row,
                              int threads) {
  check_settings(settings);
  const RandomPlan plan(frame, placed, settings);
  BuildResult result;
  result.positions.resize(3 * (frame.n + placed.size()) * count);
  result.ok.assign(count, 0);
  for_rows(count, threads, [&] { return RandomWorker(plan, key, first_row, result); });
  return result;
}

BuildResult rattle(const BatchView& parents, const BuildSettings& settings, double amplitude, double moved, Key key,
                   std::uint64_t first_row, int threads) {
  parents.check();
  check_settings(settings);
  if (!(amplitude > 0) || !std::isfinite(amplitude))
    throw Error("rattle needs an amplitude above 0 angstrom, but it is " + number_text(amplitude));
  if (!(moved >= 0)) throw Error("rattle needs moved >= 0 (mean number of atoms), but it is " + number_text(moved));
  BuildResult result = copy_of(parents);
  for_rows(parents.size(), threads,
           [&] { return RattleWorker(parents, settings, amplitude, moved, key, first_row, result); });
  return result;
}

BuildResult permute(const BatchView& parents, double again, Key key, std::uint64_t first_row, int threads) {
  parents.check();
  if (!(again >= 0 && again < 1))
    throw Error("permute needs 0 <= again < 1 (probability of a further swap), but it is " + number_text(again));
  BuildResult result = copy_of(parents);
  for_rows(parents.size(), threads, [&] { return PermuteWorker(parents, again, key, first_row, result); });
  return result;
}

std::vector<double> closest_contacts(const BatchView& batch, int threads) {
  batch.check();
  std::vector<double> out(batch.size(), kInfinity);
  for_rows(batch.size(), threads, [&] {
    return [&, radius = std::vector<double>()](std::size_t row) mutable {
      const StructureView s = batch[row];
      const Lattice lattice(s.cell, s.pbc);
      radius.resize(s.n);
      double least = kInfinity;
      for (std::size_t i = 0; i < s.n; ++i) {
        radius[i] = covalent_radius(s.numbers[i]);
        if (!s.is_still(i)) least = std::min(least, std::pow(lattice.shortest / (2 * radius[i]), 2));
      }
      for_pairs(s, lattice, [&](std::size_t i, std::size_t j, double square) {
        if (s.is_still(i) && s.is_still(j)) return;
        const double sum = radius[i] + radius[j];
        least = std::min(least, square / (sum * sum));
      });
      out[row] = std::sqrt(least);
    };
  });
  return out;
}

std::vector<std::int32_t> fragments(const BatchView& batch, double c2, int threads) {
  batch.check();
  if (!(c2 > 0)) throw Error("fragments needs c2 above 0, but it is " + number_text(c2));
  std::vector<std::int32_t> out(batch.size(), 0);
  for_rows(batch.size(), threads, [&] {
    return [&, radius = std::vector<double>(), root = std::vector<std::size_t>()](std::size_t row) mutable {
      const StructureView s = batch[row];
      const Lattice lattice(s.cell, s.pbc);
      radius.resize(s.n);
      root.resize(s.n);
      std::iota(root.begin(), root.end(), std::size_t{0});
      for (std::size_t i = 0; i < s.n; ++i) radius[i] = covalent_radius(s.numbers[i]);
      std::int32_t pieces = static_cast<std::int32_t>(s.n);
      const auto find = [&](std::size_t i) {
        while (root[i] != i) i = root[i] = root[root[i]];
        return i;
      };
      for_pairs(s, lattice, [&](std::size_t i, std::size_t j, double square) {
        const double longest = c2 * (radius[i] + radius[j]);
        if (square > longest * longest && !(s.is_still(i) && s.is_still(j))) return;
        const std::size_t a = find(i), b = find(j);
        if (a == b) return;
        root[a] = b;
        --pieces;
      });
      out[row] = pieces;
    };
  });
  return out;
}

}  // namespace thalweg
