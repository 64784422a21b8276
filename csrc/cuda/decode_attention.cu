#include "../decode_attention.h"
#include "common.cuh"

// A block takes kSplit keys of one sequence and one key/value head, for up to kQueries query heads
// of its group: keys and values are read once for all of them. A warp takes kWarp of the keys by
// itself. L lanes hold a key's row, N elements (16 bytes) each, so a warp reads 32 / L rows at
// once, and kFlight such reads are under way before the first is used; values are asked for before
// the softmax of the scores. Then the block's warps are put together, and a second kernel puts
// together the splits of a sequence. Rows whose width is no power of two of vectors go element by
// element.
//
// Float32 throughout, the query scaled in float32 first, the result rounded when it is stored.
// Splits have a fixed size and begin at multiples of it: neither batch nor pages change a result.
//
// Floor: 2 L Hkv D elements a sequence over 3.35 TB/s: 2,048 keys of CSM's backbone 4.2 MB a layer,
// 1.25 us a sequence on an H100. Blocks read 32 KB each (D = 64, bf16), 128 of them at 2,048 keys
// and batch 1; the partial results add 6 % (4 D + 2 floats a split and head, written and read).
namespace voxkern {
namespace {

constexpr int kWarps = 4;
constexpr int kSplit = kWarps * kWarp;
constexpr int kQueries = 4;
constexpr int kFlight = 8;
constexpr int kMaxElementwise = 256;  // head width where rows do not go in vectors

// Where splits leave their results.
struct Partials {
  int64_t splits;  // a sequence's room
  float* sums;     // [B, Hq, splits, D], unnormalised
  float* states;   // [B, Hq, splits, 2], largest score and sum of weights
};

// What a lane holds of a row of D elements: N in a row, from column N lane on, of one chunk, or
// of kChunks that are L lanes apart.
template <typename T, int N, int L>
struct Slice {
  static constexpr int kChunks = N == 1 ? kMaxElementwise / L : 1;
  static constexpr int kSize = N * kChunks;
  static __device__ __forceinline__ int column(int lane, int i) {
    return (i / N * L + lane % L) * N + i % N;
  }
  using Raw = std::conditional_t<N == 1, T, uint4>;
  Raw raw[kChunks];

  __device__ __forceinline__ void read(const T* row, int lane, int D) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int at = column(lane, c * N);
      if constexpr (N == 1)
        raw[c] = at < D ? row[at] : from_float<T>(0.0f);
      else
        raw[c] = load_stream(row + at);
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

template <typename T, int N, int L>
__global__ void __launch_bounds__(kSplit, 3)
    attend_kernel(DecodeAttentionParams p, Partials partials) {
  using RowSlice = Slice<T, N, L>;
  constexpr int kSize = RowSlice::kSize;
  constexpr int kRows = kWarp / L;                                 // of keys, in one read of a warp
  constexpr int kAtOnce = N == 1 ? 1 : kFlight < L ? kFlight : L;  // reads
  VOX_DYNAMIC_SHARED(float, sums);                                 // [kWarps, kQueries, D]
  VOX_SHARED(float[kWarps][kWarp][kQueries], weights);
  VOX_SHARED(State[kWarps][kQueries], states);
  const int D = static_cast<int>(p.D), S = static_cast<int>(p.S);
  const int group = static_cast<int>(p.Hq / p.Hkv);
  const int parts = (group + kQueries - 1) / kQueries;
  const int h = blockIdx.y / parts, first_query = blockIdx.y % parts * kQueries;
  const int queries = group - first_query < kQueries ? group - first_query : kQueries;
  const int64_t b = blockIdx.z, head = static_cast<int64_t>(h) * group + first_query;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;

  wait_for_previous_kernel();
  const int64_t room = p.M * p.S;
  const int length = static_cast<int>(p.seq_lens[b] < room ? p.seq_lens[b] : room);
  const int split = static_cast<int>(blockIdx.x);
  if (split * kSplit >= length && split > 0) return;  // the whole block
  const int begin = split * kSplit + warp * kWarp;
  const int count = length - begin < kWarp ? length - begin : kWarp;  // may be negative

  // Lane i knows where key i is.
  int64_t my_place = 0;
  if (lane < count) {
    const int key = begin + lane, page = p.page_table[b * p.M + key / S];
    my_place = ((static_cast<int64_t>(page) * p.Hkv + h) * S + key % S) * D;
  }
  const auto read = [&](const void* pages, int step, RowSlice& slice) {
    const int key = step * kRows + lane / L;
    const int64_t place = __shfl_sync(kWholeWarp, my_place, key);
    if (key < count) slice.read(static_cast<const T*>(pages) + place, lane, D);
  };

  float q[kQueries][kSize];
#pragma unroll
  for (int g = 0; g < kQueries; ++g)
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const int column = RowSlice::column(lane, i);
      const bool there = g < queries && column < D;
      q[g][i] =
          there ? to_float(static_cast<const T*>(p.q)[b * p.q_stride + (head + g) * D + column]) *
                      p.scale
                : 0.0f;
    }

  RowSlice rows[kAtOnce];
  for (int step = 0; step < L; step += kAtOnce) {
    if (step * kRows >= count) break;
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) read(p.k_pages, step + u, rows[u]);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int key = (step + u) * kRows + lane / L;
      float k[kSize] = {}, dots[kQueries] = {};
      if (key < count) rows[u].get(k);
#pragma unroll
      for (int g = 0; g < kQueries; ++g) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) dots[g] = fmaf(q[g][i], k[i], dots[g]);
#pragma unroll
        for (int offset = L / 2; offset; offset /= 2)
          dots[g] += __shfl_xor_sync(kWholeWarp, dots[g], offset);
      }
      if (lane % L == 0 && key < count)
#pragma unroll
        for (int g = 0; g < kQueries; ++g) weights[warp][key][g] = dots[g];
    }
  }
  if (count > 0)
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) read(p.v_pages, u, rows[u]);
  __syncwarp();

  // Scores to weights, lane i those of key i.
#pragma unroll
  for (int g = 0; g < kQueries; ++g) {
    const float lowest = __uint_as_float(0xff800000u);
    const float score = lane < count ? weights[warp][lane][g] : lowest;
    const float largest = warp_reduce(score, Max());
    const float weight = lane < count ? expf(score - largest) : 0.0f;
    weights[warp][lane][g] = weight;
    const float sum = warp_reduce(weight, Add());
    if (lane == 0) states[warp][g] = {largest, sum};
  }
  __syncwarp();

  float acc[kQueries][kSize] = {};
  for (int step = 0; step < L; step += kAtOnce) {
    if (step * kRows >= count) break;
    if (step > 0)
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) read(p.v_pages, step + u, rows[u]);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int key = (step + u) * kRows + lane / L;
      if (key >= count) continue;
      float v[kSize];
      rows[u].get(v);
#pragma unroll
      for (int g = 0; g < kQueries; ++g) {
        const float weight = weights[warp][key][g];
#pragma unroll
        for (int i = 0; i < kSize; ++i) acc[g][i] = fmaf(weight, v[i], acc[g][i]);
      }
    }
  }
#pragma unroll
  for (int g = 0; g < kQueries; ++g)
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
#pragma unroll
      for (int offset = kWarp / 2; offset >= L; offset /= 2)
        acc[g][i] += __shfl_xor_sync(kWholeWarp, acc[g][i], offset);
      const int column = RowSlice::column(lane, i);
      if (lane < L && column < D) sums[(warp * kQueries + g) * D + column] = acc[g][i];
    }
  __syncthreads();
  let_next_kernel_start();

  // The warps to one; with a single split to the result.
  for (int item = threadIdx.x; item < queries * D; item += kSplit) {
    const int g = item / D, column = item % D;
    float largest = states[0][g].largest, sum = 0, total = 0;
#pragma unroll
    for (int w = 1; w < kWarps; ++w) largest = fmaxf(largest, states[w][g].largest);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (!(states[w][g].sum > 0)) continue;
      const float factor = expf(states[w][g].largest - largest);
      sum = fmaf(states[w][g].sum, factor, sum);
      total = fmaf(sums[(w * kQueries + g) * D + column], factor, total);
    }
    const int64_t row = b * p.Hq + head + g;
    if (partials.splits == 1) {
      static_cast<T*>(p.out)[row * D + column] = from_float<T>(length > 0 ? total / sum : 0.0f);
      continue;
    }
    partials.sums[(row * partials.splits + split) * D + column] = total;
    if (column == 0) {
      partials.states[(row * partials.splits + split) * 2] = largest;
      partials.states[(row * partials.splits + split) * 2 + 1] = sum;
    }
  }
}

// One block takes a query head of a sequence, a thread columns of its result.
template <typename T>
__global__ void combine_kernel(DecodeAttentionParams p, Partials partials) {
  wait_for_previous_kernel();
  const int64_t b = blockIdx.y, row = b * p.Hq + blockIdx.x, D = p.D;
  const int64_t room = p.M * p.S, length = p.seq_lens[b] < room ? p.seq_lens[b] : room;
  const int64_t n = (length + kSplit - 1) / kSplit;
  const float* const states = partials.states + row * partials.splits * 2;
  const float* const sums = partials.sums + row * partials.splits * D;
  float largest = states[0], sum = 0;
  for (int64_t i = 1; i < n; ++i) largest = fmaxf(largest, states[2 * i]);
  for (int64_t i = 0; i < n; ++i) sum = fmaf(states[2 * i + 1], expf(states[2 * i] - largest), sum);
  for (int64_t column = threadIdx.x; column < D; column += blockDim.x) {
    float total = 0;
    for (int64_t i = 0; i < n; ++i)
      total = fmaf(sums[i * D + column], expf(states[2 * i] - largest), total);
    static_cast<T*>(p.out)[row * D + column] = from_float<T>(n ? total / sum : 0.0f);
  }
  let_next_kernel_start();
}

template <typename T>
auto attend_kernel_for(const DecodeAttentionParams& p) {
  if (takes_vectors<T>(p.k_pages, p.D) && takes_vectors<T>(p.v_pages, p.D)) {
    const int64_t lanes = p.D / kVector<T>;
    if (lanes == 8) return attend_kernel<T, kVector<T>, 8>;
    if (lanes == 16) return attend_kernel<T, kVector<T>, 16>;
    if constexpr (sizeof(T) == 4)
      if (lanes == 32) return attend_kernel<T, kVector<T>, 32>;
  }
  return attend_kernel<T, 1, 32>;
}

int64_t max_splits(const DecodeAttentionParams& p) {
  const int64_t splits = divide_up(p.M * p.S, kSplit);
  return splits < 1 ? 1 : splits;
}

template <typename T>
void run(const DecodeAttentionParams& p, const Partials& partials, cudaStream_t stream) {
  const int64_t parts = divide_up(p.Hq / p.Hkv, kQueries);
  launch(attend_kernel_for<T>(p),
         {.grid = dim3(static_cast<unsigned>(partials.splits), static_cast<unsigned>(p.Hkv * parts),
                       static_cast<unsigned>(p.B)),
          .block = dim3(kSplit),
          .shared_bytes = kWarps * kQueries * p.D * sizeof(float),
          .stream = stream},
         p, partials);
  if (partials.splits == 1) return;
  launch(combine_kernel<T>,
         {.grid = dim3(static_cast<unsigned>(p.Hq), static_cast<unsigned>(p.B)),
          .block = dim3(block_size(p.D, 128)),
          .stream = stream},
         p, partials);
}

}  // namespace

// Floats that `workspace` must hold.
int64_t decode_attention_workspace(const DecodeAttentionParams& p) {
  const int64_t splits = max_splits(p);
  return splits == 1 ? 0 : p.B * p.Hq * splits * (p.D + 2);
}

void decode_attention(const DecodeAttentionParams& p, float* workspace, cudaStream_t stream) {
  if (p.B == 0) return;
  const int64_t splits = max_splits(p);
  const Partials partials = {splits, workspace,
                             splits == 1 ? nullptr : workspace + p.B * p.Hq * splits * p.D};
  p.dtype == Dtype::f32 ? run<float>(p, partials, stream) : run<bf16>(p, partials, stream);
}

}  // namespace voxkern

#ifdef VOX_HOST_PASS
namespace voxkern {
namespace {

Tensor decode_attention_cuda(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table,
                             Tensor seq_lens, double scale) {
  check_dim(q, "q", 3);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  const DecodeAttentionParams p =
      decode_attention_params(q, k_pages, v_pages, page_table, seq_lens, scale, out);
  check(p.D <= kMaxElementwise, "q: on CUDA expected heads of at most ", kMaxElementwise,
        " elements, got shape ", shape_string(q));
  check(p.B <= 65535, "q: on CUDA expected at most 65535 sequences, got ", p.B);
  Tensor workspace =
      torch::stable::new_empty(q, {decode_attention_workspace(p)}, ScalarType::Float);
  const OnDevice device(q);
  decode_attention(p, static_cast<float*>(workspace.mutable_data_ptr()), device.stream);
  return out;
}

}  // namespace
}  // namespace voxkern

VOX_CUDA_LIBRARY(m) { m.impl("decode_attention", TORCH_BOX(&voxkern::decode_attention_cuda)); }
#endif
