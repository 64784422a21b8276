// The kernels of decode_attention, and of append_kv and decode_attention fused.
//
// Grid: (splits, key/value heads and parts of their groups, sequences). A block takes kSplitKeys
// keys of one sequence and one key/value head, for up to kSplitQueries query heads of its group, so
// keys and values are read once for all of them. Each warp takes 32 of the keys. L lanes hold a
// key's row, N elements (16 bytes) each, so a warp reads 32 / L rows at a time, with
// kRowLoadsInFlight such loads in flight before the first is used; values are loaded before the
// softmax of the scores. Then the block merges its warps, then the splits of a sequence are merged:
// by a second kernel in decode_attention, by the last of the sequence's blocks to finish (an atomic
// counter tells) when fused. A sequence of one split needs neither. Rows whose width is no power of
// two of vectors go element by element (N = 1).
//
// Fused, every block rotates its own queries and the new key. Keys in the slot being written come
// from shared memory instead of the page; the first split writes the page. Lengths, pages and the
// first of the older keys are loaded before the wait for the previous kernel.
//
// Rounding: float32 throughout, the query scaled in float32 first, the result rounded when stored.
// Splits have a fixed size and start at multiples of it, so neither batch nor pages change a
// result. Floor: memory, 2 L Hkv D elements a sequence (docs/cuda.md). Partial results add 6 % (4 D
// + 2 floats a split and head, written and read).
#pragma once

#include "cuda/attention/head_fragment.cuh"
#include "params/append_kv.h"
#include "params/decode_attention.h"

namespace voxkern::attention {
namespace {

constexpr int kSplitWarps = 4;
constexpr int kSplitKeys = kSplitWarps * kWarp;
constexpr int kSplitQueries = 4;
constexpr int kRowLoadsInFlight = 8;

// The splits' results.
struct Partials {
  int64_t splits;      // allocated per sequence
  float* sums;         // [B, Hq, splits, D], unnormalised
  float* states;       // [B, Hq, splits, 2], largest score and sum of weights
  unsigned* counters;  // finished blocks of each sequence and part of the heads; 0 at the start
};

// Merges the n splits of `heads` query heads of a sequence, from row `row` on. A warp takes
// kLaneColumns times 32 columns of a head, with kTerms loads of each in flight.
template <typename T>
VOX_DEVICE void combine_splits(const DecodeAttentionParams& p, const Partials& partials,
                               int64_t row, int heads, int n) {
  constexpr int kLaneColumns = 2, kTerms = 16;
  const int D = static_cast<int>(p.D), lane = threadIdx.x % kWarp;
  const int chunks = (D + kLaneColumns * kWarp - 1) / (kLaneColumns * kWarp);
  for (int task = threadIdx.x / kWarp; task < heads * chunks; task += blockDim.x / kWarp) {
    const int64_t r = row + task / chunks;
    const float* const states = partials.states + r * partials.splits * 2;
    const float* const sums = partials.sums + r * partials.splits * D;
    int column[kLaneColumns];
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c)
      column[c] = (task % chunks * kLaneColumns + c) * kWarp + lane;
    float largest = __ldcg(states), sum = 0, total[kLaneColumns] = {};
    for (int i = lane; i < n; i += kWarp) largest = fmaxf(largest, __ldcg(states + 2 * i));
    largest = warp_reduce(largest, Max());
    for (int first = 0; first < n; first += kTerms) {
      // Past the end, reads the last split again and ignores it.
      float terms[kTerms][kLaneColumns];
#pragma unroll
      for (int u = 0; u < kTerms; ++u)
#pragma unroll
        for (int c = 0; c < kLaneColumns; ++c)
          terms[u][c] = __ldcg(sums + (first + u < n ? first + u : n - 1) * D +
                               (column[c] < D ? column[c] : D - 1));
      const int mine = first + lane % kTerms < n ? first + lane % kTerms : n - 1;
      const float share = __ldcg(states + 2 * mine + 1);
      const float factor = expf(__ldcg(states + 2 * mine) - largest);
#pragma unroll
      for (int u = 0; u < kTerms; ++u) {
        const float factor_u = __shfl_sync(kWholeWarp, factor, u);
        const float share_u = __shfl_sync(kWholeWarp, share, u);
        if (first + u >= n) continue;
        sum = fmaf(share_u, factor_u, sum);
#pragma unroll
        for (int c = 0; c < kLaneColumns; ++c) total[c] = fmaf(terms[u][c], factor_u, total[c]);
      }
    }
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c)
      if (column[c] < D) static_cast<T*>(p.out)[r * D + column[c]] = from_float<T>(total[c] / sum);
  }
}

// One block's split, step by step.
template <typename T, int N, int L, bool kAppend>
class SplitWorker {
  using Fragment = HeadFragment<T, N, L>;
  static constexpr int kFragmentSize = Fragment::kFragmentSize;
  static constexpr int kKeysPerLoad = kWarp / L;
  static constexpr int kLoads = N == 1 ? 1 : kRowLoadsInFlight < L ? kRowLoadsInFlight : L;

 public:
  VOX_DEVICE SplitWorker(const DecodeAttentionParams& p, const Partials& partials,
                         const AppendKvParams& append)
      : p_(p), partials_(partials), append_(append), D_(N == 1 ? static_cast<int>(p.D) : N * L) {
    const int group = static_cast<int>(p.Hq / p.Hkv);
    const int parts = (group + kSplitQueries - 1) / kSplitQueries;
    h_ = blockIdx.y / parts;
    first_query_ = blockIdx.y % parts * kSplitQueries;
    queries_ = group - first_query_ < kSplitQueries ? group - first_query_ : kSplitQueries;
    b_ = blockIdx.z;
    head_ = static_cast<int64_t>(h_) * group + first_query_;
    split_ = static_cast<int>(blockIdx.x);
  }

  VOX_DEVICE void run(float* sums) {
    if constexpr (!kAppend) start();
    locate_keys();
    if constexpr (kAppend) {
      table_ = append_.rope_table + __ldcg(append_.positions + b_) * D_;
      if (older_) load_rows(p_.k_pages, 0);
      load_rotation();
      start();
    }
    if (split_ * kSplitKeys >= length_ && split_ > 0) return;  // the whole block
    if constexpr (kAppend)
      append_and_rotate();
    else
      load_queries();
    VOX_SHARED(float[kSplitWarps][kWarp][kSplitQueries], weights);
    VOX_SHARED(SoftmaxState[kSplitWarps][kSplitQueries], states);
    score_keys(weights[warp_]);
    if (older_) load_rows(p_.v_pages, 0);
    __syncwarp();
    scores_to_weights(weights[warp_], states[warp_]);
    __syncwarp();
    sum_values(weights[warp_], sums + warp_ * kSplitQueries * D_);
    __syncthreads();
    merge_warps(states, sums);
    if constexpr (kAppend) combine_if_last();
  }

 private:
  static VOX_DEVICE void start() {
    let_next_kernel_start();
    wait_for_previous_kernel();
  }
  // The new key and its value.
  static VOX_DEVICE auto& new_kv() {
    VOX_SHARED(T[2][kMaxHeadDim], rows);
    return rows;
  }
  VOX_DEVICE int splits() const { return (length_ + kSplitKeys - 1) / kSplitKeys; }
  VOX_DEVICE bool is_new(int key) const { return kAppend && new_keys_ >> key & 1; }
  // Past the last query head, the last one, whose results are ignored.
  VOX_DEVICE const T* query_row(int g) const {
    const int64_t query = head_ + (g < queries_ ? g : queries_ - 1);
    return static_cast<const T*>(p_.q) + b_ * p_.q_stride + query * D_;
  }

  // Lane i computes where key i of the warp is.
  VOX_DEVICE void locate_keys() {
    const int S = static_cast<int>(p_.S);
    const int64_t room = p_.M * p_.S;
    const int keys = __ldcg(p_.seq_lens + b_), begin = split_ * kSplitKeys + warp_ * kWarp;
    length_ = static_cast<int>(keys < room ? keys : room);
    count_ = length_ - begin < kWarp ? length_ - begin : kWarp;
    if (lane_ < count_) {
      const int key = begin + lane_, page = __ldcg(p_.page_table + b_ * p_.M + key / S);
      my_place_ = ((static_cast<int64_t>(page) * p_.Hkv + h_) * S + key % S) * D_;
    }
    if constexpr (kAppend) {
      const int64_t slot = __ldcg(append_.slots + b_);
      if (slot >= 0) new_place_ = ((slot / S * p_.Hkv + h_) * S + slot % S) * D_;
      new_keys_ = __ballot_sync(kWholeWarp, lane_ < count_ && my_place_ == new_place_);
    }
    // Loads are unconditional, or each would be waited for before the next: lanes past the last
    // key, and those of the new key, whose slot may not be written yet, load an older key that is
    // not used. A warp without older keys loads nothing.
    older_ = __ballot_sync(kWholeWarp, lane_ < count_) & ~new_keys_;
    const int oldest = older_ ? __ffs(older_) - 1 : 0;
    my_place_ = __shfl_sync(kWholeWarp, my_place_, older_ >> lane_ & 1 ? lane_ : oldest);
  }

  // Loads the rows of kLoads consecutive steps.
  VOX_DEVICE void load_rows(const void* pages, int first_step) {
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int64_t place =
          __shfl_sync(kWholeWarp, my_place_, (first_step + u) * kKeysPerLoad + lane_ / L);
      rows_[u].load(static_cast<const T*>(pages) + place, lane_, D_);
    }
  }

  VOX_DEVICE void load_rotation() {
#pragma unroll
    for (int i = 0; i < kFragmentSize; ++i) {
      const int column = Fragment::column(lane_, i), at = column % (D_ / 2);
      cos_[i] = column < D_ ? table_[at] : 0.0f;
      sin_[i] = column < D_ ? table_[D_ / 2 + at] : 0.0f;
    }
  }

  VOX_DEVICE void load_queries() {
#pragma unroll
    for (int g = 0; g < kSplitQueries; ++g) {
      const T* const row = query_row(g);
#pragma unroll
      for (int j = 0; j < kFragmentSize; ++j) {
        const int column = Fragment::column(lane_, j);
        const bool there = N > 1 || column < D_;
        q_[g][j] = (there ? to_float(load_element_uncached(row + column)) : 0.0f) * p_.scale;
      }
    }
  }

  // Rotates the queries and the new key; the first split writes the new key and value. All loads
  // are issued before one is used.
  VOX_DEVICE void append_and_rotate() {
    const int half = D_ / 2, i = static_cast<int>(threadIdx.x) < half ? threadIdx.x : half - 1;
    const T* const k = static_cast<const T*>(append_.k) + b_ * append_.k_stride + h_ * D_ + i;
    const T* const v = static_cast<const T*>(append_.v) + b_ * append_.v_stride + h_ * D_ + i;
    const T k_low = load_element_uncached(k), k_high = load_element_uncached(k + half);
    const T v_low = load_element_uncached(v), v_high = load_element_uncached(v + half);
    Fragment own[kSplitQueries], partners[kSplitQueries];
#pragma unroll
    for (int g = 0; g < kSplitQueries; ++g) {
      own[g].load(query_row(g), lane_, D_);
      partners[g].template load<true>(query_row(g), lane_, D_);
    }
    auto& [new_key, new_value] = new_kv();
    const float low = to_float(k_low), high = to_float(k_high);
    if (i == static_cast<int>(threadIdx.x)) {
      new_key[i] = from_float<T>(rotated_low(low, high, table_[i], table_[half + i]));
      new_key[i + half] = from_float<T>(rotated_high(low, high, table_[i], table_[half + i]));
      new_value[i] = v_low;
      new_value[i + half] = v_high;
    }
#pragma unroll
    for (int g = 0; g < kSplitQueries; ++g) rotate_query(own[g], partners[g], q_[g]);
    __syncthreads();
    if (split_ == 0 && first_query_ == 0 && new_place_ >= 0)
      for (int column = threadIdx.x; column < D_; column += kSplitKeys) {
        static_cast<T*>(append_.k_pages)[new_place_ + column] = new_key[column];
        static_cast<T*>(append_.v_pages)[new_place_ + column] = new_value[column];
      }
  }
  VOX_DEVICE void rotate_query(const Fragment& own, const Fragment& partners,
                               float (&q)[kFragmentSize]) const {
    float mine[kFragmentSize], other[kFragmentSize];
    own.to_floats(mine);
    partners.to_floats(other);
#pragma unroll
    for (int j = 0; j < kFragmentSize; ++j)
      q[j] = rounded<T>(Fragment::column(lane_, j) < D_ / 2
                            ? rotated_low(mine[j], other[j], cos_[j], sin_[j])
                            : rotated_high(other[j], mine[j], cos_[j], sin_[j])) *
             p_.scale;
  }

  VOX_DEVICE void score_keys(float (&scores)[kWarp][kSplitQueries]) {
    for (int step = 0; step < L; step += kLoads) {
      if (step * kKeysPerLoad >= count_) break;
      if (!kAppend || step > 0) load_rows(p_.k_pages, step);
#pragma unroll
      for (int u = 0; u < kLoads; ++u) {
        const int key = (step + u) * kKeysPerLoad + lane_ / L;
        float k[kFragmentSize] = {}, dots[kSplitQueries] = {};
        if (is_new(key)) rows_[u].load_shared(new_kv()[0], lane_, D_);
        if (key < count_) rows_[u].to_floats(k);
#pragma unroll
        for (int g = 0; g < kSplitQueries; ++g) {
#pragma unroll
          for (int i = 0; i < kFragmentSize; ++i) dots[g] = fmaf(q_[g][i], k[i], dots[g]);
#pragma unroll
          for (int offset = L / 2; offset; offset /= 2)
            dots[g] += __shfl_xor_sync(kWholeWarp, dots[g], offset);
        }
        if (lane_ % L == 0 && key < count_)
#pragma unroll
          for (int g = 0; g < kSplitQueries; ++g) scores[key][g] = dots[g];
      }
    }
  }

  // In place: lane i takes key i.
  VOX_DEVICE void scores_to_weights(float (&weights)[kWarp][kSplitQueries],
                                    SoftmaxState (&states)[kSplitQueries]) const {
#pragma unroll
    for (int g = 0; g < kSplitQueries; ++g) {
      const float score[1] = {lane_ < count_ ? weights[lane_][g] : minus_infinity()};
      const SoftmaxState state = warp_softmax(score, count_);
      weights[lane_][g] = lane_ < count_ ? expf(score[0] - state.largest) : 0.0f;
      if (lane_ == 0) states[g] = state;
    }
  }

  // The warp's weighted values, to [kSplitQueries, D] `sums`.
  VOX_DEVICE void sum_values(const float (&weights)[kWarp][kSplitQueries], float* sums) {
    float acc[kSplitQueries][kFragmentSize] = {};
    for (int step = 0; step < L; step += kLoads) {
      if (step * kKeysPerLoad >= count_) break;
      if (step > 0) load_rows(p_.v_pages, step);
#pragma unroll
      for (int u = 0; u < kLoads; ++u) {
        const int key = (step + u) * kKeysPerLoad + lane_ / L;
        if (key >= count_) continue;
        if (is_new(key)) rows_[u].load_shared(new_kv()[1], lane_, D_);
        float v[kFragmentSize];
        rows_[u].to_floats(v);
#pragma unroll
        for (int g = 0; g < kSplitQueries; ++g) {
          const float weight = weights[key][g];
#pragma unroll
          for (int i = 0; i < kFragmentSize; ++i) acc[g][i] = fmaf(weight, v[i], acc[g][i]);
        }
      }
    }
#pragma unroll
    for (int g = 0; g < kSplitQueries; ++g)
#pragma unroll
      for (int i = 0; i < kFragmentSize; ++i) {
#pragma unroll
        for (int offset = kWarp / 2; offset >= L; offset /= 2)
          acc[g][i] += __shfl_xor_sync(kWholeWarp, acc[g][i], offset);
        const int column = Fragment::column(lane_, i);
        if (lane_ < L && column < D_) sums[g * D_ + column] = acc[g][i];
      }
  }

  // To the split's partial result, or to the output if it is the only split.
  VOX_DEVICE void merge_warps(const SoftmaxState (&states)[kSplitWarps][kSplitQueries],
                              const float* sums) const {
    for (int item = threadIdx.x; item < queries_ * D_; item += kSplitKeys) {
      const int g = item / D_, column = item % D_;
      float total;
      const SoftmaxState merged = merge_parts<kSplitWarps>(
          [&](int w) { return states[w][g]; },
          [&](int w) { return sums[(w * kSplitQueries + g) * D_ + column]; }, total);
      const int64_t row = b_ * p_.Hq + head_ + g;
      if (splits() <= 1) {
        static_cast<T*>(p_.out)[row * D_ + column] =
            from_float<T>(length_ > 0 ? total / merged.sum : 0.0f);
        continue;
      }
      partials_.sums[(row * partials_.splits + split_) * D_ + column] = total;
      if (column == 0) {
        partials_.states[(row * partials_.splits + split_) * 2] = merged.largest;
        partials_.states[(row * partials_.splits + split_) * 2 + 1] = merged.sum;
      }
    }
  }

  VOX_DEVICE void combine_if_last() const {
    if (splits() <= 1) return;
    VOX_SHARED(bool, is_last);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      unsigned* const counter = partials_.counters + b_ * gridDim.y + blockIdx.y;
      is_last = atomicAdd(counter, 1) == static_cast<unsigned>(splits()) - 1;
      if (is_last) *counter = 0;
      __threadfence();
    }
    __syncthreads();
    if (is_last) combine_splits<T>(p_, partials_, b_ * p_.Hq + head_, queries_, splits());
  }

  const DecodeAttentionParams& p_;
  const Partials& partials_;
  const AppendKvParams& append_;
  const int D_, lane_ = threadIdx.x % kWarp, warp_ = threadIdx.x / kWarp;
  int h_, first_query_, queries_, split_;  // queries of this block
  int64_t b_, head_;
  int length_, count_;  // keys of the sequence, of the warp (may be negative)
  int64_t my_place_ = 0, new_place_ = -1;
  unsigned new_keys_ = 0, older_;  // a bit a key: those in the slot being written, the others
  const float* table_ = nullptr;
  Fragment rows_[kLoads] = {};
  float cos_[kFragmentSize], sin_[kFragmentSize], q_[kSplitQueries][kFragmentSize];
};

template <typename T, int N, int L, bool kAppend>
__global__ void __launch_bounds__(kSplitKeys, kAppend ? 2 : 3)
    split_kernel(DecodeAttentionParams p, Partials partials, AppendKvParams append) {
  VOX_DYNAMIC_SHARED(float, sums);  // [kSplitWarps, kSplitQueries, D]
  SplitWorker<T, N, L, kAppend>(p, partials, append).run(sums);
}

// A block takes one query head of a sequence.
template <typename T>
__global__ void combine_splits_kernel(DecodeAttentionParams p, Partials partials) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int64_t b = blockIdx.y, room = p.M * p.S;
  const int64_t keys = __ldcg(p.seq_lens + b), length = keys < room ? keys : room;
  const int splits = static_cast<int>((length + kSplitKeys - 1) / kSplitKeys);
  if (splits > 1) combine_splits<T>(p, partials, b * p.Hq + blockIdx.x, 1, splits);
}

}  // namespace
}  // namespace voxkern::attention
