// Activations as int8, for products with packed weights: symmetric, with a scale for each group of
// 32 columns. ISA passes quantize; the host measures how much memory that takes.
#pragma once

#include "../weight.h"
#include "arena.h"

namespace voxkern {
namespace {

struct QuantizedRows {
  int8_t* values;       // [M, C], -127 .. 127
  float* scales;        // [M, C / 32]
  int32_t* minus_sums;  // [M, C / 32], of the values: what an offset of W's values takes away

  QuantizedRows(Arena& arena, int64_t M, int64_t C)
      : values(arena.take<int8_t>(M * C)),
        scales(arena.take<float>(M * C / kGroup)),
        minus_sums(arena.take<int32_t>(M * C / kGroup)) {}
};

}  // namespace
}  // namespace voxkern

#ifdef VOX_ISA
#include "vec.h"

namespace voxkern {
namespace {

// Elements begin .. end of x [M, C], counted through all its rows; both multiples of 32.
//
// scale = largest magnitude / 127, values = x * (127 / largest magnitude), to nearest, ties to
// even. A group below 1e-30 is zero. One with a value that is not finite has the scale NaN, and so
// makes all outputs NaN.
template <typename T>
void quantize(const T* x, const QuantizedRows& out, int64_t begin, int64_t end) {
  constexpr int kVectors = kGroup / kWidth;
  const vfloat magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  for (int64_t group = begin / kGroup; group < end / kGroup; ++group) {
    vfloat values[kVectors];
    vint largest{};  // bits of magnitudes are ordered as they are, NaN above all
    for (int i = 0; i < kVectors; ++i) {
      values[i] = load(x + group * kGroup + i * kWidth);
      const vint bits = reinterpret_cast<vint>(as_uint(values[i]) & 0x7fffffffu);
      largest = bits > largest ? bits : largest;
    }
    const int32_t bits = reduce_max(largest);
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, sizeof magnitude);
    out.scales[group] = magnitude / 127.0f + magnitude * 0.0f;
    const vfloat inverse = splat(magnitude < 1e-30f ? 0.0f : 127.0f / magnitude);
    const bool finite = magnitude <= __FLT_MAX__;
    const vuint kept = vuint{} + (finite ? ~0u : 0u);
    vint sum{};
    for (int i = 0; i < kVectors; ++i) {
      const vfloat shifted = unfused(values[i] * inverse) + magic;
      const vint value = reinterpret_cast<vint>((as_uint(shifted) - as_uint(magic)) & kept);
      store_bytes(out.values + group * kGroup + i * kWidth, value);
      sum -= value;
    }
    out.minus_sums[group] = reduce_add(sum);
  }
}

}  // namespace
}  // namespace voxkern
#endif
