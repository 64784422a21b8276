// Rotary embedding in the half-split layout. Only ISA passes (cpu/runtime/isa.h) include this file.
#pragma once

#include "cpu/simd/vec.h"

namespace voxkern {
namespace {

// Rotates one head, x[0..D): pair (i, i + D/2) by the angle whose cosine is table[i] and whose sine
// is table[D/2 + i]. Computes in float32 and rounds once. `out` may be `x`.
template <typename T>
inline void rotate(const T* x, const float* table, int64_t D, T* out) {
  const int64_t half = D / 2;
  int64_t i = 0;
  for (; i + kWidth <= half; i += kWidth) {
    const vfloat low = load(x + i), high = load(x + half + i);
    const vfloat cos = load(table + i), sin = load(table + half + i);
    store(out + i, low * cos - high * sin);
    store(out + half + i, high * cos + low * sin);
  }
  if (const int64_t n = half - i) {
    const vfloat low = load_n(x + i, n), high = load_n(x + half + i, n);
    const vfloat cos = load_n(table + i, n), sin = load_n(table + half + i, n);
    store_n(out + i, low * cos - high * sin, n);
    store_n(out + half + i, high * cos + low * sin, n);
  }
}

}  // namespace
}  // namespace voxkern
