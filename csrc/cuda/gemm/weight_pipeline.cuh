// The pipeline that brings W to shared memory for gemv.cuh: a ring of stages that asynchronous
// copies fill ahead of the products. It runs on across the tiles of a block and across all matrices
// of a WeightSequence, and it starts before the wait for the previous kernel.
//
// A warp (DenseLoader: a lane) reads only what it copied itself, so it waits for its own oldest
// stage and for no other warp, and issues the next copies as soon as it has used that.
#pragma once

#include "cuda/gemm/formats.cuh"
#include "cuda/gemm/gemm.h"

namespace voxkern::gemm_kernels {
namespace {

// Products of one column of out.
VOX_HOST_DEVICE constexpr int products_of(Epilogue e) { return e == Epilogue::swiglu ? 2 : 1; }

// `products` matrices [N, C], one after the other. A tile takes the same rows of each.
struct Matrix {
  const void* weight;
  int N, C, products;
  Format format = Format::plain;
};

// A WeightSequence has first() and next(), the matrices in the order in which a block multiplies
// with them. This one has a single matrix.
template <Format kFormat, Epilogue epilogue>
class SingleWeight {
 public:
  // The most products of a matrix, which has one of two formats.
  static VOX_HOST_DEVICE constexpr int max_products() { return products_of(epilogue); }
  static VOX_HOST_DEVICE constexpr Format format(int) { return kFormat; }
  // The most stages of a pipeline. Plain: a product of 16 KB a block (8 rows of 1024 columns) has
  // all of its weights in flight before the wait, a large one 64 KB. Packed: 64 KB a block in int8,
  // 51 in int4, so that two blocks leave room for one of the next kernel.
  static VOX_HOST_DEVICE constexpr int max_stages() {
    return kFormat == Format::plain ? 4 : kFormat == Format::int8 ? 2 : 3;
  }

  VOX_DEVICE explicit SingleWeight(const GemmParams& p)
      : matrix_{p.weight, static_cast<int>(p.N), static_cast<int>(p.C), max_products(), kFormat} {}
  VOX_DEVICE Matrix first() const { return matrix_; }
  // Moves to the next matrix; false if there is none.
  VOX_DEVICE bool next(Matrix&) { return false; }

 private:
  const Matrix matrix_;
};

// Waits until at most `left` of a thread's groups of copies are in flight, 0 <= left <= kMost.
template <int kMost>
VOX_DEVICE void wait_until_left(int left) {
  if constexpr (kMost > 0) {
    if (left < kMost) return wait_until_left<kMost - 1>(left);
  }
  wait_copies<kMost>();
}

constexpr int kLaneValues = kVector<bf16>;
constexpr int kDenseTile = 8;       // rows of W
constexpr int kChunkLanes = 4;      // lanes that share a row of a chunk, a vector each
constexpr int kChunksPerStage = 4;  // of 32 columns
constexpr int kChunkColumns = kChunkLanes * kLaneValues;

// A lane's part of a row of C columns: vectors first, first + kChunkLanes, ... before `end`, as
// `stages` stages. Each warp has an equal range of whole chunks.
struct LaneRange {
  int first, end, stages;

  VOX_DEVICE explicit LaneRange(int C) {
    constexpr int kStageVectors = kChunksPerStage * kChunkLanes;
    const int vectors = C / kLaneValues, warp = threadIdx.x / kWarp;
    const int warp_vectors =
        (vectors + kGemvWarps * kChunkLanes - 1) / (kGemvWarps * kChunkLanes) * kChunkLanes;
    const int begin = warp * warp_vectors;
    end = begin + warp_vectors < vectors ? begin + warp_vectors : vectors;
    first = begin + threadIdx.x % kChunkLanes;
    stages = begin < end ? (end - begin + kStageVectors - 1) / kStageVectors : 0;
  }
};

// Loads plain bfloat16 weights. A stage is kChunksPerStage chunks of 8 rows of W for each warp; a
// lane copies 16 bytes of one row of each chunk, for itself: zeros past its range.
class DenseLoader {
  using Stage = uint4[kChunksPerStage][kGemvThreads];

 public:
  static VOX_HOST_DEVICE constexpr int tile_rows() { return kDenseTile; }
  static VOX_HOST_DEVICE constexpr int64_t bytes(int stages) { return stages * sizeof(Stage); }
  // True if a lane reads what other lanes copied, and the warps take the items of a tile in turn.
  static VOX_HOST_DEVICE constexpr bool warp_shares() { return false; }

  VOX_DEVICE DenseLoader(unsigned char* shared, int)
      : stages_(reinterpret_cast<Stage*>(shared)), range_(0) {}

  // Returns the stages of a tile and product.
  VOX_DEVICE int open(const Matrix& matrix) {
    matrix_ = matrix;
    range_ = LaneRange(matrix.C);
    return range_.stages;
  }
  VOX_DEVICE uint4* stage(int slot) const { return &stages_[slot][0][threadIdx.x]; }

  VOX_DEVICE void load(int slot, int tile, int product, int item) {
    const int n = tile * kDenseTile + threadIdx.x % kWarp / kChunkLanes;
    const int first = range_.first + item * kChunksPerStage * kChunkLanes;
    const int end = n < matrix_.N ? range_.end : 0;
    const bf16* const from = static_cast<const bf16*>(matrix_.weight) +
                             static_cast<int64_t>(n + product * matrix_.N) * matrix_.C +
                             first * kLaneValues;
#pragma unroll
    for (int c = 0; c < kChunksPerStage; ++c)
      copy_async_16(stage(slot) + c * kGemvThreads, from + c * kChunkColumns,
                    first + c * kChunkLanes < end);
  }

 private:
  Stage* const stages_;
  Matrix matrix_;
  LaneRange range_;
};

// Position in a stage, within 512 bytes, of a packed range's piece of 16 bytes: an order in which a
// half warp that reads an operand meets no bank twice.
VOX_DEVICE int staged_position(int piece) { return piece ^ (piece >> 2 & 2); }

// A range of packed weights in a stage, from this lane's operands on.
template <Format kFormat>
struct StagedRange {
  const unsigned char *values, *codes;

  VOX_DEVICE explicit StagedRange(const unsigned char* stage) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    values = stage + staged_position(t * 4 + g / 2) * 16 + g % 2 * 8;
    codes = stage + kRangeGroups * kGroupBytes<kFormat> + g * 2;
  }
  VOX_DEVICE void operand(int k, uint32_t (&a)[4]) const {
    uint2 raw[kPieces<kFormat>];
#pragma unroll
    for (int i = 0; i < kPieces<kFormat>; ++i)
      raw[i] = *reinterpret_cast<const uint2*>(values + (k * kPieces<kFormat> + i) * 256);
    to_operand<kFormat>(raw, a);
  }
  VOX_DEVICE float2 group_scales(int k) const {
    return decode_scales(*reinterpret_cast<const uint16_t*>(codes + k * 16));
  }
};

// Loads packed weights. A stage is one range for each warp; warps take the ranges of a tile in
// turn. Values stay in their warp. The scales of W's rows do not: warp 0, which has the first range
// of every tile, loads them with it, and the barrier before the tile's sums are added publishes
// them. They have a ring of their own: one slot for each tile that warp 0 may be ahead, one for its
// current tile, one for a tile that other warps still read.
template <typename Sequence>
class PackedLoader {
  static constexpr Format kFirst = Sequence::format(0), kOther = Sequence::format(1);
  static constexpr int kSlotScales = Sequence::max_products() * kPackedTile;
  static constexpr int kScaleSlots = Sequence::max_stages() + 2;
  static constexpr Format kLarger = kFirst == kOther ? kFirst : Format::int8;
  static constexpr int kWarpBytes =
      kRangeGroups * static_cast<int>(group_bytes(kLarger) + scale_bytes(kLarger));

 public:
  static VOX_HOST_DEVICE constexpr int tile_rows() { return kPackedTile; }
  static VOX_HOST_DEVICE constexpr int64_t bytes(int stages) {
    return stages * kGemvWarps * kWarpBytes + kScaleSlots * kSlotScales * 4;
  }
  static VOX_HOST_DEVICE constexpr bool warp_shares() { return true; }

  VOX_DEVICE PackedLoader(unsigned char* shared, int stages)
      : stages_(shared),
        row_scales_(reinterpret_cast<float*>(shared + stages * kGemvWarps * kWarpBytes)) {}

  VOX_DEVICE int open(const Matrix& matrix) {
    matrix_ = matrix;
    groups_ = matrix.C / kGroupColumns;
    tiles_ = static_cast<int>(divide_up(matrix.N, tile_rows()));
    block_bytes_ = static_cast<int>(block_bytes(matrix.format, matrix.C));
    return packed_ranges(matrix.C);
  }
  VOX_DEVICE unsigned char* stage(int slot) const {
    return stages_ + (slot * kGemvWarps + threadIdx.x / kWarp) * kWarpBytes;
  }

  VOX_DEVICE void load(int slot, int tile, int product, int range) {
    const int lane = threadIdx.x % kWarp, first = range * kRangeGroups;
    if (product == 0 && range == 0) {
      if (lane < matrix_.products * 4)
        copy_async_16(row_scales_ + load_slot_ * kSlotScales + lane * 4,
                      block_of(tile, lane / 4) + block_bytes_ - 64 + lane % 4 * 16, true);
      load_slot_ = load_slot_ + 1 == kScaleSlots ? 0 : load_slot_ + 1;
    }
    const int bytes = kRangeGroups * value_bytes();
    const char* const block = block_of(tile, product);
    const char* const from = block + range * bytes + lane * 16;
    const int left = (groups_ - first) * value_bytes() - lane * 16;
    unsigned char* const to = stage(slot) + staged_position(lane) * 16;
#pragma unroll
    for (int i = 0; i < kRangeGroups * kGroupBytes<Format::int8>; i += kWarp * 16)
      if (i < bytes) copy_async_16(to + i, from + i, i < left);
    if (is_int4() && lane < kRangeGroups)
      copy_async_16(stage(slot) + bytes + lane * 16, group_scales(block, first + lane),
                    first + lane < groups_);
  }

  // Prefetches a range to L2; one lane calls it.
  VOX_DEVICE void prefetch(int tile, int product, int range) const {
    const char* const block = block_of(tile, product);
    const int first = range * kRangeGroups, left = groups_ - first;
    const int groups = left < kRangeGroups ? left : kRangeGroups;
    prefetch_l2(block + first * value_bytes(), groups * value_bytes());
    if (is_int4()) prefetch_l2(group_scales(block, first), groups * 16);
  }

  // The scales of W's rows, [products, 16], of the block's next tile. To be called once a tile;
  // readable past a barrier that follows warp 0's first range.
  VOX_DEVICE const float* next_row_scales() {
    const float* const scales = row_scales_ + read_slot_ * kSlotScales;
    read_slot_ = read_slot_ + 1 == kScaleSlots ? 0 : read_slot_ + 1;
    return scales;
  }

 private:
  VOX_DEVICE bool is_int4() const {
    return (kFirst == kOther ? kFirst : matrix_.format) == Format::int4;
  }
  // Bytes of the values of a group.
  VOX_DEVICE int value_bytes() const {
    return is_int4() ? kGroupBytes<Format::int4> : kGroupBytes<Format::int8>;
  }
  VOX_DEVICE const char* block_of(int tile, int product) const {
    return static_cast<const char*>(matrix_.weight) +
           static_cast<int64_t>(tile + product * tiles_) * block_bytes_;
  }
  VOX_DEVICE const char* group_scales(const char* block, int group) const {
    return block + groups_ * value_bytes() + group * 16;
  }

  unsigned char* const stages_;  // [stages, kGemvWarps] ranges
  float* const row_scales_;      // [kScaleSlots, products, 16]
  Matrix matrix_;
  int groups_, tiles_, block_bytes_;
  int load_slot_ = 0, read_slot_ = 0;  // of the scales of the next tile to load, and to read
};

// A ring of `stages` stages. The first `blocks` blocks of the grid share the tiles of every matrix.
// Needs no barriers besides those between tiles.
template <typename Loader, typename Sequence>
class WeightPipeline {
 public:
  VOX_DEVICE WeightPipeline(unsigned char* shared, int stages, int blocks, const Sequence& sequence)
      : loader_(shared, stages), stages_(stages), blocks_(blocks), sequence_(sequence) {
    open(sequence_.first());
    if (tile_ >= tiles_) next_matrix();
#pragma unroll 1
    for (int slot = 0; slot < stages_; ++slot) issue(slot);
  }

  // Prefetches the next `items` stages of the current matrix to L2.
  VOX_DEVICE void prefetch(int items) const {
    if (threadIdx.x % kWarp > 0) return;
    int tile = tile_, item = item_;
    for (int i = 0; i < items && tile < tiles_; ++i, advance(tile, item))
      loader_.prefetch(tile, product(item), item - product(item) * per_product_);
  }

  // This thread's part of the oldest stage, once its copies have arrived.
  VOX_DEVICE auto acquire() const {
    wait_until_left<Sequence::max_stages() - 1>(stages_ - 1);
    if constexpr (Loader::warp_shares()) __syncwarp();
    return loader_.stage(head_);
  }

  // Frees the oldest stage and issues the copies of the next one.
  VOX_DEVICE void release() {
    if constexpr (Loader::warp_shares()) __syncwarp();
    issue(head_);
    head_ = head_ + 1 == stages_ ? 0 : head_ + 1;
  }

  VOX_DEVICE Loader& loader() { return loader_; }
  VOX_DEVICE int blocks() const { return blocks_; }

 private:
  static VOX_DEVICE int first_item() { return Loader::warp_shares() ? threadIdx.x / kWarp : 0; }

  VOX_DEVICE void open(const Matrix& matrix) {
    per_product_ = loader_.open(matrix);
    tiles_ = static_cast<int>(divide_up(matrix.N, Loader::tile_rows()));
    items_ = matrix.products * per_product_;
    item_ = first_item();
    tile_ = item_ < items_ ? static_cast<int>(blockIdx.x) : tiles_;
  }
  // Moves to the next matrix of which this warp loads anything.
  VOX_DEVICE void next_matrix() {
    Matrix matrix;
    while (tile_ >= tiles_ && sequence_.next(matrix)) open(matrix);
  }
  VOX_DEVICE int product(int item) const {
    return Sequence::max_products() == 2 && item >= per_product_;
  }
  VOX_DEVICE void advance(int& tile, int& item) const {
    item += Loader::warp_shares() ? kGemvWarps : 1;
    if (item >= items_) {
      item = first_item();
      tile += blocks_;
    }
  }
  VOX_DEVICE void issue(int slot) {
    if (tile_ < tiles_) {
      loader_.load(slot, tile_, product(item_), item_ - product(item_) * per_product_);
      advance(tile_, item_);
      if (tile_ >= tiles_) next_matrix();
    }
    commit_copies();
  }

  Loader loader_;
  const int stages_, blocks_;
  Sequence sequence_;
  int tiles_, items_, per_product_;  // of the current matrix
  int tile_, item_;                  // the next stage to issue
  int head_ = 0;                     // the slot of the oldest stage
};

}  // namespace
}  // namespace voxkern::gemm_kernels
