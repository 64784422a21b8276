// A Source of gemm.cuh: the rows of a matrix.
#pragma once

#include "cuda/codec/gemm.cuh"

namespace voxkern::codec {
namespace {

// Rows of x as they lie, [M, K], or normalised.
template <bool kNormed>
struct Rows {
  const float* x;
  int K;
  const float *scale, *bias;  // [K], of the norm
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
    bool fits = K % vector == 0 && is_vector_aligned<float>(x, K);
    if (kNormed)
      fits = fits && is_vector_aligned<float>(scale, K) && is_vector_aligned<float>(bias, K);
    return fits;
  }

  // Mean and factor of rows m .. m + kM - 1, by the warps of a tile: 8 lanes a row.
  template <int kM, bool kAligned>
  __device__ __forceinline__ void prepare(int m, int M, int split, int splits,
                                          float (&stats)[kM][2]) const {
    if constexpr (kNormed) {
      constexpr int kLanes = 8, kAtOnce = kWarp / kLanes, V = 4;
      const int lane = threadIdx.x % kWarp;
      for (int first = split * kAtOnce; first < kM && m + first < M; first += splits * kAtOnce) {
        const int r = first + lane / kLanes;
        const bool there = r < kM && m + r < M;
        const float* const row = x + static_cast<int64_t>(there ? m + r : m) * K;
        const auto mean_of = [&](auto value) {
          float sum = 0;
#pragma unroll 4
          for (int k = lane % kLanes * V; k < K; k += kLanes * V) {
            float values[V];
            read_columns<V, kAligned>(row, k, K, values);
#pragma unroll
            for (int i = 0; i < V; ++i)
              if (kAligned || k + i < K) sum += value(values[i]);
          }
#pragma unroll
          for (int offset = kLanes / 2; offset; offset /= 2)
            sum += __shfl_xor_sync(kWholeWarp, sum, offset);
          return sum / static_cast<float>(K);
        };
        const float mean = mean_of([](float v) { return v; });
        const float variance = mean_of([&](float v) { return (v - mean) * (v - mean); });
        if (there && lane % kLanes == 0) {
          stats[r][0] = mean;
          stats[r][1] = 1.0f / sqrtf(variance + eps);
        }
      }
      __syncthreads();
    }
  }

  __device__ __forceinline__ Row row(int m, const float* stats) const {
    Row found = {x + static_cast<int64_t>(m) * K, 0, 0};
    if constexpr (kNormed) found.mean = stats[0], found.factor = stats[1];
    return found;
  }

  template <int V, bool kAligned>
  __device__ __forceinline__ Columns<V> columns(int k) const {
    Columns<V> found = {};
    found.k = k;
    if constexpr (kNormed) {
      read_columns<V, kAligned>(scale, k, K, found.scale);
      read_columns<V, kAligned>(bias, k, K, found.bias);
    }
    return found;
  }

  template <int V, bool kAligned>
  __device__ __forceinline__ void read(const Row& row, const Columns<V>& columns,
                                       float (&out)[V]) const {
    read_columns<V, kAligned>(row.row, columns.k, K, out);
  }

  template <int V>
  __device__ __forceinline__ void finish(const Row& row, const Columns<V>& columns,
                                         float (&values)[V]) const {
    if constexpr (kNormed)
#pragma unroll
      for (int i = 0; i < V; ++i)
        values[i] = fmaf((values[i] - row.mean) * row.factor, columns.scale[i], columns.bias[i]);
  }
};

}  // namespace
}  // namespace voxkern::codec
