// The Prologues of the codec's GEMM, which produce its rows of x: the rows of a matrix, normalised
// or not, and the windows of a convolution.
#pragma once

#include "cuda/codec/tiles.cuh"

namespace voxkern::codec {
namespace {

// Rows of x [M, K], plain or normalised.
template <bool kNormed>
struct Rows {
  const float* x;
  int K;
  const float *scale, *bias;  // [K], the norm's
  float eps;

  struct Row {
    const float* row;
    float mean, factor;
  };
  template <int V>
  struct Columns {
    int k;
    float scale[kNormed ? V : 1], bias[kNormed ? V : 1];
  };

  bool aligned(int vector) const {
    bool aligned = K % vector == 0 && is_vector_aligned<float>(x, K);
    if (kNormed)
      aligned = aligned && is_vector_aligned<float>(scale, K) && is_vector_aligned<float>(bias, K);
    return aligned;
  }

  // Computes mean and factor of rows m .. m + kM - 1 with the warps of a tile, 8 lanes a row.
  template <int kM, bool kAligned>
  VOX_DEVICE void prepare(int m, int M, int split, int splits, float (&stats)[kM][2]) const {
    if constexpr (kNormed) {
      constexpr int kStatsLanes = 8, kRowsPerWarp = kWarp / kStatsLanes, V = 4;
      const int lane = threadIdx.x % kWarp;
      for (int first = split * kRowsPerWarp; first < kM && m + first < M;
           first += splits * kRowsPerWarp) {
        const int r = first + lane / kStatsLanes;
        const bool there = r < kM && m + r < M;
        const float* const row = x + static_cast<int64_t>(there ? m + r : m) * K;
        const auto mean_of = [&](auto value) {
          float sum = 0;
#pragma unroll 4
          for (int k = lane % kStatsLanes * V; k < K; k += kStatsLanes * V) {
            float values[V];
            read_columns<V, kAligned>(row, k, K, values);
#pragma unroll
            for (int i = 0; i < V; ++i)
              if (kAligned || k + i < K) sum += value(values[i]);
          }
#pragma unroll
          for (int offset = kStatsLanes / 2; offset; offset /= 2)
            sum += __shfl_xor_sync(kWholeWarp, sum, offset);
          return sum / static_cast<float>(K);
        };
        const float mean = mean_of([](float v) { return v; });
        const float variance = mean_of([&](float v) { return (v - mean) * (v - mean); });
        if (there && lane % kStatsLanes == 0) {
          stats[r][0] = mean;
          stats[r][1] = 1.0f / sqrtf(variance + eps);
        }
      }
      __syncthreads();
    }
  }

  VOX_DEVICE Row row(int m, const float* stats) const {
    Row found = {x + static_cast<int64_t>(m) * K, 0, 0};
    if constexpr (kNormed) found.mean = stats[0], found.factor = stats[1];
    return found;
  }

  template <int V, bool kAligned>
  VOX_DEVICE Columns<V> columns(int k) const {
    Columns<V> found = {};
    found.k = k;
    if constexpr (kNormed) {
      read_columns<V, kAligned>(scale, k, K, found.scale);
      read_columns<V, kAligned>(bias, k, K, found.bias);
    }
    return found;
  }

  template <int V, bool kAligned>
  VOX_DEVICE void read(const Row& row, const Columns<V>& columns, float (&out)[V]) const {
    read_columns<V, kAligned>(row.row, columns.k, K, out);
  }

  template <int V>
  VOX_DEVICE void finish(const Row& row, const Columns<V>& columns, float (&values)[V]) const {
    if constexpr (kNormed)
#pragma unroll
      for (int i = 0; i < V; ++i)
        values[i] = fmaf((values[i] - row.mean) * row.factor, columns.scale[i], columns.bias[i]);
  }
};

// Windows of a convolution: blocks of samples, read from x and the past where they are, and the
// ELU.
struct Windows {
  const float* x;        // [B, T, C]
  const float* past;     // [B, context, C]
  const bool* is_first;  // [B] or null
  int T, C, K, dilation, context, width;
  bool elu;

  // An output's block 0 would be at in_x in x and at in_past in the past; the first past_blocks
  // blocks are in the past, or repeat the stream's first sample.
  struct Row {
    int64_t in_x, in_past;
    int past_blocks;
    bool repeats;
  };
  // The blocks before these columns and the column in their block; elementwise the column of the
  // window.
  template <int V>
  struct Columns {
    int blocks, column;
  };

  bool aligned(int vector) const {
    return C % vector == 0 && (width % vector == 0 || !is_first) &&
           is_vector_aligned<float>(x, C) && is_vector_aligned<float>(past, C);
  }

  template <int kM, bool kAligned>
  VOX_DEVICE void prepare(int, int, int, int, float (&)[kM][2]) const {}

  VOX_DEVICE Row row(int m, const float*) const {
    const int64_t b = m / T;
    const int t = m % T;
    Row found;
    found.in_x = (m - static_cast<int64_t>(context)) * C;
    found.past_blocks = context - t;
    found.repeats = found.past_blocks > 0 && is_first && is_first[b];
    found.in_past = found.repeats ? b * T * C : (b * context + t) * C;
    return found;
  }

  template <int V, bool kAligned>
  VOX_DEVICE Columns<V> columns(int k) const {
    if constexpr (!kAligned) return {0, k};
    const int tap = k / C;  // may be past the last
    return {tap * dilation, k - tap * C};
  }

  VOX_DEVICE const float* place(const Row& row, int blocks, int column) const {
    if (blocks >= row.past_blocks) return x + row.in_x + static_cast<int64_t>(blocks) * C + column;
    if (row.repeats) return x + row.in_past + column % width;
    return past + row.in_past + static_cast<int64_t>(blocks) * C + column;
  }

  template <int V, bool kAligned>
  VOX_DEVICE void read(const Row& row, const Columns<V>& columns, float (&out)[V]) const {
    if constexpr (kAligned) {
      const bool inside = columns.blocks <= context;  // lanes of the last taps may have no columns
      const float* const from = inside ? place(row, columns.blocks, columns.column) : nullptr;
      read_columns<V, true>(from, 0, inside ? V : 0, out);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int k = columns.column + i, tap = k / C;
        out[i] = k < K ? *place(row, tap * dilation, k - tap * C) : 0.0f;
      }
    }
  }

  template <int V>
  VOX_DEVICE void finish(const Row&, const Columns<V>&, float (&values)[V]) const {
    if (!elu) return;
#pragma unroll
    for (int i = 0; i < V; ++i) values[i] = values[i] > 0.0f ? values[i] : expf(values[i]) - 1.0f;
  }
};

}  // namespace
}  // namespace voxkern::codec
