// Integer dot products over one group of columns of W and x. Only ISA passes include it.
#pragma once

#include "cpu/simd/vec.h"

namespace voxkern {
namespace {

// Four columns of kWidth rows of W.
typedef int8_t vbytes __attribute__((vector_size(4 * kWidth)));
typedef uint16_t vpairs __attribute__((vector_size(4 * kWidth)));
typedef int16_t vshort __attribute__((vector_size(4 * kWidth)));

VOX_INLINE vbytes load_columns(const char* p) {
  vbytes r;
  __builtin_memcpy(&r, p, sizeof r);
  return r;
}
// Broadcasts four columns of x to all rows of W.
VOX_INLINE vbytes splat_columns(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, sizeof four);
  return reinterpret_cast<vbytes>(splat_int(four));
}

// Adds adjacent 16-bit lanes.
VOX_INLINE vint add_pairs(vshort a) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i ones = _mm256_set1_epi16(1);
  return reinterpret_cast<vint>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), ones));
#else
  const vint pairs = reinterpret_cast<vint>(a);
  return (reinterpret_cast<vint>(reinterpret_cast<vuint>(pairs) << 16) >> 16) + (pairs >> 16);
#endif
}

// Sums the products of adjacent bytes into 16 bits, which cannot overflow: |a| <= 128, |b| <= 127.
VOX_INLINE vshort multiply_pairs(vbytes a, vbytes b) {
  const auto even = [](vbytes v) {
    return reinterpret_cast<vshort>(reinterpret_cast<vpairs>(v) << 8) >> 8;
  };
  const auto odd = [](vbytes v) { return reinterpret_cast<vshort>(v) >> 8; };
  return even(a) * even(b) + odd(a) * odd(b);
}

// The dot products of a group: begin() makes the sums, add() adds four columns, end() returns the
// integers.
#if defined(__AVX512VNNI__)
struct UnsignedDot {
  using Sum = vint;
  static VOX_INLINE Sum add(Sum sum, vbytes w, vbytes x) {
    return reinterpret_cast<vint>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum),
                                                      reinterpret_cast<__m512i>(w),
                                                      reinterpret_cast<__m512i>(x)));
  }
  static VOX_INLINE vint end(Sum sum, int32_t) { return sum; }
};
// W's values are stored plus 8, as 0 .. 15.
struct NibbleDot : UnsignedDot {
  static VOX_INLINE Sum begin(int32_t minus_8sum) { return splat_int(minus_8sum); }
};
// W's values are -128 .. 127; the instruction needs unsigned bytes, so prepare() adds 128.
struct ByteDot : UnsignedDot {
  static VOX_INLINE Sum begin(int32_t minus_8sum) { return splat_int(minus_8sum) << 4; }
  static VOX_INLINE vbytes prepare(vbytes w) { return w ^ static_cast<int8_t>(-128); }
};
#else
// A 16-bit lane sums 16 products of a group, at most 16 * 15 * 127 < 2^15.
struct NibbleDot {
  using Sum = vshort;
  static VOX_INLINE Sum begin(int32_t) { return Sum{}; }
  static VOX_INLINE Sum add(Sum sum, vbytes w, vbytes x) {
#if defined(__AVX2__)
    return sum + reinterpret_cast<vshort>(_mm256_maddubs_epi16(reinterpret_cast<__m256i>(w),
                                                               reinterpret_cast<__m256i>(x)));
#else
    return sum + multiply_pairs(w, x);
#endif
  }
  static VOX_INLINE vint end(Sum sum, int32_t minus_8sum) {
    return add_pairs(sum) + splat_int(minus_8sum);
  }
};
struct ByteDot {
  using Sum = vint;
  static VOX_INLINE Sum begin(int32_t) { return Sum{}; }
  static VOX_INLINE vbytes prepare(vbytes w) { return w; }
  static VOX_INLINE Sum add(Sum sum, vbytes w, vbytes x) {
#if defined(__AVX2__)
    // |w| * (x with the sign of w).
    const __m256i a = reinterpret_cast<__m256i>(w), b = reinterpret_cast<__m256i>(x);
    return sum + add_pairs(reinterpret_cast<vshort>(
                     _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(b, a))));
#else
    return sum + add_pairs(multiply_pairs(w, x));
#endif
  }
  static VOX_INLINE vint end(Sum sum, int32_t) { return sum; }
};
#endif

}  // namespace
}  // namespace voxkern
