// Elements and 16-byte vectors of them: float32 or bfloat16 in memory, float32 in registers. Then
// what ops and the fused kernels that reproduce their results bit for bit share: arithmetic, and
// reductions, whose order of sums depends on the number of threads alone.
#pragma once

#include "common/check.h"
#include "cuda/runtime/launch.cuh"

namespace voxkern {

struct bf16 {
  uint16_t bits;
};

VOX_DEVICE float to_float(float a) { return a; }
VOX_DEVICE float to_float(bf16 a) { return __uint_as_float(static_cast<uint32_t>(a.bits) << 16); }
template <typename T>
VOX_DEVICE T from_float(float a) {
  if constexpr (sizeof(T) == 4)
    return a;
  else
    return {static_cast<uint16_t>(bf16_bits(a))};
}
// The value after a store and a load.
template <typename T>
VOX_DEVICE float rounded(float a) {
  return to_float(from_float<T>(a));
}

// Elements in 16 bytes.
template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

template <typename T>
VOX_DEVICE void unpack(uint4 a, float (&out)[kVector<T>]) {
  const uint32_t words[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      out[i] = __uint_as_float(words[i]);
    } else {
      out[2 * i] = __uint_as_float(words[i] << 16);
      out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
}
template <typename T>
VOX_DEVICE uint4 pack(const float (&a)[kVector<T>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4)
      words[i] = __float_as_uint(a[i]);
    else
      words[i] = bf16x2_bits(a[2 * i], a[2 * i + 1]);
  }
  return {words[0], words[1], words[2], words[3]};
}

// N consecutive elements in one access: a vector (16-byte aligned) or a single element.
template <int N, typename T>
VOX_DEVICE void load(const T* p, float (&out)[N]) {
  static_assert(N == 1 || N == kVector<T>);
  if constexpr (N == 1)
    out[0] = to_float(*p);
  else
    unpack<T>(*reinterpret_cast<const uint4*>(p), out);
}
template <int N, typename T>
VOX_DEVICE void store(T* p, const float (&a)[N]) {
  static_assert(N == 1 || N == kVector<T>);
  if constexpr (N == 1)
    *p = from_float<T>(a[0]);
  else
    *reinterpret_cast<uint4*>(p) = pack<T>(a);
}

// Loads that bypass L1, for data the previous kernel may have written; load_uncached(p) of ptx.cuh
// is the 16-byte version. load_element_uncached() returns the raw element: converting it here would
// make the thread wait for the load at once.
VOX_DEVICE float load_element_uncached(const float* p) { return __ldcg(p); }
VOX_DEVICE bf16 load_element_uncached(const bf16* p) { return {__ldcg(&p->bits)}; }
template <int N, typename T>
VOX_DEVICE void load_uncached(const T* p, float (&out)[N]) {
  static_assert(N == 1 || N == kVector<T>);
  if constexpr (N == 1)
    out[0] = to_float(load_element_uncached(p));
  else
    unpack<T>(load_uncached(p), out);
}

// True if rows of `columns` elements from p on can be accessed in vectors.
template <typename T>
bool is_vector_aligned(const void* p, int64_t columns) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && columns % kVector<T> == 0;
}

// Threads of a block for a long row: with the order of sums, part of rms_norm's result.
constexpr int kNormThreads = 256;

// The factor of rms_norm for a row of C elements, without the weight.
VOX_DEVICE float rms_scale(float sum_of_squares, int64_t C, float eps) {
  return 1.0f / sqrtf(sum_of_squares / static_cast<float>(C) + eps);
}

// silu(gate) * up, computed from exp(-|gate|), which cannot overflow.
VOX_DEVICE float swiglu(float gate, float up) {
  const float e = expf(-fabsf(gate));
  return up * (gate * (gate < 0 ? e : 1.0f) / (1.0f + e));
}

// Rotated elements i and i + D/2 of a head. The fused operations are written out, so that all
// compilers round alike.
VOX_DEVICE float rotated_low(float low, float high, float cos, float sin) {
  return fmaf(low, cos, -(high * sin));
}
VOX_DEVICE float rotated_high(float low, float high, float cos, float sin) {
  return fmaf(high, cos, low * sin);
}

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
