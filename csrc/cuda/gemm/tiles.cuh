// out = x W^T where no gemv applies: many rows of x, float32, and rows of any alignment.
//
// dense_tile_kernel, plain bfloat16. A block takes a tile of x's rows times W's rows; both come
// through shared memory in steps of 64 columns, by asynchronous copies, as many steps ahead as 96
// KB hold. A row of a step is 8 vectors of 16 bytes; odd rows exchange their two halves, so that
// the 8 lanes of a quarter warp, which read 4 vectors of 2 rows, meet all 32 banks once. A vector
// is two products of 16 columns, in an order of columns that both operands share. Order of sums:
// DenseGemv's, to the bit. So there are two sets of accumulators, of the current eighth of the
// columns and of all before it. Tiles of the same rows of W are neighbours in the grid, so W comes
// from memory once for all rows.
//
// packed_tile_kernel, packed weights. A block takes 32 rows of x and 16 kBlocks rows of W, whose
// warps take ranges (formats.cuh) in turn. A warp loads all of a range before it waits for
// anything: 4 KB in int8, 2 KB in int4, in 32 or 16 registers a lane. Meanwhile x is quantized,
// once for each block and step.
//
// float_kernel, plain float32, which only tests of equality use: a warp takes a row of W and 4 of
// x. Lane l takes columns 4 l .. 4 l + 3 of every 128; the lanes' sums are added at the end.
//
// Rounded once, when out is stored. Floor: 2 M N C operations, or W's bytes over 3.35 TB/s;
// docs/cuda.md has both for CSM's shapes.
#pragma once

#include "cuda/gemm/weight_pipeline.cuh"

namespace voxkern::gemm_kernels {
namespace {

constexpr int kStepVectors = 8;  // of a row, in a step
constexpr int kStepChunks = kStepVectors / kChunkLanes;

// Rows of x and of W in a block's tile, and in a warp's part of it.
template <int kTileRows_, int kTileColumns_, int kWarpRows_, int kWarpColumns_,
          bool kAligned_ = true>
struct TileShape {
  static constexpr int kTileRows = kTileRows_, kTileColumns = kTileColumns_;
  static constexpr int kWarpRows = kWarpRows_, kWarpColumns = kWarpColumns_;
  static constexpr bool kAligned = kAligned_;  // rows are vector-aligned
  static constexpr int kTileThreads = kTileRows / kWarpRows * (kTileColumns / kWarpColumns) * kWarp;
  static constexpr int kStepSize = (kTileRows + kTileColumns) * kStepVectors;  // vectors
  static constexpr int kSteps = (96 << 10) / (kStepSize * 16);
  static constexpr int kSharedBytes = kSteps * kStepSize * 16;
  static constexpr int kOutStride = kTileColumns + kLaneValues;           // avoids bank conflicts
  static constexpr int kHigh = kWarpRows / 16, kWide = kWarpColumns / 8;  // products of a warp
  using Sums = float[kHigh][kWide][4];
  static_assert(kTileRows * kOutStride * 2 <= kSharedBytes);
};

// Copies columns of step `step` of kRows of an operand's rows, from row `first` on, to `to`.
template <typename Shape, int kRows>
VOX_DEVICE void copy_step(const void* operand, int64_t first, int64_t rows, int64_t C, int step,
                          uint4* to) {
  constexpr int kCopyRows = Shape::kTileThreads / kStepVectors;
  static_assert(kRows % kCopyRows == 0 && kCopyRows % 2 == 0);
  const int row = threadIdx.x / kStepVectors, vector = threadIdx.x % kStepVectors;
  const int column = (step * kStepVectors + vector) * kLaneValues;
  const int rows_left = static_cast<int>(rows - first < kRows ? rows - first : kRows);
  const int columns_left = static_cast<int>(C) - column;
  const bf16* const from = static_cast<const bf16*>(operand) + (first + row) * C + column;
  to += row * kStepVectors + (vector ^ row % 2 * 4);
#pragma unroll
  for (int i = 0; i < kRows; i += kCopyRows) {
    const bool exists = columns_left > 0 && row + i < rows_left;
    if constexpr (Shape::kAligned)
      copy_async_16(to + i * kStepVectors, from + i * C, exists);
    else
      to[i * kStepVectors] = exists ? load_unaligned(from + i * C, columns_left) : uint4{};
  }
}

// part += a chunk of 32 columns: `rows` is the step's, from this warp's rows of x and of W on.
template <typename Shape>
VOX_DEVICE void multiply_chunk(typename Shape::Sums& part, const uint4* x, const uint4* weight,
                               int chunk) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;  // as in multiply_bf16
  const int at = g * kStepVectors + ((chunk * kChunkLanes + t) ^ g % 2 * 4);
  uint4 low[Shape::kHigh], high[Shape::kHigh], w[Shape::kWide];
#pragma unroll
  for (int i = 0; i < Shape::kHigh; ++i) {
    low[i] = x[i * 16 * kStepVectors + at];
    high[i] = x[(i * 16 + 8) * kStepVectors + at];
  }
#pragma unroll
  for (int j = 0; j < Shape::kWide; ++j) w[j] = weight[j * 8 * kStepVectors + at];
#pragma unroll
  for (int i = 0; i < Shape::kHigh; ++i)
#pragma unroll
    for (int j = 0; j < Shape::kWide; ++j)
      multiply_bf16(part[i][j], {low[i].x, high[i].x, low[i].y, high[i].y}, w[j].x, w[j].y);
#pragma unroll
  for (int i = 0; i < Shape::kHigh; ++i)
#pragma unroll
    for (int j = 0; j < Shape::kWide; ++j)
      multiply_bf16(part[i][j], {low[i].z, high[i].z, low[i].w, high[i].w}, w[j].z, w[j].w);
}

// sums += part, and part = 0.
template <typename Shape>
VOX_DEVICE void end_part(typename Shape::Sums& part, typename Shape::Sums& sums) {
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

// Stores a tile through shared memory, so that a row of it is stored in whole vectors.
template <typename Shape>
VOX_DEVICE void store_tile(const GemmParams& p, int64_t m, int64_t n, int warp_row, int warp_column,
                           const typename Shape::Sums& sums, void* shared) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  bf16* const tile = static_cast<bf16*>(shared);  // [kTileRows][kOutStride]
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Shape::kHigh; ++i)
#pragma unroll
    for (int j = 0; j < Shape::kWide; ++j)
#pragma unroll
      for (int e = 0; e < 4; e += 2)
        *reinterpret_cast<uint32_t*>(
            tile + (warp_row + i * 16 + g + e / 2 * 8) * Shape::kOutStride + warp_column + j * 8 +
            t * 2) = bf16x2_bits(sums[i][j][e], sums[i][j][e + 1]);
  __syncthreads();
  constexpr int kRowVectors = Shape::kTileColumns / kLaneValues;
  bf16* const out = static_cast<bf16*>(p.out) + m * p.N + n;
  const bool vectors = p.N % kLaneValues == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
  for (int item = threadIdx.x; item < Shape::kTileRows * kRowVectors; item += Shape::kTileThreads) {
    const int row = item / kRowVectors, column = item % kRowVectors * kLaneValues;
    if (m + row >= p.M) break;
    const bf16* const from = tile + row * Shape::kOutStride + column;
    bf16* const to = out + row * p.N + column;
    if (vectors && n + column < p.N) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int i = 0; i < kLaneValues && n + column + i < p.N; ++i) to[i] = from[i];
    }
  }
}

// The first row and column of this block's tile. Tiles of the same columns are neighbours.
struct TileOrigin {
  int64_t m, n;

  VOX_DEVICE TileOrigin(const GemmParams& p, int rows, int columns) {
    const unsigned row_tiles = static_cast<unsigned>(divide_up(p.M, rows));
    m = static_cast<int64_t>(blockIdx.x % row_tiles) * rows;
    n = static_cast<int64_t>(blockIdx.x / row_tiles) * columns;
  }
};

template <typename Shape>
__global__ void __launch_bounds__(Shape::kTileThreads) dense_tile_kernel(GemmParams p, int) {
  constexpr int kTileRows = Shape::kTileRows, kTileColumns = Shape::kTileColumns;
  constexpr int kSteps = Shape::kSteps;
  VOX_DYNAMIC_SHARED(uint4, shared);  // [kSteps][x: kTileRows, W: kTileColumns][kStepVectors]
  const int warp = threadIdx.x / kWarp;
  const int warp_row = warp / (kTileColumns / Shape::kWarpColumns) * Shape::kWarpRows;
  const int warp_column = warp % (kTileColumns / Shape::kWarpColumns) * Shape::kWarpColumns;
  const auto [m, n] = TileOrigin(p, kTileRows, kTileColumns);
  const auto copy_x = [&](int step, int slot) {
    copy_step<Shape, kTileRows>(p.x, m, p.M, p.C, step, shared + slot * Shape::kStepSize);
  };
  const auto copy_weight = [&](int step, int slot) {
    copy_step<Shape, kTileColumns>(p.weight, n, p.N, p.C, step,
                                   shared + slot * Shape::kStepSize + kTileRows * kStepVectors);
  };
  const int steps = static_cast<int>(divide_up(p.C, kStepChunks * kChunkColumns));

#pragma unroll 1
  for (int s = 0; s < kSteps - 1; ++s)
    if (s < steps) copy_weight(s, s);
  let_next_kernel_start();
  wait_for_previous_kernel();
#pragma unroll 1
  for (int s = 0; s < kSteps - 1; ++s) {
    if (s < steps) copy_x(s, s);
    commit_copies();
  }

  typename Shape::Sums part = {}, sums = {};
  const int chunks = static_cast<int>(divide_up(p.C, kChunkColumns));
  // Each warp of a gemv has a part of the sum.
  const int chunks_of_part = static_cast<int>(divide_up(p.C, kGemvWarps * kChunkColumns));
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
    const uint4* const rows = shared + slot * Shape::kStepSize;
    slot = slot == kSteps - 1 ? 0 : slot + 1;
#pragma unroll
    for (int c = 0; c < kStepChunks; ++c) {
      if (step * kStepChunks + c >= chunks) break;
      if (left == 0) {
        end_part<Shape>(part, sums);
        left = chunks_of_part;
      }
      --left;
      multiply_chunk<Shape>(part, rows + warp_row * kStepVectors,
                            rows + (kTileRows + warp_column) * kStepVectors, c);
    }
  }
  end_part<Shape>(part, sums);
  store_tile<Shape>(p, m, n, warp_row, warp_column, sums, shared);
}

constexpr int kFloatRows = 4;  // of x in a warp

__global__ void __launch_bounds__(kGemvThreads) float_kernel(GemmParams p, int) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const TileOrigin tile(p, kFloatRows, kGemvWarps);
  const int64_t m = tile.m, n = tile.n + warp;
  let_next_kernel_start();
  wait_for_previous_kernel();
  if (n >= p.N) return;
  const float* const weight = static_cast<const float*>(p.weight) + n * p.C;
  const float* const x = static_cast<const float*>(p.x) + m * p.C;
  const int rows = p.M - m < kFloatRows ? static_cast<int>(p.M - m) : kFloatRows;
  float sums[kFloatRows] = {};
  for (int64_t first = lane * 4; first < p.C; first += kWarp * 4)
    for (int64_t c = first; c < first + 4 && c < p.C; ++c)
#pragma unroll
      for (int r = 0; r < kFloatRows; ++r)
        if (r < rows) sums[r] = fmaf(x[r * p.C + c], weight[c], sums[r]);
#pragma unroll
  for (int r = 0; r < kFloatRows; ++r) {
    const float sum = warp_reduce(sums[r], Add());
    if (lane == 0 && r < rows) static_cast<float*>(p.out)[(m + r) * p.N + n] = sum;
  }
}

constexpr int kPackedTileRows = 32;  // of x

// A lane's part of a range, in registers. Lanes read whole packed lines.
template <Format kFormat>
struct RegisterRange {
  uint2 values[kRangeGroups][kPieces<kFormat>];
  uint32_t codes;  // int4: 4 of the range's 128 scales

  // Loads groups first .. first + groups - 1 of the 16 rows of C columns in `block`.
  VOX_DEVICE void load(const char* block, int C, int first, int groups) {
    const int lane = threadIdx.x % kWarp;
    const char* const from =
        block + static_cast<int64_t>(first) * kGroupBytes<kFormat> + lane % 4 * 64 + lane / 4 * 8;
#pragma unroll
    for (int k = 0; k < kRangeGroups; ++k)
#pragma unroll
      for (int i = 0; i < kPieces<kFormat>; ++i) {
        values[k][i] = {};
        if (k < groups) values[k][i] = load_stream8(from + k * kGroupBytes<kFormat> + i * 256);
      }
    codes = 0;
    if (kFormat == Format::int4 && lane < 4 * groups)
      codes = load_stream4(block + C / kGroup * kGroupBytes<kFormat> + first * 16 + lane * 4);
  }

  VOX_DEVICE void operand(int k, uint32_t (&a)[4]) const { to_operand<kFormat>(values[k], a); }
  VOX_DEVICE float2 group_scales(int k) const {
    const int g = threadIdx.x % kWarp / 4;
    return decode_scales(__shfl_sync(kWholeWarp, codes, 4 * k + g / 2) >> g % 2 * 16);
  }
};

template <typename T, Format kFormat, int kBlocks>
__global__ void __launch_bounds__(kGemvThreads, 2) packed_tile_kernel(GemmParams p, int) {
  using Shared = PackedShared<kPackedTileRows>;
  constexpr int kPackedColumns = kBlocks * kPackedTile;  // of out
  constexpr int kRangesPerStep = kGemvWarps / kBlocks;   // of a row
  constexpr int kStepGroups = kRangesPerStep * kRangeGroups;
  constexpr int kRowStep = kGemvThreads / kPackedColumns, kOutputs = kPackedTileRows / kRowStep;
  constexpr int kPartialSize = kPackedTileRows * kSumStride;
  VOX_DYNAMIC_SHARED(unsigned char, raw);
  const int warp = threadIdx.x / kWarp, slot = warp / kBlocks;
  const auto [m, n] = TileOrigin(p, kPackedTileRows, kPackedColumns);
  const int C = static_cast<int>(p.C), groups = C / kGroupColumns;
  const int rows = p.M - m < kPackedTileRows ? static_cast<int>(p.M - m) : kPackedTileRows;
  const int log_rows = ceil_log2(rows);
  const Shared shared(raw, kRangesPerStep, log_rows);

  // The i-th 16 rows of W of this block; null past its last row.
  const auto block_of = [&](int i) {
    const int64_t block = n / kPackedTile + i, bytes = block_bytes(kFormat, C);
    return block * kPackedTile < p.N ? static_cast<const char*>(p.weight) + block * bytes : nullptr;
  };
  const char* const block = block_of(warp % kBlocks);
  const auto groups_of_step = [&](int step) {  // of this warp's range
    const int left = block ? groups - step - slot * kRangeGroups : 0;
    return left < 0 ? 0 : left < kRangeGroups ? left : kRangeGroups;
  };
  RegisterRange<kFormat> w;
  w.load(block, C, slot * kRangeGroups, groups_of_step(0));
  // This thread stores `column` of rows first_row, first_row + kRowStep, ... of out's tile.
  const int column = threadIdx.x % kPackedColumns, first_row = threadIdx.x / kPackedColumns;
  const char* const scales = block_of(column / kPackedTile);
  float row_scale = 0;
  if (scales)
    row_scale =
        reinterpret_cast<const float*>(scales + block_bytes(kFormat, C) - 64)[column % kPackedTile];
  let_next_kernel_start();
  wait_for_previous_kernel();  // no kernel writes weights, so their loads may precede it

  const SourceRows<T, false> x = {static_cast<const T*>(p.x) + m * C, C,
                                  reinterpret_cast<uintptr_t>(p.x) % 16 == 0};
  float totals[kOutputs] = {};
  for (int step = 0; step < groups; step += kStepGroups) {
    const int step_groups = groups - step < kStepGroups ? groups - step : kStepGroups;
    quantize_rows<kFormat>(x, rows, log_rows, step, step_groups, shared);
    __syncthreads();
    if (groups_of_step(step) > 0) {
      float sums[kRowTiles<kPackedTileRows>][4];
      multiply_range<kFormat>(w, shared, slot * kRangeGroups, rows, log_rows, sums);
      store_sums<kPackedTileRows>(sums, rows, shared.partials + warp * kPartialSize);
    }
    const int next = step + kStepGroups;
    if (next < groups) w.load(block, C, next + slot * kRangeGroups, groups_of_step(next));
    __syncthreads();
    const int used = packed_ranges(step_groups * kGroup);
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      const int row = first_row + i * kRowStep;
      if (row >= rows) break;
      const float* from = shared.partials + column / kPackedTile * kPartialSize + row * kSumStride +
                          column % kPackedTile;
#pragma unroll 8
      for (int s = 0; s < used; ++s) totals[i] += from[s * (kBlocks * kPartialSize)];
    }
  }
  T* const out = static_cast<T*>(p.out) + m * p.N + n;
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) {
    const int row = first_row + i * kRowStep;
    if (row < rows && n + column < p.N)
      out[row * p.N + column] = from_float<T>(__fmul_rn(totals[i], row_scale));
  }
}

}  // namespace
}  // namespace voxkern::gemm_kernels
