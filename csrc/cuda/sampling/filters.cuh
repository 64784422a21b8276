// The filters of a draw: the lowest of a row's scores that top-k, top-p and min-p keep.
//
// As on the CPU (csrc/cpu/ops/sampler.h) each filter is a lowest logit to keep: top-k keeps a logit
// if fewer than k are above it, top-p if those above it weigh less than top_p of all. Weights are
// integers (1, or e^(z - largest) in units of 2^-31), so their sums do not depend on the order,
// ties need no care and nothing is sorted. Both filters are one search: weights go to buckets of
// nearby logits, every warp finds the bucket where the sum crosses its limit, and the few logits of
// that bucket are compared with each other. If they are more than a few, the block bisects over the
// values in their order.
#pragma once

#include <limits>

#include "common/sampling.h"
#include "cuda/runtime/elements.cuh"

namespace voxkern::sampling {
namespace {

constexpr int kCodes = 4;  // consecutive codes of a thread, those of one Philox counter
// A block of T threads takes up to kMaxCodesPerThread T codes.
constexpr int kMaxCodesPerThread = 3 * kCodes;
constexpr int kBuckets = 256;
constexpr int kSamplerThreads = 512;
constexpr int kMaxVocabulary = kSamplerThreads * kMaxCodesPerThread;

// Threads of a block for V codes: two counters each, which is quickly done and leaves few warps to
// meet at a barrier.
inline unsigned block_threads(int64_t V) {
  return block_size(divide_up(V, 2 * kCodes), kSamplerThreads);
}

// One warp's result of a step of the bisection.
struct BisectionStep {
  unsigned long long weight;  // of the values above the pivot
  int32_t below, above;       // nearest values at or below the pivot, and above it, by float_order
};
struct Near {
  int32_t order;
  uint32_t weight;
};
// The buckets of one search.
struct alignas(16) Buckets {
  uint32_t sums[2 * kBuckets];  // of the weights' lower 16 bits, then of the upper 16
  int count;
  Near near[kWarp];
};

// Maps a float to a signed integer of the same order, and back.
VOX_DEVICE int32_t float_order(float a) {
  const int32_t bits = __float_as_int(a);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
VOX_DEVICE float float_at(int32_t order) {
  return __int_as_float(order ^ ((order >> 31) & 0x7fffffff));
}

constexpr int32_t kLowestOrder = static_cast<int32_t>(0x807fffff);  // of minus infinity
constexpr int32_t kHighestOrder = 0x7fffffff;
constexpr float kLargestFloat = 0x1.fffffep127f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The lowest score z with e^(z - largest) >= min_p, in float64 on its logarithm.
VOX_DEVICE float min_p_bound(float min_p, float largest) {
  const double log_p = log(min_p < 1 ? static_cast<double>(min_p) : 1.0);
  int32_t order = float_order(static_cast<float>(largest + log_p));
#pragma unroll 1
  while (static_cast<double>(float_at(order)) - largest < log_p) ++order;
#pragma unroll 1
  while (static_cast<double>(float_at(order - 1)) - largest >= log_p) --order;
  return float_at(order);
}

// A row's scores: z = logit / temperature, never NaN or +inf. A thread has the codes of whole
// counters; those past V are -inf.
struct Scores {
  int V;
  float* z;              // [padded V]
  uint32_t* weight;      // [padded V], of the current search
  int32_t low;           // the lowest finite score, by float_order
  float largest, scale;  // of the buckets: per unit below the largest

  // Calls f(first code, its kCodes scores) for all of this thread's.
  template <typename F>
  VOX_DEVICE void each(const F& f) const {
#pragma unroll 1
    for (int code = static_cast<int>(threadIdx.x) * kCodes; code < V;
         code += static_cast<int>(blockDim.x) * kCodes) {
      float scores[kCodes];
      load<kCodes>(z + code, scores);
      f(code, scores);
    }
  }
  VOX_DEVICE int bucket(float a) const {
    return static_cast<int>(fminf((largest - a) * scale, kBuckets - 1));
  }
};

VOX_DEVICE void load_words(const uint32_t* p, uint32_t (&out)[kCodes]) {
  const uint4 a = *reinterpret_cast<const uint4*>(p);
  out[0] = a.x;
  out[1] = a.y;
  out[2] = a.z;
  out[3] = a.w;
}

// The lowest of the scores above which the weights sum to less than `limit`, by bisection.
VOX_DEVICE float bisect(const Scores& scores, unsigned long long limit,
                        BisectionStep (&steps)[2][kMaxWarps]) {
  const int warps = blockDim.x / kWarp;
  // Invariant: the answer is above `low`, and not above `high`, which occurs.
  int32_t pivot = scores.low - 1, low = kLowestOrder - 1, high = float_order(scores.largest);
  for (int step = 0; low + 1 < high; ++step) {
    BisectionStep mine = {0, kLowestOrder - 1, kHighestOrder};
    scores.each([&](int code, const float (&z)[kCodes]) {
      uint32_t weight[kCodes];
      load_words(scores.weight + code, weight);
#pragma unroll
      for (int i = 0; i < kCodes; ++i) {
        const int32_t order = float_order(z[i]);
        if (order > pivot) {
          mine.weight += weight[i];
          mine.above = order < mine.above ? order : mine.above;
        } else {
          mine.below = order > mine.below ? order : mine.below;
        }
      }
    });
    mine.weight = warp_reduce(mine.weight, Add());
    mine.below = __reduce_max_sync(kWholeWarp, mine.below);
    mine.above = __reduce_min_sync(kWholeWarp, mine.above);
    if (warps > 1) {
      BisectionStep(&all)[kMaxWarps] = steps[step % 2];
      if (threadIdx.x % kWarp == 0) all[threadIdx.x / kWarp] = mine;
      __syncthreads();
      mine = all[0];
#pragma unroll 1
      for (int i = 1; i < warps; ++i) {
        mine.weight += all[i].weight;
        mine.below = all[i].below > mine.below ? all[i].below : mine.below;
        mine.above = all[i].above < mine.above ? all[i].above : mine.above;
      }
    }
    if (mine.weight < limit) {
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

// Weighs the scores not below `bound`, 1 each or by their odds, and adds the weights to the
// buckets. One barrier.
VOX_DEVICE void fill_buckets(const Scores& scores, bool by_odds, float bound, Buckets& buckets) {
  scores.each([&](int code, const float (&z)[kCodes]) {
    uint32_t weight[kCodes];
#pragma unroll
    for (int i = 0; i < kCodes; ++i) weight[i] = 1;
    if (by_odds) {
#pragma unroll
      for (int i = 0; i < kCodes; ++i)
        weight[i] = static_cast<uint32_t>(expf(z[i] - scores.largest) * 0x1p31f + 0.5f);
    }
#pragma unroll
    for (int i = 0; i < kCodes; ++i) {
      if (!(z[i] >= bound)) weight[i] = 0;
      if (weight[i] == 0) continue;
      uint32_t* const sums = buckets.sums + scores.bucket(z[i]);
      atomicAdd(sums, weight[i] & 0xffff);
      if (by_odds) atomicAdd(sums + kBuckets, weight[i] >> 16);
    }
    *reinterpret_cast<uint4*>(scores.weight + code) = {weight[0], weight[1], weight[2], weight[3]};
  });
  __syncthreads();
}

// The bucket where the sum of weights from the largest score down crosses the limit, and the weight
// above this bucket.
struct Crossing {
  unsigned long long limit, above;
  int bucket;
};

// Every warp finds the crossing for itself. The limit is 0 if the filter keeps nothing.
VOX_DEVICE Crossing find_crossing(const Buckets& buckets, bool by_odds, const SamplerRow& row) {
  constexpr int kBucketsPerLane = kBuckets / kWarp;
  const int lane = threadIdx.x % kWarp;
  unsigned long long sums[kBucketsPerLane], mine = 0;
#pragma unroll
  for (int i = 0; i < kBucketsPerLane; ++i) {
    const int bucket = lane * kBucketsPerLane + i;
    sums[i] = (static_cast<unsigned long long>(buckets.sums[kBuckets + bucket]) << 16) +
              buckets.sums[bucket];
    mine += sums[i];
  }
  unsigned long long above = mine;  // up to and including this lane's buckets
#pragma unroll
  for (int delta = 1; delta < kWarp; delta *= 2) {
    const unsigned long long other = __shfl_up_sync(kWholeWarp, above, delta);
    if (lane >= delta) above += other;
  }
  // Sums are integers, so `sum < p * total` is `sum < ceil(p * total)`.
  const unsigned long long total = __shfl_sync(kWholeWarp, above, kWarp - 1);
  unsigned long long limit = row.top_k;
  if (by_odds) {
    const double share = ceil(static_cast<double>(row.top_p) * static_cast<double>(total));
    limit = share > 0 ? static_cast<unsigned long long>(share) : 0;
  }
  limit = limit < total ? limit : total;
  if (limit == 0) return {0, 0, 0};  // the whole block
  const int crossing = __ffs(__ballot_sync(kWholeWarp, above >= limit)) - 1;
  above -= mine;
  int crossed = lane * kBucketsPerLane;
#pragma unroll
  for (int i = 0; i < kBucketsPerLane - 1; ++i) {
    mine = i == 0 ? above + sums[0] : mine + sums[i];
    if (mine < limit) {
      above = mine;
      ++crossed;
    }
  }
  return {limit, __shfl_sync(kWholeWarp, above, crossing),
          __shfl_sync(kWholeWarp, crossed, crossing)};
}

// Lists up to 32 scores of a bucket. One barrier.
VOX_DEVICE void list_bucket(const Scores& scores, int bucket, Buckets& buckets) {
  scores.each([&](int code, const float (&z)[kCodes]) {
    unsigned here = 0;
#pragma unroll
    for (int i = 0; i < kCodes; ++i)
      if (scores.bucket(z[i]) == bucket) here |= 1u << i;
#pragma unroll 1
    for (; here; here &= here - 1) {
      const int other = code + __ffs(here) - 1;
      const uint32_t weight = scores.weight[other];
      if (weight == 0) continue;
      const int place = atomicAdd(&buckets.count, 1);
      if (place < kWarp) buckets.near[place] = {float_order(scores.z[other]), weight};
    }
  });
  __syncthreads();
}

// The lowest score that top-p (`by_odds`) or top-k keeps among those not below `bound`; the largest
// score if it keeps none. `buckets` are zero. Two barriers.
VOX_DEVICE float lowest_kept(const Scores& scores, bool by_odds, float bound, const SamplerRow& row,
                             Buckets& buckets, BisectionStep (&steps)[2][kMaxWarps]) {
  fill_buckets(scores, by_odds, bound, buckets);
  const Crossing crossing = find_crossing(buckets, by_odds, row);
  if (crossing.limit == 0) return scores.largest;
  list_bucket(scores, crossing.bucket, buckets);
  const int count = buckets.count, lane = threadIdx.x % kWarp;
  if (count > kWarp) return bisect(scores, crossing.limit, steps);
  const Near my_near = lane < count ? buckets.near[lane] : Near{kLowestOrder - 1, 0};
  unsigned long long above = crossing.above;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const Near other = buckets.near[i];
    if (other.order > my_near.order) above += other.weight;
  }
  const bool kept = lane < count && above < crossing.limit;
  return float_at(__reduce_min_sync(kWholeWarp, kept ? my_near.order : kHighestOrder));
}

}  // namespace
}  // namespace voxkern::sampling
