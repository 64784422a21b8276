// decode_backbone: all layers of the backbone for one new token of each sequence.
#pragma once

#include "common/layers.h"
#include "params/decode_attention.h"

namespace voxkern {

struct DecodeBackboneParams {
  Dtype dtype;
  int64_t B;
  int64_t P, S, M;  // pages of a layer, page size, pages in a row of the table
  const void* x;    // [B, C]
  LayersParams layers;
  const int64_t* positions;   // [B]
  const int64_t* slots;       // [B], page * S + offset, negative for none
  void* k_pages;              // [L, P, Hkv, S, D]
  void* v_pages;              // [L, P, Hkv, S, D]
  const int32_t* page_table;  // [B, M]
  const int32_t* seq_lens;    // [B]
  float scale;
  void* out;  // [B, C]
};

namespace {  // internal linkage: CPU kernels are compiled once per instruction set

// The attention of one layer, from qkv [B, (Hq + 2 Hkv) D] to out [B, Hq D].
inline DecodeAttentionParams attention_params(const DecodeBackboneParams& p, int64_t layer,
                                              const void* qkv, void* out) {
  const LayersParams& l = p.layers;
  const int64_t element_bytes = p.dtype == Dtype::f32 ? 4 : 2;
  const int64_t pages = layer * p.P * l.Hkv * p.S * l.D * element_bytes;
  return {
      .dtype = p.dtype,
      .B = p.B,
      .Hq = l.Hq,
      .Hkv = l.Hkv,
      .D = l.D,
      .S = p.S,
      .M = p.M,
      .q = qkv,
      .q_stride = (l.Hq + 2 * l.Hkv) * l.D,
      .k_pages = static_cast<const char*>(p.k_pages) + pages,
      .v_pages = static_cast<const char*>(p.v_pages) + pages,
      .page_table = p.page_table,
      .seq_lens = p.seq_lens,
      .scale = p.scale,
      .out = out,
  };
}

}  // namespace
#ifndef VOX_ISA

// `x` and `out` contiguous. Does not read the values of positions, slots and page_table.
inline DecodeBackboneParams decode_backbone_params(
    const Tensor& x, const Tensor& attn_norm, const Tensor& qkv, const Tensor& o,
    const Tensor& mlp_norm, const Tensor& gate_up, const Tensor& down, const Tensor& norm,
    const Tensor& rope_table, int64_t num_heads, int64_t num_kv_heads, double eps,
    const Tensor& positions, const Tensor& slots, const Tensor& k_pages, const Tensor& v_pages,
    const Tensor& page_table, const Tensor& seq_lens, const Tensor& out) {
  const Dtype dtype = float_dtype(x, "x");
  check_dim(x, "x", 2);
  const int64_t B = x.size(0), C = x.size(1);
  check(C >= 1, "x: expected [B, C] with C >= 1, got ", shape_string(x));
  const LayersParams layers = layers_params(x, C, attn_norm, qkv, o, mlp_norm, gate_up, down, norm,
                                            rope_table, num_heads, num_kv_heads, eps);
  check_operand(positions, "positions", x, ScalarType::Long);
  check_shape(positions, "positions", "[B]", {B});
  check_operand(slots, "slots", x, ScalarType::Long);
  check_shape(slots, "slots", "[B]", {B});
  for (const auto& [pages, name] : {std::pair(&k_pages, "k_pages"), {&v_pages, "v_pages"}}) {
    check_operand(*pages, name, x, x.scalar_type());
    check_shape(*pages, name, "[L, P, Hkv, S, D]", {layers.L, kAny, layers.Hkv, kAny, layers.D});
  }
  check(k_pages.size(3) >= 1, "k_pages: expected a page size S >= 1, got ", shape_string(k_pages));
  check(shape_string(v_pages) == shape_string(k_pages), "v_pages: expected k_pages' shape ",
        shape_string(k_pages), ", got ", shape_string(v_pages));
  check_page_table(page_table, seq_lens, x);
  check(page_table.size(0) == B, "page_table: expected shape [B, M] with B = ", B, ", got ",
        shape_string(page_table));
  return {
      .dtype = dtype,
      .B = B,
      .P = k_pages.size(1),
      .S = k_pages.size(3),
      .M = page_table.size(1),
      .x = x.const_data_ptr(),
      .layers = layers,
      .positions = static_cast<const int64_t*>(positions.const_data_ptr()),
      .slots = static_cast<const int64_t*>(slots.const_data_ptr()),
      .k_pages = k_pages.mutable_data_ptr(),
      .v_pages = v_pages.mutable_data_ptr(),
      .page_table = static_cast<const int32_t*>(page_table.const_data_ptr()),
      .seq_lens = static_cast<const int32_t*>(seq_lens.const_data_ptr()),
      .scale = static_cast<float>(1 / std::sqrt(static_cast<double>(layers.D))),
      .out = out.mutable_data_ptr(),
  };
}

#endif

}  // namespace voxkern
