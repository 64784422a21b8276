// prefill_attention on tensor cores: bfloat16, heads of 64 or 128.
//
// A row is one query of one head. The rows of a sequence and a key/value head are numbered token by
// token, and within a token by head of the group, so neighbours share keys and values. A block
// takes a tile of rows. Tiles are counted on the device, since the host does not know the lengths:
// the grid has room for the most there may be. Rows are independent of each other, and keys come in
// blocks from key 0 on, so neither batch, chunks nor pages change a result.
//
// A warp has 16 rows, and takes 64 or 32 keys at a time through the tensor cores, straight from the
// pages without shared memory: 16-byte loads are already laid out as the products need them, if
// columns are taken in another order, the same for both operands.
//
// Rounding: scores and their sums are float32, weights are rounded to bfloat16 for
// the product with the values (their sum is of the unrounded ones), the result once. So a decode
// step at the same position, which rounds no weight, has other bits. Floor: 4 D operations a row
// and key (docs/cuda.md); the products with weights cost ten times as much, so it is kept simple: K
// and V are read through the caches, once a warp.
#pragma once

#include "cuda/attention/online_softmax.cuh"
#include "params/prefill_attention.h"

namespace voxkern::attention {
namespace {

constexpr int kPrefillWarps = 4;
constexpr int kTensorRows = 16;  // rows of a warp in the tensor cores' kernel

// This block's sequence and its first row there.
struct PrefillTile {
  int64_t b, first_row, rows;  // rows of the sequence, for a key/value head
};

VOX_DEVICE bool find_tile(const PrefillAttentionParams& p, int tile_rows, PrefillTile& tile) {
  int64_t left = blockIdx.x;
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t rows = (p.cu_seqlens[b + 1] - p.cu_seqlens[b]) * (p.Hq / p.Hkv);
    const int64_t tiles = divide_up(rows, tile_rows);
    if (left < tiles) {
      tile = {b, left * tile_rows, rows};
      return true;
    }
    left -= tiles;
  }
  return false;
}

// A row's token in q and out, its head, and the last position it sees.
struct PrefillRow {
  int64_t token, head, position;
};

VOX_DEVICE PrefillRow find_row(const PrefillAttentionParams& p, const PrefillTile& tile,
                               int64_t row) {
  const int64_t group = p.Hq / p.Hkv, at = (row < tile.rows ? row : tile.rows - 1) / group;
  const int64_t begin = p.cu_seqlens[tile.b], length = p.seq_lens[tile.b];
  const int64_t prefix = length - (p.cu_seqlens[tile.b + 1] - begin);
  return {begin + at, blockIdx.y * group + row % group, prefix + at};
}

// Offset of a key of the sequence in the pages, in elements.
VOX_DEVICE int64_t find_key(const PrefillAttentionParams& p, int64_t b, int key) {
  const int S = static_cast<int>(p.S), page = p.page_table[b * p.M + key / S];
  return ((page * p.Hkv + blockIdx.y) * S + key % S) * p.D;
}

// One warp's 16 rows in the tensor cores. A lane has rows g and g + 8, as in multiply_bf16.
template <int D>
class TensorWorker {
  static constexpr int kKeyBlock = D == 64 ? 64 : 32;  // as registers allow
  static constexpr int kKeyTiles = kKeyBlock / 8;
  using Scores = float[kKeyTiles][4];

 public:
  VOX_DEVICE TensorWorker(const PrefillAttentionParams& p, const PrefillTile& tile, int64_t first)
      : p_(p), tile_(tile), first_(first), length_(static_cast<int>(p.seq_lens[tile.b])) {
#pragma unroll
    for (int r = 0; r < 2; ++r) rows_[r] = find_row(p, tile, first + g_ + 8 * r);
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int c = 0; c < D / 32; ++c)
        q_[r][c] = *reinterpret_cast<const uint4*>(static_cast<const bf16*>(p.q) +
                                                   rows_[r].token * p.q_stride + rows_[r].head * D +
                                                   c * 32 + t_ * 8);
  }

  VOX_DEVICE void run() {
    const int last = static_cast<int>(find_row(p_, tile_, first_ + kTensorRows - 1).position);
    for (int begin = 0; begin <= last; begin += kKeyBlock) {
      locate_keys(begin);
      Scores scores = {};
      score_keys(scores);
#pragma unroll
      for (int r = 0; r < 2; ++r) scores_to_weights(r, begin, scores);
      add_values(scores);
    }
    let_next_kernel_start();
    store_rows();
  }

 private:
  // A lane computes the places of keys `lane` (and `lane` + 32); negative past the end.
  VOX_DEVICE void locate_keys(int begin) {
#pragma unroll
    for (int i = 0; i < kKeyBlock / kWarp; ++i) {
      const int key = begin + lane_ + i * kWarp;
      places_[i] = key < length_ ? find_key(p_, tile_.b, key) : -1;
    }
  }
  // The place of a key of the block; `key / kWarp` is a constant.
  VOX_DEVICE int64_t place_of(int key) const {
    return __shfl_sync(kWholeWarp, places_[key / kWarp], key % kWarp);
  }

  VOX_DEVICE void score_keys(Scores& scores) const {
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j) {
      const int64_t place = place_of(j * 8 + g_);
#pragma unroll
      for (int c = 0; c < D / 32; ++c) {
        uint4 k = {};
        if (place >= 0)
          k = *reinterpret_cast<const uint4*>(static_cast<const bf16*>(p_.k_pages) + place +
                                              c * 32 + t_ * 8);
        multiply_bf16(scores[j], {q_[0][c].x, q_[1][c].x, q_[0][c].y, q_[1][c].y}, k.x, k.y);
        multiply_bf16(scores[j], {q_[0][c].z, q_[1][c].z, q_[0][c].w, q_[1][c].w}, k.z, k.w);
      }
    }
  }

  // Row r's part of `scores`, in place; rescales what the row has summed so far.
  VOX_DEVICE void scores_to_weights(int r, int begin, Scores& scores) {
    float largest = states_[r].largest;
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& score = scores[j][2 * r + i];
        score =
            begin + j * 8 + 2 * t_ + i <= rows_[r].position ? score * p_.scale : minus_infinity();
        largest = fmaxf(largest, score);
      }
    largest = fmaxf(largest, __shfl_xor_sync(kWholeWarp, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kWholeWarp, largest, 2));
    const float factor = states_[r].raise(largest);
    states_[r].sum *= factor;
#pragma unroll
    for (int e = 0; e < D / 64; ++e)
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) acc_[e][j][2 * r + i] *= factor;
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        scores[j][2 * r + i] = expf(scores[j][2 * r + i] - largest);
        states_[r].sum += scores[j][2 * r + i];  // this lane's keys; the four lanes add at the end
      }
  }

  // 16 keys at a time: the scores' layout is that of the left operand.
  VOX_DEVICE void add_values(const Scores& scores) {
#pragma unroll
    for (int j = 0; j < kKeyTiles; j += 2) {
      const uint32_t weights[4] = {bf16x2_bits(scores[j][0], scores[j][1]),
                                   bf16x2_bits(scores[j][2], scores[j][3]),
                                   bf16x2_bits(scores[j + 1][0], scores[j + 1][1]),
                                   bf16x2_bits(scores[j + 1][2], scores[j + 1][3])};
      int64_t places[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) places[i] = place_of(j * 8 + i / 2 * 8 + 2 * t_ + i % 2);
#pragma unroll
      for (int e = 0; e < D / 64; ++e) {
        uint32_t v[4][4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (places[i] < 0) continue;  // memory past the end may hold NaN
          const uint4 words = *reinterpret_cast<const uint4*>(static_cast<const bf16*>(p_.v_pages) +
                                                              places[i] + e * 64 + g_ * 8);
          v[i][0] = words.x, v[i][1] = words.y, v[i][2] = words.z, v[i][3] = words.w;
        }
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const auto low = [](uint32_t a, uint32_t b) { return (a & 0xffff) | b << 16; };
          const auto high = [](uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000u); };
          multiply_bf16(acc_[e][2 * w], weights, low(v[0][w], v[1][w]), low(v[2][w], v[3][w]));
          multiply_bf16(acc_[e][2 * w + 1], weights, high(v[0][w], v[1][w]),
                        high(v[2][w], v[3][w]));
        }
      }
    }
  }

  VOX_DEVICE void store_rows() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = states_[r].sum;
      sum += __shfl_xor_sync(kWholeWarp, sum, 1);
      sum += __shfl_xor_sync(kWholeWarp, sum, 2);
      if (first_ + g_ + 8 * r >= tile_.rows) continue;
      bf16* const out = static_cast<bf16*>(p_.out) + (rows_[r].token * p_.Hq + rows_[r].head) * D;
#pragma unroll
      for (int e = 0; e < D / 64; ++e)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          // Column n of product j is column 8 n + j of the 64; a lane has n = 2 t and 2 t + 1.
          float values[8];
#pragma unroll
          for (int j = 0; j < 8; ++j) values[j] = acc_[e][j][2 * r + i] / sum;
          store<8>(out + e * 64 + (2 * t_ + i) * 8, values);
        }
    }
  }

  const PrefillAttentionParams& p_;
  const PrefillTile& tile_;
  const int64_t first_;  // row of the warp
  const int length_, lane_ = threadIdx.x % kWarp, g_ = lane_ / 4, t_ = lane_ % 4;
  PrefillRow rows_[2];
  uint4 q_[2][D / 32];
  int64_t places_[kKeyBlock / kWarp];
  float acc_[D / 64][8][4] = {};  // columns 16 t .. 16 t + 15 of each 64, of both rows
  SoftmaxState states_[2] = {SoftmaxState::empty(), SoftmaxState::empty()};
};

template <int D>
__global__ void __launch_bounds__(kPrefillWarps* kWarp, 2)
    prefill_tensor_kernel(PrefillAttentionParams p) {
  wait_for_previous_kernel();
  PrefillTile tile;
  if (!find_tile(p, kPrefillWarps * kTensorRows, tile)) return;
  const int64_t first = tile.first_row + threadIdx.x / kWarp * kTensorRows;
  if (first >= tile.rows) return;  // the whole warp
  TensorWorker<D>(p, tile, first).run();
}

}  // namespace
}  // namespace voxkern::attention
