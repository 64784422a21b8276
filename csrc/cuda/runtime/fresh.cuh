// What a kernel in front may have written, as elements: past the first-level cache, as
// load_fresh() takes vectors.
#pragma once

#include "cuda/runtime/common.cuh"

namespace voxkern {
namespace {

// As it stands in memory: made a float right away, it would be waited for right away.
__device__ __forceinline__ float element_fresh(const float* p) { return __ldcg(p); }
__device__ __forceinline__ bf16 element_fresh(const bf16* p) { return {__ldcg(&p->bits)}; }

template <typename T>
__device__ __forceinline__ float read_fresh(const T* p) {
  return to_float(element_fresh(p));
}

// N elements in a row, as load() takes them.
template <int N, typename T>
__device__ __forceinline__ void read_fresh(const T* p, float (&out)[N]) {
  static_assert(N == 1 || N == kVector<T>);
  if constexpr (N == 1)
    out[0] = read_fresh(p);
  else
    unpack<T>(load_fresh(p), out);
}

}  // namespace
}  // namespace voxkern
