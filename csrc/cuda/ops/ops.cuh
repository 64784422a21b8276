// The kernels by their Params, for ops built from others. Each is defined in its own <op>.cu.
#pragma once

#include "cuda/runtime/launch.cuh"

// The host's pass alone calls them.
#include "cuda/gemm/gemm.h"
#include "params/append_kv.h"
#include "params/decode_attention.h"
#include "params/rms_norm.h"
#include "params/silu_mul.h"

namespace voxkern {

void rms_norm(const RmsNormParams& p, cudaStream_t stream);
void silu_mul(const SiluMulParams& p, cudaStream_t stream);

// append_kv and decode_attention fused. It reads lengths, pages, positions and slots, and all keys
// except those in `slots`, before the wait (see the contract in launch.cuh). `workspace` holds
// decode_attention_workspace() floats, `counters` append_and_attend_counters() zeros, which are
// zeros again at the end.
int64_t decode_attention_workspace(const DecodeAttentionParams& p);
int64_t append_and_attend_counters(const DecodeAttentionParams& p);
void append_and_attend(const AppendKvParams& append, const DecodeAttentionParams& p,
                       float* workspace, unsigned* counters, cudaStream_t stream);

// append_kv and decode_attention fused, for keys and values of one call. Keys before `position` are
// read before the wait.
struct DepthAttentionParams {
  Dtype dtype;
  int64_t B, Hq, Hkv, D, K, position;
  const void* qkv;          // [B, (Hq + 2 Hkv) D]
  const float* rope_table;  // [positions, D]
  void *k_cache, *v_cache;  // [B, Hkv, K, D]
  float scale;
  void* out;  // [B, Hq, D]
};
bool supports_depth_attention(const DepthAttentionParams& p);
void depth_attention(const DepthAttentionParams& p, cudaStream_t stream);

}  // namespace voxkern
