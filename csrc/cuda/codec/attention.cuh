// Sliding-window attention of the codec's transformer over ring buffers of keys and values, fused
// with the rotation and the append of new keys; and the kernel that computes the table of
// rotations.
//
// A block takes one key/value head of a stream, and kQueries of its queries at a time. It has
// kGroups groups of L lanes; a lane holds a HeadFragment of a row. The key at position p
// belongs to group p % kGroups. A group loads kKeys keys and their values at once; those of all
// groups are a key block.
//
// So a whole window of 250 keys and values (128 KB) is in flight before the first is used. The
// first queries' old keys, those in the ring, are loaded even before the wait for the previous
// kernel. That is safe: the previous kernel lets this one start only after its own wait, and by
// then the launches that wrote the old keys have ended. New keys are not read back from the ring:
// each query takes them from qkv and rotates them, and they are written for later steps.
//
// At the end the groups are merged in order. The keys of a group and the order of its sums depend
// only on the query's position and the window, not on the step's other queries. So two queries
// share loaded keys only if the keys of both fit into one key block.
//
// Everything is float32, keys and values included.
#pragma once

#include "cuda/attention/online_softmax.cuh"
#include "params/mimi_transformer.h"

namespace voxkern::codec {
namespace {

constexpr int kAttentionThreads = 512;

// Sine and cosine within 1e-7 of torch's. The angle is reduced to -pi / 4 .. pi / 4 in float64,
// then evaluated with the polynomials of Cephes (https://www.netlib.org/cephes). sinf() would need
// a stack frame.
VOX_DEVICE void sine_and_cosine(float angle, float& sine, float& cosine) {
  const double quarters = rint(static_cast<double>(angle) * 0.63661977236758134308);
  const float r =
      static_cast<float>(fma(quarters, -1.57079632679489661923, static_cast<double>(angle)));
  const float s = r * r;
  float odd = fmaf(s, -1.9515295891e-4f, 8.3321608736e-3f);
  odd = fmaf(fmaf(s, odd, -1.6666654611e-1f), s * r, r);
  float even = fmaf(s, 2.443315711809948e-5f, -1.388731625493765e-3f);
  even = fmaf(fmaf(s, even, 4.166664568298827e-2f), s * s, fmaf(s, -0.5f, 1.0f));
  const int quarter = static_cast<int>(static_cast<int64_t>(quarters) & 3);
  sine = quarter % 2 ? even : odd;
  cosine = quarter % 2 ? odd : even;
  if (quarter >= 2) sine = -sine;
  if (quarter == 1 || quarter == 2) cosine = -cosine;
}

// Computes the table of rotations, [B T, D], cosines | sines: one thread per step and angle.
__global__ void rotations_kernel(MimiTransformerParams p, const float* frequencies, float* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t half = p.D / 2, row = i / half, f = i % half;
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (row >= p.B * p.T) return;
  const float angle = static_cast<float>(p.positions[row / p.T] + row % p.T) * frequencies[f];
  sine_and_cosine(angle, out[row * p.D + half + f], out[row * p.D + f]);
}

// A lane's elements of a row of D: for N > 1, N consecutive ones (D = N L); for N == 1, every L-th
// one, for any D up to kMaxHeadDim.
template <int N, int L>
struct HeadFragment {
  static constexpr int kElements = N == 1 ? attention::kMaxHeadDim / L : N;
  static VOX_DEVICE int column(int lane, int i) { return (i / N * L + lane % L) * N + i % N; }
  static VOX_DEVICE void read(const float* row, int lane, int D, float (&out)[kElements]) {
#pragma unroll
    for (int i = 0; i < kElements; i += N) {
      float values[N] = {};
      if (column(lane, i) < D) load<N>(row + column(lane, i), values);
#pragma unroll
      for (int j = 0; j < N; ++j) out[i + j] = values[j];
    }
  }
  // Reads an old key or value; allowed before the wait for the previous kernel.
  static VOX_DEVICE void read_old(const float* row, int lane, int D, float (&out)[kElements]) {
    if constexpr (N == 1) {
#pragma unroll
      for (int i = 0; i < kElements; ++i)
        out[i] = column(lane, i) < D ? __ldcg(row + column(lane, i)) : 0.0f;
    } else {
      unpack<float>(load_uncached(row + column(lane, 0)), out);
    }
  }
  static VOX_DEVICE void write(float* row, int lane, int D, const float (&values)[kElements]) {
#pragma unroll
    for (int i = 0; i < kElements; ++i)
      if (column(lane, i) < D) row[column(lane, i)] = values[i];
  }
  // Reads and rotates a row. A lane's N consecutive elements lie in the same half of it.
  static VOX_DEVICE void rotate(const float* row, const float* rotation, int lane, int D,
                                float (&out)[kElements]) {
    const int half = D / 2;
#pragma unroll
    for (int i = 0; i < kElements; i += N) {
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

// Kept as one function: split into methods of a class, it spills registers (bench/LOG.md).
template <int N, int L, int kKeys, int kQueries>
__global__ void __launch_bounds__(kAttentionThreads)
    attend_kernel(MimiTransformerParams p, int64_t layer, const float* qkv, float* out) {
  using Own = HeadFragment<N, L>;
  constexpr int kElements = Own::kElements, kGroups = kAttentionThreads / L;
  VOX_DYNAMIC_SHARED(float, sums);  // [kGroups, kQueries, D]
  VOX_SHARED(attention::SoftmaxState[kGroups][kQueries], states);
  const int lane = threadIdx.x % kWarp, mine = threadIdx.x / L;
  const int h = static_cast<int>(blockIdx.x % p.Hkv), D = static_cast<int>(p.D);
  const int64_t b = blockIdx.x / p.Hkv, position = __ldcg(p.positions + b);
  const int T = static_cast<int>(p.T), window = static_cast<int>(p.window);
  const int capacity = static_cast<int>(p.capacity), per_key = static_cast<int>(p.Hq / p.Hkv);
  const int64_t ring = ((b * p.L + layer) * p.Hkv + h) * p.capacity * D, stride = p.qkv.N;
  float *const keys = p.keys + ring, *const values = p.values + ring;
  const float* const rows = qkv + b * T * stride;
  const float* const rotations = p.rotations + b * T * D;

  // The position of the first key that query t sees. Key indices below count from there.
  const auto first_seen = [&](int64_t t) {
    const int64_t at = position + t - window + 1;
    return at > 0 ? at : 0;
  };
  float k[kKeys][kElements], v[kKeys][kElements];
  // Loads this key block's old keys and values, which are in the ring.
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
      float q[kQueries][kElements];
#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
        const int row = i < queries ? t + i : t;
        Own::rotate(rows + row * stride + head * D, rotations + static_cast<int64_t>(row) * D, lane,
                    D, q[i]);
#pragma unroll
        for (int j = 0; j < kElements; ++j) q[i][j] *= p.scale;
      }
      attention::SoftmaxState state[kQueries];
      float acc[kQueries][kElements] = {};
#pragma unroll
      for (int i = 0; i < kQueries; ++i) state[i] = attention::SoftmaxState::empty();

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
          if (row < t || g > 0) continue;  // already written
          const int64_t at = (position + row) % capacity * D;
          Own::write(keys + at, lane, D, k[i]);
          Own::write(values + at, lane, D, v[i]);
        }
        float weights[kQueries][kKeys];
        unsigned seen[kQueries] = {};  // one bit per key
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
              for (int c = 0; c < kElements; ++c) dot = fmaf(q[j][c], k[i][c], dot);
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
          for (int c = 0; c < kElements; ++c) acc[j][c] *= factor;
#pragma unroll
          for (int i = 0; i < kKeys; ++i) {
            if (!(seen[j] >> i & 1)) continue;
            const float weight = expf(weights[j][i] - largest);
            state[j].sum += weight;
#pragma unroll
            for (int c = 0; c < kElements; ++c) acc[j][c] = fmaf(weight, v[i][c], acc[j][c]);
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
        float total;
        const attention::SoftmaxState merged = attention::merge_parts<kGroups>(
            [&](int group) { return states[group][i]; },
            [&](int group) { return sums[(group * kQueries + i) * D + column]; }, total);
        out[((b * T + t + i) * p.Hq + head) * D + column] = total / merged.sum;
      }
      __syncthreads();
    }
}

template <int N, int L, int kKeys, int kQueries>
void launch_attention_of(const MimiTransformerParams& p, int64_t layer, const float* qkv,
                         float* out, cudaStream_t stream) {
  launch(attend_kernel<N, L, kKeys, kQueries>,
         {.grid = p.B * p.Hkv,
          .block = kAttentionThreads,
          .shared_bytes = kAttentionThreads / L * kQueries * p.D * sizeof(float),
          .stream = stream},
         p, layer, qkv, out);
}

inline void launch_attention(const MimiTransformerParams& p, int64_t layer, const float* qkv,
                             float* out, cudaStream_t stream) {
  constexpr int kLanes = 16, kMaxKeys = 8, kWindow = kAttentionThreads / kLanes * kMaxKeys;
  const bool vectors = p.D == 4 * kLanes && is_vector_aligned<float>(p.keys, p.D) &&
                       is_vector_aligned<float>(p.values, p.D);
  if (vectors && p.window < kWindow)
    launch_attention_of<4, kLanes, kMaxKeys, 2>(p, layer, qkv, out, stream);
  else if (vectors)
    launch_attention_of<4, kLanes, kMaxKeys / 2, 1>(p, layer, qkv, out, stream);
  else
    launch_attention_of<1, kWarp, 2, 1>(p, layer, qkv, out, stream);
}

}  // namespace
}  // namespace voxkern::codec
