// The arguments and buffers of a frame, and a block's work on one row between two positions, which
// is to draw a code and to look up its embedding: shared by decode_depth's launches and by its
// persistent kernel.
#pragma once

#include "cuda/attention/depth.cuh"
#include "cuda/decoder/layers.cuh"
#include "cuda/sampling/sampler.cuh"
#include "params/decode_depth.h"

namespace voxkern {

struct DepthFrame {
  DecodeDepthParams op;
  void* residual;           // [B, C], at first position 0's
  void *qkv, *attended;     // [B, (Hq + 2 Hkv) D], [B, Hq D]
  void* activated;          // [B, F]
  void* logits;             // [B, V]
  void *k_cache, *v_cache;  // [L, B, Hkv, K, D]
  unsigned* arrived;        // the grid barrier's counter, 0 at first
};

// Runs all positions after the projection in one launch. Returns false and launches nothing if it
// does not take these sizes, weights or this device. persistent.cu defines it.
bool persistent_depth(const DepthFrame& p, const Layers& layers, cudaStream_t stream);

namespace {

// The attention of one position and layer.
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

// The block copies row `code` of [V, C]; a code out of range becomes zeros.
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

// Draws row b's code of `codebook` and looks up the residual of the next position. The block must
// be one that sampling::sample_row() takes.
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
