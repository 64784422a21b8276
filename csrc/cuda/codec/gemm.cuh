// The codec's GEMM: out = x W^T for any number of float32 rows x, which a Prologue (prologues.cuh)
// produces. A stream has 2 rows of the transformer in a frame and up to 1,920 of a convolution, a
// server hundreds of streams.
//
// W is float32 or bfloat16, in rows or in blocks of 16 rows (voxkern.quantize.block_rows). A warp
// takes a tile of both matrices (tiles.cuh) and one range of the columns, kChunk of them at a time;
// a block takes `tiles` such tiles and all `splits` ranges of their columns, whose sums are added
// in their order. The number of ranges depends on K alone, and so does the order of every sum: not
// on M, N, the size of tiles, or alignment.
//
// kChunksInFlight chunks are in flight before the first is used, those of W before the wait for the
// previous kernel. With one stream, the largest convolution's weight is 256 blocks of 8 warps with
// 4 KB each in flight, 2 blocks a multiprocessor; a matrix of the transformer (0.5 to 2 MB) is in
// flight all at once, and costs what its launch does. With many streams, tiles have 64 rows of W
// and 32 of x, and x comes from L2 once per 64 rows of W; an ELU of 12 instructions a value is then
// twice the work of the tensor cores on it.
//
// Rounding: bfloat16 rounds x after the Prologue, once per tile; sums are float32.
// Floor: memory, W once (docs/cuda.md).
#pragma once

#include <type_traits>

#include "cuda/codec/tiles.cuh"

namespace voxkern::codec {
namespace {

VOX_DEVICE float activate(float x, Activation activation) {
  switch (activation) {
    case Activation::gelu: return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    case Activation::gelu_tanh:
      return 0.5f * x * (1.0f + tanhf(0.79788456f * fmaf(0.044715f * x * x, x, x)));
    case Activation::relu: return x < 0.0f ? 0.0f : x;
    case Activation::silu: break;
  }
  return x / (1.0f + expf(-x));
}

template <class Tile>
constexpr int kPitch = Tile::kN + 4;

// One warp's tile and range of columns, then its share of the block's results.
template <class Tile, class Prologue>
class GemmWorker {
  static constexpr int kM = Tile::kM, kN = Tile::kN, kChunksInFlight = Tile::kChunksInFlight;
  static constexpr int kChunkColumns = Tile::kChunkColumns;
  static constexpr bool kAligned = Tile::kAligned;

 public:
  VOX_DEVICE GemmWorker(const GemmParams& p, const Prologue& prologue)
      : p_(p), prologue_(prologue), m_(first_m(tile_in_block_)), n_(first_n(tile_in_block_)) {
    const int chunks = (p.K + kChunk - 1) / kChunk, each = (chunks + p.splits - 1) / p.splits;
    begin_ = split_ * each;
    const int last = begin_ + each < chunks ? begin_ + each : chunks;
    end_ = n_ < p.N ? last : begin_;  // may be less than begin_
  }

  VOX_DEVICE void run(float* partials, float (&stats)[kMaxSplits][kM][2]) {
#pragma unroll
    for (int f = 0; f < kChunksInFlight; ++f) load_weight(begin_ + f, f);
    wait_for_previous_kernel();  // no kernel writes weights: they may be loaded before
    let_next_kernel_start();
    prologue_.template prepare<kM, kAligned>(m_, p_.M, split_, p_.splits, stats[tile_in_block_]);
#pragma unroll
    for (int i = 0; i < Tile::kLaneRows; ++i) {
      // Rows past the last give results that are not stored.
      const int r = Tile::row(lane_, i), last = p_.M - 1 - m_, at = r < last ? r : last;
      rows_[i] = prologue_.row(m_ + at, stats[tile_in_block_][at]);
    }
#pragma unroll
    for (int f = 0; f < kChunksInFlight; ++f) load_x(f);
    const Output first = output(threadIdx.x);
    multiply_range();
    tile_.put(partials + warp_ * kM * kPitch<Tile>, kPitch<Tile>, lane_);
    __syncthreads();
    store_results(partials, first);
  }

 private:
  // Place i of the block's tiles in the output, and what is added to its sum, loaded ahead.
  struct Output {
    int64_t at;
    float bias, add;
  };

  VOX_DEVICE int first_m(int tile) const {
    return static_cast<int>((blockIdx.x * p_.tiles + tile) % p_.tiles_m) * kM;
  }
  VOX_DEVICE int first_n(int tile) const {
    return static_cast<int>((blockIdx.x * p_.tiles + tile) / p_.tiles_m) * kN;
  }

  VOX_DEVICE void load_weight(int chunk, int f) {
    const int k = chunk < end_ ? chunk * kChunk + Tile::column(lane_) : p_.K;
    columns_[f] = prologue_.template columns<kChunkColumns, kAligned>(k);
    Tile::read_weight(p_, n_, k, lane_, weights_[f]);
  }
  VOX_DEVICE void load_x(int f) {
#pragma unroll
    for (int i = 0; i < Tile::kLaneRows; ++i)
      prologue_.template read<kChunkColumns, kAligned>(rows_[i], columns_[f], x_[f][i]);
  }

  VOX_DEVICE void multiply_range() {
    for (int first = begin_; first < end_; first += kChunksInFlight)
#pragma unroll
      for (int f = 0; f < kChunksInFlight; ++f) {
        if (first + f >= end_) break;  // the whole warp
#pragma unroll
        for (int i = 0; i < Tile::kLaneRows; ++i) prologue_.finish(rows_[i], columns_[f], x_[f][i]);
        tile_.multiply(weights_[f], x_[f]);
        if (first + f + kChunksInFlight >= end_) continue;
        load_weight(first + f + kChunksInFlight, f);
        load_x(f);
      }
  }

  VOX_DEVICE Output output(int i) const {
    Output found = {-1, 0, 0};
    const int tile = i / (kM * kN), m = first_m(tile) + i / kN % kM, n = first_n(tile) + i % kN;
    if (i >= p_.tiles * kM * kN || m >= p_.M || n >= p_.N) return found;
    found.at = static_cast<int64_t>(m) * p_.N + n;
    if (p_.bias) found.bias = p_.bias[n];
    if (p_.add) found.add = p_.add[found.at];
    return found;
  }

  // Adds the splits' sums in their order.
  VOX_DEVICE void store_results(const float* partials, Output next) const {
    for (int i = threadIdx.x; i < p_.tiles * kM * kN; i += blockDim.x) {
      const Output now = next;
      next = output(i + blockDim.x);
      if (now.at < 0) continue;
      const int tile = i / (kM * kN);
      const float* const from =
          partials + (tile * p_.splits * kM + i / kN % kM) * kPitch<Tile> + i % kN;
      float sum = from[0];
      for (int s = 1; s < p_.splits; ++s) sum += from[s * kM * kPitch<Tile>];
      sum += now.bias;
      if (p_.activates) sum = activate(sum, p_.activation);
      p_.out[now.at] = p_.add ? sum + now.add : sum;
    }
  }

  const GemmParams& p_;
  const Prologue& prologue_;
  const int lane_ = threadIdx.x % kWarp, warp_ = threadIdx.x / kWarp;
  const int tile_in_block_ = warp_ / p_.splits, split_ = warp_ % p_.splits;
  const int m_, n_;  // first rows of x and W
  int begin_, end_;  // chunks of the range
  Tile tile_;
  typename Tile::Raw weights_[kChunksInFlight];
  typename Prologue::template Columns<kChunkColumns> columns_[kChunksInFlight];
  typename Prologue::Row rows_[Tile::kLaneRows];
  float x_[kChunksInFlight][Tile::kLaneRows][kChunkColumns];
};

template <class Tile, class Prologue>
__global__ void __launch_bounds__(kMaxSplits* kWarp, 1)
    gemm_kernel(GemmParams p, Prologue prologue) {
  VOX_DYNAMIC_SHARED(float, partials);  // [tiles, splits, kM, kPitch]
  VOX_SHARED(float[kMaxSplits][Tile::kM][2], stats);
  GemmWorker<Tile, Prologue>(p, prologue).run(partials, stats);
}

// At least 4 chunks a range, so that a warp is worth its part of the last sum.
inline int splits_of(int K) {
  const int64_t chunks = divide_up(K, kChunk);
  int splits = 1;
  while (splits < kMaxSplits && chunks >= 8 * splits) splits *= 2;
  return splits;
}

constexpr int64_t kManyBlocks = 128;  // enough to keep a current GPU busy

// Blocks of 8 warps.
template <class Tile>
int64_t blocks_of(const GemmParams& p) {
  return divide_up(divide_up(p.M, Tile::kM) * divide_up(p.N, Tile::kN) * p.splits, kMaxSplits);
}

template <class Tile, class Prologue>
void launch_tiles(GemmParams p, const Prologue& prologue, int warps, cudaStream_t stream) {
  p.tiles = warps > p.splits ? warps / p.splits : 1;
  p.tiles_m = static_cast<int>(divide_up(p.M, Tile::kM));
  const int64_t tiles = p.tiles_m * divide_up(p.N, Tile::kN);
  const int warps_of_block = p.tiles * p.splits;
  launch(gemm_kernel<Tile, Prologue>,
         {.grid = divide_up(tiles, p.tiles),
          .block = warps_of_block * kWarp,
          .shared_bytes = warps_of_block * Tile::kM * kPitch<Tile> * sizeof(float),
          .stream = stream},
         p, prologue);
}

// The largest tiles that leave enough blocks; the smallest for unaligned matrices.
template <typename W, bool kBlocked, bool kAligned, class Prologue>
void launch_gemm(const GemmParams& p, const Prologue& prologue, cudaStream_t stream) {
  constexpr int kFewWarps = 4;  // of a block where there is little work
  constexpr bool kIsBf16 = sizeof(W) == 2;
  using Small = std::conditional_t<kIsBf16, Bf16Tile<kBlocked, kAligned, 1, 1, 4>,
                                   F32Tile<kBlocked, kAligned, 2, 4>>;
  const bool few_rows = p.M <= Small::kM || blocks_of<Small>(p) <= 2 * kManyBlocks;
  if (!kAligned || (kIsBf16 ? few_rows : p.M <= Small::kM))
    return launch_tiles<Small>(p, prologue, kFewWarps, stream);
  if constexpr (kAligned && kIsBf16) {
    using Large = Bf16Tile<kBlocked, true, 4, 4, 1>;
    if (blocks_of<Large>(p) >= kManyBlocks)
      launch_tiles<Large>(p, prologue, kMaxSplits, stream);
    else
      launch_tiles<Bf16Tile<kBlocked, true, 1, 4, 2>>(p, prologue, kMaxSplits, stream);
  } else if constexpr (kAligned) {
    launch_tiles<F32Tile<kBlocked, true, 8, 1>>(p, prologue, kFewWarps, stream);
  }
}

template <bool kBlocked, class Prologue>
void gemm(GemmParams p, bool weight_is_bf16, const Prologue& prologue, cudaStream_t stream) {
  p.splits = splits_of(p.K);
  const int columns = weight_is_bf16 ? 8 : 4;
  const bool aligned = prologue.aligned(columns) && reinterpret_cast<uintptr_t>(p.weight) % 16 == 0;
  if (weight_is_bf16)
    aligned ? launch_gemm<bf16, kBlocked, true>(p, prologue, stream)
            : launch_gemm<bf16, kBlocked, false>(p, prologue, stream);
  else
    aligned ? launch_gemm<float, kBlocked, true>(p, prologue, stream)
            : launch_gemm<float, kBlocked, false>(p, prologue, stream);
}

}  // namespace
}  // namespace voxkern::codec
