#include "cuda/runtime/elements.cuh"
#include "cuda/sampling/sampler.cuh"
#include "params/sample_tokens.h"

// A block takes a row, a thread two groups of four codes; sampling/sampler.cuh says how a code is
// drawn and where it rounds.
//
// Floor: latency. A row of 9 warps takes, with top-k, 6 barriers: the largest, two of the search,
// the list of kept codes, two of the race; top-p adds two when combined with top-k. docs/cuda.md
// has the estimated clocks and instructions. The kernel's 31 KB of code have to be fetched too, so
// code is not unrolled where a loop does. 256 rows are two blocks a multiprocessor, all resident at
// once, which share the fetched code.
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
         {.grid = p.B,
          .block = sampling::block_threads(p.V),
          .shared_bytes = sampling::shared_bytes(p.V),
          .stream = stream},
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

#ifdef VOX_HOST_PASS
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

VOX_CUDA_LIBRARY(m) { m.impl("sample_tokens", TORCH_BOX(&sample_tokens_cuda)); }
#endif

}  // namespace voxkern
