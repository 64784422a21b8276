// out = x W^T on one thread for the codec's convolutions, unrounded. W is stored in blocks of 16
// rows (voxkern/quantize.py): 64 bytes hold one column of 16 rows in float32, or two columns in
// bfloat16. Only ISA passes include it.
//
// A vector of W is one column of kWidth rows and is multiplied with one broadcast value of x, so an
// output needs no sum over lanes, on which gemm.h would spend most of its time where rows of W are
// short. Every output is one chain over its columns in ascending order, whatever tile it falls
// into.
#pragma once

#include "common/weight.h"
#include "cpu/simd/vec.h"

namespace voxkern {
namespace {

// One step of a chain: 4 bytes of x (one float32, two bfloat16) times as many columns of W.
template <typename T>
struct Unit;

template <>
struct Unit<float> {
  static constexpr int64_t kColumns = 1;
  using X = vfloat;
  using W = vfloat;
  static VOX_INLINE X broadcast(const float* x) { return splat(*x); }
  static VOX_INLINE W read(const char* w) { return load(reinterpret_cast<const float*>(w)); }
  static VOX_INLINE vfloat add(W w, X x, vfloat sum) { return fma(w, x, sum); }
};

template <>
struct Unit<bf16> {
  static constexpr int64_t kColumns = 2;
  static VOX_INLINE vint broadcast_bits(const bf16* x) {
    int32_t two;
    __builtin_memcpy(&two, x, sizeof two);
    return splat_int(two);
  }
#if defined(__AVX512BF16__)
  using X = __m512bh;
  using W = __m512bh;
  static VOX_INLINE X broadcast(const bf16* x) { return reinterpret_cast<X>(broadcast_bits(x)); }
  static VOX_INLINE W read(const char* w) {
    W r;
    __builtin_memcpy(&r, w, sizeof r);
    return r;
  }
  static VOX_INLINE vfloat add(W w, X x, vfloat sum) {
    return reinterpret_cast<vfloat>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), w, x));
  }
#else
  struct Pair {
    vfloat first, second;
  };
  using X = Pair;
  using W = Pair;
  static VOX_INLINE Pair split_pair(vuint bits) {
    return {as_float(bits << 16), as_float(bits & 0xffff0000u)};
  }
  static VOX_INLINE X broadcast(const bf16* x) {
    return split_pair(reinterpret_cast<vuint>(broadcast_bits(x)));
  }
  static VOX_INLINE W read(const char* w) {
    vuint bits;
    __builtin_memcpy(&bits, w, sizeof bits);
    return split_pair(bits);
  }
  static VOX_INLINE vfloat add(W w, X x, vfloat sum) {
    return fma(w.second, x.second, fma(w.first, x.first, sum));
  }
#endif
};

// A tile is up to kCodecTileM rows of x and up to kCodecTileN vectors of W rows, one register each.
constexpr int kCodecTileM = 6;
constexpr int kCodecTileN = kWidth == 16 ? 4 : 2;

// The first column of the n-th vector of W rows; the next columns follow every 64 bytes.
VOX_INLINE const char* vector_at(const char* weight, int64_t n, int64_t units) {
  const int64_t row = n * kWidth;
  return weight + row / kBlockRows * units * 64 + row % kBlockRows * 4;
}

// The prefetch distance of each vector of W rows, to L2: its share of 16 KB when kCodecTileN
// vectors are read together (bench/LOG.md).
constexpr int64_t kCodecPrefetchBytes = 4 << 10;

// sums[m][n] for M rows of x, K values apart, and N vectors of W rows from the first-th on.
template <int M, int N, bool kPrefetch, typename T>
VOX_INLINE void add_products(const T* x, int64_t K, const char* weight, int64_t first,
                             vfloat (&sums)[M][N]) {
  using U = Unit<T>;
  const int64_t units = K / U::kColumns, bytes = units * 64;
  const int64_t next_vectors = bytes * (N * kWidth / kBlockRows - 1);
  const char* w[N];
  for (int n = 0; n < N; ++n) w[n] = vector_at(weight, first + n, units);
  for (int64_t u = 0; u < units; ++u) {
    typename U::W columns[N];
    int64_t later = u * 64 + kCodecPrefetchBytes;
    if (later >= bytes) later += next_vectors;
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      columns[n] = U::read(w[n] + u * 64);
      if (kPrefetch) __builtin_prefetch(w[n] + later, 0, 2);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const typename U::X value = U::broadcast(x + m * K + u * U::kColumns);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[m][n] = U::add(columns[n], value, sums[m][n]);
    }
  }
}

// Calls f(m, row, sums of W rows row .. row + kWidth) for M rows of x and N vectors of W rows.
template <int M, int N, bool kPrefetch, typename T, typename F>
void codec_gemm_tile(const T* x, int64_t K, const char* weight, int64_t first, const F& f) {
  vfloat sums[M][N];
  clear(sums);
  add_products<M, N, kPrefetch>(x, K, weight, first, sums);
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) f(m, (first + n) * kWidth, sums[m][n]);
}

// codec_gemm_tile for `rows` <= kCodecTileM rows of x.
template <int N, bool kPrefetch, typename T, typename F>
void codec_gemm_rows(int64_t rows, const T* x, int64_t K, const char* weight, int64_t first,
                     const F& f) {
  switch (rows) {
    case 1: return codec_gemm_tile<1, N, kPrefetch>(x, K, weight, first, f);
    case 2: return codec_gemm_tile<2, N, kPrefetch>(x, K, weight, first, f);
    case 3: return codec_gemm_tile<3, N, kPrefetch>(x, K, weight, first, f);
    case 4: return codec_gemm_tile<4, N, kPrefetch>(x, K, weight, first, f);
    case 5: return codec_gemm_tile<5, N, kPrefetch>(x, K, weight, first, f);
    case 6: return codec_gemm_tile<6, N, kPrefetch>(x, K, weight, first, f);
  }
}

// Any number of rows of x, and N vectors of W rows.
template <int N, typename T, typename F>
void codec_gemm_tiles(const T* x, int64_t rows, int64_t K, const char* weight, int64_t first,
                      const F& f) {
  // Equal tiles: one with few rows has too few chains to keep the FMA units busy.
  const int64_t tiles = (rows + kCodecTileM - 1) / kCodecTileM, height = (rows + tiles - 1) / tiles;
  for (int64_t at = 0; at < rows; at += height) {
    const int64_t n = rows - at < height ? rows - at : height;
    const auto put = [&](int64_t m, int64_t row, vfloat sum) { f(at + m, row, sum); };
    // The first tile prefetches for all.
    if (at == 0)
      codec_gemm_rows<N, true>(n, x, K, weight, first, put);
    else
      codec_gemm_rows<N, false>(n, x + at * K, K, weight, first, put);
  }
}

// Calls f(m, n, sums) with the products of row m of x and the kWidth rows of W from n on, for
// `rows` rows of x, K values apart, and rows begin .. end of W. `begin` is a multiple of 16. The
// last sums may include rows past `end`.
template <typename T, typename F>
void codec_gemm(const T* x, int64_t rows, int64_t K, const void* weight, int64_t begin, int64_t end,
                const F& f) {
  const auto* const w = static_cast<const char*>(weight);
  const int64_t last = (end + kWidth - 1) / kWidth;
  int64_t n = begin / kWidth;
  for (; n + kCodecTileN <= last; n += kCodecTileN)
    codec_gemm_tiles<kCodecTileN>(x, rows, K, w, n, f);
  if (kCodecTileN > 2 && n + 2 <= last) {
    codec_gemm_tiles<2>(x, rows, K, w, n, f);
    n += 2;
  }
  if (n < last) codec_gemm_tiles<1>(x, rows, K, w, n, f);
}

}  // namespace
}  // namespace voxkern
