// Every kernel on the emulator against its CPU twin. One table of cases; the order of a block's threads must not
// matter.
#include <functional>
#include <limits>
#include <numeric>

#include "../../cpp/tests/minitest.hpp"
#include "emulator.hpp"
#include "thalweg/cuda.hpp"
#include "thalweg/random.hpp"
#include "thalweg/surrogate.hpp"

using namespace thalweg;

namespace {

// Sanitizers cost a factor of ten to a hundred, so they get the same cases in smaller shapes and one order of threads.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSmall = true;
#else
constexpr bool kSmall = false;
#endif

/// 0: rising, 1: falling, others: shuffled.
std::vector<unsigned> orders(unsigned shuffled) {
  return kSmall ? std::vector<unsigned>{0} : std::vector<unsigned>{0, 1, shuffled};
}

/// A batch that owns its arrays.
struct Structures {
  std::vector<double> positions, cells;
  std::vector<std::int32_t> numbers;
  std::vector<std::int64_t> offsets{0};
  std::vector<std::uint8_t> pbc, fixed;

  BatchView view() const { return {positions, numbers, offsets, cells, pbc, fixed}; }
  /// n atoms of the species on a jittered lattice of this spacing.
  void add(std::size_t n, std::vector<std::int32_t> species, double spacing, bool periodic, std::uint64_t seed) {
    Random random({seed, 7}, n);
    std::size_t edge = 1;
    while (edge * edge * edge < n) ++edge;
    const double length = spacing * static_cast<double>(edge);
    for (std::size_t k = 0; k < n; ++k) {
      const std::size_t place[3] = {k % edge, k / edge % edge, k / edge / edge};
      for (const std::size_t p : place)
        positions.push_back(spacing * (static_cast<double>(p) + 0.25 * random.uniform()));
      numbers.push_back(species[k % species.size()]);
      for (int c = 0; c < 3; ++c) fixed.push_back(0);
    }
    const double skew = periodic ? 0.3 * spacing : 0.0;
    for (const double c : {length, 0.0, 0.0, skew, length, 0.0, 0.0, skew, length + 1.0}) cells.push_back(c);
    for (int k = 0; k < 3; ++k) pbc.push_back(periodic && k < 2 ? 1 : 0);  // a slab
    offsets.push_back(static_cast<std::int64_t>(numbers.size()));
  }
};

Structures ragged(std::vector<std::int32_t> species, double spacing) {
  Structures out;
  out.add(5, species, spacing, false, 1);
  out.add(8, species, spacing, true, 2);
  out.add(1, species, spacing, true, 3);
  out.add(kSmall ? 6 : 13, species, spacing, false, 4);
  return out;
}

/// Fewer atoms for what costs more each.
Structures few(std::vector<std::int32_t> species, double spacing) {
  if (!kSmall) return ragged(species, spacing);
  Structures out;
  out.add(2, species, spacing, false, 1);
  out.add(4, species, spacing, true, 2);
  out.add(1, species, spacing, true, 3);
  return out;
}

double largest(const std::vector<double>& x) {
  double most = 0;
  for (const double v : x) most = std::max(most, std::abs(v));
  return most;
}

/// NaN equals NaN.
double difference(const std::vector<double>& a, const std::vector<double>& b) {
  if (a.size() != b.size()) return std::numeric_limits<double>::infinity();
  double most = 0;
  for (std::size_t k = 0; k < a.size(); ++k)
    if (!(std::isnan(a[k]) && std::isnan(b[k])))
      most = std::isnan(a[k]) != std::isnan(b[k]) ? std::numeric_limits<double>::infinity()
                                                  : std::max(most, std::abs(a[k] - b[k]));
  return most;
}

struct LandscapeCase {
  const char* name;
  std::shared_ptr<const Landscape> host;
  std::shared_ptr<const cuda::Landscape> device;
  Structures structures;
};

std::vector<LandscapeCase> landscape_cases() {
  std::vector<LandscapeCase> out;
  const auto add = [&](const char* name, auto host, auto device, Structures structures) {
    out.push_back({name, host, device, std::move(structures)});
  };
  for (const bool smooth : {false, true}) {
    const LennardJones::Settings s{2.2, 0.4, 6.0, 0.0, smooth};
    add("lennard_jones", std::make_shared<LennardJones>(s), std::make_shared<cuda::LennardJones>(s), ragged({18}, 2.6));
  }
  add("emt", std::make_shared<Emt>(), std::make_shared<cuda::Emt>(), ragged({79, 28, 13}, 2.5));
  for (const auto form : {PairPrior::Form::bonding, PairPrior::Form::repulsive}) {
    PairPrior::Settings s;
    s.form = form;
    add("pair_prior", std::make_shared<PairPrior>(s), std::make_shared<cuda::PairPrior>(s), ragged({6, 1, 8}, 1.3));
  }
  {
    const std::vector<ManyBodyPrior::Pair> pairs{
        {79, 79, 0.8, 2.7, 4.0, 2.5}, {28, 79, 0.7, 2.5, 4.0, 2.2}, {28, 28, 0.9, 2.4, 4.0, 2.0}};
    const std::vector<ManyBodyPrior::Atom> atoms{{79, 0.5}, {28, 1.0}};
    add("many_body_prior", std::make_shared<ManyBodyPrior>(pairs, atoms),
        std::make_shared<cuda::ManyBodyPrior>(pairs, atoms), ragged({79, 28}, 1.9));
  }
  {
    const SmoothCarbon::Settings s;
    add("smooth_carbon", std::make_shared<SmoothCarbon>(s), std::make_shared<cuda::SmoothCarbon>(s), ragged({6}, 1.5));
  }
  for (const char* set : {"C", "BNC"})
    add("tersoff", std::make_shared<Tersoff>(Tersoff::published(set)),
        std::make_shared<cuda::Tersoff>(Tersoff::published(set)),
        set[0] == 'C' ? ragged({6}, 1.5) : ragged({5, 7, 6}, 1.5));
  {
    std::vector<Tersoff::Entry> entries = Tersoff::published("C");
    entries[0].lambda3 = 1.2;
    add("tersoff with lambda3", std::make_shared<Tersoff>(entries), std::make_shared<cuda::Tersoff>(entries),
        ragged({6}, 1.5));
  }
  return out;
}

struct Evaluated {
  std::vector<double> energies, forces;
};
Evaluated on_device(const cuda::Landscape& landscape, const BatchView& batch) {
  const cuda::Batch uploaded(batch);
  cuda::Array<double> energies(batch.size()), forces(3 * batch.atoms());
  cuda::evaluate(landscape, uploaded.view(), energies.data(), forces.data());
  return {energies.download(), forces.download()};
}

}  // namespace

TEST(landscapes_agree) {
  for (LandscapeCase& c : landscape_cases()) {
    c.structures.positions[3] = std::numeric_limits<double>::quiet_NaN();  // the first structure has no energy
    const BatchView batch = c.structures.view();
    std::vector<double> energies(batch.size()), forces(3 * batch.atoms());
    evaluate(*c.host, batch, energies, forces, 1);
    emulator::set_order(0);
    const Evaluated device = on_device(*c.device, batch);
    const double scale = std::max({1.0, std::abs(energies[1]), std::abs(energies[3])});
    CHECK(std::isnan(device.energies[0]) && std::isnan(device.forces[0]));
    CLOSE(difference(energies, device.energies), 0.0, 1e-12 * scale);
    std::vector<double> finite;
    for (const double f : forces) finite.push_back(std::isnan(f) ? 0.0 : f);
    CLOSE(difference(forces, device.forces), 0.0, 1e-11 * std::max(1.0, largest(finite)));
    for (const unsigned order : kSmall ? std::vector<unsigned>{} : orders(5)) {
      emulator::set_order(order);
      const Evaluated other = on_device(*c.device, batch);
      CHECK(difference(device.energies, other.energies) == 0 && difference(device.forces, other.forces) == 0);
    }
    emulator::set_order(0);
    if (minitest::failures()) std::printf("  (%s)\n", c.name);
  }
}

TEST(refusals_are_those_of_the_cpu) {
  const Structures copper_and_iron = ragged({29, 26}, 2.5);
  THROWS(on_device(cuda::Emt(), copper_and_iron.view()), "EMT has no parameters for Fe");
  THROWS(cuda::LennardJones({-1.0, 1.0, 0.0, 0.0, false}), "sigma");
}

TEST(atoms_on_one_point) {
  Structures s = ragged({6}, 1.5);
  for (std::size_t c = 0; c < 3; ++c) s.positions[3 + c] = s.positions[c];
  const Evaluated device = on_device(cuda::Tersoff(Tersoff::published("C")), s.view());
  CHECK(std::isnan(device.energies[0]) && std::isnan(device.forces[0]) && std::isfinite(device.energies[1]));
}

TEST(relaxations_agree) {
  Structures s = ragged({79, 28}, 2.6);
  s.add(9, {79, 28}, 2.4, true, 11);
  for (std::size_t k = 0; k < 3; ++k) s.fixed[k] = 1;  // an atom that stays,
  s.fixed[7] = 1;                                      // and one that keeps its y
  Confinement none, box, flat;
  box.active = flat.active = true;
  for (int k = 0; k < 3; ++k) {
    box.corner[k] = flat.corner[k] = -0.1;
    box.vectors[4 * k] = flat.vectors[4 * k] = 7.0;
  }
  box.vectors[1] = 0.5;   // skewed
  flat.vectors[8] = 0.0;  // atoms stay in planes
  flat.first_atom = 2;
  RelaxSettings settings;
  settings.steps = kSmall ? 3 : 25;
  settings.force_tolerance = 0.02;
  for (const Confinement& confinement : kSmall ? std::vector{box} : std::vector{none, box, flat}) {
    const RelaxResult host = relax(Emt(), s.view(), settings, confinement, 1);
    const cuda::Batch batch(s.view());
    std::vector<double> first_positions;
    for (const unsigned order : orders(9)) {
      emulator::set_order(order);
      const cuda::RelaxResult device = cuda::relax(cuda::Emt(), batch.view(), settings, confinement);
      const std::vector<double> positions = device.positions.download();
      CHECK(device.evaluations.download() == host.evaluations);
      CHECK(device.converged.download() == host.converged);
      CLOSE(difference(device.energies.download(), host.energies), 0.0, 1e-9);
      CLOSE(difference(positions, host.positions), 0.0, 1e-7);
      CLOSE(difference(device.forces.download(), host.forces), 0.0, 1e-6);
      if (order == 0) first_positions = positions;
      CHECK(positions == first_positions);
    }
    emulator::set_order(0);
  }
  settings.max_step = 0;
  const cuda::Batch batch(s.view());
  THROWS(cuda::relax(cuda::Emt(), batch.view(), settings, none), "max_step");
}

namespace {

/// Structures of one composition, as a fingerprint needs them.
Structures alike(std::size_t count, std::size_t n, double spacing, bool periodic) {
  Structures out;
  for (std::size_t k = 0; k < count; ++k) out.add(n, {79, 28}, spacing, periodic, 100 + k);
  return out;
}

std::vector<double> features_of(const Fingerprint& fingerprint, const BatchView& batch) {
  std::vector<double> out(batch.size() * fingerprint.size());
  Fingerprint::Workspace workspace(fingerprint);
  for (std::size_t row = 0; row < batch.size(); ++row)
    fingerprint.values(batch[row], out.data() + row * fingerprint.size(), workspace);
  return out;
}

cuda::Array<double> uploaded(const std::vector<double>& values) {
  return cuda::Array<double>(std::span<const double>(values));
}

}  // namespace

TEST(fingerprints_agree) {
  for (const bool periodic : {false, true})
    for (const auto convention : {FingerprintConvention::smooth, FingerprintConvention::agox})
      for (const bool angular : {true, false}) {
        if (kSmall && convention == FingerprintConvention::agox) continue;
        const Structures s = alike(kSmall ? 2 : 3, 6, 2.4, periodic);
        const BatchView batch = s.view();
        FingerprintSettings settings;
        settings.convention = convention;
        settings.angular = angular;
        settings.cutoff_radial = 5.1;
        settings.gamma = periodic ? 2.0 : 3.0;
        settings.sigma_radial = periodic ? 0.2 : 0.17;  // windows that do not end at bin edges
        const auto host = std::make_shared<const Fingerprint>(
            settings,
            batch[0].numbers == nullptr ? std::span<const std::int32_t>() : std::span(batch[0].numbers, batch[0].n),
            periodic);
        const std::size_t size = host->size();
        const std::vector<double> expected = features_of(*host, batch);
        std::vector<double> weights(expected.size()), gradient(3 * batch.atoms(), 0.0);
        Random random({3, 4}, 5);
        for (double& w : weights) w = random.uniform(-1.0, 1.0);
        for (std::size_t row = 0; row < batch.size(); ++row) {
          Fingerprint::Workspace workspace(*host);
          std::vector<double> scratch(size);
          host->values(batch[row], scratch.data(), workspace);
          host->contract(weights.data() + row * size, -0.5, gradient.data() + 3 * batch.offsets[row], workspace);
        }
        const cuda::Batch device(batch);
        const cuda::Fingerprint fingerprint(host);
        std::vector<double> first;
        for (const unsigned order : orders(3)) {
          emulator::set_order(order);
          cuda::Fingerprint::Workspace workspace(fingerprint, device.view());
          cuda::Array<double> features(expected.size()), forces(gradient.size());
          cuda::fill_bytes(forces.data(), 0, gradient.size() * sizeof(double));
          fingerprint.values(device.view().positions, features.data(), workspace);
          fingerprint.contract(uploaded(weights).data(), -0.5, forces.data(), workspace);
          CLOSE(difference(features.download(), expected), 0.0, 1e-11 * largest(expected));
          CLOSE(difference(forces.download(), gradient), 0.0, 1e-10 * largest(gradient));
          if (order == 0) first = forces.download();
          CHECK(first == forces.download());
        }
        emulator::set_order(0);
      }
}

namespace {

/// Descriptors of atoms, values and forces; the first structure has a coordinate that is not finite, so no features.
template <class Device, class Host>
void descriptor_agrees(const std::shared_ptr<const Host>& host, Structures structures, double tolerance) {
  structures.positions[4] = std::numeric_limits<double>::quiet_NaN();
  const BatchView batch = structures.view();
  const std::size_t size = host->size();
  std::vector<std::size_t> first{0};
  for (std::size_t row = 0; row < batch.size(); ++row) first.push_back(first.back() + host->rows(batch[row].n));
  const double nothing = std::numeric_limits<double>::quiet_NaN();
  std::vector<double> weights(first.back() * size), features(weights.size(), nothing),
      gradient(3 * batch.atoms(), 1.0);  // added to
  Random random({6, 1}, size);
  for (double& w : weights) w = random.uniform(-1.0, 1.0);
  std::fill_n(gradient.begin(), 3 * batch[0].n, nothing);
  for (std::size_t row = 1; row < batch.size(); ++row) {
    typename Host::Workspace workspace(*host);
    host->values(batch[row], features.data() + first[row] * size, workspace);
    host->contract(weights.data() + first[row] * size, -0.5, gradient.data() + 3 * batch.offsets[row], workspace);
  }
  std::vector<double> finite_features, finite_gradient;
  for (const double f : features) finite_features.push_back(std::isnan(f) ? 0.0 : f);
  for (const double g : gradient) finite_gradient.push_back(std::isnan(g) ? 0.0 : g);
  const cuda::Batch uploaded_batch(batch);
  const Device device(host);
  const auto run = [&](unsigned order, std::vector<double>& found, std::vector<double>& pulled) {
    emulator::set_order(order);
    typename Device::Workspace workspace(device, uploaded_batch.view());
    cuda::Array<double> out(features.size());
    cuda::Array<double> forces = uploaded(std::vector<double>(gradient.size(), 1.0));
    device.values(uploaded_batch.view().positions, out.data(), workspace);
    device.contract(uploaded(weights).data(), -0.5, forces.data(), workspace);
    found = out.download();
    pulled = forces.download();
  };
  std::vector<double> found, pulled, found_again, pulled_again;
  run(0, found, pulled);
  CLOSE(difference(found, features), 0.0, tolerance * largest(finite_features));
  CLOSE(difference(pulled, gradient), 0.0, tolerance * largest(finite_gradient));
  for (const unsigned order : kSmall ? std::vector<unsigned>{} : std::vector<unsigned>{1, 6}) {
    run(order, found_again, pulled_again);
    CHECK(difference(found, found_again) == 0 && difference(pulled, pulled_again) == 0);
  }
  emulator::set_order(0);
}

SoapSettings soap_settings(double r_cut, int n_max, int l_max, double sigma, SoapCutoff cutoff, SoapAverage average) {
  return {r_cut, n_max, l_max, sigma, cutoff, average};
}

}  // namespace

TEST(local_densities_agree) {
  // More species than a warp has lanes; the batch has two.
  std::vector<std::int32_t> many(40);
  std::iota(many.begin(), many.end(), 1);
  for (const std::vector<std::int32_t>& species : {std::vector<std::int32_t>{8, 22}, many})
    descriptor_agrees<cuda::LocalDensity>(
        std::make_shared<const LocalDensity>(DensitySettings{1.3, kSmall ? 4.0 : 6.5}, species), few({22, 8}, 2.2),
        1e-12);
  Structures touching = ragged({22, 8}, 2.2);
  std::copy_n(touching.positions.begin(), 3, touching.positions.begin() + 3);
  const std::vector<std::int32_t> species{8, 22};
  const cuda::LocalDensity density(std::make_shared<const LocalDensity>(DensitySettings{}, species));
  const cuda::Batch batch(touching.view());
  cuda::LocalDensity::Workspace workspace(density, batch.view());
  cuda::Array<double> features(touching.numbers.size() * 3);
  density.values(batch.view().positions, features.data(), workspace);
  const std::vector<double> found = features.download();
  CHECK(std::isnan(found[0]) && std::isnan(found[5 * 3 - 1]) && std::isfinite(found[5 * 3]));
  const std::vector<double> zeros(3 * touching.numbers.size());
  cuda::Array<double> gradient{std::span<const double>(zeros)};
  density.contract(features.data(), 1.0, gradient.data(), workspace);
  const std::vector<double> slopes = gradient.download();
  CHECK(std::isnan(slopes[0]) && std::isnan(slopes[3 * 5 - 1]) && std::isfinite(slopes[3 * 5]));
  cuda::LocalDensity::Workspace fresh(density, batch.view());
  THROWS(density.contract(features.data(), 1.0, gradient.data(), fresh), "contract() needs values()");
  const Structures other = ragged({22, 1}, 2.2);
  THROWS(cuda::LocalDensity::Workspace(density, cuda::Batch(other.view()).view()),
         "structure 0 of the batch: this local density was not made for atomic number 1");
}

TEST(soaps_agree) {
  using enum SoapCutoff;
  using enum SoapAverage;
  const std::vector<std::int32_t> species{8, 22, 38};  // the batch lacks one
  std::vector<SoapSettings> cases{soap_settings(2.5, 3, 2, 0.4, smooth, off),
                                  soap_settings(2.2, 2, 3, 0.5, hard, mean)};
  if (!kSmall)
    for (const SoapSettings& more :
         {soap_settings(4.0, 6, 4, 0.5, smooth, off), soap_settings(3.0, 2, 7, 0.5, smooth, sum),
          soap_settings(3.0, 1, 0, 0.9, smooth, off), soap_settings(6.0, 8, 12, 0.3, hard, off)})  // narrow tiles
      cases.push_back(more);
  for (const SoapSettings& settings : cases)
    descriptor_agrees<cuda::Soap>(std::make_shared<const Soap>(settings, species), few({22, 8}, 2.2), 1e-11);
  const std::vector<std::int32_t> oxygen{8};
  const cuda::Soap soap(std::make_shared<const Soap>(SoapSettings{}, oxygen));
  const Structures s = ragged({22, 8}, 2.2);
  const cuda::Batch batch(s.view());
  THROWS(cuda::Soap::Workspace(soap, batch.view()), "structure 0 of the batch: this SOAP was made for O");
}

TEST(gaussian_processes_agree) {
  const std::size_t dimension = 21, count_of_candidates = kSmall ? 3 : 18;
  Random random({8, 8}, 8);
  Kernel kernel;
  kernel.length_long = 6.0;
  kernel.length_short = 1.5;
  for (const std::size_t n :
       kSmall ? std::vector<std::size_t>{37} : std::vector<std::size_t>{3, 70}) {  // within one panel, and over three
    std::vector<double> x(n * dimension), y(n), candidates(count_of_candidates * dimension);
    for (double& v : x) v = random.uniform(-2.0, 2.0);
    for (double& v : y) v = random.uniform(-5.0, 5.0);
    for (double& v : candidates) v = random.uniform(-2.0, 2.0);
    std::copy_n(x.begin(), dimension, candidates.begin());  // one of the points itself
    thalweg::Gpr host(dimension, kernel);
    host.fit(x, y);
    cuda::Gpr device(dimension, kernel);
    device.fit(n, uploaded(x).data(), y);
    const auto compare = [&] {
      const std::size_t count = candidates.size() / dimension;
      std::vector<double> mean(count), sigma(count), gradient(candidates.size()), of_sigma(candidates.size());
      host.predict(count, candidates.data(), 1.7, mean.data(), sigma.data(), gradient.data(), of_sigma.data());
      cuda::Array<double> at = uploaded(candidates), m(count), s(count), g(candidates.size()), gs(candidates.size());
      device.predict(count, at.data(), 1.7, m.data(), s.data(), g.data(), gs.data());
      CLOSE(difference(m.download(), mean), 0.0, 1e-9);
      CLOSE(difference(s.download(), sigma), 0.0, 1e-7);
      CLOSE(difference(g.download(), gradient), 0.0, 1e-7);
      CLOSE(difference(gs.download(), of_sigma), 0.0, 1e-7 * std::max(1.0, largest(of_sigma)));
      CLOSE(device.mean(), host.mean(), 1e-12);
    };
    compare();
    const int appended = kSmall ? 1 : 3;
    for (int k = 0; k < appended; ++k) {
      std::vector<double> feature(dimension);
      for (double& v : feature) v = random.uniform(-2.0, 2.0);
      host.append(feature, 1.0 + k);
      device.append(uploaded(feature).data(), 1.0 + k);
      compare();
    }
    CHECK(device.size() == n + static_cast<std::size_t>(appended));
    cuda::Array<double> matrix(n * n);
    cuda::gram(kernel, n, dimension, uploaded(x).data(), 0.0, matrix.data());
    const std::vector<double> k = matrix.download();
    const double d2 = [&] {
      double sum = 0;
      for (std::size_t d = 0; d < dimension; ++d) sum += std::pow(x[d] - x[dimension + d], 2);
      return sum;
    }();
    CLOSE(k[0], 100.0 + 1e-5, 1e-10);
    CLOSE(k[n], 99.0 * std::exp(-d2 / 72.0) + std::exp(-d2 / 4.5), 1e-10);
  }
}

TEST(surrogates_agree_and_relax) {
  const Structures data = alike(12, 5, 2.5, false), start = alike(kSmall ? 2 : 4, 5, 2.7, false);
  const auto fingerprint =
      std::make_shared<const Fingerprint>(FingerprintSettings{}, std::span(data.numbers.data(), std::size_t{5}), false);
  const std::vector<double> x = features_of(*fingerprint, data.view());
  std::vector<double> energies(12), forces(3 * data.view().atoms());
  evaluate(Emt(), data.view(), energies, forces, 1);
  const auto gpr = std::make_shared<thalweg::Gpr>(fingerprint->size(), Kernel{});
  gpr->fit(x, energies);
  const auto device_gpr = std::make_shared<cuda::Gpr>(fingerprint->size(), Kernel{});
  device_gpr->fit(12, uploaded(x).data(), energies);
  const auto prior = std::make_shared<PairPrior>(PairPrior::Settings{});
  const auto device_prior = std::make_shared<cuda::PairPrior>(PairPrior::Settings{});
  const Surrogate host(fingerprint, gpr, prior, {{79, -1.0}}, 2.0);
  const cuda::Surrogate device(std::make_shared<cuda::Fingerprint>(fingerprint), device_gpr, device_prior, {{79, -1.0}},
                               2.0);
  std::vector<double> host_energies(start.view().size()), host_forces(3 * start.view().atoms());
  evaluate(host, start.view(), host_energies, host_forces, 1);
  const Evaluated found = on_device(device, start.view());
  CLOSE(difference(found.energies, host_energies), 0.0, 1e-9);
  CLOSE(difference(found.forces, host_forces), 0.0, 1e-8);
  RelaxSettings settings;
  settings.steps = kSmall ? 1 : 8;
  const RelaxResult relaxed = relax(host, start.view(), settings, {}, 1);
  const cuda::Batch batch(start.view());
  const cuda::RelaxResult on_gpu = cuda::relax(device, batch.view(), settings, {});
  CHECK(on_gpu.evaluations.download() == relaxed.evaluations);
  CLOSE(difference(on_gpu.energies.download(), relaxed.energies), 0.0, 1e-7);
  CLOSE(difference(on_gpu.positions.download(), relaxed.positions), 0.0, 1e-6);
}

TEST(q_maps_agree) {
  struct Case {
    std::vector<std::int64_t> shape;
    std::vector<std::uint8_t> periodic;
    std::int32_t kernel, dilation, width;
  };
  // Kernels that reach round a periodic grid and beyond open walls; an atom wider than a periodic direction.
  std::vector<Case> cases{{{5, 4}, {1, 0}, 3, 2, 3}};
  if (!kSmall) {
    cases.push_back({{9, 8, 7}, {1, 0, 1}, 3, 1, 3});
    cases.push_back({{5, 9, 6}, {1, 1, 0}, 5, 2, 7});
  }
  for (const Case& c : cases) {
    const auto dimension = static_cast<std::int32_t>(c.shape.size());
    Random random({2, 9}, c.shape.size());
    const auto numbers = [&](std::int64_t count, double scale) {
      std::vector<float> out(static_cast<std::size_t>(count));
      for (float& x : out) x = static_cast<float>(scale * random.uniform(-1.0, 1.0));
      return out;
    };
    const auto power = [&](std::int32_t k) { return std::int64_t{dimension == 2 ? 1 : k} * k * k; };
    const std::int32_t species = 2, channels[] = {species, 5, 4, species};
    std::vector<QLayer> layers;
    for (std::size_t l = 0; l < 3; ++l)
      layers.push_back({channels[l], channels[l + 1], c.kernel, c.dilation,
                        numbers(power(c.kernel) * channels[l] * channels[l + 1],
                                1.0 / std::sqrt(static_cast<double>(power(c.kernel)) * channels[l])),
                        numbers(channels[l + 1], 0.1)});
    const auto map = std::make_shared<const QMap>(
        std::make_shared<const QNetwork>(
            dimension, layers,
            QRepresentation{species, species, c.width, numbers(power(c.width) * species * species, 0.5),
                            numbers(species, 0.1)}),
        c.shape, c.periodic);
    const std::size_t states = kSmall ? 2 : 3, voxels = static_cast<std::size_t>(map->voxels()),
                      of_state = species * voxels;
    std::vector<std::int64_t> asked;
    for (std::size_t k = 0; k < states * voxels; ++k) asked.push_back(static_cast<std::int64_t>(k % voxels));
    const cuda::Array<std::int64_t> device_asked(std::span<const std::int64_t>{asked});
    std::vector<float> first;
    for (const unsigned order : orders(4)) {
      emulator::set_order(order);
      cuda::QState device(map, states);
      std::vector<std::vector<Placed>> placed(states);
      const auto q = [&] {
        cuda::Array<float> out(states * of_state);
        device.q(device_asked.data(), voxels, out.data());
        return out.download();
      };
      const auto check = [&] {
        const std::vector<float> found = q();
        for (std::size_t k = 0; k < states && order == 0; ++k) {
          const std::vector<float> wanted = map->dense(placed[k]);
          double most = 0;
          for (std::size_t v = 0; v < of_state; ++v)
            most = std::max(most, std::abs(static_cast<double>(found[k * of_state + v]) - wanted[v]));
          CLOSE(most, 0.0, 3e-6);
        }
        return found;
      };
      Random atoms({2, 10}, 3);
      const auto some = [&] {
        std::vector<Placed> out;
        for (std::size_t k = 0; k < states; ++k)
          out.push_back({static_cast<std::int32_t>(atoms.uniform(0.0, 2.0)),
                         static_cast<std::int64_t>(atoms.uniform(0.0, static_cast<double>(voxels)))});
        return out;
      };
      std::vector<std::vector<float>> seen{check()};
      for (int step = 0; step < (kSmall ? 2 : 3); ++step) {
        const std::vector<Placed> next = some();
        cuda::QDelta change = device.expand(next);
        CHECK(q() == seen.back());  // nothing is placed yet
        device.apply(std::move(change));
        for (std::size_t k = 0; k < states; ++k) placed[k].push_back(next[k]);
        seen.push_back(check());
      }
      cuda::QDelta last = device.retract();
      CHECK(q() == seen[seen.size() - 2] && device.placed() + 2 == seen.size());
      cuda::QDelta other = device.retract();
      THROWS(device.apply(std::move(last)), "other atoms placed");
      device.apply(std::move(other));
      CHECK(q() == seen[seen.size() - 2]);
      if (order == 0) first = q();
      CHECK(q() == first);
      THROWS(device.place(std::vector<Placed>(states, {2, 0})), "species go from 0 to 1");
      THROWS(device.place(std::vector<Placed>(states, {0, map->voxels()})), "voxels to");
      THROWS(device.place(std::vector<Placed>(1)), "one atom for each of the " + std::to_string(states) + " states");
      while (device.placed() > 0) device.undo();
      CHECK(q() == seen[0]);
      THROWS(device.undo(), "no atom is placed");
    }
    emulator::set_order(0);
  }
}

TEST(random_structures_are_the_same) {
  // A cluster; a slab as a template in a skewed periodic cell whose box folds; a flat box.
  const double cube[9] = {12, 0, 0, 0, 12, 0, 0, 0, 12}, skewed[9] = {5.5, 0, 0, 1.5, 6, 0, 0, 0, 14};
  const std::uint8_t open[3] = {0, 0, 0}, slab[3] = {1, 1, 0};
  const double layer[12] = {0, 0, 3, 2.75, 0, 3, 0.75, 3, 3, 3.5, 3, 3};
  const std::int32_t silver[4] = {47, 47, 47, 47}, placed[6] = {79, 28, 79, 28, 8, 1};
  BuildSettings cluster, on_slab, sheet;
  cluster.box.active = on_slab.box.active = sheet.box.active = true;
  for (int k = 0; k < 3; ++k) {
    cluster.box.corner[k] = sheet.box.corner[k] = 3.0;
    cluster.box.vectors[4 * k] = 6.0;
    sheet.box.vectors[4 * k] = k < 2 ? 9.0 : 0.0;
    on_slab.box.open[k] = k < 2;
  }
  on_slab.box.corner[2] = 3.5;
  std::copy_n(skewed, 6, on_slab.box.vectors);
  on_slab.box.vectors[8] = 4.0;
  struct Case {
    StructureView frame;
    BuildSettings settings;
  };
  BuildSettings hopeless = cluster;  // some rows fail
  hopeless.tries_per_atom = 2;
  hopeless.tries_per_structure = 1;
  const Case cases[] = {{{0, nullptr, nullptr, cube, open, nullptr}, cluster},
                        {{0, nullptr, nullptr, cube, open, nullptr}, hopeless},
                        {{4, layer, silver, skewed, slab, nullptr}, on_slab},
                        {{0, nullptr, nullptr, cube, open, nullptr}, sheet}};
  for (const Case& c : cases) {
    const std::size_t count = kSmall ? 20 : 300;
    const BuildResult host = random_structures(c.frame, placed, c.settings, count, {5, 6}, 1000, 1);
    const cuda::BuildResult device = cuda::random_structures(c.frame, placed, c.settings, count, {5, 6}, 1000);
    CHECK(device.ok.download() == host.ok);
    CHECK(device.positions.download() == host.positions);
  }
  THROWS(cuda::random_structures(cases[0].frame, placed, BuildSettings{}, 1, {1, 2}, 0), "needs a box");
}

MINITEST_MAIN
