// Runtime dispatch: one kernel source, compiled for several instruction sets (ISAs).
//
// Each csrc/cpu/ops/<op>.cpp is compiled once without VOX_ISA (the host pass: the wrapper at the
// foot of the file, which registers the op) and once per ISA with VOX_ISA=<name> and its compiler
// flags (an ISA pass: the kernel, in namespace voxkern::<name>).
//
// An ISA pass must not emit a symbol that another object could share, such as a std:: template or
// an inline function with external linkage: the linker might keep the AVX-512 copy for all. So
// kernel code lives in an anonymous namespace and includes neither torch nor std containers.
// tests/ops/test_build.py checks the objects.
#pragma once

namespace voxkern {

enum class Isa { baseline, avx2, avx512 };

// The best ISA that both the processor and the build support, or the one that VOXKERN_ISA names.
Isa isa();

}  // namespace voxkern

#if defined(__x86_64__) && !defined(VOX_BASELINE_ONLY)
#define VOX_KERNEL(name, Params)                         \
  namespace baseline {                                   \
  void name(const Params&);                              \
  }                                                      \
  namespace avx2 {                                       \
  void name(const Params&);                              \
  }                                                      \
  namespace avx512 {                                     \
  void name(const Params&);                              \
  }                                                      \
  inline void name(const Params& params) {               \
    switch (isa()) {                                     \
      case Isa::avx512: return avx512::name(params);     \
      case Isa::avx2: return avx2::name(params);         \
      case Isa::baseline: return baseline::name(params); \
    }                                                    \
  }
#else
#define VOX_KERNEL(name, Params) \
  namespace baseline {           \
  void name(const Params&);      \
  }                              \
  inline void name(const Params& params) { baseline::name(params); }
#endif
