// Rows of x as int8 in shared memory, for products with packed weights: equal to quantize_rows of
// voxkern/quantize.py to the bit, in the order in which formats.cuh multiplies.
#pragma once

#include "common/weight.h"
#include "cuda/runtime/elements.cuh"

namespace voxkern::gemm_kernels {
namespace {

constexpr int kRangeGroups = 8;  // groups that are multiplied at a time

// 1.5 * 2^23, from where floats and their bits step by integers: these bits plus an integer are a
// float, and a float plus kMagic is rounded to an integer in its low bits.
constexpr float kMagic = 12582912.0f;
constexpr int32_t kMagicBits = 0x4b400000;

// ceil(log2(n)).
__host__ __device__ constexpr int ceil_log2(int n) {
  int log = 0;
  while (1 << log < n) ++log;
  return log;
}

// Columns that a lane quantizes: half a group. Few lanes share a scale, which costs a division.
constexpr int kHalfGroup = 16;

// Half a group of a row of x, unconverted: converting would make the thread wait for the load.
template <typename T>
struct RawHalf {
  static constexpr int kVectors = kHalfGroup / kVector<T>;
  uint4 words[kVectors];

  __device__ __forceinline__ void unpack_to(float (&out)[kHalfGroup]) const {
    constexpr int kSize = kVector<T>;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float part[kSize];
      unpack<T>(words[i], part);
#pragma unroll
      for (int j = 0; j < kSize; ++j) out[i * kSize + j] = part[j];
    }
  }
};

// Rows of x in global memory, a `Source` of quantize_rows().
template <typename T>
struct GlobalRows {
  const T* x;
  int64_t C;
  bool aligned;  // rows begin at multiples of 16 bytes

  __device__ __forceinline__ RawHalf<T> read(int m, int column) const {
    RawHalf<T> raw;
    const T* const from = x + m * C + column;
#pragma unroll
    for (int i = 0; i < RawHalf<T>::kVectors; ++i) {
      if (aligned) {
        raw.words[i] = load_uncached(from + i * kVector<T>);
      } else {
        float values[kVector<T>];
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j)
          values[j] = to_float(load_element_uncached(from + i * kVector<T> + j));
        raw.words[i] = pack<T>(values);
      }
    }
    return raw;
  }
};

// Rows of x in shared memory, a `Source` of quantize_rows().
struct StagedRows {
  const uint4* x;
  int stride;  // vectors from one row to the next

  __device__ __forceinline__ RawHalf<bf16> read(int m, int column) const {
    RawHalf<bf16> raw;
#pragma unroll
    for (int i = 0; i < RawHalf<bf16>::kVectors; ++i)
      raw.words[i] = x[m * stride + column / kVector<bf16> + i];
    return raw;
  }
};

// m / 127 for m >= 0, rounded to nearest, NaN unless finite: a product and its remainder. A
// division branches, which would keep a thread's groups from overlapping.
__device__ __forceinline__ float divide_by_127(float m) {
  constexpr float kInverse = 1.0f / 127;
  const float quotient = __fmul_rn(m, kInverse);
  return fmaf(fmaf(-127.0f, quotient, m), kInverse, quotient);
}

// Quantizes half a group to bytes, in the order of columns; returns the scale of the whole group,
// which this lane and its neighbour share. The whole warp calls it.
__device__ __forceinline__ float quantize_half(const float (&x)[kHalfGroup],
                                               uint32_t (&bytes)[kHalfGroup / 4]) {
  uint32_t largest = 0;  // bits of magnitudes compare like the magnitudes, NaN above all
#pragma unroll
  for (int i = 0; i < kHalfGroup; ++i) {
    const uint32_t bits = __float_as_uint(x[i]) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  const uint32_t other = __shfl_xor_sync(kWholeWarp, largest, 1);
  const float magnitude = __uint_as_float(other > largest ? other : largest);
  const float inverse = magnitude < 1e-30f ? 0.0f : 127.0f / magnitude;
#pragma unroll
  for (int i = 0; i < kHalfGroup / 4; ++i) {
    uint32_t rounded[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
      rounded[j] = __float_as_uint(__fmul_rn(x[4 * i + j], inverse) + kMagic) & 0xff;
    bytes[i] = rounded[0] | rounded[1] << 8 | rounded[2] << 16 | rounded[3] << 24;
  }
  return divide_by_127(magnitude);
}

// Stores half a group where a lane of multiply_range() loads its operand.
template <Format kFormat>
__device__ __forceinline__ void store_half(const uint32_t (&bytes)[kHalfGroup / 4], int half,
                                           uint32_t* group) {
  if constexpr (kFormat == Format::int8) {  // chunk c is next to chunk c + 4
#pragma unroll
    for (int c = 0; c < kHalfGroup / 4; ++c) group[c * 2 + half] = bytes[c];
  } else {
    *reinterpret_cast<uint4*>(group + half * 4) = {bytes[0], bytes[1], bytes[2], bytes[3]};
  }
}

// Quantizes groups first .. first + groups - 1 of `rows` rows of x, with the block's first kThreads
// threads. A group's rows are adjacent, as multiply_range() loads them. kRows: stride of scales.
template <Format kFormat, int kRows, int kThreads, typename Source>
__device__ __forceinline__ void quantize_rows(const Source& source, int rows, int log_rows,
                                              int first, int groups, int8_t* values,
                                              float* scales) {
  using Raw = decltype(source.read(0, 0));
  constexpr int kItems = 64 / static_cast<int>(sizeof(Raw));  // of a thread, loaded together
  const int lane = threadIdx.x % kWarp, half = lane % 2;
  const int items = groups << (log_rows + 1);
  // The last range is padded with groups whose scale is 0: their dots do not matter.
  const int padded = (groups + kRangeGroups - 1) / kRangeGroups * kRangeGroups;
  for (int i = groups * kRows + threadIdx.x; i < padded * kRows; i += kThreads) scales[i] = 0;
  for (int base = threadIdx.x - lane; base < items; base += kItems * kThreads) {
    // Group and row of item i of this lane; false if there is none.
    const auto locate = [&](int i, int& group, int& m) {
      const int item = base + i * kThreads + lane;
      group = item >> (log_rows + 1);
      m = item >> 1 & ((1 << log_rows) - 1);
      return item < items && m < rows;
    };
    int group, m;
    Raw raw[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      raw[i] = {};
      if (locate(i, group, m))
        raw[i] = source.read(m, (first + group) * static_cast<int>(kGroup) + half * kHalfGroup);
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (base + i * kThreads >= items) break;  // the whole warp
      const bool exists = locate(i, group, m);
      float x[kHalfGroup];
      raw[i].unpack_to(x);
      uint32_t bytes[kHalfGroup / 4];
      const float scale = quantize_half(x, bytes);
      if (!exists) continue;
      store_half<kFormat>(bytes, half,
                          reinterpret_cast<uint32_t*>(values + ((group << log_rows) + m) *
                                                                   static_cast<int>(kGroup)));
      if (half == 0) scales[group * kRows + m] = scale;
    }
  }
}

}  // namespace
}  // namespace voxkern::gemm_kernels
