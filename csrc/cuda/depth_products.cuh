// The products of the depth decoder as one kernel (persistent_depth.cu), with plain weights and
// with packed ones: a block's queue of all of a frame's weights, and what it does with x and a
// matrix.
#pragma once

#include "depth_attention.cuh"
#include "packed_queue.cuh"
#include "persistent_depth.h"
#include "weight_queue.cuh"

namespace voxkern {
namespace {

constexpr int kMostRows = 8;

// A product of a layer or position, and how far it is to the next one's weight and norm.
struct Phase {
  ProductParams product;
  int64_t weight_stride, norm_stride;  // bytes
  int blocks;                          // that have a tile of it
};
enum Kind { kQkv, kO, kGateUp, kDown, kHead, kKinds };

struct Arguments {
  PersistentDepthParams p;
  Phase phases[kKinds];
  DepthAttentionParams attention;  // of position 0, layer 0
  int parts;                       // of a row's attention
  int blocks;                      // that multiply; the others have the rows
  int row_blocks;
  int length;  // of the queue

  // Blocks that take part in what has `parts` parts a row.
  __device__ __forceinline__ int blocks_of_rows(int parts) const {
    const int items = parts * static_cast<int>(p.op.B);
    return items < row_blocks ? items : row_blocks;
  }
};

// The matrices of all positions in their order.
template <Format kLayers, Format kHeads>
class DepthWalk {
 public:
  static constexpr int kOf = 2;
  static constexpr Format kFormats[] = {kLayers, kHeads};

  __device__ __forceinline__ explicit DepthWalk(const Arguments& all) : all_(all) {}

  __device__ __forceinline__ Matrix first() const { return here(); }
  __device__ __forceinline__ bool next(Matrix& matrix) {
    const int K = static_cast<int>(all_.p.op.K), L = static_cast<int>(all_.p.op.layers.L);
    if (position_ == K) return false;
    // Of position 0's last layer only the keys are wanted.
    if (kind_ == kHead || (position_ == 0 && layer_ == L - 1)) {
      ++position_;
      layer_ = 0;
      kind_ = kQkv;
    } else if (kind_ == kDown) {
      kind_ = ++layer_ < L ? kQkv : kHead;
    } else {
      ++kind_;
    }
    if (position_ == K) return false;
    matrix = here();
    return true;
  }

 private:
  __device__ __forceinline__ Matrix here() const {
    const Phase& phase = all_.phases[kind_];
    const int64_t at = kind_ == kHead ? position_ - 1 : layer_;
    return {static_cast<const char*>(phase.product.weight) + at * phase.weight_stride,
            static_cast<int>(phase.product.N), static_cast<int>(phase.product.C),
            kind_ == kGateUp ? 2 : 1, kind_ == kHead ? kHeads : kLayers};
  }

  const Arguments& all_;
  int position_ = 0, layer_ = 0, kind_ = kQkv;
};

// Of plain weights.
class PlainProducts {
  using Sums = TileSums<false, After::swiglu>;

 public:
  static constexpr int kLeast = 2, kMost = 12;  // of the queue's groups
  static constexpr int64_t kTile = kTileN;

  // Of shared memory: the queue's, and behind it what this product needs of blocks that `blocks`
  // share its tiles.
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
    stage<bf16, before>(p, 0, rows, norm_first, staged, row);
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
    return sums > before ? sums : before;
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
    quantize_x<bf16, kFormat, kRows, before>(p, norm_first,
                                             reinterpret_cast<uint4*>(shared.partials), shared);
    multiply_packed_tiles<bf16, kFormat, kRows, after>(p, blocks, weights_, shared);
  }

  unsigned char* const rest_;
  Queue weights_;
};

}  // namespace
}  // namespace voxkern
