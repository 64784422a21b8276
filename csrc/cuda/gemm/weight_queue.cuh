// The bfloat16 product of few rows in its parts: a queue of weights that a block asks for ahead,
// and the walk over its tiles. product.cuh puts them together for one product a launch,
// persistent_depth.cu for all of a frame's; product.cuh says why they are as they are.
#pragma once

#include "cuda/gemm/matrix_walk.cuh"

namespace voxkern {
namespace {

constexpr int kLanes = 4;  // that share a row of a chunk
constexpr int kTileN = 8;
constexpr int kInGroup = 4;

// Vectors from one row of staged x to the next. In bfloat16 an odd number of chunks: then the two
// rows that eight lanes read at once lie in different banks.
template <typename T>
__host__ __device__ constexpr int staged_row(int64_t C) {
  const int64_t vectors = divide_up(C, kVector<T>);
  return static_cast<int>(sizeof(T) == 4 ? vectors : (divide_up(vectors, kLanes) | 1) * kLanes);
}

using QueueGroup = uint4[kInGroup][kThreads];
// The warps' sums of a tile.
template <bool kHigh, After after>
using TileSums = float[kProducts<after>][kWarps][kHigh ? kTileM : kTileM / 2][kTileN];

// What a lane takes of a row of C columns.
template <bool kAligned>
struct Share {
  int vectors;  // of the whole row
  int first;    // this lane's first
  int mine;     // chunks of its warp; may be negative
  int whole;    // of those, from the first on, the ones that have all their columns

  __device__ __forceinline__ explicit Share(int C) {
    constexpr int kSize = kVector<bf16>;
    const int me = threadIdx.x, warp = me / kWarp;
    vectors = (C + kSize - 1) / kSize;
    const int chunks = (vectors + kLanes - 1) / kLanes, range = (chunks + kWarps - 1) / kWarps;
    const int begin = warp * range;
    first = begin * kLanes + me % kLanes;
    mine = chunks - begin < range ? chunks - begin : range;
    // Groups of those need no looking at bounds.
    whole = kAligned ? (vectors / kLanes - begin < mine ? vectors / kLanes - begin : mine) : 0;
  }
};

// kLeast to kMost groups long, as many as it is told. A lane's copies are for itself: no barriers.
template <bool kAligned, int kLeast, int kMost, typename Walk>
class WeightQueue {
 public:
  // Asks for as much as there is room for. The first `blocks` of the grid share the tiles.
  __device__ __forceinline__ WeightQueue(QueueGroup* queue, int groups, int blocks,
                                         const Walk& walk)
      : queue_(queue), groups_(groups), blocks_(blocks), walk_(walk), share_(0) {
    begin(walk_.first());
    if (tile_ >= tiles_) skip();
#pragma unroll 1
    for (int g = 0; g < groups; ++g) ask();
  }

  // Where this lane's part of the oldest group is, kThreads vectors from chunk to chunk.
  __device__ __forceinline__ const uint4* wait() const {
    wait_copies_but<kLeast - 1, kMost - 1>(groups_ - 1);
    return &queue_[oldest_][0][threadIdx.x];
  }

  // Lets go of the oldest group and asks for one more.
  __device__ __forceinline__ void go_on() {
    oldest_ = oldest_ + 1 == groups_ ? 0 : oldest_ + 1;
    ask();
  }

 private:
  __device__ __forceinline__ void begin(const Matrix& matrix) {
    matrix_ = matrix;
    share_ = Share<kAligned>(matrix.C);
    tiles_ = (matrix.N + kTileN - 1) / kTileN;
    tile_ = share_.mine > 0 ? blockIdx.x : tiles_;
  }
  // On to a matrix of which this warp has something.
  __device__ __forceinline__ void skip() {
    Matrix matrix = matrix_;
    while (tile_ >= tiles_ && walk_.next(matrix)) begin(matrix);
  }

  __device__ __forceinline__ void ask() {
    constexpr int kSize = kVector<bf16>;
    if (tile_ < tiles_) {
      const int n = tile_ * kTileN + threadIdx.x % kWarp / kLanes, C = matrix_.C;
      const bool there = n < matrix_.N;
      const bf16* const weight = static_cast<const bf16*>(matrix_.weight);
      const bf16* const from =
          weight + static_cast<int64_t>(there ? n + product_ * matrix_.N : 0) * C;
      uint4* const to = &queue_[slot_][0][threadIdx.x];
      const int first = share_.first + chunk_ * kLanes;
      if (chunk_ + kInGroup <= share_.whole) {
#pragma unroll
        for (int c = 0; c < kInGroup; ++c)
          copy_async_16(to + c * kThreads, from + (first + c * kLanes) * kSize, there);
      } else {
        for (int c = 0; c < kInGroup && chunk_ + c < share_.mine; ++c) {
          const int i = first + c * kLanes;
          const bool inside = there && i < share_.vectors;
          if constexpr (kAligned)
            copy_async_16(to + c * kThreads, inside ? from + i * kSize : weight, inside);
          else
            to[c * kThreads] = inside ? read_vector<bf16, false>(from, i, C) : uint4{};
        }
      }
      chunk_ += kInGroup;
      if (chunk_ >= share_.mine) {
        chunk_ = 0;
        if (++product_ == matrix_.of) {
          product_ = 0;
          tile_ += blocks_;
          if (tile_ >= tiles_) skip();
        }
      }
    }
    commit_copies();
    slot_ = slot_ + 1 == groups_ ? 0 : slot_ + 1;
  }

  QueueGroup* const queue_;
  const int groups_, blocks_;
  Walk walk_;
  Matrix matrix_;
  Share<kAligned> share_;
  int tile_, tiles_;                        // the next group to ask for,
  int product_ = 0, chunk_ = 0, slot_ = 0;  // and where it goes
  int oldest_ = 0;
};

// out's rows m .. m + rows - 1 in this block's tiles, one of `blocks` that share them. x is
// `staged`, `row` vectors from row to row, or with a `row` of 0 in memory; partials: two, that no
// thread reads any more.
template <bool kAligned, bool kHigh, After after, typename Queue>
__device__ __forceinline__ void multiply_tiles(const ProductParams& p, int64_t m, int rows,
                                               int blocks, Queue& weights, const uint4* staged,
                                               int staged_row, TileSums<kHigh, after>* partials) {
  constexpr int kRowsM = kHigh ? kTileM : kTileM / 2;
  constexpr int kOf = kProducts<after>;
  const int me = threadIdx.x, lane = me % kWarp, warp = me / kWarp;
  const int row = lane / kLanes, column = lane % kLanes;
  const int N = static_cast<int>(p.N), C = static_cast<int>(p.C);
  const int tiles = (N + kTileN - 1) / kTileN;
  const Share<kAligned> share(C);

  const bf16* const x = static_cast<const bf16*>(p.x) + m * C;
  const uint4* my_x = staged + row * staged_row;
  const uint4* high_x = my_x + 8 * staged_row;
  if (!staged_row) {
    my_x = reinterpret_cast<const uint4*>(x + static_cast<int64_t>(row) * C);
    high_x = reinterpret_cast<const uint4*>(x + static_cast<int64_t>(row + 8) * C);
  }
  const auto read_x = [&](const uint4* from, int r, int i) -> uint4 {
    if (r >= rows) return {};
    if constexpr (kAligned) return staged_row ? from[i] : load_uncached(from + i);
    return read_vector<bf16, false>(x + static_cast<int64_t>(r) * C, i, C);
  };
  const auto multiply = [&](float (&sums)[4], uint4 w, uint4 low, uint4 high) {
    multiply_bf16(sums, {low.x, high.x, low.y, high.y}, w.x, w.y);
    multiply_bf16(sums, {low.z, high.z, low.w, high.w}, w.z, w.w);
  };

  int turn = 0;
  for (int at = blockIdx.x; at < tiles; at += blocks, turn ^= 1) {
    const int at_m = me / kTileN, n = at * kTileN + me % kTileN;
    const bool finishes = me < kRowsM * kTileN && at_m < rows && n < N;
    const bf16 old = finishes ? old_value<bf16, after>(p, m + at_m, n) : bf16{};
#pragma unroll
    for (int of = 0; of < kOf; ++of) {
      float sums[4] = {};
      for (int first = 0; first < share.mine; first += kInGroup) {
        const uint4* const w = weights.wait();
        const int i = share.first + first * kLanes;
        if (first + kInGroup <= share.whole) {
          // Two by two: all at once would take more registers than three blocks leave.
#pragma unroll
          for (int c = 0; c < kInGroup; c += 2) {
            uint4 low[2], high[2];
#pragma unroll
            for (int k = 0; k < 2; ++k) {
              low[k] = read_x(my_x, row, i + (c + k) * kLanes);
              high[k] = kHigh ? read_x(high_x, row + 8, i + (c + k) * kLanes) : uint4{};
            }
#pragma unroll
            for (int k = 0; k < 2; ++k) multiply(sums, w[(c + k) * kThreads], low[k], high[k]);
          }
        } else {
          for (int c = 0; c < kInGroup && first + c < share.mine; ++c) {
            const int at_i = i + c * kLanes;
            const bool inside = at_i < share.vectors;
            multiply(sums, w[c * kThreads], inside ? read_x(my_x, row, at_i) : uint4{},
                     kHigh && inside ? read_x(high_x, row + 8, at_i) : uint4{});
          }
        }
        weights.go_on();
      }
#pragma unroll
      for (int i = 0; i < kRowsM / 4; ++i)
        partials[turn][of][warp][row + i / 2 * 8][column * 2 + i % 2] = sums[i];
    }
    sync_first<kThreads>();
    if (!finishes) continue;
    float totals[kOf] = {};
#pragma unroll
    for (int of = 0; of < kOf; ++of)
#pragma unroll
      for (int w = 0; w < kWarps; ++w) totals[of] += partials[turn][of][w][at_m][me % kTileN];
    finish<bf16, after>(p, m + at_m, n, totals, old);
  }
}

}  // namespace
}  // namespace voxkern
