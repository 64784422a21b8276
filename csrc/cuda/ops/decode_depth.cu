#include "cuda/decoder/depth.cuh"

// Positions run one after the other. A layer is five launches of layers.cuh; a position has two
// more: the norm and the head, and a draw that also looks up the next position's row. Nothing waits
// on the host, so a CUDA graph can capture the op. persistent.cu runs all of it but the projection
// in one launch, for _decode_depth_persistent.
//
// begin_kernel, look_up_kernel and draw_kernel let no kernel start before their own wait: all later
// kernels may read the op's arguments, and keys of earlier positions, before theirs.
//
// Floor: 2.1 ms of memory's time at batch 1 in bfloat16 on an H100; docs/cuda.md has the launches.
namespace voxkern {
namespace {

constexpr int kDepthBlockThreads = 256;

// out[:, 0] = code0, -2 elsewhere (kept if the grid gives up); clears the counter of
// persistent_depth()'s barriers.
__global__ void begin_kernel(const int64_t* code0, int64_t B, int64_t K, int64_t* out,
                             unsigned* arrived) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i == 0) *arrived = 0;
  if (i < B * K) out[i] = i % K ? -2 : code0[i / K];
}

// A block takes a row: codebook 0 to the residual of position 1.
template <typename T>
__global__ void look_up_kernel(DecodeDepthParams p, T* residual) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int64_t b = blockIdx.x, C = p.layers.C;
  copy_row(static_cast<const T*>(p.audio_rows), p.code0[b], p.V, C, residual + b * C);
}

// A block takes a row: draws `codebook`, and looks up the next position's row.
template <typename T>
__global__ void __launch_bounds__(sampling::kSamplerThreads)
    draw_kernel(DecodeDepthParams p, int64_t codebook, const T* logits, T* residual) {
  VOX_DYNAMIC_SHARED(sampling::Shared, shared);
  wait_for_previous_kernel();
  let_next_kernel_start();
  draw_and_look_up(p, codebook, blockIdx.x, logits, residual, *shared);
}

// The scratch memory of a frame.
struct DepthBuffers {
  Layers layers;
  DepthFrame frame;

  DepthBuffers(Arena& arena, const DecodeDepthParams& p) : layers(arena, p.layers, p.dtype, p.B) {
    const int64_t width = element_bytes(p.dtype);
    const int64_t cache = p.layers.L * p.B * p.layers.Hkv * p.K * p.layers.D * width;
    frame = {
        .op = p,
        .residual = layers.residual,
        .qkv = layers.qkv,
        .attended = layers.attended,
        .activated = layers.activated,
        .logits = arena.take<char>(p.B * p.V * width),
        .k_cache = arena.take<char>(cache),
        .v_cache = arena.take<char>(cache),
        .arrived = arena.take<unsigned>(1),
    };
  }
};

template <typename T>
void decode(DepthBuffers& buffers, bool persistent, cudaStream_t stream) {
  Layers& layers = buffers.layers;
  const DepthFrame& frame = buffers.frame;
  const DecodeDepthParams& p = frame.op;
  T* const residual = static_cast<T*>(layers.residual);
  const LaunchShape each_row = {.grid = p.B, .block = kDepthBlockThreads, .stream = stream};
  LaunchShape each_code = each_row, each_draw = each_row;
  each_code.grid = divide_up(p.B * p.K, kDepthBlockThreads);
  each_draw.block = sampling::block_threads(p.V);
  each_draw.shared_bytes = sampling::shared_bytes(p.V);
  launch(begin_kernel, each_code, p.code0, p.B, p.K, p.out, frame.arrived);
  layers.multiply(layers.product(p.hidden, p.projection, layers.residual), stream);
  if (persistent && persistent_depth(frame, layers, stream)) return;
  for (int64_t position = 0; position < p.K; ++position) {
    if (position == 1) launch(look_up_kernel<T>, each_row, p, residual);
    layers.keys_only = position == 0;
    const auto attend = [&](int64_t layer) {
      attention::launch_depth_attention<T>(depth_attention_params(frame, position, layer), stream);
    };
    layers.run(attend, stream);
    if (position == 0) continue;
    layers.multiply(
        layers.normed(p.layers.norm, matrix(p.heads, position - 1, p.dtype), frame.logits), stream);
    launch(draw_kernel<T>, each_draw, p, position, static_cast<const T*>(frame.logits), residual);
  }
}

}  // namespace

void decode_depth(const DecodeDepthParams& p, bool persistent, cudaStream_t stream) {
  Arena arena(p.workspace);
  DepthBuffers buffers(arena, p);
  p.dtype == Dtype::f32 ? decode<float>(buffers, persistent, stream)
                        : decode<bf16>(buffers, persistent, stream);
}

#ifdef VOX_HOST_PASS
template <bool kPersistent>
Tensor decode_depth_cuda(Tensor hidden, Tensor code0, Tensor audio_rows, Tensor projection,
                         Tensor attn_norm, Tensor qkv, Tensor o, Tensor mlp_norm, Tensor gate_up,
                         Tensor down, Tensor norm, Tensor heads, Tensor rope_table,
                         int64_t num_heads, int64_t num_kv_heads, double eps, Tensor temperature,
                         Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds, Tensor frames) {
  hidden = torch::stable::contiguous(hidden);
  DecodeDepthParams p =
      decode_depth_params(hidden, code0, audio_rows, projection, attn_norm, qkv, o, mlp_norm,
                          gate_up, down, norm, heads, rope_table, num_heads, num_kv_heads, eps,
                          temperature, top_k, top_p, min_p, seeds, frames);
  check_attention(p.layers, p.B);
  check(p.V <= sampling::kMaxVocabulary, "heads: on CUDA expected V <= ", sampling::kMaxVocabulary,
        ", got ", p.V);
  Tensor out = torch::stable::new_empty(code0, {p.B, p.K});
  if (p.B == 0) return out;
  p.out = static_cast<int64_t*>(out.mutable_data_ptr());
  Tensor workspace =
      torch::stable::new_empty(hidden, {arena_bytes<DepthBuffers>(p)}, ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();
  const OnDevice device(hidden);
  decode_depth(p, kPersistent, device.stream);
  return out;
}

VOX_CUDA_LIBRARY(m) {
  m.impl("decode_depth", TORCH_BOX(&decode_depth_cuda<false>));
  m.impl("_decode_depth_persistent", TORCH_BOX(&decode_depth_cuda<true>));
}
#endif

}  // namespace voxkern
