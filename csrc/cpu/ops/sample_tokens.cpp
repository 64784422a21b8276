#include "params/sample_tokens.h"

#include "cpu/runtime/isa.h"

#ifdef VOX_ISA
#include "cpu/runtime/team.h"
#include "cpu/sampling/sampler.h"

// Threads partition the rows; sampler.h says how a row is drawn and where it rounds.
namespace voxkern {
namespace {

template <typename T>
void run(const SampleTokensParams& p) {
  // A row costs about 16 passes over V logits.
  parallel_for(p.B, 1, p.B * p.V * 16, [&](int64_t begin, int64_t end) {
    void* const scratch = __builtin_malloc(sampler_scratch_bytes(p.V));
    for (int64_t b = begin; b < end; ++b) {
      SamplerRow row = sampler_row(p, b, p.codebook);
      row.repetition_penalty = p.repetition_penalty[b];
      row.history = p.history + b * p.W;
      row.W = p.W;
      p.out[b] = sample_row(static_cast<const T*>(p.logits) + b * p.V, p.V, row, scratch);
    }
    __builtin_free(scratch);
  });
}

}  // namespace

namespace VOX_ISA {
void sample_tokens(const SampleTokensParams& p) {
  p.dtype == Dtype::f32 ? run<float>(p) : run<bf16>(p);
}
}  // namespace VOX_ISA

}  // namespace voxkern

#else

namespace voxkern {

VOX_KERNEL(sample_tokens, SampleTokensParams)

namespace {

Tensor sample_tokens_cpu(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p,
                         Tensor min_p, Tensor repetition_penalty, Tensor history, Tensor seeds,
                         Tensor frames, int64_t codebook) {
  logits = torch::stable::contiguous(logits);
  check_dim(logits, "logits", 2);
  Tensor out = torch::stable::new_empty(logits, {logits.size(0)}, ScalarType::Long);
  sample_tokens(sample_tokens_params(logits, temperature, top_k, top_p, min_p, repetition_penalty,
                                     history, seeds, frames, codebook, out));
  return out;
}

}  // namespace
}  // namespace voxkern

STABLE_TORCH_LIBRARY_IMPL(voxkern, CPU, m) {
  m.impl("sample_tokens", TORCH_BOX(&voxkern::sample_tokens_cpu));
}

#endif
