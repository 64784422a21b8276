// Online softmax, shared by all attention kernels, and attend_row() for those that load one element
// at a time. A weight is exp(score - largest), with the largest score seen so far: sums of weights
// are rescaled when it grows, and when partial sums are merged.
#pragma once

#include "cuda/runtime/elements.cuh"

namespace voxkern::attention {

constexpr int kMaxHeadDim = 256;  // for kernels that load one element at a time

VOX_DEVICE float minus_infinity() { return __uint_as_float(0xff800000u); }

struct SoftmaxState {
  float largest, sum;  // of the scores, of their weights

  static VOX_DEVICE SoftmaxState empty() { return {minus_infinity(), 0}; }

  // Raises the largest score to `score`. Returns the factor by which the caller must scale all sums
  // so far, `sum` included.
  VOX_DEVICE float raise(float score) {
    const float factor = expf(largest - score);
    largest = score;
    return factor;
  }
};

// The state of a warp's `count` scores; lane i holds scores i, i + 32, ...
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

// Merges kParts parts of a softmax in order: state(i) is the state of part i, value(i) its sum of
// weighted values. Returns the merged state and sets `total` to the merged sum of weighted values.
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

// A warp attends from one query [D] to keys 0 .. last and writes the result to out [D]. It takes 32
// keys at a time: each lane computes one key's score, then sums every 32nd column of the values.
// `query` is already scaled; it and `weights` are the warp's own shared memory. place_of(key) is a
// key's offset in k and v; load(pointer) returns an element as float.
template <typename T, typename Place, typename Load>
VOX_DEVICE void attend_row(const float* query, float (&weights)[kWarp], int last, int D, const T* k,
                           const T* v, const Place& place_of, const Load& load, T* out) {
  constexpr int kColumnsPerLane = kMaxHeadDim / kWarp;
  const int lane = threadIdx.x % kWarp;
  float acc[kColumnsPerLane] = {};
  SoftmaxState state = SoftmaxState::empty();
  for (int begin = 0; begin <= last; begin += kWarp) {
    __syncwarp();
    const bool seen = begin + lane <= last;
    const int64_t place = seen ? place_of(begin + lane) : 0;
    float score = minus_infinity();
    if (seen) {
      score = 0;
      for (int i = 0; i < D; ++i) score = fmaf(query[i], load(k + place + i), score);
    }
    const float factor = state.raise(fmaxf(state.largest, warp_reduce(score, Max())));
    const float weight = expf(score - state.largest);
    state.sum = fmaf(state.sum, factor, warp_reduce(weight, Add()));
    weights[lane] = weight;
    __syncwarp();
#pragma unroll
    for (int c = 0; c < kColumnsPerLane; ++c) acc[c] *= factor;
    for (int j = 0; j < kWarp && begin + j <= last; ++j) {
      const T* const value = v + __shfl_sync(kWholeWarp, place, j);
#pragma unroll
      for (int c = 0; c < kColumnsPerLane; ++c)
        if (c * kWarp + lane < D) acc[c] = fmaf(weights[j], load(value + c * kWarp + lane), acc[c]);
    }
  }
#pragma unroll
  for (int c = 0; c < kColumnsPerLane; ++c)
    if (c * kWarp + lane < D) out[c * kWarp + lane] = from_float<T>(acc[c] / state.sum);
  __syncwarp();  // the caller may write the next query
}

}  // namespace voxkern::attention
