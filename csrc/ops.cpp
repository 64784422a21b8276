// Every op's schema, in one list. Implementations are registered at the foot of their own files.
#include <torch/csrc/stable/library.h>

// tests/simt builds the CUDA kernels for the host, as a library of another name.
#ifndef VOX_LIBRARY
#define VOX_LIBRARY voxkern
#endif

STABLE_TORCH_LIBRARY(VOX_LIBRARY, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("add_rms_norm(Tensor x, Tensor(a!) residual, Tensor weight, float eps) -> Tensor");
  m.def(
      "append_kv(Tensor(a!) q, Tensor k, Tensor v, Tensor rope_table, Tensor positions, "
      "Tensor slots, Tensor(b!) k_pages, Tensor(c!) v_pages) -> ()");
  m.def(
      "prefill_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, "
      "Tensor cu_seqlens, Tensor seq_lens, float scale) -> Tensor");
  m.def(
      "decode_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, "
      "Tensor seq_lens, float scale) -> Tensor");
  m.def("silu_mul(Tensor gate_up) -> Tensor");
  m.def("linear(Tensor x, Tensor weight) -> Tensor");
  m.def(
      "embed_frames(Tensor frames, Tensor mask, Tensor audio_table, Tensor text_table) -> Tensor");
  m.def(
      "sample_tokens(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, "
      "Tensor repetition_penalty, Tensor history, Tensor seeds, Tensor frames, int codebook) "
      "-> Tensor");
  m.def(
      "decode_backbone(Tensor x, Tensor attn_norm, Tensor qkv, Tensor o, Tensor mlp_norm, "
      "Tensor gate_up, Tensor down, Tensor norm, Tensor rope_table, int num_heads, "
      "int num_kv_heads, float eps, Tensor positions, Tensor slots, Tensor(a!) k_pages, "
      "Tensor(b!) v_pages, Tensor page_table, Tensor seq_lens) -> Tensor");
  m.def(
      "decode_depth(Tensor hidden, Tensor code0, Tensor audio_rows, Tensor projection, "
      "Tensor attn_norm, Tensor qkv, Tensor o, Tensor mlp_norm, Tensor gate_up, Tensor down, "
      "Tensor norm, Tensor heads, Tensor rope_table, int num_heads, int num_kv_heads, float eps, "
      "Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds, Tensor frames) "
      "-> Tensor");
  // decode_depth in one persistent kernel: CUDA only, for voxkern/persistent.py.
  m.def(
      "_decode_depth_persistent(Tensor hidden, Tensor code0, Tensor audio_rows, Tensor projection, "
      "Tensor attn_norm, Tensor qkv, Tensor o, Tensor mlp_norm, Tensor gate_up, Tensor down, "
      "Tensor norm, Tensor heads, Tensor rope_table, int num_heads, int num_kv_heads, float eps, "
      "Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds, Tensor frames) "
      "-> Tensor");
  m.def(
      "mimi_conv(Tensor x, Tensor(a!) past, Tensor weight, Tensor bias, Tensor? add, int dilation, "
      "bool elu) -> Tensor");
  m.def(
      "mimi_convs(Tensor x, Tensor fresh, Tensor(a!)[] past, Tensor[] weights, Tensor[] biases, "
      "int[] plan) -> Tensor");
  m.def(
      "mimi_transformer(Tensor x, Tensor positions, Tensor frequencies, Tensor norms, Tensor qkv, "
      "Tensor qkv_bias, Tensor o, Tensor o_bias, Tensor up, Tensor down, float eps, "
      "str activation, Tensor(a!) keys, Tensor(b!) values, int window) -> Tensor");

  // About the build and the machine; no tensors.
  m.def("cpu_isa() -> str");
  m.def("cpu_quota(str root) -> float");
  m.def("num_threads() -> int");
  m.def("set_num_threads(int n) -> ()");
}
