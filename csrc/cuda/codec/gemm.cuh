// The codec's products: out = x W^T for float32 rows x that a Source makes, of any number. A stream
// has 2 rows of the transformer in a frame and up to 1,920 of a convolution, a server hundreds of
// streams.
//
// W is float32 or bfloat16, in rows or in blocks of 16 rows (voxkern.quantize.block_rows). A warp
// takes a tile of both matrices and one range of the columns, kChunk of them at a time; a block
// takes `tiles` such tiles and all `splits` ranges of their columns, whose sums are added in their
// order. The number of ranges depends on K alone, and so does the order of every sum: not on M, N,
// the size of tiles, or alignment.
//
// bfloat16 goes through the tensor cores, W as their 16-row operand: a lane has rows 2 g and 2 g +
// 1 of W as rows g and g + 8, and 8 columns in a row of W and x as two products of 16. Of x it
// takes rows g, g + 8, ...; each is rounded, after what the Source does to it, once per tile.
// float32: a lane has 4 columns of 4 rows of W and all rows of x in the tile, sums over the lanes
// at the end.
//
// kFlight chunks are under way before the first is used, those of W before the wait for the kernel
// in front. One stream on an H100: the largest convolution's 16.8 MB of bfloat16 (5 us) are 256
// blocks of 8 warps with 4 KB each under way, 2 of them on a multiprocessor; a matrix of the
// transformer (0.5 to 2 MB) is under way all at once, and costs what its launch does. Many streams:
// tiles of 64 rows of W and 32 of x, of which x comes out of the second-level cache once per 64
// rows of W; an ELU of 12 instructions a value is then twice the work of the tensor cores on it.
#pragma once

#include <type_traits>

#include "cuda/codec/tiles.cuh"

namespace voxkern::codec {
namespace {

__device__ __forceinline__ float activate(float x, Activation activation) {
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

template <class Tile, class Source>
__global__ void __launch_bounds__(kMaxSplits* kWarp, 1) gemm_kernel(GemmParams p, Source source) {
  constexpr int kM = Tile::kM, kN = Tile::kN, kFlight = Tile::kFlight, V = Tile::kColumns;
  constexpr bool kAligned = Tile::kAligned;
  VOX_DYNAMIC_SHARED(float, partials);  // [tiles, splits, kM, kPitch]
  VOX_SHARED(float[kMaxSplits][kM][2], stats);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int mine = warp / p.splits, split = warp % p.splits;
  const auto first_m = [&](int of) {
    return static_cast<int>((blockIdx.x * p.tiles + of) % p.tiles_m) * kM;
  };
  const auto first_n = [&](int of) {
    return static_cast<int>((blockIdx.x * p.tiles + of) / p.tiles_m) * kN;
  };
  const int m = first_m(mine), n = first_n(mine);
  const int chunks = (p.K + kChunk - 1) / kChunk, each = (chunks + p.splits - 1) / p.splits;
  const int begin = split * each, most = begin + each < chunks ? begin + each : chunks;
  const int end = n < p.N ? most : begin;  // may be before begin

  Tile tile;
  typename Tile::Raw raw[kFlight];
  typename Source::template Columns<V> columns[kFlight];
  float x[kFlight][Tile::kRows][V];
  const auto ask_weight = [&](int chunk, int f) {
    const int k = chunk < end ? chunk * kChunk + Tile::column(lane) : p.K;
    columns[f] = source.template columns<V, kAligned>(k);
    Tile::read_weight(p, n, k, lane, raw[f]);
  };
#pragma unroll
  for (int f = 0; f < kFlight; ++f) ask_weight(begin + f, f);
  wait_for_previous_kernel();  // weights are nobody's output: they may come before
  let_next_kernel_start();

  source.template prepare<kM, kAligned>(m, p.M, split, p.splits, stats[mine]);
  typename Source::Row rows[Tile::kRows];
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    // What is past the last row of x gives results that nobody stores.
    const int r = Tile::row(lane, i), last = p.M - 1 - m, at = r < last ? r : last;
    rows[i] = source.row(m + at, stats[mine][at]);
  }
  const auto ask_x = [&](int f) {
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i)
      source.template read<V, kAligned>(rows[i], columns[f], x[f][i]);
  };
#pragma unroll
  for (int f = 0; f < kFlight; ++f) ask_x(f);

  // What goes with the sum of a place in the tiles, read ahead.
  struct Output {
    int64_t at;
    float bias, add;
  };
  const int places = p.tiles * kM * kN;
  const auto output = [&](int i) {
    Output found = {-1, 0, 0};
    const int of = i / (kM * kN), at_m = first_m(of) + i / kN % kM, at_n = first_n(of) + i % kN;
    if (i >= places || at_m >= p.M || at_n >= p.N) return found;
    found.at = static_cast<int64_t>(at_m) * p.N + at_n;
    if (p.bias) found.bias = p.bias[at_n];
    if (p.add) found.add = p.add[found.at];
    return found;
  };
  Output next = output(threadIdx.x);

  for (int first = begin; first < end; first += kFlight)
#pragma unroll
    for (int f = 0; f < kFlight; ++f) {
      if (first + f >= end) break;  // the whole warp
#pragma unroll
      for (int i = 0; i < Tile::kRows; ++i) source.finish(rows[i], columns[f], x[f][i]);
      tile.multiply(raw[f], x[f]);
      if (first + f + kFlight >= end) continue;
      ask_weight(first + f + kFlight, f);
      ask_x(f);
    }

  tile.put(partials + warp * kM * kPitch<Tile>, kPitch<Tile>, lane);
  __syncthreads();
  for (int i = threadIdx.x; i < places; i += blockDim.x) {
    const Output now = next;
    next = output(i + blockDim.x);
    if (now.at < 0) continue;
    const int of = i / (kM * kN);
    const float* const from = partials + (of * p.splits * kM + i / kN % kM) * kPitch<Tile> + i % kN;
    float sum = from[0];
    for (int s = 1; s < p.splits; ++s) sum += from[s * kM * kPitch<Tile>];
    sum += now.bias;
    if (p.activates) sum = activate(sum, p.activation);
    p.out[now.at] = p.add ? sum + now.add : sum;
  }
}

// At least 4 chunks for each, so that a warp is worth its part of the last sum.
inline int splits_of(int K) {
  const int64_t chunks = divide_up(K, kChunk);
  int splits = 1;
  while (splits < kMaxSplits && chunks >= 8 * splits) splits *= 2;
  return splits;
}

// Blocks that keep a GPU of today busy.
constexpr int64_t kManyBlocks = 128;

// Of 8 warps.
template <class Tile>
int64_t blocks_of(const GemmParams& p) {
  return divide_up(divide_up(p.M, Tile::kM) * divide_up(p.N, Tile::kN) * p.splits, kMaxSplits);
}

template <class Tile, class Source>
void launch_tiles(GemmParams p, const Source& source, int warps, cudaStream_t stream) {
  p.tiles = warps > p.splits ? warps / p.splits : 1;
  p.tiles_m = static_cast<int>(divide_up(p.M, Tile::kM));
  const int64_t tiles = p.tiles_m * divide_up(p.N, Tile::kN);
  const int in_block = p.tiles * p.splits;
  launch(gemm_kernel<Tile, Source>,
         {.grid = dim3(static_cast<unsigned>(divide_up(tiles, p.tiles))),
          .block = dim3(static_cast<unsigned>(in_block * kWarp)),
          .shared_bytes = in_block * Tile::kM * kPitch<Tile> * sizeof(float),
          .stream = stream,
          .overlaps_previous = true},
         p, source);
}

// Tiles as large as leave enough blocks; the smallest for what goes element by element.
template <typename W, bool kBlocked, bool kAligned, class Source>
void launch_gemm(const GemmParams& p, const Source& source, cudaStream_t stream) {
  constexpr int kFew = 4;  // warps of a block where there is little work
  constexpr bool kIsBf16 = sizeof(W) == 2;
  using Small = std::conditional_t<kIsBf16, Bf16Tile<kBlocked, kAligned, 1, 1, 4>,
                                   F32Tile<kBlocked, kAligned, 2, 4>>;
  const bool few_rows = p.M <= Small::kM || blocks_of<Small>(p) <= 2 * kManyBlocks;
  if (!kAligned || (kIsBf16 ? few_rows : p.M <= Small::kM))
    return launch_tiles<Small>(p, source, kFew, stream);
  if constexpr (kAligned && kIsBf16) {
    using Large = Bf16Tile<kBlocked, true, 4, 4, 1>;
    if (blocks_of<Large>(p) >= kManyBlocks)
      launch_tiles<Large>(p, source, kMaxSplits, stream);
    else
      launch_tiles<Bf16Tile<kBlocked, true, 1, 4, 2>>(p, source, kMaxSplits, stream);
  } else if constexpr (kAligned) {
    launch_tiles<F32Tile<kBlocked, true, 8, 1>>(p, source, kFew, stream);
  }
}

template <bool kBlocked, class Source>
void gemm(GemmParams p, bool weight_is_bf16, const Source& source, cudaStream_t stream) {
  p.splits = splits_of(p.K);
  const int columns = weight_is_bf16 ? 8 : 4;
  const bool aligned = source.aligned(columns) && reinterpret_cast<uintptr_t>(p.weight) % 16 == 0;
  if (weight_is_bf16)
    aligned ? launch_gemm<bf16, kBlocked, true>(p, source, stream)
            : launch_gemm<bf16, kBlocked, false>(p, source, stream);
  else
    aligned ? launch_gemm<float, kBlocked, true>(p, source, stream)
            : launch_gemm<float, kBlocked, false>(p, source, stream);
}

}  // namespace
}  // namespace voxkern::codec
