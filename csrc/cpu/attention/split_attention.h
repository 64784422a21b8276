// Split-key attention of one query per sequence over its paged keys and values, for
// decode_attention and decode_backbone inside a run() of the team. Only ISA passes include it.
//
// A work item is one split of kSplit keys of one sequence, for one key/value head and all query
// heads of its group, so keys and values are read once. It writes unnormalised float32 sums; when
// all splits of a head are done, combine() adds them in order. The split size is fixed, so neither
// the threads nor other sequences change a result. Scores, weights and sums are float32 (the query
// is scaled in float32 first); the result is rounded at the store.
#pragma once

#include "common/arena.h"
#include "cpu/attention/attention.h"
#include "cpu/runtime/team.h"
#include "params/decode_attention.h"

namespace voxkern {
namespace {

// Inner products computed together: as many chains as leave registers for their operands.
constexpr int kDots = kWidth == 16 ? 16 : 8;
constexpr int64_t kScoreRow = kKeyBlock + kDots;  // a tile may run past the block

// Pointers to the keys and values of one block. The last key repeats after the end, because a tile
// of scores may run past it.
template <typename T>
struct KeyBlock {
  const T* keys[kScoreRow];
  const T* values[kKeyBlock];
};

// Prefetches one row of the next block: a page is too short for the hardware prefetcher.
template <typename T>
VOX_INLINE void prefetch(const T* row, int64_t D) {
  const int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < D; i += line) __builtin_prefetch(row + i, 0, 2);
}

// A vector of p, or its first n elements if kPartial.
template <bool kPartial, typename T>
VOX_INLINE vfloat read(const T* p, int64_t n) {
  if constexpr (kPartial) {
    return load_n(p, n);
  } else {
    return load(p);
  }
}

// Adds kWidth columns to a tile of inner products, query g and key j at dots[g * kKeys + j]; only
// the first n columns if kPartial.
template <int Q, bool kPartial, typename T>
VOX_INLINE void score_columns(const float* q, int64_t width, const T* const* keys, int64_t i,
                              int64_t n, vfloat* dots) {
  constexpr int kKeys = kDots / Q;
  vfloat queries[Q];
  for (int g = 0; g < Q; ++g) queries[g] = load(q + g * width + i);
  for (int j = 0; j < kKeys; ++j) {
    const vfloat k = read<kPartial>(keys[j] + i, n);
    for (int g = 0; g < Q; ++g) dots[g * kKeys + j] = fma(queries[g], k, dots[g * kKeys + j]);
  }
}

// scores[g * kScoreRow + j] = q[g] . keys[j] for Q queries, `width` apart and zero-padded.
template <int Q, typename T>
void score(const float* q, int64_t width, const T* const* keys, int64_t count, int64_t D,
           float* scores) {
  constexpr int kKeys = kDots / Q;
  for (int64_t j = 0; j < count; j += kKeys) {
    vfloat dots[kDots];
    clear(dots);
    int64_t i = 0;
    for (; i + kWidth <= D; i += kWidth)
      score_columns<Q, false>(q, width, keys + j, i, kWidth, dots);
    if (i < D) score_columns<Q, true>(q, width, keys + j, i, D - i, dots);
    float results[kDots];
    for (int r = 0; r < kDots; r += kWidth) store(results + r, reduce_each(dots + r));
    for (int g = 0; g < Q; ++g)
      __builtin_memcpy(scores + g * kScoreRow + j, results + g * kKeys, kKeys * sizeof(float));
  }
}

// N vectors of columns of accumulate(); the last vector has n columns if kPartial.
template <int Q, int N, bool kPartial, typename T>
VOX_INLINE void accumulate_columns(const float* weights, const float* factors,
                                   const T* const* values, int64_t count, int64_t i, int64_t n,
                                   float* sums, int64_t width) {
  vfloat acc[Q][N];
  for (int g = 0; g < Q; ++g)
    for (int c = 0; c < N; ++c)
      acc[g][c] = load(sums + g * width + i + c * kWidth) * splat(factors[g]);
  for (int64_t j = 0; j < count; ++j) {
    vfloat v[N];
    for (int c = 0; c < N; ++c) v[c] = read<kPartial>(values[j] + i + c * kWidth, n);
    for (int g = 0; g < Q; ++g)
      for (int c = 0; c < N; ++c)
        acc[g][c] = fma(splat(weights[g * kScoreRow + j]), v[c], acc[g][c]);
  }
  for (int g = 0; g < Q; ++g)
    for (int c = 0; c < N; ++c) store(sums + g * width + i + c * kWidth, acc[g][c]);
}

// sums[g] = sums[g] * factors[g] + sum over j of weights[g][j] * values[j], for Q queries.
template <int Q, typename T>
void accumulate(const float* weights, const float* factors, const T* const* values, int64_t count,
                int64_t D, float* sums, int64_t width) {
  constexpr int N = kDots / 4;
  int64_t i = 0;
  for (; i + N * kWidth <= D; i += N * kWidth)
    accumulate_columns<Q, N, false>(weights, factors, values, count, i, kWidth, sums, width);
  for (; i + kWidth <= D; i += kWidth)
    accumulate_columns<Q, 1, false>(weights, factors, values, count, i, kWidth, sums, width);
  if (i < D) accumulate_columns<Q, 1, true>(weights, factors, values, count, i, D - i, sums, width);
}

// Adds one block of keys and values to the online softmax of Q queries.
template <int Q, typename T>
void attend_block(const float* q, int64_t width, const KeyBlock<T>& block, int64_t count, int64_t D,
                  SoftmaxState* states, float* sums) {
  float scores[Q * kScoreRow], factors[Q];
  score<Q>(q, width, block.keys, count, D, scores);
  int64_t counts[Q];
  for (int64_t& n : counts) n = count;
  softmax_step<Q>(scores, kScoreRow, counts, states, factors);
  accumulate<Q>(scores, factors, block.values, count, D, sums, width);
}

// The results of all splits, the input of combine(). Shared by the threads.
struct SplitBuffers {
  int64_t* first_split;  // [B + 1], index of each sequence's first split
  SoftmaxState* states;  // [splits * Hkv, group]
  float* sums;           // [splits * Hkv, group, width]

  // Fills first_split unless the arena only counts.
  SplitBuffers(Arena& arena, const int32_t* seq_lens, int64_t B, int64_t Hq, int64_t D)
      : first_split(arena.take<int64_t>(B + 1)) {
    int64_t total = 0;
    for (int64_t b = 0; b <= B; ++b) {
      if (first_split) first_split[b] = total;
      if (b < B) total += num_splits(seq_lens[b]);
    }
    states = arena.take<SoftmaxState>(total * Hq);
    sums = arena.take<float>(total * Hq * padded(D));
  }
};

// The computation on the splits, in parts for the threads.
template <typename T>
class SplitAttention {
 public:
  SplitAttention(const DecodeAttentionParams& params, const SplitBuffers& buffers)
      : p_(params), shared_(buffers), group_(params.Hq / params.Hkv), width_(padded(params.D)) {}

  // Floats of scratch that a thread needs.
  static int64_t scratch_size(const DecodeAttentionParams& p) { return p.Hq / p.Hkv * padded(p.D); }

  // Computes this thread's part of all splits. A barrier must follow before combine_part().
  void attend_part(int rank, int size, float* scratch) const {
    const Range mine = partition(shared_.first_split[p_.B] * p_.Hkv, 1, rank, size);
    int64_t b = 0;
    for (int64_t item = mine.begin; item < mine.end; ++item) {
      while (shared_.first_split[b + 1] * p_.Hkv <= item) ++b;
      attend(b, item % p_.Hkv, item / p_.Hkv - shared_.first_split[b], scratch);
    }
  }

  // Combines this thread's part of the query heads.
  void combine_part(int rank, int size) const {
    const Range mine = partition(p_.B * p_.Hq, 1, rank, size);
    for (int64_t i = mine.begin; i < mine.end; ++i) combine(i / p_.Hq, i % p_.Hq);
  }

  // Computes all splits of sequence b and key/value head h, and combines them.
  void attend_heads(int64_t b, int64_t h, float* scratch) const {
    for (int64_t i = 0; i < num_splits(p_.seq_lens[b]); ++i) attend(b, h, i, scratch);
    for (int64_t g = 0; g < group_; ++g) combine(b, h * group_ + g);
  }

 private:
  // Computes one split of sequence b for the query heads of key/value head h.
  void attend(int64_t b, int64_t h, int64_t index, float* scratch) const {
    scale_queries(b, h, scratch);
    const int64_t at = ((shared_.first_split[b] + index) * p_.Hkv + h) * group_;
    for (int64_t g = 0; g < group_; ++g) shared_.states[at + g] = {};
    __builtin_memset(shared_.sums + at * width_, 0, group_ * width_ * sizeof(float));

    const int64_t length = p_.seq_lens[b], first = index * kSplit;
    const int64_t end = length < first + kSplit ? length : first + kSplit;
    KeyBlock<T> blocks[2];
    int64_t next_count = find_block(b, h, first, end, blocks[0]);
    for (int64_t begin = first; begin < end; begin += kKeyBlock) {
      const int64_t count = next_count;
      const KeyBlock<T>& block = blocks[(begin - first) / kKeyBlock % 2];
      KeyBlock<T>& next = blocks[((begin - first) / kKeyBlock + 1) % 2];
      next_count = find_block(b, h, begin + kKeyBlock, end, next);
      for (int64_t j = 0; j < next_count; ++j) {
        prefetch(next.keys[j], p_.D);
        prefetch(next.values[j], p_.D);
      }
      attend_group(scratch, block, count, shared_.states + at, shared_.sums + at * width_);
    }
  }

  // The scaled queries of key/value head h's group, as float32 [group, width] padded with zeros.
  VOX_INLINE void scale_queries(int64_t b, int64_t h, float* out) const {
    const T* q = static_cast<const T*>(p_.q) + b * p_.q_stride + h * group_ * p_.D;
    for (int64_t g = 0; g < group_; ++g)
      for (int64_t i = 0; i < width_; ++i)
        out[g * width_ + i] = i < p_.D ? to_float(q[g * p_.D + i]) * p_.scale : 0.0f;
  }

  // attend_block for all queries of a group, up to 4 at a time.
  VOX_INLINE void attend_group(const float* q, const KeyBlock<T>& block, int64_t count,
                               SoftmaxState* states, float* sums) const {
    for (int64_t g = 0; g < group_;) {
      const auto attend_queries = [&](auto attend) {
        attend(q + g * width_, width_, block, count, p_.D, states + g, sums + g * width_);
      };
      if (group_ - g >= 4) {
        attend_queries(attend_block<4, T>);
        g += 4;
      } else if (group_ - g >= 2) {
        attend_queries(attend_block<2, T>);
        g += 2;
      } else {
        attend_queries(attend_block<1, T>);
        g += 1;
      }
    }
  }

  // Combines the splits of one query head and writes its result.
  void combine(int64_t b, int64_t head) const {
    const int64_t first = shared_.first_split[b] * p_.Hq + head;
    combine_splits(num_splits(p_.seq_lens[b]), shared_.states + first,
                   shared_.sums + first * width_, p_.Hq, p_.D,
                   static_cast<T*>(p_.out) + (b * p_.Hq + head) * p_.D);
  }

  // Fills `block` with the keys from `begin` on. Returns their number, none past `end`.
  int64_t find_block(int64_t b, int64_t h, int64_t begin, int64_t end, KeyBlock<T>& block) const {
    if (begin >= end) return 0;
    const int64_t count = end - begin < kKeyBlock ? end - begin : kKeyBlock;
    const T* k = static_cast<const T*>(p_.k_pages);
    const T* v = static_cast<const T*>(p_.v_pages);
    for_each_run(p_.page_table + b * p_.M, p_.Hkv, p_.S, p_.D, h, begin, count,
                 [&](int64_t j, int64_t offset, int64_t n) {
                   for (int64_t r = 0; r < n; ++r) {
                     block.keys[j + r] = k + offset + r * p_.D;
                     block.values[j + r] = v + offset + r * p_.D;
                   }
                 });
    for (int64_t j = count; j < count + kDots; ++j) block.keys[j] = block.keys[count - 1];
    return count;
  }

  const DecodeAttentionParams& p_;
  const SplitBuffers shared_;
  const int64_t group_, width_;
};

}  // namespace
}  // namespace voxkern
