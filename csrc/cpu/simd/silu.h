// silu(gate) * up of SwiGLU, for silu_mul.cpp and layers.h. Only ISA passes include it.
#pragma once

#include "cpu/simd/math.h"

namespace voxkern {
namespace {

// a / (1 + exp(-a)), computed from exp(-|a|), which cannot overflow.
VOX_INLINE vfloat silu(vfloat a) {
  const vint negative = a < vfloat{};
  const vfloat e = exp(select(negative, a, -a));
  return a * select(negative, e, splat(1.0f)) / (splat(1.0f) + e);
}

// out[i] = silu(gate[i]) * up[i], rounded once at the store.
template <typename T>
inline void silu_mul_row(const T* gate, const T* up, T* out, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(out + i, silu(load(gate + i)) * load(up + i));
  if (i < n) store_n(out + i, silu(load_n(gate + i, n - i)) * load_n(up + i, n - i), n - i);
}

}  // namespace
}  // namespace voxkern
