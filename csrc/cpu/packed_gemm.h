// out = x W^T on one thread for a packed W (weight.h) and quantized rows of x. Included by ISA
// passes alone.
//
// The dot product of a group of 32 columns is an exact integer. Groups are added in ascending order
// to one float32 chain per output, each as a rounded product (no fused multiply-add), so every
// instruction set, tile and split of the work gives the same bits:
//
//   int4  chain += dot * (scale of W's group * scale of x's group)
//   int8  chain += dot * scale of x's group;  out = chain * scale of W's row
#pragma once

#include "../weight.h"
#include "quantize.h"
#include "vec.h"

namespace voxkern {
namespace {

// Four columns of each of kWidth rows of W.
typedef int8_t vbytes __attribute__((vector_size(4 * kWidth)));
typedef uint16_t vpairs __attribute__((vector_size(4 * kWidth)));
typedef int16_t vshort __attribute__((vector_size(4 * kWidth)));

constexpr int kParts = kBlockRows / kWidth;  // of a block's rows

VOX_INLINE vbytes load_columns(const char* p) {
  vbytes r;
  __builtin_memcpy(&r, p, sizeof r);
  return r;
}
// The same four columns of x for all rows of W.
VOX_INLINE vbytes splat_columns(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, sizeof four);
  return reinterpret_cast<vbytes>(splat_int(four));
}

// Sums over the neighbouring 16-bit lanes.
VOX_INLINE vint add_pairs(vshort a) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i ones = _mm256_set1_epi16(1);
  return reinterpret_cast<vint>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), ones));
#else
  const vint pairs = reinterpret_cast<vint>(a);
  return (reinterpret_cast<vint>(reinterpret_cast<vuint>(pairs) << 16) >> 16) + (pairs >> 16);
#endif
}

// Products of neighbouring bytes in 16-bit sums, which hold them: |a| <= 128, |b| <= 127.
VOX_INLINE vshort multiply_pairs(vbytes a, vbytes b) {
  const auto even = [](vbytes v) {
    return reinterpret_cast<vshort>(reinterpret_cast<vpairs>(v) << 8) >> 8;
  };
  const auto odd = [](vbytes v) { return reinterpret_cast<vshort>(v) >> 8; };
  return even(a) * even(b) + odd(a) * odd(b);
}

// How a group's dot products come about: begin, for each four columns add, end.
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
// W's values are 0 .. 15, 8 too large.
struct NibbleDot : UnsignedDot {
  static VOX_INLINE Sum begin(int32_t minus_sum) { return splat_int(minus_sum) << 3; }
};
// W's values are -128 .. 127; the instruction takes them 128 larger.
struct ByteDot : UnsignedDot {
  static VOX_INLINE Sum begin(int32_t minus_sum) { return splat_int(minus_sum) << 7; }
  static VOX_INLINE vbytes prepare(vbytes w) { return w ^ static_cast<int8_t>(-128); }
};
#else
// A group's 16 products of a 16-bit lane stay below 16 * 15 * 127 < 2^15.
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
  static VOX_INLINE vint end(Sum sum, int32_t minus_sum) {
    return add_pairs(sum) + (splat_int(minus_sum) << 3);
  }
};
struct ByteDot {
  using Sum = vint;
  static VOX_INLINE Sum begin(int32_t) { return Sum{}; }
  static VOX_INLINE vbytes prepare(vbytes w) { return w; }
  static VOX_INLINE Sum add(Sum sum, vbytes w, vbytes x) {
#if defined(__AVX2__)
    // |w| times x with w's sign.
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

// One group of kWidth rows of W, from `w` on, times the same group of M rows of x, C values apart.
template <Format format>
struct Group;

template <>
struct Group<Format::int4> {
  using Dot = NibbleDot;
  template <int M>
  static VOX_INLINE void add(const char* w, const int8_t* x, int64_t C, Dot::Sum* sums) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const vpairs both = reinterpret_cast<vpairs>(load_columns(w + 64 * i));
      const vbytes low = reinterpret_cast<vbytes>(both & 0x0f0f);
      const vbytes high = reinterpret_cast<vbytes>((both >> 4) & 0x0f0f);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        sums[m] = Dot::add(sums[m], low, splat_columns(x + m * C + 8 * i));
        sums[m] = Dot::add(sums[m], high, splat_columns(x + m * C + 8 * i + 4));
      }
    }
  }
  static VOX_INLINE vfloat scale(const char* group, int part, float x_scale) {
    return load_float16(group + 256 + 2 * part * kWidth) * splat(x_scale);
  }
};

template <>
struct Group<Format::int8> {
  using Dot = ByteDot;
  template <int M>
  static VOX_INLINE void add(const char* w, const int8_t* x, int64_t C, Dot::Sum* sums) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const vbytes four = Dot::prepare(load_columns(w + 64 * i));
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
        sums[m] = Dot::add(sums[m], four, splat_columns(x + m * C + 4 * i));
    }
  }
  static VOX_INLINE vfloat scale(const char*, int, float x_scale) { return splat(x_scale); }
};

// W passes by once for so many rows of x: as many as its registers hold chains and sums for.
constexpr int kPackedTileM = kWidth == 16 ? 8 : 4;
// How far ahead of its use W is fetched into the level-2 cache (bench/LOG.md).
constexpr int64_t kFetchBytes = 16 << 10;

// out[m][16] for M rows of x, the first at `values`, and one block of W.
template <Format format, int M, bool fetch>
void multiply_block(const int8_t* values, const float* scales, const int32_t* minus_sums,
                    const char* block, int64_t C, float* out) {
  using G = Group<format>;
  constexpr int64_t kBytes = group_bytes(format);
  const int64_t groups = C / kGroup;
  vfloat chains[kParts][M] = {};
  const char* w = block;
  for (int64_t g = 0; g < groups; ++g, w += kBytes) {
    if constexpr (fetch) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < kBytes; i += 64) __builtin_prefetch(w + kFetchBytes + i, 0, 2);
    }
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
      typename G::Dot::Sum sums[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) sums[m] = G::Dot::begin(minus_sums[m * groups + g]);
      G::template add<M>(w + 4 * part * kWidth, values + g * kGroup, C, sums);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const vint dot = G::Dot::end(sums[m], minus_sums[m * groups + g]);
        chains[part][m] += unfused(__builtin_convertvector(dot, vfloat) *
                                   G::scale(w, part, scales[m * groups + g]));
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int part = 0; part < kParts; ++part) {
      vfloat sum = chains[part][m];
      // Here w points to the scales of the rows.
      if (format == Format::int8) sum *= load(reinterpret_cast<const float*>(w) + part * kWidth);
      store(out + m * kBlockRows + part * kWidth, sum);
    }
}

using MultiplyBlock = void (*)(const int8_t*, const float*, const int32_t*, const char*, int64_t,
                               float*);

template <Format format, bool fetch>
inline MultiplyBlock choose_block(int64_t M) {
  switch (M) {
    case 1: return multiply_block<format, 1, fetch>;
    case 2: return multiply_block<format, 2, fetch>;
    case 3: return multiply_block<format, 3, fetch>;
    case 4: return multiply_block<format, 4, fetch>;
#if defined(__AVX512F__)
    case 5: return multiply_block<format, 5, fetch>;
    case 6: return multiply_block<format, 6, fetch>;
    case 7: return multiply_block<format, 7, fetch>;
    case 8: return multiply_block<format, 8, fetch>;
#endif
  }
  return nullptr;
}

template <Format format, typename T>
void multiply_blocks(const QuantizedRows& x, const char* weight, T* out, int64_t M, int64_t C,
                     int64_t N, int64_t begin, int64_t end) {
  // Tiles of one height, so that none is too low to be worth unpacking W.
  const int64_t turns = (M + kPackedTileM - 1) / kPackedTileM, height = (M + turns - 1) / turns;
  for (int64_t n = begin; n < end; n += kBlockRows) {
    const char* const block = weight + n / kBlockRows * block_bytes(format, C);
    for (int64_t m = 0; m < M; m += height) {
      const int64_t rows = M - m < height ? M - m : height, groups = m * (C / kGroup);
      float sums[kPackedTileM * kBlockRows];
      // The first turn fetches for all.
      const auto tile =
          m == 0 ? choose_block<format, true>(rows) : choose_block<format, false>(rows);
      tile(x.values + m * C, x.scales + groups, x.minus_sums + groups, block, C, sums);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < kBlockRows && n + j < end; j += kWidth) {
          const vfloat sum = load(sums + i * kBlockRows + j);
          T* const to = out + (m + i) * N + n + j;
          end - n - j < kWidth ? store_n(to, sum, end - n - j) : store(to, sum);
        }
    }
  }
}

// Columns begin .. end of out [M, N] = x [M, C] times the transpose of the packed weight [N, C];
// begin a multiple of 16, end one or N.
template <typename T>
void multiply(const QuantizedRows& x, Format format, const void* weight, T* out, int64_t M,
              int64_t C, int64_t N, int64_t begin, int64_t end) {
  const auto* w = static_cast<const char*>(weight);
  if (M == 0) return;
  if (format == Format::int4)
    multiply_blocks<Format::int4>(x, w, out, M, C, N, begin, end);
  else
    multiply_blocks<Format::int8>(x, w, out, M, C, N, begin, end);
}

}  // namespace
}  // namespace voxkern
