// sample_tokens: draws one code per row after repetition penalty, temperature, top-k, top-p and
// min-p.
#pragma once

#include "common/sampling.h"

namespace voxkern {

struct SampleTokensParams {
  Dtype dtype;
  int64_t B, V, W;
  const void* logits;               // [B, V]
  const float* temperature;         // [B]
  const int32_t* top_k;             // [B]
  const float* top_p;               // [B]
  const float* min_p;               // [B]
  const float* repetition_penalty;  // [B]
  const int64_t* history;           // [B, W]
  const int64_t* seeds;             // [B]
  const int64_t* frames;            // [B]
  int64_t codebook;
  int64_t* out;  // [B]
};

#ifndef VOX_ISA

inline SampleTokensParams sample_tokens_params(
    const Tensor& logits, const Tensor& temperature, const Tensor& top_k, const Tensor& top_p,
    const Tensor& min_p, const Tensor& repetition_penalty, const Tensor& history,
    const Tensor& seeds, const Tensor& frames, int64_t codebook, const Tensor& out) {
  check_dim(logits, "logits", 2);
  check_contiguous(logits, "logits");
  const int64_t B = logits.size(0), V = logits.size(1);
  check(V >= 1 && V < (1 << 30), "logits: expected [B, V] with 1 <= V < 2^30, got ",
        shape_string(logits));
  check_sampling(logits, B, temperature, top_k, top_p, min_p, seeds, frames);
  check_operand(repetition_penalty, "repetition_penalty", logits, ScalarType::Float);
  check_shape(repetition_penalty, "repetition_penalty", "[B]", {B});
  check_operand(history, "history", logits, ScalarType::Long);
  check_shape(history, "history", "[B, W]", {B, kAny});
  return {
      .dtype = float_dtype(logits, "logits"),
      .B = B,
      .V = V,
      .W = history.size(1),
      .logits = logits.const_data_ptr(),
      .temperature = static_cast<const float*>(temperature.const_data_ptr()),
      .top_k = static_cast<const int32_t*>(top_k.const_data_ptr()),
      .top_p = static_cast<const float*>(top_p.const_data_ptr()),
      .min_p = static_cast<const float*>(min_p.const_data_ptr()),
      .repetition_penalty = static_cast<const float*>(repetition_penalty.const_data_ptr()),
      .history = static_cast<const int64_t*>(history.const_data_ptr()),
      .seeds = static_cast<const int64_t*>(seeds.const_data_ptr()),
      .frames = static_cast<const int64_t*>(frames.const_data_ptr()),
      .codebook = codebook,
      .out = static_cast<int64_t*>(out.mutable_data_ptr()),
  };
}

#endif

}  // namespace voxkern
