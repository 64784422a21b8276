#include "params/silu_mul.h"

#include "cpu/runtime/isa.h"

#ifdef VOX_ISA
#include "cpu/runtime/team.h"
#include "cpu/simd/silu.h"

// Threads partition the elements of out; a part may begin and end inside a row. Computed in
// float32, rounded once at the store.
namespace voxkern {
namespace {

template <typename T>
void run(const SiluMulParams& p) {
  // With its exponential, an element costs about as much as copying 8.
  parallel_for(p.rows * p.F, kWidth, p.rows * p.F * 8, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / p.F, at = begin % p.F;
      const int64_t n = end - begin < p.F - at ? end - begin : p.F - at;
      const T* const gate = static_cast<const T*>(p.gate_up) + row * 2 * p.F + at;
      silu_mul_row(gate, gate + p.F, static_cast<T*>(p.out) + begin, n);
      begin += n;
    }
  });
}

}  // namespace

namespace VOX_ISA {
void silu_mul(const SiluMulParams& p) { p.dtype == Dtype::f32 ? run<float>(p) : run<bf16>(p); }
}  // namespace VOX_ISA

}  // namespace voxkern

#else

namespace voxkern {

VOX_KERNEL(silu_mul, SiluMulParams)

namespace {

Tensor silu_mul_cpu(Tensor gate_up) {
  gate_up = torch::stable::contiguous(gate_up);
  Tensor out = silu_mul_out(gate_up);
  silu_mul(silu_mul_params(gate_up, out));
  return out;
}

}  // namespace
}  // namespace voxkern

STABLE_TORCH_LIBRARY_IMPL(voxkern, CPU, m) {
  m.impl("silu_mul", TORCH_BOX(&voxkern::silu_mul_cpu));
}

#endif
