// Products of few rows x with packed weights (packed_dots.cuh) that are read once, with the ends of
// product_ends.cuh: what packed_product.cu launches.
//
// A tile is 16 rows of W (with SwiGLU 16 of gate and 16 of up), whose ranges a block's warps take
// in turns: one each of 2048 columns, or of the gate and up of 1024. W goes through a queue in
// shared memory, as in product.cuh, of kSlots ranges a warp: asynchronous copies that only this
// warp reads, across the tiles of a block, begun before the wait for the kernel in front. Pieces of
// 16 bytes lie there in an order in which a half warp that reads an operand meets no bank twice.
//
// In int8 at batch 1 that is up to 64 KB of a block under way: all of CSM's qkv and o (32 KB, in
// the depth decoder 16), all of the depth decoder's gate and up (two blocks of 64 KB a
// multiprocessor), half of a tile of down. Its other half, and the backbone's second tile of gate
// and up, are on their way to the second-level cache then (kAhead). Two blocks of the backbone's
// gate and up leave 79 KB of a multiprocessor, of which one of down takes 77; and registers are for
// three blocks. Down's 8192 columns are 4 ranges a warp: twice the warps would have no registers
// beside gate and up, and would begin to fetch when those end.
//
// x comes quantized, all of its columns once a block, from memory or from the normalised rows that
// stage() leaves in shared memory. Then no warp waits for another but once a tile, where its
// ranges' sums are added; they take turns with two places where a block has several tiles. A warp
// quantizes 512 columns in about 150 instructions. Reckoned by those alone, 8192 columns keep a
// block for some 600 cycles, which each block of down spends after its wait, and 2048 for about
// 150; the latency of a division, a shuffle and what waits for them comes on top.
#pragma once

#include "packed_dots.cuh"
#include "product_ends.cuh"

namespace voxkern {
namespace {

// Of the queue, at most: 64 KB a block in int8, 51 in int4. So the queues of two blocks leave room
// for one more beside them.
template <Format kFormat>
constexpr int kSlots = kFormat == Format::int8 ? 2 : 3;
// Ranges a warp behind those, on their way to the second-level cache before the wait too: 64 KB a
// block in int8, so that a tile of 8192 columns, or two pairs of 2048, are all asked for by then.
constexpr int kAhead = 2;
template <Format kFormat>
constexpr int kSlotBytes = kRange * (kGroupBytes<kFormat> + static_cast<int>(scale_bytes(kFormat)));

// Sums that are read together, however few there are: an unrolled loop takes what is left of it one
// by one, which is all of the 4 of 1024 columns.
constexpr int kAddedAtOnce = 8;

// How a launch lays out a block's shared memory: queue, quantized x and sums, scales of W's rows,
// staged x.
struct PackedPlan {
  int slots;           // of the queue
  int scales, staged;  // where those begin, in bytes
};

// Vectors from one row of staged x to the next, which begins in other banks.
template <typename T>
__host__ __device__ constexpr int staged_row(int64_t C) {
  return static_cast<int>(C / kVector<T> | 4);
}

// A range in the queue, from where this lane's operands are.
template <Format kFormat>
struct PackedSlot {
  const unsigned char *values, *codes;

  __device__ __forceinline__ explicit PackedSlot(const unsigned char* slot) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    values = slot + place(t * 4 + g / 2) * 16 + g % 2 * 8;
    codes = slot + kRange * kGroupBytes<kFormat> + g * 2;
  }
  // Of the pieces of 512 bytes, where the one that is at `piece` in memory lies.
  static __device__ __forceinline__ int place(int piece) { return piece ^ (piece >> 2 & 2); }

  __device__ __forceinline__ void operand(int k, uint32_t (&a)[4]) const {
    uint2 raw[kLoads<kFormat>];
#pragma unroll
    for (int i = 0; i < kLoads<kFormat>; ++i)
      raw[i] = *reinterpret_cast<const uint2*>(values + (k * kLoads<kFormat> + i) * 256);
    to_operand<kFormat>(raw, a);
  }
  __device__ __forceinline__ float2 group_scales(int k) const {
    return decode_scales(*reinterpret_cast<const uint16_t*>(codes + k * 16));
  }
};

// Blocks whose registers a multiprocessor has together: three where they do not spill.
template <typename T, int kMost>
constexpr int kResident = kMost > 8 || sizeof(T) == 4 || kMoreRegisters ? 2 : 3;

// kMost: rows of x, at most.
template <typename T, Format kFormat, int kMost, Before before, After after>
__global__ void __launch_bounds__(kThreads, kResident<T, kMost>)
    packed_product_kernel(ProductParams p, PackedPlan plan) {
  constexpr int kOf = kProducts<after>, kRows = static_cast<int>(kBlockRows);
  constexpr int kStride = PackedShared<kMost>::kStride;
  static_assert(kMost * kRows <= kThreads);
  VOX_DYNAMIC_SHARED(unsigned char, queue);
  const int me = threadIdx.x, lane = me % kWarp, warp = me / kWarp;
  const int C = static_cast<int>(p.C), groups = C / static_cast<int>(kGroup);
  const int ranges = (groups + kRange - 1) / kRange, items = kOf * ranges;
  const int tiles = static_cast<int>((p.N + kRows - 1) / kRows);
  const int rows = kMost == 1 ? 1 : static_cast<int>(p.M), log_rows = log_up(rows);
  const PackedShared<kMost> shared(queue + plan.slots * kWarps * kSlotBytes<kFormat>, ranges,
                                   log_rows);
  const int block_size = static_cast<int>(block_bytes(kFormat, C));
  const auto block_at = [&](int tile, int product) {
    return static_cast<const char*>(p.weight) +
           static_cast<int64_t>(tile + product * tiles) * block_size;
  };
  const auto slot_at = [&](int slot) {
    return queue + (slot * kWarps + warp) * kSlotBytes<kFormat>;
  };

  // The next range to ask for.
  int tile = warp < items ? blockIdx.x : tiles, item = warp, slot = 0;
  const auto go_on = [&](int& of_tile, int& of_item) {
    of_item += kWarps;
    if (of_item >= items) {
      of_item = warp;
      of_tile += gridDim.x;
    }
  };
  const auto ask = [&] {
    if (tile < tiles) {
      const int product = kOf == 2 && item >= ranges;
      const int first = (item - product * ranges) * kRange;
      const char* const block = block_at(tile, product);
      const char* const from = block + first * kGroupBytes<kFormat> + lane * 16;
      const int there = (groups - first) * kGroupBytes<kFormat> - lane * 16;
      unsigned char* const to = slot_at(slot) + PackedSlot<kFormat>::place(lane) * 16;
#pragma unroll
      for (int at = 0; at < kRange * kGroupBytes<kFormat>; at += kWarp * 16)
        copy_async_16(to + at, from + at, at < there);
      if (kFormat == Format::int4 && lane < kRange)
        copy_async_16(slot_at(slot) + kRange * kGroupBytes<kFormat> + lane * 16,
                      block + groups * kGroupBytes<kFormat> + (first + lane) * 16,
                      first + lane < groups);
      go_on(tile, item);
    }
    commit_copies();
    slot = slot + 1 == plan.slots ? 0 : slot + 1;
  };
  // The scales of all tiles, [tiles, kOf, 16], go with the first range of warp 0, which always has
  // one. In registers they would be one more than there are, and a wait at each tile's end.
  float* const row_scales = reinterpret_cast<float*>(queue + plan.scales);
  if (warp == 0)
    for (int i = lane;; i += kWarp) {
      const int of_tile = blockIdx.x + i / (4 * kOf) * gridDim.x;
      if (of_tile >= tiles) break;
      copy_async_16(row_scales + i * 4,
                    block_at(of_tile, i / 4 % kOf) + block_size - 64 + i % 4 * 16, true);
    }
  for (int s = 0; s < plan.slots; ++s) ask();
  if (lane == 0) {
    int of_tile = tile, of_item = item;
    for (int s = 0; s < kAhead && of_tile < tiles; ++s, go_on(of_tile, of_item)) {
      const int product = kOf == 2 && of_item >= ranges;
      const int first = (of_item - product * ranges) * kRange;
      const int there = groups - first < kRange ? groups - first : kRange;
      const char* const block = block_at(of_tile, product);
      prefetch_l2(block + first * kGroupBytes<kFormat>, there * kGroupBytes<kFormat>);
      if (kFormat == Format::int4)
        prefetch_l2(block + groups * kGroupBytes<kFormat> + first * 16, there * 16);
    }
  }
  // Of the column that this thread finishes.
  const int at_m = me / kRows, at_n = me % kRows;
  const uint4 norm_first = first_of_norm<T, before>(p);
  let_next_kernel_start();
  wait_for_previous_kernel();

  if constexpr (before == Before::norm) {
    uint4* const staged = reinterpret_cast<uint4*>(queue + plan.staged);
    const int row = staged_row<T>(C);
    stage<T, before>(p, 0, rows, norm_first, staged, row);
    quantize_rows<kFormat, kMost>(StagedRows<T>{.x = staged, .row = row}, rows, log_rows, 0, groups,
                                  shared.values, shared.scales);
  } else {
    quantize_rows<kFormat, kMost>(
        PlainRows<T>{.x = static_cast<const T*>(p.x), .C = C, .aligned = true}, rows, log_rows, 0,
        groups, shared.values, shared.scales);
  }
  __syncthreads();

  int oldest = 0, done = 0;  // tiles
  for (int at = blockIdx.x; at < tiles; at += gridDim.x, ++done) {
    float* const partials = shared.partials + done % 2 * items * kMost * kStride;
    const int n = at * kRows + at_n;
    const bool finishes = at_m < rows && n < p.N;
    const T old = finishes ? old_value<T, after>(p, at_m, n) : T{};
    for (int i = warp; i < items; i += kWarps) {
      if (plan.slots == kSlots<kFormat>)
        wait_copies<kSlots<kFormat> - 1>();
      else if (plan.slots == 2)
        wait_copies<1>();
      else
        wait_copies<0>();
      __syncwarp();
      float sums[kTiles<kMost>][4];
      multiply<kFormat, kTiles<kMost>>(PackedSlot<kFormat>(slot_at(oldest)), shared,
                                       (kOf == 2 && i >= ranges ? i - ranges : i) * kRange, rows,
                                       log_rows, sums);
      __syncwarp();
      oldest = oldest + 1 == plan.slots ? 0 : oldest + 1;
      ask();
      store_sums<kMost>(sums, rows, partials + i * kMost * kStride);
    }
    __syncthreads();
    if (finishes) {
      const float* const from = partials + at_m * kStride + at_n;
      float totals[kOf] = {};
      for (int first = 0; first < ranges; first += kAddedAtOnce) {
        float sums[kOf][kAddedAtOnce];
#pragma unroll
        for (int of = 0; of < kOf; ++of)
#pragma unroll
          for (int r = 0; r < kAddedAtOnce; ++r)  // -0 changes no number, not even 0
            sums[of][r] =
                first + r < ranges ? from[(of * ranges + first + r) * kMost * kStride] : -0.0f;
#pragma unroll
        for (int of = 0; of < kOf; ++of)
#pragma unroll
          for (int r = 0; r < kAddedAtOnce; ++r) totals[of] += sums[of][r];
      }
#pragma unroll
      for (int of = 0; of < kOf; ++of)
        totals[of] = __fmul_rn(totals[of], row_scales[(done * kOf + of) * kRows + at_n]);
      finish<T, after>(p, at_m, n, totals, old);
    }
  }
}

}  // namespace
}  // namespace voxkern
