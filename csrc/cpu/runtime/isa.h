// One kernel source, several instruction sets, chosen when the program runs.
//
// Each csrc/cpu/ops/<op>.cpp is compiled once for the host, without VOX_ISA: its foot, which wraps
// and registers the op. And once per instruction set, with VOX_ISA=<name> and that set's flags: its
// kernel, in namespace voxkern::<name>. Code of an ISA pass must not emit a symbol that another
// object could share (a std:: template, an inline function of external linkage): the linker might
// keep the AVX-512 copy for all. So such code sits in an anonymous namespace and includes neither
// torch nor the containers; tests/test_build.py checks the objects.
#pragma once

namespace voxkern {

enum class Isa { baseline, avx2, avx512 };

// The best one that processor and build have, or the one that VOXKERN_ISA names.
Isa isa();

}  // namespace voxkern

#if defined(__x86_64__)
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
