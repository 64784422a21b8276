// One row's draw by one block, as `sample_tokens` specifies it. sample_tokens calls it.
//
// A thread keeps its logits in registers. As on the CPU (csrc/cpu/sampler.h) each filter is a
// lowest logit that stays: a logit stays in top-k if fewer than k are above it, in top-p if what is
// above it weighs less than top_p of all. Weights are integers (1, or e^(z - largest) in units of
// 2^-31), so their sums depend on no order; ties need no care and nothing is sorted. Both filters
// are one search: weights go to buckets of near logits, every warp finds the bucket where the sum
// crosses its limit, and the few logits of that bucket are compared with each other. Where they are
// not few, the block bisects over the values in their order.
//
// Codes that stay, if they are few, are spread over the threads before random numbers are made for
// them. The draw ranks them by float32 scores, then those near the best again in float64: it gives
// the CPU's code.
#pragma once

#include "../philox.h"
#include "common.cuh"

namespace voxkern {
namespace {

struct SamplerRow {
  float temperature;
  int32_t top_k;
  float top_p;
  float min_p;
  float repetition_penalty;
  const int64_t* history;  // [W]; may be null if W is 0
  int64_t W;
  int64_t seed;
  int64_t frame;
  int64_t codebook;
};

// Codes of a thread that lie next to each other: those of one Philox counter.
constexpr int kCodes = 4;
// Codes of a thread. A block of T threads takes up to kHeld T codes.
constexpr int kHeld = 3 * kCodes;
constexpr int kBuckets = 256;
constexpr int kListed = 128;  // codes that stay, at most, for which it pays to spread them
constexpr int kSamplerThreads = 512;
constexpr int kMaxVocabulary = kSamplerThreads * kHeld;

// Threads of a block for V codes: two counters each, which is soon done and leaves few warps to
// meet at a barrier.
inline unsigned sampler_threads(int64_t V) {
  return block_size(divide_up(V, 2 * kCodes), kSamplerThreads);
}

// What one step of the bisection leaves of each warp.
struct Found {
  unsigned long long weight;  // of the values above the pivot
  int32_t below, above;       // the nearest values at or below, and above it, as float_order
};
struct Near {
  int32_t order;
  uint32_t weight;
};
// Of one search.
struct Buckets {
  uint32_t sums[2 * kBuckets];  // of the weights' lower 16 bits, then of the upper
  int count;
  Near near[kWarp];
};
// Of a warp's logits, as float_order: the largest, its first code, and the lowest finite one.
struct Extremes {
  int32_t high, first, low;
};
struct Kept {
  float z;
  int32_t code;
};
struct Candidate {
  double score;
  int32_t code;
};
struct SamplerShared {
  Buckets top_k, top_p;
  uint32_t penalised[kMaxVocabulary / 32];  // a bit a code
  Extremes extremes[kMaxWarps];
  Found found[2][kMaxWarps];
  int kept_count;
  Kept kept[kListed];
  float best[kMaxWarps];
  Candidate candidates[kMaxWarps];
};

// A float's place in the order of all floats, as a signed integer, and back.
__device__ __forceinline__ int32_t float_order(float a) {
  const int32_t bits = __float_as_int(a);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
__device__ __forceinline__ float float_at(int32_t order) {
  return __int_as_float(order ^ ((order >> 31) & 0x7fffffff));
}

constexpr int32_t kLowestOrder = static_cast<int32_t>(0x807fffff);  // of minus infinity
constexpr int32_t kHighestOrder = 0x7fffffff;

// The code of this thread's value s; neighbouring threads have neighbouring codes.
__device__ __forceinline__ int held_code(int s) {
  return static_cast<int>((s / kCodes * blockDim.x + threadIdx.x) * kCodes) + s % kCodes;
}

// A row's scores: z = logit over temperature, minus infinity past its V codes. `low` and `high` are
// the lowest finite and the largest score, as float_order.
struct Scores {
  int V;
  float z[kHeld];
  int32_t low, high;
  float largest, scale;  // buckets per unit below the largest

  // f(s, code) for this thread's codes.
  template <typename F>
  __device__ __forceinline__ void each(const F& f) const {
#pragma unroll
    for (int s = 0; s < kHeld; ++s)
      if (const int code = held_code(s); code < V) f(s, code);
  }
  __device__ __forceinline__ int bucket(float a) const {
    const float place = (largest - a) * scale;
    return place < kBuckets - 1 ? static_cast<int>(place) : kBuckets - 1;
  }
};

// The lowest of the scores above which the weights sum to less than `limit`, by bisection.
template <typename Weight>
__device__ float bisect(const Scores& scores, const Weight& weight, double limit,
                        Found (&found)[2][kMaxWarps]) {
  const int warps = blockDim.x / kWarp;
  // Invariant: the answer is above `low`, and not above `high`, which occurs.
  int32_t pivot = scores.low - 1, low = kLowestOrder - 1, high = scores.high;
  for (int step = 0; low + 1 < high; ++step) {
    Found mine = {0, kLowestOrder - 1, kHighestOrder};
    scores.each([&](int s, int) {
      const int32_t order = float_order(scores.z[s]);
      if (order > pivot) {
        mine.weight += weight(s);
        mine.above = order < mine.above ? order : mine.above;
      } else {
        mine.below = order > mine.below ? order : mine.below;
      }
    });
    mine.weight = warp_reduce(mine.weight, Add());
    mine.below = __reduce_max_sync(kWholeWarp, mine.below);
    mine.above = __reduce_min_sync(kWholeWarp, mine.above);
    if (warps > 1) {
      Found(&all)[kMaxWarps] = found[step % 2];
      if (threadIdx.x % kWarp == 0) all[threadIdx.x / kWarp] = mine;
      __syncthreads();
      mine = all[0];
      for (int i = 1; i < warps; ++i) {
        mine.weight += all[i].weight;
        mine.below = all[i].below > mine.below ? all[i].below : mine.below;
        mine.above = all[i].above < mine.above ? all[i].above : mine.above;
      }
    }
    if (static_cast<double>(mine.weight) < limit) {
      if (mine.below <= low) return float_at(mine.above);
      high = mine.below;
    } else {
      low = mine.above - 1;
    }
    pivot =
        low + static_cast<int32_t>((static_cast<uint32_t>(high) - static_cast<uint32_t>(low)) / 2);
  }
  return float_at(high);
}

// The same by way of `buckets`, which are zeros; limit_of(sum of all weights) is at most that sum.
// The largest score if the limit is not above 0. Two barriers.
template <typename Weight, typename Limit>
__device__ float lowest_kept(const Scores& scores, const Weight& weight, const Limit& limit_of,
                             Buckets& buckets, Found (&found)[2][kMaxWarps]) {
  constexpr int kOfLane = kBuckets / kWarp;
  scores.each([&](int s, int) {
    const uint32_t w = weight(s);
    const int bucket = scores.bucket(scores.z[s]);
    if (w & 0xffff) atomicAdd(&buckets.sums[bucket], w & 0xffff);
    if (w >> 16) atomicAdd(&buckets.sums[kBuckets + bucket], w >> 16);
  });
  __syncthreads();

  const int lane = threadIdx.x % kWarp;
  unsigned long long sums[kOfLane], mine = 0;
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    const int bucket = lane * kOfLane + i;
    sums[i] = (static_cast<unsigned long long>(buckets.sums[kBuckets + bucket]) << 16) +
              buckets.sums[bucket];
    mine += sums[i];
  }
  unsigned long long above = mine;  // so far with what is this lane's
#pragma unroll
  for (int delta = 1; delta < kWarp; delta *= 2) {
    const unsigned long long other = __shfl_up_sync(kWholeWarp, above, delta);
    if (lane >= delta) above += other;
  }
  const double limit = limit_of(__shfl_sync(kWholeWarp, above, kWarp - 1));
  above -= mine;
  int crossed = -1;
  unsigned long long above_crossed = 0;
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    const unsigned long long next = above + sums[i];
    if (static_cast<double>(above) < limit && !(static_cast<double>(next) < limit)) {
      crossed = lane * kOfLane + i;
      above_crossed = above;
    }
    above = next;
  }
  const unsigned lanes = __ballot_sync(kWholeWarp, crossed >= 0);
  if (lanes == 0) return scores.largest;  // the whole block
  crossed = __shfl_sync(kWholeWarp, crossed, __ffs(lanes) - 1);
  above_crossed = __shfl_sync(kWholeWarp, above_crossed, __ffs(lanes) - 1);

  scores.each([&](int s, int) {
    const uint32_t w = weight(s);
    if (w == 0 || scores.bucket(scores.z[s]) != crossed) return;
    const int place = atomicAdd(&buckets.count, 1);
    if (place < kWarp) buckets.near[place] = {float_order(scores.z[s]), w};
  });
  __syncthreads();
  const int count = buckets.count;
  if (count > kWarp) return bisect(scores, weight, limit, found);
  const Near my_near = lane < count ? buckets.near[lane] : Near{kLowestOrder - 1, 0};
  for (int i = 0; i < count; ++i) {
    const Near other = buckets.near[i];
    if (other.order > my_near.order) above_crossed += other.weight;
  }
  const bool stays = lane < count && static_cast<double>(above_crossed) < limit;
  return float_at(__reduce_min_sync(kWholeWarp, stays ? my_near.order : kHighestOrder));
}

// The exponential race of N codes of each thread, z minus infinity for those that take no part: the
// winner, in every thread. Two barriers.
template <int N, typename Code>
__device__ int race(const float (&z)[N], const Code& code_of, float largest, const SamplerRow& row,
                    SamplerShared& shared) {
  const float lowest = __int_as_float(static_cast<int>(0xff800000));
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
  float score[N], best = lowest;
#pragma unroll
  for (int s = 0; s < N; ++s) {
    score[s] = z[s] > lowest ? z[s] - largest - logf(-logf(random(code_of(s)))) : lowest;
    best = score[s] > best ? score[s] : best;
  }
  best = block_reduce(best, shared.best, Max());
  // float32 scores of the front runners lie within 40 of 0: 1e-3 is far above their errors.
  Candidate winner = {-1e300, kHighestOrder};
#pragma unroll
  for (int s = 0; s < N; ++s) {
    if (!(score[s] >= best - 1e-3f)) continue;
    const int code = code_of(s);
    const double exact =
        static_cast<double>(z[s]) - largest - log(-log(static_cast<double>(random(code))));
    if (exact > winner.score) winner = {exact, code};
  }
  const auto better = [](const Candidate& a, const Candidate& b) {
    return a.score > b.score || (a.score == b.score && a.code < b.code) ? a : b;
  };
#pragma unroll
  for (int offset = kWarp / 2; offset; offset /= 2) {
    const Candidate other = {__shfl_xor_sync(kWholeWarp, winner.score, offset),
                             __shfl_xor_sync(kWholeWarp, winner.code, offset)};
    winner = better(winner, other);
  }
  const int warps = blockDim.x / kWarp;
  if (warps > 1) {
    if (threadIdx.x % kWarp == 0) shared.candidates[threadIdx.x / kWarp] = winner;
    __syncthreads();
    winner = shared.candidates[0];
    for (int i = 1; i < warps; ++i) winner = better(winner, shared.candidates[i]);
  }
  return winner.code;
}

// The code drawn, in every thread. For a one-dimensional block of whole warps, with V <= kHeld
// times its threads; all of them call it, with the same arguments. A barrier must come before
// `shared` (of any content) is used again. `logits` need no alignment.
template <typename T>
__device__ int sample_row(const T* logits, int V, const SamplerRow& row, SamplerShared& shared) {
  const float lowest_float = __int_as_float(static_cast<int>(0xff800000));
  Scores scores;
  scores.V = V;
#pragma unroll
  for (int s = 0; s < kHeld; ++s) scores.z[s] = lowest_float;
  scores.each([&](int s, int code) { scores.z[s] = to_float(logits[code]); });
  for (unsigned i = threadIdx.x; i < 2 * kBuckets; i += blockDim.x)
    shared.top_k.sums[i] = shared.top_p.sums[i] = 0;
  if (threadIdx.x == 0) shared.top_k.count = shared.top_p.count = shared.kept_count = 0;
  if (row.W > 0) {
    for (unsigned i = threadIdx.x; i < kMaxVocabulary / 32; i += blockDim.x)
      shared.penalised[i] = 0;
    __syncthreads();
    for (int64_t w = threadIdx.x; w < row.W; w += blockDim.x) {
      const int64_t code = row.history[w];
      if (code >= 0 && code < V) atomicOr(&shared.penalised[code / 32], 1u << code % 32);
    }
    __syncthreads();
    scores.each([&](int s, int code) {
      const float a = scores.z[s];
      if (shared.penalised[code / 32] >> code % 32 & 1)
        scores.z[s] = a > 0 ? a / row.repetition_penalty : a * row.repetition_penalty;
    });
  }

  // The first of the largest, and the lowest that is finite.
  int32_t high = kLowestOrder - 1, low = kHighestOrder, first = kHighestOrder;
  scores.each([&](int s, int code) {
    float& a = scores.z[s];
    a = a == a ? a : lowest_float;
    const int32_t order = float_order(a);
    if (order > high) {
      high = order;
      first = code;
    }
    if (order > kLowestOrder && order < low) low = order;
  });
  const int32_t of_warp = __reduce_max_sync(kWholeWarp, high);
  first = __reduce_min_sync(kWholeWarp, high == of_warp ? first : kHighestOrder);
  low = __reduce_min_sync(kWholeWarp, low);
  if (threadIdx.x % kWarp == 0) shared.extremes[threadIdx.x / kWarp] = {of_warp, first, low};
  __syncthreads();
  Extremes all = shared.extremes[0];
  for (unsigned i = 1; i < blockDim.x / kWarp; ++i) {  // codes of a later warp may be lower
    const Extremes other = shared.extremes[i];
    if (other.high > all.high || (other.high == all.high && other.first < all.first)) {
      all.high = other.high;
      all.first = other.first;
    }
    all.low = other.low < all.low ? other.low : all.low;
  }
  scores.largest = float_at(all.high) / row.temperature;
  // Infinite scores tell nothing apart: all logits minus infinity, or a temperature near 0.
  if (!(row.temperature > 0) || isinf(scores.largest)) return all.first;
  scores.each([&](int s, int) { scores.z[s] /= row.temperature; });
  const float lowest = float_at(all.low) / row.temperature;
  scores.low = float_order(lowest);
  scores.high = float_order(scores.largest);
  // Below e^-32 of the best all goes to the last bucket.
  const float spread = scores.largest - lowest < 32 ? scores.largest - lowest : 32;
  scores.scale = kBuckets / (spread > 1e-6f ? spread : 1e-6f);

  float bound = lowest_float;
  const bool some = row.top_k > 0 && row.top_k < V;
  if (some)
    bound = lowest_kept(
        scores, [](int) { return 1u; },
        [&](unsigned long long) { return static_cast<double>(row.top_k); }, shared.top_k,
        shared.found);
  if (row.top_p < 1) {
    uint32_t odds[kHeld] = {};
    scores.each([&](int s, int) {
      if (scores.z[s] >= bound)
        odds[s] = static_cast<uint32_t>(expf(scores.z[s] - scores.largest) * 0x1p31f + 0.5f);
    });
    const auto limit = [&](unsigned long long total) {
      return static_cast<double>(row.top_p) * static_cast<double>(total);
    };
    bound = lowest_kept(scores, [&](int s) { return odds[s]; }, limit, shared.top_p, shared.found);
  }
  if (!(some || row.top_p < 1 || row.min_p > 0))
    return race(scores.z, held_code, scores.largest, row, shared);

  // min-p alone is a bound on e^(z - largest): in float64 on its logarithm.
  const double log_p =
      row.min_p > 0 ? log(row.min_p < 1 ? static_cast<double>(row.min_p) : 1.0) : -1e300;
  scores.each([&](int s, int code) {
    float& z = scores.z[s];
    if (z < bound || static_cast<double>(z) - scores.largest < log_p) z = lowest_float;
    if (z == lowest_float) return;
    const int place = atomicAdd(&shared.kept_count, 1);
    if (place < kListed) shared.kept[place] = {z, code};
  });
  __syncthreads();
  const int count = shared.kept_count, me = static_cast<int>(threadIdx.x);
  if (count > kListed || count > static_cast<int>(blockDim.x))
    return race(scores.z, held_code, scores.largest, row, shared);
  const Kept mine = me < count ? shared.kept[me] : Kept{lowest_float, 0};
  const float z[1] = {mine.z};
  return race(z, [&](int) { return mine.code; }, scores.largest, row, shared);
}

}  // namespace
}  // namespace voxkern
