// The CUDA interface in a build without it: every call says how to get it.
#include "thalweg/cuda.hpp"

namespace thalweg::cuda {
namespace {

[[noreturn]] void unavailable() {
  throw BackendUnavailable(
      "this build of thalweg has no CUDA kernels; with nvcc 12 or later at hand build it with "
      "cmake -DTHALWEG_CUDA=ON (Python: pip install . -Ccmake.define.THALWEG_CUDA=ON), or use the CPU functions of the "
      "same names");
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

RelaxResult relax(const Landscape&, const BatchView&, const RelaxSettings&, const Confinement&, Stream) {
  unavailable();
}

}  // namespace thalweg::cuda
