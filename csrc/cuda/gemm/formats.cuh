// Packed weights (common/weight.h) times rows of x that a block quantizes in shared memory, as
// voxkern/quantize.py does, to the bit: shared by gemv.cuh (few rows) and tiles.cuh (many).
//
// The unit is a range of 8 groups: 256 columns of 16 rows of W, 4 KB in int8 and 2 KB in int4. One
// tensor core instruction gives a group's integer dots with 8 rows of x. Weights are the operand
// with 16 rows, so one row of x costs as much as 8. W's rows and columns are permuted as x and the
// sums are: with g = lane / 4 and t = lane % 4, rows 2 g and 2 g + 1 of W are the operand's rows g
// and g + 8, so a lane's 8 bytes are adjacent; its columns are chunks t and t + 4 (int8) or the two
// halves of chunk t (int4).
//
// Order of sums: a group's dot is exact; a range adds its groups in order, and ranges are added in
// order. So a sum depends on x's row, W's row and C alone, not on the shape of the block.
#pragma once

#include "common/weight.h"
#include "cuda/runtime/elements.cuh"

namespace voxkern::gemm_kernels {
namespace {

constexpr int kGemvThreads = 256;  // of a block of every kernel but dense_tile_kernel
constexpr int kGemvWarps = kGemvThreads / kWarp;

constexpr int kRangeGroups = 8;  // groups that are multiplied at a time
constexpr int kGroupColumns = static_cast<int>(kGroup);
constexpr int kPackedTile = static_cast<int>(kBlockRows);  // rows of W
constexpr int kSumStride = 20;  // of a column of 16 sums; avoids bank conflicts
// Columns that a lane quantizes: few lanes share a scale, which costs a division.
constexpr int kHalfGroup = kGroupColumns / 2;
template <typename T>
constexpr int kHalfVectors = kHalfGroup / kVector<T>;

template <Format kFormat>
constexpr int kGroupBytes = static_cast<int>(group_bytes(kFormat));
// Pieces of 8 bytes of a group that a lane loads, 256 bytes apart.
template <Format kFormat>
constexpr int kPieces = kGroupBytes<kFormat> / 256;
// Tiles of 8 rows of x.
template <int kRows>
constexpr int kRowTiles = (kRows + 7) / 8;

// 1.5 * 2^23, from where floats and their bits step by integers: these bits plus an integer are a
// float, and a float plus kMagic is rounded to an integer in its low bits.
constexpr float kMagic = 12582912.0f;
constexpr int32_t kMagicBits = 0x4b400000;

// ceil(log2(n)).
VOX_HOST_DEVICE constexpr int ceil_log2(int n) {
  int log = 0;
  while (1 << log < n) ++log;
  return log;
}
// Ranges of C columns.
VOX_HOST_DEVICE constexpr int packed_ranges(int64_t C) {
  return static_cast<int>(divide_up(C, kRangeGroups * kGroup));
}

// A block's shared memory for up to kRows rows of x, of `ranges` ranges of columns, and the sums.
template <int kRows>
struct PackedShared {
  int8_t* values;   // [groups, rows of x up to a power of two, 32], in the order of the operand
  float* scales;    // [groups, kRows]
  float* partials;  // [sums, kRows, kSumStride], each of one range and 16 rows of W

  static VOX_HOST_DEVICE constexpr int64_t bytes(int64_t ranges, int64_t sums, int log_rows) {
    return ranges * kRangeGroups * ((kGroup << log_rows) + kRows * 4) +
           sums * kRows * kSumStride * 4;
  }
  VOX_DEVICE PackedShared(unsigned char* raw, int ranges, int log_rows)
      : values(reinterpret_cast<int8_t*>(raw)),
        scales(reinterpret_cast<float*>(raw + (ranges * kRangeGroups * kGroup << log_rows))),
        partials(scales + ranges * kRangeGroups * kRows) {}
};

// 16 bytes of a row that is not vector-aligned, of which `left` elements are left; zeros past them.
template <typename T>
VOX_DEVICE uint4 load_unaligned(const T* from, int left) {
  float values[kVector<T>];
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i)
    values[i] = i < left ? to_float(load_element_uncached(from + i)) : 0.0f;
  return pack<T>(values);
}

// The rows of x that quantize_rows() reads. kStaged: from shared memory.
template <typename T, bool kStaged>
struct SourceRows {
  const T* x;
  int64_t stride;  // elements from one row to the next
  bool aligned;    // rows begin at multiples of 16 bytes

  VOX_DEVICE uint4 load(int64_t row, int column) const {
    const T* const from = x + row * stride + column;
    if constexpr (kStaged) return *reinterpret_cast<const uint4*>(from);
    return aligned ? load_uncached(from) : load_unaligned(from, kVector<T>);
  }
};

// m / 127 for m >= 0, rounded to nearest, NaN unless finite: a product and its remainder. A
// division branches, which would keep a thread's groups from overlapping.
VOX_DEVICE float divide_by_127(float m) {
  constexpr float kInverse = 1.0f / 127;
  const float quotient = __fmul_rn(m, kInverse);
  return fmaf(fmaf(-127.0f, quotient, m), kInverse, quotient);
}

// Quantizes half a group to bytes, in the order of columns; returns the scale of the whole group,
// which this lane and its neighbour share. The whole warp calls it.
template <typename T>
VOX_DEVICE float quantize_half(const uint4 (&half)[kHalfVectors<T>],
                               uint32_t (&bytes)[kHalfGroup / 4]) {
  float x[kHalfVectors<T>][kVector<T>];
#pragma unroll
  for (int v = 0; v < kHalfVectors<T>; ++v) unpack<T>(half[v], x[v]);
  uint32_t largest = 0;  // bits of magnitudes compare like the magnitudes, NaN above all
#pragma unroll
  for (int i = 0; i < kHalfGroup; ++i) {
    const uint32_t bits = __float_as_uint(x[i / kVector<T>][i % kVector<T>]) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  const uint32_t other = __shfl_xor_sync(kWholeWarp, largest, 1);
  const float magnitude = __uint_as_float(other > largest ? other : largest);
  const float inverse = magnitude < 1e-30f ? 0.0f : 127.0f / magnitude;
#pragma unroll
  for (int i = 0; i < kHalfGroup / 4; ++i) {
    uint32_t rounded[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float value = x[(4 * i + j) / kVector<T>][(4 * i + j) % kVector<T>];
      rounded[j] = __float_as_uint(__fmul_rn(value, inverse) + kMagic) & 0xff;
    }
    bytes[i] = rounded[0] | rounded[1] << 8 | rounded[2] << 16 | rounded[3] << 24;
  }
  return divide_by_127(magnitude);
}

// Stores half a group where a lane of multiply_range() loads its operand.
template <Format kFormat>
VOX_DEVICE void store_half(const uint32_t (&bytes)[kHalfGroup / 4], int half, uint32_t* group) {
  if constexpr (kFormat == Format::int8) {  // chunk c is next to chunk c + 4
#pragma unroll
    for (int c = 0; c < kHalfGroup / 4; ++c) group[c * 2 + half] = bytes[c];
  } else {
    *reinterpret_cast<uint4*>(group + half * 4) = {bytes[0], bytes[1], bytes[2], bytes[3]};
  }
}

// Quantizes groups first .. first + groups - 1 of `rows` rows of x, with the block's first
// kGemvThreads threads. A group's rows are adjacent, as multiply_range() loads them.
template <Format kFormat, int kRows, typename T, bool kStaged>
VOX_DEVICE void quantize_rows(const SourceRows<T, kStaged>& source, int rows, int log_rows,
                              int first, int groups, const PackedShared<kRows>& to) {
  constexpr int kItems = 4 / kHalfVectors<T>;  // half groups that a thread loads together
  const int lane = threadIdx.x % kWarp, half = lane % 2;
  const int items = groups << (log_rows + 1);
  // The last range is padded with groups whose scale is 0: their dots do not matter.
  const int padded = (groups + kRangeGroups - 1) / kRangeGroups * kRangeGroups;
  for (int i = groups * kRows + threadIdx.x; i < padded * kRows; i += kGemvThreads)
    to.scales[i] = 0;
  for (int base = threadIdx.x - lane; base < items; base += kItems * kGemvThreads) {
    // Group and row of item i of this lane; false if there is none.
    const auto locate = [&](int i, int& group, int& m) {
      const int item = base + i * kGemvThreads + lane;
      group = item >> (log_rows + 1);
      m = item >> 1 & ((1 << log_rows) - 1);
      return item < items && m < rows;
    };
    int group, m;
    uint4 raw[kItems][kHalfVectors<T>] = {};  // converting would make the thread wait for the loads
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (!locate(i, group, m)) continue;
      const int column = (first + group) * kGroupColumns + half * kHalfGroup;
#pragma unroll
      for (int v = 0; v < kHalfVectors<T>; ++v) raw[i][v] = source.load(m, column + v * kVector<T>);
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (base + i * kGemvThreads >= items) break;  // the whole warp
      uint32_t bytes[kHalfGroup / 4];
      const float scale = quantize_half<T>(raw[i], bytes);
      if (!locate(i, group, m)) continue;
      store_half<kFormat>(
          bytes, half,
          reinterpret_cast<uint32_t*>(to.values + ((group << log_rows) + m) * kGroupColumns));
      if (half == 0) to.scales[group * kRows + m] = scale;
    }
  }
}

// A lane's part of a group as an operand. int4: a value times 16, which is the high half of a byte
// once its top bit is flipped.
template <Format kFormat>
VOX_DEVICE void to_operand(const uint2 (&values)[kPieces<kFormat>], uint32_t (&a)[4]) {
  if constexpr (kFormat == Format::int8) {
    a[0] = values[0].x, a[1] = values[0].y, a[2] = values[1].x, a[3] = values[1].y;
  } else {
    const auto high = [](uint32_t w) { return (w & 0xf0f0f0f0) ^ 0x80808080; };
    a[0] = high(values[0].x << 4), a[1] = high(values[0].y << 4);
    a[2] = high(values[0].x), a[3] = high(values[0].y);
  }
}

// int4: the scales that the low byte and the next one encode, divided by 16.
VOX_DEVICE float2 decode_scales(uint32_t both) {
  constexpr uint32_t kExponent = 116 << 23;  // 2^(-7 - 4)
  return {__uint_as_float((((both & 0x7f) << 19) + kExponent) | (both << 24 & 0x80000000)),
          __uint_as_float((((both & 0x7f00) << 11) + kExponent) | (both << 16 & 0x80000000))};
}

// sums = W's range times x's rows, 8 rows at a time; the range's groups begin at `first` in shared
// memory. A lane gets rows 2 g (sums 0, 1) and 2 g + 1 of W, 2 t (sums 0, 2) and 2 t + 1 of x; sums
// past x's last row are undefined. W has operand(k, a) and, for int4, group_scales(k), a 16th of
// the scales of rows 2 g and 2 g + 1. The whole warp calls it.
template <Format kFormat, int kRows, typename W>
VOX_DEVICE void multiply_range(const W& w, const PackedShared<kRows>& shared, int first, int rows,
                               int log_rows, float (&sums)[kRowTiles<kRows>][4]) {
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
    for (int tile = 0; tile < kRowTiles<kRows>; ++tile) {
      const int m = tile * 8 + g;
      uint2 b = {};
      if (m < rows)
        b = *reinterpret_cast<const uint2*>(
            shared.values + (((first + k) << log_rows) + m) * kGroupColumns + t * 8);
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

// Stores multiply_range()'s sums in partials, [kRows, kSumStride].
template <int kRows>
VOX_DEVICE void store_sums(const float (&sums)[kRowTiles<kRows>][4], int rows, float* partials) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int tile = 0; tile < kRowTiles<kRows>; ++tile)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int m = tile * 8 + t * 2 + i;
      if (m < rows)
        *reinterpret_cast<float2*>(partials + m * kSumStride + g * 2) = {sums[tile][i],
                                                                         sums[tile][i + 2]};
    }
}

}  // namespace
}  // namespace voxkern::gemm_kernels
