// append_kv and decode_attention of one position for keys that a block holds in its registers, as
// one block does it: what depth.cu launches and persistent_depth.cu calls.
//
// A block takes one row and one key/value head, for up to kDepthQueries query heads of its group. L
// lanes hold a key's row, 16 bytes each; a lane has kKeysPerLane keys and their values, all of
// which it asks for at once, before the wait for qkv. Every lane turns its own part of the queries;
// the lanes of the new key take that and its value from qkv, and write them to the cache. Float32
// throughout, queries and keys rounded where append_kv stores them, the result once.
//
// Floor: latency. For CSM 4 blocks a row read 16 KB each at most. Behind the wait there are one
// read of qkv, 4 shuffles, a barrier, a softmax of 10 shuffles, a barrier and a store: about 1 us.
#pragma once

#include "cuda/ops/ops.cuh"
#include "cuda/runtime/elementwise.cuh"
#include "cuda/runtime/reduce.cuh"

namespace voxkern::attention {
namespace {

constexpr int kDepthThreads = 256;
constexpr int kDepthWarps = kDepthThreads / kWarp;
constexpr int kDepthQueries = 2;
template <int L>
constexpr int kKeysPerLane = L > 16 ? 4 : 2;

// Keys that a block holds, L lanes a row: in multiples of 32, all of CSM's.
template <int L>
constexpr int kMaxDepthKeys = kKeysPerLane<L> * kDepthWarps * (kWarp / L);

template <typename T, int L>
struct DepthShared {
  float scores[kDepthQueries][kMaxDepthKeys<L>];
  float sums[kDepthWarps][kDepthQueries][L * kVector<T>];
};

// Blocks of a row.
__host__ __device__ inline int64_t depth_blocks_per_row(const DepthAttentionParams& p) {
  return p.Hkv * divide_up(p.Hq / p.Hkv, kDepthQueries);
}

// Part `part` of row b. wait() returns when qkv is there, or false: then so does this. `shared` may
// be another part's right after it.
template <typename T, int L, typename Wait>
__device__ __forceinline__ bool attend_depth(const DepthAttentionParams& p, int part, int64_t b,
                                             DepthShared<T, L>& shared, const Wait& wait) {
  constexpr int N = kVector<T>, D = L * N, kHalf = D / 2;
  constexpr int kRows = kWarp / L, kInStep = kDepthWarps * kRows;
  auto& [scores, sums] = shared;
  const int Hq = static_cast<int>(p.Hq), Hkv = static_cast<int>(p.Hkv);
  const int group = Hq / Hkv, parts = (group + kDepthQueries - 1) / kDepthQueries;
  const int h = part / parts, first_query = part % parts * kDepthQueries;
  const int queries = group - first_query < kDepthQueries ? group - first_query : kDepthQueries;
  const int64_t head = static_cast<int64_t>(h) * group + first_query;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int position = static_cast<int>(p.position), column = lane % L * N;
  const bool in_low = column < kHalf;
  const int partner = in_low ? column + kHalf : column - kHalf;
  const int first_key = warp * kRows + lane / L;  // and every kInStep-th one after it
  const int64_t cache = (b * Hkv + h) * p.K * D + column;
  T* const k_cache = static_cast<T*>(p.k_cache) + cache;
  T* const v_cache = static_cast<T*>(p.v_cache) + cache;

  // Complete before the wait, but for the new one.
  uint4 k[kKeysPerLane<L>] = {}, v[kKeysPerLane<L>] = {};
#pragma unroll
  for (int s = 0; s < kKeysPerLane<L>; ++s)
    if (const int key = first_key + s * kInStep; key < position) {
      k[s] = load_uncached(k_cache + key * D);
      v[s] = load_uncached(v_cache + key * D);
    }
  // Element i of the upper half turns as one of the lower does with the sine's opposite.
  float cos[N], sin[N];
  const float* const table = p.rope_table + p.position * D + (in_low ? column : partner);
#pragma unroll
  for (int j = 0; j < N; ++j)
    cos[j] = table[j], sin[j] = in_low ? table[kHalf + j] : -table[kHalf + j];
  if (!wait()) return false;

  const T* const row = static_cast<const T*>(p.qkv) + b * (Hq + 2 * Hkv) * D;
  // All reads under no condition and before any is used: they take the time of one. Those of heads
  // past the last are the last's, which is not used.
  const T* const k_row = row + (Hq + h) * D;
  const uint4 new_k = load_uncached(k_row + column), k_partner = load_uncached(k_row + partner);
  const uint4 new_v = load_uncached(k_row + Hkv * D + column);
  uint4 mine[kDepthQueries], partners[kDepthQueries];
#pragma unroll
  for (int g = 0; g < kDepthQueries; ++g) {
    const T* const q_row = row + (head + (g < queries ? g : queries - 1)) * D;
    mine[g] = load_uncached(q_row + column);
    partners[g] = load_uncached(q_row + partner);
  }
  const auto turn = [&](uint4 raw, uint4 raw_partner, float (&out)[N]) {
    float own[N], other[N];
    unpack<T>(raw, own);
    unpack<T>(raw_partner, other);
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = rounded<T>(rotated_low(own[j], other[j], cos[j], sin[j]));
  };
  float turned[N];
  turn(new_k, k_partner, turned);
#pragma unroll
  for (int s = 0; s < kKeysPerLane<L>; ++s)
    if (first_key + s * kInStep == position) {
      k[s] = pack<T>(turned);
      v[s] = new_v;
    }
  if (first_query == 0 && position % kInStep == first_key) {
    *reinterpret_cast<uint4*>(k_cache + position * D) = pack<T>(turned);
    *reinterpret_cast<uint4*>(v_cache + position * D) = new_v;
  }
  float q[kDepthQueries][N];
#pragma unroll
  for (int g = 0; g < kDepthQueries; ++g) {
    turn(mine[g], partners[g], q[g]);
#pragma unroll
    for (int j = 0; j < N; ++j) q[g][j] *= p.scale;
  }

#pragma unroll
  for (int s = 0; s < kKeysPerLane<L>; ++s) {
    if (s * kInStep + warp * kRows > position) break;  // the whole warp
    const int key = first_key + s * kInStep;
    float values[N] = {};
    if (key <= position) unpack<T>(k[s], values);
#pragma unroll
    for (int g = 0; g < kDepthQueries; ++g) {
      float dot = 0;
#pragma unroll
      for (int j = 0; j < N; ++j) dot = fmaf(q[g][j], values[j], dot);
#pragma unroll
      for (int offset = L / 2; offset; offset /= 2) dot += __shfl_xor_sync(kWholeWarp, dot, offset);
      if (lane % L == 0) scores[g][key] = dot;
    }
  }
  sync_first<kDepthThreads>();

  // Each warp finds out for itself what divides the weights.
  constexpr int kEach = kMaxDepthKeys<L> / kWarp;
  const float lowest = __uint_as_float(0xff800000u);
  float total[kDepthQueries];
#pragma unroll
  for (int g = 0; g < kDepthQueries; ++g) {
    float mine_of[kEach], largest = lowest;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      mine_of[i] = lane + i * kWarp <= position ? scores[g][lane + i * kWarp] : lowest;
      largest = fmaxf(largest, mine_of[i]);
    }
    largest = warp_reduce(largest, Max());
    total[g] = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if (lane + i * kWarp <= position) total[g] += expf(mine_of[i] - largest);
    total[g] = warp_reduce(total[g], Add());

    float acc[N] = {};
#pragma unroll
    for (int s = 0; s < kKeysPerLane<L>; ++s) {
      if (const int key = first_key + s * kInStep; key <= position) {
        const float weight = expf(scores[g][key] - largest);
        float values[N];
        unpack<T>(v[s], values);
#pragma unroll
        for (int j = 0; j < N; ++j) acc[j] = fmaf(weight, values[j], acc[j]);
      }
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
      for (int offset = kWarp / 2; offset >= L; offset /= 2)
        acc[j] += __shfl_xor_sync(kWholeWarp, acc[j], offset);
      if (lane < L) sums[warp][g][column + j] = acc[j];
    }
  }
  sync_first<kDepthThreads>();
  for (int i = threadIdx.x; i < queries * D; i += kDepthThreads) {
    const int g = i / D;
    float sum = sums[0][g][i % D], all = total[0];
#pragma unroll
    for (int w = 1; w < kDepthWarps; ++w) sum += sums[w][g][i % D];
#pragma unroll
    for (int other = 1; other < kDepthQueries; ++other) all = g == other ? total[other] : all;
    static_cast<T*>(p.out)[(b * Hq + head) * D + i] = from_float<T>(sum / all);
  }
  return true;
}

}  // namespace
}  // namespace voxkern::attention
