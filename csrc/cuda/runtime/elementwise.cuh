// Arithmetic that fused kernels share with the ops whose results theirs equal.
#pragma once

#include "cuda/runtime/common.cuh"

namespace voxkern {
namespace {

// What rms_norm multiplies a row of C elements with, besides its weight.
__device__ __forceinline__ float rms_scale(float sum_of_squares, int64_t C, float eps) {
  return 1.0f / sqrtf(sum_of_squares / static_cast<float>(C) + eps);
}

// silu(gate) up, by way of exp(-|gate|), which cannot overflow.
__device__ __forceinline__ float swiglu(float gate, float up) {
  const float e = expf(-fabsf(gate));
  return up * (gate * (gate < 0 ? e : 1.0f) / (1.0f + e));
}

// Elements i and i + D/2 of a head, turned. Written out, so that all compilers round alike.
__device__ __forceinline__ float rotated_low(float low, float high, float cos, float sin) {
  return fmaf(low, cos, -(high * sin));
}
__device__ __forceinline__ float rotated_high(float low, float high, float cos, float sin) {
  return fmaf(high, cos, low * sin);
}

// As stored and read again.
template <typename T>
__device__ __forceinline__ float rounded(float a) {
  return to_float(from_float<T>(a));
}

}  // namespace
}  // namespace voxkern
