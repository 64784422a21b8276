// Integer dots of packed weights (common/weight.h) with quantized rows of x, and their scales,
// through the tensor cores: shared by gemv.cuh (few rows) and packed_tiles.cuh (many).
//
// The unit is a range of 8 groups: 256 columns of 16 rows of W, 4 KB in int8 and 2 KB in int4. One
// instruction gives a group's dots with 8 rows of x. Weights are the operand with 16 rows, so one
// row of x costs as much as 8.
//
// An operand may permute W's rows and columns as long as x and the sums use the same permutation.
// With g = lane / 4 and t = lane % 4, rows 2 g and 2 g + 1 of W are the operand's rows g and g + 8,
// so a lane's 8 bytes are adjacent; its columns are chunks t and t + 4 (int8) or the two halves of
// chunk t (int4).
//
// Order of sums: a group's dot is exact; a range adds its groups in order, and ranges are added in
// order. So a sum depends on x's row, W's row and C alone, not on the shape of the block.
#pragma once

#include "cuda/gemm/quantize.cuh"

namespace voxkern::gemm_kernels {
namespace {

// Tiles of 8 rows of x.
template <int kRows>
constexpr int kRowTiles = (kRows + 7) / 8;

template <Format kFormat>
constexpr int kGroupBytes = static_cast<int>(group_bytes(kFormat));

// A range of columns of 16 rows, without the scales of the rows.
template <Format kFormat>
constexpr int kRangeBytes =
    kRangeGroups * (kGroupBytes<kFormat> + static_cast<int>(scale_bytes(kFormat)));

// Pieces of 8 bytes of a group that a lane loads, 256 bytes apart.
template <Format kFormat>
constexpr int kPieces = kFormat == Format::int8 ? 2 : 1;

// Ranges of C columns, and tiles of N rows of W.
__host__ __device__ constexpr int packed_ranges(int C) {
  constexpr int kColumns = kRangeGroups * static_cast<int>(kGroup);
  return (C + kColumns - 1) / kColumns;
}
__host__ __device__ constexpr int packed_row_tiles(int N) {
  return (N + static_cast<int>(kBlockRows) - 1) / static_cast<int>(kBlockRows);
}

// A lane's part of a group as an operand. int4: a value times 16, which is the high half of a byte
// once its top bit is flipped.
template <Format kFormat>
__device__ __forceinline__ void to_operand(const uint2 (&values)[kPieces<kFormat>],
                                           uint32_t (&a)[4]) {
  if constexpr (kFormat == Format::int8) {
    a[0] = values[0].x, a[1] = values[0].y, a[2] = values[1].x, a[3] = values[1].y;
  } else {
    const auto high = [](uint32_t w) { return (w & 0xf0f0f0f0) ^ 0x80808080; };
    a[0] = high(values[0].x << 4), a[1] = high(values[0].y << 4);
    a[2] = high(values[0].x), a[3] = high(values[0].y);
  }
}

// int4: the scales that the low byte and the next one encode, divided by 16.
__device__ __forceinline__ float2 decode_scales(uint32_t both) {
  constexpr uint32_t kExponent = 116 << 23;  // 2^(-7 - 4)
  return {__uint_as_float((((both & 0x7f) << 19) + kExponent) | (both << 24 & 0x80000000)),
          __uint_as_float((((both & 0x7f00) << 11) + kExponent) | (both << 16 & 0x80000000))};
}

// A block's shared memory for up to kRows rows of x, of `ranges` ranges of columns, and the sums.
template <int kRows>
struct PackedShared {
  static constexpr int kStride = 20;  // of a column of 16 sums; avoids bank conflicts
  int8_t* values;   // [groups, rows of x up to a power of two, 32], in the order of the operand
  float* scales;    // [groups, kRows]
  float* partials;  // [sums, kRows, kStride], each of one range and 16 rows of W

  static __host__ __device__ constexpr int64_t bytes(int64_t ranges, int64_t sums, int log_rows) {
    return ranges * kRangeGroups * ((kGroup << log_rows) + kRows * 4) + sums * kRows * kStride * 4;
  }
  __device__ __forceinline__ PackedShared(unsigned char* raw, int ranges, int log_rows)
      : values(reinterpret_cast<int8_t*>(raw)),
        scales(reinterpret_cast<float*>(raw + (ranges * kRangeGroups * kGroup << log_rows))),
        partials(scales + ranges * kRangeGroups * kRows) {}
};

// sums = W's range times x's rows, 8 rows at a time; the range's groups begin at `first` in shared
// memory. A lane gets rows 2 g (sums 0, 1) and 2 g + 1 of W, 2 t (sums 0, 2) and 2 t + 1 of x; sums
// past x's last row are undefined. kUsed: row tiles that are multiplied. W has operand(k, a) and,
// for int4, group_scales(k), a 16th of the scales of rows 2 g and 2 g + 1. The whole warp calls it.
template <Format kFormat, int kUsed, int kRows, typename W>
__device__ __forceinline__ void multiply_range(const W& w, const PackedShared<kRows>& shared,
                                               int first, int rows, int log_rows,
                                               float (&sums)[kRowTiles<kRows>][4]) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int tile = 0; tile < kRowTiles<kRows>; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[tile][i] = 0;
#pragma unroll
  for (int k = 0; k < kRangeGroups; ++k) {
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
      const float* const from = shared.scales + (first + k) * kRows;
      float2 x_scales;
      if constexpr (kRows > 1)
        x_scales = *reinterpret_cast<const float2*>(from + tile * 8 + t * 2);
      else
        x_scales = {*from, 0};
#pragma unroll
      for (int i = 0; i < 4; i += kRows > 1 ? 1 : 2) {
        float scale = i % 2 ? x_scales.y : x_scales.x;
        if constexpr (kFormat == Format::int4) scale *= i / 2 ? row_scales.y : row_scales.x;
        // An explicit fmaf: every kernel rounds alike.
        sums[tile][i] = fmaf(__int_as_float(dots[i]) - kMagic, scale, sums[tile][i]);
      }
    }
  }
}

// Stores multiply_range()'s sums in partials, [kRows, kStride].
template <int kRows>
__device__ __forceinline__ void store_sums(const float (&sums)[kRowTiles<kRows>][4], int rows,
                                           float* partials) {
  constexpr int kStride = PackedShared<kRows>::kStride;
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int tile = 0; tile < kRowTiles<kRows>; ++tile)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int m = tile * 8 + t * 2 + i;
      if (m < rows)
        *reinterpret_cast<float2*>(partials + m * kStride + g * 2) = {sums[tile][i],
                                                                      sums[tile][i + 2]};
    }
}

}  // namespace
}  // namespace voxkern::gemm_kernels
