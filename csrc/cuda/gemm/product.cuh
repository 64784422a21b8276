// Products of few rows x with plain weights that are read once: what linear.cu launches. A packed
// product has the same ends (product_ends.cuh) and a walk over tiles of its own
// (packed_product.cuh).
//
// bfloat16, in the tensor cores. A block takes kTileN rows of W at a time (with SwiGLU as many of
// gate and of up), and kTileM rows of x. Each of its kWarps warps has an equal range of the
// columns of both, in whole chunks of 32, and takes the chunks in their order: a lane has 16 bytes
// of one row of W and of one or two of x, which are two products of 16 columns, in an order of
// columns that is the same for both operands. Then the warps' sums are added in their order. So the
// order of a sum depends on C alone: not on M, N, tiles or alignment.
//
// W goes through a queue in shared memory, kGroups groups of kInGroup chunks long: asynchronous
// copies that nobody but the lane that asked for them reads, so that a warp waits for its own
// oldest group and for no other warp, and asks for the next one as soon as it has that. The queue
// goes on across the tiles of a block, and it begins before the wait for the kernel in front: a
// block of a small product (16 KB: 8 rows of 1024) has all of its weights by then, one of a large
// product 64 KB. That takes room beside the kernel in front: two blocks of CSM's gate and up leave
// 73 KB of a multiprocessor at batch 1, so one of down, with rows of 8192, has a group less and
// takes 69; two of those leave 90, of which the next qkv takes 74. x is staged in shared memory
// where there is room: one read for all warps. Each tile costs one barrier, since the warps' sums
// take turns with two places.
//
// Up to kBlocksEach blocks a multiprocessor share the tiles evenly: for CSM on an H100 (132 of
// them) 128 or 192 blocks of one tile at its depth decoder's o and qkv, 264 blocks of 3 or 4 pairs
// at gate and up. In flight then are 128 KB a multiprocessor, where 20 KB (700 ns of 3.35 TB/s)
// keep memory busy: the rest is for the time in which a small product waits for its x. A group (16
// KB) keeps the 8 warps of a block for about 450 cycles; with two blocks it may take 2,200.
//
// float32: a warp takes two rows of W (with SwiGLU one of gate, one of up) and kTile rows of x,
// lane l the vectors l, l + 32, ... of all of them, kSteps of W under way; sums over the lanes at
// the end.
#pragma once

#include "cuda/gemm/weight_queue.cuh"

namespace voxkern {
namespace {

constexpr int kSteps = 4;

constexpr int kGroups = 4;          // of the queue, at most
constexpr int64_t kLongRow = 4096;  // from here on one less
__host__ __device__ constexpr int queue_groups(int64_t C) {
  return C < kLongRow ? kGroups : kGroups - 1;
}

// How a launch lays out a block's shared memory.
struct ProductPlan {
  int groups;  // of the queue, no more than a block has use for
  int row;     // vectors from one row of staged x to the next; 0 if x is not staged
};

// Blocks whose registers a multiprocessor has together: three where they do not spill.
template <bool kAligned, bool kHigh, Before before>
constexpr int kResident = kHigh || !kAligned || (kMoreRegisters && before == Before::norm) ? 2 : 3;

// kHigh: there are rows of x past the first 8.
template <bool kAligned, bool kHigh, Before before, After after>
__global__ void __launch_bounds__(kThreads, kResident<kAligned, kHigh, before>)
    bf16_product_kernel(ProductParams p, ProductPlan plan) {
  using Sums = TileSums<kHigh, after>;
  VOX_DYNAMIC_SHARED(QueueGroup, queue);
  Sums* const partials = reinterpret_cast<Sums*>(queue + plan.groups);  // two
  uint4* const staged = reinterpret_cast<uint4*>(partials + 2);
  const int64_t m = static_cast<int64_t>(blockIdx.y) * kTileM;
  const int rows = p.M - m < kTileM ? static_cast<int>(p.M - m) : kTileM;
  using Walk = OneMatrix<Format::plain, kProducts<after>>;
  WeightQueue<kAligned, kGroups - 1, kGroups, Walk> weights(queue, queue_groups(p.C), gridDim.x,
                                                            Walk(p));
  const uint4 norm_first = first_of_norm<bf16, before>(p);
  let_next_kernel_start();
  wait_for_previous_kernel();
  if (plan.row) stage<bf16, before>(p, m, rows, norm_first, staged, plan.row);
  multiply_tiles<kAligned, kHigh, after>(p, m, rows, gridDim.x, weights, staged, plan.row,
                                         partials);
}

template <bool kAligned, int kTile, Before before, After after>
__global__ void __launch_bounds__(kThreads) f32_product_kernel(ProductParams p, ProductPlan plan) {
  constexpr int kSize = kVector<float>, kOf = kProducts<after>, kRows = 2;
  VOX_DYNAMIC_SHARED(uint4, staged);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t N = p.N, C = p.C, vectors = divide_up(C, kSize);
  // Its first column of the result; the second row of W is the next one's, or up's.
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * (kRows / kOf);
  const int64_t second = kOf == 2 ? N + n : n + 1;
  const int64_t m = static_cast<int64_t>(blockIdx.y) * kTile;
  const bool in = n < N;  // the whole warp
  const float* weight[kRows];
  weight[0] = static_cast<const float*>(p.weight) + (in ? n : 0) * C;
  weight[1] = static_cast<const float*>(p.weight) + (in && second < kOf * N ? second : 0) * C;

  float sums[kTile][kRows] = {};
  uint4 raw[kSteps][kRows];
  const auto read = [&](int64_t first) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int64_t i = first + s * kWarp;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (!in || i >= vectors) continue;
        if constexpr (kAligned)
          raw[s][r] = load_stream(weight[r] + i * kSize);
        else
          raw[s][r] = read_vector<float, false>(weight[r], i, C);
      }
    }
  };
  read(lane);
  const uint4 norm_first = first_of_norm<float, before>(p);
  let_next_kernel_start();
  wait_for_previous_kernel();

  const float* x[kTile];
#pragma unroll
  for (int t = 0; t < kTile; ++t)
    x[t] = static_cast<const float*>(p.x) + (m + t < p.M ? m + t : p.M - 1) * C;
  if constexpr (before != Before::nothing) {
    const int rows = p.M - m < kTile ? static_cast<int>(p.M - m) : kTile;
    stage<float, before>(p, m, rows, norm_first, staged, plan.row);
#pragma unroll
    for (int t = 0; t < kTile; ++t)
      x[t] = reinterpret_cast<const float*>(staged + (t < rows ? t : 0) * plan.row);
  }
  if (!in) return;
  for (int64_t first = lane; first < vectors; first += kSteps * kWarp) {
    if (first != lane) read(first);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int64_t i = first + s * kWarp;
      if (i >= vectors) continue;
      float w[kRows][kSize];
#pragma unroll
      for (int r = 0; r < kRows; ++r) unpack<float>(raw[s][r], w[r]);
#pragma unroll
      for (int t = 0; t < kTile; ++t) {
        float values[kSize];
        unpack<float>(read_vector<float, kAligned>(x[t], i, C), values);
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int j = 0; j < kSize; ++j) sums[t][r] = fmaf(values[j], w[r][j], sums[t][r]);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kTile; ++t) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) sums[t][r] = warp_reduce(sums[t][r], Add());
    if (lane > 0 || m + t >= p.M) continue;
#pragma unroll
    for (int r = 0; r < kRows / kOf; ++r) {
      if (n + r >= N) continue;
      float totals[kOf] = {sums[t][r]};
      if constexpr (kOf == 2) totals[1] = sums[t][1];
      finish<float, after>(p, m + t, n + r, totals, old_value<float, after>(p, m + t, n + r));
    }
  }
}

}  // namespace
}  // namespace voxkern
