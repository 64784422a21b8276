// out = x W^T where no gemv applies: many rows of x, float32, and rows of any alignment.
//
// dense_tile_kernel, plain bfloat16. A block multiplies a tile of x's rows and W's rows; both come
// through shared memory in steps of 64 columns, by asynchronous copies, as many steps ahead as 96
// KB hold. A row of a step is 8 vectors of 16 bytes; odd rows exchange their two halves, so that
// the 8 lanes of a quarter warp, which read 4 vectors of 2 rows, meet all 32 banks once. A vector
// is two products of 16 columns, in an order of columns that both operands share. Order of sums:
// DenseGemv's, to the bit, hence two sets of accumulators: of the current eighth of the columns and
// of all before it.
//
// packed_tile_kernel, packed weights. A block takes 32 rows of x and 16 kBlocks rows of W, whose
// warps take ranges (formats.cuh) in turn. A warp loads a whole range, in 32 or 16 registers a
// lane, before it waits for anything; meanwhile x is quantized, once for each block and step.
//
// float_kernel, plain float32, for tests of equality: a warp takes a row of W and 4 of x, lane l
// columns 4 l .. 4 l + 3 of every 128; the lanes' sums are added at the end.
//
// Tiles of the same rows of W are neighbours in the grid, so W comes from memory once for all rows.
// Rounded once, when out is stored. Floor: 2 M N C operations, or W's bytes over 3.35 TB/s;
// docs/cuda.md has both for CSM's shapes.
#pragma once

#include "cuda/gemm/weight_pipeline.cuh"

namespace voxkern::gemm_kernels {
namespace {

constexpr int kStepVectors = 8;  // of a row, in a step
constexpr int kStepChunks = kStepVectors / kChunkLanes;

struct TileShape {
  int rows, columns;            // of x and of W in a block's tile
  int warp_rows, warp_columns;  // of them a warp's
  bool aligned = true;          // rows are vector-aligned

  VOX_HOST_DEVICE constexpr int threads() const {
    return rows / warp_rows * (columns / warp_columns) * kWarp;
  }
  VOX_HOST_DEVICE constexpr int step_size() const { return (rows + columns) * kStepVectors; }
  VOX_HOST_DEVICE constexpr int steps() const { return (96 << 10) / (step_size() * 16); }
  VOX_HOST_DEVICE constexpr int shared_bytes() const { return steps() * step_size() * 16; }
};

// Copies columns of step `step` of kRows of an operand's rows, from row `first` on, to `to`.
template <TileShape kShape, int kRows>
VOX_DEVICE void copy_step(const void* operand, int64_t first, int64_t rows, int64_t C, int step,
                          uint4* to) {
  constexpr int kCopyRows = kShape.threads() / kStepVectors;
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
    if constexpr (kShape.aligned)
      copy_async_16(to + i * kStepVectors, from + i * C, exists);
    else
      to[i * kStepVectors] = exists ? load_unaligned(from + i * C, columns_left) : uint4{};
  }
}

// part += a step's chunk of 32 columns, as kHigh x kWide products of 16 rows of x and 8 of W.
template <int kHigh, int kWide>
VOX_DEVICE void multiply_chunk(float (&part)[kHigh][kWide][4], const uint4* x, const uint4* weight,
                               int chunk) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;  // as in multiply_bf16
  const int at = g * kStepVectors + ((chunk * kChunkLanes + t) ^ g % 2 * 4);
  uint4 low[kHigh], high[kHigh], w[kWide];
#pragma unroll
  for (int i = 0; i < kHigh; ++i) {
    low[i] = x[i * 16 * kStepVectors + at];
    high[i] = x[(i * 16 + 8) * kStepVectors + at];
  }
#pragma unroll
  for (int j = 0; j < kWide; ++j) w[j] = weight[j * 8 * kStepVectors + at];
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

// sums += part, and part = 0.
template <int kHigh, int kWide>
VOX_DEVICE void end_part(float (&part)[kHigh][kWide][4], float (&sums)[kHigh][kWide][4]) {
#pragma unroll
  for (int i = 0; i < kHigh * kWide * 4; ++i) {
    float& value = part[i / 4 / kWide][i / 4 % kWide][i % 4];
    sums[i / 4 / kWide][i / 4 % kWide][i % 4] += value;
    value = 0;
  }
}

// Stores a tile through shared memory, so that a row of it is stored in whole vectors.
template <TileShape kShape, int kHigh, int kWide>
VOX_DEVICE void store_tile(const GemmParams& p, int64_t m, int64_t n, int warp_row, int warp_column,
                           const float (&sums)[kHigh][kWide][4], void* shared) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  constexpr int kOutStride = kShape.columns + kLaneValues;  // avoids bank conflicts
  static_assert(kShape.rows * kOutStride * 2 <= kShape.shared_bytes());
  bf16* const tile = static_cast<bf16*>(shared);  // [rows][kOutStride]
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kHigh; ++i)
#pragma unroll
    for (int j = 0; j < kWide; ++j)
#pragma unroll
      for (int e = 0; e < 4; e += 2)
        *reinterpret_cast<uint32_t*>(tile + (warp_row + i * 16 + g + e / 2 * 8) * kOutStride +
                                     warp_column + j * 8 + t * 2) =
            bf16x2_bits(sums[i][j][e], sums[i][j][e + 1]);
  __syncthreads();
  constexpr int kRowVectors = kShape.columns / kLaneValues;
  bf16* const out = static_cast<bf16*>(p.out) + m * p.N + n;
  const bool vectors = p.N % kLaneValues == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
  for (int item = threadIdx.x; item < kShape.rows * kRowVectors; item += kShape.threads()) {
    const int row = item / kRowVectors, column = item % kRowVectors * kLaneValues;
    if (m + row >= p.M) break;
    const bf16* const from = tile + row * kOutStride + column;
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

template <int... kSizes>
__global__ void __launch_bounds__(TileShape{kSizes...}.threads())
    dense_tile_kernel(GemmParams p, int) {
  constexpr TileShape kShape = {kSizes...};
  constexpr int kAhead = kShape.steps() - 1;
  VOX_DYNAMIC_SHARED(uint4, shared);  // [steps][x: rows, W: columns][kStepVectors]
  const int warp = threadIdx.x / kWarp;
  const int warp_row = warp / (kShape.columns / kShape.warp_columns) * kShape.warp_rows;
  const int warp_column = warp % (kShape.columns / kShape.warp_columns) * kShape.warp_columns;
  const auto [m, n] = TileOrigin(p, kShape.rows, kShape.columns);
  const auto copy_x = [&](int step, int slot) {
    copy_step<kShape, kShape.rows>(p.x, m, p.M, p.C, step, shared + slot * kShape.step_size());
  };
  const auto copy_weight = [&](int step, int slot) {
    copy_step<kShape, kShape.columns>(
        p.weight, n, p.N, p.C, step,
        shared + slot * kShape.step_size() + kShape.rows * kStepVectors);
  };
  const int steps = static_cast<int>(divide_up(p.C, kStepChunks * kChunkColumns));

#pragma unroll 1
  for (int s = 0; s < kAhead; ++s)
    if (s < steps) copy_weight(s, s);
  let_next_kernel_start();
  wait_for_previous_kernel();
#pragma unroll 1
  for (int s = 0; s < kAhead; ++s) {
    if (s < steps) copy_x(s, s);
    commit_copies();
  }

  float part[kShape.warp_rows / 16][kShape.warp_columns / 8][4] = {};
  decltype(part) sums = {};
  const int chunks = static_cast<int>(divide_up(p.C, kChunkColumns));
  const int chunks_of_part =  // of a warp of a gemv
      static_cast<int>(divide_up(p.C, kGemvWarps * kChunkColumns));
  int left = chunks_of_part, slot = 0;
  for (int step = 0; step < steps; ++step) {
    wait_copies<kAhead - 1>();
    __syncthreads();  // all copies have arrived, and no thread reads the previous step any more
    if (step + kAhead < steps) {
      const int before = slot == 0 ? kAhead : slot - 1;
      copy_weight(step + kAhead, before);
      copy_x(step + kAhead, before);
    }
    commit_copies();
    const uint4* const rows = shared + slot * kShape.step_size();
    slot = slot == kAhead ? 0 : slot + 1;
#pragma unroll
    for (int c = 0; c < kStepChunks; ++c) {
      if (step * kStepChunks + c >= chunks) break;
      if (left == 0) {
        end_part(part, sums);
        left = chunks_of_part;
      }
      --left;
      multiply_chunk(part, rows + warp_row * kStepVectors,
                     rows + (kShape.rows + warp_column) * kStepVectors, c);
    }
  }
  end_part(part, sums);
  store_tile<kShape>(p, m, n, warp_row, warp_column, sums, shared);
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
  constexpr int kPackedPartialSize = kPackedTileRows * kSumStride;
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
  let_next_kernel_start();
  wait_for_previous_kernel();  // no kernel writes weights, so their loads may precede it

  // This thread stores `column` of rows first_row, first_row + kRowStep, ... of out's tile.
  const int column = threadIdx.x % kPackedColumns, first_row = threadIdx.x / kPackedColumns;
  float totals[kOutputs] = {};
  for (int step = 0; step < groups; step += kStepGroups) {
    const int step_groups = groups - step < kStepGroups ? groups - step : kStepGroups;
    const SourceRows<T, false> x = {static_cast<const T*>(p.x) + m * C, C,
                                    reinterpret_cast<uintptr_t>(p.x) % 16 == 0};
    quantize_rows<kFormat>(x, rows, log_rows, step, step_groups, shared);
    __syncthreads();
    if (groups_of_step(step) > 0) {
      float sums[kRowTiles<kPackedTileRows>][4];
      multiply_range<kFormat>(w, shared, slot * kRangeGroups, rows, log_rows, sums);
      store_sums<kPackedTileRows>(sums, rows, shared.partials + warp * kPackedPartialSize);
    }
    __syncthreads();
    // Not before the barrier, nor row_scale before the loop: sm_89 has no registers left for them.
    const int next = step + kStepGroups;
    if (next < groups) w.load(block, C, next + slot * kRangeGroups, groups_of_step(next));
    const int used = kRangesPerStep == 1 ? 1 : packed_ranges(step_groups * kGroup);
    const float* const partials = shared.partials + column / kPackedTile * kPackedPartialSize +
                                  first_row * kSumStride + column % kPackedTile;
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      if (first_row + i * kRowStep >= rows) break;
#pragma unroll kRangesPerStep
      for (int s = 0; s < used; ++s)
        totals[i] += partials[s * (kBlocks * kPackedPartialSize) + i * (kRowStep * kSumStride)];
    }
  }
  if (n + column >= p.N) return;
  const char* const scales = block_of(column / kPackedTile) + block_bytes(kFormat, C) - 64;
  const float row_scale = reinterpret_cast<const float*>(scales)[column % kPackedTile];
  T* const out = static_cast<T*>(p.out) + m * p.N + n;
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) {
    const int row = first_row + i * kRowStep;
    if (row < rows) out[row * p.N + column] = from_float<T>(__fmul_rn(totals[i], row_scale));
  }
}

}  // namespace
}  // namespace voxkern::gemm_kernels
