// The lattice of a structure, as neighbour lists (here and on a CUDA device) use it. Private to the core.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>

#include "thalweg/core.hpp"

namespace thalweg {

inline void lattice_cross(const double* a, const double* b, double* out) {
  out[0] = a[1] * b[2] - a[2] * b[1];
  out[1] = a[2] * b[0] - a[0] * b[2];
  out[2] = a[0] * b[1] - a[1] * b[0];
}
inline double lattice_dot(const double* a, const double* b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; }
inline double lattice_norm(const double* a) { return std::sqrt(lattice_dot(a, a)); }

// The periodic lattice vectors, completed by unit vectors at right angles to them along the open directions, so that
// the height between lattice planes of a periodic direction is that of the lattice of periodic directions alone.
struct PeriodicLattice {
  double vectors[9];     // rows
  double reciprocal[9];  // rows: fractional coordinate a of x is x . row a
  double height[3];      // between the planes of direction a
  bool periodic[3];

  explicit PeriodicLattice(const StructureView& structure) {
    int count = 0, axes[3] = {0, 0, 0}, open = 2;
    for (int a = 0; a < 3; ++a) {
      periodic[a] = structure.pbc[a] != 0;
      if (periodic[a]) {
        axes[count++] = a;
        std::copy_n(structure.cell + 3 * a, 3, vectors + 3 * a);
        const double length = lattice_norm(vectors + 3 * a);
        if (!(length > 0) || !std::isfinite(length))
          throw Error("direction " + std::to_string(a) +
                      " is periodic, so its lattice vector must be finite and not zero; set pbc to False there or give "
                      "a cell");
      } else {
        open = a;
      }
    }
    complete(count, axes, open);
    double* v = vectors;
    double* g = reciprocal;
    lattice_cross(v + 3, v + 6, g);
    lattice_cross(v + 6, v, g + 3);
    lattice_cross(v, v + 3, g + 6);
    const double volume = lattice_dot(v, g);
    if (!(std::abs(volume) > 1e-6 * lattice_norm(v) * lattice_norm(v + 3) * lattice_norm(v + 6)))
      throw Error("the periodic lattice vectors must not lie in one plane or on one line; check the cell");
    for (int k = 0; k < 9; ++k) g[k] /= volume;
    for (int a = 0; a < 3; ++a) height[a] = 1.0 / lattice_norm(g + 3 * a);
  }

  void fractional(const double* x, double* f) const {
    for (int a = 0; a < 3; ++a) f[a] = lattice_dot(x, reciprocal + 3 * a);
  }
  void shift(const std::int64_t* image, double* out) const {
    const double n0 = static_cast<double>(image[0]), n1 = static_cast<double>(image[1]),
                 n2 = static_cast<double>(image[2]);
    for (int k = 0; k < 3; ++k)
      out[k] = (periodic[0] ? n0 * vectors[k] : 0.0) + (periodic[1] ? n1 * vectors[3 + k] : 0.0) +
               (periodic[2] ? n2 * vectors[6 + k] : 0.0);
  }

 private:
  void complete(int count, const int* axes, int open) {
    double* v = vectors;
    if (count == 0) {
      for (int k = 0; k < 9; ++k) v[k] = k % 4 == 0 ? 1.0 : 0.0;
    } else if (count == 1) {
      const double* u = v + 3 * axes[0];
      double* first = v + 3 * ((axes[0] + 1) % 3);
      double* second = v + 3 * ((axes[0] + 2) % 3);
      const int smallest = static_cast<int>(
          std::min_element(u, u + 3, [](double p, double q) { return std::abs(p) < std::abs(q); }) - u);
      double unit[3] = {0, 0, 0};
      unit[smallest] = 1.0;
      lattice_cross(u, unit, first);
      lattice_cross(u, first, second);
      normalise(first);
      normalise(second);
    } else if (count == 2) {
      lattice_cross(v + 3 * axes[0], v + 3 * axes[1], v + 3 * open);
      normalise(v + 3 * open);
    }
  }
  static void normalise(double* x) {
    const double length = lattice_norm(x);
    for (int k = 0; k < 3; ++k) x[k] /= length;
  }
};

}  // namespace thalweg
