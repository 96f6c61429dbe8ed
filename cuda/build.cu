// Twin of random placement in build.cpp; a thread builds a structure, since each try depends on the one before. What
// all share (template, box, lattice) is worked out by the CPU's code (build_plan.hpp); the order of random numbers and
// of roundings is the same, so that the structures are.
//
//   points of a structure that were added to the template:
//   obstacles, anchors   [slot][x | y | z | radius][structure]: neighbouring threads touch neighbouring numbers
#include <algorithm>
#include <cmath>

#include "build_plan.hpp"
#include "device.cuh"

namespace thalweg::cuda {
namespace {

constexpr double kPi = 3.14159265358979323846;

struct PlacementView {
  PlacementBox box;
  double c1, c2;
  int tries_per_atom, tries_per_structure;
  int frame, placed;              // atoms
  const double* frame_positions;  // (frame, 3)
  const double* radius;           // (placed)
  int fixed_obstacles, fixed_anchors;
  const double *obstacles, *anchors;  // of the template: (., 4)
  // of each structure:
  int obstacle_room;
  double *own_obstacles, *own_anchors;
  std::int32_t* order;  // (placed, structures)
};

class Placement {
 public:
  __device__ Placement(const PlacementView& view, std::size_t structures, std::size_t row, Random random)
      : v_(view), structures_(structures), row_(row), random_(random) {}

  __device__ bool build(double* added) {
    obstacles_ = anchors_ = 0;
    for (int k = 0; k < v_.placed; ++k) order(k) = k;
    for (int k = v_.placed; k > 1; --k) {
      const int other = static_cast<int>(random_.below(static_cast<std::uint32_t>(k)));
      const std::int32_t kept = order(k - 1);
      order(k - 1) = order(other);
      order(other) = kept;
    }
    for (int k = 0; k < v_.placed; ++k) {
      const int atom = order(k);
      const double r = v_.radius[atom];
      double p[3] = {0, 0, 0};
      bool found = false;
      for (int attempt = 0; attempt < v_.tries_per_atom && !found; ++attempt) {
        if (v_.fixed_anchors + anchors_ == 0) {
          anywhere(p);
        } else {
          const int anchor = static_cast<int>(random_.below(static_cast<std::uint32_t>(v_.fixed_anchors + anchors_)));
          double at[4];
          for (int c = 0; c < 4; ++c)
            at[c] = anchor < v_.fixed_anchors ? v_.anchors[4 * anchor + c]
                                              : own(v_.own_anchors, anchor - v_.fixed_anchors, c);
          if (!propose(at, at[3], r, p)) continue;
        }
        found = is_clear(p, r);
      }
      if (!found) return false;
      for (int c = 0; c < 3; ++c) added[3 * atom + c] = p[c];
      add(v_.own_anchors, anchors_, p, r);
      add_images(p, r);
    }
    return true;
  }

 private:
  __device__ std::int32_t& order(int k) { return v_.order[static_cast<std::size_t>(k) * structures_ + row_]; }
  __device__ double& own(double* points, int slot, int c) {
    return points[(static_cast<std::size_t>(slot) * 4 + static_cast<std::size_t>(c)) * structures_ + row_];
  }
  __device__ void add(double* points, int& count, const double* p, double r) {
    for (int c = 0; c < 3; ++c) own(points, count, c) = p[c];
    own(points, count, 3) = r;
    ++count;
  }

  __device__ void anywhere(double* x) {
    for (int c = 0; c < 3; ++c) x[c] = v_.box.corner[c];
    for (int k = 0; k < 3; ++k) {
      const double u = random_.uniform();
      for (int c = 0; c < 3; ++c) x[c] += u * v_.box.vectors[3 * k + c];
    }
  }

  /// Into the box along directions that fold; false if it is outside then.
  __device__ bool fold(double* x) const {
    for (int k = 0; k < 3; ++k) {
      const double h = v_.box.walls.height(k, x), thickness = v_.box.walls.thickness[k];
      if (h >= -1e-12 && h <= thickness + 1e-12) continue;
      if (!v_.box.folds[k]) return false;
      const double whole = floor(h / thickness);
      for (int c = 0; c < 3; ++c) x[c] -= whole * v_.box.vectors[3 * k + c];
    }
    return true;
  }

  __device__ bool propose(const double* anchor, double anchor_radius, double r, double* p) {
    const double shortest = v_.c1 * (anchor_radius + r), longest = v_.c2 * (anchor_radius + r);
    if (const int flat = v_.box.flat; flat >= 0) {
      const double rise = random_.uniform() * v_.box.walls.thickness[flat] - v_.box.walls.height(flat, anchor);
      const double inside = shortest * shortest - rise * rise, inner = 0.0 < inside ? inside : 0.0,
                   outer = longest * longest - rise * rise;
      if (outer <= inner) return false;
      const double distance = sqrt(inner + random_.uniform() * (outer - inner)), phi = 2 * kPi * random_.uniform();
      const double along_u = distance * cos(phi), along_v = distance * sin(phi);
      const double* normal = v_.box.walls.normals + 3 * flat;
      for (int c = 0; c < 3; ++c)
        p[c] = anchor[c] + along_u * v_.box.plane_u[c] + along_v * v_.box.plane_v[c] + rise * normal[c];
      return fold(p);
    }
    const double a = shortest * shortest * shortest, b = longest * longest * longest;
    // Random::direction(), which is not for devices.
    const double z = random_.uniform(-1.0, 1.0), phi = 6.283185307179586 * random_.uniform(), s = sqrt(1.0 - z * z);
    const double direction[3] = {s * cos(phi), s * sin(phi), z};
    const double distance = cbrt(a + random_.uniform() * (b - a));
    for (int c = 0; c < 3; ++c) p[c] = anchor[c] + distance * direction[c];
    return fold(p);
  }

  __device__ bool is_clear(const double* p, double r) {
    const auto apart = [&](double x, double y, double z, double radius) {
      const double dx = x - p[0], dy = y - p[1], dz = z - p[2], sum = v_.c1 * (radius + r);
      return dx * dx + dy * dy + dz * dz - sum * sum >= 0;
    };
    for (int k = 0; k < v_.fixed_obstacles; ++k) {
      const double* at = v_.obstacles + 4 * k;
      if (!apart(at[0], at[1], at[2], at[3])) return false;
    }
    double* points = v_.own_obstacles;
    for (int k = 0; k < obstacles_; ++k)
      if (!apart(own(points, k, 0), own(points, k, 1), own(points, k, 2), own(points, k, 3))) return false;
    return true;
  }

  /// The atom and its images near the box.
  __device__ void add_images(const double* p, double r) {
    const PlacementBox& b = v_.box;
    if (b.periodic == 0) return add(v_.own_obstacles, obstacles_, p, r);
    const double reach = v_.c1 * (r + b.largest);
    int first[3] = {0, 0, 0}, last[3] = {0, 0, 0};
    for (int k = 0; k < b.periodic; ++k) {
      const double f = dot3(b.inverse + 3 * k, p), margin = reach / b.height[k];
      first[k] = static_cast<int>(ceil(b.low[k] - margin - f));
      last[k] = static_cast<int>(floor(b.high[k] + margin - f));
    }
    for (int i = first[0]; i <= last[0]; ++i)
      for (int j = first[1]; j <= last[1]; ++j)
        for (int k = first[2]; k <= last[2]; ++k) {
          double image[3];
          for (int c = 0; c < 3; ++c) image[c] = p[c] + i * b.basis[c] + j * b.basis[3 + c] + k * b.basis[6 + c];
          double outside = -1e300;
          for (int wall = 0; wall < 3; ++wall) {
            const double h = b.walls.height(wall, image);
            outside = fmax(outside, fmax(-h, h - b.walls.thickness[wall]));
          }
          if (outside <= reach && obstacles_ < v_.obstacle_room) add(v_.own_obstacles, obstacles_, image, r);
        }
  }

  const PlacementView& v_;
  const std::size_t structures_, row_;
  Random random_;
  int obstacles_ = 0, anchors_ = 0;
};

__global__ void __launch_bounds__(kThreads) place_atoms(PlacementView view, std::size_t structures, Key key,
                                                        std::uint64_t first_row, double* positions, std::uint8_t* ok) {
  const std::size_t row = thread_index();
  if (row >= structures) return;
  double* out = positions + 3 * static_cast<std::size_t>(view.frame + view.placed) * row;
  for (int k = 0; k < 3 * view.frame; ++k) out[k] = view.frame_positions[k];
  double* added = out + 3 * view.frame;
  Placement placement(view, structures, row, Random(key, first_row + row));
  ok[row] = 0;
  for (int attempt = 0; attempt < view.tries_per_structure; ++attempt)
    if (placement.build(added)) {
      ok[row] = 1;
      return;
    }
  for (int i = 0; i < view.placed; ++i)  // at the centre of the box, as on the CPU
    for (int c = 0; c < 3; ++c)
      added[3 * i + c] =
          view.box.corner[c] + 0.5 * (view.box.vectors[c] + view.box.vectors[3 + c] + view.box.vectors[6 + c]);
}

}  // namespace

BuildResult random_structures(const StructureView& frame, std::span<const std::int32_t> placed,
                              const BuildSettings& settings, std::size_t count, Key key, std::uint64_t first_row,
                              Stream stream) {
  const PlacementPlan plan = placement_plan(frame, placed, settings);
  const std::size_t atoms = frame.n + placed.size();
  BuildResult result{Array<double>(3 * atoms * count), Array<std::uint8_t>(count)};
  if (count == 0) return result;
  double images = 1;  // of one atom that can be near the box
  for (int k = 0; k < plan.box.periodic; ++k)
    images *=
        std::floor(plan.box.high[k] - plan.box.low[k] + 4 * settings.c1 * plan.box.largest / plan.box.height[k]) + 1;
  const std::size_t room = static_cast<std::size_t>(images) * placed.size();
  const Array<double> frame_positions(std::span<const double>(frame.positions, 3 * frame.n), stream),
      radius(std::span<const double>(plan.radius), stream), obstacles(std::span<const double>(plan.obstacles), stream),
      anchors(std::span<const double>(plan.anchors), stream);
  Array<double> own_obstacles(4 * room * count), own_anchors(4 * placed.size() * count);
  Array<std::int32_t> order(placed.size() * count);
  const PlacementView view{plan.box,
                           settings.c1,
                           settings.c2,
                           settings.tries_per_atom,
                           settings.tries_per_structure,
                           static_cast<int>(frame.n),
                           static_cast<int>(placed.size()),
                           frame_positions.data(),
                           radius.data(),
                           static_cast<int>(plan.obstacles.size() / 4),
                           static_cast<int>(plan.anchors.size() / 4),
                           obstacles.data(),
                           anchors.data(),
                           static_cast<int>(room),
                           own_obstacles.data(),
                           own_anchors.data(),
                           order.data()};
  THALWEG_LAUNCH(place_atoms, blocks_for(count), kThreads, 0, native(stream), view, count, key, first_row,
                 result.positions.data(), result.ok.data());
  check_launch("random placement");
  copy_to_host(nullptr, nullptr, 0, stream);  // what the device still reads is freed below
  return result;
}

}  // namespace thalweg::cuda
