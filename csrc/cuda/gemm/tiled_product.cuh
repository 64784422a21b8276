// out = x W^T for many rows of x in bfloat16: what `linear` runs above 16 rows, with the sums of
// its kernel for few, to the bit.
//
// A block takes a tile of x's rows times W's rows; both come in steps of 64 columns through shared
// memory, by asynchronous copies, as many steps ahead as 96 KB hold. A row of a step is 8 vectors
// of 16 bytes; odd rows have their two halves exchanged, so that the 8 lanes of a quarter warp,
// which read 4 vectors of 2 rows, meet all 32 banks once, with the products' operands as they come:
// a vector is two products of 16 columns, in an order of columns that both operands share.
//
// Order of sums: product.cuh's. So there are two sets of accumulators, of the eighth of the columns
// at hand and of all before it.
//
// Floor, on an H100. Many rows: 2 M N C operations. A block of 128 x 128 asks its multiprocessor
// for 32 KB from the second-level cache for a million multiply-adds; at 24 bytes a clock (5.5 TB/s
// over 132) that is 780 a clock: 350 TFLOP/s. Shared memory (6 KB for 64 x 32 x 32, 128 bytes a
// clock) would allow 1,300, mma.sync (some 60 % of the tensor cores) as many, and a warp issues 6
// instructions for a product of 16 x 8 x 16, of which 3 put x's words in the order that mma wants.
// Tiles of the same rows of W are neighbours in the grid, so W comes from memory once for all rows.
// 512 rows of [16384, 2048] are 512 blocks, 3.9 rounds of the chip.
//
// Few rows: W's bytes over 3.35 TB/s; 28 to 48 KB of W are under way in a multiprocessor. 64 rows
// of [16384, 2048] in 128 blocks: 20 us, and 18 us of the second-level cache beside it, since every
// block reads all of x. A matrix of 2,048 rows has narrow tiles, which read x twice as often as W:
// [2048, 8192] takes 18 us of that cache, not memory's 10.
#pragma once

#include "cuda/runtime/elements.cuh"
#include "params/linear.h"

namespace voxkern {
namespace {

constexpr int kStepColumns = 64;
constexpr int kChunkColumns = 32;  // of the row's order of sums: 4 vectors

// Rows of x and of W in a block's tile, and in a warp's part of it.
template <int kTileM_, int kTileN_, int kWarpM_, int kWarpN_>
struct TileShape {
  static constexpr int kTileM = kTileM_, kTileN = kTileN_, kWarpM = kWarpM_, kWarpN = kWarpN_;
  static constexpr int kThreads = kTileM / kWarpM * (kTileN / kWarpN) * kWarp;
  static constexpr int kVectors = kStepColumns / kVector<bf16>;  // of a row, in a step
  static constexpr int kStepVectors = (kTileM + kTileN) * kVectors;
  static constexpr int kSteps = (96 << 10) / (kStepVectors * 16);
  static constexpr int kSharedBytes = kSteps * kStepVectors * 16;
  static constexpr int kOutStride = kTileN + kVector<bf16>;  // meets no bank twice
  static_assert(kTileM * kOutStride * 2 <= kSharedBytes);
};

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads) tiled_kernel(LinearParams p) {
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
  const int64_t N = p.weight.N, C = p.weight.C;
  const unsigned tiles_m = static_cast<unsigned>(divide_up(p.M, kTileM));
  const int64_t m = static_cast<int64_t>(blockIdx.x % tiles_m) * kTileM;
  const int64_t n = static_cast<int64_t>(blockIdx.x / tiles_m) * kTileN;

  // What this thread copies of a step: vector `vector` of rows copy_row, copy_row + kCopyRows, ...
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
    copy(std::integral_constant<int, kTileN>(), p.weight.data, n, N, step,
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
  const int chunks = static_cast<int>(divide_up(C, kChunkColumns));
  const int chunks_of_part = static_cast<int>(divide_up(C, 8 * kChunkColumns));
  int left = chunks_of_part, slot = 0;
  for (int step = 0; step < steps; ++step) {
    wait_copies<kSteps - 2>();
    __syncthreads();  // everyone's copies are there, and nobody reads the step before any more
    if (step + kSteps - 1 < steps) {
      const int before = slot == 0 ? kSteps - 1 : slot - 1;
      copy_weight(step + kSteps - 1, before);
      copy_x(step + kSteps - 1, before);
    }
    commit_copies();
    const uint4* const rows = shared + slot * Shape::kStepVectors;
    slot = slot == kSteps - 1 ? 0 : slot + 1;
#pragma unroll
    for (int c = 0; c < kStepColumns / kChunkColumns; ++c) {
      if (step * (kStepColumns / kChunkColumns) + c >= chunks) break;
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

  // By way of shared memory, so that a row is stored in whole vectors.
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

template <typename Shape>
void run_tiled(const LinearParams& p, cudaStream_t stream, bool overlaps_previous) {
  const int64_t blocks = divide_up(p.M, Shape::kTileM) * divide_up(p.weight.N, Shape::kTileN);
  launch(tiled_kernel<Shape>,
         {.grid = dim3(static_cast<unsigned>(blocks)),
          .block = dim3(Shape::kThreads),
          .shared_bytes = Shape::kSharedBytes,
          .stream = stream,
          .overlaps_previous = overlaps_previous},
         p);
}

// Whether a tile has 128 of W's rows, or a half or a quarter of that. A multiprocessor takes up to
// 64 bytes a clock from the second-level cache, so a third of an H100's draw what memory gives;
// with fewer blocks than that, narrow ones win although they read x more often.
inline bool takes_wide_tiles(int64_t M, int64_t tile_m, int64_t N) {
  return divide_up(M, tile_m) * divide_up(N, 128) >= 44;
}

// `x`, `weight` and their rows begin at multiples of 16 bytes.
inline void tiled_product(const LinearParams& p, cudaStream_t stream, bool overlaps_previous) {
  const int64_t tile_m = p.M <= 32 ? 32 : p.M <= 64 ? 64 : 128;
  const bool wide = takes_wide_tiles(p.M, tile_m, p.weight.N);
  if (tile_m == 128)
    wide ? run_tiled<TileShape<128, 128, 64, 32>>(p, stream, overlaps_previous)
         : run_tiled<TileShape<128, 64, 32, 32>>(p, stream, overlaps_previous);
  else if (tile_m == 64)
    wide ? run_tiled<TileShape<64, 128, 32, 32>>(p, stream, overlaps_previous)
         : run_tiled<TileShape<64, 32, 32, 16>>(p, stream, overlaps_previous);
  else
    wide ? run_tiled<TileShape<32, 128, 32, 32>>(p, stream, overlaps_previous)
         : run_tiled<TileShape<32, 32, 16, 16>>(p, stream, overlaps_previous);
}

}  // namespace
}  // namespace voxkern
