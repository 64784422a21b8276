// Activations as int8, for products with packed weights: symmetric, with a scale for each group of
// 32 columns. ISA passes quantize; the host measures how much memory that takes.
#pragma once

#include "common/arena.h"
#include "common/weight.h"

namespace voxkern {
namespace {

// Tiles of up to kPackedTileM rows of x lie one after the other, all of one height but the last.
// Each has, group after group, what belongs to its rows.
struct QuantizedRows {
  int8_t* values;        // [tiles, C / 32, rows of the tile, 32], -127 .. 127
  float* scales;         // [tiles, C / 32, rows of the tile]
  int32_t* minus_8sums;  // of the values: what an offset of W's takes away, which is 8 or 128

  QuantizedRows(Arena& arena, int64_t M, int64_t C)
      : values(arena.take<int8_t>(M * C)),
        scales(arena.take<float>(M * C / kGroup)),
        minus_8sums(arena.take<int32_t>(M * C / kGroup)) {}
};

}  // namespace
}  // namespace voxkern

#ifdef VOX_ISA
#include "cpu/simd/vec.h"

namespace voxkern {
namespace {

// W passes by once for so many rows of x: as many as its registers hold chains and sums for.
constexpr int64_t kPackedTileM = kWidth == 16 ? 8 : 4;

// Of M rows of x. Tiles have one height, so that none is too low to be worth unpacking W.
inline int64_t packed_tile_rows(int64_t M) {
  const int64_t tiles = (M + kPackedTileM - 1) / kPackedTileM;
  return (M + tiles - 1) / tiles;
}

// scale = largest magnitude / 127, values = x * (127 / largest magnitude), to nearest, ties to
// even. A group below 1e-30 is zero. One with a value that is not finite has the scale NaN, and so
// makes all outputs NaN.
template <typename T>
VOX_INLINE void quantize_group(const T* x, const QuantizedRows& out, int64_t at) {
  constexpr int kVectors = kGroup / kWidth;
  const vfloat magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  vfloat values[kVectors];
  vint largest{};  // bits of magnitudes are ordered as they are, NaN above all
  for (int i = 0; i < kVectors; ++i) {
    values[i] = load(x + i * kWidth);
    const vint bits = reinterpret_cast<vint>(as_uint(values[i]) & 0x7fffffffu);
    largest = bits > largest ? bits : largest;
  }
  const int32_t bits = reduce_max(largest);
  float magnitude;
  __builtin_memcpy(&magnitude, &bits, sizeof magnitude);
  out.scales[at] = magnitude / 127.0f + magnitude * 0.0f;
  const vfloat inverse = splat(magnitude < 1e-30f ? 0.0f : 127.0f / magnitude);
  const bool finite = magnitude <= __FLT_MAX__;
  const vuint kept = vuint{} + (finite ? ~0u : 0u);
  vint sum{};
  for (int i = 0; i < kVectors; ++i) {
    const vfloat shifted = unfused(values[i] * inverse) + magic;
    const vint value = reinterpret_cast<vint>((as_uint(shifted) - as_uint(magic)) & kept);
    store_bytes(out.values + at * kGroup + i * kWidth, value);
    sum -= value;
  }
  out.minus_8sums[at] = 8 * reduce_add(sum);
}

// Elements begin .. end of x [M, C], counted through all its rows; both multiples of 32.
template <typename T>
void quantize(const T* x, const QuantizedRows& out, int64_t M, int64_t C, int64_t begin,
              int64_t end) {
  if (begin >= end) return;
  const int64_t groups = C / kGroup, height = packed_tile_rows(M);
  for (int64_t i = begin / kGroup; i < end / kGroup;) {
    const int64_t row = i / groups, first = row / height * height;
    const int64_t rows = M - first < height ? M - first : height;
    const int64_t row_end = (row + 1) * groups;
    int64_t at = first * groups + (i - row * groups) * rows + row - first;
    for (; i < row_end && i < end / kGroup; ++i, at += rows)
      quantize_group(x + i * kGroup, out, at);
  }
}

}  // namespace
}  // namespace voxkern
#endif
