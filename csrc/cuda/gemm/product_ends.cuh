// What comes before and after a product of few rows, in the same launch: x as it is or normalised,
// in shared memory; the results stored, added to the residual, or SwiGLU of two of them. Each
// rounds where the ops that it stands for store. Blocks have kThreads threads. And what such blocks
// find room for.
#pragma once

#include "cuda/gemm/product.h"
#include "cuda/runtime/elements.cuh"
#include "cuda/runtime/elementwise.cuh"
#include "cuda/runtime/reduce.cuh"

namespace voxkern {
namespace {

constexpr int kThreads = 256;  // as rms_norm has for a long row: the same order of its sum
constexpr int kWarps = kThreads / kWarp;
constexpr int kTileM = 16;
constexpr int kAtOnce = 8;      // vectors of x that a thread reads at once
constexpr int kRowsScaled = 4;  // rows that it scales at once
constexpr int kBlocksEach = 2;  // of a multiprocessor

// Whether ptxas takes more registers than elsewhere: there, what would be three blocks of a
// multiprocessor is two, so that nothing spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kMoreRegisters = true;
#else
constexpr bool kMoreRegisters = false;
#endif

// Rows, a vector of each, that it reads at once for their norms.
template <typename T>
constexpr int kRowsAtOnce = sizeof(T) == 4 ? 4 : 8;

// Vector i of a row of C elements, zeros behind its end.
template <typename T, bool kAligned>
__device__ __forceinline__ uint4 read_vector(const T* row, int64_t i, int64_t C) {
  if constexpr (kAligned) {
    return *reinterpret_cast<const uint4*>(row + i * kVector<T>);
  } else {
    float values[kVector<T>];
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) {
      const int64_t at = i * kVector<T> + j;
      values[j] = at < C ? to_float(row[at]) : 0.0f;
    }
    return pack<T>(values);
  }
}

// The part of a norm's weight that a thread needs first; may come before the wait.
template <typename T, Before before>
__device__ __forceinline__ uint4 first_of_norm(const ProductParams& p) {
  if constexpr (before == Before::norm)
    if (static_cast<int64_t>(threadIdx.x) < p.C / kVector<T>)
      return load_stream(static_cast<const T*>(p.norm) + threadIdx.x * kVector<T>);
  return {};
}

// Rows m .. m + rows - 1 of x to shared memory, `stride` vectors apart, normalised or not; for all
// threads of the block, a barrier at the end. Their vectors must be aligned.
template <typename T, Before before, int kRows = kRowsAtOnce<T>>
__device__ void stage(const ProductParams& p, int64_t m, int rows, uint4 norm_first, uint4* to,
                      int stride) {
  constexpr int kSize = kVector<T>;
  const int vectors = static_cast<int>(p.C / kSize), me = threadIdx.x;
  const T* const from = static_cast<const T*>(p.x) + m * p.C;
  if constexpr (before == Before::nothing) {
    // Rows follow each other in memory: all are one, but for where they go.
    const int all = rows * vectors, rest = kThreads % vectors;
    const int step = kThreads / vectors * stride + rest;
    int i = me % vectors, place = me / vectors * stride + i;
    for (int base = me; base < all; base += kAtOnce * kThreads) {
      uint4 raw[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int at = base + k * kThreads;
        if (at < all) raw[k] = load_uncached(from + at * kSize);
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (base + k * kThreads < all) to[place] = raw[k];
        i += rest;
        place += step;
        if (i >= vectors) {
          i -= vectors;
          place += stride - vectors;
        }
      }
    }
  } else {
    // In the order of rms_norm: a thread its vectors, then lanes, then warps.
    VOX_SHARED(float[kTileM][kWarps], partials);
    const int warp = me / kWarp, lane = me % kWarp;
    for (int first = 0; first < rows; first += kRows) {
      float squares[kRows] = {};
      for (int i = me; i < vectors; i += kThreads) {
        uint4 raw[kRows];
#pragma unroll
        for (int k = 0; k < kRows; ++k)
          if (first + k < rows) raw[k] = load_uncached(from + (first + k) * p.C + i * kSize);
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
          if (first + k >= rows) break;
          to[(first + k) * stride + i] = raw[k];
          float values[kSize];
          unpack<T>(raw[k], values);
#pragma unroll
          for (int j = 0; j < kSize; ++j) squares[k] = fmaf(values[j], values[j], squares[k]);
        }
      }
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        if (first + k >= rows) break;
        const float sum = warp_reduce(squares[k], Add());
        if (lane == 0) partials[first + k][warp] = sum;
      }
    }
    sync_first<kThreads>();
    // Every warp finds the rows' scales for itself, a lane one of them.
    const int of = lane < rows ? lane : 0;
    float sum = partials[of][0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) sum += partials[of][w];
    const float my_scale = rms_scale(sum, p.C, p.eps);
    for (int first = 0; first < rows; first += kRowsScaled) {
      float scales[kRowsScaled];
#pragma unroll
      for (int k = 0; k < kRowsScaled; ++k)
        scales[k] = __shfl_sync(kWholeWarp, my_scale, first + k);
      for (int i = me; i < vectors; i += kThreads) {
        float weight[kSize];
        unpack<T>(i == me ? norm_first : load_stream(static_cast<const T*>(p.norm) + i * kSize),
                  weight);
        uint4 raw[kRowsScaled];
#pragma unroll
        for (int k = 0; k < kRowsScaled; ++k)
          if (first + k < rows) raw[k] = to[(first + k) * stride + i];
#pragma unroll
        for (int k = 0; k < kRowsScaled; ++k) {
          if (first + k >= rows) break;
          float values[kSize];
          unpack<T>(raw[k], values);
#pragma unroll
          for (int j = 0; j < kSize; ++j) values[j] = values[j] * scales[k] * weight[j];
          to[(first + k) * stride + i] = pack<T>(values);
        }
      }
    }
  }
  sync_first<kThreads>();
}

template <After after>
constexpr int kProducts = after == After::swiglu ? 2 : 1;

// What the result of row m, column n is added to; to be read ahead of finish().
template <typename T, After after>
__device__ __forceinline__ T old_value(const ProductParams& p, int64_t m, int64_t n) {
  if constexpr (after == After::add)
    return load_element_uncached(static_cast<const T*>(p.residual) + m * p.N + n);
  return {};
}

// The result of row m, column n, from its sums (gate's and up's with SwiGLU).
template <typename T, After after>
__device__ __forceinline__ void finish(const ProductParams& p, int64_t m, int64_t n,
                                       const float (&sums)[kProducts<after>], T old) {
  float result = sums[0];
  if constexpr (after == After::add) result = rounded<T>(result) + to_float(old);
  if constexpr (after == After::swiglu) result = swiglu(rounded<T>(sums[0]), rounded<T>(sums[1]));
  static_cast<T*>(p.out)[m * p.N + n] = from_float<T>(result);
}

constexpr int64_t kSystemBytes = 1024;  // of shared memory, that each block takes besides its own
constexpr int64_t kStageBytes = sizeof(float) * kTileM * kWarps;

// What a block may have besides the variables of stage().
inline int64_t dynamic_limit() { return shared_bytes_limit() - kStageBytes; }

// Whether a multiprocessor, which has all that a block may have, takes as many blocks at once.
inline bool fit_together(int64_t blocks, int64_t shared_bytes) {
  return blocks * (shared_bytes + kStageBytes + kSystemBytes) <=
         shared_bytes_limit() + kSystemBytes;
}

template <typename T>
bool aligned(const ProductParams& p) {
  return is_vector_aligned<T>(p.x, p.C) && is_vector_aligned<T>(p.weight, p.C) &&
         (p.before == Before::nothing || is_vector_aligned<T>(p.norm, p.C));
}

}  // namespace
}  // namespace voxkern
