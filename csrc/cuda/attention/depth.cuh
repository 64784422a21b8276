// append_kv and decode_attention of one position of the depth decoder, for keys and values of one
// call.
//
// The fast kernels have all keys of a block in its registers. A block takes one row and one
// key/value head, for up to kDepthQueries query heads of its group. L lanes hold a key's row, 16
// bytes each; a lane has kKeysPerLane keys and their values, all loaded at once. The keys and
// values of earlier positions were complete when the kernel was launched, so attend_depth() reads
// those before the wait for qkv. Every lane rotates its own part of the queries; the lanes of the
// new key take it and its value from qkv and write them to the cache. The persistent depth decoder
// calls attend_depth() too. Other head widths, and more keys than a block holds, go element by
// element.
//
// Rounding: float32 throughout, queries and keys rounded where append_kv stores them, the result
// once. Floor: latency. For CSM, 4 blocks a row read at most 16 KB each; after the wait there are
// one read of qkv, 4 shuffles, a barrier, a softmax of 10 shuffles, a barrier and a store.
#pragma once

#include "cuda/attention/online_softmax.cuh"

namespace voxkern::attention {
namespace {

struct DepthAttentionParams {
  int64_t B, Hq, Hkv, D, K, position;
  const void* qkv;          // [B, (Hq + 2 Hkv) D]
  const float* rope_table;  // [positions, D]
  void *k_cache, *v_cache;  // [B, Hkv, K, D]
  float scale;
  void* out;  // [B, Hq, D]
};

constexpr int kDepthThreads = 256;
constexpr int kDepthWarps = kDepthThreads / kWarp;
constexpr int kDepthQueries = 2;
constexpr int kPlainDepthWarps = 4;
template <int L>
constexpr int kKeysPerLane = L > 16 ? 4 : 2;

// The keys a block can hold with L lanes a row: a multiple of 32, enough for all of CSM's.
template <int L>
constexpr int kMaxDepthKeys = kKeysPerLane<L> * kDepthWarps * (kWarp / L);

template <typename T, int L>
struct DepthShared {
  float scores[kDepthQueries][kMaxDepthKeys<L>];
  float sums[kDepthWarps][kDepthQueries][L * kVector<T>];
};

__host__ VOX_DEVICE int64_t depth_blocks_per_row(const DepthAttentionParams& p) {
  return p.Hkv * divide_up(p.Hq / p.Hkv, kDepthQueries);
}

// Part `part` of row b, step by step.
template <typename T, int L>
class DepthWorker {
  static constexpr int N = kVector<T>, D = L * N, kHalf = D / 2;
  static constexpr int kKeysPerLoad = kWarp / L, kKeyStride = kDepthWarps * kKeysPerLoad;
  static constexpr int kLaneKeys = kKeysPerLane<L>;

 public:
  VOX_DEVICE DepthWorker(const DepthAttentionParams& p, int part, int64_t b)
      : p_(p), b_(b), position_(static_cast<int>(p.position)) {
    const int group = static_cast<int>(p.Hq) / Hkv_;
    const int parts = (group + kDepthQueries - 1) / kDepthQueries;
    h_ = part / parts;
    first_query_ = part % parts * kDepthQueries;
    queries_ = group - first_query_ < kDepthQueries ? group - first_query_ : kDepthQueries;
    head_ = static_cast<int64_t>(h_) * group + first_query_;
    const int64_t cache = (b * Hkv_ + h_) * p.K * D + column_;
    k_cache_ = static_cast<T*>(p.k_cache) + cache;
    v_cache_ = static_cast<T*>(p.v_cache) + cache;
  }

  // Older keys and values, and the rotation: complete before the wait.
  VOX_DEVICE void load_older() {
#pragma unroll
    for (int s = 0; s < kLaneKeys; ++s)
      if (const int key = key_of(s); key < position_) {
        k_[s] = load_uncached(k_cache_ + key * D);
        v_[s] = load_uncached(v_cache_ + key * D);
      }
    // Element i of the upper half rotates like one of the lower half with the negated sine.
    const float* const table = p_.rope_table + p_.position * D + (in_low_ ? column_ : partner_);
#pragma unroll
    for (int j = 0; j < N; ++j)
      cos_[j] = table[j], sin_[j] = in_low_ ? table[kHalf + j] : -table[kHalf + j];
  }

  // All loads are unconditional and issued before any is used: together they take the time of one.
  // Heads past the last are the last one again, whose results are ignored.
  VOX_DEVICE void load_new_and_rotate() {
    const T* const row = static_cast<const T*>(p_.qkv) + b_ * (p_.Hq + 2 * Hkv_) * D;
    const T* const k_row = row + (static_cast<int>(p_.Hq) + h_) * D;
    const uint4 new_k = load_uncached(k_row + column_), k_partner = load_uncached(k_row + partner_);
    const uint4 new_v = load_uncached(k_row + Hkv_ * D + column_);
    uint4 own[kDepthQueries], partners[kDepthQueries];
#pragma unroll
    for (int g = 0; g < kDepthQueries; ++g) {
      const T* const q_row = row + (head_ + (g < queries_ ? g : queries_ - 1)) * D;
      own[g] = load_uncached(q_row + column_);
      partners[g] = load_uncached(q_row + partner_);
    }
    float rotated[N];
    rotate(new_k, k_partner, rotated);
#pragma unroll
    for (int s = 0; s < kLaneKeys; ++s)
      if (key_of(s) == position_) {
        k_[s] = pack<T>(rotated);
        v_[s] = new_v;
      }
    if (first_query_ == 0 && position_ % kKeyStride == first_key_) {
      *reinterpret_cast<uint4*>(k_cache_ + position_ * D) = pack<T>(rotated);
      *reinterpret_cast<uint4*>(v_cache_ + position_ * D) = new_v;
    }
#pragma unroll
    for (int g = 0; g < kDepthQueries; ++g) {
      rotate(own[g], partners[g], q_[g]);
#pragma unroll
      for (int j = 0; j < N; ++j) q_[g][j] *= p_.scale;
    }
  }

  VOX_DEVICE void score_keys(DepthShared<T, L>& shared) const {
#pragma unroll
    for (int s = 0; s < kLaneKeys; ++s) {
      if (s * kKeyStride + warp_ * kKeysPerLoad > position_) break;  // the whole warp
      const int key = key_of(s);
      float values[N] = {};
      if (key <= position_) unpack<T>(k_[s], values);
#pragma unroll
      for (int g = 0; g < kDepthQueries; ++g) {
        float dot = 0;
#pragma unroll
        for (int j = 0; j < N; ++j) dot = fmaf(q_[g][j], values[j], dot);
#pragma unroll
        for (int offset = L / 2; offset; offset /= 2)
          dot += __shfl_xor_sync(kWholeWarp, dot, offset);
        if (lane_ % L == 0) shared.scores[g][key] = dot;
      }
    }
  }

  // Every warp computes the softmax's state for itself, then sums its own keys' values.
  VOX_DEVICE void sum_values(DepthShared<T, L>& shared) {
    constexpr int kScoresPerLane = kMaxDepthKeys<L> / kWarp;
#pragma unroll
    for (int g = 0; g < kDepthQueries; ++g) {
      float scores[kScoresPerLane];
#pragma unroll
      for (int i = 0; i < kScoresPerLane; ++i) {
        const int key = lane_ + i * kWarp;
        scores[i] = key <= position_ ? shared.scores[g][key] : minus_infinity();
      }
      state_[g] = warp_softmax(scores, position_ + 1);
      float acc[N] = {};
#pragma unroll
      for (int s = 0; s < kLaneKeys; ++s) {
        if (const int key = key_of(s); key <= position_) {
          const float weight = expf(shared.scores[g][key] - state_[g].largest);
          float values[N];
          unpack<T>(v_[s], values);
#pragma unroll
          for (int j = 0; j < N; ++j) acc[j] = fmaf(weight, values[j], acc[j]);
        }
      }
#pragma unroll
      for (int j = 0; j < N; ++j) {
#pragma unroll
        for (int offset = kWarp / 2; offset >= L; offset /= 2)
          acc[j] += __shfl_xor_sync(kWholeWarp, acc[j], offset);
        if (lane_ < L) shared.sums[warp_][g][column_ + j] = acc[j];
      }
    }
  }

  VOX_DEVICE void store(const DepthShared<T, L>& shared) const {
    for (int i = threadIdx.x; i < queries_ * D; i += kDepthThreads) {
      const int g = i / D;
      float sum = shared.sums[0][g][i % D], all = state_[0].sum;
#pragma unroll
      for (int w = 1; w < kDepthWarps; ++w) sum += shared.sums[w][g][i % D];
#pragma unroll
      for (int other = 1; other < kDepthQueries; ++other)
        all = g == other ? state_[other].sum : all;
      static_cast<T*>(p_.out)[(b_ * p_.Hq + head_) * D + i] = from_float<T>(sum / all);
    }
  }

 private:
  VOX_DEVICE int key_of(int s) const { return first_key_ + s * kKeyStride; }

  VOX_DEVICE void rotate(uint4 raw, uint4 raw_partner, float (&out)[N]) const {
    float own[N], other[N];
    unpack<T>(raw, own);
    unpack<T>(raw_partner, other);
#pragma unroll
    for (int j = 0; j < N; ++j)
      out[j] = rounded<T>(rotated_low(own[j], other[j], cos_[j], sin_[j]));
  }

  const DepthAttentionParams& p_;
  const int64_t b_;
  const int position_, Hkv_ = static_cast<int>(p_.Hkv);
  const int lane_ = threadIdx.x % kWarp, warp_ = threadIdx.x / kWarp, column_ = lane_ % L * N;
  const bool in_low_ = column_ < kHalf;
  const int partner_ = in_low_ ? column_ + kHalf : column_ - kHalf;
  const int first_key_ = warp_ * kKeysPerLoad + lane_ / L;
  int h_, first_query_, queries_;
  int64_t head_;
  T *k_cache_, *v_cache_;
  uint4 k_[kLaneKeys] = {}, v_[kLaneKeys] = {};
  float cos_[N], sin_[N], q_[kDepthQueries][N];
  SoftmaxState state_[kDepthQueries];
};

// Part `part` of row b. wait() returns true once qkv is complete, or false to give up: then so does
// this. `shared` may be reused for another part right after.
template <typename T, int L, typename Wait>
VOX_DEVICE bool attend_depth(const DepthAttentionParams& p, int part, int64_t b,
                             DepthShared<T, L>& shared, const Wait& wait) {
  DepthWorker<T, L> worker(p, part, b);
  worker.load_older();
  if (!wait()) return false;
  worker.load_new_and_rotate();
  worker.score_keys(shared);
  sync_first<kDepthThreads>();
  worker.sum_values(shared);
  sync_first<kDepthThreads>();
  worker.store(shared);
  return true;
}

template <typename T, int L>
__global__ void __launch_bounds__(kDepthThreads) depth_kernel(DepthAttentionParams p) {
  using Shared = DepthShared<T, L>;
  VOX_SHARED(Shared, shared);
  attend_depth<T, L>(p, blockIdx.x, blockIdx.y, shared, [] {
    let_next_kernel_start();
    wait_for_previous_kernel();
    return true;
  });
}

// A block takes one row and one key/value head, a warp every kPlainDepthWarps-th query head of its
// group.
template <typename T>
__global__ void __launch_bounds__(kPlainDepthWarps* kWarp)
    plain_depth_kernel(DepthAttentionParams p) {
  VOX_SHARED(float[kPlainDepthWarps][kMaxHeadDim], queries);
  VOX_SHARED(float[kPlainDepthWarps][kWarp], weights);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int D = static_cast<int>(p.D), half = D / 2;
  const int64_t b = blockIdx.y, h = blockIdx.x, group = p.Hq / p.Hkv;
  const int64_t cache = (b * p.Hkv + h) * p.K * D;
  T *const k_cache = static_cast<T*>(p.k_cache) + cache, *const v_cache =
                                                             static_cast<T*>(p.v_cache) + cache;
  const T* const row = static_cast<const T*>(p.qkv) + b * (p.Hq + 2 * p.Hkv) * D;
  const float* const table = p.rope_table + p.position * D;
  // Calls store(element, its rotated value) for elements i and i + D / 2 of a head.
  const auto rotate = [&](const T* head, int i, const auto& store) {
    const float low = to_float(load_element_uncached(head + i));
    const float high = to_float(load_element_uncached(head + half + i));
    store(i, from_float<T>(rotated_low(low, high, table[i], table[half + i])));
    store(half + i, from_float<T>(rotated_high(low, high, table[i], table[half + i])));
  };
  let_next_kernel_start();
  wait_for_previous_kernel();
  for (int i = threadIdx.x; i < half; i += blockDim.x)
    rotate(row + (p.Hq + h) * D, i, [&](int column, T key) {
      k_cache[p.position * D + column] = key;
      v_cache[p.position * D + column] =
          load_element_uncached(row + (p.Hq + p.Hkv + h) * D + column);
    });
  __syncthreads();
  for (int64_t head = h * group + warp; head < (h + 1) * group; head += kPlainDepthWarps) {
    for (int i = lane; i < half; i += kWarp)
      rotate(row + head * D, i,
             [&](int column, T query) { queries[warp][column] = to_float(query) * p.scale; });
    attend_row(
        queries[warp], weights[warp], static_cast<int>(p.position), D, k_cache, v_cache,
        [&](int key) { return static_cast<int64_t>(key) * D; },
        [](const T* from) { return to_float(load_element_uncached(from)); },
        static_cast<T*>(p.out) + (b * p.Hq + head) * D);
  }
}

template <typename T>
void launch_depth_attention(const DepthAttentionParams& p, cudaStream_t stream) {
  void (*kernel)(DepthAttentionParams) = plain_depth_kernel<T>;
  int64_t blocks = p.Hkv, threads = kPlainDepthWarps * kWarp;
  const auto use = [&](void (*fast)(DepthAttentionParams)) {
    kernel = fast;
    blocks = depth_blocks_per_row(p);
    threads = kDepthThreads;
  };
  if (p.D == 8 * kVector<T> && p.K <= kMaxDepthKeys<8>) use(depth_kernel<T, 8>);
  if (p.D == 16 * kVector<T> && p.K <= kMaxDepthKeys<16>) use(depth_kernel<T, 16>);
  if constexpr (sizeof(T) == 4)
    if (p.D == 32 * kVector<T> && p.K <= kMaxDepthKeys<32>) use(depth_kernel<T, 32>);
  launch(kernel, {.grid = {blocks, p.B}, .block = threads, .stream = stream}, p);
}

}  // namespace
}  // namespace voxkern::attention
