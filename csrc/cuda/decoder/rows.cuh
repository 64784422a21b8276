// The work of a block on one row between two positions of the depth decoder: it draws a code and
// looks up its embedding.
#pragma once

#include "cuda/sampling/sampler.cuh"
#include "params/decode_depth.h"

namespace voxkern {
namespace {

// The block copies row `code` of [V, C]; a code out of range becomes zeros.
template <typename T>
__device__ __forceinline__ void copy_row(const T* rows, int64_t code, int64_t V, int64_t C, T* to) {
  const bool exists = code >= 0 && code < V;
  const T* const from = rows + (exists ? code * C : 0);
  if (C % kVector<T> == 0 && reinterpret_cast<uintptr_t>(rows) % 16 == 0) {
    for (int64_t i = threadIdx.x; i < C / kVector<T>; i += blockDim.x)
      reinterpret_cast<uint4*>(to)[i] =
          exists ? reinterpret_cast<const uint4*>(from)[i] : uint4{0, 0, 0, 0};
  } else {
    for (int64_t i = threadIdx.x; i < C; i += blockDim.x)
      to[i] = exists ? from[i] : from_float<T>(0.0f);
  }
}

// Draws row b's code of `codebook` and looks up the residual of the next position. The block must
// be one that sampling::sample_row() takes.
template <typename T>
__device__ void draw_and_look_up(const DecodeDepthParams& p, int64_t codebook, int64_t b,
                                 const T* logits, T* residual, sampling::Shared& shared) {
  const int64_t C = p.layers.C;
  const SamplerRow row = sampler_row(p, b, codebook);
  const int code = sampling::sample_row(logits + b * p.V, static_cast<int>(p.V), row, shared);
  if (threadIdx.x == 0) p.out[b * p.K + codebook] = code;
  if (codebook + 1 < p.K)
    copy_row(static_cast<const T*>(p.audio_rows) + codebook * p.V * C, code, p.V, C,
             residual + b * C);
}

}  // namespace
}  // namespace voxkern
