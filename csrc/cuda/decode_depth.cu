#include "../decode_depth.h"
#include "layers.cuh"

// The composition of the other ops, launch by launch, one position after the other: 9 a layer, and
// 4 a position. The caches are pages of K positions, one a row. It waits for nothing on the host,
// so a CUDA graph can hold it.
namespace voxkern {
namespace {

constexpr int kThreads = 256;

// What the layers want to know of each position, and what sampling takes for no penalty.
struct DepthPlaces {
  int64_t* codes;       // [K, B]
  int64_t* positions;   // [K, B]
  int64_t* slots;       // [K, B]
  int32_t* seq_lens;    // [K, B]
  int32_t* page_table;  // [B, 1]
  float* no_penalty;    // [B]
};

// One thread a position and row.
__global__ void prepare_kernel(DepthPlaces all, const int64_t* code0, int64_t B, int64_t K) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= B * K) return;
  const int64_t position = i / B, b = i % B;
  all.positions[i] = position;
  all.slots[i] = b * K + position;
  all.seq_lens[i] = static_cast<int32_t>(position + 1);
  if (position > 0) return;
  all.codes[b] = code0[b];
  all.page_table[b] = static_cast<int32_t>(b);
  all.no_penalty[b] = 1;
}

// A block copies row `code` of a codebook's rows for one sequence; a code outside becomes zeros.
template <typename T>
__global__ void look_up_kernel(const T* rows, const int64_t* codes, int64_t V, int64_t C, T* out) {
  const int64_t code = codes[blockIdx.x];
  for (int64_t i = threadIdx.x; i < C; i += blockDim.x)
    out[blockIdx.x * C + i] = code >= 0 && code < V ? rows[code * C + i] : from_float<T>(0.0f);
}

// out [B, K] from codes [K, B].
__global__ void transpose_kernel(const int64_t* codes, int64_t B, int64_t K, int64_t* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < B * K) out[i] = codes[i % K * B + i / K];
}

// What a frame needs besides the layers' buffers.
struct DepthBuffers {
  DepthPlaces all;
  void* logits;             // [B, V]
  void *k_pages, *v_pages;  // [L, B, Hkv, K, D]

  DepthBuffers(Arena& arena, const DecodeDepthParams& p) {
    const LayersParams& l = p.layers;
    all.codes = arena.take<int64_t>(p.K * p.B);
    all.positions = arena.take<int64_t>(p.K * p.B);
    all.slots = arena.take<int64_t>(p.K * p.B);
    all.seq_lens = arena.take<int32_t>(p.K * p.B);
    all.page_table = arena.take<int32_t>(p.B);
    all.no_penalty = arena.take<float>(p.B);
    logits = arena.take<char>(p.B * p.V * element_bytes(p.dtype));
    const int64_t cache = l.L * p.B * l.Hkv * p.K * l.D * element_bytes(p.dtype);
    k_pages = arena.take<char>(cache);
    v_pages = arena.take<char>(cache);
  }

  KvPlaces places(const DecodeDepthParams& p, int64_t position) const {
    const int64_t at = position * p.B;
    return {
        .P = p.B,
        .S = p.K,
        .M = 1,
        .positions = all.positions + at,
        .slots = all.slots + at,
        .page_table = all.page_table,
        .seq_lens = all.seq_lens + at,
        .k_pages = k_pages,
        .v_pages = v_pages,
        .scale = 1.0f / sqrtf(static_cast<float>(p.layers.D)),
    };
  }
};

void draw(const DecodeDepthParams& p, const DepthBuffers& buffers, int64_t codebook,
          cudaStream_t stream) {
  sample_tokens({.dtype = p.dtype,
                 .B = p.B,
                 .V = p.V,
                 .W = 0,
                 .logits = buffers.logits,
                 .temperature = p.temperature,
                 .top_k = p.top_k,
                 .top_p = p.top_p,
                 .min_p = p.min_p,
                 .repetition_penalty = buffers.all.no_penalty,
                 .history = nullptr,
                 .seeds = p.seeds,
                 .frames = p.frames,
                 .codebook = codebook,
                 .out = buffers.all.codes + codebook * p.B},
                stream);
}

template <typename T>
void look_up(const DecodeDepthParams& p, const int64_t* codes, int64_t codebook, void* out,
             cudaStream_t stream) {
  launch(look_up_kernel<T>,
         {.grid = dim3(static_cast<unsigned>(p.B)),
          .block = dim3(block_size(p.layers.C, kThreads)),
          .stream = stream},
         static_cast<const T*>(p.audio_rows) + codebook * p.V * p.layers.C, codes + codebook * p.B,
         p.V, p.layers.C, static_cast<T*>(out));
}

}  // namespace

void decode_depth(const DecodeDepthParams& p, cudaStream_t stream) {
  Arena arena(p.workspace);
  const DepthBuffers buffers(arena, p);
  Layers layers(arena, p.layers, p.dtype, p.B, buffers.places(p, 0));
  const LaunchShape each_code = {
      .grid = dim3(static_cast<unsigned>(divide_up(p.B * p.K, kThreads))),
      .block = dim3(kThreads),
      .stream = stream};
  launch(prepare_kernel, each_code, buffers.all, p.code0, p.B, p.K);
  for (int64_t position = 0; position < p.K; ++position) {
    if (position == 0)
      layers.project(p.hidden, p.B, p.projection, 0, layers.residual, stream);
    else if (p.dtype == Dtype::f32)
      look_up<float>(p, buffers.all.codes, position - 1, layers.residual, stream);
    else
      look_up<bf16>(p, buffers.all.codes, position - 1, layers.residual, stream);
    layers.run(buffers.places(p, position), stream);
    if (position == 0) continue;
    layers.project(layers.normed, p.B, p.heads, position - 1, buffers.logits, stream);
    draw(p, buffers, position, stream);
  }
  launch(transpose_kernel, each_code, buffers.all.codes, p.B, p.K, p.out);
}

}  // namespace voxkern

#ifdef VOX_HOST_PASS
namespace voxkern {
namespace {

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
  check_plain(p.projection, "projection");
  check_plain(p.layers);
  check_plain(p.heads, "heads");
  Tensor out = torch::stable::new_empty(code0, {p.B, p.K});
  if (p.B == 0) return out;
  p.out = static_cast<int64_t*>(out.mutable_data_ptr());
  Arena count(nullptr);
  const DepthBuffers buffers(count, p);
  Layers(count, p.layers, p.dtype, p.B, buffers.places(p, 0));
  Tensor workspace = torch::stable::new_empty(hidden, {count.bytes()}, ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();
  const OnDevice device(hidden);
  decode_depth(p, device.stream);
  return out;
}

}  // namespace
}  // namespace voxkern

VOX_CUDA_LIBRARY(m) { m.impl("decode_depth", TORCH_BOX(&voxkern::decode_depth_cuda)); }
#endif
