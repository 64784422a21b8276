// The product of few rows with packed weights (packed_dots.cuh) in its parts: a queue of weights
// that a block asks for ahead, x quantized, and the walk over the block's tiles. packed_product.cuh
// puts them together for one product a launch and says why they are as they are.
//
// The queue goes on from matrix to matrix, and from format to format where there are two. W's
// values never pass from warp to warp, the scales of its rows do, once a tile: warp 0, which has
// the first range of every tile, asks for them with it, and whoever waits for the tile's sums has
// them too. They lie in places of their own that take turns: one for each tile that warp 0 may have
// asked for ahead, one for the tile it is at, one for a tile that other warps are not done with.
#pragma once

#include "cuda/gemm/matrix_walk.cuh"
#include "cuda/gemm/packed_dots.cuh"

namespace voxkern {
namespace {

// Of a range of columns of 16 rows, without the rows' scales.
template <Format kFormat>
constexpr int kRangeBytes =
    kRange * (kGroupBytes<kFormat> + static_cast<int>(scale_bytes(kFormat)));

// Sums that are read together, however few there are: an unrolled loop takes what is left of it one
// by one, which is all of the 4 of 1024 columns.
constexpr int kAddedAtOnce = 8;

// Ranges of C columns, tiles of N rows of W.
__host__ __device__ constexpr int packed_ranges(int C) {
  constexpr int kGroups = static_cast<int>(kGroup);
  return (C / kGroups + kRange - 1) / kRange;
}
__host__ __device__ constexpr int packed_tiles(int N) {
  return (N + static_cast<int>(kBlockRows) - 1) / static_cast<int>(kBlockRows);
}

// Vectors from one row of staged x to the next, which begins in other banks.
template <typename T>
__host__ __device__ constexpr int packed_staged_row(int64_t C) {
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

// kLeast to kMost ranges a warp long, as many as it is told. A warp's copies are for itself, but
// for the scales of W's rows: no barriers besides those between tiles.
template <int kLeast, int kMost, typename Walk>
class PackedQueue {
  static constexpr Format kFirst = Walk::kFormats[0], kOther = Walk::kFormats[1];
  static constexpr int kSlotBytes =
      kRangeBytes<kFirst> > kRangeBytes<kOther> ? kRangeBytes<kFirst> : kRangeBytes<kOther>;
  static constexpr int kPlaces = kMost + 2;
  static constexpr int kScales = Walk::kOf * static_cast<int>(kBlockRows);  // a place

 public:
  // Of shared memory.
  static __host__ __device__ constexpr int bytes(int slots) {
    return slots * kWarps * kSlotBytes + kPlaces * kScales * static_cast<int>(sizeof(float));
  }

  // Asks for as much as there is room for. The first `blocks` of the grid share the tiles.
  __device__ __forceinline__ PackedQueue(unsigned char* queue, int slots, int blocks,
                                         const Walk& walk)
      : queue_(queue), slots_(slots), blocks_(blocks), walk_(walk) {
    begin(walk_.first());
    if (tile_ >= tiles_) skip();
#pragma unroll 1
    for (int s = 0; s < slots; ++s) ask(s);
  }

  // What comes behind, of this matrix, on its way to the second-level cache.
  __device__ __forceinline__ void prefetch(int ranges) const {
    if (threadIdx.x % kWarp > 0) return;
    int tile = tile_, item = item_;
    for (int s = 0; s < ranges && tile < tiles_; ++s, advance(tile, item)) {
      if (kFirst == kOther || matrix_.format == kFirst)
        prefetch_range<kFirst>(tile, item);
      else
        prefetch_range<kOther>(tile, item);
    }
  }

  // Where this warp's oldest range is, for PackedSlot.
  __device__ __forceinline__ const unsigned char* wait() const {
    wait_copies_but<kLeast - 1, kMost - 1>(slots_ - 1);
    __syncwarp();
    return slot_at(oldest_);
  }

  // Lets go of the oldest range and asks for one more.
  __device__ __forceinline__ void go_on() {
    __syncwarp();
    ask(oldest_);
    oldest_ = oldest_ + 1 == slots_ ? 0 : oldest_ + 1;
  }

  // The scales of W's rows, [of, 16], of the block's next tile: to be asked for once a tile. They
  // are there behind a barrier after warp 0's first range.
  __device__ __forceinline__ const float* row_scales() {
    const float* const scales = scales_at(read_);
    read_ = read_ + 1 == kPlaces ? 0 : read_ + 1;
    return scales;
  }

 private:
  __device__ __forceinline__ unsigned char* slot_at(int slot) const {
    return queue_ + (slot * kWarps + threadIdx.x / kWarp) * kSlotBytes;
  }
  __device__ __forceinline__ float* scales_at(int place) const {
    return reinterpret_cast<float*>(queue_ + slots_ * kWarps * kSlotBytes) + place * kScales;
  }
  __device__ __forceinline__ const char* block_at(int tile, int product) const {
    return static_cast<const char*>(matrix_.weight) +
           static_cast<int64_t>(tile + product * tiles_) * block_bytes_;
  }
  // The block of a tile's item, and the item's first group.
  __device__ __forceinline__ const char* find(int tile, int item, int& first) const {
    const int product = Walk::kOf == 2 && item >= ranges_;
    first = (item - product * ranges_) * kRange;
    return block_at(tile, product);
  }

  __device__ __forceinline__ void begin(const Matrix& matrix) {
    matrix_ = matrix;
    groups_ = matrix.C / static_cast<int>(kGroup);
    ranges_ = packed_ranges(matrix.C);
    block_bytes_ = static_cast<int>(block_bytes(matrix.format, matrix.C));
    tiles_ = packed_tiles(matrix.N);
    item_ = threadIdx.x / kWarp;
    tile_ = item_ < matrix.of * ranges_ ? blockIdx.x : tiles_;
  }
  // On to a matrix of which this warp has something.
  __device__ __forceinline__ void skip() {
    Matrix matrix = matrix_;
    while (tile_ >= tiles_ && walk_.next(matrix)) begin(matrix);
  }
  __device__ __forceinline__ void advance(int& tile, int& item) const {
    item += kWarps;
    if (item >= matrix_.of * ranges_) {
      item = threadIdx.x / kWarp;
      tile += blocks_;
    }
  }

  __device__ __forceinline__ void ask(int slot) {
    if (tile_ < tiles_) {
      if (item_ == 0) ask_scales();
      if (kFirst == kOther || matrix_.format == kFirst)
        ask_range<kFirst>(slot_at(slot));
      else
        ask_range<kOther>(slot_at(slot));
      advance(tile_, item_);
      if (tile_ >= tiles_) skip();
    }
    commit_copies();
  }

  __device__ __forceinline__ void ask_scales() {
    const int lane = threadIdx.x % kWarp;
    if (lane < matrix_.of * 4)
      copy_async_16(scales_at(asked_) + lane * 4,
                    block_at(tile_, lane / 4) + block_bytes_ - 64 + lane % 4 * 16, true);
    asked_ = asked_ + 1 == kPlaces ? 0 : asked_ + 1;
  }

  template <Format kFormat>
  __device__ __forceinline__ void ask_range(unsigned char* slot) {
    constexpr int kBytes = kGroupBytes<kFormat>;
    const int lane = threadIdx.x % kWarp;
    int first;
    const char* const block = find(tile_, item_, first);
    const char* const from = block + first * kBytes + lane * 16;
    const int there = (groups_ - first) * kBytes - lane * 16;
    unsigned char* const to = slot + PackedSlot<kFormat>::place(lane) * 16;
#pragma unroll
    for (int at = 0; at < kRange * kBytes; at += kWarp * 16)
      copy_async_16(to + at, from + at, at < there);
    if (kFormat == Format::int4 && lane < kRange)
      copy_async_16(slot + kRange * kBytes + lane * 16,
                    block + groups_ * kBytes + (first + lane) * 16, first + lane < groups_);
  }

  template <Format kFormat>
  __device__ __forceinline__ void prefetch_range(int tile, int item) const {
    constexpr int kBytes = kGroupBytes<kFormat>;
    int first;
    const char* const block = find(tile, item, first);
    const int there = groups_ - first < kRange ? groups_ - first : kRange;
    prefetch_l2(block + first * kBytes, there * kBytes);
    if (kFormat == Format::int4) prefetch_l2(block + groups_ * kBytes + first * 16, there * 16);
  }

  unsigned char* const queue_;  // [slots, kWarps] ranges, then the places of the scales
  const int slots_, blocks_;
  Walk walk_;
  Matrix matrix_;
  int groups_, ranges_, block_bytes_;
  int tile_, tiles_, item_;   // the next range to ask for
  int oldest_ = 0;            // the slot where it goes, after what is there
  int asked_ = 0, read_ = 0;  // of the places: where the next tile's scales go, the next to be read
};

// x's rows, normalised or not, quantized in shared memory; for all threads of the block, a barrier
// at the end. staged: room for them before that, with a norm, for which kRows are read at once.
template <typename T, Format kFormat, int kMost, Before before, int kRows = kRowsAtOnce<T>>
__device__ __forceinline__ void quantize_x(const ProductParams& p, uint4 norm_first, uint4* staged,
                                           const PackedShared<kMost>& shared) {
  const int rows = kMost == 1 ? 1 : static_cast<int>(p.M), log_rows = log_up(rows);
  const int groups = static_cast<int>(p.C) / static_cast<int>(kGroup);
  if constexpr (before == Before::norm) {
    const int row = packed_staged_row<T>(p.C);
    stage<T, before, kRows>(p, 0, rows, norm_first, staged, row);
    quantize_rows<kFormat, kMost, kThreads>(StagedRows<T>{.x = staged, .row = row}, rows, log_rows,
                                            0, groups, shared.values, shared.scales);
  } else {
    quantize_rows<kFormat, kMost, kThreads>(
        PlainRows<T>{.x = static_cast<const T*>(p.x), .C = p.C, .aligned = true}, rows, log_rows, 0,
        groups, shared.values, shared.scales);
  }
  sync_first<kThreads>();
}

// out's columns of this block's tiles, one of `blocks` that share them, of all rows of x, which
// quantize_x() left in `shared`. Its partials: of two tiles, if the block has more than one, that
// no thread reads any more.
template <typename T, Format kFormat, int kMost, After after, typename Queue>
__device__ __forceinline__ void multiply_packed_tiles(const ProductParams& p, int blocks,
                                                      Queue& weights,
                                                      const PackedShared<kMost>& shared) {
  constexpr int kOf = kProducts<after>, kRows = static_cast<int>(kBlockRows);
  constexpr int kStride = PackedShared<kMost>::kStride;
  static_assert(kMost * kRows <= kThreads);
  const int me = threadIdx.x, warp = me / kWarp;
  const int rows = kMost == 1 ? 1 : static_cast<int>(p.M), log_rows = log_up(rows);
  const int ranges = packed_ranges(static_cast<int>(p.C)), items = kOf * ranges;
  const int tiles = packed_tiles(static_cast<int>(p.N));
  const int at_m = me / kRows, at_n = me % kRows;  // of the column that this thread finishes

  int turn = 0;
  for (int at = blockIdx.x; at < tiles; at += blocks, turn ^= 1) {
    float* const partials = shared.partials + turn * items * kMost * kStride;
    const int n = at * kRows + at_n;
    const bool finishes = at_m < rows && n < p.N;
    const T old = finishes ? old_value<T, after>(p, at_m, n) : T{};
    for (int i = warp; i < items; i += kWarps) {
      float sums[kTiles<kMost>][4];
      multiply<kFormat, kTiles<kMost>>(PackedSlot<kFormat>(weights.wait()), shared,
                                       (kOf == 2 && i >= ranges ? i - ranges : i) * kRange, rows,
                                       log_rows, sums);
      weights.go_on();
      store_sums<kMost>(sums, rows, partials + i * kMost * kStride);
    }
    const float* const row_scales = weights.row_scales();
    sync_first<kThreads>();
    if (!finishes) continue;
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
      totals[of] = __fmul_rn(totals[of], row_scales[of * kRows + at_n]);
    finish<T, after>(p, at_m, n, totals, old);
  }
}

}  // namespace
}  // namespace voxkern
