// The pipeline that brings W to shared memory for gemv.cuh: a ring of stages that asynchronous
// copies fill ahead of the products. It runs on across the tiles of a block and across all matrices
// of a WeightSequence, and it starts before the wait for the previous kernel.
//
// A warp (DenseLoader: a lane) reads only what it copied itself, so it waits for its own oldest
// stage and for no other warp, and issues the next copies as soon as it has used that.
#pragma once

#include "cuda/gemm/formats.cuh"
#include "cuda/gemm/fusion.cuh"

namespace voxkern::gemm_kernels {
namespace {

// `products` matrices [N, C], one after the other. A tile takes the same rows of each.
struct Matrix {
  const void* weight;
  int N, C, products;
  Format format = Format::plain;
};

// A WeightSequence has first() and next(), the matrices in the order in which a block multiplies
// with them. This one has a single matrix.
template <Format kFormat, int kProducts_>
class SingleWeight {
 public:
  static constexpr int kMaxProducts = kProducts_;           // of any matrix
  static constexpr Format kFormats[] = {kFormat, kFormat};  // a matrix has one or the other

  __device__ __forceinline__ explicit SingleWeight(const GemmParams& p)
      : matrix_{p.weight, static_cast<int>(p.N), static_cast<int>(p.C), kMaxProducts, kFormat} {}
  __device__ __forceinline__ Matrix first() const { return matrix_; }
  // Moves to the next matrix; false if there is none.
  __device__ __forceinline__ bool next(Matrix&) { return false; }

 private:
  const Matrix matrix_;
};

// Waits until at most `left` of a thread's groups of copies are in flight, kMin <= left <= kMax.
template <int kMin, int kMax>
__device__ __forceinline__ void wait_until_left(int left) {
  if constexpr (kMax > kMin) {
    if (left < kMax) return wait_until_left<kMin, kMax - 1>(left);
  }
  wait_copies<kMax>();
}

constexpr int kDenseTile = 8;               // rows of W
constexpr int kChunkLanes = 4;              // lanes that share a row of a chunk
constexpr int kChunksPerStage = 4;          // of 32 columns
constexpr int kChunkVectors = kChunkLanes;  // of a row of a chunk

// A lane's part of a row of C columns: each warp has an equal range of whole chunks.
template <bool kAligned>
struct LaneRange {
  int vectors;  // of the whole row
  int first;    // this lane's first vector
  int chunks;   // of its warp; may be negative
  int whole;    // the leading ones of those that need no bounds check

  __device__ __forceinline__ explicit LaneRange(int C) {
    const int me = threadIdx.x, warp = me / kWarp;
    vectors = (C + kLaneValues - 1) / kLaneValues;
    const int all = (vectors + kChunkVectors - 1) / kChunkVectors;
    const int per_warp = (all + kGemvWarps - 1) / kGemvWarps, begin = warp * per_warp;
    first = begin * kChunkVectors + me % kChunkLanes;
    chunks = all - begin < per_warp ? all - begin : per_warp;
    const int full = vectors / kChunkVectors - begin;
    whole = !kAligned ? 0 : full < chunks ? full : chunks;
  }
};

// Loads plain bfloat16 weights. A stage is kChunksPerStage chunks of 8 rows of W for each warp; a
// lane copies 16 bytes of one row of each chunk, for itself.
template <bool kAligned, int kMaxProducts>
class DenseLoader {
  using StageVectors = uint4[kChunksPerStage][kGemvThreads];

 public:
  static constexpr int kStageBytes = sizeof(StageVectors);
  static constexpr bool kWarpShares = false;  // a lane reads what other lanes copied
  static constexpr int kItemStep = 1;

  __device__ __forceinline__ DenseLoader(unsigned char* shared, int)
      : stages_(reinterpret_cast<StageVectors*>(shared)), range_(0) {}

  __device__ __forceinline__ void open(const Matrix& matrix) {
    matrix_ = matrix;
    range_ = LaneRange<kAligned>(matrix.C);
    stages_per_product_ =
        range_.chunks > 0 ? (range_.chunks + kChunksPerStage - 1) / kChunksPerStage : 0;
  }
  __device__ __forceinline__ const Matrix& matrix() const { return matrix_; }
  __device__ __forceinline__ int tiles() const { return (matrix_.N + kDenseTile - 1) / kDenseTile; }
  // Items of a tile, one a stage, of which this warp loads first_item(), + kItemStep, ...
  __device__ __forceinline__ int items() const { return matrix_.products * stages_per_product_; }
  __device__ __forceinline__ int first_item() const { return 0; }

  __device__ __forceinline__ const uint4* stage(int slot) const {
    return &stages_[slot][0][threadIdx.x];
  }

  __device__ __forceinline__ void load(int slot, int tile, int item) {
    const int product = kMaxProducts == 2 && item >= stages_per_product_;
    const int chunk = (item - product * stages_per_product_) * kChunksPerStage;
    const int n = tile * kDenseTile + threadIdx.x % kWarp / kChunkLanes, C = matrix_.C;
    const bool exists = n < matrix_.N;
    const bf16* const weight = static_cast<const bf16*>(matrix_.weight);
    const bf16* const row = weight + static_cast<int64_t>(exists ? n + product * matrix_.N : 0) * C;
    uint4* const to = &stages_[slot][0][threadIdx.x];
    const int first = range_.first + chunk * kChunkVectors;
    if (chunk + kChunksPerStage <= range_.whole) {
#pragma unroll
      for (int c = 0; c < kChunksPerStage; ++c)
        copy_async_16(to + c * kGemvThreads, row + (first + c * kChunkVectors) * kLaneValues,
                      exists);
      return;
    }
    for (int c = 0; c < kChunksPerStage && chunk + c < range_.chunks; ++c) {
      const int i = first + c * kChunkVectors;
      const bool inside = exists && i < range_.vectors;
      if constexpr (kAligned)
        copy_async_16(to + c * kGemvThreads, inside ? row + i * kLaneValues : weight, inside);
      else
        to[c * kGemvThreads] = inside ? load_padded<bf16, false>(row, i, C) : uint4{};
    }
  }

 private:
  StageVectors* const stages_;
  Matrix matrix_;
  LaneRange<kAligned> range_;
  int stages_per_product_;
};

// A range of packed weights in a stage, from this lane's operands on. Pieces of 16 bytes lie in an
// order in which a half warp that reads an operand meets no bank twice.
template <Format kFormat>
struct StagedRange {
  const unsigned char *values, *codes;

  __device__ __forceinline__ explicit StagedRange(const unsigned char* stage) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    values = stage + position(t * 4 + g / 2) * 16 + g % 2 * 8;
    codes = stage + kRangeGroups * kGroupBytes<kFormat> + g * 2;
  }
  // Position of the piece that is at `piece` in global memory, within 512 bytes.
  static __device__ __forceinline__ int position(int piece) { return piece ^ (piece >> 2 & 2); }

  __device__ __forceinline__ void operand(int k, uint32_t (&a)[4]) const {
    uint2 raw[kPieces<kFormat>];
#pragma unroll
    for (int i = 0; i < kPieces<kFormat>; ++i)
      raw[i] = *reinterpret_cast<const uint2*>(values + (k * kPieces<kFormat> + i) * 256);
    to_operand<kFormat>(raw, a);
  }
  __device__ __forceinline__ float2 group_scales(int k) const {
    return decode_scales(*reinterpret_cast<const uint16_t*>(codes + k * 16));
  }
};

// Loads packed weights. A stage is one range for each warp; warps take the ranges of a tile in
// turn. Values stay in their warp. The scales of W's rows do not: warp 0, which has the first range
// of every tile, loads them with it, and the barrier before the tile's sums are added publishes
// them. They have a ring of their own: one slot for each tile that warp 0 may be ahead, one for its
// current tile, one for a tile that other warps still read.
template <Format kFirst, Format kOther, int kMaxProducts, int kMaxStages>
class PackedLoader {
  static constexpr int kRowScales = kMaxProducts * static_cast<int>(kBlockRows);  // a slot
  static constexpr int kScaleSlots = kMaxStages + 2;

 public:
  static constexpr int kStageBytes =
      kGemvWarps *
      (kRangeBytes<kFirst> > kRangeBytes<kOther> ? kRangeBytes<kFirst> : kRangeBytes<kOther>);
  static constexpr int kScaleBytes = kScaleSlots * kRowScales * static_cast<int>(sizeof(float));
  static constexpr bool kWarpShares = true;
  static constexpr int kItemStep = kGemvWarps;

  __device__ __forceinline__ PackedLoader(unsigned char* shared, int stages)
      : stages_(shared), row_scales_(reinterpret_cast<float*>(shared + stages * kStageBytes)) {}

  __device__ __forceinline__ void open(const Matrix& matrix) {
    matrix_ = matrix;
    groups_ = matrix.C / static_cast<int>(kGroup);
    ranges_ = packed_ranges(matrix.C);
    tiles_ = packed_row_tiles(matrix.N);
    block_bytes_ = static_cast<int>(block_bytes(matrix.format, matrix.C));
  }
  __device__ __forceinline__ const Matrix& matrix() const { return matrix_; }
  __device__ __forceinline__ int tiles() const { return tiles_; }
  __device__ __forceinline__ int items() const { return matrix_.products * ranges_; }
  __device__ __forceinline__ int first_item() const { return threadIdx.x / kWarp; }

  __device__ __forceinline__ unsigned char* stage(int slot) const {
    return stages_ + slot * kStageBytes + threadIdx.x / kWarp * (kStageBytes / kGemvWarps);
  }

  __device__ __forceinline__ void load(int slot, int tile, int item) {
    if (item == 0) load_row_scales(tile);
    if (kFirst == kOther || matrix_.format == kFirst)
      load_range<kFirst>(stage(slot), tile, item);
    else
      load_range<kOther>(stage(slot), tile, item);
  }

  // Prefetches a range to L2; one lane calls it.
  __device__ __forceinline__ void prefetch(int tile, int item) const {
    if (kFirst == kOther || matrix_.format == kFirst)
      prefetch_range<kFirst>(tile, item);
    else
      prefetch_range<kOther>(tile, item);
  }

  // The scales of W's rows, [products, 16], of the block's next tile. To be called once a tile;
  // readable past a barrier that follows warp 0's first range.
  __device__ __forceinline__ const float* next_row_scales() {
    const float* const scales = row_scales_ + read_slot_ * kRowScales;
    read_slot_ = read_slot_ + 1 == kScaleSlots ? 0 : read_slot_ + 1;
    return scales;
  }

 private:
  __device__ __forceinline__ const char* block_of(int tile, int product) const {
    return static_cast<const char*>(matrix_.weight) +
           static_cast<int64_t>(tile + product * tiles_) * block_bytes_;
  }
  // The block of a tile's item, and the item's first group.
  __device__ __forceinline__ const char* locate(int tile, int item, int& first) const {
    const int product = kMaxProducts == 2 && item >= ranges_;
    first = (item - product * ranges_) * kRangeGroups;
    return block_of(tile, product);
  }

  __device__ __forceinline__ void load_row_scales(int tile) {
    const int lane = threadIdx.x % kWarp;
    if (lane < matrix_.products * 4)
      copy_async_16(row_scales_ + load_slot_ * kRowScales + lane * 4,
                    block_of(tile, lane / 4) + block_bytes_ - 64 + lane % 4 * 16, true);
    load_slot_ = load_slot_ + 1 == kScaleSlots ? 0 : load_slot_ + 1;
  }

  template <Format kFormat>
  __device__ __forceinline__ void load_range(unsigned char* stage, int tile, int item) {
    constexpr int kBytes = kGroupBytes<kFormat>;
    const int lane = threadIdx.x % kWarp;
    int first;
    const char* const block = locate(tile, item, first);
    const char* const from = block + first * kBytes + lane * 16;
    const int left = (groups_ - first) * kBytes - lane * 16;
    unsigned char* const to = stage + StagedRange<kFormat>::position(lane) * 16;
#pragma unroll
    for (int i = 0; i < kRangeGroups * kBytes; i += kWarp * 16)
      copy_async_16(to + i, from + i, i < left);
    if (kFormat == Format::int4 && lane < kRangeGroups)
      copy_async_16(stage + kRangeGroups * kBytes + lane * 16,
                    block + groups_ * kBytes + (first + lane) * 16, first + lane < groups_);
  }

  template <Format kFormat>
  __device__ __forceinline__ void prefetch_range(int tile, int item) const {
    constexpr int kBytes = kGroupBytes<kFormat>;
    int first;
    const char* const block = locate(tile, item, first);
    const int groups = groups_ - first < kRangeGroups ? groups_ - first : kRangeGroups;
    prefetch_l2(block + first * kBytes, groups * kBytes);
    if (kFormat == Format::int4) prefetch_l2(block + groups_ * kBytes + first * 16, groups * 16);
  }

  unsigned char* const stages_;  // [stages, kGemvWarps] ranges
  float* const row_scales_;      // [kScaleSlots, kMaxProducts, 16]
  Matrix matrix_;
  int groups_, ranges_, tiles_, block_bytes_;
  int load_slot_ = 0, read_slot_ = 0;  // of the scales of the next tile to load, and to read
};

// A ring of `stages` stages, kMinStages to kMaxStages. The first `blocks` blocks of the grid share
// the tiles of every matrix. Needs no barriers besides those between tiles.
template <typename Loader_, typename Sequence, int kMinStages, int kMaxStages>
class WeightPipeline {
 public:
  using Loader = Loader_;

  __device__ __forceinline__ WeightPipeline(unsigned char* shared, int stages, int blocks,
                                            const Sequence& sequence)
      : loader_(shared, stages), stages_(stages), blocks_(blocks), sequence_(sequence) {
    open(sequence_.first());
    if (tile_ >= loader_.tiles()) next_matrix();
  }

  // Fills the ring.
  __device__ __forceinline__ void prefill() {
#pragma unroll 1
    for (int slot = 0; slot < stages_; ++slot) issue(slot);
  }

  // Prefetches the next `items` stages of the current matrix to L2.
  __device__ __forceinline__ void prefetch(int items) const {
    if (threadIdx.x % kWarp > 0) return;
    int tile = tile_, item = item_;
    for (int i = 0; i < items && tile < loader_.tiles(); ++i, advance(tile, item))
      loader_.prefetch(tile, item);
  }

  // This thread's part of the oldest stage, once its copies have arrived.
  __device__ __forceinline__ auto acquire() const {
    wait_until_left<kMinStages - 1, kMaxStages - 1>(stages_ - 1);
    if constexpr (Loader::kWarpShares) __syncwarp();
    return loader_.stage(head_);
  }

  // Frees the oldest stage and issues the copies of the next one.
  __device__ __forceinline__ void release() {
    if constexpr (Loader::kWarpShares) __syncwarp();
    issue(head_);
    head_ = head_ + 1 == stages_ ? 0 : head_ + 1;
  }

  __device__ __forceinline__ Loader& loader() { return loader_; }

 private:
  __device__ __forceinline__ void open(const Matrix& matrix) {
    loader_.open(matrix);
    item_ = loader_.first_item();
    tile_ = item_ < loader_.items() ? static_cast<int>(blockIdx.x) : loader_.tiles();
  }
  // Moves to the next matrix of which this warp loads anything.
  __device__ __forceinline__ void next_matrix() {
    Matrix matrix = loader_.matrix();
    while (tile_ >= loader_.tiles() && sequence_.next(matrix)) open(matrix);
  }
  __device__ __forceinline__ void advance(int& tile, int& item) const {
    item += Loader::kItemStep;
    if (item >= loader_.items()) {
      item = loader_.first_item();
      tile += blocks_;
    }
  }
  __device__ __forceinline__ void issue(int slot) {
    if (tile_ < loader_.tiles()) {
      loader_.load(slot, tile_, item_);
      advance(tile_, item_);
      if (tile_ >= loader_.tiles()) next_matrix();
    }
    commit_copies();
  }

  Loader loader_;
  const int stages_, blocks_;
  Sequence sequence_;
  int tile_, item_;  // the next stage to issue
  int head_ = 0;     // the slot of the oldest stage
};

}  // namespace
}  // namespace voxkern::gemm_kernels
