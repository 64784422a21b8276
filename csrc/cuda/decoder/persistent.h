// All positions of decode_depth after the projection in one launch. persistent.cu defines it.
#pragma once

#include "cuda/ops/ops.cuh"
#include "params/decode_depth.h"

namespace voxkern {

struct PersistentDepthParams {
  DecodeDepthParams op;
  void* residual;           // [B, C], at first position 0's
  void *qkv, *attended;     // [B, (Hq + 2 Hkv) D], [B, Hq D]
  void* activated;          // [B, F]
  void* logits;             // [B, V]
  void *k_cache, *v_cache;  // [L, B, Hkv, K, D]
  unsigned* arrived;        // 0
};

// The attention of one position and layer.
inline DepthAttentionParams depth_attention_params(const PersistentDepthParams& p, int64_t position,
                                                   int64_t layer) {
  const LayersParams& l = p.op.layers;
  const int64_t bytes = p.op.dtype == Dtype::f32 ? 4 : 2;
  const int64_t cache = layer * p.op.B * l.Hkv * p.op.K * l.D * bytes;
  return {
      .dtype = p.op.dtype,
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

// Returns false and launches nothing if it does not take these sizes, weights or this device.
bool persistent_depth(const PersistentDepthParams& p, cudaStream_t stream);

}  // namespace voxkern
