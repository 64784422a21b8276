// out = x W^T on one thread for a W whose rows lie in blocks of 16 (voxkern/quantize.py),
// unrounded: 64 bytes hold a column of 16 rows in float32, or two columns in bfloat16. Included by
// ISA passes alone.
//
// A column of W is multiplied with one value of x for all rows at once, so no sums over lanes end
// an output: what gemm.h would spend most of its time on where rows of W are short. Every output is
// one chain over its columns in ascending order, whatever tile it falls into.
#pragma once

#include "common/weight.h"
#include "cpu/simd/vec.h"

namespace voxkern {
namespace {

// What 4 bytes of x are multiplied with, and how.
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

// A tile is up to kPanelM rows of x and up to kPanelN vectors of rows of W, a register each.
constexpr int kPanelM = 6;
constexpr int kPanelN = kWidth == 16 ? 4 : 2;

// Where the n-th vector of rows of W begins; its next columns follow every 64 bytes.
VOX_INLINE const char* vector_at(const char* weight, int64_t n, int64_t units) {
  const int64_t row = n * kWidth;
  return weight + row / kBlockRows * units * 64 + row % kBlockRows * 4;
}

// How far ahead of its use each vector of rows of W is fetched into the level-2 cache: what
// kPanelN of them read in 16 KB (bench/LOG.md).
constexpr int64_t kPanelFetchBytes = 4 << 10;

// sums[m][n] for M rows of x, K values apart, and N vectors of rows of W from the first-th on.
template <int M, int N, bool fetch, typename T>
VOX_INLINE void multiply_panel(const T* x, int64_t K, const char* weight, int64_t first,
                               vfloat (&sums)[M][N]) {
  using U = Unit<T>;
  const int64_t units = K / U::kColumns, bytes = units * 64;
  const int64_t next_panel = bytes * (N * kWidth / kBlockRows - 1);
  const char* w[N];
  for (int n = 0; n < N; ++n) w[n] = vector_at(weight, first + n, units);
  for (int64_t u = 0; u < units; ++u) {
    typename U::W columns[N];
    int64_t later = u * 64 + kPanelFetchBytes;
    if (later >= bytes) later += next_panel;
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      columns[n] = U::read(w[n] + u * 64);
      if (fetch) __builtin_prefetch(w[n] + later, 0, 2);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const typename U::X value = U::broadcast(x + m * K + u * U::kColumns);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[m][n] = U::add(columns[n], value, sums[m][n]);
    }
  }
}

// f(m, row of W, sums of kWidth rows from there) for M rows of x and N vectors of rows.
template <int M, int N, bool fetch, typename T, typename F>
void multiply_tile(const T* x, int64_t K, const char* weight, int64_t first, const F& f) {
  vfloat sums[M][N] = {};
  multiply_panel<M, N, fetch>(x, K, weight, first, sums);
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) f(m, (first + n) * kWidth, sums[m][n]);
}

// The same for up to kPanelM rows.
template <int N, bool fetch, typename T, typename F>
void multiply_rows_blocked(int64_t rows, const T* x, int64_t K, const char* weight, int64_t first,
                           const F& f) {
  switch (rows) {
    case 1: return multiply_tile<1, N, fetch>(x, K, weight, first, f);
    case 2: return multiply_tile<2, N, fetch>(x, K, weight, first, f);
    case 3: return multiply_tile<3, N, fetch>(x, K, weight, first, f);
    case 4: return multiply_tile<4, N, fetch>(x, K, weight, first, f);
    case 5: return multiply_tile<5, N, fetch>(x, K, weight, first, f);
    case 6: return multiply_tile<6, N, fetch>(x, K, weight, first, f);
  }
}

template <int N, typename T, typename F>
void multiply_tiles(const T* x, int64_t rows, int64_t K, const char* weight, int64_t first,
                    const F& f) {
  // Tiles of one height: a low one has too few chains to keep the multipliers busy.
  const int64_t turns = (rows + kPanelM - 1) / kPanelM, height = (rows + turns - 1) / turns;
  for (int64_t at = 0; at < rows; at += height) {
    const int64_t n = rows - at < height ? rows - at : height;
    const auto put = [&](int64_t m, int64_t row, vfloat sum) { f(at + m, row, sum); };
    // The first turn fetches for all.
    if (at == 0)
      multiply_rows_blocked<N, true>(n, x, K, weight, first, put);
    else
      multiply_rows_blocked<N, false>(n, x + at * K, K, weight, first, put);
  }
}

// f(m, n, sums of row m of x and the kWidth rows of W from n on), for rows of x, K values apart,
// and for rows begin .. end of W; begin a multiple of 16. The last sums may be of rows past `end`.
template <typename T, typename F>
void multiply_blocked(const T* x, int64_t rows, int64_t K, const void* weight, int64_t begin,
                      int64_t end, const F& f) {
  const auto* const w = static_cast<const char*>(weight);
  const int64_t last = (end + kWidth - 1) / kWidth;
  int64_t n = begin / kWidth;
  for (; n + kPanelN <= last; n += kPanelN) multiply_tiles<kPanelN>(x, rows, K, w, n, f);
  if (kPanelN > 2 && n + 2 <= last) {
    multiply_tiles<2>(x, rows, K, w, n, f);
    n += 2;
  }
  if (n < last) multiply_tiles<1>(x, rows, K, w, n, f);
}

}  // namespace
}  // namespace voxkern
