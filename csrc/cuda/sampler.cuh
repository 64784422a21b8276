// One row's draw by one block, as `sample_tokens` specifies it. sample_tokens calls it.
//
// As on the CPU (csrc/cpu/sampler.h) each filter is a lowest logit that stays: a logit stays in
// top-k if fewer than k are above it, in top-p if what is above it weighs less than top_p of all.
// Both are one search, over the values in their order: each step weighs what lies above a pivot,
// and moves to the next value that occurs, so ties need no care and nothing is sorted. Weights are
// integers (1, or e^(z - largest) in units of 2^-31), so their sums depend on no order. The draw
// ranks the codes that stay by float32 scores, then those near the best again in float64: it gives
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

// What sample_row wants as shared memory besides SamplerShared: z and weights.
__host__ __device__ constexpr int64_t sampler_padded(int64_t V) {
  return divide_up(V, kCodes) * kCodes;
}
constexpr int64_t sampler_shared_bytes(int64_t V) { return 2 * 4 * sampler_padded(V); }

// What one step of the search leaves of each warp.
struct Found {
  unsigned long long weight;  // of the values above the pivot
  int32_t below, above;       // the nearest values at or below, and above it, as float_order
};
struct Candidate {
  double score;
  int32_t code;
};
struct SamplerShared {
  Found found[2][kMaxWarps];
  unsigned long long largest[kMaxWarps];
  int32_t lowest[kMaxWarps];
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

// f(code) for this thread's codes below V.
template <typename F>
__device__ __forceinline__ void for_each_code(int V, const F& f) {
  for (int first = threadIdx.x * kCodes; first < V; first += blockDim.x * kCodes)
#pragma unroll
    for (int i = 0; i < kCodes; ++i)
      if (first + i < V) f(first + i);
}

// The lowest of the values z[0..V) above which the weights sum to less than `limit`; the largest
// value if there is none. `low` and `high` are the lowest finite and the largest value.
template <typename Weight, typename Limit>
__device__ float lowest_kept(const float* z, int V, const Weight& weight, Limit limit, int32_t low,
                             int32_t high, Found (&found)[2][kMaxWarps]) {
  const int warps = blockDim.x / kWarp;
  // Invariant: the answer is above `low`, and not above `high`, which occurs.
  int32_t pivot = low - 1;
  low = kLowestOrder - 1;
  for (int step = 0; low + 1 < high; ++step) {
    Found mine = {0, kLowestOrder - 1, kHighestOrder};
    for_each_code(V, [&](int code) {
      const int32_t order = float_order(z[code]);
      if (order > pivot) {
        mine.weight += weight(code);
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
    if (static_cast<Limit>(mine.weight) < limit) {
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

// The code drawn, in every thread. Whole warps, one-dimensional blocks; `z` and `weights` are
// shared memory, sampler_padded(V) long. A barrier must come before `shared` is used again.
template <typename T>
__device__ int sample_row(const T* logits, int V, const SamplerRow& row, float* z,
                          uint32_t* weights, SamplerShared& shared) {
  const float lowest_float = __int_as_float(static_cast<int>(0xff800000));
  for_each_code(V, [&](int code) {
    const float a = to_float(logits[code]);
    z[code] = a == a ? a : lowest_float;
  });
  if (row.W > 0) {
    __syncthreads();
    // From the unpenalised logit, so a code that comes twice is penalised once.
    for (int64_t w = threadIdx.x; w < row.W; w += blockDim.x) {
      const int64_t code = row.history[w];
      if (code < 0 || code >= V) continue;
      const float a = to_float(logits[code]);
      if (a == a) z[code] = a > 0 ? a / row.repetition_penalty : a * row.repetition_penalty;
    }
    __syncthreads();
  }

  // The first of the largest: order, then the lowest code.
  unsigned long long first = 0;
  for_each_code(V, [&](int code) {
    const uint32_t order = static_cast<uint32_t>(float_order(z[code])) ^ 0x80000000u;
    const unsigned long long key =
        static_cast<unsigned long long>(order) << 32 | ~static_cast<uint32_t>(code);
    first = key > first ? key : first;
  });
  first = block_reduce(first, shared.largest, Max());
  const float largest =
      float_at(static_cast<int32_t>(static_cast<uint32_t>(first >> 32) ^ 0x80000000u)) /
      row.temperature;
  // Infinite scores tell nothing apart: all logits minus infinity, or a temperature near 0.
  if (!(row.temperature > 0) || isinf(largest))
    return static_cast<int>(~static_cast<uint32_t>(first));

  int32_t lowest = kHighestOrder;
  for_each_code(V, [&](int code) {
    z[code] /= row.temperature;
    const int32_t order = float_order(z[code]);
    if (order > kLowestOrder && order < lowest) lowest = order;
  });
  const int32_t top = float_order(largest);
  float bound = lowest_float;
  const bool some = row.top_k > 0 && row.top_k < V;
  if (some || row.top_p < 1) {
    lowest = __reduce_min_sync(kWholeWarp, lowest);
    const int warps = blockDim.x / kWarp;
    if (warps > 1) {
      if (threadIdx.x % kWarp == 0) shared.lowest[threadIdx.x / kWarp] = lowest;
      __syncthreads();
      for (int i = 0; i < warps; ++i)
        lowest = shared.lowest[i] < lowest ? shared.lowest[i] : lowest;
    }
  }
  if (some) {
    const auto one = [](int) { return 1u; };
    bound = lowest_kept(z, V, one, static_cast<unsigned long long>(row.top_k), lowest, top,
                        shared.found);
  }
  if (row.top_p < 1) {
    unsigned long long total = 0;
    for_each_code(V, [&](int code) {
      weights[code] =
          z[code] >= bound ? static_cast<uint32_t>(expf(z[code] - largest) * 0x1p31f + 0.5f) : 0;
      total += weights[code];
    });
    total = block_reduce(total, shared.largest, Add());
    const auto odds = [&](int code) { return weights[code]; };
    const double limit = static_cast<double>(row.top_p) * static_cast<double>(total);
    bound = lowest_kept(z, V, odds, limit, lowest, top, shared.found);
  }

  // min-p alone is a bound on e^(z - largest): in float64 on its logarithm.
  const double log_p =
      row.min_p > 0 ? log(row.min_p < 1 ? static_cast<double>(row.min_p) : 1.0) : 0.0;
  const auto stays = [&](int code) {
    return z[code] >= bound &&
           (!(row.min_p > 0) || static_cast<double>(z[code]) - largest >= log_p);
  };

  // The exponential race; the scores' bits lie where weights were.
  float best = lowest_float;
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
  for_each_code(V, [&](int code) {
    const float score = stays(code) ? z[code] - largest - logf(-logf(random(code))) : lowest_float;
    weights[code] = __float_as_uint(score);
    best = score > best ? score : best;
  });
  best = block_reduce(best, shared.best, Max());
  // float32 scores of the front runners lie within 40 of 0: 1e-3 is far above their errors.
  Candidate winner = {-1e300, V};
  for_each_code(V, [&](int code) {
    if (!(__uint_as_float(weights[code]) >= best - 1e-3f)) return;
    const double exact =
        static_cast<double>(z[code]) - largest - log(-log(static_cast<double>(random(code))));
    if (exact > winner.score) winner = {exact, code};
  });
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

}  // namespace
}  // namespace voxkern
