// One row's draw by one block, as `sample_tokens` specifies it.
//
// filters.cuh finds the lowest score that stays. Codes that stay, if they are few, are
// spread over the threads before random numbers are made for them. The draw ranks them by float32
// scores, then those near the best again in float64: it gives the CPU's code.
//
// It runs once, on a multiprocessor that has just run something else, so its instructions come from
// the second-level cache: fewer of them in a loop are better than more without one. Logits lie in
// shared memory, where loops can reach them, and what is long (logarithms, Philox, the search) is
// there once or twice, not for each code that a thread has. A thread's own codes need no barrier.
#pragma once

#include "common/philox.h"
#include "cuda/runtime/elements.cuh"
#include "cuda/sampling/filters.cuh"

namespace voxkern::sampling {
namespace {

constexpr int kMaxKeptList = 128;  // codes that stay, at most, for which it pays to spread them

// Of a warp's logits, as float_order: the largest, its first code, and the lowest finite one.
struct Extremes {
  int32_t high, first, low;
};
struct Candidate {
  double score;
  int32_t code;
};
// Behind it, as many times kCodes as there are counters: the logits, then what is known of each.
struct alignas(16) Shared {
  Candidate candidates[kSamplerThreads];
  Buckets buckets[2];                       // of top-k, of top-p
  uint32_t penalised[kMaxVocabulary / 32];  // a bit a code
  Extremes extremes[kMaxWarps];
  Found found[2][kMaxWarps];
  int32_t best[kMaxWarps];  // as float_order
  int kept_count, candidate_count;
  int32_t kept[kMaxKeptList];
};

__host__ __device__ __forceinline__ int padded(int V) { return (V + kCodes - 1) / kCodes * kCodes; }

// The dynamic shared memory of a block that calls sample_row.
inline size_t shared_bytes(int64_t V) {
  return sizeof(Shared) + 2 * sizeof(float) * padded(static_cast<int>(V));
}

// The exponential race of the codes whose scores are not below `bound`: the `listed` in shared.kept
// or, if that is negative, of all. The winner, in every thread. Two barriers.
__device__ __forceinline__ int race(const Scores& scores, float bound, int listed,
                                    const SamplerRow& row, Shared& shared) {
  PhiloxWords words = {};
  int block = -1;
  const auto random = [&](int code) {
    if (code / kCodes != block) {
      block = code / kCodes;
      words = draw_words(row.seed, row.frame, row.codebook, block);
    }
    const int i = code % kCodes;
    return uniform(i == 0   ? words.word[0]
                   : i == 1 ? words.word[1]
                   : i == 2 ? words.word[2]
                            : words.word[3]);
  };
  // f(code) for those of this thread; the same ones whenever it is called.
  const auto each = [&](const auto& f) {
    const int items = listed < 0 ? padded(scores.V) / kCodes : listed;
#pragma unroll 1
    for (int i = threadIdx.x; i < items; i += blockDim.x) {
      int code = listed < 0 ? i * kCodes : shared.kept[i];
      const int end = listed < 0 ? code + kCodes : code + 1;
#pragma unroll 1
      for (; code < end; ++code)
        if (scores.z[code] >= bound) f(code);
    }
  };
  float* const score = reinterpret_cast<float*>(scores.weight);  // which are no more needed
  float best = -kLargestFloat;
  each([&](int code) {
    const float mine = scores.z[code] - scores.largest - logf(-logf(random(code)));
    score[code] = mine;
    best = mine > best ? mine : best;
  });
  const int warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
  int32_t order = __reduce_max_sync(kWholeWarp, float_order(best));
  if (lane == 0) shared.best[threadIdx.x / kWarp] = order;
  __syncthreads();
  order = __reduce_max_sync(kWholeWarp, shared.best[lane < warps ? lane : 0]);
  // float32 scores of the front runners lie within 40 of 0: 1e-3 is far above their errors.
  const float close = float_at(order) - 1e-3f;
  Candidate winner = {-1e300, kHighestOrder};
  each([&](int code) {
    if (!(score[code] >= close)) return;
    double luck = static_cast<double>(random(code));
#pragma unroll 1
    for (int twice = 0; twice < 2; ++twice) luck = -log(luck);
    const double exact = static_cast<double>(scores.z[code]) - scores.largest + luck;
    if (exact > winner.score || (exact == winner.score && code < winner.code))
      winner = {exact, code};
  });
  if (winner.code != kHighestOrder)
    shared.candidates[atomicAdd(&shared.candidate_count, 1)] = winner;
  __syncthreads();
  winner = shared.candidates[0];
#pragma unroll 1
  for (int i = shared.candidate_count - 1; i > 0; --i) {
    const Candidate other = shared.candidates[i];
    if (other.score > winner.score || (other.score == winner.score && other.code < winner.code))
      winner = other;
  }
  return winner.code;
}

// The code drawn, in every thread. For a one-dimensional block of whole warps, with V <=
// kMaxCodesPerThread times its threads and shared_bytes(V) at `shared`; all of them call it, with
// the same arguments. A barrier must come before `shared` (of any content) is used again. `logits`
// need no alignment.
template <typename T>
__device__ __forceinline__ int sample_row(const T* logits, int V, const SamplerRow& row,
                                          Shared& shared) {
  const float infinity = __int_as_float(0x7f800000);
  Scores scores;
  scores.V = V;
  scores.z = reinterpret_cast<float*>(&shared + 1);
  scores.weight = reinterpret_cast<uint32_t*>(scores.z + padded(V));
  // All in flight at once: what turns them to floats asks no more which are there.
  T held[kMaxCodesPerThread];
  const int mine = static_cast<int>(threadIdx.x) * kCodes, next = blockDim.x * kCodes;
#pragma unroll
  for (int s = 0; s < kMaxCodesPerThread; ++s) {
    const int first_code = mine + s / kCodes * next;
    const T* const from = logits + first_code;
    held[s] = s % kCodes < V - first_code ? from[s % kCodes] : from_float<T>(-infinity);
  }
#pragma unroll
  for (int s = 0; s < kMaxCodesPerThread; s += kCodes) {
    const float four[kCodes] = {to_float(held[s]), to_float(held[s + 1]), to_float(held[s + 2]),
                                to_float(held[s + 3])};
    const int first_code = mine + s / kCodes * next;
    if (first_code < V) store<kCodes>(scores.z + first_code, four);
  }
#pragma unroll 1
  for (unsigned i = threadIdx.x; i < 2 * kBuckets / 4; i += blockDim.x)
    for (Buckets& buckets : shared.buckets)
      reinterpret_cast<uint4*>(buckets.sums)[i] = {0, 0, 0, 0};
  if (threadIdx.x == 0) {
    shared.buckets[0].count = shared.buckets[1].count = 0;
    shared.kept_count = shared.candidate_count = 0;
  }
  if (row.W > 0) {
#pragma unroll 1
    for (unsigned i = threadIdx.x; i < kMaxVocabulary / 32; i += blockDim.x)
      shared.penalised[i] = 0;
    __syncthreads();
#pragma unroll 1
    for (int64_t w = threadIdx.x; w < row.W; w += blockDim.x) {
      const int64_t code = row.history[w];
      if (code < 0 || code >= V) continue;
      const uint32_t bit = 1u << code % 32;
      if (atomicOr(&shared.penalised[code / 32], bit) & bit) continue;  // it has come before
      const float a = scores.z[code];
      scores.z[code] = a > 0 ? a / row.repetition_penalty : a * row.repetition_penalty;
    }
    __syncthreads();
  }

  // The first of the largest, and the lowest that is finite.
  float high = -infinity, low = infinity;
  int32_t first = mine;
  scores.each([&](int code) {
    float z[kCodes];
    load<kCodes>(scores.z + code, z);
#pragma unroll
    for (int i = 0; i < kCodes; ++i) {
      if (z[i] > high) {
        high = z[i];
        first = code + i;
      }
      if (z[i] > -infinity && z[i] < low) low = z[i];
    }
  });
  const int warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
  Extremes all;
  const auto combine = [&](int32_t my_high, int32_t my_first, int32_t my_low) {
    all.high = __reduce_max_sync(kWholeWarp, my_high);
    all.first = __reduce_min_sync(kWholeWarp, my_high == all.high ? my_first : kHighestOrder);
    all.low = __reduce_min_sync(kWholeWarp, my_low);
  };
  combine(float_order(high + 0.0f), first, float_order(low));  // of two zeros the first too
  if (lane == 0) shared.extremes[threadIdx.x / kWarp] = all;
  __syncthreads();
  const Extremes other = shared.extremes[lane < warps ? lane : 0];
  combine(other.high, other.first, other.low);
  scores.largest = float_at(all.high) / row.temperature;
  // Infinite scores tell nothing apart: all logits minus infinity, or a temperature near 0.
  if (!(row.temperature > 0) || isinf(scores.largest)) return all.first;
  scores.each([&](int code) {
    float z[kCodes];
    load<kCodes>(scores.z + code, z);
#pragma unroll
    for (int i = 0; i < kCodes; ++i) z[i] /= row.temperature;
    store<kCodes>(scores.z + code, z);
  });

  float bound = -kLargestFloat;
  const bool filtered[2] = {row.top_k > 0 && row.top_k < V, row.top_p < 1};
  if (filtered[0] || filtered[1]) {
    const float lowest = float_at(all.low) / row.temperature;
    scores.low = float_order(lowest);
    // Below e^-32 of the best all goes to the last bucket.
    const float spread = scores.largest - lowest < 32 ? scores.largest - lowest : 32;
    scores.scale = kBuckets / (spread > 1e-6f ? spread : 1e-6f);
#pragma unroll 1
    for (int filter = 0; filter < 2; ++filter)
      if (filter == 0 ? filtered[0] : filtered[1])
        bound = lowest_kept(scores, filter == 1, bound, row, shared.buckets[filter], shared.found);
  }
  if (row.min_p > 0) {
    const float other_bound = min_p_bound(row.min_p, scores.largest);
    bound = other_bound > bound ? other_bound : bound;
  }

  int listed = -1;
  if (bound > -kLargestFloat) {
    scores.each([&](int code) {
      float z[kCodes];
      load<kCodes>(scores.z + code, z);
      unsigned stay = 0;
#pragma unroll
      for (int i = 0; i < kCodes; ++i)
        if (z[i] >= bound) stay |= 1u << i;
      if (stay == 0) return;
      int place = atomicAdd(&shared.kept_count, __popc(stay));
#pragma unroll 1
      for (; stay && place < kMaxKeptList; stay &= stay - 1)
        shared.kept[place++] = code + __ffs(stay) - 1;
    });
    __syncthreads();
    if (shared.kept_count <= kMaxKeptList) listed = shared.kept_count;
  }
  return race(scores, bound, listed, row, shared);
}

}  // namespace
}  // namespace voxkern::sampling
