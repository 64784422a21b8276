// The filters of the sampler. Only ISA passes include it.
//
// Every filter is a bound: the lowest logit that it keeps. Bounds are found by bisection over the
// floats in their order; each step is one pass over logits in L1. That needs no sort, and ties need
// no special case. Logits and single exponentials are float32, sums of exponentials float64.
#pragma once

#include "cpu/simd/math.h"

namespace voxkern {
namespace {

// V rounded up to whole vectors.
VOX_INLINE int64_t sampler_padded(int64_t V) { return (V + kWidth - 1) / kWidth * kWidth; }

// Maps a float to its rank in the order of all floats, a signed integer, and back.
VOX_INLINE int32_t float_order(float a) {
  int32_t bits;
  __builtin_memcpy(&bits, &a, sizeof bits);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
VOX_INLINE float float_at(int64_t order) {
  const int32_t place = static_cast<int32_t>(order);
  const int32_t bits = place ^ ((place >> 31) & 0x7fffffff);
  float a;
  __builtin_memcpy(&a, &bits, sizeof a);
  return a;
}

// The top-k bound: the lowest value that keeps the k largest of z[0..n), 0 < k < n, and all ties
// with the k-th.
inline float top_k_bound(const float* z, int64_t n, int64_t k, float largest) {
  int64_t low = float_order(-__builtin_inff()), high = float_order(largest);
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    const vfloat bound = splat(float_at(middle));
    vint counts{};
    for (int64_t i = 0; i < n; i += kWidth) counts -= load(z + i) >= bound;
    int64_t count = 0;
    for (int lane = 0; lane < kWidth; ++lane) count += counts[lane];
    if (count == k) return float_at(middle);
    if (count > k)
      low = middle;
    else
      high = middle - 1;
  }
  return float_at(low);
}

// The sum of odds[i] over all i with z[i] > bound.
inline double odds_above(const float* z, const float* odds, int64_t n, float bound) {
  typedef double vwide __attribute__((vector_size(8 * kWidth)));
  vwide sums{};
  for (int64_t i = 0; i < n; i += kWidth)
    sums += __builtin_convertvector(select(load(z + i) > splat(bound), load(odds + i), vfloat{}),
                                    vwide);
  double sum = 0;
  for (int lane = 0; lane < kWidth; ++lane) sum += sums[lane];
  return sum;
}

// The buckets of top_p_bound: kBuckets intervals of equal width from the largest logit down. The
// last one takes everything more than 16 below it, that is below e^-16 of the best.
struct Buckets {
  static constexpr int kBuckets = 256;
  float largest, scale;

  VOX_INLINE Buckets(const float* z, int64_t n, float largest) : largest(largest) {
    vfloat spreads = splat(1e-6f);
    int64_t whole = 0;
    for (; whole + kWidth <= n; whole += kWidth)
      spreads = max(splat(largest) - load(z + whole), spreads);
    float spread = reduce_max(spreads);
    for (int64_t i = whole; i < n; ++i) spread = largest - z[i] > spread ? largest - z[i] : spread;
    scale = kBuckets / (spread < 16 ? spread : 16);
  }

  // The bucket of each lane.
  VOX_INLINE vint of(vfloat a) const {
    const vfloat place = (splat(largest) - a) * splat(scale);
    const vfloat last = splat(kBuckets - 1);
    return __builtin_convertvector(select(place < last, place, last), vint);
  }

  // The bucket in which the sum of odds, from the largest logit down, reaches `limit`. `above`
  // becomes the sum of the buckets above it.
  VOX_INLINE int find(const float* z, const float* odds, int64_t n, double limit,
                      double& above) const {
    double sums[kBuckets] = {};
    for (int64_t i = 0; i < n; i += kWidth) {
      int32_t buckets[kWidth];
      const vint places = of(load(z + i));
      __builtin_memcpy(buckets, &places, sizeof buckets);
      for (int lane = 0; lane < kWidth; ++lane) sums[buckets[lane]] += odds[i + lane];
    }
    int bucket = 0;
    above = 0;
    while (bucket < kBuckets - 1 && above + sums[bucket] < limit) above += sums[bucket++];
    return bucket;
  }
};

// The top-p bound: the lowest value that top-p keeps of z[0..n), all of which top-k kept. Sums the
// odds per bucket of values, then bisects within the bucket where the sum reaches the limit.
// `odds`, `near_z` and `near_odds` have room for n floats, padded.
inline float top_p_bound(const float* z, int64_t n, float top_p, float largest, float* odds,
                         float* near_z, float* near_odds) {
  for (int64_t i = 0; i < n; i += kWidth) store(odds + i, exp(load(z + i) - splat(largest)));
  const double limit = top_p * odds_above(z, odds, n, -__builtin_inff());
  if (!(limit > 0)) return largest;

  const Buckets buckets(z, n, largest);
  double above;
  const int bucket = buckets.find(z, odds, n, limit, above);

  int64_t near = 0;
  float first = -__builtin_inff(), last = largest;
  for (int64_t i = 0; i < n; i += kWidth) {
    const vint here = buckets.of(load(z + i)) == splat_int(bucket);
    if (!any(here)) continue;
    for (int lane = 0; lane < kWidth; ++lane) {
      if (!here[lane] || i + lane >= n) continue;
      const float a = z[i + lane];
      first = near == 0 || a > first ? a : first;
      last = near == 0 || a < last ? a : last;
      near_z[near] = a;
      near_odds[near++] = odds[i + lane];
    }
  }
  for (int64_t j = near; j < sampler_padded(near); ++j) near_z[j] = -__builtin_inff();

  // Invariant: top-p keeps a logit at `high` and drops one at `low`.
  int64_t low = float_order(last) - 1, high = float_order(first);
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    const double sum = above + odds_above(near_z, near_odds, near, float_at(middle));
    (sum < limit ? high : low) = middle;
  }
  return float_at(high);
}

// The min-p bound: the lowest float z with e^(z - largest) >= min_p.
inline float min_p_bound(float min_p, float largest) {
  const double log_p = __builtin_log(min_p < 1 ? static_cast<double>(min_p) : 1.0);
  const double m = largest;
  int64_t order = float_order(static_cast<float>(m + log_p));
  while (float_at(order) - m < log_p) ++order;
  while (float_at(order - 1) - m >= log_p) --order;
  return float_at(order);
}

}  // namespace
}  // namespace voxkern
