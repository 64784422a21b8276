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
  static constexpr int kOutStride = kTileN + kLaneValues;  // avoids bank conflicts
  static_assert(kTileM * kOutStride * 2 <= kSharedBytes);
};

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads) dense_tile_kernel(GemmParams p) {
  constexpr int kTileM = Shape::kTileM, kTileN = Shape::kTileN, kVectors = Shape::kVectors;
  constexpr int kSize = kVector<bf16>, kSteps = Shape::kSteps;
  constexpr int kHigh = Shape::kWarpM / 16, kWide = Shape::kWarpN / 8;  // products of a warp
  constexpr int kCopyRows = Shape::kThreads / kVectors;
  static_assert(kTileM % kCopyRows == 0 && kTileN % kCopyRows == 0 && kCopyRows % 2 == 0);
  VOX_DYNAMIC_SHARED(uint4, shared);  // [kSteps][x: kTileM, W: kTileN][kVectors]
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int g = lane / 4, t = lane % 4;  // as in multiply_bf16
  const int warp_m = warp / (kTileN / Shape::kWarpN) * Shape::kWarpM;
  const int warp_n = warp % (kTileN / Shape::kWarpN) * Shape::kWarpN;
  const int64_t N = p.N, C = p.C;
  const unsigned tiles_m = static_cast<unsigned>(divide_up(p.M, kTileM));
  const int64_t m = static_cast<int64_t>(blockIdx.x % tiles_m) * kTileM;
  const int64_t n = static_cast<int64_t>(blockIdx.x / tiles_m) * kTileN;

  // This thread's share of the copies of a step: vector `vector` of rows copy_row, copy_row +
  // kCopyRows, ...
  const int copy_row = threadIdx.x / kVectors, vector = threadIdx.x % kVectors;
  const int columns = static_cast<int>(C) - vector * kSize;  // from the vector on
  uint4* const copy_to = shared + copy_row * kVectors + (vector ^ copy_row % 2 * 4);
  const auto copy = [&](auto tile_rows, const void* from, int64_t first, int64_t rows, int step,
                        uint4* to) {
    const bf16* const at = static_cast<const bf16*>(from) + (first + copy_row) * C +
                           (vector * kSize + step * kStepColumns);
    constexpr int kRows = decltype(tile_rows)::value;
    const int rows_left = static_cast<int>(rows - first < kRows ? rows - first : kRows);
    const bool in_row = step * kStepColumns < columns;
#pragma unroll
    for (int i = 0; i < kRows / kCopyRows; ++i)
      copy_async_16(to + i * kCopyRows * kVectors, at + i * (kCopyRows * C),
                    in_row && copy_row + i * kCopyRows < rows_left);
  };
  const auto copy_x = [&](int step, int slot) {
    copy(std::integral_constant<int, kTileM>(), p.x, m, p.M, step,
         copy_to + slot * Shape::kStepVectors);
  };
  const auto copy_weight = [&](int step, int slot) {
    copy(std::integral_constant<int, kTileN>(), p.weight, n, N, step,
         copy_to + slot * Shape::kStepVectors + kTileM * kVectors);
  };
  const int steps = static_cast<int>(divide_up(C, kStepColumns));

#pragma unroll
  for (int s = 0; s < kSteps - 1; ++s)
    if (s < steps) copy_weight(s, s);
  let_next_kernel_start();
  wait_for_previous_kernel();
#pragma unroll
  for (int s = 0; s < kSteps - 1; ++s) {
    if (s < steps) copy_x(s, s);
    commit_copies();
  }

  float part[kHigh][kWide][4] = {}, sums[kHigh][kWide][4] = {};
  const auto end_part = [&] {
#pragma unroll
    for (int i = 0; i < kHigh; ++i)
#pragma unroll
      for (int j = 0; j < kWide; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          sums[i][j][e] += part[i][j][e];
          part[i][j][e] = 0;
        }
  };
  const int chunks = static_cast<int>(divide_up(C, kSumColumns));
  const int chunks_of_part = static_cast<int>(divide_up(C, kSumParts * kSumColumns));
  int left = chunks_of_part, slot = 0;
  for (int step = 0; step < steps; ++step) {
    wait_copies<kSteps - 2>();
    __syncthreads();  // all copies have arrived, and no thread reads the previous step any more
    if (step + kSteps - 1 < steps) {
      const int before = slot == 0 ? kSteps - 1 : slot - 1;
      copy_weight(step + kSteps - 1, before);
      copy_x(step + kSteps - 1, before);
    }
    commit_copies();
    const uint4* const rows = shared + slot * Shape::kStepVectors;
    slot = slot == kSteps - 1 ? 0 : slot + 1;
#pragma unroll
    for (int c = 0; c < kStepColumns / kSumColumns; ++c) {
      if (step * (kStepColumns / kSumColumns) + c >= chunks) break;
      if (left == 0) {
        end_part();
        left = chunks_of_part;
      }
      --left;
      const int at = g * kVectors + ((c * 4 + t) ^ g % 2 * 4);
      uint4 low[kHigh], high[kHigh], w[kWide];
#pragma unroll
      for (int i = 0; i < kHigh; ++i) {
        low[i] = rows[(warp_m + i * 16) * kVectors + at];
        high[i] = rows[(warp_m + i * 16 + 8) * kVectors + at];
      }
#pragma unroll
      for (int j = 0; j < kWide; ++j) w[j] = rows[(kTileM + warp_n + j * 8) * kVectors + at];
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
  }
  end_part();

  // A tile goes through shared memory, so that a row of it is stored in whole vectors.
  __syncthreads();
  auto* const tile = reinterpret_cast<bf16*>(shared);  // [kTileM][kOutStride]
#pragma unroll
  for (int i = 0; i < kHigh; ++i)
#pragma unroll
    for (int j = 0; j < kWide; ++j)
#pragma unroll
      for (int e = 0; e < 4; e += 2)
        *reinterpret_cast<uint32_t*>(tile + (warp_m + i * 16 + g + e / 2 * 8) * Shape::kOutStride +
                                     warp_n + j * 8 + t * 2) =
            bf16x2_bits(sums[i][j][e], sums[i][j][e + 1]);
  __syncthreads();
  bf16* const out = static_cast<bf16*>(p.out) + m * N + n;
  const bool vectors = N % kSize == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
  for (int item = threadIdx.x; item < kTileM * (kTileN / kSize); item += Shape::kThreads) {
    const int row = item / (kTileN / kSize), column = item % (kTileN / kSize) * kSize;
    if (m + row >= p.M) break;
    const bf16* const from = tile + row * Shape::kOutStride + column;
    if (vectors && n + column < N) {
      *reinterpret_cast<uint4*>(out + row * N + column) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int i = 0; i < kSize && n + column + i < N; ++i) out[row * N + column + i] = from[i];
    }
  }
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
