// Online softmax and page lookup, shared by the attention ops. Only ISA passes include it.
#pragma once

#include "cpu/simd/math.h"

namespace voxkern {
namespace {

// Keys per step of the online softmax. Blocks start at multiples of kKeyBlock from key 0, whatever
// the page size and the chunks of a prompt, so the order of a query's sums depends on its position
// alone.
constexpr int64_t kKeyBlock = 64;

// n rounded up to whole vectors.
VOX_INLINE int64_t padded(int64_t n) { return (n + kWidth - 1) / kWidth * kWidth; }

VOX_INLINE float exp_one(float a) { return exp(splat(a))[0]; }

// Calls f(j, offset, n) for each run of contiguous keys among the `count` keys of a sequence from
// `begin` on: keys begin + j .. begin + j + n are at element `offset` of k_pages and v_pages.
template <typename F>
VOX_INLINE void for_each_run(const int32_t* page_row, int64_t Hkv, int64_t S, int64_t D, int64_t h,
                             int64_t begin, int64_t count, const F& f) {
  for (int64_t j = 0; j < count;) {
    const int64_t slot = (begin + j) % S;
    const int64_t n = S - slot < count - j ? S - slot : count - j;
    f(j, ((page_row[(begin + j) / S] * Hkv + h) * S + slot) * D, n);
    j += n;
  }
}

// The running maximum and sum of one row of the online softmax.
struct SoftmaxState {
  float largest = -__builtin_inff();
  float sum = 0;
};

// Replaces scores[0..count) by e^(score - largest) and the rest of the kKeyBlock scores by zeros.
// Returns the factor by which the sums of earlier blocks must be rescaled.
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
