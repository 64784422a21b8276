// Attention of the codec's transformer, fused with the rotation and the append of new keys and
// values.
//
// A block takes a key/value head of a stream, and kQueries of its queries at a time. Among a
// query's keys, those at position p belong to group p % kGroups of L lanes, each with N elements of
// a row; a group takes kKeys of them at once, with their values. So a whole window of 250 keys and
// values (128 KB) is in flight before the first is used, for the first queries even before the wait
// for the previous kernel: old keys were written by launches before that one, which lets the next
// kernel start after its own wait, so they have ended. New keys are taken from qkv again, and
// written for later steps. At the end the groups are merged in their order. The keys of a group and
// the order of its sums depend on the query's position and the window alone: two queries share
// their keys only if all of them fit into one key block.
//
// Float32, keys and values too.
#pragma once

#include "cuda/attention/head_fragment.cuh"
#include "cuda/attention/online_softmax.cuh"
#include "params/mimi_transformer.h"

namespace voxkern::codec {
namespace {

using attention::SoftmaxState;

constexpr int kAttentionThreads = 512;

// Loads, stores and the rotation of a float32 row.
template <int N, int L>
struct HeadFragment : attention::HeadFragment<float, N, L> {
  using Base = attention::HeadFragment<float, N, L>;
  using Base::column, Base::kSize;
  static VOX_DEVICE void read(const float* row, int lane, int D, float (&out)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize; i += N) {
      float values[N] = {};
      if (column(lane, i) < D) load<N>(row + column(lane, i), values);
#pragma unroll
      for (int j = 0; j < N; ++j) out[i + j] = values[j];
    }
  }
  // An old key or value; allowed before the wait.
  static VOX_DEVICE void read_old(const float* row, int lane, int D, float (&out)[kSize]) {
    Base raw;
    raw.load(row, lane, D);
    raw.to_floats(out);
  }
  static VOX_DEVICE void write(float* row, int lane, int D, const float (&values)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      if (column(lane, i) < D) row[column(lane, i)] = values[i];
  }
  // The rotated row; N elements are in the same half of it.
  static VOX_DEVICE void rotate(const float* row, const float* rotation, int lane, int D,
                                float (&out)[kSize]) {
    const int half = D / 2;
#pragma unroll
    for (int i = 0; i < kSize; i += N) {
      const int at = column(lane, i);
      float own[N] = {}, other[N] = {}, cosine[N] = {}, sine[N] = {};
      if (at < D) {
        load<N>(row + at, own);
        load<N>(row + (at < half ? at + half : at - half), other);
        load<N>(rotation + (at < half ? at : at - half), cosine);
        load<N>(rotation + (at < half ? at + half : at), sine);
      }
#pragma unroll
      for (int j = 0; j < N; ++j)
        out[i + j] = own[j] * cosine[j] + (at < half ? -other[j] : other[j]) * sine[j];
    }
  }
};

// One block's work, step by step.
template <int N, int L, int kKeys, int kQueries>
class AttentionWorker {
  using Fragment = HeadFragment<N, L>;
  static constexpr int kSize = Fragment::kSize, kGroups = kAttentionThreads / L;

 public:
  VOX_DEVICE AttentionWorker(const MimiTransformerParams& p, int64_t layer, const float* qkv,
                             float* out)
      : p_(p), out_(out), b_(blockIdx.x / p.Hkv), position_(__ldcg(p.positions + b_)) {
    const int64_t ring = ((b_ * p.L + layer) * p.Hkv + h_) * p.capacity * D_;
    keys_ = p.keys + ring;
    values_ = p.values + ring;
    rows_ = qkv + b_ * T_ * stride_;
    rotations_ = p.rotations + b_ * T_ * D_;
  }

  VOX_DEVICE void run(float* sums) {
    select(0);
    load_old(0);
    bool loaded = true;
    wait_for_previous_kernel();
    let_next_kernel_start();
    for (int t = 0; t < T_; t += kQueries)
      for (int g = 0; g < static_cast<int>(p_.Hq / p_.Hkv); ++g) {
        select(t);
        load_queries(g);
#pragma unroll
        for (int i = 0; i < kQueries; ++i) state_[i] = SoftmaxState::empty();
        for (int block = 0; block * kGroups < count_; block += kKeys) {
          if (!loaded) load_old(block);
          loaded = false;
          load_new(block, g);
          float scores[kQueries][kKeys];
          unsigned seen[kQueries] = {};  // a bit a key
          score_keys(block, scores, seen);
#pragma unroll
          for (int j = 0; j < kQueries; ++j)
            if (seen[j]) add_values(j, scores[j], seen[j]);
        }
        merge_groups(g, sums);
      }
  }

 private:
  // The queries t_ .. t_ + queries_ - 1. Their keys are counted from the first that t_ sees on.
  VOX_DEVICE void select(int t) {
    t_ = t;
    queries_ = T_ - t < kQueries ? T_ - t : kQueries;
    first_seen_ = position_ + t - static_cast<int>(p_.window) + 1;
    if (first_seen_ < 0) first_seen_ = 0;
    old_ = static_cast<int>(position_ - first_seen_);
    count_ = old_ + t + queries_;
    first_key_ = (group_ - static_cast<int>(first_seen_ % kGroups) + kGroups) % kGroups;
#pragma unroll
    for (int i = 0; i < kQueries; ++i)
#pragma unroll
      for (int j = 0; j < kSize; ++j) acc_[i][j] = 0;
  }
  // Key i of this group's in a key block.
  VOX_DEVICE int key_of(int block, int i) const { return first_key_ + (block + i) * kGroups; }

  // The key block's keys that are in the ring.
  VOX_DEVICE void load_old(int block) {
    const int capacity = static_cast<int>(p_.capacity);
    const int slot = static_cast<int>(first_seen_ % capacity);
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const int key = key_of(block, i);
      if (key >= old_) continue;
      const int64_t at =
          static_cast<int64_t>(slot + key < capacity ? slot + key : slot + key - capacity) * D_;
      Fragment::read_old(keys_ + at, lane_, D_, k_[i]);
      Fragment::read_old(values_ + at, lane_, D_, v_[i]);
    }
  }

  // The key block's keys that are in qkv, into the ring too if no earlier query has done that.
  VOX_DEVICE void load_new(int block, int g) {
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const int key = key_of(block, i), row = key - old_;
      if (row < 0 || key >= count_) continue;
      const float* const new_key = rows_ + row * stride_ + (p_.Hq + h_) * D_;
      Fragment::rotate(new_key, rotations_ + static_cast<int64_t>(row) * D_, lane_, D_, k_[i]);
      Fragment::read(new_key + p_.Hkv * D_, lane_, D_, v_[i]);
      if (row < t_ || g > 0) continue;
      const int64_t at = (position_ + row) % p_.capacity * D_;
      Fragment::write(keys_ + at, lane_, D_, k_[i]);
      Fragment::write(values_ + at, lane_, D_, v_[i]);
    }
  }

  VOX_DEVICE int head(int g) const { return h_ * static_cast<int>(p_.Hq / p_.Hkv) + g; }

  VOX_DEVICE void load_queries(int g) {
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      const int row = i < queries_ ? t_ + i : t_;
      Fragment::rotate(rows_ + row * stride_ + head(g) * D_,
                       rotations_ + static_cast<int64_t>(row) * D_, lane_, D_, q_[i]);
#pragma unroll
      for (int j = 0; j < kSize; ++j) q_[i][j] *= p_.scale;
    }
  }

  VOX_DEVICE void score_keys(int block, float (&scores)[kQueries][kKeys],
                             unsigned (&seen)[kQueries]) const {
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const int key = key_of(block, i);
#pragma unroll
      for (int j = 0; j < kQueries; ++j) {
        const int distance = old_ + t_ + j - key;
        if (distance >= 0 && distance < static_cast<int>(p_.window) && key < count_ && j < queries_)
          seen[j] |= 1u << i;
        float dot = 0;
        if (key < count_)
#pragma unroll
          for (int c = 0; c < kSize; ++c) dot = fmaf(q_[j][c], k_[i][c], dot);
#pragma unroll
        for (int offset = L / 2; offset; offset /= 2)
          dot += __shfl_xor_sync(kWholeWarp, dot, offset);
        scores[j][i] = dot;
      }
    }
  }

  VOX_DEVICE void add_values(int j, const float (&scores)[kKeys], unsigned seen) {
    SoftmaxState& state = state_[j];
    float largest = state.largest;
#pragma unroll
    for (int i = 0; i < kKeys; ++i)
      if (seen >> i & 1) largest = scores[i] > largest ? scores[i] : largest;
    const float factor = state.raise(largest);
    state.sum *= factor;
#pragma unroll
    for (int c = 0; c < kSize; ++c) acc_[j][c] *= factor;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      if (!(seen >> i & 1)) continue;
      const float weight = expf(scores[i] - largest);
      state.sum += weight;
#pragma unroll
      for (int c = 0; c < kSize; ++c) acc_[j][c] = fmaf(weight, v_[i][c], acc_[j][c]);
    }
  }

  // By way of [kGroups, kQueries, D] `sums` to the output. Two barriers.
  VOX_DEVICE void merge_groups(int g, float* sums) {
    VOX_SHARED(SoftmaxState[kGroups][kQueries], states);
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      Fragment::write(sums + (group_ * kQueries + i) * D_, lane_, D_, acc_[i]);
      if (threadIdx.x % L == 0) states[group_][i] = state_[i];
    }
    __syncthreads();
    for (int item = threadIdx.x; item < queries_ * D_; item += kAttentionThreads) {
      const int i = item / D_, column = item % D_;
      float total;
      const SoftmaxState merged = attention::merge_parts<kGroups>(
          [&](int of) { return states[of][i]; },
          [&](int of) { return sums[(of * kQueries + i) * D_ + column]; }, total);
      out_[((b_ * T_ + t_ + i) * p_.Hq + head(g)) * D_ + column] = total / merged.sum;
    }
    __syncthreads();
  }

  const MimiTransformerParams& p_;
  float *const out_, *keys_, *values_;
  const int64_t b_, position_, stride_ = p_.qkv.N;
  const float *rows_, *rotations_;
  const int lane_ = threadIdx.x % kWarp, group_ = threadIdx.x / L;
  const int h_ = static_cast<int>(blockIdx.x % p_.Hkv);
  const int D_ = static_cast<int>(p_.D), T_ = static_cast<int>(p_.T);
  int t_, queries_, old_, count_, first_key_;  // of the selected queries; old: keys in the ring
  int64_t first_seen_;
  float k_[kKeys][kSize], v_[kKeys][kSize], q_[kQueries][kSize], acc_[kQueries][kSize];
  SoftmaxState state_[kQueries];
};

template <int N, int L, int kKeys, int kQueries>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_kernel(MimiTransformerParams p, int64_t layer, const float* qkv, float* out) {
  VOX_DYNAMIC_SHARED(float, sums);  // [kGroups, kQueries, D]
  AttentionWorker<N, L, kKeys, kQueries>(p, layer, qkv, out).run(sums);
}

inline void launch_attention(const MimiTransformerParams& p, int64_t layer, const float* qkv,
                             float* out, cudaStream_t stream) {
  constexpr int kLanesPerRow = 16, kKeys = 8, kKeyBlock = kAttentionThreads / kLanesPerRow * kKeys;
  const bool vectors = p.D == 4 * kLanesPerRow && is_vector_aligned<float>(p.keys, p.D) &&
                       is_vector_aligned<float>(p.values, p.D);
  const auto run = [&](auto kernel, int lanes, int queries) {
    launch(kernel,
           {.grid = dim3(static_cast<unsigned>(p.B * p.Hkv)),
            .block = dim3(kAttentionThreads),
            .shared_bytes = kAttentionThreads / lanes * queries * p.D * sizeof(float),
            .stream = stream,
            .overlaps_previous = true},
           p, layer, qkv, out);
  };
  if (vectors && p.window < kKeyBlock)
    run(attention_kernel<4, kLanesPerRow, kKeys, 2>, kLanesPerRow, 2);
  else if (vectors)
    run(attention_kernel<4, kLanesPerRow, kKeys / 2, 1>, kLanesPerRow, 1);
  else
    run(attention_kernel<1, kWarp, 2, 1>, kWarp, 1);
}

}  // namespace
}  // namespace voxkern::codec
