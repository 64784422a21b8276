// out = x W^T with plain weights where no gemv applies: many rows of x in bfloat16, and float32.
//
// bfloat16. A block takes a tile of x's rows times W's rows; both come through shared memory in
// steps of 64 columns, by asynchronous copies, as many steps ahead as 96 KB hold. A row of a step
// is 8 vectors of 16 bytes; odd rows exchange their two halves, so that the 8 lanes of a quarter
// warp, which read 4 vectors of 2 rows, meet all 32 banks once. A vector is two products of 16
// columns, in an order of columns that both operands share. Order of sums: DenseGemv's, to the bit.
// So there are two sets of accumulators, of the current eighth of the columns and of all before it.
// Rounded once, when out is stored. Tiles of the same rows of W are neighbours in the grid, so W
// comes from memory once for all rows.
//
// Floor: 2 M N C operations, or W's bytes over 3.35 TB/s; docs/cuda.md has both for CSM's shapes.
//
// float32. A warp takes two rows of W and kTile rows of x; lane l takes the vectors l, l + 32, ...
// of all of them, kVectorsInFlight of W at a time, and the lanes' sums are added at the end.
#pragma once

#include "cuda/gemm/fusion.cuh"

namespace voxkern::gemm_kernels {
namespace {

constexpr int kStepColumns = 64;
constexpr int kSumColumns = 32;  // that a part of a sum consists of: a chunk of DenseGemv
constexpr int kSumParts = 8;
static_assert(kSumParts == kGemvWarps, "a sum has a part for each warp of a gemv");

// Rows of x and of W in a block's tile, and in a warp's part of it.
template <int kTileM_, int kTileN_, int kWarpM_, int kWarpN_>
struct TileShape {
  static constexpr int kTileM = kTileM_, kTileN = kTileN_, kWarpM = kWarpM_, kWarpN = kWarpN_;
  static constexpr int kThreads = kTileM / kWarpM * (kTileN / kWarpN) * kWarp;
  static constexpr int kVectors = kStepColumns / kLaneValues;  // of a row, in a step
  static constexpr int kStepVectors = (kTileM + kTileN) * kVectors;
  static constexpr int kSteps = (96 << 10) / (kStepVectors * 16);
  static constexpr int kSharedBytes = kSteps * kStepVectors * 16;
  static constexpr int kOutStride = kTileN + kLaneValues;        // avoids bank conflicts
  static constexpr int kHigh = kWarpM / 16, kWide = kWarpN / 8;  // products of a warp
  using Sums = float[kHigh][kWide][4];
  static_assert(kTileM * kOutStride * 2 <= kSharedBytes);
};

// A thread's share of the copies of a step: vector `vector` of rows row, row + kCopyRows, ...
template <typename Shape>
struct StepCopier {
  static constexpr int kVectors = Shape::kVectors, kCopyRows = Shape::kThreads / kVectors;
  static_assert(Shape::kTileM % kCopyRows == 0 && Shape::kTileN % kCopyRows == 0 &&
                kCopyRows % 2 == 0);
  const GemmParams& p;
  int64_t m, n;  // the block's first rows of x and of W
  int row, vector;
  uint4* to;

  __device__ __forceinline__ StepCopier(const GemmParams& p_, int64_t m_, int64_t n_, uint4* shared)
      : p(p_), m(m_), n(n_), row(threadIdx.x / kVectors), vector(threadIdx.x % kVectors) {
    to = shared + row * kVectors + (vector ^ row % 2 * 4);
  }
  __device__ __forceinline__ void copy_x(int step, int slot) const {
    copy<Shape::kTileM>(p.x, m, p.M, step, to + slot * Shape::kStepVectors);
  }
  __device__ __forceinline__ void copy_weight(int step, int slot) const {
    copy<Shape::kTileN>(p.weight, n, p.N, step,
                        to + slot * Shape::kStepVectors + Shape::kTileM * kVectors);
  }
  template <int kRows>
  __device__ __forceinline__ void copy(const void* matrix, int64_t first, int64_t rows, int step,
                                       uint4* slot) const {
    const int64_t C = p.C;
    const bf16* const from = static_cast<const bf16*>(matrix) + (first + row) * C +
                             (vector * kLaneValues + step * kStepColumns);
    const int rows_left = static_cast<int>(rows - first < kRows ? rows - first : kRows);
    const bool in_row = step * kStepColumns < static_cast<int>(C) - vector * kLaneValues;
#pragma unroll
    for (int i = 0; i < kRows / kCopyRows; ++i)
      copy_async_16(slot + i * kCopyRows * kVectors, from + i * (kCopyRows * C),
                    in_row && row + i * kCopyRows < rows_left);
  }
};

// part += a warp's products of one chunk of a step; `at` is this lane's vector of the chunk in row
// g of a tile.
template <typename Shape>
__device__ __forceinline__ void multiply_tile_chunk(typename Shape::Sums& part, const uint4* rows,
                                                    int warp_m, int warp_n, int at) {
  constexpr int kHigh = Shape::kHigh, kWide = Shape::kWide, kVectors = Shape::kVectors;
  uint4 low[kHigh], high[kHigh], w[kWide];
#pragma unroll
  for (int i = 0; i < kHigh; ++i) {
    low[i] = rows[(warp_m + i * 16) * kVectors + at];
    high[i] = rows[(warp_m + i * 16 + 8) * kVectors + at];
  }
#pragma unroll
  for (int j = 0; j < kWide; ++j) w[j] = rows[(Shape::kTileM + warp_n + j * 8) * kVectors + at];
#pragma unroll
  for (int i = 0; i < kHigh; ++i)
#pragma unroll
    for (int j = 0; j < kWide; ++j)
      multiply_bf16(part[i][j], {low[i].x, high[i].x, low[i].y, high[i].y}, w[j].x, w[j].y);
#pragma unroll
  for (int i = 0; i < kHigh; ++i)
#pragma unroll
    for (int j = 0; j < kWide; ++j)
      multiply_bf16(part[i][j], {low[i].z, high[i].z, low[i].w, high[i].w}, w[j].z, w[j].w);
}

// sums += part, part = 0.
template <typename Shape>
__device__ __forceinline__ void end_part(typename Shape::Sums& sums, typename Shape::Sums& part) {
#pragma unroll
  for (int i = 0; i < Shape::kHigh; ++i)
#pragma unroll
    for (int j = 0; j < Shape::kWide; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        sums[i][j][e] += part[i][j][e];
        part[i][j][e] = 0;
      }
}

// Stores a tile by way of shared memory, so that a row of it is stored in whole vectors.
template <typename Shape>
__device__ __forceinline__ void store_tile(const GemmParams& p, int64_t m, int64_t n,
                                           const typename Shape::Sums& sums, int warp_m, int warp_n,
                                           uint4* shared) {
  constexpr int kTileN = Shape::kTileN, kStride = Shape::kOutStride;
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  __syncthreads();
  auto* const tile = reinterpret_cast<bf16*>(shared);  // [kTileM][kStride]
#pragma unroll
  for (int i = 0; i < Shape::kHigh; ++i)
#pragma unroll
    for (int j = 0; j < Shape::kWide; ++j)
#pragma unroll
      for (int e = 0; e < 4; e += 2)
        *reinterpret_cast<uint32_t*>(tile + (warp_m + i * 16 + g + e / 2 * 8) * kStride + warp_n +
                                     j * 8 + t * 2) = bf16x2_bits(sums[i][j][e], sums[i][j][e + 1]);
  __syncthreads();
  const int64_t N = p.N;
  bf16* const out = static_cast<bf16*>(p.out) + m * N + n;
  const bool vectors = N % kLaneValues == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
  for (int item = threadIdx.x; item < Shape::kTileM * (kTileN / kLaneValues);
       item += Shape::kThreads) {
    const int row = item / (kTileN / kLaneValues);
    const int column = item % (kTileN / kLaneValues) * kLaneValues;
    if (m + row >= p.M) break;
    const bf16* const from = tile + row * kStride + column;
    if (vectors && n + column < N)
      *reinterpret_cast<uint4*>(out + row * N + column) = *reinterpret_cast<const uint4*>(from);
    else
      for (int i = 0; i < kLaneValues && n + column + i < N; ++i)
        out[row * N + column + i] = from[i];
  }
}

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads) dense_tile_kernel(GemmParams p) {
  constexpr int kSteps = Shape::kSteps, kStepChunks = kStepColumns / kSumColumns;
  VOX_DYNAMIC_SHARED(uint4, shared);  // [kSteps][x: kTileM, W: kTileN][kVectors]
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int g = lane / 4, t = lane % 4;  // as in multiply_bf16
  const int warp_m = warp / (Shape::kTileN / Shape::kWarpN) * Shape::kWarpM;
  const int warp_n = warp % (Shape::kTileN / Shape::kWarpN) * Shape::kWarpN;
  const unsigned tiles_m = static_cast<unsigned>(divide_up(p.M, Shape::kTileM));
  const int64_t m = static_cast<int64_t>(blockIdx.x % tiles_m) * Shape::kTileM;
  const int64_t n = static_cast<int64_t>(blockIdx.x / tiles_m) * Shape::kTileN;
  const StepCopier<Shape> copier(p, m, n, shared);
  const int steps = static_cast<int>(divide_up(p.C, kStepColumns));

#pragma unroll
  for (int s = 0; s < kSteps - 1; ++s)
    if (s < steps) copier.copy_weight(s, s);
  let_next_kernel_start();
  wait_for_previous_kernel();
#pragma unroll
  for (int s = 0; s < kSteps - 1; ++s) {
    if (s < steps) copier.copy_x(s, s);
    commit_copies();
  }

  typename Shape::Sums part = {}, sums = {};
  const int chunks = static_cast<int>(divide_up(p.C, kSumColumns));
  const int part_chunks = static_cast<int>(divide_up(p.C, kSumParts * kSumColumns));
  int left = part_chunks, slot = 0;
  for (int step = 0; step < steps; ++step) {
    wait_copies<kSteps - 2>();
    __syncthreads();  // all copies have arrived, and no thread reads the previous step any more
    if (step + kSteps - 1 < steps) {
      const int previous = slot == 0 ? kSteps - 1 : slot - 1;
      copier.copy_weight(step + kSteps - 1, previous);
      copier.copy_x(step + kSteps - 1, previous);
    }
    commit_copies();
    const uint4* const rows = shared + slot * Shape::kStepVectors;
    slot = slot == kSteps - 1 ? 0 : slot + 1;
#pragma unroll
    for (int c = 0; c < kStepChunks; ++c) {
      if (step * kStepChunks + c >= chunks) break;
      if (left == 0) {
        end_part<Shape>(sums, part);
        left = part_chunks;
      }
      --left;
      multiply_tile_chunk<Shape>(part, rows, warp_m, warp_n,
                                 g * Shape::kVectors + ((c * 4 + t) ^ g % 2 * 4));
    }
  }
  end_part<Shape>(sums, part);
  store_tile<Shape>(p, m, n, sums, warp_m, warp_n, shared);
}

constexpr int kFloatRows = 2;        // of W in a warp
constexpr int kVectorsInFlight = 4;  // of each of those

template <bool kAligned, int kTile>
__global__ void __launch_bounds__(kGemvThreads) float_kernel(GemmParams p) {
  constexpr int kSize = kVector<float>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * kGemvWarps + warp) * kFloatRows;
  const int64_t m = static_cast<int64_t>(blockIdx.y) * kTile, vectors = divide_up(p.C, kSize);
  let_next_kernel_start();
  wait_for_previous_kernel();
  if (n >= p.N) return;
  const float *weight[kFloatRows], *x[kTile];
#pragma unroll
  for (int r = 0; r < kFloatRows; ++r)
    weight[r] = static_cast<const float*>(p.weight) + (n + r < p.N ? n + r : 0) * p.C;
#pragma unroll
  for (int t = 0; t < kTile; ++t)
    x[t] = static_cast<const float*>(p.x) + (m + t < p.M ? m + t : p.M - 1) * p.C;

  float sums[kTile][kFloatRows] = {};
  for (int64_t first = lane; first < vectors; first += kVectorsInFlight * kWarp) {
    uint4 raw[kVectorsInFlight][kFloatRows];
#pragma unroll
    for (int s = 0; s < kVectorsInFlight; ++s)
#pragma unroll
      for (int r = 0; r < kFloatRows; ++r)
        if (const int64_t i = first + s * kWarp; i < vectors)
          raw[s][r] = load_padded<float, kAligned>(weight[r], i, p.C);
#pragma unroll
    for (int s = 0; s < kVectorsInFlight; ++s) {
      const int64_t i = first + s * kWarp;
      if (i >= vectors) continue;
      float w[kFloatRows][kSize];
#pragma unroll
      for (int r = 0; r < kFloatRows; ++r) unpack<float>(raw[s][r], w[r]);
#pragma unroll
      for (int t = 0; t < kTile; ++t) {
        float values[kSize];
        unpack<float>(load_padded<float, kAligned>(x[t], i, p.C), values);
#pragma unroll
        for (int r = 0; r < kFloatRows; ++r)
#pragma unroll
          for (int j = 0; j < kSize; ++j) sums[t][r] = fmaf(values[j], w[r][j], sums[t][r]);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kTile; ++t)
#pragma unroll
    for (int r = 0; r < kFloatRows; ++r) {
      const float sum = warp_reduce(sums[t][r], Add());
      if (lane == 0 && m + t < p.M && n + r < p.N)
        static_cast<float*>(p.out)[(m + t) * p.N + n + r] = sum;
    }
}

template <typename Shape>
void launch_tiles(const GemmParams& p, cudaStream_t stream) {
  const int64_t blocks = divide_up(p.M, Shape::kTileM) * divide_up(p.N, Shape::kTileN);
  launch(dense_tile_kernel<Shape>,
         {.grid = dim3(static_cast<unsigned>(blocks)),
          .block = dim3(Shape::kThreads),
          .shared_bytes = Shape::kSharedBytes,
          .stream = stream,
          .overlaps_previous = p.overlaps_previous},
         p);
}

// True for tiles with 128 of W's rows, false for a half or a quarter of that. A multiprocessor
// reads up to 64 bytes a clock from L2, so a third of an H100's draw as much as memory gives; with
// fewer blocks than that, narrow ones win although they read x more often.
inline bool wide_tiles(int64_t M, int64_t tile_m, int64_t N) {
  return divide_up(M, tile_m) * divide_up(N, 128) >= 44;
}

// bfloat16; rows of x and W are vector-aligned.
inline void launch_dense_tiles(const GemmParams& p, cudaStream_t stream) {
  const int64_t tile_m = p.M <= 32 ? 32 : p.M <= 64 ? 64 : 128;
  const bool wide = wide_tiles(p.M, tile_m, p.N);
  if (tile_m == 128)
    wide ? launch_tiles<TileShape<128, 128, 64, 32>>(p, stream)
         : launch_tiles<TileShape<128, 64, 32, 32>>(p, stream);
  else if (tile_m == 64)
    wide ? launch_tiles<TileShape<64, 128, 32, 32>>(p, stream)
         : launch_tiles<TileShape<64, 32, 32, 16>>(p, stream);
  else
    wide ? launch_tiles<TileShape<32, 128, 32, 32>>(p, stream)
         : launch_tiles<TileShape<32, 32, 16, 16>>(p, stream);
}

}  // namespace
}  // namespace voxkern::gemm_kernels
