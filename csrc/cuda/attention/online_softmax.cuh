// The softmax that all attention kernels share. A weight is exp(score - largest), with the largest
// score seen so far: sums of weights are rescaled when it grows, and when partial sums are merged.
#pragma once

#include "cuda/runtime/elements.cuh"
#include "cuda/runtime/reduce.cuh"

namespace voxkern::attention {

VOX_DEVICE float minus_infinity() { return __uint_as_float(0xff800000u); }

struct SoftmaxState {
  float largest, sum;  // of the scores, of their weights

  static VOX_DEVICE SoftmaxState empty() { return {minus_infinity(), 0}; }

  // Raises the largest score to `score`. Returns the factor for all sums so far, `sum` included,
  // which is left to the caller.
  VOX_DEVICE float raise(float score) {
    const float factor = expf(largest - score);
    largest = score;
    return factor;
  }
};

// The state of `count` scores that a warp holds: lane i those with the numbers i, i + 32, ...
template <int kScoresPerLane>
VOX_DEVICE SoftmaxState warp_softmax(const float (&scores)[kScoresPerLane], int count) {
  const int lane = threadIdx.x % kWarp;
  SoftmaxState state = SoftmaxState::empty();
#pragma unroll
  for (int i = 0; i < kScoresPerLane; ++i)
    if (lane + i * kWarp < count) state.largest = fmaxf(state.largest, scores[i]);
  state.largest = warp_reduce(state.largest, Max());
#pragma unroll
  for (int i = 0; i < kScoresPerLane; ++i)
    if (lane + i * kWarp < count) state.sum += expf(scores[i] - state.largest);
  state.sum = warp_reduce(state.sum, Add());
  return state;
}

// Merges kParts parts of a softmax in their order: state(i) is the state of part i, value(i) its
// sum of weighted values. `total` becomes the sum of all.
template <int kParts, typename State, typename Value>
VOX_DEVICE SoftmaxState merge_parts(const State& state, const Value& value, float& total) {
  SoftmaxState merged = SoftmaxState::empty();
  total = 0;
  for (int i = 0; i < kParts; ++i) merged.largest = fmaxf(merged.largest, state(i).largest);
  for (int i = 0; i < kParts; ++i) {
    if (state(i).sum == 0) continue;
    const float factor = expf(state(i).largest - merged.largest);
    merged.sum = fmaf(state(i).sum, factor, merged.sum);
    total = fmaf(value(i), factor, total);
  }
  return merged;
}

}  // namespace voxkern::attention
