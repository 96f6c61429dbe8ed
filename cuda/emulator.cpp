#include "emulator.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <thread>
#include <utility>
#include <vector>

#ifndef __x86_64__
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
// The emulator's own book-keeping is not to be watched: fibers share it by design.
#define THALWEG_UNWATCHED __attribute__((no_sanitize("thread"), noinline))
#else
#define THALWEG_UNWATCHED
#endif

// ---- switching stacks -------------------------------------------------------------------------------------------

#ifdef __x86_64__
// Saves what a callee must preserve (System V ABI) and the stack pointer, takes up those of the other side.
extern "C" void thalweg_emulator_switch(void** from, void* to);
asm(R"(
.text
.globl thalweg_emulator_switch
.hidden thalweg_emulator_switch
.type thalweg_emulator_switch, @function
thalweg_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size thalweg_emulator_switch, .-thalweg_emulator_switch
)");
#endif

namespace thalweg::emulator {
namespace {

#ifdef __SANITIZE_THREAD__
constexpr std::size_t kStackBytes = 64 * 1024;  // each is mapped afresh, and its shadow with it
#else
constexpr std::size_t kStackBytes = 128 * 1024;
#endif
constexpr std::size_t kGuardBytes = 64 * 1024;  // below the stack; an overflow faults instead of writing elsewhere
constexpr int kMostThreads = 1024;
constexpr std::size_t kMostShared = 48 * 1024;  // what a launch may ask for without further ado
constexpr std::size_t kRedZone = 64;            // behind dynamic shared memory, where no sanitizer watches
constexpr unsigned char kUnset = 0xFF, kRed = 0xA5;

/// Stacks are kept for the next launch: to map one costs more than to run a small kernel on it.
class Stacks {
 public:
  ~Stacks() {
    for (unsigned char* stack : spare_) munmap(stack, kGuardBytes + kStackBytes);
  }
  unsigned char* take() {
    const std::lock_guard<std::mutex> lock(guard_);
    if (!spare_.empty()) {
      unsigned char* stack = spare_.back();
      spare_.pop_back();
      return stack;
    }
    void* stack = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
    mprotect(stack, kGuardBytes, PROT_NONE);
    return static_cast<unsigned char*>(stack);
  }
  void give_back(unsigned char* stack) {
#ifdef __SANITIZE_THREAD__
    munmap(stack, kGuardBytes + kStackBytes);  // memory that passes from thread to thread would look like a race
#else
    const std::lock_guard<std::mutex> lock(guard_);
    spare_.push_back(stack);
#endif
  }

 private:
  std::mutex guard_;
  std::vector<unsigned char*> spare_;
};

Stacks& stacks() {
  static Stacks all;
  return all;
}

/// A point at which something stopped, to be taken up again.
struct Context {
#ifdef __x86_64__
  void* stack_pointer = nullptr;
#else
  ucontext_t registers;
#endif
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* fiber = nullptr;       // ThreadSanitizer's
};

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Thread {
  Context context;
  State state = State::ready;
  dim3 index;
  int linear = 0;
  std::source_location where;  // of the barrier it waits at
  unsigned block_barriers = 0, warp_barriers = 0;
  unsigned char* stack = nullptr;
  std::uint64_t slot[2] = {};  // of exchange(), in turns: nobody overwrites what a slower lane still has to read
};

struct Block {
  Place place;
  Context scheduler;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_size = 0;
  std::vector<Thread> threads;
  Thread* current = nullptr;
  unsigned char* shared = nullptr;
  const std::function<void()>* body = nullptr;
  // What ThreadSanitizer takes for the barriers; in turns, or a barrier would pass on what its successor's early
  // arrivals did.
  char barrier[2] = {}, end = 0;
  char warp_barrier[kMostThreads / kWarp][2] = {};
};

thread_local Block* block_here = nullptr;

std::mutex failure_guard;
std::string failure_text;
cudaError_t failure = cudaSuccess;

void record_failure(cudaError_t error, const std::string& text) {
  const std::lock_guard<std::mutex> lock(failure_guard);
  if (failure != cudaSuccess) return;  // the first one counts
  failure = error;
  failure_text = text;
}

std::atomic<unsigned> thread_order{[] {
  const char* text = std::getenv("THALWEG_EMULATOR_ORDER");
  return text ? static_cast<unsigned>(std::atoi(text)) : 0u;
}()};

[[maybe_unused]] void release(void* at) {
#ifdef __SANITIZE_THREAD__
  __tsan_release(at);
#else
  (void)at;
#endif
}
[[maybe_unused]] void acquire(void* at) {
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(at);
#else
  (void)at;
#endif
}

THALWEG_UNWATCHED void switch_stacks(Context& from, Context& to) {
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(to.fiber, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef __x86_64__
  thalweg_emulator_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.registers, &to.registers);
#endif
}

/// From a thread back to the scheduler.
THALWEG_UNWATCHED void pause(State state) {
  Block* block = block_here;
  Thread* self = block->current;
  self->state = state;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(state == State::done ? nullptr : &self->context.fake_stack, block->scheduler_stack,
                                 block->scheduler_stack_size);
#endif
  switch_stacks(self->context, block->scheduler);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(self->context.fake_stack, nullptr, nullptr);
#endif
}

/// From the scheduler to a thread, until it pauses.
THALWEG_UNWATCHED void resume(Block& block, Thread& thread) {
  block.current = &thread;
  block.place.thread_index = thread.index;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&block.scheduler.fake_stack, thread.stack + kGuardBytes, kStackBytes);
#endif
  switch_stacks(block.scheduler, thread.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(block.scheduler.fake_stack, nullptr, nullptr);
#endif
}

void run_body() { (*block_here->body)(); }

/// Where a fiber begins.
THALWEG_UNWATCHED void enter() {
  Block* block = block_here;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_stack_size);
#endif
  run_body();
  release(&block->end);
  pause(State::done);
  std::abort();  // nobody resumes a thread that is done
}

THALWEG_UNWATCHED void prepare(Thread& thread) {
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(thread.stack + kGuardBytes, kStackBytes);  // frames of whoever had it before
#endif
  unsigned char* top = thread.stack + kGuardBytes + kStackBytes;
#ifdef __x86_64__
  // As if enter() had been called: after `ret` the stack pointer is 8 below a multiple of 16.
  void** frame = reinterpret_cast<void**>(top) - 2;
  frame[0] = reinterpret_cast<void*>(&enter);
  frame[1] = nullptr;
  thread.context.stack_pointer = frame - 6;
  std::fill_n(frame - 6, 6, nullptr);
#else
  getcontext(&thread.context.registers);
  thread.context.registers.uc_stack.ss_sp = thread.stack + kGuardBytes;
  thread.context.registers.uc_stack.ss_size = static_cast<std::size_t>(top - thread.stack) - kGuardBytes;
  thread.context.registers.uc_link = nullptr;
  makecontext(&thread.context.registers, reinterpret_cast<void (*)()>(&enter), 0);
#endif
}

std::string describe(const Thread& thread) {
  std::string text = "thread " + std::to_string(thread.linear);
  if (thread.state == State::done) return text + " (has ended)";
  std::string file = thread.where.file_name();
  file = file.substr(file.find_last_of('/') + 1);
  return text + " (waits at " + file + ":" + std::to_string(thread.where.line()) + ")";
}

bool same_place(const Thread& a, const Thread& b) {
  return a.where.line() == b.where.line() && a.where.column() == b.where.column() &&
         std::strcmp(a.where.file_name(), b.where.file_name()) == 0;
}

/// Lets the warps pass whose lanes all wait at one warp barrier. False, with the reason, where lanes have diverged.
THALWEG_UNWATCHED bool open_warps(Block& block, bool& opened, std::string& reason) {
  for (std::size_t first = 0; first < block.threads.size(); first += kWarp) {
    const std::size_t last = std::min(first + kWarp, block.threads.size());
    const Thread *waits = nullptr, *other = nullptr;
    for (std::size_t k = first; k < last; ++k) {
      const Thread& thread = block.threads[k];
      if (thread.state == State::at_warp_barrier && !waits) waits = &thread;
      if (thread.state != State::at_warp_barrier) other = &thread;
    }
    if (!waits) continue;
    for (std::size_t k = first; k < last; ++k)
      if (block.threads[k].state == State::at_warp_barrier && !same_place(*waits, block.threads[k]))
        other = &block.threads[k];
    if (other) {
      reason = "lanes of a warp have diverged: " + describe(*waits) + ", but " + describe(*other);
      return false;
    }
    for (std::size_t k = first; k < last; ++k) block.threads[k].state = State::ready;
    opened = true;
  }
  return true;
}

/// The same for the block.
THALWEG_UNWATCHED bool open_block(Block& block, std::string& reason) {
  const Thread *waits = nullptr, *other = nullptr;
  for (const Thread& thread : block.threads)
    if (thread.state == State::at_block_barrier && !waits) waits = &thread;
  for (const Thread& thread : block.threads)
    if (waits && (thread.state != State::at_block_barrier || !same_place(*waits, thread))) other = &thread;
  if (!waits) return true;
  if (other) {
    reason = (other->state == State::done ? "a thread has left before a barrier of its block: "
                                          : "threads of a block wait at different barriers: ") +
             describe(*waits) + ", but " + describe(*other);
    return false;
  }
  for (Thread& thread : block.threads) thread.state = State::ready;
  return true;
}

/// Runs one block to its end; returns what went wrong.
THALWEG_UNWATCHED std::string run_threads(Block& block, const std::vector<int>& order) {
  unsigned char* free_stack = nullptr;
  std::string reason;
  std::size_t left = block.threads.size();
  for (const int k : order) {
    Thread& thread = block.threads[static_cast<std::size_t>(k)];
    thread.stack = free_stack ? free_stack : stacks().take();
    free_stack = nullptr;
    prepare(thread);
    resume(block, thread);
    if (thread.state != State::done) continue;
    --left;
#ifndef __SANITIZE_THREAD__
    free_stack = thread.stack;  // it never waited: the next one may have its stack
    thread.stack = nullptr;
#endif
  }
  if (free_stack) stacks().give_back(free_stack);
  while (left > 0 && reason.empty()) {
    bool opened = false;
    if (!open_warps(block, opened, reason)) break;
    if (!opened && !open_block(block, reason)) break;
    for (const int k : order) {
      Thread& thread = block.threads[static_cast<std::size_t>(k)];
      if (thread.state != State::ready) continue;
      resume(block, thread);
      if (thread.state == State::done) --left;
    }
  }
  for (Thread& thread : block.threads)
    if (thread.stack) stacks().give_back(thread.stack);
  return reason;
}

/// Runs block number `number` on this OS thread.
THALWEG_UNWATCHED void run_block(Block& block, dim3 grid, dim3 shape, std::size_t number, std::size_t shared_bytes,
                                 const std::function<void()>& body, const std::vector<int>& order) {
  block.place = {{},
                 {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                  static_cast<unsigned>(number / grid.x / grid.y)},
                 shape,
                 grid};
  block.body = &body;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  constexpr std::size_t red_zone = 0;  // AddressSanitizer has one of its own
#else
  constexpr std::size_t red_zone = kRedZone;
#endif
  const std::unique_ptr<unsigned char[]> shared(new unsigned char[shared_bytes + red_zone]);
  std::fill_n(shared.get(), shared_bytes, kUnset);
  std::fill_n(shared.get() + shared_bytes, red_zone, kRed);
  block.threads.assign(order.size(), Thread{});
  for (std::size_t k = 0; k < order.size(); ++k) {
    Thread& thread = block.threads[k];
    const unsigned linear = static_cast<unsigned>(k);
    thread.linear = static_cast<int>(k);
    thread.index = {linear % shape.x, linear / shape.x % shape.y, linear / (shape.x * shape.y)};
#ifdef __SANITIZE_THREAD__
    thread.context.fiber = __tsan_create_fiber(0);
#endif
  }
#ifdef __SANITIZE_THREAD__
  block.scheduler.fiber = __tsan_get_current_fiber();
#endif
  block.shared = shared.get();
  block_here = &block;
  std::string reason = run_threads(block, order);
  block_here = nullptr;
  acquire(&block.end);
#ifdef __SANITIZE_THREAD__
  for (Thread& thread : block.threads) __tsan_destroy_fiber(thread.context.fiber);
#endif
  if (reason.empty() && std::count(shared.get() + shared_bytes, shared.get() + shared_bytes + red_zone, kRed) !=
                            static_cast<std::ptrdiff_t>(red_zone))
    reason = "the block wrote past the end of its dynamic shared memory of " + std::to_string(shared_bytes) + " bytes";
  if (!reason.empty()) record_failure(cudaErrorLaunchFailure, "block " + std::to_string(number) + ": " + reason);
}

}  // namespace

Place& place() { return block_here->place; }
void* dynamic_shared() { return block_here->shared; }
THALWEG_UNWATCHED int lane() { return block_here->current->linear % kWarp; }

THALWEG_UNWATCHED void block_barrier(const std::source_location& where) {
  Thread* self = block_here->current;
  self->where = where;
  char* sync = &block_here->barrier[self->block_barriers++ % 2];
  release(sync);
  pause(State::at_block_barrier);
  acquire(sync);
}

THALWEG_UNWATCHED void warp_barrier(const std::source_location& where) {
  Thread* self = block_here->current;
  self->where = where;
  char* sync = &block_here->warp_barrier[self->linear / kWarp][self->warp_barriers++ % 2];
  release(sync);
  pause(State::at_warp_barrier);
  acquire(sync);
}

THALWEG_UNWATCHED std::uint64_t exchange(std::uint64_t value, int source, const std::source_location& where) {
  Block* block = block_here;
  Thread* self = block->current;
  const unsigned turn = self->warp_barriers % 2;
  self->slot[turn] = value;
  warp_barrier(where);
  const std::size_t from = static_cast<std::size_t>(self->linear / kWarp * kWarp + source);
  return source >= 0 && source < kWarp && from < block->threads.size() ? block->threads[from].slot[turn] : value;
}

void set_order(unsigned order) { thread_order = order; }
const std::string& last_failure() { return failure_text; }

void run(dim3 grid, dim3 shape, std::size_t shared_bytes, const std::function<void()>& thread) {
  const std::size_t threads = std::size_t{shape.x} * shape.y * shape.z;
  if (threads < 1 || threads > kMostThreads || shape.z > 64)
    return record_failure(cudaErrorInvalidConfiguration, "a block of " + std::to_string(threads) + " threads");
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535)
    return record_failure(cudaErrorInvalidConfiguration, "a grid that is empty or too large");
  if (shared_bytes > kMostShared)
    return record_failure(cudaErrorInvalidConfiguration,
                          std::to_string(shared_bytes) + " bytes of dynamic shared memory; 48 kB are the most");
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  if (unsigned seed = thread_order; seed == 1) {
    std::reverse(order.begin(), order.end());
  } else if (seed > 1) {
    for (std::size_t k = threads - 1; k > 0; --k) {
      seed = seed * 1664525u + 1013904223u;
      std::swap(order[k], order[(seed >> 8) % (k + 1)]);
    }
  }
  const std::size_t blocks = std::size_t{grid.x} * grid.y * grid.z;
#ifdef __SANITIZE_THREAD__
  // A thread of its own for every block, so that nothing orders two of them; ThreadSanitizer bears about 8000 fibers.
  const std::size_t group = std::max<std::size_t>(2, 4000 / threads);
  for (std::size_t first = 0; first < blocks; first += group) {
    std::vector<std::thread> running;
    for (std::size_t k = first; k < std::min(first + group, blocks); ++k)
      running.emplace_back([&, k] {
        Block block;
        run_block(block, grid, shape, k, shared_bytes, thread, order);
      });
    for (std::thread& one : running) one.join();
  }
#else
#pragma omp parallel if (blocks > 1)
  {
    Block block;
#pragma omp for schedule(dynamic, 1)
    for (std::size_t k = 0; k < blocks; ++k) run_block(block, grid, shape, k, shared_bytes, thread, order);
  }
#endif
}

}  // namespace thalweg::emulator

// ---- runtime ------------------------------------------------------------------------------------------------------

cudaError_t cudaMalloc(void** out, std::size_t bytes) {
  *out = std::malloc(bytes == 0 ? 1 : bytes);
  if (*out == nullptr) return cudaErrorMemoryAllocation;
  std::memset(*out, thalweg::emulator::kUnset, bytes);
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t) {
  if (bytes > 0) std::memmove(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t) {
  if (bytes > 0) std::memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  const std::lock_guard<std::mutex> lock(thalweg::emulator::failure_guard);
  return std::exchange(thalweg::emulator::failure, cudaSuccess);
}
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
  }
  return "unknown error";
}
