// out = x W^T on one thread: the product inside linear and decode_depth. Included by ISA passes
// alone.
//
// Every output is one chain: a vector accumulator runs over the row in steps of Dot<T>::kStep
// elements, the last step padded with zeros, and its lanes are summed at halving distance. The
// order depends on C alone, whatever tile the output falls into; nothing here may change that.
#pragma once

#include "vec.h"

namespace voxkern {
namespace {

// What a step of an inner product reads, and how it adds to the chain.
template <typename T>
struct Dot {
  static constexpr int64_t kStep = kWidth;
  using Operand = vfloat;
  static VOX_INLINE Operand read(const T* p) { return load(p); }
  static VOX_INLINE Operand read_n(const T* p, int64_t n) { return load_n(p, n); }
  static VOX_INLINE vfloat add(Operand a, Operand b, vfloat sum) { return fma(a, b, sum); }
};

#if defined(__AVX512BF16__)
// Two neighbouring products go to one lane, rounded to float32 after each.
template <>
struct Dot<bf16> {
  static constexpr int64_t kStep = 2 * kWidth;
  using Operand = __m512bh;
  static VOX_INLINE Operand read(const bf16* p) {
    Operand a;
    __builtin_memcpy(&a, p, sizeof a);
    return a;
  }
  static VOX_INLINE Operand read_n(const bf16* p, int64_t n) {
    bf16 buffer[kStep] = {};
    __builtin_memcpy(buffer, p, n * sizeof(bf16));
    return read(buffer);
  }
  static VOX_INLINE vfloat add(Operand a, Operand b, vfloat sum) {
    return reinterpret_cast<vfloat>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), a, b));
  }
};
#endif

// Rows of W in a tile, and the most rows of x: one register per chain, and as many operands of W.
// AVX-512 has 32 registers, the others 16.
constexpr int kTileN = kWidth == 16 ? 4 : 3;
constexpr int kTileM = kWidth == 16 ? 6 : 4;

template <int... i>
struct Lanes {
  // One level of the lanes' sum: blocks of 2 * half lanes, a's then b's, become blocks of half.
  template <int half>
  static VOX_INLINE vfloat add_halves(vfloat a, vfloat b) {
    return __builtin_shufflevector(a, b, (i / half * 2 * half + i % half)...) +
           __builtin_shufflevector(a, b, (i / half * 2 * half + i % half + half)...);
  }
};
template <int n, int... i>
struct LanesUpTo : LanesUpTo<n - 1, n - 1, i...> {};
template <int... i>
struct LanesUpTo<0, i...> : Lanes<i...> {};

// Lane i of the result is reduce_add(chains[i]), for fewer instructions than that many calls.
template <int half = kWidth / 2>
VOX_INLINE vfloat reduce_each(const vfloat* chains) {
  vfloat next[half];
  for (int i = 0; i < half; ++i)
    next[i] = LanesUpTo<kWidth>::add_halves<half>(chains[2 * i], chains[2 * i + 1]);
  if constexpr (half == 1) {
    return next[0];
  } else {
    return reduce_each<half / 2>(next);
  }
}

// How far ahead of its use to fetch a row of W, in elements: the same place of the next tile that
// is at least 16 KB away. Nearer ones arrive late, and the processor's own prefetch stops at every
// page, so at every row or two.
template <typename T>
inline int64_t fetch_distance(int64_t C) {
  const int64_t tile_bytes = kTileN * C * static_cast<int64_t>(sizeof(T)) + 1;
  return ((16 << 10) + tile_bytes - 1) / tile_bytes * kTileN * C;
}

// Rows of x that are worked on at once: half of a megabyte, so that they stay in the level-2 cache
// while W passes.
template <typename T>
inline int64_t block_rows(int64_t C) {
  const int64_t rows = (512 << 10) / (C * static_cast<int64_t>(sizeof(T)) + 1) / kTileM * kTileM;
  return rows < kTileM ? kTileM : rows;
}

// The first `rows` <= kTileN rows of W times M rows of x, to out[m * N + r]. Past `rows`, the last
// one is computed again, and not stored. kFetch: W comes from memory, so fetch what is used
// later into the level-2 cache (the level-1 cache would lose it again).
template <int M, bool kFetch, typename T>
VOX_INLINE void multiply_tile(const T* x, const T* weight, T* out, int64_t C, int64_t N,
                              int64_t rows) {
  using D = Dot<T>;
  constexpr int kGroups = (M * kTileN + kWidth - 1) / kWidth;
  const int64_t ahead = fetch_distance<T>(C);
  const T* w[kTileN];
  for (int r = 0; r < kTileN; ++r) w[r] = weight + (r < rows ? r : rows - 1) * C;

  vfloat chains[kGroups * kWidth] = {};  // of row m of x and row r of W at m * kTileN + r
  const auto step = [&](int64_t i, auto read) {
    typename D::Operand operands[kTileN];
    for (int r = 0; r < kTileN; ++r) {
      operands[r] = read(w[r] + i);
      if constexpr (kFetch) __builtin_prefetch(w[r] + i + ahead, 0, 2);
    }
    for (int m = 0; m < M; ++m) {
      const auto value = read(x + m * C + i);
      for (int r = 0; r < kTileN; ++r) {
        vfloat& chain = chains[m * kTileN + r];
        chain = D::add(operands[r], value, chain);
      }
    }
  };
  int64_t i = 0;
  for (; i + D::kStep <= C; i += D::kStep) step(i, [](const T* p) { return D::read(p); });
  if (i < C) step(i, [&](const T* p) { return D::read_n(p, C - i); });

  T sums[kGroups * kWidth];
  for (int g = 0; g < kGroups; ++g) store(sums + g * kWidth, reduce_each(chains + g * kWidth));
  for (int m = 0; m < M; ++m)
    for (int64_t r = 0; r < rows; ++r) out[m * N + r] = sums[m * kTileN + r];
}

// The same for up to kTileM rows of x.
template <bool kFetch, typename T>
void multiply_rows(const T* x, const T* weight, T* out, int64_t M, int64_t C, int64_t N,
                   int64_t rows) {
  switch (M) {
    case 1: return multiply_tile<1, kFetch>(x, weight, out, C, N, rows);
    case 2: return multiply_tile<2, kFetch>(x, weight, out, C, N, rows);
    case 3: return multiply_tile<3, kFetch>(x, weight, out, C, N, rows);
    case 4: return multiply_tile<4, kFetch>(x, weight, out, C, N, rows);
    // Never reached where a tile is smaller.
    case 5: return multiply_tile < kTileM<5 ? 1 : 5, kFetch>(x, weight, out, C, N, rows);
    case 6: return multiply_tile < kTileM<6 ? 1 : 6, kFetch>(x, weight, out, C, N, rows);
  }
}

// Columns begin .. end of out [M, N] = x [M, C] times the transpose of weight [N, C].
template <typename T>
void multiply(const T* x, const T* weight, T* out, int64_t M, int64_t C, int64_t N, int64_t begin,
              int64_t end) {
  const int64_t block = block_rows<T>(C);
  for (int64_t first = 0; first < M; first += block) {
    const int64_t last = M - first < block ? M : first + block;
    for (int64_t n = begin; n < end; n += kTileN) {
      const int64_t wide = end - n < kTileN ? end - n : kTileN;
      const T* const w = weight + n * C;
      // The first tile brings these rows of W near, the others find them there.
      int64_t m = first + kTileM < last ? first + kTileM : last;
      multiply_rows<true>(x + first * C, w, out + first * N + n, m - first, C, N, wide);
      for (; m < last; m += kTileM)
        multiply_rows<false>(x + m * C, w, out + m * N + n, last - m < kTileM ? last - m : kTileM,
                             C, N, wide);
    }
  }
}

}  // namespace
}  // namespace voxkern
