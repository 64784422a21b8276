// Shared by decode_depth's launches and its persistent kernel: the arguments and buffers of a
// frame, and the work on one row between two positions, in which a block draws a code and looks up
// its embedding.
#pragma once

#include "cuda/attention/depth.cuh"
#include "cuda/decoder/layers.cuh"
#include "cuda/sampling/sampler.cuh"
#include "params/decode_depth.h"

namespace voxkern {

struct DepthFrame {
  DecodeDepthParams op;
  void* residual;           // [B, C], initially position 0's
  void *qkv, *attended;     // [B, (Hq + 2 Hkv) D], [B, Hq D]
  void* activated;          // [B, F]
  void* logits;             // [B, V]
  void *k_cache, *v_cache;  // [L, B, Hkv, K, D]
  unsigned* arrived;        // the grid barrier's counter, initially 0
};

// Runs all positions in one launch, after the caller has projected op.hidden to `residual`.
// Returns false and launches nothing if it does not support these sizes or weights, or this device.
// Defined in persistent.cu.
bool persistent_depth(const DepthFrame& p, const Layers& layers, cudaStream_t stream);

namespace {

// The attention parameters of one position and layer.
inline attention::DepthAttentionParams depth_attention_params(const DepthFrame& p, int64_t position,
                                                              int64_t layer) {
  const LayersParams& l = p.op.layers;
  const int64_t bytes = p.op.dtype == Dtype::f32 ? 4 : 2;
  const int64_t cache = layer * p.op.B * l.Hkv * p.op.K * l.D * bytes;
  return {
      .B = p.op.B,
      .Hq = l.Hq,
      .Hkv = l.Hkv,
      .D = l.D,
      .K = p.op.K,
      .position = position,
      .qkv = p.qkv,
      .rope_table = l.rope_table,
      .k_cache = static_cast<char*>(p.k_cache) + cache,
      .v_cache = static_cast<char*>(p.v_cache) + cache,
      .scale = 1.0f / sqrtf(static_cast<float>(l.D)),
      .out = p.attended,
  };
}

// Block-wide copy of row `code` of [V, C]; writes zeros for a code out of range.
template <typename T>
VOX_DEVICE void copy_row(const T* rows, int64_t code, int64_t V, int64_t C, T* to) {
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

// Draws row b's code of `codebook` and copies the code's embedding, the next position's input, to
// the residual; the last codebook's code has no next position. Needs a block that meets the
// requirements of sampling::sample_row().
template <typename T>
VOX_DEVICE void draw_and_look_up(const DecodeDepthParams& p, int64_t codebook, int64_t b,
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
