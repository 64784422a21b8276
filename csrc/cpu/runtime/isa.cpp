#include "cpu/runtime/isa.h"

#include <cstdlib>
#include <string>

#include "common/check.h"

namespace voxkern {
namespace {

const char* const kNames[] = {"baseline", "avx2", "avx512"};

bool supported(Isa isa) {
#if defined(__x86_64__) && !defined(VOX_BASELINE_ONLY)
  __builtin_cpu_init();
  switch (isa) {
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case Isa::baseline: return true;
  }
#endif
  return isa == Isa::baseline;
}

Isa choose() {
  if (const char* forced = std::getenv("VOXKERN_ISA"); forced && *forced) {
    for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
      if (std::string(forced) != kNames[static_cast<int>(isa)]) continue;
      check(supported(isa), "VOXKERN_ISA=", forced, ": this processor does not support it");
      return isa;
    }
    check(false, "VOXKERN_ISA=", forced, ": expected baseline, avx2 or avx512");
  }
  for (Isa isa : {Isa::avx512, Isa::avx2})
    if (supported(isa)) return isa;
  return Isa::baseline;
}

std::string cpu_isa() { return kNames[static_cast<int>(isa())]; }

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace voxkern

STABLE_TORCH_LIBRARY_IMPL(voxkern, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&voxkern::cpu_isa));
}
