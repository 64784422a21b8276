#include "common.cuh"
#include "elementwise.cuh"
#include "ops.cuh"

// append_kv and decode_attention of one position for keys that a block holds in its registers: the
// depth decoder's, whose cache lives for one call.
//
// A block takes one row and one key/value head, for up to kQueries query heads of its group. L
// lanes hold a key's row, 16 bytes each; a lane has kSteps keys and their values, all of which it
// asks for at once, before the wait for the kernel in front. Every lane turns its own part of the
// queries; the lanes of the new key take that and its value from qkv, and write them to the cache.
// Float32 throughout, queries and keys rounded where append_kv stores them, the result once.
//
// Floor: latency. For CSM 2 blocks a row read 8 KB each at most. Behind the wait there are one read
// of qkv, 4 shuffles, a barrier, a softmax of 10 shuffles, a barrier and a store: about 1 us.
namespace voxkern {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kQueries = 4;
constexpr int kSteps = 4;

template <typename T, int L>
__global__ void __launch_bounds__(kThreads) depth_attention_kernel(DepthAttentionParams p) {
  constexpr int N = kVector<T>, D = L * N, kHalf = D / 2;
  constexpr int kRows = kWarp / L, kKeys = kSteps * kWarps * kRows;
  VOX_SHARED(float[kQueries][kKeys], scores);
  VOX_SHARED(float[kWarps][kQueries][D], sums);
  const int group = static_cast<int>(p.Hq / p.Hkv), parts = (group + kQueries - 1) / kQueries;
  const int h = blockIdx.x / parts, first_query = blockIdx.x % parts * kQueries;
  const int queries = group - first_query < kQueries ? group - first_query : kQueries;
  const int64_t b = blockIdx.y, head = static_cast<int64_t>(h) * group + first_query;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int position = static_cast<int>(p.position), column = lane % L * N;
  const bool in_low = column < kHalf;
  const int partner = in_low ? column + kHalf : column - kHalf;
  const auto key_of = [&](int step) { return (step * kWarps + warp) * kRows + lane / L; };
  const int64_t cache = (b * p.Hkv + h) * p.K * D + column;
  T* const k_cache = static_cast<T*>(p.k_cache) + cache;
  T* const v_cache = static_cast<T*>(p.v_cache) + cache;

  // The cache's rows were complete when this kernel was launched, but for the new one.
  uint4 k[kSteps], v[kSteps];
#pragma unroll
  for (int s = 0; s < kSteps; ++s)
    if (key_of(s) < position) {
      k[s] = load_fresh(k_cache + key_of(s) * D);
      v[s] = load_fresh(v_cache + key_of(s) * D);
    }
  float cos[N], sin[N];
  const float* const table = p.rope_table + p.position * D + (in_low ? column : partner);
#pragma unroll
  for (int j = 0; j < N; ++j) cos[j] = table[j], sin[j] = table[kHalf + j];
  let_next_kernel_start();
  wait_for_previous_kernel();

  const T* const row = static_cast<const T*>(p.qkv) + b * (p.Hq + 2 * p.Hkv) * D;
  // All reads under no condition and before any is used: they take the time of one. Those of heads
  // past the last are the last's, which is not used.
  const T* const k_row = row + (p.Hq + h) * D;
  const uint4 new_k = load_fresh(k_row + column), k_partner = load_fresh(k_row + partner);
  const uint4 new_v = load_fresh(k_row + p.Hkv * D + column);
  uint4 mine[kQueries], partners[kQueries];
#pragma unroll
  for (int g = 0; g < kQueries; ++g) {
    const T* const q_row = row + (head + (g < queries ? g : queries - 1)) * D;
    mine[g] = load_fresh(q_row + column);
    partners[g] = load_fresh(q_row + partner);
  }
  const auto turn = [&](uint4 raw, uint4 raw_partner, float (&out)[N]) {
    float own[N], other[N];
    unpack<T>(raw, own);
    unpack<T>(raw_partner, other);
#pragma unroll
    for (int j = 0; j < N; ++j)
      out[j] = rounded<T>(in_low ? rotated_low(own[j], other[j], cos[j], sin[j])
                                 : rotated_high(other[j], own[j], cos[j], sin[j]));
  };
#pragma unroll
  for (int s = 0; s < kSteps; ++s)
    if (key_of(s) == position) {
      float turned[N];
      turn(new_k, k_partner, turned);
      k[s] = pack<T>(turned);
      v[s] = new_v;
      if (first_query == 0) {
        *reinterpret_cast<uint4*>(k_cache + p.position * D) = k[s];
        *reinterpret_cast<uint4*>(v_cache + p.position * D) = v[s];
      }
    }
  float q[kQueries][N];
#pragma unroll
  for (int g = 0; g < kQueries; ++g) {
    turn(mine[g], partners[g], q[g]);
#pragma unroll
    for (int j = 0; j < N; ++j) q[g][j] *= p.scale;
  }

#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    if ((s * kWarps + warp) * kRows > position) break;  // the whole warp
    float values[N] = {};
    if (key_of(s) <= position) unpack<T>(k[s], values);
#pragma unroll
    for (int g = 0; g < kQueries; ++g) {
      if (g >= queries) break;
      float dot = 0;
#pragma unroll
      for (int j = 0; j < N; ++j) dot = fmaf(q[g][j], values[j], dot);
#pragma unroll
      for (int offset = L / 2; offset; offset /= 2) dot += __shfl_xor_sync(kWholeWarp, dot, offset);
      if (lane % L == 0) scores[g][key_of(s)] = dot;
    }
  }
  __syncthreads();

  // Each warp finds out for itself what divides the weights.
  const float lowest = __uint_as_float(0xff800000u);
  float largest[kQueries], total[kQueries];
#pragma unroll
  for (int g = 0; g < kQueries; ++g) {
    if (g >= queries) break;
    largest[g] = lowest;
    for (int key = lane; key <= position; key += kWarp)
      largest[g] = fmaxf(largest[g], scores[g][key]);
    largest[g] = warp_reduce(largest[g], Max());
    total[g] = 0;
    for (int key = lane; key <= position; key += kWarp)
      total[g] += expf(scores[g][key] - largest[g]);
    total[g] = warp_reduce(total[g], Add());
  }
#pragma unroll
  for (int g = 0; g < kQueries; ++g) {
    if (g >= queries) break;
    float acc[N] = {};
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (key_of(s) <= position) {
        const float weight = expf(scores[g][key_of(s)] - largest[g]);
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
  __syncthreads();
#pragma unroll
  for (int g = 0; g < kQueries; ++g) {
    if (g >= queries) break;
    for (int i = threadIdx.x; i < D; i += kThreads) {
      float sum = sums[0][g][i];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) sum += sums[w][g][i];
      static_cast<T*>(p.out)[(b * p.Hq + head + g) * D + i] = from_float<T>(sum / total[g]);
    }
  }
}

template <typename T>
void (*kernel_for(int64_t D))(DepthAttentionParams) {
  if (D == 8 * kVector<T>) return depth_attention_kernel<T, 8>;
  if (D == 16 * kVector<T>) return depth_attention_kernel<T, 16>;
  if constexpr (sizeof(T) == 4)
    if (D == 32 * kVector<T>) return depth_attention_kernel<T, 32>;
  return nullptr;
}

}  // namespace

bool fits(const DepthAttentionParams& p) {
  const bool f32 = p.dtype == Dtype::f32;
  if (!(f32 ? kernel_for<float>(p.D) : kernel_for<bf16>(p.D))) return false;
  const int64_t lanes = p.D / (f32 ? kVector<float> : kVector<bf16>);
  return p.K <= kSteps * kWarps * (kWarp / lanes) && p.B <= 65535;
}

void depth_attention(const DepthAttentionParams& p, cudaStream_t stream) {
  launch(p.dtype == Dtype::f32 ? kernel_for<float>(p.D) : kernel_for<bf16>(p.D),
         {.grid = dim3(static_cast<unsigned>(p.Hkv * divide_up(p.Hq / p.Hkv, kQueries)),
                       static_cast<unsigned>(p.B)),
          .block = dim3(kThreads),
          .stream = stream,
          .overlaps_previous = true},
         p);
}

}  // namespace voxkern
