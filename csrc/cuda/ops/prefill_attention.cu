#include "common/arena.h"
#include "cuda/attention/prefill.cuh"
#include "cuda/ops/append_and_attend.cuh"

// bfloat16 with heads of 64 or 128 runs on tensor cores (attention/prefill.cuh). Everything else is
// decode_attention with a row per query, so it has the bits of a decode step: locate_queries_kernel
// gives each query its length and its pages. Long prompts take several calls, which bounds the
// workspace.
namespace voxkern {
namespace {

constexpr int kLocateThreads = 128;
constexpr int64_t kMaxWorkspace = 64 << 20;  // bytes, unless one query needs more
constexpr int64_t kMaxQueries = 65535;       // the rows of a grid

// A block gives query `first` + blockIdx.x the keys that it sees and a copy of its sequence's
// pages.
__global__ void __launch_bounds__(kLocateThreads)
    locate_queries_kernel(PrefillAttentionParams p, int64_t first, int32_t* lengths,
                          int32_t* page_table) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int64_t row = blockIdx.x, token = first + row;
  int64_t b = 0;
  while (b < p.B - 1 && p.cu_seqlens[b + 1] <= token) ++b;
  if (threadIdx.x == 0)
    lengths[row] = static_cast<int32_t>(p.seq_lens[b] - p.cu_seqlens[b + 1] + token + 1);
  for (int64_t m = threadIdx.x; m < p.M; m += blockDim.x)
    page_table[row * p.M + m] = p.page_table[b * p.M + m];
}

bool takes_tensor_cores(const PrefillAttentionParams& p) {
  return p.dtype == Dtype::bf16 && (p.D == 64 || p.D == 128) &&
         is_vector_aligned<bf16>(p.q, p.q_stride) && is_vector_aligned<bf16>(p.k_pages, p.D) &&
         is_vector_aligned<bf16>(p.v_pages, p.D);
}

// Queries first .. first + count as sequences of their own, without lengths and pages.
DecodeAttentionParams as_sequences(const PrefillAttentionParams& p, int64_t first, int64_t count) {
  const int64_t bytes = p.dtype == Dtype::f32 ? 4 : 2;
  DecodeAttentionParams rows = p;
  rows.B = count;
  rows.q = static_cast<const char*>(p.q) + first * p.q_stride * bytes;
  rows.out = static_cast<char*>(p.out) + first * p.Hq * p.D * bytes;
  return rows;
}

// The scratch memory of a call of decode_attention with as many queries as kMaxWorkspace allows.
struct Buffers {
  int64_t queries = 0;
  int32_t* lengths = nullptr;     // [queries]
  int32_t* page_table = nullptr;  // [queries, M]
  float* splits = nullptr;

  Buffers(Arena& arena, const PrefillAttentionParams& p) {
    if (takes_tensor_cores(p)) return;
    const int64_t floats = decode_attention_workspace(as_sequences(p, 0, 1));
    const int64_t most = kMaxWorkspace / ((floats + p.M + 1) * 4);
    queries = p.T;
    for (const int64_t limit : {most, kMaxQueries}) queries = queries < limit ? queries : limit;
    if (queries < 1) queries = 1;
    lengths = arena.take<int32_t>(queries);
    page_table = arena.take<int32_t>(queries * p.M);
    splits = arena.take<float>(queries * floats);
  }
};

void run_tensor_cores(const PrefillAttentionParams& p, cudaStream_t stream) {
  const auto kernel =
      p.D == 64 ? attention::prefill_tensor_kernel<64> : attention::prefill_tensor_kernel<128>;
  const int tile_rows = attention::kPrefillWarps * attention::kTensorRows;
  launch(kernel,
         {.grid = {divide_up(p.T * (p.Hq / p.Hkv), tile_rows) + p.B, p.Hkv},
          .block = attention::kPrefillWarps * kWarp,
          .stream = stream,
          .overlaps_previous = false},
         p);
}

}  // namespace

void prefill_attention(const PrefillAttentionParams& p, void* workspace, cudaStream_t stream) {
  if (p.T == 0 || p.B == 0) return;
  if (takes_tensor_cores(p)) return run_tensor_cores(p, stream);
  Arena arena(workspace);
  const Buffers buffers(arena, p);
  for (int64_t first = 0; first < p.T; first += buffers.queries) {
    const int64_t left = p.T - first, count = left < buffers.queries ? left : buffers.queries;
    launch(locate_queries_kernel,
           {.grid = count, .block = kLocateThreads, .stream = stream, .overlaps_previous = false},
           p, first, buffers.lengths, buffers.page_table);
    DecodeAttentionParams rows = as_sequences(p, first, count);
    rows.page_table = buffers.page_table;
    rows.seq_lens = buffers.lengths;
    decode_attention(rows, buffers.splits, stream);
  }
}

#ifdef VOX_HOST_PASS
Tensor prefill_attention_cuda(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table,
                              Tensor cu_seqlens, Tensor seq_lens, double scale) {
  check_dim(q, "q", 3);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  const PrefillAttentionParams p =
      prefill_attention_params(q, k_pages, v_pages, page_table, cu_seqlens, seq_lens, scale, out);
  check(p.D <= attention::kMaxHeadDim, "q: on CUDA expected heads of at most ",
        attention::kMaxHeadDim, " elements, got shape ", shape_string(q));
  Tensor workspace = torch::stable::new_empty(q, {arena_bytes<Buffers>(p)}, ScalarType::Byte);
  const OnDevice device(q);
  prefill_attention(p, workspace.mutable_data_ptr(), device.stream);
  return out;
}

VOX_CUDA_LIBRARY(m) { m.impl("prefill_attention", TORCH_BOX(&prefill_attention_cuda)); }
#endif

}  // namespace voxkern
