// A warp's tiles in the codec's GEMM: the parts of W and x that its lanes hold, and their product.
//
// bfloat16 uses the tensor cores, with W as their 16-row operand: a lane has rows 2 g and 2 g + 1
// of W as rows g and g + 8, and 8 consecutive columns of W and x as two products of 16 columns. Of
// x it has rows g, g + 8, ... float32: a lane has 4 columns of 4 rows of W and all rows of x in the
// tile; lanes are summed at the end.
#pragma once

#include "cuda/runtime/elements.cuh"
#include "params/mimi_transformer.h"

namespace voxkern::codec {
namespace {

constexpr int kChunk = 32;
constexpr int kMaxSplits = 8;
constexpr int kWeightBlockRows = static_cast<int>(kBlockRows);

struct GemmParams {
  int M, N, K;
  const void* weight;  // [N, K], or in blocks
  const float* bias;   // [N] or null
  const float* add;    // [M, N] or null
  float* out;          // [M, N]
  bool activates = false;
  Activation activation = {};  // applied before `add`
  // Set by the launch: ranges of columns, tiles of a block, tiles along M.
  int splits = 0, tiles = 0, tiles_m = 0;
};

template <typename W, bool kBlocked>
VOX_DEVICE W weight_at(const GemmParams& p, int n, int k) {
  if (n >= p.N || k >= p.K) return from_float<W>(0.0f);
  constexpr int kPair = sizeof(W) == 2 ? 2 : 1;
  int64_t at = static_cast<int64_t>(n) * p.K + k;
  if constexpr (kBlocked)
    at = ((static_cast<int64_t>(n / kWeightBlockRows) * (p.K / kPair) + k / kPair) *
              kWeightBlockRows +
          n % kWeightBlockRows) *
             kPair +
         k % kPair;
  return static_cast<const W*>(p.weight)[at];
}

// V columns of a row from k on, zeros past its end.
template <int V, bool kAligned>
VOX_DEVICE void read_columns(const float* row, int k, int K, float (&out)[V]) {
#pragma unroll
  for (int i = 0; i < V; i += 4) {
    if constexpr (kAligned) {
      float4 four = {0, 0, 0, 0};
      if (k < K) four = *reinterpret_cast<const float4*>(row + k + i);
      out[i] = four.x, out[i + 1] = four.y, out[i + 2] = four.z, out[i + 3] = four.w;
    } else {
#pragma unroll
      for (int j = i; j < i + 4; ++j) out[j] = k + j < K ? row[k + j] : 0.0f;
    }
  }
}

// A tile of kN rows of W and kM of x. A lane has kChunkColumns of a chunk's columns and kLaneRows
// rows of x.
template <bool kAligned_, int kN_, int kM_, int kChunkColumns_, int kLaneRows_,
          int kChunksInFlight_>
struct TileShape {
  static constexpr bool kAligned = kAligned_;
  static constexpr int kN = kN_, kM = kM_, kChunkColumns = kChunkColumns_, kLaneRows = kLaneRows_;
  static constexpr int kChunksInFlight = kChunksInFlight_;
};

// 16 kA rows of W and 8 kB of x.
template <bool kBlocked, bool kAligned, int kA, int kB, int kChunksInFlight>
struct Bf16Tile : TileShape<kAligned, kWeightBlockRows * kA, 8 * kB, 8, kB, kChunksInFlight> {
  // Word 2 i of 16 rows: the columns 2 i and 2 i + 1 of row 2 g; word 2 i + 1 those of row 2 g + 1.
  struct Raw {
    uint32_t words[kA][8];
  };
  float sums[kA][kB][4] = {};

  static VOX_DEVICE int column(int lane) { return lane % 4 * 8; }
  static VOX_DEVICE int row(int lane, int i) { return 8 * i + lane / 4; }

  static VOX_DEVICE void read_weight(const GemmParams& p, int n, int k, int lane, Raw& raw) {
#pragma unroll
    for (int a = 0; a < kA; ++a) {
      const int first = n + kWeightBlockRows * a + lane / 4 * 2;
      uint32_t (&words)[8] = raw.words[a];
      if constexpr (!kAligned) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const auto bits = [&](int j) -> uint32_t {
            return weight_at<bf16, kBlocked>(p, first + i % 2, k + i / 2 * 2 + j).bits;
          };
          words[i] = bits(0) | bits(1) << 16;
        }
      } else if constexpr (kBlocked) {
        const bool there = first < p.N && k < p.K;  // row first + 1 is always in the block
        const int64_t block = first / kWeightBlockRows;
        const uint32_t* const from = static_cast<const uint32_t*>(p.weight) +
                                     (block * (p.K / 2) + k / 2) * kWeightBlockRows +
                                     first % kWeightBlockRows;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint2 two = there ? load_stream8(from + i * kWeightBlockRows) : uint2{0, 0};
          words[2 * i] = two.x;
          words[2 * i + 1] = two.y;
        }
      } else {
        const bf16* const from =
            static_cast<const bf16*>(p.weight) + static_cast<int64_t>(first) * p.K + k;
        uint4 even = {}, odd = {};
        if (first < p.N && k < p.K) even = load_stream(from);
        if (first + 1 < p.N && k < p.K) odd = load_stream(from + p.K);
        words[0] = even.x, words[2] = even.y, words[4] = even.z, words[6] = even.w;
        words[1] = odd.x, words[3] = odd.y, words[5] = odd.z, words[7] = odd.w;
      }
    }
  }

  VOX_DEVICE void multiply(const Raw& raw, const float (&x)[kB][8]) {
#pragma unroll
    for (int b = 0; b < kB; ++b) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = bf16x2_bits(x[b][2 * i], x[b][2 * i + 1]);
#pragma unroll
      for (int a = 0; a < kA; ++a) {
        const uint32_t (&w)[8] = raw.words[a];
        multiply_bf16(sums[a][b], {w[0], w[1], w[2], w[3]}, words[0], words[1]);
        multiply_bf16(sums[a][b], {w[4], w[5], w[6], w[7]}, words[2], words[3]);
      }
    }
  }

  // Stores the sums to [kM, pitch].
  VOX_DEVICE void put(float* to, int pitch, int lane) {
#pragma unroll
    for (int a = 0; a < kA; ++a)
#pragma unroll
      for (int b = 0; b < kB; ++b)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          to[(8 * b + lane % 4 * 2 + i % 2) * pitch + kWeightBlockRows * a + lane / 4 * 2 + i / 2] =
              sums[a][b][i];
  }
};

// 16 rows of W and kM of x.
template <bool kBlocked, bool kAligned, int kM, int kChunksInFlight>
struct F32Tile : TileShape<kAligned, kWeightBlockRows, kM, 4, kM, kChunksInFlight> {
  // Blocks: [column][row], else [row][column].
  struct Raw {
    float values[4][4];
  };
  float sums[kM][4] = {};

  static VOX_DEVICE int column(int lane) { return lane / 4 * 4; }
  static VOX_DEVICE int row(int, int i) { return i; }

  static VOX_DEVICE void read_weight(const GemmParams& p, int n, int k, int lane, Raw& raw) {
    const int first = n + lane % 4 * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (!kAligned) {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          raw.values[i][j] = kBlocked ? weight_at<float, true>(p, first + j, k + i)
                                      : weight_at<float, false>(p, first + i, k + j);
      } else {
        const int64_t block = first / kWeightBlockRows, row = first + i;
        const float* from = static_cast<const float*>(p.weight) + row * p.K + k;
        if constexpr (kBlocked)
          from = static_cast<const float*>(p.weight) + (block * p.K + k + i) * kWeightBlockRows +
                 first % kWeightBlockRows;
        const bool there = (kBlocked ? first : row) < p.N && k < p.K;
        unpack<float>(there ? load_stream(from) : uint4{0, 0, 0, 0}, raw.values[i]);
      }
    }
  }

  VOX_DEVICE void multiply(const Raw& raw, const float (&x)[kM][4]) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int r = 0; r < 4; ++r)
          sums[m][r] = fmaf(x[m][i], kBlocked ? raw.values[i][r] : raw.values[r][i], sums[m][r]);
  }

  VOX_DEVICE void put(float* to, int pitch, int lane) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        float sum = sums[m][r];
#pragma unroll
        for (int offset = kWarp / 2; offset >= 4; offset /= 2)
          sum += __shfl_xor_sync(kWholeWarp, sum, offset);
        if (lane < 4) to[m * pitch + lane * 4 + r] = sum;
      }
  }
};

}  // namespace
}  // namespace voxkern::codec
