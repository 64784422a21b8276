// One row's draw, as `sample_tokens` specifies it; included by ISA passes alone. sample_tokens and
// decode_depth call it.
//
// All filters come down to one number, the lowest logit that stays. It is found by bisection over
// the floats in their order, each step one pass over logits in the first-level cache: no sort, and
// ties need no care. Logits, their division by the temperature and single
// exponentials are float32, sums of exponentials float64. The draw ranks the codes that stay by
// float32 scores, then those near the best again in float64, so another order of summation, or
// another logarithm, gives the same code.
#pragma once

#include "common/philox.h"
#include "common/sampler_row.h"
#include "cpu/simd/vec.h"

namespace voxkern {
namespace {

VOX_INLINE int64_t sampler_padded(int64_t V) { return (V + kWidth - 1) / kWidth * kWidth; }

// What sample_row wants as its scratch.
VOX_INLINE int64_t sampler_scratch_bytes(int64_t V) { return 5 * 4 * sampler_padded(V); }

// A float's place in the order of all floats, as a signed integer, and back.
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

// Fills z[0..V), padded with minus infinity, with the penalised logits; returns the largest.
template <typename T>
inline float read_logits(const T* logits, int64_t V, const SamplerRow& row, float* z) {
  const vfloat lowest = splat(-__builtin_inff());
  int64_t i = 0;
  for (; i + kWidth <= V; i += kWidth) {
    const vfloat a = load(logits + i);
    store(z + i, select(a == a, a, lowest));
  }
  if (i < V) store(z + i, lowest);
  for (; i < V; ++i) {
    const float a = to_float(logits[i]);
    z[i] = a == a ? a : -__builtin_inff();
  }
  // From the unpenalised logit each time, so a code that comes twice is penalised once.
  for (int64_t w = 0; w < row.W; ++w) {
    const int64_t code = row.history[w];
    if (code < 0 || code >= V) continue;
    const float a = to_float(logits[code]);
    if (a == a) z[code] = a > 0 ? a / row.repetition_penalty : a * row.repetition_penalty;
  }
  vfloat largest = lowest;
  for (i = 0; i < V; i += kWidth) largest = max(load(z + i), largest);
  return reduce_max(largest);
}

inline int64_t first_equal(const float* z, int64_t V, float value) {
  int64_t i = 0;
  while (i < V - 1 && z[i] != value) ++i;
  return i;
}

// The lowest value that keeps the k largest of z[0..n), 0 < k < n, and what equals the k-th.
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

// Sum of odds[i] where z[i] > bound.
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

// The lowest value that top-p keeps of z[0..n), all of which top-k kept: first sums over buckets
// of near values, then bisection within the bucket where the limit falls. `odds`, `near_z` and
// `near_odds` have room for n, padded.
inline float top_p_bound(const float* z, int64_t n, float top_p, float largest, float* odds,
                         float* near_z, float* near_odds) {
  for (int64_t i = 0; i < n; i += kWidth) store(odds + i, exp(load(z + i) - splat(largest)));
  const double limit = top_p * odds_above(z, odds, n, -__builtin_inff());
  if (!(limit > 0)) return largest;

  // Below e^-16 of the best all goes to the last bucket.
  constexpr int kBuckets = 256;
  vfloat spreads = splat(1e-6f);
  int64_t whole = 0;
  for (; whole + kWidth <= n; whole += kWidth)
    spreads = max(splat(largest) - load(z + whole), spreads);
  float spread = reduce_max(spreads);
  for (int64_t i = whole; i < n; ++i) spread = largest - z[i] > spread ? largest - z[i] : spread;
  const float scale = kBuckets / (spread < 16 ? spread : 16);
  const auto bucket_of = [&](vfloat a) {
    const vfloat place = (splat(largest) - a) * splat(scale);
    const vfloat last = splat(kBuckets - 1);
    return __builtin_convertvector(select(place < last, place, last), vint);
  };
  double sums[kBuckets] = {};
  for (int64_t i = 0; i < n; i += kWidth) {
    int32_t buckets[kWidth];
    const vint places = bucket_of(load(z + i));
    __builtin_memcpy(buckets, &places, sizeof buckets);
    for (int lane = 0; lane < kWidth; ++lane) sums[buckets[lane]] += odds[i + lane];
  }
  int bucket = 0;
  double above = 0;
  while (bucket < kBuckets - 1 && above + sums[bucket] < limit) above += sums[bucket++];

  int64_t near = 0;
  float first = -__builtin_inff(), last = largest;
  for (int64_t i = 0; i < n; i += kWidth) {
    const vint here = bucket_of(load(z + i)) == splat_int(bucket);
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

  // Invariant: a code at `high` stays, one at `low` does not.
  int64_t low = float_order(last) - 1, high = float_order(first);
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    const double sum = above + odds_above(near_z, near_odds, near, float_at(middle));
    (sum < limit ? high : low) = middle;
  }
  return float_at(high);
}

// The lowest float z with e^(z - largest) >= min_p.
inline float min_p_bound(float min_p, float largest) {
  const double log_p = __builtin_log(min_p < 1 ? static_cast<double>(min_p) : 1.0);
  const double m = largest;
  int64_t order = float_order(static_cast<float>(m + log_p));
  while (float_at(order) - m < log_p) ++order;
  while (float_at(order - 1) - m >= log_p) --order;
  return float_at(order);
}

// Moves the z[j] >= bound to the front, their codes with them; returns how many there are, and
// pads z with minus infinity. `codes` is null on the way in for the identity.
inline int64_t compact(float* z, int64_t n, float bound, const int32_t* codes, int32_t* kept) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += kWidth) {
    if (!any(load(z + i) >= splat(bound))) continue;
    const int64_t end = n < i + kWidth ? n : i + kWidth;
    for (int64_t j = i; j < end; ++j) {  // without a branch that nobody could foretell
      const float a = z[j];
      kept[count] = codes ? codes[j] : static_cast<int32_t>(j);
      z[count] = a;
      count += a >= bound;
    }
  }
  for (int64_t j = count; j < sampler_padded(count); ++j) z[j] = -__builtin_inff();
  return count;
}

// The exponential race among z[0..n) of codes[0..n).
inline int64_t race(const float* z, const int32_t* codes, int64_t n, float largest,
                    const SamplerRow& row, float* score) {
  auto random = [&, block = int64_t{-1}, words = PhiloxWords{}](int32_t code) mutable {
    if (code / 4 != block) {
      block = code / 4;
      words = draw_words(row.seed, row.frame, row.codebook, block);
    }
    return uniform(words.word[code % 4]);
  };
  for (int64_t j = 0; j < n; ++j) score[j] = random(codes[j]);
  for (int64_t j = n; j < sampler_padded(n); ++j) score[j] = 0.5f;
  vfloat bests = splat(-__builtin_inff());
  for (int64_t j = 0; j < n; j += kWidth) {
    const vfloat s = load(z + j) - splat(largest) - log(-log(load(score + j)));
    store(score + j, s);
    bests = max(s, bests);
  }
  // float32 scores of the front runners lie within 40 of 0: 1e-3 is far above their errors.
  const float close = reduce_max(bests) - 1e-3f;
  double best = -__builtin_inf();
  int64_t winner = codes[0];
  for (int64_t j = 0; j < n; ++j) {
    if (score[j] < close) continue;
    const double u = random(codes[j]);
    const double exact = static_cast<double>(z[j]) - largest - __builtin_log(-__builtin_log(u));
    if (exact > best) {
      best = exact;
      winner = codes[j];
    }
  }
  return winner;
}

// V >= 1; `scratch` is aligned to 4 bytes and sampler_scratch_bytes(V) long.
template <typename T>
inline int64_t sample_row(const T* logits, int64_t V, const SamplerRow& row, void* scratch) {
  float* const z = static_cast<float*>(scratch);
  float* const odds = z + sampler_padded(V);
  float* const near = odds + sampler_padded(V);
  int32_t* const codes = reinterpret_cast<int32_t*>(near + 2 * sampler_padded(V));

  const float largest_logit = read_logits(logits, V, row, z);
  const float largest = largest_logit / row.temperature;
  // Infinite scores tell nothing apart: all logits minus infinity, or a temperature near 0.
  if (!(row.temperature > 0) || __builtin_isinf(largest)) return first_equal(z, V, largest_logit);
  for (int64_t i = 0; i < V; i += kWidth) store(z + i, load(z + i) / splat(row.temperature));

  const float everything = -__builtin_inff();
  const bool some = row.top_k > 0 && row.top_k < V;
  int64_t n =
      compact(z, V, some ? top_k_bound(z, V, row.top_k, largest) : everything, nullptr, codes);
  float bound = everything;
  if (row.top_p < 1)
    bound = top_p_bound(z, n, row.top_p, largest, odds, near, near + sampler_padded(V));
  if (row.min_p > 0) {
    const float other = min_p_bound(row.min_p, largest);
    bound = other > bound ? other : bound;
  }
  if (bound > everything) n = compact(z, n, bound, codes, codes);
  return race(z, codes, n, largest, row, odds);
}

}  // namespace
}  // namespace voxkern
