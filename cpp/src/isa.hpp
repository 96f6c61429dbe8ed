// Run-time choice between the copies of a kernel table compiled at x86-64-v2, -v3 and -v4.
//
// A per-ISA unit (*_isa.cpp) is compiled once per level with THALWEG_ISA = isa_v2 | isa_v3 | isa_v4 and defines
//     namespace thalweg::THALWEG_ISA { const FooKernels& foo_kernels() { ... } }
// RULE for those units: raw pointers and functions with internal linkage (anonymous namespace) only; no STL containers,
// no Eigen, no inline functions of shared headers beyond <cmath>/<cstdint>: the linker merges equal weak symbols, and
// an AVX-512 copy in generic code is a crash on another machine.
#pragma once

namespace thalweg {

enum class IsaLevel { v2 = 0, v3 = 1, v4 = 2 };
IsaLevel isa_level() noexcept;  // core.cpp

// Declares foo_kernels() of each level that was built and the dispatcher thalweg::foo_kernels().
#ifdef THALWEG_HAVE_V3
#define THALWEG_IF_V3(code) code
#else
#define THALWEG_IF_V3(code)
#endif
#ifdef THALWEG_HAVE_V4
#define THALWEG_IF_V4(code) code
#else
#define THALWEG_IF_V4(code)
#endif
#define THALWEG_DISPATCH(Table, function)                           \
  namespace isa_v2 {                                                \
  const Table& function();                                          \
  }                                                                 \
  THALWEG_IF_V3(namespace isa_v3 { const Table& function(); })      \
  THALWEG_IF_V4(namespace isa_v4 { const Table& function(); })      \
  static inline const Table& function() {                           \
    switch (isa_level()) {                                          \
      THALWEG_IF_V4(case IsaLevel::v4 : return isa_v4::function();) \
      THALWEG_IF_V3(case IsaLevel::v3 : return isa_v3::function();) \
      default:                                                      \
        return isa_v2::function();                                  \
    }                                                               \
  }

}  // namespace thalweg
