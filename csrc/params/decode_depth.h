// decode_depth: the depth decoder, which completes a frame from its code of codebook 0.
#pragma once

#include "common/layers.h"
#include "common/sampling.h"

namespace voxkern {

struct DecodeDepthParams {
  Dtype dtype;
  int64_t B, K, V, Cb;
  const void* hidden;      // [B, Cb]
  const int64_t* code0;    // [B]
  const void* audio_rows;  // [K * V, C]
  Weight projection;       // [C, Cb]
  LayersParams layers;
  Weight heads;              // [K - 1, V, C]
  const float* temperature;  // [B]
  const int32_t* top_k;      // [B]
  const float* top_p;        // [B]
  const float* min_p;        // [B]
  const int64_t* seeds;      // [B]
  const int64_t* frames;     // [B]
  int64_t* out;              // [B, K], code0 already in column 0
  void* workspace;           // its size depends on the device's kernel
};

#ifndef VOX_ISA

// `hidden` contiguous. Leaves out and workspace null and does not read the values of code0.
inline DecodeDepthParams decode_depth_params(
    const Tensor& hidden, const Tensor& code0, const Tensor& audio_rows, const Tensor& projection,
    const Tensor& attn_norm, const Tensor& qkv, const Tensor& o, const Tensor& mlp_norm,
    const Tensor& gate_up, const Tensor& down, const Tensor& norm, const Tensor& heads,
    const Tensor& rope_table, int64_t num_heads, int64_t num_kv_heads, double eps,
    const Tensor& temperature, const Tensor& top_k, const Tensor& top_p, const Tensor& min_p,
    const Tensor& seeds, const Tensor& frames) {
  const Dtype dtype = float_dtype(hidden, "hidden");
  check_dim(hidden, "hidden", 2);
  check_dim(projection, "projection", 2);
  check_dim(heads, "heads", 3);
  check_operand(audio_rows, "audio_rows", hidden, hidden.scalar_type());
  check_dim(audio_rows, "audio_rows", 2);
  const int64_t B = hidden.size(0), Cb = hidden.size(1), K = heads.size(0) + 1;
  const int64_t V = audio_rows.size(0) / K, C = audio_rows.size(1);
  check(K >= 2, "heads: expected [K - 1, V, C] with K >= 2, got ", shape_string(heads));
  check(V >= 1 && V < (1 << 30) && audio_rows.size(0) == K * V && C >= 1,
        "audio_rows: expected [K * V, C] with K = ", K, ", got ", shape_string(audio_rows));
  check(Cb >= 1, "hidden: expected [B, Cb] with Cb >= 1, got ", shape_string(hidden));
  const LayersParams layers = layers_params(hidden, C, attn_norm, qkv, o, mlp_norm, gate_up, down,
                                            norm, rope_table, num_heads, num_kv_heads, eps);
  check(rope_table.size(0) >= K, "rope_table: expected [at least K, D] with K = ", K, ", got ",
        shape_string(rope_table));
  check_operand(code0, "code0", hidden, ScalarType::Long);
  check_shape(code0, "code0", "[B]", {B});
  check_sampling(hidden, B, temperature, top_k, top_p, min_p, seeds, frames);
  return {
      .dtype = dtype,
      .B = B,
      .K = K,
      .V = V,
      .Cb = Cb,
      .hidden = hidden.const_data_ptr(),
      .code0 = static_cast<const int64_t*>(code0.const_data_ptr()),
      .audio_rows = audio_rows.const_data_ptr(),
      .projection = weight_of(projection, "projection", hidden, "[C, Cb]", {C, Cb}),
      .layers = layers,
      .heads = weight_of(heads, "heads", hidden, "[K - 1, V, C]", {K - 1, V, C}),
      .temperature = static_cast<const float*>(temperature.const_data_ptr()),
      .top_k = static_cast<const int32_t*>(top_k.const_data_ptr()),
      .top_p = static_cast<const float*>(top_p.const_data_ptr()),
      .min_p = static_cast<const float*>(min_p.const_data_ptr()),
      .seeds = static_cast<const int64_t*>(seeds.const_data_ptr()),
      .frames = static_cast<const int64_t*>(frames.const_data_ptr()),
      .out = nullptr,
      .workspace = nullptr,
  };
}

#endif

}  // namespace voxkern
