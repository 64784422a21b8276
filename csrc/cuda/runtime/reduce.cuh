// Reductions over a warp or a block. The order of a sum depends on the number of threads alone.
#pragma once

#include "cuda/runtime/launch.cuh"

namespace voxkern {

// Reduces `value` over the warp; every lane gets the result.
template <typename T, typename F>
VOX_DEVICE T warp_reduce(T value, const F& combine) {
#pragma unroll
  for (int offset = kWarp / 2; offset; offset /= 2)
    value = combine(value, __shfl_xor_sync(kWholeWarp, value, offset));
  return value;
}

struct Add {
  template <typename T>
  VOX_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  template <typename T>
  VOX_DEVICE T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

// Reduces `value` over the block, with one barrier. `partials` may be reused only after another
// barrier: consecutive calls alternate between two arrays.
template <typename T, typename F>
VOX_DEVICE T block_reduce(T value, T (&partials)[kMaxWarps], const F& combine) {
  value = warp_reduce(value, combine);
  const int warps = (blockDim.x + kWarp - 1) / kWarp;
  if (warps == 1) return value;
  if (threadIdx.x % kWarp == 0) partials[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = partials[0];
  for (int i = 1; i < warps; ++i) value = combine(value, partials[i]);
  return value;
}

}  // namespace voxkern
