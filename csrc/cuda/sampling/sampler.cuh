// One row's draw by one block, as `sample_tokens` specifies it.
//
// filters.cuh finds the lowest score that the filters keep. If few codes are kept, they are spread
// over the threads before random numbers are drawn for them. The draw ranks them by float32 scores,
// then ranks those near the best again in float64, which gives the CPU's code.
//
// It runs once, on a multiprocessor that has just run something else, so its instructions come from
// L2: fewer instructions in a loop are better than more without one. Logits are in shared memory,
// where loops can reach them, and long code (logarithms, Philox, the search) exists once or twice,
// not for each code of a thread. A thread's own codes need no barrier.
#pragma once

#include "common/sampling.h"
#include "cuda/runtime/elements.cuh"
#include "cuda/sampling/filters.cuh"

namespace voxkern::sampling {
namespace {

constexpr int kMaxKeptList = 128;  // kept codes up to which spreading them pays

struct Extremes {
  int32_t high, first, low;  // largest logit, its first code, lowest finite logit; by float_order
};
struct Candidate {
  double score;
  int32_t code;
  VOX_DEVICE bool beats(const Candidate& other) const {
    return score > other.score || (score == other.score && code < other.code);
  }
};
// A block's shared memory. After it come the scores and the search's weights, padded(V) of each.
struct alignas(16) Shared {
  Candidate candidates[kSamplerThreads];
  Buckets buckets[2];                       // for top-k, for top-p
  uint32_t penalised[kMaxVocabulary / 32];  // a bit per code
  Extremes extremes[kMaxWarps];
  BisectionStep steps[2][kMaxWarps];
  int32_t best[kMaxWarps];  // by float_order
  int kept_count, candidate_count;
  int32_t kept[kMaxKeptList];
};

__host__ VOX_DEVICE int padded(int V) { return (V + kCodes - 1) / kCodes * kCodes; }

// Dynamic shared memory of a block that calls sample_row().
inline size_t shared_bytes(int64_t V) {
  return sizeof(Shared) + 2 * sizeof(float) * padded(static_cast<int>(V));
}

// An exponential race between the codes whose scores are not below `bound`: the `listed` ones in
// shared.kept or, if that is negative, all. Each thread has the same codes in every step.
class Race {
 public:
  VOX_DEVICE Race(const Scores& scores, float bound, int listed, const SamplerRow& row,
                  Shared& shared)
      : scores_(scores), bound_(bound), listed_(listed), row_(row), shared_(shared) {}

  // Scores the codes in float32. Returns a score that the winner's is not below. One barrier.
  VOX_DEVICE float score_codes() {
    float best = -kLargestFloat;
    each([&](int code) {
      const float mine = scores_.z[code] - scores_.largest - logf(-logf(random(code)));
      score_[code] = mine;
      best = mine > best ? mine : best;
    });
    const int warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
    int32_t order = __reduce_max_sync(kWholeWarp, float_order(best));
    if (lane == 0) shared_.best[threadIdx.x / kWarp] = order;
    __syncthreads();
    order = __reduce_max_sync(kWholeWarp, shared_.best[lane < warps ? lane : 0]);
    // float32 scores of the leading codes lie within 40 of 0: 1e-3 is far above their errors.
    return float_at(order) - 1e-3f;
  }

  // Lists each thread's best code among those not below `close`, scored in float64. One barrier.
  VOX_DEVICE void list_candidates(float close) {
    Candidate best = {-1e300, kHighestOrder};
    each([&](int code) {
      if (!(score_[code] >= close)) return;
      double luck = static_cast<double>(random(code));
#pragma unroll 1
      for (int twice = 0; twice < 2; ++twice) luck = -log(luck);
      const Candidate mine = {static_cast<double>(scores_.z[code]) - scores_.largest + luck, code};
      if (mine.beats(best)) best = mine;
    });
    if (best.code != kHighestOrder)
      shared_.candidates[atomicAdd(&shared_.candidate_count, 1)] = best;
    __syncthreads();
  }

  VOX_DEVICE int winner() const {
    Candidate winner = shared_.candidates[0];
#pragma unroll 1
    for (int i = shared_.candidate_count - 1; i > 0; --i)
      if (shared_.candidates[i].beats(winner)) winner = shared_.candidates[i];
    return winner.code;
  }

 private:
  template <typename F>
  VOX_DEVICE void each(const F& f) const {
    const int items = listed_ < 0 ? padded(scores_.V) / kCodes : listed_;
#pragma unroll 1
    for (int i = threadIdx.x; i < items; i += blockDim.x) {
      int code = listed_ < 0 ? i * kCodes : shared_.kept[i];
      const int end = listed_ < 0 ? code + kCodes : code + 1;
#pragma unroll 1
      for (; code < end; ++code)
        if (scores_.z[code] >= bound_) f(code);
    }
  }

  VOX_DEVICE float random(int code) {
    if (code / kCodes != block_) {
      block_ = code / kCodes;
      words_ = draw_words(row_.seed, row_.frame, row_.codebook, block_);
    }
    const int i = code % kCodes;
    return uniform(i == 0   ? words_.word[0]
                   : i == 1 ? words_.word[1]
                   : i == 2 ? words_.word[2]
                            : words_.word[3]);
  }

  const Scores& scores_;
  const float bound_;
  const int listed_;
  const SamplerRow& row_;
  Shared& shared_;
  float* const score_ = reinterpret_cast<float*>(scores_.weight);  // no longer needed
  PhiloxWords words_ = {};                                         // of counter block_
  int block_ = -1;
};

// Copies the logits to shared memory; NaN becomes +inf. All loads are issued before any is used;
// missing entries become -inf, so the conversion needs no bounds check.
template <typename T>
VOX_DEVICE void load_logits(const T* logits, const Scores& scores) {
  const int mine = static_cast<int>(threadIdx.x) * kCodes, next = blockDim.x * kCodes;
  T raw[kMaxCodesPerThread];
#pragma unroll
  for (int s = 0; s < kMaxCodesPerThread; ++s) {
    const int first_code = mine + s / kCodes * next;
    const T* const from = logits + first_code;
    raw[s] = s % kCodes < scores.V - first_code ? from[s % kCodes] : from_float<T>(-kInfinity);
  }
#pragma unroll
  for (int s = 0; s < kMaxCodesPerThread; s += kCodes) {
    float four[kCodes];
#pragma unroll
    for (int i = 0; i < kCodes; ++i) {
      const float logit = to_float(raw[s + i]);
      four[i] = logit == logit ? logit : kInfinity;
    }
    const int first_code = mine + s / kCodes * next;
    if (first_code < scores.V) store<kCodes>(scores.z + first_code, four);
  }
}

VOX_DEVICE void clear(Shared& shared) {
#pragma unroll 1
  for (unsigned i = threadIdx.x; i < 2 * kBuckets / 4; i += blockDim.x)
    for (Buckets& buckets : shared.buckets)
      reinterpret_cast<uint4*>(buckets.sums)[i] = {0, 0, 0, 0};
  if (threadIdx.x == 0) {
    shared.buckets[0].count = shared.buckets[1].count = 0;
    shared.kept_count = shared.candidate_count = 0;
  }
}

// The repetition penalty, once for each code in the history. Two barriers.
VOX_DEVICE void penalise(const Scores& scores, const SamplerRow& row, Shared& shared) {
#pragma unroll 1
  for (unsigned i = threadIdx.x; i < kMaxVocabulary / 32; i += blockDim.x) shared.penalised[i] = 0;
  __syncthreads();
#pragma unroll 1
  for (int64_t w = threadIdx.x; w < row.W; w += blockDim.x) {
    const int64_t code = row.history[w];
    if (code < 0 || code >= scores.V) continue;
    const uint32_t bit = 1u << code % 32;
    if (atomicOr(&shared.penalised[code / 32], bit) & bit) continue;  // already penalised
    const float a = scores.z[code];
    scores.z[code] = a > 0 ? a / row.repetition_penalty : a * row.repetition_penalty;
  }
  __syncthreads();
}

// The block's extremes. One barrier.
VOX_DEVICE Extremes find_extremes(const Scores& scores, Shared& shared) {
  float high = -kInfinity, low = kInfinity;
  int32_t first = static_cast<int>(threadIdx.x) * kCodes;
  scores.each([&](int code, const float (&z)[kCodes]) {
#pragma unroll
    for (int i = 0; i < kCodes; ++i) {
      if (z[i] > high) {
        high = z[i];
        first = code + i;
      }
      if (z[i] > -kInfinity && z[i] < low) low = z[i];
    }
  });
  const int warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
  Extremes all;
  const auto combine = [&](int32_t my_high, int32_t my_first, int32_t my_low) {
    all.high = __reduce_max_sync(kWholeWarp, my_high);
    all.first = __reduce_min_sync(kWholeWarp, my_high == all.high ? my_first : kHighestOrder);
    all.low = __reduce_min_sync(kWholeWarp, my_low);
  };
  combine(float_order(high + 0.0f), first, float_order(low));  // -0 and 0 count as equal
  if (lane == 0) shared.extremes[threadIdx.x / kWarp] = all;
  __syncthreads();
  const Extremes other = shared.extremes[lane < warps ? lane : 0];
  combine(other.high, other.first, other.low);
  return all;
}

VOX_DEVICE void divide_by(float temperature, const Scores& scores) {
  scores.each([&](int code, float (&z)[kCodes]) {
#pragma unroll
    for (int i = 0; i < kCodes; ++i) z[i] /= temperature;
    store<kCodes>(scores.z + code, z);
  });
}

// The lowest score that top-k, top-p and min-p keep; `lowest` is the row's lowest finite score.
VOX_DEVICE float filter_bound(Scores& scores, float lowest, const SamplerRow& row, Shared& shared) {
  float bound = -kLargestFloat;
  const bool filtered[2] = {row.top_k > 0 && row.top_k < scores.V, row.top_p < 1};
  if (filtered[0] || filtered[1]) {
    scores.low = float_order(lowest);
    // Everything below e^-32 of the best goes to the last bucket.
    const float spread = scores.largest - lowest < 32 ? scores.largest - lowest : 32;
    scores.scale = kBuckets / (spread > 1e-6f ? spread : 1e-6f);
#pragma unroll 1
    for (int filter = 0; filter < 2; ++filter)
      if (filter == 0 ? filtered[0] : filtered[1])
        bound = lowest_kept(scores, filter == 1, bound, row, shared.buckets[filter], shared.steps);
  }
  if (row.min_p > 0) {
    const float other_bound = min_p_bound(row.min_p, scores.largest);
    bound = other_bound > bound ? other_bound : bound;
  }
  return bound;
}

// Lists the codes whose scores are not below `bound` in shared.kept. Returns their number, or -1 if
// they do not fit. One barrier.
VOX_DEVICE int list_kept(const Scores& scores, float bound, Shared& shared) {
  scores.each([&](int code, const float (&z)[kCodes]) {
    unsigned kept = 0;
#pragma unroll
    for (int i = 0; i < kCodes; ++i)
      if (z[i] >= bound) kept |= 1u << i;
    if (kept == 0) return;
    int place = atomicAdd(&shared.kept_count, __popc(kept));
#pragma unroll 1
    for (; kept && place < kMaxKeptList; kept &= kept - 1)
      shared.kept[place++] = code + __ffs(kept) - 1;
  });
  __syncthreads();
  return shared.kept_count <= kMaxKeptList ? shared.kept_count : -1;
}

// Draws a code and returns it in every thread; -1 if the largest logit is not finite. Needs a
// one-dimensional block of whole warps, V <= kMaxCodesPerThread times its threads, and
// shared_bytes(V) at `shared`; all threads call it with the same arguments. The caller issues a
// barrier before it reuses `shared`, whose content need not be initialised. `logits` need no
// alignment.
template <typename T>
VOX_DEVICE int sample_row(const T* logits, int V, const SamplerRow& row, Shared& shared) {
  Scores scores;
  scores.V = V;
  scores.z = reinterpret_cast<float*>(&shared + 1);
  scores.weight = reinterpret_cast<uint32_t*>(scores.z + padded(V));
  load_logits(logits, scores);
  clear(shared);
  if (row.W > 0) penalise(scores, row, shared);
  const Extremes all = find_extremes(scores, shared);
  if (isinf(float_at(all.high))) return -1;
  scores.largest = float_at(all.high) / row.temperature;
  // Infinite scores cannot be told apart: a temperature near 0.
  if (!(row.temperature > 0) || isinf(scores.largest)) return all.first;
  divide_by(row.temperature, scores);
  const float bound = filter_bound(scores, float_at(all.low) / row.temperature, row, shared);
  const int listed = bound > -kLargestFloat ? list_kept(scores, bound, shared) : -1;
  Race race(scores, bound, listed, row, shared);
  race.list_candidates(race.score_codes());
  return race.winner();
}

}  // namespace
}  // namespace voxkern::sampling
