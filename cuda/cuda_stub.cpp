// The CUDA interface in a build without it: every call says how to get it.
#include "thalweg/cuda.hpp"

namespace thalweg::cuda {
namespace {

[[noreturn]] void unavailable() {
  throw BackendUnavailable(
      "this build of thalweg has no CUDA kernels; with nvcc at hand (13.0 is tried) build it with "
      "cmake -DTHALWEG_CUDA=ON (Python: pip install . --config-settings=cmake.define.THALWEG_CUDA=ON), or use the CPU "
      "functions of the same names");
}

}  // namespace

const char* backend() noexcept { return "none"; }
bool available() noexcept { return false; }
void require() { unavailable(); }

void* allocate(std::size_t) { unavailable(); }
void release(void*) noexcept {}
void copy_to_device(void*, const void*, std::size_t, Stream) { unavailable(); }
void copy_to_host(void*, const void*, std::size_t, Stream) { unavailable(); }
void copy_on_device(void*, const void*, std::size_t, Stream) { unavailable(); }
void fill_bytes(void*, int, std::size_t, Stream) { unavailable(); }

Batch::Batch(const thalweg::BatchView&, Stream) : structures_(0), atoms_(0) { unavailable(); }
BatchView Batch::view() const { unavailable(); }

void evaluate(const Landscape&, const BatchView&, double*, double*, Stream) { unavailable(); }

LennardJones::LennardJones(const thalweg::LennardJones::Settings& settings) : host_(settings) { unavailable(); }
std::unique_ptr<Evaluator> LennardJones::evaluator(const BatchView&, Stream) const { unavailable(); }
std::unique_ptr<Evaluator> Emt::evaluator(const BatchView&, Stream) const { unavailable(); }
ManyBodyPrior::ManyBodyPrior(std::vector<thalweg::ManyBodyPrior::Pair> pairs,
                             std::vector<thalweg::ManyBodyPrior::Atom> atoms)
    : host_(std::move(pairs), std::move(atoms)) {
  unavailable();
}
std::unique_ptr<Evaluator> ManyBodyPrior::evaluator(const BatchView&, Stream) const { unavailable(); }
PairPrior::PairPrior(const thalweg::PairPrior::Settings& settings) : host_(settings) { unavailable(); }
std::unique_ptr<Evaluator> PairPrior::evaluator(const BatchView&, Stream) const { unavailable(); }
SmoothCarbon::SmoothCarbon(const thalweg::SmoothCarbon::Settings& settings) : host_(settings) { unavailable(); }
std::unique_ptr<Evaluator> SmoothCarbon::evaluator(const BatchView&, Stream) const { unavailable(); }
Tersoff::Tersoff(std::vector<thalweg::Tersoff::Entry> entries) : host_(std::move(entries)) { unavailable(); }
std::unique_ptr<Evaluator> Tersoff::evaluator(const BatchView&, Stream) const { unavailable(); }

struct Fingerprint::Tables {};
struct Fingerprint::Workspace::State {};
Fingerprint::Fingerprint(std::shared_ptr<const thalweg::Fingerprint>, Stream) { unavailable(); }
Fingerprint::~Fingerprint() = default;
Fingerprint::Workspace::Workspace(const Fingerprint&, const BatchView&, Stream) { unavailable(); }
Fingerprint::Workspace::~Workspace() = default;
void Fingerprint::values(const double*, double*, Workspace&, const std::uint8_t*, Stream) const { unavailable(); }
void Fingerprint::contract(const double*, double, double*, Workspace&, const std::uint8_t*, Stream) const {
  unavailable();
}
struct LocalDensity::Tables {};
struct LocalDensity::Workspace::State {};
LocalDensity::LocalDensity(std::shared_ptr<const thalweg::LocalDensity>, Stream) { unavailable(); }
LocalDensity::~LocalDensity() = default;
LocalDensity::Workspace::Workspace(const LocalDensity&, const BatchView&, Stream) { unavailable(); }
LocalDensity::Workspace::~Workspace() = default;
void LocalDensity::values(const double*, double*, Workspace&, const std::uint8_t*, Stream) const { unavailable(); }
void LocalDensity::contract(const double*, double, double*, Workspace&, const std::uint8_t*, Stream) const {
  unavailable();
}
struct Soap::Tables {};
struct Soap::Workspace::State {};
Soap::Soap(std::shared_ptr<const thalweg::Soap>, Stream) { unavailable(); }
Soap::~Soap() = default;
Soap::Workspace::Workspace(const Soap&, const BatchView&, Stream) { unavailable(); }
Soap::Workspace::~Workspace() = default;
void Soap::values(const double*, double*, Workspace&, const std::uint8_t*, Stream) const { unavailable(); }
void Soap::contract(const double*, double, double*, Workspace&, const std::uint8_t*, Stream) const { unavailable(); }
void gram(const Kernel&, std::size_t, std::size_t, const double*, double, double*, Stream) { unavailable(); }
Gpr::Gpr(std::size_t features, const Kernel&) : dimension_(features) { unavailable(); }
void Gpr::fit(std::size_t, const double*, std::span<const double>, Stream) { unavailable(); }
void Gpr::append(const double*, double, Stream) { unavailable(); }
void Gpr::predict(std::size_t, const double*, double, double*, double*, double*, double*, Stream) const {
  unavailable();
}
Surrogate::Surrogate(std::shared_ptr<const Fingerprint>, std::shared_ptr<const Gpr>, std::shared_ptr<const Landscape>,
                     std::vector<std::pair<std::int32_t, double>>, double) {
  unavailable();
}
std::unique_ptr<Evaluator> Surrogate::evaluator(const BatchView&, Stream) const { unavailable(); }

RelaxResult relax(const Landscape&, const BatchView&, const RelaxSettings&, const Confinement&, Stream) {
  unavailable();
}

BuildResult random_structures(const StructureView&, std::span<const std::int32_t>, const BuildSettings&, std::size_t,
                              Key, std::uint64_t, Stream) {
  unavailable();
}

struct QDelta::Impl {};
QDelta::QDelta(std::unique_ptr<Impl>) { unavailable(); }
QDelta::~QDelta() = default;
QDelta::QDelta(QDelta&&) noexcept = default;
QDelta& QDelta::operator=(QDelta&&) noexcept = default;
struct QState::Impl {};
QState::QState(std::shared_ptr<const QMap>, std::size_t, Stream) { unavailable(); }
QState::~QState() = default;
QState::QState(QState&&) noexcept = default;
QState& QState::operator=(QState&&) noexcept = default;
std::size_t QState::states() const { unavailable(); }
std::size_t QState::placed() const { unavailable(); }
void QState::place(std::span<const Placed>, Stream) { unavailable(); }
void QState::undo(Stream) { unavailable(); }
QDelta QState::retract(Stream) { unavailable(); }
QDelta QState::expand(std::span<const Placed>, Stream) { unavailable(); }
void QState::apply(QDelta, Stream) { unavailable(); }
void QState::q(const std::int64_t*, std::size_t, float*, Stream) const { unavailable(); }

}  // namespace thalweg::cuda
