// Online softmax, splits of keys and page lookup, shared by prefill_attention, decode_attention and
// decode_backbone. Only ISA passes include it.
//
// All three compute a query in one order, a function of its position alone (docs/kernels.md):
// lane l of a score sums the columns l, l + kWidth, ..., and reduce_add's tree sums the lanes;
// splits of kSplit keys have online softmaxes of their own, over blocks of kKeyBlock keys;
// combine_splits() adds the splits. Splits and blocks start at multiples of their size from key 0.
#pragma once

#include "cpu/simd/math.h"

namespace voxkern {
namespace {

constexpr int64_t kKeyBlock = 64;  // keys per step of the online softmax
constexpr int64_t kSplit = 256;    // keys per softmax
static_assert(kSplit % kKeyBlock == 0);

VOX_INLINE int64_t num_splits(int64_t keys) { return (keys + kSplit - 1) / kSplit; }

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

// One step of the online softmax of R rows at once, so that their chains of instructions overlap.
// Row r starts at scores + r * stride and has counts[r] valid scores. Replaces them by
// e^(score - largest) and the rest of the kKeyBlock by zeros. The caller must multiply the row's
// earlier sums by factors[r]. A row that has seen no key yet gets NaN.
template <int R>
VOX_INLINE void softmax_step(float* scores, int64_t stride, const int64_t* counts,
                             SoftmaxState* states, float* factors) {
  static_assert(R <= kWidth);
  vfloat drops{};  // the largest before minus the largest now, a lane for each row
  float largest[R];
  for (int r = 0; r < R; ++r) {
    float* const row = scores + r * stride;
    for (int64_t j = counts[r]; j < kKeyBlock; ++j) row[j] = -__builtin_inff();
    vfloat largests = splat(states[r].largest);
    for (int64_t j = 0; j < kKeyBlock; j += kWidth) largests = max(load(row + j), largests);
    largest[r] = reduce_max(largests);
    drops[r] = states[r].largest - largest[r];
  }
  drops = exp(drops);
  vfloat sums[R];
  clear(sums);
  for (int64_t j = 0; j < kKeyBlock; j += kWidth)
    for (int r = 0; r < R; ++r) {
      const vfloat weights = exp(load(scores + r * stride + j) - splat(largest[r]));
      store(scores + r * stride + j, weights);
      sums[r] += weights;
    }
  for (int r = 0; r < R; ++r) {
    factors[r] = drops[r];
    states[r].sum = states[r].sum * factors[r] + reduce_add(sums[r]);
    states[r].largest = largest[r];
  }
}

// Combines the n splits of one query and writes its result [D], rounded at the store; zeros if n is
// 0. Split i has states[i * stride] and the unnormalised float32 sums [width] at
// sums[i * stride * width]. Overwrites each state's `largest` with its split's factor.
template <typename T>
inline void combine_splits(int64_t n, SoftmaxState* states, const float* sums, int64_t stride,
                           int64_t D, T* out) {
  float largest = -__builtin_inff(), sum = 0;
  for (int64_t i = 0; i < n; ++i)
    largest = states[i * stride].largest > largest ? states[i * stride].largest : largest;
  for (int64_t i = 0; i < n; ++i) {
    float& factor = states[i * stride].largest;
    factor = exp_one(factor - largest);
    sum += states[i * stride].sum * factor;
  }
  const int64_t width = padded(D);
  for (int64_t c = 0; c < D; c += kWidth) {
    vfloat total{};
    for (int64_t i = 0; i < n; ++i)
      total = fma(load(sums + i * stride * width + c), splat(states[i * stride].largest), total);
    if (n) total = total / splat(sum);
    if (c + kWidth <= D)
      store(out + c, total);
    else
      store_n(out + c, total, D - c);
  }
}

}  // namespace
}  // namespace voxkern
