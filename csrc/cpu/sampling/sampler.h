// Draws the code of one row, as `sample_tokens` specifies it, for sample_tokens and decode_depth.
// Only ISA passes include it.
//
// filters.h reduces the filters to one number, the lowest logit to keep. The draw ranks the kept
// codes by float32 scores, then ranks those near the best again in float64, so another order of
// summation or another logarithm implementation gives the same code.
#pragma once

#include "common/sampling.h"
#include "cpu/sampling/filters.h"

namespace voxkern {
namespace {

// Bytes of scratch that sample_row needs.
VOX_INLINE int64_t sampler_scratch_bytes(int64_t V) { return 5 * 4 * sampler_padded(V); }

// Fills z[0..V) with the penalised logits, padded with minus infinity; NaN becomes plus infinity.
// Returns the largest.
template <typename T>
inline float read_logits(const T* logits, int64_t V, const SamplerRow& row, float* z) {
  const vfloat lowest = splat(-__builtin_inff());
  int64_t i = 0;
  for (; i + kWidth <= V; i += kWidth) {
    const vfloat a = load(logits + i);
    store(z + i, select(a == a, a, splat(__builtin_inff())));
  }
  if (i < V) store(z + i, lowest);
  for (; i < V; ++i) {
    const float a = to_float(logits[i]);
    z[i] = a == a ? a : __builtin_inff();
  }
  // Always starts from the unpenalised logit, so a code that occurs twice is penalised once.
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

// The index of the first z[i] == value.
inline int64_t first_equal(const float* z, int64_t V, float value) {
  int64_t i = 0;
  while (i < V - 1 && z[i] != value) ++i;
  return i;
}

// Moves all z[j] >= bound and their codes to the front, pads z with minus infinity and returns
// their number. A null `codes` stands for the identity.
inline int64_t compact(float* z, int64_t n, float bound, const int32_t* codes, int32_t* kept) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += kWidth) {
    if (!any(load(z + i) >= splat(bound))) continue;
    const int64_t end = n < i + kWidth ? n : i + kWidth;
    for (int64_t j = i; j < end; ++j) {  // branch-free: such a branch is unpredictable
      const float a = z[j];
      kept[count] = codes ? codes[j] : static_cast<int32_t>(j);
      z[count] = a;
      count += a >= bound;
    }
  }
  for (int64_t j = count; j < sampler_padded(count); ++j) z[j] = -__builtin_inff();
  return count;
}

// Draws one of codes[0..n) with logits z[0..n): the largest Gumbel score z - largest - log(-log(u))
// wins. `score` is scratch for n floats, padded.
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
  // The best float32 scores lie within 40 of 0, so 1e-3 is far above their errors.
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

// Returns -1 if the largest logit is not finite. V >= 1; `scratch` is aligned to 4 bytes and
// sampler_scratch_bytes(V) long.
template <typename T>
inline int64_t sample_row(const T* logits, int64_t V, const SamplerRow& row, void* scratch) {
  float* const z = static_cast<float*>(scratch);
  float* const odds = z + sampler_padded(V);
  float* const near = odds + sampler_padded(V);
  int32_t* const codes = reinterpret_cast<int32_t*>(near + 2 * sampler_padded(V));

  const float largest_logit = read_logits(logits, V, row, z);
  if (__builtin_isinf(largest_logit)) return -1;
  const float largest = largest_logit / row.temperature;
  // Take the largest logit: at temperature 0, and where infinite scores could not rank the codes,
  // because the temperature is near 0.
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
