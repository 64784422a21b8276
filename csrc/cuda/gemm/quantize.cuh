// Rows of x as int8 in shared memory, for products with packed weights: quantize.py's quantize_rows
// bit for bit, in the order in which packed_dots.cuh multiplies.
#pragma once

#include "common/weight.h"
#include "cuda/runtime/elements.cuh"

namespace voxkern {
namespace {

constexpr int kRange = 8;  // groups that are multiplied at a time

// 1.5 * 2^23: from here on floats are integers, their bits too. So its bits plus an integer are a
// float, and its sum with a float is one that is rounded to an integer, in its low bits.
constexpr float kMagic = 12582912.0f;
constexpr int32_t kMagicBits = 0x4b400000;

// Logarithm of the least power of two that is no less.
__host__ __device__ constexpr int log_up(int n) {
  int log = 0;
  while (1 << log < n) ++log;
  return log;
}

// Columns of a group that a lane quantizes: few lanes share the group's scale, which takes a
// division and more.
constexpr int kColumns = 16;

// Those of a row of x as they stand in memory.
template <typename T>
struct RawColumns {
  static constexpr int kVectors = kColumns / kVector<T>;
  uint4 words[kVectors];

  __device__ __forceinline__ void unpack_to(float (&out)[kColumns]) const {
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

// Rows of x in memory. `source` of quantize_rows: what it reads can be on its way several times
// before the first is used.
template <typename T>
struct PlainRows {
  const T* x;
  int64_t C;
  bool aligned;  // is_vector_aligned

  __device__ __forceinline__ RawColumns<T> read(int m, int column) const {
    RawColumns<T> raw;
    const T* const from = x + m * C + column;
#pragma unroll
    for (int i = 0; i < RawColumns<T>::kVectors; ++i) {
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

// Rows of x in shared memory.
template <typename T>
struct StagedRows {
  const uint4* x;
  int row;  // vectors from one to the next

  __device__ __forceinline__ RawColumns<T> read(int m, int column) const {
    RawColumns<T> raw;
#pragma unroll
    for (int i = 0; i < RawColumns<T>::kVectors; ++i)
      raw.words[i] = x[m * row + column / kVector<T> + i];
    return raw;
  }
};

// m / 127 of m >= 0, rounded to nearest, NaN of what is not finite: a product, and what it leaves
// over. The division has branches, which keep a thread's groups from being under way together.
__device__ __forceinline__ float divide_by_127(float m) {
  constexpr float kInverse = 1.0f / 127;
  const float quotient = __fmul_rn(m, kInverse);
  return fmaf(fmaf(-127.0f, quotient, m), kInverse, quotient);
}

// Half a group: its values as bytes, in the order of columns, and the group's scale. The two lanes
// that have a group are neighbours; the whole warp calls it.
__device__ __forceinline__ float quantize_half(const float (&x)[kColumns],
                                               uint32_t (&bytes)[kColumns / 4]) {
  uint32_t largest = 0;  // bits of magnitudes are ordered as they are, NaN above all
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const uint32_t bits = __float_as_uint(x[i]) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  const uint32_t other = __shfl_xor_sync(kWholeWarp, largest, 1);
  const float magnitude = __uint_as_float(other > largest ? other : largest);
  const float inverse = magnitude < 1e-30f ? 0.0f : 127.0f / magnitude;
#pragma unroll
  for (int i = 0; i < kColumns / 4; ++i) {
    uint32_t rounded[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
      rounded[j] = __float_as_uint(__fmul_rn(x[4 * i + j], inverse) + kMagic) & 0xff;
    bytes[i] = rounded[0] | rounded[1] << 8 | rounded[2] << 16 | rounded[3] << 24;
  }
  return divide_by_127(magnitude);
}

// Groups first .. first + groups - 1 of `rows` rows of x, by the block's first kThreads threads;
// rows of a group lie next to each other, as lanes of multiply() take them.
template <Format kFormat, int kTileM, int kThreads, typename Source>
__device__ __forceinline__ void quantize_rows(const Source& source, int rows, int log_rows,
                                              int first, int groups, int8_t* values,
                                              float* scales) {
  using Raw = decltype(source.read(0, 0));
  constexpr int kFlight = 64 / static_cast<int>(sizeof(Raw));
  const int lane = threadIdx.x % kWarp, half = lane % 2;
  const int items = groups << (log_rows + 1);
  // A range's groups past the last: with a scale of 0, their dots do not matter.
  const int filled = (groups + kRange - 1) / kRange * kRange;
  for (int i = groups * kTileM + threadIdx.x; i < filled * kTileM; i += kThreads) scales[i] = 0;
  for (int base = threadIdx.x - lane; base < items; base += kFlight * kThreads) {
    const auto place = [&](int i, int& group, int& m) {  // whether there is one
      const int item = base + i * kThreads + lane;
      group = item >> (log_rows + 1);
      m = item >> 1 & ((1 << log_rows) - 1);
      return item < items && m < rows;
    };
    int group, m;
    Raw raw[kFlight];
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      raw[i] = {};
      if (place(i, group, m)) raw[i] = source.read(m, (first + group) * kGroup + half * kColumns);
    }
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      if (base + i * kThreads >= items) break;  // the whole warp
      const bool any = place(i, group, m);
      float x[kColumns];
      raw[i].unpack_to(x);
      uint32_t bytes[kColumns / 4];
      const float scale = quantize_half(x, bytes);
      if (!any) continue;
      uint32_t* const to = reinterpret_cast<uint32_t*>(values + ((group << log_rows) + m) *
                                                                    static_cast<int>(kGroup));
      if constexpr (kFormat == Format::int8) {  // chunk c goes with c + 4
#pragma unroll
        for (int c = 0; c < kColumns / 4; ++c) to[c * 2 + half] = bytes[c];
      } else {
        *reinterpret_cast<uint4*>(to + half * 4) = {bytes[0], bytes[1], bytes[2], bytes[3]};
      }
      if (half == 0) scales[group * kTileM + m] = scale;
    }
  }
}

}  // namespace
}  // namespace voxkern
