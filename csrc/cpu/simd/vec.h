// The SIMD layer of the CPU kernels: vectors as wide as the registers of the pass's ISA, written
// with GCC's vector extensions, and with intrinsics where those generate poor code. Only ISA passes
// include it; everything has internal linkage (see isa.h).
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "common/check.h"

namespace voxkern {
namespace {

using bf16 = uint16_t;  // the bits of a bfloat16

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float vfloat __attribute__((vector_size(4 * kWidth)));
typedef int32_t vint __attribute__((vector_size(4 * kWidth)));
typedef uint32_t vuint __attribute__((vector_size(4 * kWidth)));
typedef uint16_t vhalf __attribute__((vector_size(2 * kWidth)));
typedef int8_t vquarter __attribute__((vector_size(kWidth)));

#define VOX_INLINE inline __attribute__((always_inline))

// Zeros in registers. GCC turns `= {}` of several vectors into `rep stos` on memory, which takes
// longer than a short inner product.
template <size_t n>
VOX_INLINE void clear(vfloat (&a)[n]) {
#pragma GCC unroll 64
  for (size_t i = 0; i < n; ++i) a[i] = vfloat{};
}
template <size_t m, size_t n>
VOX_INLINE void clear(vfloat (&a)[m][n]) {
#pragma GCC unroll 64
  for (size_t i = 0; i < m; ++i) clear(a[i]);
}

VOX_INLINE vfloat splat(float a) { return a - vfloat{}; }
VOX_INLINE vint splat_int(int32_t a) { return a - vint{}; }

VOX_INLINE vfloat as_float(vuint a) {
  vfloat r;
  __builtin_memcpy(&r, &a, sizeof r);
  return r;
}
VOX_INLINE vuint as_uint(vfloat a) {
  vuint r;
  __builtin_memcpy(&r, &a, sizeof r);
  return r;
}

VOX_INLINE float to_float(float a) { return a; }
VOX_INLINE float to_float(bf16 a) {
  const uint32_t bits = static_cast<uint32_t>(a) << 16;
  float r;
  __builtin_memcpy(&r, &bits, sizeof r);
  return r;
}

// Rounds to nearest, ties to even; NaN stays NaN.
VOX_INLINE bf16 to_bf16(float a) {
  uint32_t bits;
  __builtin_memcpy(&bits, &a, sizeof bits);
  if (a != a) return static_cast<bf16>((bits >> 16) | 0x40);
  return static_cast<bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

VOX_INLINE vfloat load(const float* p) {
  vfloat r;
  __builtin_memcpy(&r, p, sizeof r);
  return r;
}
VOX_INLINE vfloat load(const bf16* p) {
  vhalf h;
  __builtin_memcpy(&h, p, sizeof h);
#if defined(__AVX512F__)
  // GCC 12's __builtin_convertvector converts in two halves, and its header for the unmasked
  // intrinsic triggers a warning.
  const __m512i wide = _mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(h));
  return as_float(reinterpret_cast<vuint>(wide) << 16);
#else
  return as_float(__builtin_convertvector(h, vuint) << 16);
#endif
}

VOX_INLINE void store(float* p, vfloat a) { __builtin_memcpy(p, &a, sizeof a); }
VOX_INLINE void store(bf16* p, vfloat a) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(a));
  __builtin_memcpy(p, &h, sizeof h);
#else
  const vuint bits = as_uint(a);
  const vuint rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vuint quiet = (bits >> 16) | 0x40;
  const vint nan = a != a;
  const vuint mask = reinterpret_cast<vuint>(nan);
  const vhalf h = __builtin_convertvector((rounded & ~mask) | (quiet & mask), vhalf);
  __builtin_memcpy(p, &h, sizeof h);
#endif
}

VOX_INLINE vint load_bytes(const int8_t* p) {
  vquarter bytes;
  __builtin_memcpy(&bytes, p, sizeof bytes);
#if defined(__AVX512F__)
  __m128i lanes;
  __builtin_memcpy(&lanes, &bytes, sizeof lanes);
  return reinterpret_cast<vint>(_mm512_maskz_cvtepi8_epi32(0xffff, lanes));
#elif defined(__AVX2__)
  __m128i lanes{};
  __builtin_memcpy(&lanes, &bytes, sizeof bytes);
  return reinterpret_cast<vint>(_mm256_cvtepi8_epi32(lanes));
#else
  return __builtin_convertvector(bytes, vint);
#endif
}
// Stores lanes of -128 .. 127 as bytes.
VOX_INLINE void store_bytes(int8_t* p, vint a) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm512_maskz_cvtepi32_epi8(0xffff, reinterpret_cast<__m512i>(a));
#elif defined(__AVX2__)
  const __m256i lanes = reinterpret_cast<__m256i>(a);
  const __m128i halves =
      _mm_packs_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
  const __m128i bytes = _mm_packs_epi16(halves, halves);
#else
  const vquarter bytes = __builtin_convertvector(a, vquarter);
#endif
  __builtin_memcpy(p, &bytes, kWidth);
}

// Loads the first n < kWidth elements; the other lanes are zero, and their memory is not read.
template <typename T>
VOX_INLINE vfloat load_n(const T* p, int64_t n) {
  T buffer[kWidth] = {};
  __builtin_memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <typename T>
VOX_INLINE void store_n(T* p, vfloat a, int64_t n) {
  T buffer[kWidth];
  store(buffer, a);
  __builtin_memcpy(p, buffer, n * sizeof(T));
}

VOX_INLINE float round_to(const float*, float a) { return a; }
VOX_INLINE float round_to(const bf16*, float a) { return to_float(to_bf16(a)); }
VOX_INLINE void store_one(float* p, float a) { *p = a; }
VOX_INLINE void store_one(bf16* p, float a) { *p = to_bf16(a); }

// a * b + c, fused if the ISA has FMA (-ffp-contract).
VOX_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) { return a * b + c; }

// Keeps the compiler from fusing `product` with a following sum, so that every ISA rounds alike.
VOX_INLINE vfloat unfused(vfloat product) {
#if defined(__AVX512F__)
  asm("" : "+v"(product));
#elif defined(__x86_64__)
  asm("" : "+x"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#else
  asm("" : "+m"(product));
#endif
  return product;
}

VOX_INLINE vfloat select(vint condition, vfloat yes, vfloat no) {
  const vuint mask = reinterpret_cast<vuint>(condition);
  return as_float((as_uint(yes) & mask) | (as_uint(no) & ~mask));
}
VOX_INLINE vfloat max(vfloat a, vfloat b) { return select(a > b, a, b); }
VOX_INLINE bool any(vint condition) {
#if defined(__AVX512F__)
  const __m512i lanes = reinterpret_cast<__m512i>(condition);
  return _mm512_test_epi32_mask(lanes, lanes) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8(reinterpret_cast<__m256i>(condition)) != 0;
#else
  int32_t found = 0;
  for (int i = 0; i < kWidth; ++i) found |= condition[i];
  return found != 0;
#endif
}

// Adds lanes i and i + half for half = kWidth / 2, .., 1. This order is part of every op's result.
VOX_INLINE float reduce_add(vfloat a) {
  float lanes[kWidth];
  store(lanes, a);
  for (int half = kWidth / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}
VOX_INLINE float reduce_max(vfloat a) {
  float lanes[kWidth];
  store(lanes, a);
  for (int half = kWidth / 2; half; half /= 2)
    for (int i = 0; i < half; ++i)
      lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
}

template <int... i>
struct Lanes {
  // Adds lanes i and i + half of each block of 2 * half lanes: of a to lanes i, of b to i + half.
  template <int half>
  static VOX_INLINE vfloat add_halves(vfloat a, vfloat b) {
    return __builtin_shufflevector(a, b, (i & half ? i - half + kWidth : i)...) +
           __builtin_shufflevector(a, b, (i & half ? i + kWidth : i + half)...);
  }
  // Exchanges every lane with its partner `half` lanes away.
  template <int half>
  static VOX_INLINE vint swap(vint a) {
    return __builtin_shufflevector(a, a, (i ^ half)...);
  }
};
template <int n, int... i>
struct LanesUpTo : LanesUpTo<n - 1, n - 1, i...> {};
template <int... i>
struct LanesUpTo<0, i...> : Lanes<i...> {};

// Lane i of the result is reduce_add(chains[i]), in fewer instructions than kWidth separate calls.
template <int half = kWidth / 2>
VOX_INLINE vfloat reduce_each(const vfloat* chains) {
  vfloat next[half];
  for (int i = 0; i < half; ++i)
    next[i] = LanesUpTo<kWidth>::add_halves<half>(chains[i], chains[i + half]);
  if constexpr (half == 1) {
    return next[0];
  } else {
    return reduce_each<half / 2>(next);
  }
}

template <int half = kWidth / 2>
VOX_INLINE int32_t reduce_add(vint a) {
  a += LanesUpTo<kWidth>::swap<half>(a);
  if constexpr (half == 1) {
    return a[0];
  } else {
    return reduce_add<half / 2>(a);
  }
}
template <int half = kWidth / 2>
VOX_INLINE int32_t reduce_max(vint a) {
  const vint b = LanesUpTo<kWidth>::swap<half>(a);
  a = a > b ? a : b;
  if constexpr (half == 1) {
    return a[0];
  } else {
    return reduce_max<half / 2>(a);
  }
}

}  // namespace
}  // namespace voxkern
