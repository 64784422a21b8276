// Attention of one query head over the few positions of the depth decoder, with a plain softmax
// over all of them. Only ISA passes include it.
#pragma once

#include "cpu/simd/math.h"

namespace voxkern {
namespace {

// Floats of scratch that attend_row needs for its scores.
VOX_INLINE int64_t attend_scratch(int64_t positions) { return positions + kWidth; }

// out [D] = softmax(q [D] . k [positions, D] * scale) v [positions, D], in float32 and rounded once
// at the store.
template <typename T>
inline void attend_row(const T* q, const T* k, const T* v, int64_t positions, int64_t D,
                       float scale, float* scores, T* out) {
  for (int64_t t = 0; t < positions; ++t) {
    const T* const key = k + t * D;
    vfloat sum{};
    int64_t i = 0;
    for (; i + kWidth <= D; i += kWidth) sum = fma(load(q + i), load(key + i), sum);
    if (i < D) sum = fma(load_n(q + i, D - i), load_n(key + i, D - i), sum);
    scores[t] = reduce_add(sum) * scale;
  }
  store(scores + positions, splat(-__builtin_inff()));

  vfloat largest = splat(-__builtin_inff());
  for (int64_t t = 0; t < positions; t += kWidth) largest = max(load(scores + t), largest);
  const vfloat top = splat(reduce_max(largest));
  vfloat sums{};
  for (int64_t t = 0; t < positions; t += kWidth) {
    const vfloat weights = exp(load(scores + t) - top);
    store(scores + t, weights);
    sums += weights;
  }
  const vfloat inverse_sum = splat(1.0f / reduce_add(sums));

  for (int64_t i = 0; i < D; i += kWidth) {
    const int64_t n = D - i < kWidth ? D - i : kWidth;
    vfloat sum{};
    for (int64_t t = 0; t < positions; ++t)
      sum = fma(splat(scores[t]), n < kWidth ? load_n(v + t * D + i, n) : load(v + t * D + i), sum);
    store_n(out + i, sum * inverse_sum, n);
  }
}

}  // namespace
}  // namespace voxkern
