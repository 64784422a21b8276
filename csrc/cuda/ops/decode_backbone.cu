#include "cuda/decoder/layers.cuh"
#include "cuda/ops/append_and_attend.cuh"
#include "params/decode_backbone.h"

// A layer is five launches of layers.cuh, eight where gemm() cannot fuse. begin_kernel precedes
// them and lets no kernel start before its own wait: all later kernels may read the op's arguments
// and older keys before theirs. Nothing waits on the host, so a CUDA graph can capture the op.
//
// Floor: 580 us of memory's time at batch 1 in bfloat16 for CSM's 16 layers on an H100;
// docs/cuda.md has the launches.
namespace voxkern {
namespace {

constexpr int kBeginThreads = 256;

// residual = x, of `words` words, counters = 0.
template <typename Word>
__global__ void begin_kernel(const Word* x, Word* residual, int64_t words, unsigned* counters,
                             int64_t count) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int64_t me = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t all = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = me; i < words; i += all) residual[i] = x[i];
  for (int64_t i = me; i < count; i += all) counters[i] = 0;
}

// append_kv of a layer, from its qkv.
AppendKvParams append_params(const DecodeBackboneParams& p, int64_t layer, void* qkv) {
  const LayersParams& l = p.layers;
  const int64_t k = l.Hq * l.D, v = k + l.Hkv * l.D, stride = v + l.Hkv * l.D;
  const int64_t pages = layer * p.P * l.Hkv * p.S * l.D;
  return {
      .dtype = p.dtype,
      .T = p.B,
      .Hq = l.Hq,
      .Hkv = l.Hkv,
      .D = l.D,
      .S = p.S,
      .q = qkv,
      .q_stride = stride,
      .k = offset(qkv, k, p.dtype),
      .k_stride = stride,
      .v = offset(qkv, v, p.dtype),
      .v_stride = stride,
      .rope_table = l.rope_table,
      .positions = p.positions,
      .slots = p.slots,
      .k_pages = offset(p.k_pages, pages, p.dtype),
      .v_pages = offset(p.v_pages, pages, p.dtype),
  };
}

// The scratch memory of a call.
struct Buffers {
  Layers layers;
  float* splits;
  unsigned* counters;
  int64_t count;

  Buffers(Arena& arena, const DecodeBackboneParams& p) : layers(arena, p.layers, p.dtype, p.B) {
    const DecodeAttentionParams attention = attention_params(p, 0, nullptr, nullptr);
    splits = arena.take<float>(decode_attention_workspace(attention));
    count = append_and_attend_counters(attention);
    counters = arena.take<unsigned>(count);
  }
};

}  // namespace

void decode_backbone(const DecodeBackboneParams& p, void* workspace, cudaStream_t stream) {
  Arena arena(workspace);
  Buffers buffers(arena, p);
  const LayersParams& l = p.layers;
  Layers& layers = buffers.layers;
  const int64_t bytes = p.B * l.C * element_bytes(p.dtype);
  const auto begin = [&](auto word) {
    using Word = decltype(word);
    launch(begin_kernel<Word>,
           {.grid = divide_up(bytes, 16 * kBeginThreads), .block = kBeginThreads, .stream = stream},
           static_cast<const Word*>(p.x), static_cast<Word*>(layers.residual),
           bytes / static_cast<int64_t>(sizeof(Word)), buffers.counters, buffers.count);
  };
  const bool words = bytes % 16 == 0 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
  words ? begin(uint4()) : begin(uint16_t());
  layers.run(
      [&](int64_t layer) {
        append_and_attend(append_params(p, layer, layers.qkv),
                          attention_params(p, layer, layers.qkv, layers.attended), buffers.splits,
                          buffers.counters, stream);
      },
      stream);
  layers.normalise(l.norm, p.out, stream);
}

#ifdef VOX_HOST_PASS
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
  check_attention(p.layers, p.B);
  if (p.B == 0) return out;
  Tensor workspace = torch::stable::new_empty(x, {arena_bytes<Buffers>(p)}, ScalarType::Byte);
  const OnDevice device(x);
  decode_backbone(p, workspace.mutable_data_ptr(), device.stream);
  return out;
}

VOX_CUDA_LIBRARY(m) { m.impl("decode_backbone", TORCH_BOX(&decode_backbone_cuda)); }
#endif

}  // namespace voxkern
