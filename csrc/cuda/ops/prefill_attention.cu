#include "cuda/attention/prefill.cuh"
#include "params/prefill_attention.h"

// attention/prefill.cuh has the kernels.
namespace voxkern {

void prefill_attention(const PrefillAttentionParams& p, cudaStream_t stream) {
  if (p.T == 0 || p.B == 0) return;
  auto kernel =
      p.dtype == Dtype::f32 ? attention::prefill_kernel<float> : attention::prefill_kernel<bf16>;
  int tile_rows = attention::kPrefillWarps;
  const bool vectors = is_vector_aligned<bf16>(p.q, p.q_stride) &&
                       is_vector_aligned<bf16>(p.k_pages, p.D) &&
                       is_vector_aligned<bf16>(p.v_pages, p.D);
  if (p.dtype == Dtype::bf16 && vectors && (p.D == 64 || p.D == 128)) {
    kernel =
        p.D == 64 ? attention::prefill_tensor_kernel<64> : attention::prefill_tensor_kernel<128>;
    tile_rows = attention::kPrefillWarps * attention::kTensorRows;
  }
  const int64_t max_tiles = divide_up(p.T * (p.Hq / p.Hkv), tile_rows) + p.B;
  launch(kernel,
         {.grid = {max_tiles, p.Hkv},
          .block = attention::kPrefillWarps * kWarp,
          .stream = stream,
          .overlaps_previous = false},
         p);
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
  const OnDevice device(q);
  prefill_attention(p, device.stream);
  return out;
}

VOX_CUDA_LIBRARY(m) { m.impl("prefill_attention", TORCH_BOX(&prefill_attention_cuda)); }
#endif

}  // namespace voxkern
