// Integer dots of packed weights (csrc/weight.h) and quantized rows of x, with their scales,
// through the tensor cores: what packed_product.cuh (few rows) and packed_tiles.cuh (many) share.
//
// The unit is a range of 8 groups: 256 columns of 16 rows of W, 4 KB in int8 and 2 KB in int4. One
// instruction gives a group's dots with 8 rows of x. Weights are the operand with 16 rows, so one
// row of x costs what 8 do.
//
// Which of W's rows and columns an operand's rows and columns are is free, as long as x and the
// sums know. With g = lane / 4 and t = lane % 4, rows 2 g and 2 g + 1 of W are rows g and g + 8
// there, so a lane's 8 bytes are neighbours, and chunks t and t + 4 (int8) or the halves of chunk t
// (int4) are its columns.
//
// Sums: a group's dot is exact; a range's groups are added in their order, then ranges in theirs.
// So a sum depends on x's row, W's row and C alone, whatever shape the block has.
#pragma once

#include "cuda/gemm/quantize.cuh"

namespace voxkern {
namespace {

template <int kTileM>
constexpr int kTiles = (kTileM + 7) / 8;

template <Format kFormat>
constexpr int kGroupBytes = static_cast<int>(group_bytes(kFormat));

// Times 8 bytes of a group that a lane has, 256 bytes apart.
template <Format kFormat>
constexpr int kLoads = kFormat == Format::int8 ? 2 : 1;

// What a lane has of a group as an operand. int4: each value as 16 times itself, which is the high
// half of a byte when its highest bit is turned over.
template <Format kFormat>
__device__ __forceinline__ void to_operand(const uint2 (&values)[kLoads<kFormat>],
                                           uint32_t (&a)[4]) {
  if constexpr (kFormat == Format::int8) {
    a[0] = values[0].x, a[1] = values[0].y, a[2] = values[1].x, a[3] = values[1].y;
  } else {
    const auto high = [](uint32_t w) { return (w & 0xf0f0f0f0) ^ 0x80808080; };
    a[0] = high(values[0].x << 4), a[1] = high(values[0].y << 4);
    a[2] = high(values[0].x), a[3] = high(values[0].y);
  }
}

// int4: a 16th of the scales that two codes stand for, of the low byte and the next.
__device__ __forceinline__ float2 decode_scales(uint32_t both) {
  constexpr uint32_t kExponent = 116 << 23;  // of 2^(-7 - 4)
  return {__uint_as_float((((both & 0x7f) << 19) + kExponent) | (both << 24 & 0x80000000)),
          __uint_as_float((((both & 0x7f00) << 11) + kExponent) | (both << 16 & 0x80000000))};
}

// Where a block keeps x and the sums, for up to kTileM rows of x and `ranges` of their columns.
template <int kTileM>
struct PackedShared {
  static constexpr int kStride = 20;  // of a column of 16 sums: so the lanes meet no bank twice
  int8_t* values;   // [groups, rows of x up to a power of two, 32], in the order of the operand
  float* scales;    // [groups, kTileM]
  float* partials;  // [sums, kTileM, kStride], of a range and 16 rows of W each

  static __host__ __device__ constexpr int64_t bytes(int64_t ranges, int64_t sums, int log_rows) {
    return ranges * kRange * ((kGroup << log_rows) + kTileM * 4) + sums * kTileM * kStride * 4;
  }
  __device__ __forceinline__ PackedShared(unsigned char* raw, int ranges, int log_rows)
      : values(reinterpret_cast<int8_t*>(raw)),
        scales(reinterpret_cast<float*>(raw + (ranges * kRange * kGroup << log_rows))),
        partials(scales + ranges * kRange * kTileM) {}
};

// sums = of W's range, whose groups are `first` and after in shared memory, and of x's rows, 8 at a
// time: rows 2 g (sums 0, 1) and 2 g + 1 of W, 2 t (sums 0, 2) and 2 t + 1 of x. Sums of rows past
// x's last are anything. kUsed: how many times 8 rows there are, at most. Of W: operand(k, a), and
// in int4 group_scales(k), a 16th of those of rows 2 g and 2 g + 1; the whole warp calls them.
template <Format kFormat, int kUsed, int kTileM, typename W>
__device__ __forceinline__ void multiply(const W& w, const PackedShared<kTileM>& shared, int first,
                                         int rows, int log_rows, float (&sums)[kTiles<kTileM>][4]) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int tile = 0; tile < kTiles<kTileM>; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[tile][i] = 0;
#pragma unroll
  for (int k = 0; k < kRange; ++k) {
    uint32_t a[4];
    w.operand(k, a);
    float2 row_scales;
    if constexpr (kFormat == Format::int4) row_scales = w.group_scales(k);
#pragma unroll
    for (int tile = 0; tile < kUsed; ++tile) {
      const int m = tile * 8 + g;
      uint2 b = {};
      if (m < rows)
        b = *reinterpret_cast<const uint2*>(
            shared.values + (((first + k) << log_rows) + m) * static_cast<int>(kGroup) + t * 8);
      int32_t dots[4];
      multiply_s8(dots, a, b.x, b.y, kMagicBits);
      const float* const from = shared.scales + (first + k) * kTileM;
      float2 x_scales;
      if constexpr (kTileM > 1)
        x_scales = *reinterpret_cast<const float2*>(from + tile * 8 + t * 2);
      else
        x_scales = {*from, 0};
#pragma unroll
      for (int i = 0; i < 4; i += kTileM > 1 ? 1 : 2) {
        float scale = i % 2 ? x_scales.y : x_scales.x;
        if constexpr (kFormat == Format::int4) scale *= i / 2 ? row_scales.y : row_scales.x;
        // Spelt out, so that it is the same in whatever kernel.
        sums[tile][i] = fmaf(__int_as_float(dots[i]) - kMagic, scale, sums[tile][i]);
      }
    }
  }
}

// multiply()'s sums to `to`, [kTileM, kStride] of the partials.
template <int kTileM>
__device__ __forceinline__ void store_sums(const float (&sums)[kTiles<kTileM>][4], int rows,
                                           float* to) {
  constexpr int kStride = PackedShared<kTileM>::kStride;
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int tile = 0; tile < kTiles<kTileM>; ++tile)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int m = tile * 8 + t * 2 + i;
      if (m < rows)
        *reinterpret_cast<float2*>(to + m * kStride + g * 2) = {sums[tile][i], sums[tile][i + 2]};
    }
}

}  // namespace
}  // namespace voxkern
