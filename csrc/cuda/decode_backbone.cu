#include "../decode_backbone.h"
#include "layers.cuh"

// The composition of the other ops, launch by launch: 9 or 10 a layer. It waits for nothing on the
// host, so a CUDA graph can hold it.
#ifdef VOX_HOST_PASS
namespace voxkern {
namespace {

KvPlaces places_of(const DecodeBackboneParams& p) {
  return {
      .P = p.P,
      .S = p.S,
      .M = p.M,
      .positions = p.positions,
      .slots = p.slots,
      .page_table = p.page_table,
      .seq_lens = p.seq_lens,
      .k_pages = p.k_pages,
      .v_pages = p.v_pages,
      .scale = p.scale,
  };
}

Tensor decode_backbone_cuda(Tensor x, Tensor attn_norm, Tensor qkv, Tensor o, Tensor mlp_norm,
                            Tensor gate_up, Tensor down, Tensor norm, Tensor rope_table,
                            int64_t num_heads, int64_t num_kv_heads, double eps, Tensor positions,
                            Tensor slots, Tensor k_pages, Tensor v_pages, Tensor page_table,
                            Tensor seq_lens) {
  x = torch::stable::contiguous(x);
  Tensor out = torch::stable::empty_like(x);
  const DecodeBackboneParams p = decode_backbone_params(
      x, attn_norm, qkv, o, mlp_norm, gate_up, down, norm, rope_table, num_heads, num_kv_heads, eps,
      positions, slots, k_pages, v_pages, page_table, seq_lens, out);
  check_plain(p.layers);
  if (p.B == 0) return out;
  const KvPlaces places = places_of(p);
  Arena count(nullptr);
  Layers(count, p.layers, p.dtype, p.B, places);
  Tensor workspace = torch::stable::new_empty(x, {count.bytes()}, ScalarType::Byte);
  Arena arena(workspace.mutable_data_ptr());
  Layers layers(arena, p.layers, p.dtype, p.B, places);
  const OnDevice device(x);
  copy_bytes(layers.residual, p.x, p.B * p.layers.C * element_bytes(p.dtype), device.stream);
  layers.normed = p.out;
  layers.run(places, device.stream);
  return out;
}

}  // namespace
}  // namespace voxkern

VOX_CUDA_LIBRARY(m) { m.impl("decode_backbone", TORCH_BOX(&voxkern::decode_backbone_cuda)); }
#endif
