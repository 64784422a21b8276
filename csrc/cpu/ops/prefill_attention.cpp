#include "params/prefill_attention.h"

#include "cpu/runtime/isa.h"

#ifdef VOX_ISA
#include "common/arena.h"
#include "cpu/attention/attention.h"
#include "cpu/runtime/team.h"

// A work item is a run of consecutive queries of one sequence, for one key/value head and all query
// heads of its group: up to kRows rows, a row being one query and head. It walks the keys in
// blocks. Each block is unpacked once to float32, with the keys transposed; while it stays in
// cache, kTileRows rows at a time go through scores, online softmax and weighted sum. The splits of
// keys are combined at the end. Threads take items dynamically, the longest first.
//
// The arithmetic of a row does not depend on its neighbours or on the start of the run; its order
// is that of decode_attention (attention.h), so both give the same bits. A row may multiply values
// of later keys by zero, so they must be finite. Everything is float32 (the query is scaled first)
// and rounded at the store.
namespace voxkern {
namespace {

constexpr int64_t kRows = 128;
constexpr int kTileRows = kWidth == 8 ? 6 : 4;  // AVX2: 12 sums at once hide the latency
constexpr int kTileVectors = kWidth == 16 ? 4 : 2;
template <int n>
struct Vectors {
  static constexpr int value = n;
};

// acc += a b for kTileRows rows of a, whose elements are `step` apart, and N vectors of columns.
template <int N>
VOX_INLINE void add_products(const float* a, int64_t a_stride, int64_t step, const float* b,
                             int64_t b_stride, int64_t depth, vfloat (&acc)[kTileRows][N]) {
  for (int64_t d = 0; d < depth; ++d) {
    vfloat columns[N];
    for (int n = 0; n < N; ++n) columns[n] = load(b + d * b_stride + n * kWidth);
    for (int r = 0; r < kTileRows; ++r)
      for (int n = 0; n < N; ++n)
        acc[r][n] = fma(splat(a[r * a_stride + d * step]), columns[n], acc[r][n]);
  }
}

// acc = the sum of the chains of the kLanes lanes lane, lane + kWidth / kLanes, ..., as reduce_add
// adds them. `depth` is a lane's number of columns.
template <int kLanes, int N>
VOX_INLINE void add_lanes(const float* q, int64_t width, const float* keys, int lane, int64_t depth,
                          vfloat (&acc)[kTileRows][N]) {
  if constexpr (kLanes == 1) {
    for (auto& row : acc)
      for (vfloat& chain : row) chain = vfloat{};
    add_products(q + lane, width, kWidth, keys + lane * depth * kKeyBlock, kKeyBlock, depth, acc);
  } else {
    vfloat other[kTileRows][N];
    add_lanes<kLanes / 2>(q, width, keys, lane, depth, acc);
    add_lanes<kLanes / 2>(q, width, keys, lane + kWidth / kLanes, depth, other);
    for (int r = 0; r < kTileRows; ++r)
      for (int n = 0; n < N; ++n) acc[r][n] += other[r][n];
  }
}

// scores = q keys for kTileRows rows of q and N vectors of unpacked keys, in the order of a vector
// dot product: a chain per column index modulo kWidth, then reduce_add's tree of these.
template <int N>
VOX_INLINE void score_tile(const float* q, int64_t width, const float* keys, float* scores) {
  vfloat acc[kTileRows][N];
  // A constant depth for heads of 64 unrolls the chains.
  if (width == 64)
    add_lanes<kWidth>(q, width, keys, 0, 64 / kWidth, acc);
  else
    add_lanes<kWidth>(q, width, keys, 0, width / kWidth, acc);
  for (int r = 0; r < kTileRows; ++r)
    for (int n = 0; n < N; ++n) store(scores + r * kKeyBlock + n * kWidth, acc[r][n]);
}

// sums = sums * factors + weights values for kTileRows rows and N vectors of columns.
template <int N>
VOX_INLINE void value_tile(const float* weights, const float* values, int64_t depth,
                           const float* factors, float* sums, int64_t width) {
  vfloat acc[kTileRows][N];
  for (int r = 0; r < kTileRows; ++r)
    for (int n = 0; n < N; ++n) acc[r][n] = load(sums + r * width + n * kWidth) * splat(factors[r]);
  add_products(weights, kKeyBlock, 1, values, width, depth, acc);
  for (int r = 0; r < kTileRows; ++r)
    for (int n = 0; n < N; ++n) store(sums + r * width + n * kWidth, acc[r][n]);
}

// Calls tile(i, count) for all columns i from 0 on, a multiple of kWidth of them, where `count`
// holds the tile's number of vectors.
template <typename F>
VOX_INLINE void for_each_tile(int64_t columns, const F& tile) {
  int64_t i = 0;
  for (; i + kTileVectors * kWidth <= columns; i += kTileVectors * kWidth)
    tile(i, Vectors<kTileVectors>{});
  for (; i < columns; i += kWidth) tile(i, Vectors<1>{});
}

// One step of transposing kWidth x kWidth: exchanges the off-diagonal squares of `half` x `half`.
template <int half>
VOX_INLINE void exchange(vfloat* rows) {
  vint lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  const vint first = lane + (((lane & half) != 0) & (kWidth - half));
  for (int i = 0; i < kWidth; ++i) {
    if (i & half) continue;
    const vfloat a = rows[i], b = rows[i + half];
    rows[i] = __builtin_shuffle(a, b, first);
    rows[i + half] = __builtin_shuffle(a, b, first + half);
  }
  if constexpr (half > 1) exchange<half / 2>(rows);
}

// Writes keys[r] [D] to column j + r of `out` [kWidth, width / kWidth, kKeyBlock] for r < kWidth:
// column i of a key to row (i % kWidth, i / kWidth). Zeros from the first null key on.
template <typename T>
void transpose_keys(const T* const* keys, int64_t D, int64_t j, float* out) {
  const int64_t depth = padded(D) / kWidth;
  for (int64_t i = 0; i < D; i += kWidth) {
    const int64_t n = D - i < kWidth ? D - i : kWidth;
    vfloat rows[kWidth];
    clear(rows);
    for (int r = 0; r < kWidth; ++r) {
      if (!keys[r]) break;
      rows[r] = n < kWidth ? load_n(keys[r] + i, n) : load(keys[r] + i);
    }
    exchange<kWidth / 2>(rows);
    for (int64_t r = 0; r < kWidth; ++r)
      store(out + (r * depth + i / kWidth) * kKeyBlock + j, rows[r]);
  }
}

// A thread's float32 buffers for `rows` rows of queries, in `splits` splits of keys at most.
struct Buffers {
  float* keys;           // [kWidth, width / kWidth, kKeyBlock]
  float* scores;         // [kTileRows, kKeyBlock]
  float* values;         // [kKeyBlock, width]
  float* q;              // [rows, width], scaled
  float* sums;           // [splits, rows, width]
  SoftmaxState* states;  // [splits, rows]

  Buffers(Arena& arena, int64_t rows, int64_t splits, int64_t D) {
    const int64_t width = padded(D);
    keys = arena.take<float>(width * kKeyBlock);
    scores = arena.take<float>(kTileRows * kKeyBlock);
    values = arena.take<float>(kKeyBlock * width);
    q = arena.take<float>(rows * width);
    sums = arena.take<float>(splits * rows * width);
    states = arena.take<SoftmaxState>(splits * rows);
  }
};

template <typename T>
struct Prefill {
  const PrefillAttentionParams& p;
  const int64_t group = p.Hq / p.Hkv;
  const int64_t width = padded(p.D);
  const int64_t run_queries = group < kRows ? kRows / group : 1;
  const int64_t max_rows = tiled(run_queries * group);

  static int64_t tiled(int64_t rows) { return (rows + kTileRows - 1) / kTileRows * kTileRows; }

  // The number of runs of sequence b.
  int64_t runs(int64_t b) const {
    return (p.cu_seqlens[b + 1] - p.cu_seqlens[b] + run_queries - 1) / run_queries;
  }

  // Unpacks one block: keys transposed to buffers.keys, values to buffers.values.
  void unpack(int64_t b, int64_t h, int64_t begin, int64_t count, const Buffers& buffers) const {
    const T* k = static_cast<const T*>(p.k_pages);
    const T* v = static_cast<const T*>(p.v_pages);
    const T* keys[kKeyBlock] = {};
    for_each_run(p.page_table + b * p.M, p.Hkv, p.S, p.D, h, begin, count,
                 [&](int64_t j, int64_t offset, int64_t n) {
                   for (int64_t r = 0; r < n; ++r) {
                     keys[j + r] = k + offset + r * p.D;
                     copy_row(v + offset + r * p.D, 1.0f, buffers.values + (j + r) * width);
                   }
                 });
    for (int64_t j = 0; j < count; j += kWidth) transpose_keys(keys + j, p.D, j, buffers.keys);
  }

  // out = x[0..D) * factor, padded with zeros.
  VOX_INLINE void copy_row(const T* x, float factor, float* out) const {
    int64_t i = 0;
    for (; i + kWidth <= p.D; i += kWidth) store(out + i, load(x + i) * splat(factor));
    if (i < p.D) store(out + i, load_n(x + i, p.D - i) * splat(factor));
  }

  // Attends for new queries first .. first + count of sequence b and key/value head h.
  void attend(int64_t b, int64_t h, int64_t first, int64_t count, const Buffers& buffers) const {
    const int64_t token = p.cu_seqlens[b] + first;
    const int64_t new_tokens = p.cu_seqlens[b + 1] - p.cu_seqlens[b];
    const int64_t position = p.seq_lens[b] - new_tokens + first;
    const int64_t rows = count * group;
    load_queries(token, h, rows, buffers);
    const int64_t end = position + count;
    for (int64_t begin = 0; begin < end; begin += kKeyBlock) {
      if (begin % kSplit == 0) start_split(begin / kSplit, rows, buffers);
      const int64_t keys = end - begin < kKeyBlock ? end - begin : kKeyBlock;
      unpack(b, h, begin, keys, buffers);
      for (int64_t r = 0; r < rows; r += kTileRows) attend_tile(r, rows, position, begin, buffers);
    }
    store_results(token, h, rows, position, buffers);
  }

  VOX_INLINE void start_split(int64_t split, int64_t rows, const Buffers& buffers) const {
    const int64_t first = split * max_rows;
    __builtin_memset(buffers.sums + first * width, 0, tiled(rows) * width * sizeof(float));
    for (int64_t r = 0; r < tiled(rows); ++r) buffers.states[first + r] = {};
  }

  // Scales the queries from `token` on to buffers.q.
  VOX_INLINE void load_queries(int64_t token, int64_t h, int64_t rows,
                               const Buffers& buffers) const {
    __builtin_memset(buffers.q, 0, tiled(rows) * width * sizeof(float));
    for (int64_t r = 0; r < rows; ++r)
      copy_row(static_cast<const T*>(p.q) + (token + r / group) * p.q_stride +
                   (h * group + r % group) * p.D,
               p.scale, buffers.q + r * width);
  }

  // Adds the unpacked block of keys from `begin` on to rows r .. r + kTileRows of `rows`. A row
  // that sees no key of a split leaves garbage there, which store_results() does not read.
  VOX_INLINE void attend_tile(int64_t r, int64_t rows, int64_t position, int64_t begin,
                              const Buffers& buffers) const {
    const int64_t last = r + kTileRows <= rows ? r + kTileRows - 1 : rows - 1;
    const int64_t depth = visible(position + last / group, begin);
    if (depth == 0) return;
    for_each_tile(padded(depth), [&](int64_t i, auto vectors) {
      score_tile<vectors.value>(buffers.q + r * width, width, buffers.keys + i, buffers.scores + i);
    });
    const int64_t at = begin / kSplit * max_rows + r;
    float factors[kTileRows];
    int64_t counts[kTileRows];
    for (int i = 0; i < kTileRows; ++i)
      counts[i] = visible(position + (r + i < last ? r + i : last) / group, begin);
    softmax_step<kTileRows>(buffers.scores, kKeyBlock, counts, buffers.states + at, factors);
    for_each_tile(width, [&](int64_t i, auto vectors) {
      value_tile<vectors.value>(buffers.scores, buffers.values + i, depth, factors,
                                buffers.sums + at * width + i, width);
    });
  }

  // Combines the splits and stores the rows.
  VOX_INLINE void store_results(int64_t token, int64_t h, int64_t rows, int64_t position,
                                const Buffers& buffers) const {
    for (int64_t r = 0; r < rows; ++r)
      combine_splits(
          num_splits(position + r / group + 1), buffers.states + r, buffers.sums + r * width,
          max_rows, p.D,
          static_cast<T*>(p.out) + ((token + r / group) * p.Hq + h * group + r % group) * p.D);
  }

  // The number of keys of the block from `begin` on that the query at `position` sees.
  static int64_t visible(int64_t position, int64_t begin) {
    const int64_t keys = position + 1 - begin;
    return keys < 0 ? 0 : keys < kKeyBlock ? keys : kKeyBlock;
  }

  // Takes items until none is left, each sequence's last queries first: they see the most keys.
  void run(int64_t* next_item, int64_t items) const {
    int64_t splits = 0;
    for (int64_t b = 0; b < p.B; ++b)
      if (num_splits(p.seq_lens[b]) > splits) splits = num_splits(p.seq_lens[b]);
    Arena count(nullptr);
    Buffers(count, max_rows, splits, p.D);
    void* const memory = __builtin_malloc(count.bytes());
    Arena arena(memory);
    const Buffers buffers(arena, max_rows, splits, p.D);
    int64_t b = 0, before = 0;  // items of the sequences before b
    for (;;) {
      const int64_t item = __atomic_fetch_add(next_item, 1, __ATOMIC_RELAXED);
      if (item >= items) break;
      while (before + runs(b) * p.Hkv <= item) before += runs(b++) * p.Hkv;
      const int64_t first = (runs(b) - 1 - (item - before) / p.Hkv) * run_queries;
      const int64_t rest = p.cu_seqlens[b + 1] - p.cu_seqlens[b] - first;
      attend(b, item % p.Hkv, first, rest < run_queries ? rest : run_queries, buffers);
    }
    __builtin_free(memory);
  }
};

template <typename T>
void run(const PrefillAttentionParams& p) {
  const Prefill<T> prefill{.p = p};
  int64_t items = 0, next_item = 0;
  for (int64_t b = 0; b < p.B; ++b) items += prefill.runs(b) * p.Hkv;
  auto job = [&](int, int) { prefill.run(&next_item, items); };
  if (items == 1)
    job(0, 1);
  else if (items)
    run_team(job);
}

}  // namespace

namespace VOX_ISA {
void prefill_attention(const PrefillAttentionParams& p) {
  p.dtype == Dtype::f32 ? run<float>(p) : run<bf16>(p);
}
}  // namespace VOX_ISA

}  // namespace voxkern

#else

namespace voxkern {

VOX_KERNEL(prefill_attention, PrefillAttentionParams)

namespace {

Tensor prefill_attention_cpu(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table,
                             Tensor cu_seqlens, Tensor seq_lens, double scale) {
  check_dim(q, "q", 3);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  const PrefillAttentionParams p =
      prefill_attention_params(q, k_pages, v_pages, page_table, cu_seqlens, seq_lens, scale, out);
  check_page_table_values(p.page_table, p.seq_lens, p.B, p.M, p.S, k_pages.size(0));
  check(p.cu_seqlens[0] == 0 && p.cu_seqlens[p.B] == p.T, "cu_seqlens: expected 0 to T = ", p.T,
        ", got ", p.cu_seqlens[0], " to ", p.cu_seqlens[p.B]);
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t new_tokens = int64_t{p.cu_seqlens[b + 1]} - p.cu_seqlens[b];
    check(new_tokens >= 0 && new_tokens <= p.seq_lens[b], "cu_seqlens: expected 0 to ",
          p.seq_lens[b], " new tokens of sequence ", b, ", as seq_lens says, got ", new_tokens);
  }
  prefill_attention(p);
  return out;
}

}  // namespace
}  // namespace voxkern

STABLE_TORCH_LIBRARY_IMPL(voxkern, CPU, m) {
  m.impl("prefill_attention", TORCH_BOX(&voxkern::prefill_attention_cpu));
}

#endif
