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
// gate and up leave 78 KB of a multiprocessor, of which one of down takes 77; and registers are for
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

#include "cuda/gemm/packed_queue.cuh"

namespace voxkern {
namespace {

// Of the queue, at most: 64 KB a block in int8, 51 in int4. So the queues of two blocks leave room
// for one more beside them.
template <Format kFormat>
constexpr int kSlots = kFormat == Format::int8 ? 2 : 3;
// Ranges a warp behind those, on their way to the second-level cache before the wait too: 64 KB a
// block in int8, so that a tile of 8192 columns, or two pairs of 2048, are all asked for by then.
constexpr int kAhead = 2;

template <Format kFormat, After after>
using PackedWalk = OneMatrix<kFormat, kProducts<after>>;
template <Format kFormat, After after>
using PackedWeights = PackedQueue<1, kSlots<kFormat>, PackedWalk<kFormat, after>>;

// How a launch lays out a block's shared memory: queue, quantized x and sums, staged x.
struct PackedPlan {
  int slots;   // of the queue
  int staged;  // where that begins, in bytes
};

// Blocks whose registers a multiprocessor has together: three where they do not spill.
template <typename T, int kMost>
constexpr int kResident = kMost > 8 || sizeof(T) == 4 || kMoreRegisters ? 2 : 3;

// kMost: rows of x, at most.
template <typename T, Format kFormat, int kMost, Before before, After after>
__global__ void __launch_bounds__(kThreads, kResident<T, kMost>)
    packed_product_kernel(ProductParams p, PackedPlan plan) {
  using Weights = PackedWeights<kFormat, after>;
  VOX_DYNAMIC_SHARED(unsigned char, queue);
  const PackedShared<kMost> shared(queue + Weights::bytes(plan.slots),
                                   packed_ranges(static_cast<int>(p.C)),
                                   log_up(kMost == 1 ? 1 : static_cast<int>(p.M)));
  Weights weights(queue, plan.slots, gridDim.x, PackedWalk<kFormat, after>(p));
  weights.prefetch(kAhead);
  const uint4 norm_first = first_of_norm<T, before>(p);
  let_next_kernel_start();
  wait_for_previous_kernel();
  quantize_x<T, kFormat, kMost, before>(p, norm_first,
                                        reinterpret_cast<uint4*>(queue + plan.staged), shared);
  multiply_packed_tiles<T, kFormat, kMost, after>(p, gridDim.x, weights, shared);
}

}  // namespace
}  // namespace voxkern
