// Quantizes activations to int8 for GEMMs with packed weights: symmetric, one scale per group of 32
// columns. The ISA passes quantize; the host pass only sizes the buffers.
#pragma once

#include "common/arena.h"
#include "common/weight.h"

namespace voxkern {
namespace {

// Quantized x as consecutive tiles of up to kPackedTileM rows, all of one height except the last. A
// tile stores group after group, and in a group its rows in order.
struct QuantizedRows {
  int8_t* values;  // [tiles, C / 32, rows of the tile, 32], -127 .. 127
  float* scales;   // [tiles, C / 32, rows of the tile]
  // -8 * the sum of a group's values: corrects for W's values being stored plus 8 or 128.
  int32_t* minus_8sums;  // [tiles, C / 32, rows of the tile]

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

// Rows of x per tile, for one pass over W: as many as there are registers for chains and sums.
constexpr int64_t kPackedTileM = kWidth == 16 ? 8 : 4;

// The tile height for M rows of x. Tiles are of equal height, so that none has too few rows to be
// worth unpacking W.
inline int64_t packed_tile_rows(int64_t M) {
  const int64_t tiles = (M + kPackedTileM - 1) / kPackedTileM;
  return (M + tiles - 1) / tiles;
}

// scale = max |x| / 127, values = x * (127 / max |x|), rounded to nearest, ties to even. A group
// below 1e-30 becomes zero. A group with a non-finite value gets the scale NaN, which makes all
// outputs of its row NaN.
template <typename T>
VOX_INLINE void quantize_group(const T* x, const QuantizedRows& out, int64_t at) {
  constexpr int kVectors = kGroup / kWidth;
  const vfloat magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  vfloat values[kVectors];
  vint largest{};  // magnitudes order like their bits, with NaN above all
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

// Quantizes elements begin .. end of x [M, C], counted across all rows; both multiples of 32.
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
