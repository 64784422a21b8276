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

#include "cuda/attention/online_softmax.cuh"
#include "params/mimi_transformer.h"

namespace voxkern::codec {
namespace {

constexpr int kAttentionThreads = 512;

// A lane's part of a row of D elements: N consecutive ones of one chunk, or of kSize chunks that
// are L lanes apart.
template <int N, int L>
struct HeadFragment {
  static constexpr int kSize = N == 1 ? attention::kMaxHeadDim / L : N;
  static VOX_DEVICE int column(int lane, int i) { return (i / N * L + lane % L) * N + i % N; }
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
    if constexpr (N == 1) {
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        out[i] = column(lane, i) < D ? __ldcg(row + column(lane, i)) : 0.0f;
    } else {
      unpack<float>(load_uncached(row + column(lane, 0)), out);
    }
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

// One function: as steps of a class it spills registers (bench/LOG.md).
template <int N, int L, int kKeys, int kQueries>
__global__ void __launch_bounds__(kAttentionThreads)
    attend_kernel(MimiTransformerParams p, int64_t layer, const float* qkv, float* out) {
  using Own = HeadFragment<N, L>;
  constexpr int kSize = Own::kSize, kGroups = kAttentionThreads / L;
  VOX_DYNAMIC_SHARED(float, sums);  // [kGroups, kQueries, D]
  VOX_SHARED(attention::SoftmaxState[kGroups][kQueries], states);
  const float lowest = __uint_as_float(0xff800000u);
  const int lane = threadIdx.x % kWarp, mine = threadIdx.x / L;
  const int h = static_cast<int>(blockIdx.x % p.Hkv), D = static_cast<int>(p.D);
  const int64_t b = blockIdx.x / p.Hkv, position = __ldcg(p.positions + b);
  const int T = static_cast<int>(p.T), window = static_cast<int>(p.window);
  const int capacity = static_cast<int>(p.capacity), per_key = static_cast<int>(p.Hq / p.Hkv);
  const int64_t ring = ((b * p.L + layer) * p.Hkv + h) * p.capacity * D, stride = p.qkv.N;
  float *const keys = p.keys + ring, *const values = p.values + ring;
  const float* const rows = qkv + b * T * stride;
  const float* const rotations = p.rotations + b * T * D;

  // Keys from the first that query t sees on are counted from 0.
  const auto first_seen = [&](int64_t t) {
    const int64_t at = position + t - window + 1;
    return at > 0 ? at : 0;
  };
  float k[kKeys][kSize], v[kKeys][kSize];
  // Loads the key block's keys that are in the ring.
  const auto read_old = [&](int t, int key_block) {
    const int64_t from = first_seen(t);
    const int count = static_cast<int>(position - from), slot = static_cast<int>(from % capacity);
    const int own = (mine - static_cast<int>(from % kGroups) + kGroups) % kGroups;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const int key = own + (key_block + i) * kGroups;
      if (key >= count) continue;
      const int64_t at =
          static_cast<int64_t>(slot + key < capacity ? slot + key : slot + key - capacity) * D;
      Own::read_old(keys + at, lane, D, k[i]);
      Own::read_old(values + at, lane, D, v[i]);
    }
  };
  read_old(0, 0);
  bool loaded = true;
  wait_for_previous_kernel();
  let_next_kernel_start();

  for (int t = 0; t < T; t += kQueries)
    for (int g = 0; g < per_key; ++g) {
      const int head = h * per_key + g, queries = T - t < kQueries ? T - t : kQueries;
      const int64_t from = first_seen(t);
      const int old = static_cast<int>(position - from), count = old + t + queries;
      const int own = (mine - static_cast<int>(from % kGroups) + kGroups) % kGroups;
      float q[kQueries][kSize];
#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
        const int row = i < queries ? t + i : t;
        Own::rotate(rows + row * stride + head * D, rotations + static_cast<int64_t>(row) * D, lane,
                    D, q[i]);
#pragma unroll
        for (int j = 0; j < kSize; ++j) q[i][j] *= p.scale;
      }
      attention::SoftmaxState state[kQueries];
      float acc[kQueries][kSize] = {};
#pragma unroll
      for (int i = 0; i < kQueries; ++i) state[i] = {lowest, 0};

      for (int key_block = 0; key_block * kGroups < count; key_block += kKeys) {
        if (!loaded) read_old(t, key_block);
        loaded = false;
#pragma unroll
        for (int i = 0; i < kKeys; ++i) {
          const int key = own + (key_block + i) * kGroups, row = key - old;
          if (row < 0 || key >= count) continue;
          const float* const new_key = rows + row * stride + (p.Hq + h) * D;
          Own::rotate(new_key, rotations + static_cast<int64_t>(row) * D, lane, D, k[i]);
          Own::read(new_key + p.Hkv * D, lane, D, v[i]);
          if (row < t || g > 0) continue;  // written before
          const int64_t at = (position + row) % capacity * D;
          Own::write(keys + at, lane, D, k[i]);
          Own::write(values + at, lane, D, v[i]);
        }
        float weights[kQueries][kKeys];
        unsigned seen[kQueries] = {};  // a bit for each key
#pragma unroll
        for (int i = 0; i < kKeys; ++i) {
          const int key = own + (key_block + i) * kGroups;
#pragma unroll
          for (int j = 0; j < kQueries; ++j) {
            const int distance = old + t + j - key;
            if (distance >= 0 && distance < window && key < count && j < queries)
              seen[j] |= 1u << i;
            float dot = 0;
            if (key < count)
#pragma unroll
              for (int c = 0; c < kSize; ++c) dot = fmaf(q[j][c], k[i][c], dot);
#pragma unroll
            for (int offset = L / 2; offset; offset /= 2)
              dot += __shfl_xor_sync(kWholeWarp, dot, offset);
            weights[j][i] = dot;
          }
        }
#pragma unroll
        for (int j = 0; j < kQueries; ++j) {
          if (!seen[j]) continue;
          float largest = state[j].largest;
#pragma unroll
          for (int i = 0; i < kKeys; ++i)
            if (seen[j] >> i & 1) largest = weights[j][i] > largest ? weights[j][i] : largest;
          const float factor = expf(state[j].largest - largest);
          state[j].largest = largest;
          state[j].sum *= factor;
#pragma unroll
          for (int c = 0; c < kSize; ++c) acc[j][c] *= factor;
#pragma unroll
          for (int i = 0; i < kKeys; ++i) {
            if (!(seen[j] >> i & 1)) continue;
            const float weight = expf(weights[j][i] - largest);
            state[j].sum += weight;
#pragma unroll
            for (int c = 0; c < kSize; ++c) acc[j][c] = fmaf(weight, v[i][c], acc[j][c]);
          }
        }
      }

#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
        Own::write(sums + (mine * kQueries + i) * D, lane, D, acc[i]);
        if (threadIdx.x % L == 0) states[mine][i] = state[i];
      }
      __syncthreads();
      for (int item = threadIdx.x; item < queries * D; item += kAttentionThreads) {
        const int i = item / D, column = item % D;
        float largest = lowest, sum = 0, total = 0;
        for (int of = 0; of < kGroups; ++of) largest = fmaxf(largest, states[of][i].largest);
        for (int of = 0; of < kGroups; ++of) {
          if (states[of][i].sum == 0) continue;
          const float factor = expf(states[of][i].largest - largest);
          sum = fmaf(states[of][i].sum, factor, sum);
          total = fmaf(sums[(of * kQueries + i) * D + column], factor, total);
        }
        out[((b * T + t + i) * p.Hq + head) * D + column] = total / sum;
      }
      __syncthreads();
    }
}

template <int N, int L, int kKeys, int kQueries>
void launch_attention_of(const MimiTransformerParams& p, int64_t layer, const float* qkv,
                         float* out, cudaStream_t stream) {
  launch(attend_kernel<N, L, kKeys, kQueries>,
         {.grid = dim3(static_cast<unsigned>(p.B * p.Hkv)),
          .block = dim3(kAttentionThreads),
          .shared_bytes = kAttentionThreads / L * kQueries * p.D * sizeof(float),
          .stream = stream,
          .overlaps_previous = true},
         p, layer, qkv, out);
}

inline void launch_attention(const MimiTransformerParams& p, int64_t layer, const float* qkv,
                             float* out, cudaStream_t stream) {
  constexpr int kLanes = 16, kKeys = 8, kKeyBlock = kAttentionThreads / kLanes * kKeys;
  const bool vectors = p.D == 4 * kLanes && is_vector_aligned<float>(p.keys, p.D) &&
                       is_vector_aligned<float>(p.values, p.D);
  if (vectors && p.window < kKeyBlock)
    launch_attention_of<4, kLanes, kKeys, 2>(p, layer, qkv, out, stream);
  else if (vectors)
    launch_attention_of<4, kLanes, kKeys / 2, 1>(p, layer, qkv, out, stream);
  else
    launch_attention_of<1, kWarp, 2, 1>(p, layer, qkv, out, stream);
}

}  // namespace
}  // namespace voxkern::codec
