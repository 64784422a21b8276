#include "../linear.h"
#include "common.cuh"

// Streams plain weights; two kernels.
//
// bfloat16: the tensor cores, for any M, since a row's bits must not depend on M. A block takes
// kColumns rows of W and kTileM rows of x. Each of its kWarps warps has an equal range of the
// columns of both, in whole chunks of 32, and takes the chunks in their order: a lane has 16 bytes
// of one row of W and of one or two of x, which are two products of 16 columns, in an order of
// columns that is the same for both operands. kFlight such loads of W are under way before the
// first is used. Then the warps' sums are added in their order.
//
// float32: a warp takes kRows rows of W and kTile rows of x, lane l the vectors l, l + 32, ... of
// all of them, kSteps of W under way; sums over the lanes at the end.
//
// Sums are float32, in an order that depends on C alone: not on M, N, tiles or alignment. x comes
// out of the first-level cache, which W's loads pass by. Until the products of many rows (prefill)
// have a kernel of their own, they read W from the second-level cache once per kTileM rows.
//
// Floor: N C elements over 3.35 TB/s: CSM's gate and up [16384, 2048] bf16 20 us, its depth
// decoder's [16384, 1024] 10 us on an H100. To keep that going a multiprocessor wants about 18 KB
// under way (700 ns of it): a block has 32 KB, and there are 192 of them at the smallest matrix
// (1536 rows) on 132 multiprocessors, 2048 at gate and up.
namespace voxkern {
namespace {

constexpr int kThreads = 128;
constexpr int kSteps = 4;

constexpr int kWarps = 8;
constexpr int kColumns = 8;  // rows of W, columns of the result
constexpr int kTileM = 16;
constexpr int kFlight = 8;

// Vector i of a row of C elements, zeros behind its end.
template <typename T, bool kAligned>
__device__ __forceinline__ uint4 read_vector(const T* row, int64_t i, int64_t C) {
  if constexpr (kAligned) {
    return *reinterpret_cast<const uint4*>(row + i * kVector<T>);
  } else {
    float values[kVector<T>];
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) {
      const int64_t at = i * kVector<T> + j;
      values[j] = at < C ? to_float(row[at]) : 0.0f;
    }
    return pack<T>(values);
  }
}

// kHigh: there are rows of x past the first 8.
template <bool kAligned, bool kHigh>
__global__ void __launch_bounds__(kWarps* kWarp, 2) tensor_kernel(LinearParams p) {
  constexpr int kSize = kVector<bf16>, kLanes = 4;  // lanes that share a row
  VOX_SHARED(float[kWarps][kTileM][kColumns], partials);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int row = lane / kLanes, column = lane % kLanes;
  const int64_t N = p.weight.N, C = p.weight.C, vectors = divide_up(C, kSize);
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kColumns;
  const int64_t m = static_cast<int64_t>(blockIdx.y) * kTileM;
  const bf16* const weight = static_cast<const bf16*>(p.weight.data) + (n + row) * C;
  const bf16* const x = static_cast<const bf16*>(p.x) + (m + row) * C;
  const bool in_weight = n + row < N, in_x = m + row < p.M, in_high = m + row + 8 < p.M;

  const int64_t range = divide_up(vectors, kWarps * kLanes) * kLanes;
  const int64_t begin = warp * range;
  const int64_t end = begin + range < vectors ? begin + range : vectors;  // may be before begin
  uint4 raw[kFlight];
  const auto read = [&](int64_t first) {
#pragma unroll
    for (int s = 0; s < kFlight; ++s) {
      const int64_t i = first + s * kLanes + column;
      raw[s] = {};
      if (!in_weight || i >= end) continue;
      if constexpr (kAligned)
        raw[s] = load_stream(weight + i * kSize);
      else
        raw[s] = read_vector<bf16, false>(weight, i, C);
    }
  };
  read(begin);
  wait_for_previous_kernel();  // weights are nobody's output: they may come before
  float sums[4] = {};
  for (int64_t first = begin; first < end; first += kFlight * kLanes) {  // the same for all lanes
    if (first > begin) read(first);
#pragma unroll
    for (int s = 0; s < kFlight; ++s) {
      const int64_t i = first + s * kLanes + column;
      if (i - column >= end) break;  // the whole warp
      uint4 low = {}, high = {};
      if (in_x && i < end) low = read_vector<bf16, kAligned>(x, i, C);
      if (kHigh && in_high && i < end) high = read_vector<bf16, kAligned>(x + 8 * C, i, C);
      multiply_bf16(sums, {low.x, high.x, low.y, high.y}, raw[s].x, raw[s].y);
      multiply_bf16(sums, {low.z, high.z, low.w, high.w}, raw[s].z, raw[s].w);
    }
  }
  let_next_kernel_start();
#pragma unroll
  for (int i = 0; i < 4; ++i) partials[warp][row + i / 2 * 8][column * 2 + i % 2] = sums[i];
  __syncthreads();
  if (threadIdx.x >= kTileM * kColumns) return;
  const int at_m = threadIdx.x / kColumns, at_n = threadIdx.x % kColumns;
  float sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += partials[w][at_m][at_n];
  if (m + at_m < p.M && n + at_n < N)
    static_cast<bf16*>(p.out)[(m + at_m) * N + n + at_n] = from_float<bf16>(sum);
}

template <typename T, bool kAligned, int kRows, int kTile>
__global__ void __launch_bounds__(kThreads) linear_kernel(LinearParams p) {
  constexpr int kSize = kVector<T>;
  const int lane = threadIdx.x % kWarp;
  const int64_t N = p.weight.N, C = p.weight.C, vectors = divide_up(C, kSize);
  const int64_t n = ((blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) / kWarp) * kRows;
  const int64_t m = static_cast<int64_t>(blockIdx.y) * kTile;
  if (n >= N) return;  // the whole warp
  const T* weight[kRows];
  const T* x[kTile];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    weight[r] = static_cast<const T*>(p.weight.data) + (n + r < N ? n + r : N - 1) * C;
#pragma unroll
  for (int t = 0; t < kTile; ++t)
    x[t] = static_cast<const T*>(p.x) + (m + t < p.M ? m + t : p.M - 1) * C;

  float sums[kTile][kRows] = {};
  uint4 raw[kSteps][kRows];
  const auto read = [&](int64_t first) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int64_t i = first + s * kWarp;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (i >= vectors) continue;
        if constexpr (kAligned)
          raw[s][r] = load_stream(weight[r] + i * kSize);
        else
          raw[s][r] = read_vector<T, false>(weight[r], i, C);
      }
    }
  };
  read(lane);
  wait_for_previous_kernel();  // weights are nobody's output: they may come before
  for (int64_t first = lane; first < vectors; first += kSteps * kWarp) {
    if (first != lane) read(first);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int64_t i = first + s * kWarp;
      if (i >= vectors) continue;
      float w[kRows][kSize];
#pragma unroll
      for (int r = 0; r < kRows; ++r) unpack<T>(raw[s][r], w[r]);
#pragma unroll
      for (int t = 0; t < kTile; ++t) {
        float values[kSize];
        unpack<T>(read_vector<T, kAligned>(x[t], i, C), values);
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int j = 0; j < kSize; ++j) sums[t][r] = fmaf(values[j], w[r][j], sums[t][r]);
      }
    }
  }
  let_next_kernel_start();
#pragma unroll
  for (int t = 0; t < kTile; ++t)
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float sum = warp_reduce(sums[t][r], Add());
      if (lane == 0 && n + r < N && m + t < p.M)
        static_cast<T*>(p.out)[(m + t) * N + n + r] = from_float<T>(sum);
    }
}

// kernel(rows tile_m of x, tile_n of W a block) over all of both.
template <typename T>
void launch_tiles(void (*kernel)(LinearParams), const LinearParams& p, int64_t tile_m,
                  int64_t tile_n, int threads, cudaStream_t stream) {
  // The grid's second dimension is 16 bits wide.
  const int64_t most = 65535 * tile_m;
  for (int64_t first = 0; first < p.M; first += most) {
    LinearParams part = p;
    part.M = p.M - first < most ? p.M - first : most;
    part.x = static_cast<const T*>(p.x) + first * p.weight.C;
    part.out = static_cast<T*>(p.out) + first * p.weight.N;
    launch(kernel,
           {.grid = dim3(static_cast<unsigned>(divide_up(p.weight.N, tile_n)),
                         static_cast<unsigned>(divide_up(part.M, tile_m))),
            .block = dim3(threads),
            .stream = stream},
           part);
  }
}

template <bool kAligned>
void run_bf16(const LinearParams& p, cudaStream_t stream) {
  launch_tiles<bf16>(p.M <= 8 ? tensor_kernel<kAligned, false> : tensor_kernel<kAligned, true>, p,
                     kTileM, kColumns, kWarps * kWarp, stream);
}

template <bool kAligned>
void run_f32(const LinearParams& p, cudaStream_t stream) {
  constexpr int kRows = 2, kWarpsOfBlock = kThreads / kWarp;
  if (p.M == 1)
    launch_tiles<float>(linear_kernel<float, kAligned, kRows, 1>, p, 1, kRows * kWarpsOfBlock,
                        kThreads, stream);
  else
    launch_tiles<float>(linear_kernel<float, kAligned, kRows, 4>, p, 4, kRows * kWarpsOfBlock,
                        kThreads, stream);
}

}  // namespace

// Of a plain weight.
void linear(const LinearParams& p, cudaStream_t stream) {
  if (p.M == 0 || p.weight.N == 0) return;
  const auto aligned = [&](auto takes) {
    return takes(p.x, p.weight.C) && takes(p.weight.data, p.weight.C);
  };
  if (p.dtype == Dtype::f32)
    aligned(takes_vectors<float>) ? run_f32<true>(p, stream) : run_f32<false>(p, stream);
  else
    aligned(takes_vectors<bf16>) ? run_bf16<true>(p, stream) : run_bf16<false>(p, stream);
}

}  // namespace voxkern

#ifdef VOX_HOST_PASS
namespace voxkern {
namespace {

Tensor linear_cuda(Tensor x, Tensor weight) {
  x = torch::stable::contiguous(x);
  Tensor out = linear_out(x, weight);
  const LinearParams p = linear_params(x, weight, out);
  if (p.weight.C == 0) return torch::stable::fill_(out, 0.0);
  check(p.weight.format == Format::plain, "weight: packed, which no CUDA kernel takes yet");
  const OnDevice device(x);
  linear(p, device.stream);
  return out;
}

}  // namespace
}  // namespace voxkern

VOX_CUDA_LIBRARY(m) { m.impl("linear", TORCH_BOX(&voxkern::linear_cuda)); }
#endif
