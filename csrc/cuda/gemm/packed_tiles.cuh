// Products of many rows of x with packed weights: a block takes 32 rows of x and 16 kBlocks of W,
// whose warps take ranges (packed_dots.cuh) in turns. A warp asks for all of a range at once,
// before it waits for anything: 4 KB in int8, 2 KB in int4, in 32 or 16 registers a lane. x is
// quantized meanwhile, once a block and turn.
#pragma once

#include "cuda/gemm/packed_dots.cuh"
#include "params/linear.h"

namespace voxkern {
namespace {

constexpr int kThreads = 256;
constexpr int kTileM = 32;

// What a lane has of a range. Lanes read whole packed lines.
template <Format kFormat>
struct PackedRange {
  uint2 values[kRange][kLoads<kFormat>];
  uint32_t codes;  // int4: of 4 of the range's 128 scales

  // Groups first .. first + groups - 1 of the 16 rows of C columns that `block` holds.
  __device__ __forceinline__ void read(const char* block, int C, int first, int groups) {
    const int lane = threadIdx.x % kWarp;
    const char* const from =
        block + static_cast<int64_t>(first) * kGroupBytes<kFormat> + lane % 4 * 64 + lane / 4 * 8;
    const auto load = [&](int count) {
#pragma unroll
      for (int k = 0; k < kRange; ++k)
#pragma unroll
        for (int i = 0; i < kLoads<kFormat>; ++i) {
          values[k][i] = {};
          if (k < count) values[k][i] = load_stream8(from + k * kGroupBytes<kFormat> + i * 256);
        }
    };
    if (groups == kRange)
      load(kRange);
    else
      load(groups);
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

// blockIdx.x counts tiles of x, so that the next blocks find the weights still near.
template <typename T, Format kFormat, int kBlocks>
__global__ void __launch_bounds__(kThreads, 2) packed_tile_kernel(LinearParams p) {
  using Shared = PackedShared<kTileM>;
  constexpr int kRows = kBlocks * static_cast<int>(kBlockRows), kSlots = kThreads / kWarp / kBlocks;
  constexpr int kOutputs = kRows * kTileM / kThreads, kStep = kThreads / kRows;
  VOX_DYNAMIC_SHARED(unsigned char, raw);
  const int warp = threadIdx.x / kWarp, slot = warp / kBlocks;
  const int64_t m = static_cast<int64_t>(blockIdx.x) * kTileM;
  const int64_t n = static_cast<int64_t>(blockIdx.y) * kRows, N = p.weight.N;
  const int C = static_cast<int>(p.weight.C), groups = C / static_cast<int>(kGroup);
  const int rows = p.M - m < kTileM ? static_cast<int>(p.M - m) : kTileM, log_rows = log_up(rows);
  const Shared shared(raw, kSlots, log_rows);
  const auto block_at = [&](int i) -> const char* {  // where the i-th 16 rows of W begin, or null
    const int64_t block = n / kBlockRows + i;
    return block * kBlockRows < N
               ? static_cast<const char*>(p.weight.data) + block * block_bytes(kFormat, C)
               : nullptr;
  };

  const char* const block = block_at(warp % kBlocks);
  const auto in_range = [&](int turn) {  // groups that this warp has in the turn that begins there
    const int left = block ? groups - turn - slot * kRange : 0;
    return left < 0 ? 0 : left < kRange ? left : kRange;
  };
  PackedRange<kFormat> w;
  w.read(block, C, slot * kRange, in_range(0));
  const int row = threadIdx.x % kRows;
  const char* const scales = block_at(row / kBlockRows);
  float row_scale = 0;
  if (scales)
    row_scale = reinterpret_cast<const float*>(scales + block_bytes(kFormat, C) -
                                               64)[row % static_cast<int>(kBlockRows)];
  let_next_kernel_start();
  wait_for_previous_kernel();  // weights are nobody's output: they may come before

  const PlainRows<T> x = {.x = static_cast<const T*>(p.x) + m * C,
                          .C = C,
                          .aligned = reinterpret_cast<uintptr_t>(p.x) % 16 == 0};
  float totals[kOutputs] = {};
  const int first_m = threadIdx.x / kRows;
  for (int turn = 0; turn < groups; turn += kSlots * kRange) {
    const int left = groups - turn, in_turn = left < kSlots * kRange ? left : kSlots * kRange;
    quantize_rows<kFormat, kTileM, kThreads>(x, rows, log_rows, turn, in_turn, shared.values,
                                             shared.scales);
    __syncthreads();
    if (in_range(turn) > 0) {
      float sums[kTiles<kTileM>][4];
      if (rows <= kTileM / 2)
        multiply<kFormat, kTiles<kTileM> / 2>(w, shared, slot * kRange, rows, log_rows, sums);
      else
        multiply<kFormat, kTiles<kTileM>>(w, shared, slot * kRange, rows, log_rows, sums);
      store_sums<kTileM>(sums, rows, shared.partials + warp * kTileM * Shared::kStride);
    }
    const int next = turn + kSlots * kRange;
    if (next < groups) w.read(block, C, next + slot * kRange, in_range(next));
    __syncthreads();
    const int used = (in_turn + kRange - 1) / kRange;
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      const int at = first_m + i * kStep;
      if (at >= rows) break;
      const float* from = shared.partials + (row / 16 * kTileM + at) * Shared::kStride + row % 16;
#pragma unroll 8
      for (int s = 0; s < used; ++s) totals[i] += from[s * (kBlocks * kTileM * Shared::kStride)];
    }
  }
  T* const out = static_cast<T*>(p.out) + m * N + n;
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) {
    const int at = first_m + i * kStep;
    if (at < rows && n + row < N)
      out[at * N + row] = from_float<T>(__fmul_rn(totals[i], row_scale));
  }
}

}  // namespace
}  // namespace voxkern
