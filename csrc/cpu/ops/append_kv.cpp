#include "params/append_kv.h"

#include "cpu/runtime/isa.h"

#ifdef VOX_ISA
#include "cpu/runtime/team.h"
#include "cpu/simd/rotary.h"

// Threads partition the tokens. A token's query heads are rotated in place, its key heads on the
// way to the pages.
namespace voxkern {
namespace {

template <typename T>
void append_token(const AppendKvParams& p, int64_t t) {
  const float* table = p.rope_table + p.positions[t] * p.D;
  T* q = static_cast<T*>(p.q) + t * p.q_stride;
  for (int64_t h = 0; h < p.Hq; ++h) rotate(q + h * p.D, table, p.D, q + h * p.D);

  const int64_t slot = p.slots[t];
  if (slot < 0) return;
  const int64_t page = slot / p.S, offset = slot % p.S;
  const T* k = static_cast<const T*>(p.k) + t * p.k_stride;
  const T* v = static_cast<const T*>(p.v) + t * p.v_stride;
  for (int64_t h = 0; h < p.Hkv; ++h) {
    const int64_t at = ((page * p.Hkv + h) * p.S + offset) * p.D;
    rotate(k + h * p.D, table, p.D, static_cast<T*>(p.k_pages) + at);
    __builtin_memcpy(static_cast<T*>(p.v_pages) + at, v + h * p.D, p.D * sizeof(T));
  }
}

template <typename T>
void run(const AppendKvParams& p) {
  parallel_for(p.T, 1, p.T * (p.Hq + 2 * p.Hkv) * p.D, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) append_token<T>(p, t);
  });
}

}  // namespace

namespace VOX_ISA {
void append_kv(const AppendKvParams& p) { p.dtype == Dtype::f32 ? run<float>(p) : run<bf16>(p); }
}  // namespace VOX_ISA

}  // namespace voxkern

#else

namespace voxkern {

VOX_KERNEL(append_kv, AppendKvParams)

namespace {

void append_kv_cpu(Tensor q, Tensor k, Tensor v, Tensor rope_table, Tensor positions, Tensor slots,
                   Tensor k_pages, Tensor v_pages) {
  const AppendKvParams p =
      append_kv_params(q, k, v, rope_table, positions, slots, k_pages, v_pages);
  check_positions_and_slots(p.positions, p.slots, p.T, rope_table.size(0), k_pages.size(0) * p.S);
  append_kv(p);
}

}  // namespace
}  // namespace voxkern

STABLE_TORCH_LIBRARY_IMPL(voxkern, CPU, m) {
  m.impl("append_kv", TORCH_BOX(&voxkern::append_kv_cpu));
}

#endif
