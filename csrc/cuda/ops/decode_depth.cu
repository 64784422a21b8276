#include "cuda/decoder/layers.cuh"
#include "cuda/decoder/persistent.h"
#include "cuda/decoder/rows.cuh"
#include "params/decode_depth.h"

// Positions run one after the other. A layer is five launches of layers.cuh; a position has two
// more: the norm and the head, and a draw that also looks up the next position's row. The cache is
// [L, B, Hkv, K, D]; if depth_attention does not take the heads, it is pages of K positions, one a
// row. Nothing waits on the host, so a CUDA graph can capture the op. persistent.cu runs all of it
// but the projection in one launch, for _decode_depth_persistent.
//
// begin_kernel, look_up_kernel and draw_kernel let no kernel start before their own wait: all later
// kernels may read the op's arguments and places, and keys of earlier positions, before theirs.
//
// Floor: 2.1 ms of memory's time at batch 1 in bfloat16 on an H100; docs/cuda.md has the launches.
namespace voxkern {
namespace {

constexpr int kDepthBlockThreads = 256;

// The paged attention's view of each position.
struct DepthPlaces {
  int64_t* positions;   // [K, B]
  int64_t* slots;       // [K, B]
  int32_t* seq_lens;    // [K, B]
  int32_t* page_table;  // [B, 1]
};

// One thread a position and row.
__global__ void places_kernel(DepthPlaces all, int64_t B, int64_t K, unsigned* counters,
                              int64_t count) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t c = i; c < count; c += static_cast<int64_t>(gridDim.x) * blockDim.x) counters[c] = 0;
  if (i >= B * K) return;
  const int64_t position = i / B, b = i % B;
  all.positions[i] = position;
  all.slots[i] = b * K + position;
  all.seq_lens[i] = static_cast<int32_t>(position + 1);
  if (position == 0) all.page_table[b] = static_cast<int32_t>(b);
}

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
  DepthPlaces all;
  void* logits;             // [B, V]
  void *k_cache, *v_cache;  // [L, B, Hkv, K, D]
  float* splits;
  unsigned* counters;
  int64_t count;
  unsigned* arrived;  // of persistent_depth()

  DepthBuffers(Arena& arena, const DecodeDepthParams& p) : layers(arena, p.layers, p.dtype, p.B) {
    const LayersParams& l = p.layers;
    all.positions = arena.take<int64_t>(p.K * p.B);
    all.slots = arena.take<int64_t>(p.K * p.B);
    all.seq_lens = arena.take<int32_t>(p.K * p.B);
    all.page_table = arena.take<int32_t>(p.B);
    logits = arena.take<char>(p.B * p.V * element_bytes(p.dtype));
    const int64_t cache = l.L * p.B * l.Hkv * p.K * l.D * element_bytes(p.dtype);
    k_cache = arena.take<char>(cache);
    v_cache = arena.take<char>(cache);
    splits = arena.take<float>(decode_attention_workspace(paged(p, 0, 0)));
    count = append_and_attend_counters(paged(p, 0, 0));
    counters = arena.take<unsigned>(count);
    arrived = arena.take<unsigned>(1);
  }

  // A layer's part of a cache.
  void* keys(const DecodeDepthParams& p, void* cache, int64_t layer) const {
    const LayersParams& l = p.layers;
    return offset(cache, layer * p.B * l.Hkv * p.K * l.D, p.dtype);
  }

  PersistentDepthParams persistent(const DecodeDepthParams& p) const {
    return {
        .op = p,
        .residual = layers.residual,
        .qkv = layers.qkv,
        .attended = layers.attended,
        .activated = layers.activated,
        .logits = logits,
        .k_cache = k_cache,
        .v_cache = v_cache,
        .arrived = arrived,
    };
  }

  DepthAttentionParams resident(const DecodeDepthParams& p, int64_t position, int64_t layer) const {
    return depth_attention_params(persistent(p), position, layer);
  }

  DecodeAttentionParams paged(const DecodeDepthParams& p, int64_t position, int64_t layer) const {
    DecodeAttentionParams attention =
        layers.attention(p.K, 1, 1.0f / sqrtf(static_cast<float>(p.layers.D)));
    attention.k_pages = keys(p, k_cache, layer);
    attention.v_pages = keys(p, v_cache, layer);
    attention.page_table = all.page_table;
    attention.seq_lens = all.seq_lens + position * p.B;
    return attention;
  }

  AppendKvParams append(const DecodeDepthParams& p, int64_t position, int64_t layer) const {
    AppendKvParams append = layers.append_kv(p.K);
    append.positions = all.positions + position * p.B;
    append.slots = all.slots + position * p.B;
    append.k_pages = keys(p, k_cache, layer);
    append.v_pages = keys(p, v_cache, layer);
    return append;
  }
};

template <typename T>
void decode(const DecodeDepthParams& p, DepthBuffers& buffers, bool persistent,
            cudaStream_t stream) {
  Layers& layers = buffers.layers;
  T* const residual = static_cast<T*>(layers.residual);
  const LaunchShape each_row = {.grid = dim3(static_cast<unsigned>(p.B)),
                                .block = dim3(kDepthBlockThreads),
                                .stream = stream,
                                .overlaps_previous = true};
  LaunchShape each_draw = each_row;
  each_draw.block = dim3(sampling::block_threads(p.V));
  each_draw.shared_bytes = sampling::shared_bytes(p.V);
  const auto each = [&](int64_t items) -> LaunchShape {
    return {.grid = dim3(static_cast<unsigned>(divide_up(items, kDepthBlockThreads))),
            .block = dim3(kDepthBlockThreads),
            .stream = stream,
            .overlaps_previous = true};
  };
  if (!supports_depth_attention(buffers.resident(p, 0, 0)))
    launch(places_kernel, each(p.B * p.K), buffers.all, p.B, p.K, buffers.counters, buffers.count);
  launch(begin_kernel, each(p.B * p.K), p.code0, p.B, p.K, p.out, buffers.arrived);
  layers.project(p.hidden, p.projection, layers.residual, stream);
  if (persistent && persistent_depth(buffers.persistent(p), stream)) return;
  for (int64_t position = 0; position < p.K; ++position) {
    if (position == 1) launch(look_up_kernel<T>, each_row, p, residual);
    layers.keys_only = position == 0;
    layers.run(
        [&](int64_t layer) {
          const DepthAttentionParams resident = buffers.resident(p, position, layer);
          if (supports_depth_attention(resident))
            depth_attention(resident, stream);
          else
            append_and_attend(buffers.append(p, position, layer), buffers.paged(p, position, layer),
                              buffers.splits, buffers.counters, stream);
        },
        stream);
    if (position == 0) continue;
    layers.project_normed(p.layers.norm, matrix(p.heads, position - 1, p.dtype), buffers.logits,
                          stream);
    launch(draw_kernel<T>, each_draw, p, position, static_cast<const T*>(buffers.logits), residual);
  }
}

}  // namespace

// Bytes that `p.workspace` must hold.
int64_t decode_depth_workspace(const DecodeDepthParams& p) {
  Arena count(nullptr);
  DepthBuffers(count, p);
  return count.bytes();
}

void decode_depth(const DecodeDepthParams& p, bool persistent, cudaStream_t stream) {
  Arena arena(p.workspace);
  DepthBuffers buffers(arena, p);
  p.dtype == Dtype::f32 ? decode<float>(p, buffers, persistent, stream)
                        : decode<bf16>(p, buffers, persistent, stream);
}

}  // namespace voxkern

#ifdef VOX_HOST_PASS
namespace voxkern {
namespace {

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
      torch::stable::new_empty(hidden, {decode_depth_workspace(p)}, ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();
  const OnDevice device(hidden);
  decode_depth(p, kPersistent, device.stream);
  return out;
}

}  // namespace
}  // namespace voxkern

VOX_CUDA_LIBRARY(m) {
  m.impl("decode_depth", TORCH_BOX(&voxkern::decode_depth_cuda<false>));
  m.impl("_decode_depth_persistent", TORCH_BOX(&voxkern::decode_depth_cuda<true>));
}
#endif
