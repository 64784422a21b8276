// decode_depth: the depth decoder, from codebook 0 to a whole frame.
#pragma once

#include "dtype.h"

namespace voxkern {

struct DecodeDepthParams {
  Dtype dtype;
  int64_t B, K, V, L, Cb, C, F, Hq, Hkv, D;
  const void* hidden;       // [B, Cb]
  const int64_t* code0;     // [B]
  const void* audio_table;  // [K * V, Cb]
  const void* projection;   // [C, Cb]
  const void* attn_norm;    // [L, C]
  const void* qkv;          // [L, (Hq + 2 Hkv) D, C]
  const void* o;            // [L, C, Hq D]
  const void* mlp_norm;     // [L, C]
  const void* gate_up;      // [L, 2F, C]
  const void* down;         // [L, C, F]
  const void* norm;         // [C]
  const void* heads;        // [K - 1, V, C]
  const float* rope_table;  // [>= K, D], cosines | sines
  float eps;
  const float* temperature;  // [B]
  const int32_t* top_k;      // [B]
  const float* top_p;        // [B]
  const float* min_p;        // [B]
  const int64_t* seeds;      // [B]
  const int64_t* frames;     // [B]
  int64_t* out;              // [B, K], code0 already in column 0
  void* workspace;           // as large as the device's kernel wants it
};

}  // namespace voxkern

#ifndef VOX_ISA
#include "check.h"
#include "sample_tokens.h"

namespace voxkern {

// `hidden` contiguous. The codes in code0 are not looked at; out and workspace are left null.
inline DecodeDepthParams decode_depth_params(
    const Tensor& hidden, const Tensor& code0, const Tensor& audio_table, const Tensor& projection,
    const Tensor& attn_norm, const Tensor& qkv, const Tensor& o, const Tensor& mlp_norm,
    const Tensor& gate_up, const Tensor& down, const Tensor& norm, const Tensor& heads,
    const Tensor& rope_table, int64_t num_heads, int64_t num_kv_heads, double eps,
    const Tensor& temperature, const Tensor& top_k, const Tensor& top_p, const Tensor& min_p,
    const Tensor& seeds, const Tensor& frames) {
  const Dtype dtype = float_dtype(hidden, "hidden");
  check_dim(hidden, "hidden", 2);
  check_dim(projection, "projection", 2);
  check_dim(heads, "heads", 3);
  check_dim(rope_table, "rope_table", 2);
  check_dim(qkv, "qkv", 3);
  check_dim(down, "down", 3);
  const int64_t B = hidden.size(0), Cb = hidden.size(1), C = projection.size(0);
  const int64_t K = heads.size(0) + 1, V = heads.size(1);
  const int64_t L = qkv.size(0), F = down.size(2), D = rope_table.size(1);
  check(num_kv_heads >= 1 && num_heads % num_kv_heads == 0 && num_heads >= 1,
        "num_heads: expected a multiple of num_kv_heads, got ", num_heads, " and ", num_kv_heads);
  check(K >= 2, "heads: expected [K - 1, V, C] with K >= 2, got ", shape_string(heads));
  check(V >= 1 && V < (1 << 30), "heads: expected 1 <= V < 2^30, got ", shape_string(heads));
  check(C >= 1 && Cb >= 1, "projection: expected C >= 1 and Cb >= 1, got ",
        shape_string(projection));
  check(F >= 1, "down: expected F >= 1, got shape ", shape_string(down));
  check(D >= 2 && D % 2 == 0 && rope_table.size(0) >= K,
        "rope_table: expected [at least K, D] with D even and K = ", K, ", got ",
        shape_string(rope_table));

  const auto check_weight = [&](const Tensor& t, const char* name, const char* letters,
                                std::initializer_list<int64_t> sizes) {
    check_operand(t, name, hidden, hidden.scalar_type());
    check_shape(t, name, letters, sizes);
  };
  check_operand(code0, "code0", hidden, ScalarType::Long);
  check_shape(code0, "code0", "[B]", {B});
  check_weight(audio_table, "audio_table", "[K * V, Cb]", {K * V, Cb});
  check_weight(projection, "projection", "[C, Cb]", {C, Cb});
  check_weight(attn_norm, "attn_norm", "[L, C]", {L, C});
  check_weight(qkv, "qkv", "[L, (Hq + 2 Hkv) D, C]", {L, (num_heads + 2 * num_kv_heads) * D, C});
  check_weight(o, "o", "[L, C, Hq D]", {L, C, num_heads * D});
  check_weight(mlp_norm, "mlp_norm", "[L, C]", {L, C});
  check_weight(gate_up, "gate_up", "[L, 2F, C]", {L, 2 * F, C});
  check_weight(down, "down", "[L, C, F]", {L, C, F});
  check_weight(norm, "norm", "[C]", {C});
  check_weight(heads, "heads", "[K - 1, V, C]", {K - 1, V, C});
  check_operand(rope_table, "rope_table", hidden, ScalarType::Float);
  check_sampling(hidden, B, temperature, top_k, top_p, min_p, seeds, frames);
  return {
      .dtype = dtype,
      .B = B,
      .K = K,
      .V = V,
      .L = L,
      .Cb = Cb,
      .C = C,
      .F = F,
      .Hq = num_heads,
      .Hkv = num_kv_heads,
      .D = D,
      .hidden = hidden.const_data_ptr(),
      .code0 = static_cast<const int64_t*>(code0.const_data_ptr()),
      .audio_table = audio_table.const_data_ptr(),
      .projection = projection.const_data_ptr(),
      .attn_norm = attn_norm.const_data_ptr(),
      .qkv = qkv.const_data_ptr(),
      .o = o.const_data_ptr(),
      .mlp_norm = mlp_norm.const_data_ptr(),
      .gate_up = gate_up.const_data_ptr(),
      .down = down.const_data_ptr(),
      .norm = norm.const_data_ptr(),
      .heads = heads.const_data_ptr(),
      .rope_table = static_cast<const float*>(rope_table.const_data_ptr()),
      .eps = static_cast<float>(eps),
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

}  // namespace voxkern
#endif
