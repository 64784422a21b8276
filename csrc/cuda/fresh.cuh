// What a kernel in front may have written, as elements: past the first-level cache, as
// load_fresh() takes vectors.
#pragma once

#include "common.cuh"

namespace voxkern {
namespace {

__device__ __forceinline__ float read_fresh(const float* p) { return __ldcg(p); }
__device__ __forceinline__ float read_fresh(const bf16* p) {
  return to_float(bf16{__ldcg(&p->bits)});
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
