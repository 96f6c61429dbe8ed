// Built-in potentials and priors. A block takes a structure, a warp an atom, a lane a neighbour. Formulas, parameters
// and refusals are those of potentials.cpp (the tables are the CPU's own, potentials_tables.hpp).
#include <utility>

#include "neighbors.cuh"
#include "potentials_tables.hpp"

namespace thalweg::cuda {
namespace {

// ---- what all share -----------------------------------------------------------------------------------------------

struct Output {
  double *energies, *forces;  // (n), (m, 3)
};

/// Where a structure begins, how many atoms it has; false if there is nothing to do for this block.
__device__ bool begin_row(const Rows& rows, const NeighborView& list, const Output& out, std::int64_t& first, int& n) {
  const unsigned row = blockIdx.x;
  if (rows.skips(row)) return false;
  first = rows.offsets[row];
  n = static_cast<int>(rows.offsets[row + 1] - first);
  if (list.usable[row]) return true;
  if (threadIdx.x == 0) out.energies[row] = not_a_number();
  for (int k = static_cast<int>(threadIdx.x); k < 3 * n; k += kThreads) out.forces[3 * first + k] = not_a_number();
  return false;
}

// ---- sums over pairs ------------------------------------------------------------------------------------------------

struct LennardJonesPair {
  LennardJonesCoefficients c;
  __device__ void operator()(int, int, double r, double& energy, double& slope_over_r) const {
    const double square = r * r, inverse = 1.0 / square, s2 = c.sigma2 * inverse, s6 = s2 * s2 * s2;
    energy = c.four_epsilon * (s6 * s6 - s6);
    slope_over_r = -6.0 * c.four_epsilon * (2.0 * (s6 * s6) - s6) * inverse;
    if (!c.smooth) {
      energy -= c.shift;
    } else if (!(square < c.ro2)) {
      const double gap = c.rc2 - square, cut = gap * gap * (c.rc2 + 2.0 * square - 3.0 * c.ro2) * c.inverse_switch;
      slope_over_r = cut * slope_over_r + 12.0 * gap * (c.ro2 - square) * c.inverse_switch * energy;
      energy *= cut;
    }
  }
};

constexpr double kClosest = 0.5;  // angstrom, where the pole of the repulsive prior becomes a parabola

struct PriorPairs {
  const PriorPair* table;
  int types;
  bool repulsive, sharp;
  __device__ void operator()(int type_i, int type_j, double r, double& energy, double& slope_over_r) const {
    const PriorPair& pair = table[type_i * types + type_j];
    double slope;
    if (repulsive) {
      const double gap = r + 1.0 - pair.radius, base = sharp || gap > kClosest ? gap : kClosest, below = gap - base;
      const double inverse = 1.0 / base, q3 = inverse * inverse * inverse, value = (q3 * q3) * (q3 * q3);
      const double by_gap = -12.0 * value * inverse, curvature = 156.0 * value * inverse * inverse;
      energy = value + below * (by_gap + 0.5 * below * curvature);
      slope = by_gap + below * curvature;
    } else {
      const double e = exp(pair.exponent * (pair.radius - r));
      energy = pair.depth * (e * e - 2.0 * e);
      slope = -2.0 * pair.exponent * pair.depth * (e * e - e);
    }
    double t = (r - pair.switch_from) * pair.switch_scale;
    if (!sharp && t > 0) {
      t = t < 1.0 ? t : 1.0;
      const double cut = 1.0 - t * t * t * (10.0 - t * (15.0 - 6.0 * t));
      slope = slope * cut - energy * 30.0 * t * t * (1.0 - t) * (1.0 - t) * pair.switch_scale;
      energy *= cut;
    }
    slope_over_r = slope / r;
  }
};

template <class Pair>
__global__ void __launch_bounds__(kThreads)
    sum_pairs(Rows rows, NeighborView list, const std::int32_t* type, Pair pair, Output out) {
  THALWEG_DYNAMIC_SHARED(double, scratch);  // kWarps
  std::int64_t first;
  int n;
  if (!begin_row(rows, list, out, first, n)) return;
  double total = 0;
  for (std::int64_t i = first + warp_index(); i < first + n; i += kWarps) {
    double x = 0, y = 0, z = 0;
    for (std::int64_t e = i * list.capacity + lane_index(); e < i * list.capacity + list.count[i]; e += kLanes) {
      double energy, slope;
      pair(type[i], type[list.atom[e]], list.r[e], energy, slope);
      total += 0.5 * energy;
      x += slope * list.x[e];
      y += slope * list.y[e];
      z += slope * list.z[e];
    }
    write_vector(out.forces, i, x, y, z, false);
  }
  total = block_sum(total, scratch);
  if (threadIdx.x == 0) out.energies[blockIdx.x] = total;
}

// ---- embedded atoms -------------------------------------------------------------------------------------------------

struct EmbeddedDevice {
  double slope, middle;
  int types;
  const EmbeddedPair* pairs;
  const EmbeddedWall* walls;  // may be null
  const EmbeddedAtom* atoms;

  /// Energy of an atom at this density, and its slope.
  __device__ double embedding(int type, double density, double& d_energy) const {
    const EmbeddedAtom& a = atoms[type];
    d_energy = 0;
    if (!(density > 0)) return a.exponent == 0 ? -a.e0 : 0.0;
    if (a.exponent != 0) {
      const double energy = -a.e0 * pow(density, a.exponent);
      d_energy = a.exponent * energy / density;
      return energy;
    }
    const double ds = -log(density * a.inverse_12_gamma1) / a.beta_eta, l = a.lambda * ds;
    const double cohesive = a.e0 * exp(-l), sphere = a.six_v0 * exp(-a.kappa * ds);
    d_energy = (cohesive * a.lambda * l + a.kappa * sphere) / (a.beta_eta * density);
    return cohesive * (1.0 + l) + sphere - a.e0;
  }
};

// Densities of all atoms of the structure first (a barrier), then forces.
__global__ void __launch_bounds__(kThreads)
    embed(Rows rows, NeighborView list, const std::int32_t* type, EmbeddedDevice p, double* d_energy, Output out) {
  THALWEG_DYNAMIC_SHARED(double, scratch);  // kWarps
  std::int64_t first;
  int n;
  if (!begin_row(rows, list, out, first, n)) return;
  double total = 0;
  for (std::int64_t i = first + warp_index(); i < first + n; i += kWarps) {
    double density = 0;
    for (std::int64_t e = i * list.capacity + lane_index(); e < i * list.capacity + list.count[i]; e += kLanes) {
      const EmbeddedPair& pair = p.pairs[type[i] * p.types + type[list.atom[e]]];
      const double r = list.r[e], w = 1.0 / (1.0 + exp(p.slope * (r - p.middle)));
      density += pair.density * w * exp(-pair.eta * r);
      total += pair.pair * w * exp(-pair.kappa * r);
      if (p.walls == nullptr) continue;
      const EmbeddedWall& wall = p.walls[type[i] * p.types + type[list.atom[e]]];
      if (r < wall.radius) total += 0.5 * wall.height * pow(1.0 - r / wall.radius, 3.0);
    }
    density = warp_sum(density);
    if (lane_index() != 0) continue;
    double slope;
    total += p.embedding(type[i], density, slope);
    d_energy[i] = slope;
  }
  total = block_sum(total, scratch);  // its barriers also separate the two passes
  if (threadIdx.x == 0) out.energies[blockIdx.x] = total;
  for (std::int64_t i = first + warp_index(); i < first + n; i += kWarps) {
    double x = 0, y = 0, z = 0;
    for (std::int64_t e = i * list.capacity + lane_index(); e < i * list.capacity + list.count[i]; e += kLanes) {
      const std::int64_t j = list.atom[e];
      const EmbeddedPair &at_i = p.pairs[type[i] * p.types + type[j]], &at_j = p.pairs[type[j] * p.types + type[i]];
      const double r = list.r[e], w = 1.0 / (1.0 + exp(p.slope * (r - p.middle))), d_log_w = p.slope * (w - 1.0);
      double slope = d_energy[i] * at_i.density * w * exp(-at_i.eta * r) * (d_log_w - at_i.eta) +
                     d_energy[j] * at_j.density * w * exp(-at_j.eta * r) * (d_log_w - at_j.eta) +
                     at_i.pair * w * exp(-at_i.kappa * r) * (d_log_w - at_i.kappa) +
                     at_j.pair * w * exp(-at_j.kappa * r) * (d_log_w - at_j.kappa);
      if (p.walls != nullptr) {
        const EmbeddedWall& wall = p.walls[type[i] * p.types + type[j]];
        const double inside = 1.0 - r / wall.radius;
        if (r < wall.radius) slope -= 3.0 * wall.height * inside * inside / wall.radius;
      }
      slope /= r;
      x += slope * list.x[e];
      y += slope * list.y[e];
      z += slope * list.z[e];
    }
    write_vector(out.forces, i, x, y, z, false);
  }
}

// ---- angles: slopes of every edge first (dE / d(r_j - r_i), one lane an edge), then each atom gathers
// ------------------

struct EdgeSlopes {
  double *x, *y, *z;  // (m, capacity)
  double* by_zeta;    // the same, Tersoff only: dE / dzeta of the edge's bond
};

struct Edge {
  double u[3], r, inverse_r;
  int type;
  __device__ Edge(const NeighborView& list, const std::int32_t* types, std::int64_t e)
      : r(list.r[e]), inverse_r(1.0 / list.r[e]), type(types[list.atom[e]]) {
    u[0] = list.x[e] * inverse_r;
    u[1] = list.y[e] * inverse_r;
    u[2] = list.z[e] * inverse_r;
  }
};

struct SmoothCarbonEdges {
  thalweg::SmoothCarbon::Settings s;

  __device__ void window(double r, double& w, double& d_w) const {
    w = 1.0;
    d_w = 0.0;
    if (!(r > s.inner)) return;
    const double scale = 1.0 / (s.outer - s.inner), t = (r - s.inner) * scale, rest = 1.0 - t;
    w = 1.0 - t * t * t * (10.0 - t * (15.0 - 6.0 * t));
    d_w = -30.0 * t * t * rest * rest * scale;
  }
  /// Energy that lanes of this warp add for the atom whose edges are begin .. end - 1.
  __device__ double operator()(const NeighborView& list, const std::int32_t* types, int, std::int64_t begin,
                               std::int64_t end, const EdgeSlopes& slopes) const {
    double total = 0;
    for (std::int64_t e = begin + lane_index(); e < end; e += kLanes) {
      const Edge a(list, types, e);
      double w, d_w;
      window(a.r, w, d_w);
      const double g = exp(-s.stiffness * (a.r - s.r0)), well = g * g - 2.0 * g;
      total += 0.5 * s.depth * well * w;
      const double along = 0.5 * s.depth * (-2.0 * s.stiffness * (g * g - g) * w + well * d_w);
      double slope[3] = {along * a.u[0], along * a.u[1], along * a.u[2]};
      for (std::int64_t other = begin; other < end; ++other) {
        if (other == e) continue;
        const Edge b(list, types, other);
        double w_b, d_w_b;
        window(b.r, w_b, d_w_b);
        const double cosine = dot3(a.u, b.u), off = cosine + 0.5, energy = s.angle * off * off;
        const double turn = 2.0 * s.angle * off * w * w_b * a.inverse_r;
        total += 0.5 * energy * w * w_b;
        for (int k = 0; k < 3; ++k) slope[k] += energy * d_w * w_b * a.u[k] + turn * (b.u[k] - cosine * a.u[k]);
      }
      slopes.x[e] = slope[0];
      slopes.y[e] = slope[1];
      slopes.z[e] = slope[2];
    }
    return total;
  }
};

constexpr double kLargestExponent = 69.0776;  // as in potentials.cpp

struct TersoffEdges {
  int types_in_all;
  const TersoffTriplet* triplets;
  const TersoffBond* bonds;
  const TersoffWindow* windows;

  /// sin^2 instead of 1/2 - 1/2 sin, as TersoffWindow::at.
  __device__ void window(int which, double r, double& fc, double& slope) const {
    const double R = windows[which].R, D = windows[which].D;
    fc = r < R - D ? 1.0 : 0.0;
    slope = 0.0;
    if (r < R - D || r >= R + D) return;
    const double quarter = 0.25 * std::numbers::pi / D, x = quarter * (R + D - r), sine = sin(x);
    fc = sine * sine;
    slope = -2.0 * quarter * sine * cos(x);
  }

  struct Angle {
    double zeta, cosine, d_cosine, d_rij, d_rik;
  };
  /// What neighbour k adds to zeta of the bond to j; zeros beyond its cutoff.
  __device__ Angle angle(const TersoffTriplet& t, const Edge& to_j, const Edge& to_k) const {
    double fc, d_fc;
    window(t.window, to_k.r, fc, d_fc);
    if (fc == 0) return {0, 0, 0, 0, 0};
    const double cosine = dot3(to_j.u, to_k.u), x = t.h - cosine, inverse = 1.0 / (1.0 + x * x * t.inverse_d2),
                 scale = t.gamma * t.c2_by_d2;
    double g = t.gamma + scale * (x * x * t.inverse_d2) * inverse;
    double d_g = -2.0 * scale * x * t.inverse_d2 * inverse * inverse, d_rij = 0;
    if (t.lambda3 != 0) {
      const double apart = to_j.r - to_k.r, exponent = t.lambda3 * (t.cubic ? apart * apart * apart : apart);
      const double grown = exponent < -kLargestExponent ? 0.0 : exp(fmin(exponent, kLargestExponent));
      g *= grown;
      d_g *= grown;
      if (fabs(exponent) < kLargestExponent) d_rij = fc * g * t.lambda3 * (t.cubic ? 3.0 * apart * apart : 1.0);
    }
    return {fc * g, cosine, fc * d_g, d_rij, d_fc * g - d_rij};
  }

  __device__ double operator()(const NeighborView& list, const std::int32_t* types, int type, std::int64_t begin,
                               std::int64_t end, const EdgeSlopes& slopes) const {
    double total = 0;
    for (std::int64_t e = begin + lane_index(); e < end; e += kLanes) {
      const Edge to_j(list, types, e);
      const TersoffBond& bond = bonds[type * types_in_all + to_j.type];
      const TersoffTriplet* of_bond = triplets + (type * types_in_all + to_j.type) * types_in_all;
      double fc, d_fc, along = 0, by_zeta = 0;
      window(bond.window, to_j.r, fc, d_fc);
      if (fc != 0) {
        double zeta = 0;
        for (std::int64_t k = begin; k < end; ++k) {
          if (k == e) continue;
          const Edge to_k(list, types, k);
          zeta += angle(of_bond[to_k.type], to_j, to_k).zeta;
        }
        const double repulsion = bond.A * exp(-bond.lambda1 * to_j.r),
                     attraction = bond.B * exp(-bond.lambda2 * to_j.r);
        double order = 1.0, d_order = 0.0;
        if (const double reach = bond.beta * zeta; reach > 0) {
          const double s = bond.n * log(reach), small = exp(-fabs(s));
          order = exp(-((s > 0 ? s : 0.0) + log1p(small)) / (2.0 * bond.n));
          d_order = -0.5 * order * (s > 0 ? 1.0 : small) / (1.0 + small) / zeta;
        }
        const double pair = repulsion - order * attraction;
        total += 0.5 * fc * pair;
        along = 0.5 * (d_fc * pair + fc * (bond.lambda2 * order * attraction - bond.lambda1 * repulsion));
        by_zeta = -0.5 * fc * attraction * d_order;
      }
      slopes.by_zeta[e] = by_zeta;
      slopes.x[e] = along;
    }
    __syncwarp();  // by_zeta of all edges of this atom
    for (std::int64_t e = begin + lane_index(); e < end; e += kLanes) {
      const Edge a(list, types, e);
      const double along = slopes.x[e], own = slopes.by_zeta[e];
      double slope[3] = {along * a.u[0], along * a.u[1], along * a.u[2]};
      for (std::int64_t k = begin; k < end; ++k) {
        if (k == e) continue;
        const Edge b(list, types, k);
        const double other = slopes.by_zeta[k];
        if (own != 0) {  // this edge is the bond, the other one the third atom
          const Angle t = angle(triplets[(type * types_in_all + a.type) * types_in_all + b.type], a, b);
          const double turn = own * t.d_cosine * a.inverse_r, stretch = own * t.d_rij - turn * t.cosine;
          for (int c = 0; c < 3; ++c) slope[c] += turn * b.u[c] + stretch * a.u[c];
        }
        if (other != 0) {  // the other way round
          const Angle t = angle(triplets[(type * types_in_all + b.type) * types_in_all + a.type], b, a);
          const double turn = other * t.d_cosine * a.inverse_r, stretch = other * t.d_rik - turn * t.cosine;
          for (int c = 0; c < 3; ++c) slope[c] += turn * b.u[c] + stretch * a.u[c];
        }
      }
      slopes.x[e] = slope[0];  // only this lane reads or writes x of this edge
      slopes.y[e] = slope[1];
      slopes.z[e] = slope[2];
    }
    return total;
  }
};

template <class Edges>
__global__ void __launch_bounds__(kThreads)
    sum_edges(Rows rows, NeighborView list, const std::int32_t* type, Edges edges, EdgeSlopes slopes, Output out) {
  THALWEG_DYNAMIC_SHARED(double, scratch);  // kWarps
  std::int64_t first;
  int n;
  if (!begin_row(rows, list, out, first, n)) return;
  double touching = 0, total = 0;
  for (std::int64_t i = first + warp_index(); i < first + n; i += kWarps)
    for (std::int64_t e = i * list.capacity + lane_index(); e < i * list.capacity + list.count[i]; e += kLanes)
      touching += list.r[e] == 0;
  touching = block_sum(touching, scratch);
  if (touching > 0) {  // atoms on one point: gather_edges makes the forces NaN
    if (threadIdx.x == 0) list.usable[blockIdx.x] = 0;
    return;
  }
  for (std::int64_t i = first + warp_index(); i < first + n; i += kWarps)
    total += edges(list, type, type[i], i * list.capacity, i * list.capacity + list.count[i], slopes);
  total = block_sum(total, scratch);
  if (threadIdx.x == 0) out.energies[blockIdx.x] = total;
}

// Force on i: its own edges' slopes, minus those of the same pairs seen from the other end.
__global__ void __launch_bounds__(kThreads) gather_edges(Rows rows, NeighborView list, EdgeSlopes slopes, Output out) {
  std::int64_t first;
  int n;
  if (!begin_row(rows, list, out, first, n)) return;
  for (std::int64_t i = first + warp_index(); i < first + n; i += kWarps) {
    double x = 0, y = 0, z = 0;
    for (std::int64_t e = i * list.capacity + lane_index(); e < i * list.capacity + list.count[i]; e += kLanes) {
      const std::int64_t back = reverse_edge(list, i, e);
      x += slopes.x[e];
      y += slopes.y[e];
      z += slopes.z[e];
      if (back < 0) continue;  // its slope is zero there
      x -= slopes.x[back];
      y -= slopes.y[back];
      z -= slopes.z[back];
    }
    write_vector(out.forces, i, x, y, z, false);
  }
}

// ---- evaluators -----------------------------------------------------------------------------------------------------

class ListEvaluator : public Evaluator {
 public:
  ListEvaluator(const thalweg::Landscape& host, const BatchView& batch, Stream stream)
      : ListEvaluator(host, HostBatch(batch, stream), batch, stream) {}

  void evaluate(const double* positions, double* energies, double* forces, const std::uint8_t* skip,
                Stream stream) override {
    if (list_.structures() == 0) return;
    const Rows rows{offsets_, skip};
    list_.update(rows, positions, stream);
    compute(rows, list_.view(), {energies, forces}, stream);
    check_launch("a potential");
  }

 protected:
  virtual void compute(const Rows& rows, const NeighborView& list, const Output& out, Stream stream) = 0;
  unsigned blocks() const { return static_cast<unsigned>(list_.structures()); }
  const std::int32_t* types() const { return types_.data(); }
  PotentialTables tables_;

 private:
  ListEvaluator(const thalweg::Landscape& host, const HostBatch& on_host, const BatchView& batch, Stream stream)
      : tables_(potential_tables(host, on_host.view())),
        offsets_(batch.offsets),
        list_(on_host, tables_.cutoff, stream),
        types_(std::span<const std::int32_t>(tables_.type_of_atom), stream) {}

  const std::int64_t* offsets_;
  NeighborList list_;
  Array<std::int32_t> types_;
};

template <class T>
Array<T> uploaded(const std::vector<T>& values, Stream stream) {
  return Array<T>(std::span<const T>(values), stream);
}

template <class Pair>
class PairEvaluator : public ListEvaluator {
 public:
  template <class Make>
  PairEvaluator(const thalweg::Landscape& host, const BatchView& batch, Stream stream, Make make)
      : ListEvaluator(host, batch, stream),
        table_(uploaded(tables_.prior, stream)),
        pair_(make(tables_, table_.data())) {}

 private:
  void compute(const Rows& rows, const NeighborView& list, const Output& out, Stream stream) override {
    THALWEG_LAUNCH(sum_pairs<Pair>, blocks(), kThreads, kWarps * sizeof(double), native(stream), rows, list, types(),
                   pair_, out);
  }
  Array<PriorPair> table_;
  Pair pair_;
};

class EmbeddedEvaluator : public ListEvaluator {
 public:
  EmbeddedEvaluator(const thalweg::Landscape& host, const BatchView& batch, Stream stream)
      : ListEvaluator(host, batch, stream),
        pairs_(uploaded(tables_.embedded.pairs, stream)),
        walls_(uploaded(tables_.embedded.walls, stream)),
        atoms_(uploaded(tables_.embedded.atoms, stream)),
        d_energy_(batch.atoms) {}

 private:
  void compute(const Rows& rows, const NeighborView& list, const Output& out, Stream stream) override {
    const EmbeddedDevice device{tables_.embedded.slope, tables_.embedded.middle, static_cast<int>(tables_.types),
                                pairs_.data(),          walls_.data(),           atoms_.data()};
    THALWEG_LAUNCH(embed, blocks(), kThreads, kWarps * sizeof(double), native(stream), rows, list, types(), device,
                   d_energy_.data(), out);
  }
  Array<EmbeddedPair> pairs_;
  Array<EmbeddedWall> walls_;
  Array<EmbeddedAtom> atoms_;
  Array<double> d_energy_;
};

template <class Edges>
class EdgeEvaluator : public ListEvaluator {
 public:
  template <class Make>
  EdgeEvaluator(const thalweg::Landscape& host, const BatchView& batch, Stream stream, Make make)
      : ListEvaluator(host, batch, stream),
        atoms_(batch.atoms),
        triplets_(uploaded(tables_.tersoff.triplets, stream)),
        bonds_(uploaded(tables_.tersoff.bonds, stream)),
        windows_(uploaded(tables_.tersoff.windows, stream)),
        edges_(make(static_cast<int>(tables_.types), triplets_.data(), bonds_.data(), windows_.data())) {}

 private:
  void compute(const Rows& rows, const NeighborView& list, const Output& out, Stream stream) override {
    const std::size_t size = atoms_ * static_cast<std::size_t>(list.capacity);
    double* memory = slopes_.need(4 * size);
    const EdgeSlopes slopes{memory, memory + size, memory + 2 * size, memory + 3 * size};
    THALWEG_LAUNCH(sum_edges<Edges>, blocks(), kThreads, kWarps * sizeof(double), native(stream), rows, list, types(),
                   edges_, slopes, out);
    THALWEG_LAUNCH(gather_edges, blocks(), kThreads, 0, native(stream), rows, list, slopes, out);
  }
  std::size_t atoms_;
  Array<TersoffTriplet> triplets_;
  Array<TersoffBond> bonds_;
  Array<TersoffWindow> windows_;
  Edges edges_;
  Array<double> slopes_;
};

}  // namespace

LennardJones::LennardJones(const thalweg::LennardJones::Settings& settings) : host_(settings) {}
std::unique_ptr<Evaluator> LennardJones::evaluator(const BatchView& batch, Stream stream) const {
  return std::make_unique<PairEvaluator<LennardJonesPair>>(
      host_, batch, stream,
      [](const PotentialTables& tables, const PriorPair*) { return LennardJonesPair{tables.lennard_jones}; });
}

PairPrior::PairPrior(const thalweg::PairPrior::Settings& settings) : host_(settings) {}
std::unique_ptr<Evaluator> PairPrior::evaluator(const BatchView& batch, Stream stream) const {
  return std::make_unique<PairEvaluator<PriorPairs>>(
      host_, batch, stream, [](const PotentialTables& tables, const PriorPair* table) {
        return PriorPairs{table, static_cast<int>(tables.types), tables.repulsive, tables.repulsive && tables.sharp};
      });
}

std::unique_ptr<Evaluator> Emt::evaluator(const BatchView& batch, Stream stream) const {
  return std::make_unique<EmbeddedEvaluator>(thalweg::Emt(), batch, stream);
}

ManyBodyPrior::ManyBodyPrior(std::vector<thalweg::ManyBodyPrior::Pair> pairs,
                             std::vector<thalweg::ManyBodyPrior::Atom> atoms)
    : host_(std::move(pairs), std::move(atoms)) {}
std::unique_ptr<Evaluator> ManyBodyPrior::evaluator(const BatchView& batch, Stream stream) const {
  return std::make_unique<EmbeddedEvaluator>(host_, batch, stream);
}

SmoothCarbon::SmoothCarbon(const thalweg::SmoothCarbon::Settings& settings) : host_(settings) {}
std::unique_ptr<Evaluator> SmoothCarbon::evaluator(const BatchView& batch, Stream stream) const {
  return std::make_unique<EdgeEvaluator<SmoothCarbonEdges>>(
      host_, batch, stream, [this](int, const TersoffTriplet*, const TersoffBond*, const TersoffWindow*) {
        return SmoothCarbonEdges{host_.settings()};
      });
}

Tersoff::Tersoff(std::vector<thalweg::Tersoff::Entry> entries) : host_(std::move(entries)) {}
std::unique_ptr<Evaluator> Tersoff::evaluator(const BatchView& batch, Stream stream) const {
  return std::make_unique<EdgeEvaluator<TersoffEdges>>(
      host_, batch, stream,
      [](int types, const TersoffTriplet* triplets, const TersoffBond* bonds, const TersoffWindow* windows) {
        return TersoffEdges{types, triplets, bonds, windows};
      });
}

void evaluate(const Landscape& landscape, const BatchView& batch, double* energies, double* forces, Stream stream) {
  landscape.evaluator(batch, stream)->evaluate(batch.positions, energies, forces, nullptr, stream);
}

}  // namespace thalweg::cuda
