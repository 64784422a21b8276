// The products of the depth decoder as one kernel (persistent_depth.cu), with plain weights and
// with packed ones: a block's queue of all of a frame's weights, and what it does with x and a
// matrix.
#pragma once

#include <algorithm>

#include "cuda/decoder/depth_phases.cuh"
#include "cuda/gemm/packed_queue.cuh"
#include "cuda/gemm/weight_queue.cuh"

namespace voxkern {
namespace {

constexpr int kMostRows = 8;  // PERSISTENT_ROWS of vox_serve/model.py
// That are read at once for their norms: more would take registers that nine warps do not have.
constexpr int kRowsRead = kMoreRegisters ? 1 : 4;

// Of plain weights.
class PlainProducts {
  using Sums = TileSums<false, After::swiglu>;

 public:
  static constexpr int kLeast = 2, kMost = 12;  // of the queue's groups
  static constexpr int64_t kTile = kTileN;

  // Of shared memory: the queue's, and behind it what a product needs whose tiles `blocks` blocks
  // share.
  static int64_t queue_bytes(int groups) {
    return groups * static_cast<int64_t>(sizeof(QueueGroup));
  }
  static int64_t rest_bytes(const ProductParams& p, int64_t) {
    return 2 * static_cast<int64_t>(sizeof(Sums)) +
           p.M * staged_row<bf16>(p.C) * static_cast<int64_t>(sizeof(uint4));
  }

  __device__ __forceinline__ PlainProducts(unsigned char* shared, const Arguments& all)
      : partials_(reinterpret_cast<Sums*>(reinterpret_cast<QueueGroup*>(shared) + all.length)),
        weights_(reinterpret_cast<QueueGroup*>(shared), all.length, all.blocks, Walk(all)) {}

  // One of the first `blocks` blocks' part of a product; norm_first as of first_of_norm().
  template <Before before, After after>
  __device__ __forceinline__ void multiply(const ProductParams& p, bool, int blocks,
                                           uint4 norm_first) {
    uint4* const staged = reinterpret_cast<uint4*>(partials_ + 2);
    const int rows = static_cast<int>(p.M), row = staged_row<bf16>(p.C);
    stage<bf16, before, kRowsRead>(p, 0, rows, norm_first, staged, row);
    multiply_tiles<true, false, after>(p, 0, rows, blocks, weights_, staged, row,
                                       reinterpret_cast<TileSums<false, after>*>(partials_));
  }

 private:
  using Walk = DepthWalk<Format::plain, Format::plain>;

  Sums* const partials_;  // two, and x behind them
  WeightQueue<true, kLeast, kMost, Walk> weights_;
};

// Of packed weights, for up to kRows rows.
template <Format kLayers, Format kHeads, int kRows>
class PackedProducts {
  using Walk = DepthWalk<kLayers, kHeads>;
  using Shared = PackedShared<kRows>;

 public:
  static constexpr int kLeast = 1, kMost = 6;  // of the queue's ranges a warp
  static constexpr int64_t kTile = kBlockRows;
  using Queue = PackedQueue<kLeast, kMost, Walk>;

  static int64_t queue_bytes(int ranges) { return Queue::bytes(ranges); }
  // Rows that wait for their norms lie where sums come later.
  static int64_t rest_bytes(const ProductParams& p, int64_t blocks) {
    const int64_t ranges = packed_ranges(static_cast<int>(p.C));
    const int64_t items = p.after == After::swiglu ? 2 * ranges : ranges;
    const int log_rows = log_up(static_cast<int>(p.M));
    const int64_t sums =
        Shared::bytes(ranges, divide_up(p.N, kTile) > blocks ? 2 * items : items, log_rows);
    const int64_t staged =
        p.before == Before::norm ? p.M * packed_staged_row<bf16>(p.C) * int64_t{sizeof(uint4)} : 0;
    const int64_t before = Shared::bytes(ranges, 0, log_rows) + staged;
    return std::max(sums, before);
  }

  __device__ __forceinline__ PackedProducts(unsigned char* shared, const Arguments& all)
      : rest_(shared + Queue::bytes(all.length)),
        weights_(shared, all.length, all.blocks, Walk(all)) {}

  template <Before before, After after>
  __device__ __forceinline__ void multiply(const ProductParams& p, bool head, int blocks,
                                           uint4 norm_first) {
    if (kLayers == kHeads || !head)
      multiply<before, after, kLayers>(p, blocks, norm_first);
    else if constexpr (before == Before::norm && after == After::store)
      multiply<before, after, kHeads>(p, blocks, norm_first);
  }

 private:
  template <Before before, After after, Format kFormat>
  __device__ __forceinline__ void multiply(const ProductParams& p, int blocks, uint4 norm_first) {
    const Shared shared(rest_, packed_ranges(static_cast<int>(p.C)),
                        log_up(kRows == 1 ? 1 : static_cast<int>(p.M)));
    quantize_x<bf16, kFormat, kRows, before, kRowsRead>(
        p, norm_first, reinterpret_cast<uint4*>(shared.partials), shared);
    multiply_packed_tiles<bf16, kFormat, kRows, after>(p, blocks, weights_, shared);
  }

  unsigned char* const rest_;
  Queue weights_;
};

}  // namespace
}  // namespace voxkern
