#include "cuda/runtime/elements.cuh"
#include "cuda/sampling/sampler.cuh"
#include "params/sample_tokens.h"

// One block takes a row, a thread two groups of four codes; sampler.cuh says how it is drawn and
// where it rounds.
//
// Floor: a row of 2,051 logits is 4 KB, [256, 2051] 0.3 us of an H100's memory: only latency
// counts. A row of 9 warps takes, with top-k, 6 barriers: the largest, two of the search, the list
// of what stays, two of the race; top-p adds two if it comes with top-k. In clocks of 0.6 ns:
// parameters and logits from the second-level cache 400, the largest 150, division 100, buckets
// 150, their sums in every warp 150, the bucket's logits 150, the list 100, one Philox counter (10
// rounds of some 12 clocks) and two logarithms for each code that stays 250, the best 100, two
// float64 logarithms for those near it 300, 30 a barrier: 2,000, or 1.2 us, if nothing waited for
// its turn.
//
// Instructions do. Counted in sm_90a's machine code for 2,051 codes, a warp runs some 1,500 of them
// with top-p, 1,400 with top-k, 1,500 without a filter, 300 for the greedy draw; a scheduler has
// two or three warps, so 3,400 clocks or 2 us but for the greedy draw. And they have to come: 22 of
// the kernel's 31 KB with a filter, 5 for the greedy draw. At 250 clocks from the second-level
// cache for each 128 bytes that would be 26 us and 6 if nothing were fetched ahead, and next to
// nothing where the multiprocessor still has them; nobody has measured which. So code is not
// unrolled here where a loop does. 256 rows are two blocks a multiprocessor, all resident at once,
// which share what is fetched.
namespace voxkern {
namespace {

template <typename T>
__global__ void __launch_bounds__(sampling::kSamplerThreads)
    sample_tokens_kernel(SampleTokensParams p) {
  VOX_DYNAMIC_SHARED(sampling::Shared, shared);
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int64_t b = blockIdx.x;
  SamplerRow row = sampler_row(p, b, p.codebook);
  row.repetition_penalty = p.repetition_penalty[b];
  row.history = p.history + b * p.W;
  row.W = p.W;
  const int code = sampling::sample_row(static_cast<const T*>(p.logits) + b * p.V,
                                        static_cast<int>(p.V), row, *shared);
  if (threadIdx.x == 0) p.out[b] = code;
}

template <typename T>
void run(const SampleTokensParams& p, cudaStream_t stream) {
  launch(sample_tokens_kernel<T>,
         {.grid = dim3(static_cast<unsigned>(p.B)),
          .block = dim3(sampling::block_threads(p.V)),
          .shared_bytes = sampling::shared_bytes(p.V),
          .stream = stream,
          .overlaps_previous = true},
         p);
}

}  // namespace

void sample_tokens(const SampleTokensParams& p, cudaStream_t stream) {
  if (p.B == 0) return;
  if (p.V > sampling::kMaxVocabulary)
    throw std::runtime_error(
        "logits: on CUDA expected [B, V] with V <= " + std::to_string(sampling::kMaxVocabulary) +
        ", got V = " + std::to_string(p.V));
  p.dtype == Dtype::f32 ? run<float>(p, stream) : run<bf16>(p, stream);
}

}  // namespace voxkern

#ifdef VOX_HOST_PASS
namespace voxkern {
namespace {

Tensor sample_tokens_cuda(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p,
                          Tensor min_p, Tensor repetition_penalty, Tensor history, Tensor seeds,
                          Tensor frames, int64_t codebook) {
  logits = torch::stable::contiguous(logits);
  check_dim(logits, "logits", 2);
  Tensor out = torch::stable::new_empty(logits, {logits.size(0)}, ScalarType::Long);
  const SampleTokensParams p =
      sample_tokens_params(logits, temperature, top_k, top_p, min_p, repetition_penalty, history,
                           seeds, frames, codebook, out);
  const OnDevice device(logits);
  sample_tokens(p, device.stream);
  return out;
}

}  // namespace
}  // namespace voxkern

VOX_CUDA_LIBRARY(m) { m.impl("sample_tokens", TORCH_BOX(&voxkern::sample_tokens_cuda)); }
#endif
