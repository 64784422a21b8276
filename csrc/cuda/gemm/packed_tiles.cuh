// out = x W^T with packed weights where no gemv applies: more than 16 rows of x, and float32. A
// block takes 32 rows of x and 16 kBlocks rows of W, whose warps take ranges (formats.cuh) in turn.
// A warp loads all of a range before it waits for anything: 4 KB in int8, 2 KB in int4, in 32 or 16
// registers a lane. Meanwhile x is quantized, once for each block and step. Rounded once, when out
// is stored. Floor: W's bytes over 3.35 TB/s.
#pragma once

#include "cuda/gemm/formats.cuh"
#include "cuda/gemm/gemm.h"

namespace voxkern::gemm_kernels {
namespace {

constexpr int kPackedThreads = 256;
constexpr int kPackedRows = 32;  // of x

// A lane's part of a range, in registers. Lanes read whole packed lines.
template <Format kFormat>
struct RegisterRange {
  uint2 values[kRangeGroups][kPieces<kFormat>];
  uint32_t codes;  // int4: 4 of the range's 128 scales

  // Loads groups first .. first + groups - 1 of the 16 rows of C columns in `block`.
  __device__ __forceinline__ void load(const char* block, int C, int first, int groups) {
    const int lane = threadIdx.x % kWarp;
    const char* const from =
        block + static_cast<int64_t>(first) * kGroupBytes<kFormat> + lane % 4 * 64 + lane / 4 * 8;
    const auto load_groups = [&](int count) {
#pragma unroll
      for (int k = 0; k < kRangeGroups; ++k)
#pragma unroll
        for (int i = 0; i < kPieces<kFormat>; ++i) {
          values[k][i] = {};
          if (k < count) values[k][i] = load_stream8(from + k * kGroupBytes<kFormat> + i * 256);
        }
    };
    if (groups == kRangeGroups)
      load_groups(kRangeGroups);
    else
      load_groups(groups);
    codes = 0;
    if (kFormat == Format::int4 && lane < 4 * groups)
      codes = load_stream4(block + C / kGroup * kGroupBytes<kFormat> + first * 16 + lane * 4);
  }

  __device__ __forceinline__ void operand(int k, uint32_t (&a)[4]) const {
    to_operand<kFormat>(values[k], a);
  }
  __device__ __forceinline__ float2 group_scales(int k) const {
    const int g = threadIdx.x % kWarp / 4;
    return decode_scales(__shfl_sync(kWholeWarp, codes, 4 * k + g / 2) >> g % 2 * 16);
  }
};

// The i-th 16 rows of W from row n on; null past its last row.
template <Format kFormat>
__device__ __forceinline__ const char* packed_block(const GemmParams& p, int64_t n, int i) {
  const int64_t block = n / kBlockRows + i;
  return block * kBlockRows < p.N ? static_cast<const char*>(p.weight) +
                                        block * block_bytes(kFormat, static_cast<int>(p.C))
                                  : nullptr;
}

// blockIdx.x counts tiles of x, so that the blocks of the same weights are neighbours.
template <typename T, Format kFormat, int kBlocks>
__global__ void __launch_bounds__(kPackedThreads, 2) packed_tile_kernel(GemmParams p) {
  using Shared = PackedShared<kPackedRows>;
  constexpr int kColumns = kBlocks * static_cast<int>(kBlockRows);  // of out
  constexpr int kSlots = kPackedThreads / kWarp / kBlocks;          // ranges of a row in a step
  constexpr int kStepGroups = kSlots * kRangeGroups;
  constexpr int kRowStep = kPackedThreads / kColumns, kOutputs = kPackedRows / kRowStep;
  VOX_DYNAMIC_SHARED(unsigned char, raw);
  const int warp = threadIdx.x / kWarp, slot = warp / kBlocks;
  const int64_t m = static_cast<int64_t>(blockIdx.x) * kPackedRows;
  const int64_t n = static_cast<int64_t>(blockIdx.y) * kColumns;
  const int C = static_cast<int>(p.C), groups = C / static_cast<int>(kGroup);
  const int rows = p.M - m < kPackedRows ? static_cast<int>(p.M - m) : kPackedRows;
  const int log_rows = ceil_log2(rows);
  const Shared shared(raw, kSlots, log_rows);

  const char* const block = packed_block<kFormat>(p, n, warp % kBlocks);
  const auto groups_of_step = [&](int step) {  // of this warp's range
    const int left = block ? groups - step - slot * kRangeGroups : 0;
    return left < 0 ? 0 : left < kRangeGroups ? left : kRangeGroups;
  };
  RegisterRange<kFormat> w;
  w.load(block, C, slot * kRangeGroups, groups_of_step(0));
  // This thread stores `column` of rows first_row, first_row + kRowStep, ... of out's tile.
  const int column = threadIdx.x % kColumns, first_row = threadIdx.x / kColumns;
  const char* const scales = packed_block<kFormat>(p, n, column / kBlockRows);
  float row_scale = 0;
  if (scales)
    row_scale = reinterpret_cast<const float*>(scales + block_bytes(kFormat, C) -
                                               64)[column % static_cast<int>(kBlockRows)];
  let_next_kernel_start();
  wait_for_previous_kernel();  // no kernel writes weights, so their loads may precede it

  const GlobalRows<T> x = {.x = static_cast<const T*>(p.x) + m * C,
                           .C = C,
                           .aligned = reinterpret_cast<uintptr_t>(p.x) % 16 == 0};
  float totals[kOutputs] = {};
  for (int step = 0; step < groups; step += kStepGroups) {
    const int step_groups = groups - step < kStepGroups ? groups - step : kStepGroups;
    quantize_rows<kFormat, kPackedRows, kPackedThreads>(x, rows, log_rows, step, step_groups,
                                                        shared.values, shared.scales);
    __syncthreads();
    if (groups_of_step(step) > 0) {
      constexpr int kAll = kRowTiles<kPackedRows>;
      float sums[kAll][4];
      if (rows <= kPackedRows / 2)
        multiply_range<kFormat, kAll / 2>(w, shared, slot * kRangeGroups, rows, log_rows, sums);
      else
        multiply_range<kFormat, kAll>(w, shared, slot * kRangeGroups, rows, log_rows, sums);
      store_sums<kPackedRows>(sums, rows, shared.partials + warp * kPackedRows * Shared::kStride);
    }
    const int next = step + kStepGroups;
    if (next < groups) w.load(block, C, next + slot * kRangeGroups, groups_of_step(next));
    __syncthreads();
    const int used = (step_groups + kRangeGroups - 1) / kRangeGroups;
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      const int row = first_row + i * kRowStep;
      if (row >= rows) break;
      const float* from =
          shared.partials + (column / 16 * kPackedRows + row) * Shared::kStride + column % 16;
#pragma unroll 8
      for (int s = 0; s < used; ++s)
        totals[i] += from[s * (kBlocks * kPackedRows * Shared::kStride)];
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

template <typename T, Format kFormat, int kBlocks>
void launch_packed(const GemmParams& p, cudaStream_t stream) {
  constexpr int kColumns = kBlocks * static_cast<int>(kBlockRows), kWarps = kPackedThreads / kWarp;
  const int log_rows = ceil_log2(static_cast<int>(p.M < kPackedRows ? p.M : kPackedRows));
  const int64_t blocks = divide_up(p.N, kColumns);
  if (blocks > 65535)  // the grid's second dimension is 16 bits wide
    throw std::runtime_error("weight: packed, on CUDA expected at most " +
                             std::to_string(65535 * kColumns) + " rows");
  launch(packed_tile_kernel<T, kFormat, kBlocks>,
         {.grid = dim3(static_cast<unsigned>(divide_up(p.M, kPackedRows)),
                       static_cast<unsigned>(blocks)),
          .block = dim3(kPackedThreads),
          .shared_bytes = static_cast<size_t>(
              PackedShared<kPackedRows>::bytes(kWarps / kBlocks, kWarps, log_rows)),
          .stream = stream,
          .overlaps_previous = p.overlaps_previous},
         p);
}

// 128 rows of W a block, so that x is read and quantized once for many of them. Where that would
// leave multiprocessors idle (fewer than 128 blocks; an H100 has 132): 16 rows, 8 ranges at a time.
template <typename T, Format kFormat>
void launch_packed_tiles(const GemmParams& p, cudaStream_t stream) {
  constexpr int kWide = 8;
  if (divide_up(p.N, kWide * kBlockRows) * divide_up(p.M, kPackedRows) >= 128)
    launch_packed<T, kFormat, kWide>(p, stream);
  else
    launch_packed<T, kFormat, 1>(p, stream);
}

}  // namespace
}  // namespace voxkern::gemm_kernels
