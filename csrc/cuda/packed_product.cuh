// Products with packed weights (csrc/weight.h) through the tensor cores, in parts for kernels to
// put together: a warp's weights on their way into registers (PackedRange), integer dots of them
// and quantized rows of x, with their scales (multiply), and a block's whole work, with functors
// for where weights and x come from and where sums go (packed_product).
//
// The unit is a range of 8 groups: 256 columns of 16 rows of W. A warp asks for all of it at once,
// before it waits for anything: 4 KB in int8, 2 KB in int4, in 32 or 16 registers a lane. With one
// row of x a thread has 64 registers, so that 32 warps of a multiprocessor have 128 or 64 KB under
// way; with more it has about 100, and they have half of it. 18 to 64 KB keep the memory busy. x is
// quantized meanwhile, once a block. One instruction then gives a group's dots with 8 rows of x.
// Weights are the operand with 16 rows, so one row of x costs what 8 do.
//
// Lanes read whole packed lines: which of W's rows and columns an operand's rows and columns are is
// free, as long as x and the sums know. With g = lane / 4 and t = lane % 4, rows 2 g and 2 g + 1 of
// W are rows g and g + 8 there, so a lane's 8 bytes are neighbours, and chunks t and t + 4 (int8)
// or the halves of chunk t (int4) are its columns.
//
// Sums: a group's dot is exact; a range's groups are added in their order, then ranges in theirs.
// So a sum depends on x's row, W's row and C alone, whatever shape the block has.
#pragma once

#include "quantize.cuh"

namespace voxkern {
namespace {

template <int kTileM>
constexpr int kTiles = (kTileM + 7) / 8;

// What a lane has of a range.
template <Format kFormat>
struct PackedRange {
  static_assert(kFormat == Format::int8 || kFormat == Format::int4);
  static constexpr int kLoads = kFormat == Format::int8 ? 2 : 1;

  uint2 values[kRange][kLoads];
  uint32_t codes;  // int4: of 4 of the range's 128 scales

  // Groups first .. first + groups - 1 of the 16 rows of C columns that `block` holds.
  __device__ __forceinline__ void read(const char* block, int C, int first, int groups) {
    const int lane = threadIdx.x % kWarp;
    const char* const from =
        block + static_cast<int64_t>(first) * group_bytes(kFormat) + lane % 4 * 64 + lane / 4 * 8;
    const auto load = [&](int count) {
#pragma unroll
      for (int k = 0; k < kRange; ++k)
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          values[k][i] = {};
          if (k < count) values[k][i] = load_stream8(from + k * group_bytes(kFormat) + i * 256);
        }
    };
    if (groups == kRange)
      load(kRange);
    else
      load(groups);
    codes = 0;
    if (kFormat == Format::int4 && lane < 4 * groups)
      codes = load_stream4(block + C / kGroup * group_bytes(kFormat) + first * 16 + lane * 4);
  }

  // Group k as an operand. int4: each value as 16 times itself, which is the high half of a byte
  // when its highest bit is turned over.
  __device__ __forceinline__ void operand(int k, uint32_t (&a)[4]) const {
    if constexpr (kFormat == Format::int8) {
      a[0] = values[k][0].x, a[1] = values[k][0].y, a[2] = values[k][1].x, a[3] = values[k][1].y;
    } else {
      const auto high = [](uint32_t w) { return (w & 0xf0f0f0f0) ^ 0x80808080; };
      a[0] = high(values[k][0].x << 4), a[1] = high(values[k][0].y << 4);
      a[2] = high(values[k][0].x), a[3] = high(values[k][0].y);
    }
  }

  // int4: of rows 2 g and 2 g + 1 in group k, a 16th of their scales. The whole warp calls it.
  __device__ __forceinline__ float2 group_scales(int k) const {
    const int g = threadIdx.x % kWarp / 4;
    const uint32_t both = __shfl_sync(kWholeWarp, codes, 4 * k + g / 2) >> g % 2 * 16;
    constexpr uint32_t kExponent = 116 << 23;  // of 2^(-7 - 4)
    return {__uint_as_float((((both & 0x7f) << 19) + kExponent) | (both << 24 & 0x80000000)),
            __uint_as_float((((both & 0x7f00) << 11) + kExponent) | (both << 16 & 0x80000000))};
  }
};

// Where a block of warps * 32 threads keeps what packed_product needs, for up to kTileM rows of x
// and a turn of slots * 8 groups.
template <int kTileM>
struct PackedShared {
  static constexpr int kStride = 20;  // of a column of 16 sums: so the lanes meet no bank twice
  int8_t* values;   // [groups, rows of x up to a power of two, 32], in the order of the operand
  float* scales;    // [groups, kTileM]
  float* partials;  // [slots, kBlocks, kTileM, kStride], sums of a range

  static size_t bytes(int slots, int blocks, int log_rows) {
    return static_cast<size_t>(slots) * (kRange * ((kGroup << log_rows) + kTileM * 4) +
                                         static_cast<size_t>(blocks) * kTileM * kStride * 4);
  }
  __device__ __forceinline__ PackedShared(unsigned char* raw, int slots, int log_rows)
      : values(reinterpret_cast<int8_t*>(raw)),
        scales(reinterpret_cast<float*>(raw + (slots * kRange * kGroup << log_rows))),
        partials(scales + slots * kRange * kTileM) {}
};

// sums = of W's range, whose groups are `first` and after in shared memory, and of x's rows, 8 at a
// time: rows 2 g (sums 0, 1) and 2 g + 1 of W, 2 t (sums 0, 2) and 2 t + 1 of x. Sums of rows past
// x's last are anything. kUsed: how many times 8 rows there are, at most.
template <int kUsed, Format kFormat, int kTileM>
__device__ __forceinline__ void multiply(const PackedRange<kFormat>& w,
                                         const PackedShared<kTileM>& shared, int first, int rows,
                                         int log_rows, float (&sums)[kTiles<kTileM>][4]) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int tile = 0; tile < kTiles<kTileM>; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[tile][i] = 0;
#pragma unroll
  for (int k = 0; k < kRange; ++k) {
    uint32_t a[4];
    w.operand(k, a);
    float2 row_scales;
    if constexpr (kFormat == Format::int4) row_scales = w.group_scales(k);
#pragma unroll
    for (int tile = 0; tile < kUsed; ++tile) {
      const int m = tile * 8 + g;
      uint2 b = {};
      if (m < rows)
        b = *reinterpret_cast<const uint2*>(
            shared.values + (((first + k) << log_rows) + m) * static_cast<int>(kGroup) + t * 8);
      int32_t dots[4];
      multiply_s8(dots, a, b.x, b.y, kMagicBits);
      const float* const from = shared.scales + (first + k) * kTileM;
      float2 x_scales;
      if constexpr (kTileM > 1)
        x_scales = *reinterpret_cast<const float2*>(from + tile * 8 + t * 2);
      else
        x_scales = {*from, 0};
#pragma unroll
      for (int i = 0; i < 4; i += kTileM > 1 ? 1 : 2) {
        float scale = i % 2 ? x_scales.y : x_scales.x;
        if constexpr (kFormat == Format::int4) scale *= i / 2 ? row_scales.y : row_scales.x;
        // Spelt out, so that it is the same in whatever kernel.
        sums[tile][i] = fmaf(__int_as_float(dots[i]) - kMagic, scale, sums[tile][i]);
      }
    }
  }
}

// A block's product: 16 kBlocks rows of W and `rows` <= kTileM rows of x, of C columns. Warps take
// ranges in turns, blockDim.x / 32 / kBlocks a turn; with a kTileM of 1, which leaves registers to
// the weights, all in one. `weights(i)`: where the packed bytes of the i-th 16 rows of W begin,
// null if there are none. `emit(row, m, sum)` of row < 16 kBlocks; row is threadIdx.x % (16
// kBlocks). kOutputs: no less than 16 kBlocks kTileM / blockDim.x. Weights are read before the wait
// for the kernel in front, x behind it.
template <Format kFormat, int kBlocks, int kTileM, int kOutputs, typename Weights, typename Source,
          typename Emit>
__device__ __forceinline__ void packed_product(const Weights& weights, int C, const Source& source,
                                               int rows, const Emit& emit) {
  using Shared = PackedShared<kTileM>;
  constexpr int kRows = kBlocks * static_cast<int>(kBlockRows);
  VOX_DYNAMIC_SHARED(unsigned char, raw);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int slots = blockDim.x / kWarp / kBlocks, slot = warp / kBlocks;
  const int groups = C / static_cast<int>(kGroup), log_rows = log_up(rows);
  const Shared shared(raw, slots, log_rows);

  const char* const block = weights(warp % kBlocks);
  const auto in_range = [&](int turn) {  // groups that this warp has in the turn that begins there
    const int left = block ? groups - turn - slot * kRange : 0;
    return left < 0 ? 0 : left < kRange ? left : kRange;
  };
  PackedRange<kFormat> w;
  w.read(block, C, slot * kRange, in_range(0));
  const int row = threadIdx.x % kRows;
  const char* const scales = weights(row / kBlockRows);
  float row_scale = 0;
  if (scales)
    row_scale = reinterpret_cast<const float*>(scales + block_bytes(kFormat, C) -
                                               64)[row % static_cast<int>(kBlockRows)];
  let_next_kernel_start();
  wait_for_previous_kernel();  // weights are nobody's output: they may come before

  float totals[kOutputs] = {};
  const int first_m = threadIdx.x / kRows, step = blockDim.x / kRows;
  for (int turn = 0; turn < groups; turn += slots * kRange) {
    const int left = groups - turn, in_turn = left < slots * kRange ? left : slots * kRange;
    quantize_rows<kFormat, kTileM>(source, rows, log_rows, turn, in_turn, shared.values,
                                   shared.scales);
    __syncthreads();
    float sums[kTiles<kTileM>][4];
    if (in_range(turn) > 0) {
      if (kTiles<kTileM> > 1 && rows <= kTileM / 2)
        multiply<(kTiles<kTileM> + 1) / 2>(w, shared, slot * kRange, rows, log_rows, sums);
      else
        multiply<kTiles<kTileM>>(w, shared, slot * kRange, rows, log_rows, sums);
      const int g = lane / 4, t = lane % 4;
      float* const to = shared.partials + warp * kTileM * Shared::kStride + g * 2;
#pragma unroll
      for (int tile = 0; tile < kTiles<kTileM>; ++tile)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int m = tile * 8 + t * 2 + i;
          if (m < rows)
            *reinterpret_cast<float2*>(to + m * Shared::kStride) = {sums[tile][i],
                                                                    sums[tile][i + 2]};
        }
    }
    const int next = turn + slots * kRange;
    if (kTileM > 1 && next < groups) w.read(block, C, next + slot * kRange, in_range(next));
    __syncthreads();
    const int used = (in_turn + kRange - 1) / kRange;
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      const int m = first_m + i * step;
      if (m >= rows) break;
      const float* from = shared.partials + (row / 16 * kTileM + m) * Shared::kStride + row % 16;
#pragma unroll 8
      for (int s = 0; s < used; ++s) totals[i] += from[s * (kBlocks * kTileM * Shared::kStride)];
    }
    if (kTileM == 1) break;
  }
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) {
    const int m = first_m + i * step;
    if (m < rows) emit(row, m, __fmul_rn(totals[i], row_scale));
  }
}

}  // namespace
}  // namespace voxkern
