// The kernels of decode_attention, and of append_kv and decode_attention in one.
//
// A block takes kSplitKeys keys of one sequence and one key/value head, for up to kSplitQueries
// query heads of its group: keys and values are read once for all of them. A warp takes kWarp of
// the keys by itself. L lanes hold a key's row, N elements (16 bytes) each, so a warp reads 32 / L
// rows at once, and kRowLoadsInFlight such reads are under way before the first is used; values are
// asked for before the softmax of the scores. Then the block's warps are put together, then the
// splits of a sequence: in decode_attention by a second kernel, with append_kv in front
// (append_and_attend) by the last of the sequence's blocks to get there, which a counter tells. A
// sequence of one split needs neither. Rows whose width is no power of two of vectors go element by
// element.
//
// With append_kv in front, every block turns its own queries and the new key, which it takes from
// shared memory where a sequence's keys have the slot that is written; the first split writes it.
// Lengths, pages and the first of the older keys are read before the wait for the kernel in front.
//
// Float32 throughout, the query scaled in float32 first, the result rounded when it is stored.
// Splits have a fixed size and begin at multiples of it: neither batch nor pages change a result.
//
// Floor: 2 L Hkv D elements a sequence over 3.35 TB/s: 2,048 keys of CSM's backbone 4.2 MB a layer,
// 1.25 us a sequence on an H100. Blocks read 32 KB each (D = 64, bf16), 128 of them at 2,048 keys
// and batch 1; the partial results add 6 % (4 D + 2 floats a split and head, written and read).
#pragma once

#include "cuda/runtime/elementwise.cuh"
#include "cuda/runtime/reduce.cuh"
#include "params/append_kv.h"
#include "params/decode_attention.h"

namespace voxkern::attention {
namespace {

constexpr int kSplitWarps = 4;
constexpr int kSplitKeys = kSplitWarps * kWarp;
constexpr int kSplitQueries = 4;
constexpr int kRowLoadsInFlight = 8;
constexpr int kMaxElementwise = 256;  // head width where rows do not go in vectors

// Where splits leave their results.
struct Partials {
  int64_t splits;      // a sequence's room
  float* sums;         // [B, Hq, splits, D], unnormalised
  float* states;       // [B, Hq, splits, 2], largest score and sum of weights
  unsigned* counters;  // of blocks that are done, for each sequence and part of the heads, from 0
};

// What a lane holds of a row of D elements: N in a row, from column N lane on, of one chunk, or
// of kChunks that are L lanes apart.
template <typename T, int N, int L>
struct HeadFragment {
  static constexpr int kChunks = N == 1 ? kMaxElementwise / L : 1;
  static constexpr int kSize = N * kChunks;
  static __device__ __forceinline__ int column(int lane, int i) {
    return (i / N * L + lane % L) * N + i % N;
  }
  using Raw = std::conditional_t<N == 1, T, uint4>;
  Raw raw[kChunks];

  // With kPartners, the columns that those are turned with.
  template <bool kPartners = false>
  __device__ __forceinline__ void read(const T* row, int lane, int D) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int here = column(lane, c * N), half = D / 2;
      const int at = !kPartners ? here : here < half ? here + half : here - half;
      if constexpr (N == 1)
        raw[c] = here < D ? load_element_uncached(row + at) : from_float<T>(0.0f);
      else
        raw[c] = load_uncached(row + at);
    }
  }
  // Out of shared memory.
  __device__ __forceinline__ void take(const T* row, int lane, int D) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int at = column(lane, c * N);
      if constexpr (N == 1)
        raw[c] = at < D ? row[at] : from_float<T>(0.0f);
      else
        raw[c] = *reinterpret_cast<const uint4*>(row + at);
    }
  }
  __device__ __forceinline__ void get(float (&out)[kSize]) const {
    if constexpr (N == 1) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) out[c] = to_float(raw[c]);
    } else {
      unpack<T>(raw[0], out);
    }
  }
};

struct State {
  float largest, sum;
};

// The n splits of `heads` query heads of a sequence, from row `row` on, to their results. A warp
// takes kColumns times 32 columns of a head and has kTerms of each under way.
template <typename T>
__device__ __forceinline__ void combine_splits(const DecodeAttentionParams& p,
                                               const Partials& partials, int64_t row, int heads,
                                               int n) {
  constexpr int kColumns = 2, kTerms = 16;
  const int D = static_cast<int>(p.D), lane = threadIdx.x % kWarp;
  const int chunks = (D + kColumns * kWarp - 1) / (kColumns * kWarp);
  for (int task = threadIdx.x / kWarp; task < heads * chunks; task += blockDim.x / kWarp) {
    const int64_t r = row + task / chunks;
    const float* const states = partials.states + r * partials.splits * 2;
    const float* const sums = partials.sums + r * partials.splits * D;
    int column[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) column[c] = (task % chunks * kColumns + c) * kWarp + lane;
    float largest = __ldcg(states), sum = 0, total[kColumns] = {};
    for (int i = lane; i < n; i += kWarp) largest = fmaxf(largest, __ldcg(states + 2 * i));
    largest = warp_reduce(largest, Max());
    for (int first = 0; first < n; first += kTerms) {
      // Beyond the end, the last split's, which is not used.
      float terms[kTerms][kColumns];
#pragma unroll
      for (int u = 0; u < kTerms; ++u)
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
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
        for (int c = 0; c < kColumns; ++c) total[c] = fmaf(terms[u][c], factor_u, total[c]);
      }
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      if (column[c] < D) static_cast<T*>(p.out)[r * D + column[c]] = from_float<T>(total[c] / sum);
  }
}

template <typename T, int N, int L, bool kAppend>
__global__ void __launch_bounds__(kSplitKeys, kAppend ? 2 : 3)
    split_kernel(DecodeAttentionParams p, Partials partials, AppendKvParams append) {
  using RowSlice = HeadFragment<T, N, L>;
  constexpr int kSize = RowSlice::kSize;
  constexpr int kRows = kWarp / L;  // of keys, in one read of a warp
  constexpr int kAtOnce = N == 1 ? 1 : kRowLoadsInFlight < L ? kRowLoadsInFlight : L;  // reads
  VOX_DYNAMIC_SHARED(float, sums);  // [kSplitWarps, kSplitQueries, D]
  VOX_SHARED(float[kSplitWarps][kWarp][kSplitQueries], weights);
  VOX_SHARED(State[kSplitWarps][kSplitQueries], states);
  const int D = N == 1 ? static_cast<int>(p.D) : N * L, S = static_cast<int>(p.S);
  const int group = static_cast<int>(p.Hq / p.Hkv);
  const int parts = (group + kSplitQueries - 1) / kSplitQueries;
  const int h = blockIdx.y / parts, first_query = blockIdx.y % parts * kSplitQueries;
  const int queries = group - first_query < kSplitQueries ? group - first_query : kSplitQueries;
  const int64_t b = blockIdx.z, head = static_cast<int64_t>(h) * group + first_query;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;

  if constexpr (!kAppend) {
    let_next_kernel_start();
    wait_for_previous_kernel();
  }
  const int64_t room = p.M * p.S;
  const int keys = __ldcg(p.seq_lens + b), length = static_cast<int>(keys < room ? keys : room);
  const int split = static_cast<int>(blockIdx.x);
  const int begin = split * kSplitKeys + warp * kWarp;
  const int count = length - begin < kWarp ? length - begin : kWarp;  // may be negative

  // Lane i knows where key i is.
  int64_t my_place = 0;
  unsigned is_new = 0;  // keys that are in the slot to be written
  if (lane < count) {
    const int key = begin + lane, page = __ldcg(p.page_table + b * p.M + key / S);
    my_place = ((static_cast<int64_t>(page) * p.Hkv + h) * S + key % S) * D;
  }
  int64_t new_place = -1;
  if constexpr (kAppend) {
    const int64_t slot = __ldcg(append.slots + b);
    if (slot >= 0) new_place = ((slot / S * p.Hkv + h) * S + slot % S) * D;
    is_new = __ballot_sync(kWholeWarp, lane < count && my_place == new_place);
  }
  // Reads are under no condition of their own, or each would be waited for before the next: for a
  // lane past the last key, and for the new key, whose slot nobody may have written yet, an older
  // key is read, which is not used. A warp that has none reads nothing.
  const unsigned older = __ballot_sync(kWholeWarp, lane < count) & ~is_new;
  const int oldest = older ? __ffs(older) - 1 : 0;
  my_place = __shfl_sync(kWholeWarp, my_place, older >> lane & 1 ? lane : oldest);
  const auto read = [&](const void* pages, int step, RowSlice& slice) {
    const int64_t place = __shfl_sync(kWholeWarp, my_place, step * kRows + lane / L);
    slice.read(static_cast<const T*>(pages) + place, lane, D);
  };
  RowSlice rows[kAtOnce] = {};
  float cos[kSize], sin[kSize];
  const float* const table =
      kAppend ? append.rope_table + __ldcg(append.positions + b) * D : nullptr;
  if constexpr (kAppend) {
    if (older)
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) read(p.k_pages, u, rows[u]);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const int column = RowSlice::column(lane, i), at = column % (D / 2);
      cos[i] = column < D ? table[at] : 0.0f;
      sin[i] = column < D ? table[D / 2 + at] : 0.0f;
    }
    let_next_kernel_start();
    wait_for_previous_kernel();
  }
  if (split * kSplitKeys >= length && split > 0) return;  // the whole block

  // Queries and the new key and its value: all are asked for before one is used. Those past the
  // last are the last, which is not used.
  VOX_SHARED(T[2][kMaxElementwise], fresh);
  float q[kSplitQueries][kSize];
  if constexpr (kAppend) {
    const int half = D / 2, i = static_cast<int>(threadIdx.x) < half ? threadIdx.x : half - 1;
    const T* const k = static_cast<const T*>(append.k) + b * append.k_stride + h * D + i;
    const T* const v = static_cast<const T*>(append.v) + b * append.v_stride + h * D + i;
    const T k_low = load_element_uncached(k), k_high = load_element_uncached(k + half);
    const T v_low = load_element_uncached(v), v_high = load_element_uncached(v + half);
    RowSlice mine[kSplitQueries], partners[kSplitQueries];
#pragma unroll
    for (int g = 0; g < kSplitQueries; ++g) {
      const int64_t query = head + (g < queries ? g : queries - 1);
      const T* const row = static_cast<const T*>(p.q) + b * p.q_stride + query * D;
      mine[g].read(row, lane, D);
      partners[g].template read<true>(row, lane, D);
    }
    const float low = to_float(k_low), high = to_float(k_high);
    if (i == static_cast<int>(threadIdx.x)) {
      fresh[0][i] = from_float<T>(rotated_low(low, high, table[i], table[half + i]));
      fresh[0][i + half] = from_float<T>(rotated_high(low, high, table[i], table[half + i]));
      fresh[1][i] = v_low;
      fresh[1][i + half] = v_high;
    }
#pragma unroll
    for (int g = 0; g < kSplitQueries; ++g) {
      float own[kSize], other[kSize];
      mine[g].get(own);
      partners[g].get(other);
#pragma unroll
      for (int j = 0; j < kSize; ++j)
        q[g][j] = rounded<T>(RowSlice::column(lane, j) < half
                                 ? rotated_low(own[j], other[j], cos[j], sin[j])
                                 : rotated_high(other[j], own[j], cos[j], sin[j])) *
                  p.scale;
    }
    __syncthreads();
    if (split == 0 && first_query == 0 && new_place >= 0)
      for (int column = threadIdx.x; column < D; column += kSplitKeys) {
        static_cast<T*>(append.k_pages)[new_place + column] = fresh[0][column];
        static_cast<T*>(append.v_pages)[new_place + column] = fresh[1][column];
      }
  } else {
#pragma unroll
    for (int g = 0; g < kSplitQueries; ++g) {
      const int64_t query = head + (g < queries ? g : queries - 1);
      const T* const row = static_cast<const T*>(p.q) + b * p.q_stride + query * D;
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const int column = RowSlice::column(lane, j);
        q[g][j] =
            (N > 1 || column < D ? to_float(load_element_uncached(row + column)) : 0.0f) * p.scale;
      }
    }
  }

  for (int step = 0; step < L; step += kAtOnce) {
    if (step * kRows >= count) break;
    if (!kAppend || step > 0)
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) read(p.k_pages, step + u, rows[u]);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int key = (step + u) * kRows + lane / L;
      float k[kSize] = {}, dots[kSplitQueries] = {};
      if (kAppend && is_new >> key & 1) rows[u].take(fresh[0], lane, D);
      if (key < count) rows[u].get(k);
#pragma unroll
      for (int g = 0; g < kSplitQueries; ++g) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) dots[g] = fmaf(q[g][i], k[i], dots[g]);
#pragma unroll
        for (int offset = L / 2; offset; offset /= 2)
          dots[g] += __shfl_xor_sync(kWholeWarp, dots[g], offset);
      }
      if (lane % L == 0 && key < count)
#pragma unroll
        for (int g = 0; g < kSplitQueries; ++g) weights[warp][key][g] = dots[g];
    }
  }
  if (older)
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) read(p.v_pages, u, rows[u]);
  __syncwarp();

  // Scores to weights, lane i those of key i.
#pragma unroll
  for (int g = 0; g < kSplitQueries; ++g) {
    const float lowest = __uint_as_float(0xff800000u);
    const float score = lane < count ? weights[warp][lane][g] : lowest;
    const float largest = warp_reduce(score, Max());
    const float weight = lane < count ? expf(score - largest) : 0.0f;
    weights[warp][lane][g] = weight;
    const float sum = warp_reduce(weight, Add());
    if (lane == 0) states[warp][g] = {largest, sum};
  }
  __syncwarp();

  float acc[kSplitQueries][kSize] = {};
  for (int step = 0; step < L; step += kAtOnce) {
    if (step * kRows >= count) break;
    if (step > 0)
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) read(p.v_pages, step + u, rows[u]);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int key = (step + u) * kRows + lane / L;
      if (key >= count) continue;
      if (kAppend && is_new >> key & 1) rows[u].take(fresh[1], lane, D);
      float v[kSize];
      rows[u].get(v);
#pragma unroll
      for (int g = 0; g < kSplitQueries; ++g) {
        const float weight = weights[warp][key][g];
#pragma unroll
        for (int i = 0; i < kSize; ++i) acc[g][i] = fmaf(weight, v[i], acc[g][i]);
      }
    }
  }
#pragma unroll
  for (int g = 0; g < kSplitQueries; ++g)
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
#pragma unroll
      for (int offset = kWarp / 2; offset >= L; offset /= 2)
        acc[g][i] += __shfl_xor_sync(kWholeWarp, acc[g][i], offset);
      const int column = RowSlice::column(lane, i);
      if (lane < L && column < D) sums[(warp * kSplitQueries + g) * D + column] = acc[g][i];
    }
  __syncthreads();

  // The warps to one; with a single split to the result.
  const int splits = (length + kSplitKeys - 1) / kSplitKeys;
  for (int item = threadIdx.x; item < queries * D; item += kSplitKeys) {
    const int g = item / D, column = item % D;
    float largest = states[0][g].largest, sum = 0, total = 0;
#pragma unroll
    for (int w = 1; w < kSplitWarps; ++w) largest = fmaxf(largest, states[w][g].largest);
#pragma unroll
    for (int w = 0; w < kSplitWarps; ++w) {
      if (!(states[w][g].sum > 0)) continue;
      const float factor = expf(states[w][g].largest - largest);
      sum = fmaf(states[w][g].sum, factor, sum);
      total = fmaf(sums[(w * kSplitQueries + g) * D + column], factor, total);
    }
    const int64_t row = b * p.Hq + head + g;
    if (splits <= 1) {
      static_cast<T*>(p.out)[row * D + column] = from_float<T>(length > 0 ? total / sum : 0.0f);
      continue;
    }
    partials.sums[(row * partials.splits + split) * D + column] = total;
    if (column == 0) {
      partials.states[(row * partials.splits + split) * 2] = largest;
      partials.states[(row * partials.splits + split) * 2 + 1] = sum;
    }
  }
  if constexpr (kAppend) {
    if (splits <= 1) return;
    VOX_SHARED(bool, is_last);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      unsigned* const counter = partials.counters + b * gridDim.y + blockIdx.y;
      is_last = atomicAdd(counter, 1) == static_cast<unsigned>(splits) - 1;
      if (is_last) *counter = 0;
      __threadfence();
    }
    __syncthreads();
    if (is_last) combine_splits<T>(p, partials, b * p.Hq + head, queries, splits);
  }
}

// One block takes a query head of a sequence.
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
