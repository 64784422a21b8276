#include "../sample_tokens.h"
#include "common.cuh"
#include "sampler.cuh"

// One block takes a row; sampler.cuh says how it is drawn and where it rounds.
//
// Floor: a row of 2,051 logits is 4 KB, [256, 2051] 0.3 us of an H100's memory: only latency
// counts. Every block of 256 threads is resident at once (2 a multiprocessor), so a launch takes as
// long as one row: one read of the logits, then about 20 steps of one barrier each (largest, some
// 14 of the search for top-k, score, draw), 150 to 250 ns a step: 3 to 5 us, and as many again with
// top-p.
namespace voxkern {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads) sample_tokens_kernel(SampleTokensParams p) {
  VOX_DYNAMIC_SHARED(float, z);
  VOX_SHARED(SamplerShared, shared);
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int64_t b = blockIdx.x;
  const SamplerRow row = {
      .temperature = p.temperature[b],
      .top_k = p.top_k[b],
      .top_p = p.top_p[b],
      .min_p = p.min_p[b],
      .repetition_penalty = p.repetition_penalty[b],
      .history = p.history + b * p.W,
      .W = p.W,
      .seed = p.seeds[b],
      .frame = p.frames[b],
      .codebook = p.codebook,
  };
  auto* const weights = reinterpret_cast<uint32_t*>(z + sampler_padded(p.V));
  const int code = sample_row(static_cast<const T*>(p.logits) + b * p.V, static_cast<int>(p.V), row,
                              z, weights, shared);
  if (threadIdx.x == 0) p.out[b] = code;
}

template <typename T>
void run(const SampleTokensParams& p, cudaStream_t stream) {
  launch(sample_tokens_kernel<T>,
         {.grid = dim3(static_cast<unsigned>(p.B)),
          .block = dim3(block_size(divide_up(p.V, kCodes), kThreads)),
          .shared_bytes = static_cast<size_t>(sampler_shared_bytes(p.V)),
          .stream = stream,
          .overlaps_previous = true},
         p);
}

}  // namespace

void sample_tokens(const SampleTokensParams& p, cudaStream_t stream) {
  if (p.B == 0) return;
  // z and weights, within what every target has.
  if (sampler_shared_bytes(p.V) > (96 << 10))
    throw std::runtime_error("logits: on CUDA expected [B, V] with V <= 12288, got V = " +
                             std::to_string(p.V));
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
