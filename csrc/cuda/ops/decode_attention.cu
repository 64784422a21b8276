#include "cuda/attention/split.cuh"
#include "cuda/ops/append_and_attend.cuh"

// attention/split.cuh has the kernels.
namespace voxkern {
namespace {

template <typename T, bool kAppend>
auto split_kernel_for(const DecodeAttentionParams& p, bool vectors) {
  if (vectors && is_vector_aligned<T>(p.k_pages, p.D) && is_vector_aligned<T>(p.v_pages, p.D)) {
    const int64_t lanes = p.D / kVector<T>;
    if (lanes == 8) return attention::split_kernel<T, kVector<T>, 8, kAppend>;
    if (lanes == 16) return attention::split_kernel<T, kVector<T>, 16, kAppend>;
    if constexpr (sizeof(T) == 4)
      if (lanes == 32) return attention::split_kernel<T, kVector<T>, 32, kAppend>;
  }
  return attention::split_kernel<T, 1, 32, kAppend>;
}

int64_t max_splits(const DecodeAttentionParams& p) {
  const int64_t splits = divide_up(p.M * p.S, attention::kSplitKeys);
  return splits < 1 ? 1 : splits;
}

int64_t blocks_per_row(const DecodeAttentionParams& p) {
  return divide_up(p.Hq / p.Hkv, attention::kSplitQueries);
}

attention::Partials partials_in(float* workspace, const DecodeAttentionParams& p,
                                unsigned* counters) {
  const int64_t splits = max_splits(p);
  return {splits, workspace, splits == 1 ? nullptr : workspace + p.B * p.Hq * splits * p.D,
          counters};
}

template <typename T, bool kAppend>
void launch_splits(const DecodeAttentionParams& p, const attention::Partials& partials,
                   const AppendKvParams& append, cudaStream_t stream) {
  // Both halves of the rotated rows are loaded in vectors.
  const bool vectors =
      !kAppend || (is_vector_aligned<T>(p.q, p.D / 2) && p.q_stride % kVector<T> == 0);
  launch(split_kernel_for<T, kAppend>(p, vectors),
         {.grid = {partials.splits, p.Hkv * blocks_per_row(p), p.B},
          .block = attention::kSplitKeys,
          .shared_bytes = attention::kSplitWarps * attention::kSplitQueries * p.D * sizeof(float),
          .stream = stream},
         p, partials, append);
}

template <typename T>
void run(const DecodeAttentionParams& p, const attention::Partials& partials, cudaStream_t stream) {
  launch_splits<T, false>(p, partials, {}, stream);
  if (partials.splits == 1) return;
  launch(attention::combine_splits_kernel<T>,
         {.grid = {p.Hq, p.B}, .block = block_size(divide_up(p.D, 2), 128), .stream = stream}, p,
         partials);
}

}  // namespace

// The size of `workspace`, in floats.
int64_t decode_attention_workspace(const DecodeAttentionParams& p) {
  const int64_t splits = max_splits(p);
  return splits == 1 ? 0 : p.B * p.Hq * splits * (p.D + 2);
}

void decode_attention(const DecodeAttentionParams& p, float* workspace, cudaStream_t stream) {
  if (p.B == 0) return;
  const attention::Partials partials = partials_in(workspace, p, nullptr);
  p.dtype == Dtype::f32 ? run<float>(p, partials, stream) : run<bf16>(p, partials, stream);
}

int64_t append_and_attend_counters(const DecodeAttentionParams& p) {
  return max_splits(p) == 1 ? 0 : p.B * p.Hkv * blocks_per_row(p);
}

void append_and_attend(const AppendKvParams& append, const DecodeAttentionParams& p,
                       float* workspace, unsigned* counters, cudaStream_t stream) {
  if (p.B == 0) return;
  const attention::Partials partials = partials_in(workspace, p, counters);
  p.dtype == Dtype::f32 ? launch_splits<float, true>(p, partials, append, stream)
                        : launch_splits<bf16, true>(p, partials, append, stream);
}

#ifdef VOX_HOST_PASS
Tensor decode_attention_cuda(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table,
                             Tensor seq_lens, double scale) {
  check_dim(q, "q", 3);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  const DecodeAttentionParams p =
      decode_attention_params(q, k_pages, v_pages, page_table, seq_lens, scale, out);
  check(p.D <= attention::kMaxHeadDim, "q: on CUDA expected heads of at most ",
        attention::kMaxHeadDim, " elements, got shape ", shape_string(q));
  check(p.B <= 65535, "q: on CUDA expected at most 65535 sequences, got ", p.B);
  Tensor workspace =
      torch::stable::new_empty(q, {decode_attention_workspace(p)}, ScalarType::Float);
  const OnDevice device(q);
  decode_attention(p, static_cast<float*>(workspace.mutable_data_ptr()), device.stream);
  return out;
}

VOX_CUDA_LIBRARY(m) { m.impl("decode_attention", TORCH_BOX(&decode_attention_cuda)); }
#endif

}  // namespace voxkern
