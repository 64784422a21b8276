#include "../decode_attention.h"

#include "isa.h"

#ifdef VOX_ISA
#include "attention.h"
#include "team.h"

// A work item is a split of kSplit keys of one sequence for one key/value head and all query heads
// of its group, so keys and values are read once. It leaves unnormalised float32 sums in a
// workspace; after a barrier the splits of each head are put together in their order. Splits have a
// fixed size, so neither threads nor other sequences change a result. Scores, weights and sums are
// float32 (the query is scaled in float32 first); the result is rounded when it is stored.
namespace voxkern {
namespace {

constexpr int64_t kSplit = 256;
// Inner products side by side: as many chains as leave registers for their operands.
constexpr int kDots = kWidth == 16 ? 16 : 8;
constexpr int64_t kScoreRow = kKeyBlock + kDots;  // a tile may run past the block

int64_t splits(int64_t keys) { return (keys + kSplit - 1) / kSplit; }

// Where the keys and values of one block are, the last key repeated behind.
template <typename T>
struct Block {
  const T* keys[kScoreRow];
  const T* values[kKeyBlock];
};

// Into the cache, for the next block: a page is too short for the processor's own prefetch.
template <typename T>
VOX_INLINE void fetch(const T* row, int64_t D) {
  const int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < D; i += line) __builtin_prefetch(row + i, 0, 2);
}

template <bool kPart, typename T>
VOX_INLINE vfloat read(const T* p, int64_t n) {
  if constexpr (kPart) {
    return load_n(p, n);
  } else {
    return load(p);
  }
}

// kWidth columns of a tile of inner products, the dot of query g and key j at g * kKeys + j; only
// the first n of them if kPart.
template <int Q, bool kPart, typename T>
VOX_INLINE void score_columns(const float* q, int64_t width, const T* const* keys, int64_t i,
                              int64_t n, vfloat* dots) {
  constexpr int kKeys = kDots / Q;
  vfloat queries[Q];
  for (int g = 0; g < Q; ++g) queries[g] = load(q + g * width + i);
  for (int j = 0; j < kKeys; ++j) {
    const vfloat k = read<kPart>(keys[j] + i, n);
    for (int g = 0; g < Q; ++g) dots[g * kKeys + j] = fma(queries[g], k, dots[g * kKeys + j]);
  }
}

// scores[g * kScoreRow + j] = q[g] . keys[j] for Q queries, `width` apart and padded with zeros.
template <int Q, typename T>
void score(const float* q, int64_t width, const T* const* keys, int64_t count, int64_t D,
           float* scores) {
  constexpr int kKeys = kDots / Q;
  for (int64_t j = 0; j < count; j += kKeys) {
    vfloat dots[kDots] = {};
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

// N vectors of columns of `accumulate`, the last one of n columns if kPart.
template <int Q, int N, bool kPart, typename T>
VOX_INLINE void accumulate_columns(const float* weights, const float* factors,
                                   const T* const* values, int64_t count, int64_t i, int64_t n,
                                   float* sums, int64_t width) {
  vfloat acc[Q][N];
  for (int g = 0; g < Q; ++g)
    for (int c = 0; c < N; ++c)
      acc[g][c] = load(sums + g * width + i + c * kWidth) * splat(factors[g]);
  for (int64_t j = 0; j < count; ++j) {
    vfloat v[N];
    for (int c = 0; c < N; ++c) v[c] = read<kPart>(values[j] + i + c * kWidth, n);
    for (int g = 0; g < Q; ++g)
      for (int c = 0; c < N; ++c)
        acc[g][c] = fma(splat(weights[g * kScoreRow + j]), v[c], acc[g][c]);
  }
  for (int g = 0; g < Q; ++g)
    for (int c = 0; c < N; ++c) store(sums + g * width + i + c * kWidth, acc[g][c]);
}

// sums[g] = sums[g] * factors[g] + the values weighted by weights[g], for Q queries.
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

template <int Q, typename T>
void attend_block(const float* q, int64_t width, const Block<T>& block, int64_t count, int64_t D,
                  SoftmaxState* states, float* sums) {
  float scores[Q * kScoreRow], factors[Q];
  score<Q>(q, width, block.keys, count, D, scores);
  for (int g = 0; g < Q; ++g) factors[g] = softmax_step(scores + g * kScoreRow, count, states[g]);
  accumulate<Q>(scores, factors, block.values, count, D, sums, width);
}

template <typename T>
struct Decoder {
  const DecodeAttentionParams& p;
  const int64_t group = p.Hq / p.Hkv;
  const int64_t width = padded(p.D);
  int64_t* first_split;  // [B + 1], splits of the sequences before each
  SoftmaxState* states;  // [splits * Hkv, group]
  float* sums;           // [splits * Hkv, group, width]

  // Fills `block` with the keys from `begin` on; returns how many there are before `end`.
  int64_t find_block(int64_t b, int64_t h, int64_t begin, int64_t end, Block<T>& block) const {
    if (begin >= end) return 0;
    const int64_t count = end - begin < kKeyBlock ? end - begin : kKeyBlock;
    const T* k = static_cast<const T*>(p.k_pages);
    const T* v = static_cast<const T*>(p.v_pages);
    for_each_run(p.page_table + b * p.M, p.Hkv, p.S, p.D, h, begin, count,
                 [&](int64_t j, int64_t place, int64_t n) {
                   for (int64_t r = 0; r < n; ++r) {
                     block.keys[j + r] = k + place + r * p.D;
                     block.values[j + r] = v + place + r * p.D;
                   }
                 });
    for (int64_t j = count; j < count + kDots; ++j) block.keys[j] = block.keys[count - 1];
    return count;
  }

  // `scratch`: group * width floats.
  void attend(int64_t b, int64_t h, int64_t split, float* scratch) const {
    const T* q = static_cast<const T*>(p.q) + b * p.q_stride + h * group * p.D;
    for (int64_t g = 0; g < group; ++g)
      for (int64_t i = 0; i < width; ++i)
        scratch[g * width + i] = i < p.D ? to_float(q[g * p.D + i]) * p.scale : 0.0f;
    const int64_t at = ((first_split[b] + split) * p.Hkv + h) * group;
    for (int64_t g = 0; g < group; ++g) states[at + g] = {};
    __builtin_memset(sums + at * width, 0, group * width * sizeof(float));

    const int64_t length = p.seq_lens[b];
    const int64_t first = split * kSplit;
    const int64_t end = length < first + kSplit ? length : first + kSplit;
    Block<T> blocks[2];
    int64_t next_count = find_block(b, h, first, end, blocks[0]);
    for (int64_t begin = first; begin < end; begin += kKeyBlock) {
      const int64_t count = next_count;
      const Block<T>& block = blocks[(begin - first) / kKeyBlock % 2];
      Block<T>& next = blocks[((begin - first) / kKeyBlock + 1) % 2];
      next_count = find_block(b, h, begin + kKeyBlock, end, next);
      for (int64_t j = 0; j < next_count; ++j) {
        fetch(next.keys[j], p.D);
        fetch(next.values[j], p.D);
      }
      for (int64_t g = 0; g < group;) {
        const auto part = [&](auto attend_queries) {
          attend_queries(scratch + g * width, width, block, count, p.D, states + at + g,
                         sums + (at + g) * width);
        };
        if (group - g >= 4) {
          part(attend_block<4, T>);
          g += 4;
        } else if (group - g >= 2) {
          part(attend_block<2, T>);
          g += 2;
        } else {
          part(attend_block<1, T>);
          g += 1;
        }
      }
    }
  }

  // One query head's splits to its result.
  void combine(int64_t b, int64_t head) const {
    T* out = static_cast<T*>(p.out) + (b * p.Hq + head) * p.D;
    const int64_t n = splits(p.seq_lens[b]);
    const auto row = [&](int64_t split) {
      return ((first_split[b] + split) * p.Hkv + head / group) * group + head % group;
    };
    float largest = -__builtin_inff(), sum = 0;
    for (int64_t split = 0; split < n; ++split)
      largest = states[row(split)].largest > largest ? states[row(split)].largest : largest;
    for (int64_t split = 0; split < n; ++split)
      sum += states[row(split)].sum * exp_one(states[row(split)].largest - largest);
    for (int64_t i = 0; i < p.D; i += kWidth) {
      vfloat total{};
      for (int64_t split = 0; split < n; ++split)
        total = fma(load(sums + row(split) * width + i),
                    splat(exp_one(states[row(split)].largest - largest)), total);
      if (n) total = total / splat(sum);
      if (i + kWidth <= p.D)
        store(out + i, total);
      else
        store_n(out + i, total, p.D - i);
    }
  }

  void run(int rank, int size) const {
    const int64_t items = first_split[p.B] * p.Hkv;
    const Range mine = voxkern::split(items, 1, rank, size);
    auto* const scratch = static_cast<float*>(__builtin_malloc(group * width * sizeof(float)));
    int64_t b = 0;
    for (int64_t item = mine.begin; item < mine.end; ++item) {
      while (first_split[b + 1] * p.Hkv <= item) ++b;
      attend(b, item % p.Hkv, item / p.Hkv - first_split[b], scratch);
    }
    __builtin_free(scratch);
    if (size > 1) Team::barrier();
    const Range heads = voxkern::split(p.B * p.Hq, 1, rank, size);
    for (int64_t i = heads.begin; i < heads.end; ++i) combine(i / p.Hq, i % p.Hq);
  }
};

template <typename T>
void run(const DecodeAttentionParams& p) {
  Decoder<T> decoder{.p = p, .first_split = nullptr, .states = nullptr, .sums = nullptr};
  decoder.first_split = static_cast<int64_t*>(__builtin_malloc((p.B + 1) * sizeof(int64_t)));
  decoder.first_split[0] = 0;
  for (int64_t b = 0; b < p.B; ++b)
    decoder.first_split[b + 1] = decoder.first_split[b] + splits(p.seq_lens[b]);
  const int64_t rows = decoder.first_split[p.B] * p.Hq;
  decoder.states = static_cast<SoftmaxState*>(__builtin_malloc(rows * sizeof(SoftmaxState) + 1));
  decoder.sums = static_cast<float*>(__builtin_malloc(rows * decoder.width * sizeof(float) + 1));

  // Waking the team pays from about ten thousand multiplications on.
  if (rows * p.D * kSplit < (1 << 15)) {
    decoder.run(0, 1);
  } else {
    auto job = [&](int rank, int size) { decoder.run(rank, size); };
    run_team(job);
  }
  __builtin_free(decoder.sums);
  __builtin_free(decoder.states);
  __builtin_free(decoder.first_split);
}

}  // namespace

namespace VOX_ISA {
void decode_attention(const DecodeAttentionParams& p) {
  p.dtype == Dtype::f32 ? run<float>(p) : run<bf16>(p);
}
}  // namespace VOX_ISA

}  // namespace voxkern

#else

namespace voxkern {

VOX_KERNEL(decode_attention, DecodeAttentionParams)

namespace {

Tensor decode_attention_cpu(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table,
                            Tensor seq_lens, double scale) {
  check_dim(q, "q", 3);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  const DecodeAttentionParams p =
      decode_attention_params(q, k_pages, v_pages, page_table, seq_lens, scale, out);
  check_page_table_values(p.page_table, p.seq_lens, p.B, p.M, p.S, k_pages.size(0));
  decode_attention(p);
  return out;
}

}  // namespace
}  // namespace voxkern

STABLE_TORCH_LIBRARY_IMPL(voxkern, CPU, m) {
  m.impl("decode_attention", TORCH_BOX(&voxkern::decode_attention_cpu));
}

#endif
