// The steps that a gemv fuses with its product, in bfloat16, for blocks of kGemvThreads threads.
// Prologue: rows of x to shared memory, plain or normalised. Epilogue: the sums are stored, added
// to the residual, or combined by SwiGLU. Both round wherever the separate ops store, so fused and
// separate results are equal to the bit.
#pragma once

#include "cuda/gemm/gemm.h"
#include "cuda/runtime/elements.cuh"

namespace voxkern::gemm_kernels {
namespace {

constexpr int kGemvThreads = 256;
constexpr int kGemvWarps = kGemvThreads / kWarp;
static_assert(kGemvThreads == kNormThreads, "a fused norm adds squares in the order of rms_norm");
constexpr int kMaxRows = 16;       // of x in a block
constexpr int kLoadsInFlight = 8;  // vectors of x that a thread loads before it stores any
constexpr int kNormRows = 8;       // rows whose squares a thread adds at a time
constexpr int kRowsScaled = 4;     // rows that a thread scales at a time
constexpr int kLaneValues = kVector<bf16>;

// ptxas needs more registers from sm_100 on. Kernels that would spill with three resident blocks a
// multiprocessor are compiled for two there.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kMoreRegisters = true;
#else
constexpr bool kMoreRegisters = false;
#endif

// Vector i of a row of C elements, zeros past its end.
template <typename T, bool kAligned>
__device__ __forceinline__ uint4 load_padded(const T* row, int64_t i, int64_t C) {
  if constexpr (kAligned) {
    return *reinterpret_cast<const uint4*>(row + i * kVector<T>);
  } else {
    float values[kVector<T>];
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) {
      const int64_t column = i * kVector<T> + j;
      values[j] = column < C ? to_float(row[column]) : 0.0f;
    }
    return pack<T>(values);
  }
}

// The first vector of the norm's weight that this thread needs; may precede the wait for the
// previous kernel.
template <Prologue prologue>
__device__ __forceinline__ uint4 load_first_norm(const GemmParams& p) {
  if constexpr (prologue == Prologue::norm)
    if (static_cast<int64_t>(threadIdx.x) < p.C / kLaneValues)
      return load_stream(static_cast<const bf16*>(p.norm) + threadIdx.x * kLaneValues);
  return {};
}

// Copies `rows` adjacent rows of `vectors` vectors each, which become `stride` vectors apart.
__device__ __forceinline__ void copy_rows(const bf16* from, int rows, int vectors, uint4* to,
                                          int stride) {
  const int all = rows * vectors, rest = kGemvThreads % vectors;
  const int step = kGemvThreads / vectors * stride + rest, me = threadIdx.x;
  int i = me % vectors, target = me / vectors * stride + i;
  for (int base = me; base < all; base += kLoadsInFlight * kGemvThreads) {
    uint4 raw[kLoadsInFlight];
#pragma unroll
    for (int k = 0; k < kLoadsInFlight; ++k) {
      const int source = base + k * kGemvThreads;
      if (source < all) raw[k] = load_uncached(from + source * kLaneValues);
    }
#pragma unroll
    for (int k = 0; k < kLoadsInFlight; ++k) {
      if (base + k * kGemvThreads < all) to[target] = raw[k];
      i += rest;
      target += step;
      if (i >= vectors) {
        i -= vectors;
        target += stride - vectors;
      }
    }
  }
}

using SquareSums = float[kMaxRows][kGemvWarps];

// Copies rows as copy_rows() does and leaves each warp's sum of their squares in `partials`.
template <int kRowsAtOnce>
__device__ __forceinline__ void copy_and_square(const bf16* from, int rows, int64_t C, uint4* to,
                                                int stride, SquareSums& partials) {
  const int vectors = static_cast<int>(C / kLaneValues), me = threadIdx.x;
  for (int first = 0; first < rows; first += kRowsAtOnce) {
    float squares[kRowsAtOnce] = {};
    for (int i = me; i < vectors; i += kGemvThreads) {
      uint4 raw[kRowsAtOnce];
#pragma unroll
      for (int k = 0; k < kRowsAtOnce; ++k)
        if (first + k < rows) raw[k] = load_uncached(from + (first + k) * C + i * kLaneValues);
#pragma unroll
      for (int k = 0; k < kRowsAtOnce; ++k) {
        if (first + k >= rows) break;
        to[(first + k) * stride + i] = raw[k];
        float values[kLaneValues];
        unpack<bf16>(raw[k], values);
#pragma unroll
        for (int j = 0; j < kLaneValues; ++j) squares[k] = fmaf(values[j], values[j], squares[k]);
      }
    }
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
      if (first + k >= rows) break;
      const float sum = warp_reduce(squares[k], Add());
      if (me % kWarp == 0) partials[first + k][me / kWarp] = sum;
    }
  }
}

// Multiplies the staged rows by the norm's weight and by their scales; lane l holds row l's.
__device__ __forceinline__ void scale_rows(const GemmParams& p, int rows, float lane_scale,
                                           uint4 first_norm, uint4* staged, int stride) {
  const int vectors = static_cast<int>(p.C / kLaneValues), me = threadIdx.x;
  for (int first = 0; first < rows; first += kRowsScaled) {
    float scales[kRowsScaled];
#pragma unroll
    for (int k = 0; k < kRowsScaled; ++k)
      scales[k] = __shfl_sync(kWholeWarp, lane_scale, first + k);
    for (int i = me; i < vectors; i += kGemvThreads) {
      float weight[kLaneValues];
      unpack<bf16>(
          i == me ? first_norm : load_stream(static_cast<const bf16*>(p.norm) + i * kLaneValues),
          weight);
      uint4 raw[kRowsScaled];
#pragma unroll
      for (int k = 0; k < kRowsScaled; ++k)
        if (first + k < rows) raw[k] = staged[(first + k) * stride + i];
#pragma unroll
      for (int k = 0; k < kRowsScaled; ++k) {
        if (first + k >= rows) break;
        float values[kLaneValues];
        unpack<bf16>(raw[k], values);
#pragma unroll
        for (int j = 0; j < kLaneValues; ++j) values[j] = values[j] * scales[k] * weight[j];
        staged[(first + k) * stride + i] = pack<bf16>(values);
      }
    }
  }
}

// Rows m .. m + rows - 1 of x to shared memory, `stride` vectors apart. All kGemvThreads threads
// call it; it ends with a barrier. x's rows must be vector-aligned.
template <Prologue prologue, int kRowsAtOnce>
__device__ void stage_rows(const GemmParams& p, int64_t m, int rows, uint4 first_norm, uint4* to,
                           int stride) {
  const bf16* const from = static_cast<const bf16*>(p.x) + m * p.C;
  if constexpr (prologue == Prologue::none) {
    copy_rows(from, rows, static_cast<int>(p.C / kLaneValues), to, stride);
  } else {
    VOX_SHARED(SquareSums, partials);
    copy_and_square<kRowsAtOnce>(from, rows, p.C, to, stride, partials);
    sync_first<kGemvThreads>();
    // Each warp computes all scales, a lane one of them, in the order of rms_norm.
    const int lane = threadIdx.x % kWarp, row = lane < rows ? lane : 0;
    float sum = partials[row][0];
#pragma unroll
    for (int w = 1; w < kGemvWarps; ++w) sum += partials[row][w];
    scale_rows(p, rows, rms_scale(sum, p.C, p.eps), first_norm, to, stride);
  }
  sync_first<kGemvThreads>();
}

// Products of one column of out.
template <Epilogue epilogue>
constexpr int kProducts = epilogue == Epilogue::swiglu ? 2 : 1;

// The residual of row m, column n, loaded ahead of store_result().
template <Epilogue epilogue>
__device__ __forceinline__ bf16 load_residual(const GemmParams& p, int64_t m, int64_t n) {
  if constexpr (epilogue == Epilogue::add)
    return load_element_uncached(static_cast<const bf16*>(p.residual) + m * p.N + n);
  return {};
}

// Stores row m, column n of out, from its sums (SwiGLU: gate's and up's).
template <Epilogue epilogue>
__device__ __forceinline__ void store_result(const GemmParams& p, int64_t m, int64_t n,
                                             const float (&sums)[kProducts<epilogue>],
                                             bf16 residual) {
  float result = sums[0];
  if constexpr (epilogue == Epilogue::add) result = rounded<bf16>(result) + to_float(residual);
  if constexpr (epilogue == Epilogue::swiglu)
    result = swiglu(rounded<bf16>(sums[0]), rounded<bf16>(sums[1]));
  static_cast<bf16*>(p.out)[m * p.N + n] = from_float<bf16>(result);
}

}  // namespace
}  // namespace voxkern::gemm_kernels
