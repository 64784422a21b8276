// What prefill_attention and decode_attention share; included by ISA passes alone.
#pragma once

#include "cpu/simd/vec.h"

namespace voxkern {
namespace {

// Keys between two rescalings of the online softmax. Blocks start at multiples of it from key 0,
// whatever the page size and however a prompt came in pieces: the order of a query's sums depends
// on its position alone.
constexpr int64_t kKeyBlock = 64;

VOX_INLINE int64_t padded(int64_t n) { return (n + kWidth - 1) / kWidth * kWidth; }

VOX_INLINE float exp_one(float a) { return exp(splat(a))[0]; }

// f(j, place, n) for the keys begin + j, begin + j + 1, .. of a sequence, n of them next to each
// other at `place` elements into k_pages and v_pages.
template <typename F>
VOX_INLINE void for_each_run(const int32_t* page_row, int64_t Hkv, int64_t S, int64_t D, int64_t h,
                             int64_t begin, int64_t count, const F& f) {
  for (int64_t j = 0; j < count;) {
    const int64_t offset = (begin + j) % S;
    const int64_t n = S - offset < count - j ? S - offset : count - j;
    f(j, ((page_row[(begin + j) / S] * Hkv + h) * S + offset) * D, n);
    j += n;
  }
}

// One row of the online softmax.
struct SoftmaxState {
  float largest = -__builtin_inff();
  float sum = 0;
};

// Turns scores[0..kKeyBlock), of which the first `count` hold, into e^(score - largest), zeros
// behind; returns the factor for what was summed before.
VOX_INLINE float softmax_step(float* scores, int64_t count, SoftmaxState& state) {
  for (int64_t j = count; j < kKeyBlock; ++j) scores[j] = -__builtin_inff();
  vfloat largests = splat(state.largest);
  for (int64_t j = 0; j < kKeyBlock; j += kWidth) largests = max(load(scores + j), largests);
  const float largest = reduce_max(largests);
  vfloat sums{};
  for (int64_t j = 0; j < kKeyBlock; j += kWidth) {
    const vfloat weights = exp(load(scores + j) - splat(largest));
    store(scores + j, weights);
    sums += weights;
  }
  const float factor = exp_one(state.largest - largest);
  state.sum = state.sum * factor + reduce_add(sums);
  state.largest = largest;
  return factor;
}

}  // namespace
}  // namespace voxkern
