// Parameters of a stack of Llama layers (pre-norm, rotary GQA, SwiGLU) and of the final norm.
#pragma once

#include "common/weight.h"

namespace voxkern {

struct LayersParams {
  int64_t L, C, F, Hq, Hkv, D;
  const void* attn_norm;    // [L, C]
  Weight qkv;               // [L, (Hq + 2 Hkv) D, C]
  Weight o;                 // [L, C, Hq D]
  const void* mlp_norm;     // [L, C]
  Weight gate_up;           // [L, 2F, C]
  Weight down;              // [L, C, F]
  const void* norm;         // [C]
  const float* rope_table;  // [positions, D], cosines | sines
  float eps;
};

#ifndef VOX_ISA

// Checks the operands of layers of width C, which must have the device and dtype of `like` (packed
// weights and rope_table have dtypes of their own), and returns their params.
inline LayersParams layers_params(const Tensor& like, int64_t C, const Tensor& attn_norm,
                                  const Tensor& qkv, const Tensor& o, const Tensor& mlp_norm,
                                  const Tensor& gate_up, const Tensor& down, const Tensor& norm,
                                  const Tensor& rope_table, int64_t num_heads, int64_t num_kv_heads,
                                  double eps) {
  check_dim(qkv, "qkv", 3);
  check_dim(down, "down", 3);
  check_dim(rope_table, "rope_table", 2);
  const int64_t L = qkv.size(0), F = weight_columns(down), D = rope_table.size(1);
  check(num_kv_heads >= 1 && num_heads % num_kv_heads == 0 && num_heads >= 1,
        "num_heads: expected a multiple of num_kv_heads, got ", num_heads, " and ", num_kv_heads);
  check(F >= 1, "down: expected F >= 1, got shape ", shape_string(down));
  check(D >= 2 && D % 2 == 0, "rope_table: expected [positions, D] with D even, got ",
        shape_string(rope_table));
  check(weight_format(gate_up) == Format::plain || F % kBlockRows == 0,
        "gate_up: packed, which needs F in a multiple of 16, got ", F);
  const auto norm_of = [&](const Tensor& t, const char* name, const char* letters,
                           std::initializer_list<int64_t> sizes) {
    check_operand(t, name, like, like.scalar_type());
    check_shape(t, name, letters, sizes);
    return t.const_data_ptr();
  };
  check_operand(rope_table, "rope_table", like, ScalarType::Float);
  return {
      .L = L,
      .C = C,
      .F = F,
      .Hq = num_heads,
      .Hkv = num_kv_heads,
      .D = D,
      .attn_norm = norm_of(attn_norm, "attn_norm", "[L, C]", {L, C}),
      .qkv = weight_of(qkv, "qkv", like, "[L, (Hq + 2 Hkv) D, C]",
                       {L, (num_heads + 2 * num_kv_heads) * D, C}),
      .o = weight_of(o, "o", like, "[L, C, Hq D]", {L, C, num_heads * D}),
      .mlp_norm = norm_of(mlp_norm, "mlp_norm", "[L, C]", {L, C}),
      .gate_up = weight_of(gate_up, "gate_up", like, "[L, 2F, C]", {L, 2 * F, C}),
      .down = weight_of(down, "down", like, "[L, C, F]", {L, C, F}),
      .norm = norm_of(norm, "norm", "[C]", {C}),
      .rope_table = static_cast<const float*>(rope_table.const_data_ptr()),
      .eps = static_cast<float>(eps),
  };
}

#endif

}  // namespace voxkern
