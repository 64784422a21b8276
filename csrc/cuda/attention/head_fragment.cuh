// A row of one head in the registers of L lanes, for the split kernels.
#pragma once

#include "cuda/attention/online_softmax.cuh"

namespace voxkern::attention {

// A lane's part of a row of D elements: N consecutive ones from column N lane on, in one chunk or
// in kChunks that are L lanes apart.
template <typename T, int N, int L>
struct HeadFragment {
  static constexpr int kChunks = N == 1 ? kMaxHeadDim / L : 1;
  static constexpr int kFragmentSize = N * kChunks;
  static VOX_DEVICE int column(int lane, int i) { return (i / N * L + lane % L) * N + i % N; }
  using Raw = std::conditional_t<N == 1, T, uint4>;
  Raw raw[kChunks];

  // With kPartners, loads the columns that these are rotated with.
  template <bool kPartners = false>
  VOX_DEVICE void load(const T* row, int lane, int D) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int here = column(lane, c * N), half = D / 2;
      const int at = !kPartners ? here : here < half ? here + half : here - half;
      if constexpr (N == 1)
        raw[c] = here < D ? load_element_uncached(row + at) : from_float<T>(0.0f);
      else
        raw[c] = load_uncached(row + at);
    }
  }
  VOX_DEVICE void load_shared(const T* row, int lane, int D) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int at = column(lane, c * N);
      if constexpr (N == 1)
        raw[c] = at < D ? row[at] : from_float<T>(0.0f);
      else
        raw[c] = *reinterpret_cast<const uint4*>(row + at);
    }
  }
  VOX_DEVICE void to_floats(float (&out)[kFragmentSize]) const {
    if constexpr (N == 1) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) out[c] = to_float(raw[c]);
    } else {
      unpack<T>(raw[0], out);
    }
  }
};

}  // namespace voxkern::attention
