// What the walls of a confinement box do to one atom: shared by the minimiser here and its twin on a CUDA device, so
// that both move atoms along walls by the same arithmetic. Private to the core. `free` (3) is 1 where the atom's
// coordinate may move, else 0; `held` has one bit for each direction of the box whose walls hold the atom.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "thalweg/relax.hpp"

#ifndef THALWEG_HOST_DEVICE  // device code comes with its own
#define THALWEG_HOST_DEVICE
#endif

namespace thalweg {

inline constexpr double kTouch = 1e-9;  // angstrom: an atom this close to a wall is at it

THALWEG_HOST_DEVICE inline double wall_dot(const double* a, const double* b) {
  return a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
}

// The combination sum_k lambda_k n_k of the chosen normals whose products with them are `wanted`; false if they depend
// on one another.
THALWEG_HOST_DEVICE inline bool combine(const double (*normals)[3], const int* chosen, int count, const double* wanted,
                                        double* lambda) {
  double matrix[3][4];
  for (int i = 0; i < count; ++i) {
    for (int j = 0; j < count; ++j) matrix[i][j] = wall_dot(normals[chosen[i]], normals[chosen[j]]);
    matrix[i][count] = wanted[i];
  }
  for (int i = 0; i < count; ++i) {
    if (matrix[i][i] < 1e-10) return false;  // positive semi-definite: a small pivot means dependence
    for (int row = i + 1; row < count; ++row) {
      const double factor = matrix[row][i] / matrix[i][i];
      for (int j = i; j <= count; ++j) matrix[row][j] -= factor * matrix[i][j];
    }
  }
  for (int i = count - 1; i >= 0; --i) {
    lambda[i] = matrix[i][count];
    for (int j = i + 1; j < count; ++j) lambda[i] -= matrix[i][j] * lambda[j];
    lambda[i] /= matrix[i][i];
  }
  return true;
}

// The walls that one atom touches, as outward normals restricted to its free coordinates. A pair of opposite walls (a
// flat box) and a wall that the force presses on hold the atom in both senses.
struct Touching {
  int count = 0;
  double normals[3][3];
  int wall[3];  // direction of the box
  bool both[3];

  // The directions whose walls hold in both senses, one bit each.
  THALWEG_HOST_DEVICE std::uint8_t held() const {
    unsigned bits = 0;
    for (int k = 0; k < count; ++k) bits |= both[k] ? 1u << wall[k] : 0u;
    return static_cast<std::uint8_t>(bits);
  }

  // Replaces v by the nearest vector that points through none of the walls, and along those that hold in both senses.
  // `press`: walls that v pressed on become walls that hold in both senses.
  THALWEG_HOST_DEVICE void project(double* v, bool press) {
    int fewest = 0;
    for (int k = 0; k < count; ++k) fewest += both[k];
    for (int size = fewest; size <= count; ++size) {
      for (int set = 0; set < (1 << count); ++set) {
        int chosen[3], members = 0;
        bool fits = true;
        for (int k = 0; k < count; ++k) {
          if ((set >> k) & 1)
            chosen[members++] = k;
          else
            fits = fits && !both[k];
        }
        double lambda[3], along[3], rest[3] = {v[0], v[1], v[2]};
        for (int m = 0; m < members; ++m) along[m] = wall_dot(normals[chosen[m]], v);
        if (!fits || members != size || !combine(normals, chosen, members, along, lambda)) continue;
        for (int m = 0; m < members; ++m) {
          fits = fits && (both[chosen[m]] || lambda[m] >= 0);
          for (int c = 0; c < 3; ++c) rest[c] -= lambda[m] * normals[chosen[m]][c];
        }
        const double slack = 1e-12 * (std::abs(v[0]) + std::abs(v[1]) + std::abs(v[2]));
        for (int k = 0; k < count; ++k)
          if (!((set >> k) & 1)) fits = fits && wall_dot(normals[k], rest) <= slack;
        if (!fits) continue;
        for (int c = 0; c < 3; ++c) v[c] = rest[c];
        for (int m = 0; m < members && press; ++m) both[chosen[m]] = true;
        return;
      }
    }
    // Only reached when normals that hold in both senses depend on one another: leave what is perpendicular to all.
    double basis[3][3];
    int rank = 0;
    for (int k = 0; k < count; ++k) {
      double* axis = basis[rank];
      std::copy(normals[k], normals[k] + 3, axis);
      for (int b = 0; b < rank; ++b) {
        const double along = wall_dot(basis[b], normals[k]);
        for (int c = 0; c < 3; ++c) axis[c] -= along * basis[b][c];
      }
      const double length = std::sqrt(wall_dot(axis, axis));
      if (length < 1e-5) continue;
      for (int c = 0; c < 3; ++c) axis[c] /= length;
      const double along = wall_dot(axis, v);
      for (int c = 0; c < 3; ++c) v[c] -= along * axis[c];
      ++rank;
    }
  }
};

// Adds wall k to the walls of an atom, unless the atom cannot move through it anyhow.
THALWEG_HOST_DEVICE inline void add_wall(const Walls& box, const double* free, Touching& walls, int k, double sign,
                                         bool both) {
  double* normal = walls.normals[walls.count];
  for (int c = 0; c < 3; ++c) normal[c] = sign * box.normals[3 * k + c] * free[c];
  const double length = std::sqrt(wall_dot(normal, normal));
  if (length < 1e-6) return;
  for (int c = 0; c < 3; ++c) normal[c] /= length;
  walls.wall[walls.count] = k;
  walls.both[walls.count++] = both;
}

THALWEG_HOST_DEVICE inline Touching touching(const Walls& box, const double* free, const double* x) {
  Touching out;
  for (int k = 0; k < 3; ++k) {
    if (box.open[k]) continue;
    const double h = box.height(k, x);
    const bool low = h <= kTouch, high = h >= box.thickness[k] - kTouch;
    if (low || high) add_wall(box, free, out, k, high ? 1.0 : -1.0, low && high);
  }
  return out;
}

// Takes from a vector of one atom what points through the walls that hold it.
THALWEG_HOST_DEVICE inline void project_to_face(const Walls& box, const double* free, std::uint8_t held, double* v) {
  Touching walls;
  for (int k = 0; k < 3; ++k)
    if ((held >> k) & 1) add_wall(box, free, walls, k, 1.0, true);
  walls.project(v, false);
}

// Brings `to` back inside along the free coordinates, sliding on the walls that hold the atom: to leave one of them in
// order to keep off another would undo what presses it there. `from` is allowed: each wall gives way to where it was.
THALWEG_HOST_DEVICE inline void confine(const Walls& box, const double* free, std::uint8_t held, const double* from,
                                        double* to) {
  double low[3], high[3];
  Touching walls;
  double target[3];  // heights
  for (int k = 0; k < 3; ++k) {
    const double h = box.height(k, from);
    low[k] = std::min(0.0, h);
    high[k] = std::max(box.thickness[k], h);
    if ((held >> k) & 1) {
      target[walls.count] = h;
      add_wall(box, free, walls, k, 1.0, true);
    }
  }
  const auto beyond = [&](int k) {
    const double h = box.height(k, to);
    return h > high[k] ? h - high[k] : h < low[k] ? h - low[k] : 0.0;
  };
  while (true) {
    int worst = -1;
    double most = 1e-12;
    for (int k = 0; k < 3; ++k) {
      if (box.open[k] || std::abs(beyond(k)) < most) continue;
      most = std::abs(beyond(k));
      worst = k;
    }
    if (worst < 0) return;
    const int count = walls.count;
    if (std::find(walls.wall, walls.wall + count, worst) != walls.wall + count) break;
    target[count] = beyond(worst) > 0 ? high[worst] : low[worst];
    add_wall(box, free, walls, worst, 1.0, true);
    if (walls.count == count) break;  // a wall that its free coordinates do not cross
    double lacking[3], lambda[3];
    const int all[3] = {0, 1, 2};
    for (int m = 0; m < walls.count; ++m) {
      const double* normal = box.normals + 3 * walls.wall[m];
      lacking[m] = (target[m] - box.height(walls.wall[m], to)) / wall_dot(normal, walls.normals[m]);
    }
    if (!combine(walls.normals, all, walls.count, lacking, lambda)) break;
    for (int m = 0; m < walls.count; ++m)
      for (int c = 0; c < 3; ++c) to[c] += lambda[m] * walls.normals[m][c];
  }
  // Normals that depend on one another, or a corner beyond the opposite wall: the box is convex, so part of the way is
  // always inside.
  double part = 1;
  for (int k = 0; k < 3; ++k) {
    if (box.open[k]) continue;
    const double h0 = box.height(k, from), h = box.height(k, to);
    if (h > high[k]) part = std::min(part, std::max(0.0, (high[k] - h0) / (h - h0)));
    if (h < low[k]) part = std::min(part, std::max(0.0, (low[k] - h0) / (h - h0)));
  }
  for (int c = 0; c < 3; ++c) to[c] = from[c] + part * (to[c] - from[c]);
}

}  // namespace thalweg
