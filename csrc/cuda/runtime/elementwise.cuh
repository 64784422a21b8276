// Arithmetic shared by ops and by the fused kernels that reproduce their results bit for bit.
#pragma once

#include "cuda/runtime/elements.cuh"

namespace voxkern {
namespace {

// Threads of a block for a long row: with the order of sums, part of rms_norm's result.
constexpr int kNormThreads = 256;

// The factor of rms_norm for a row of C elements, without the weight.
VOX_DEVICE float rms_scale(float sum_of_squares, int64_t C, float eps) {
  return 1.0f / sqrtf(sum_of_squares / static_cast<float>(C) + eps);
}

// silu(gate) * up, computed from exp(-|gate|), which cannot overflow.
VOX_DEVICE float swiglu(float gate, float up) {
  const float e = expf(-fabsf(gate));
  return up * (gate * (gate < 0 ? e : 1.0f) / (1.0f + e));
}

// Rotated elements i and i + D/2 of a head. The fused operations are written out, so that all
// compilers round alike.
VOX_DEVICE float rotated_low(float low, float high, float cos, float sin) {
  return fmaf(low, cos, -(high * sin));
}
VOX_DEVICE float rotated_high(float low, float high, float cos, float sin) {
  return fmaf(high, cos, low * sin);
}

}  // namespace
}  // namespace voxkern
