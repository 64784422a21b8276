// out = x W^T on one thread: the product inside project(). Included by ISA passes alone.
//
// Every output is one chain: a vector accumulator runs over the row in steps of Dot<T>::kStep
// elements, the last step padded with zeros, and its lanes are summed at halving distance. The
// order depends on C alone, whatever tile the output falls into; nothing here may change that.
#pragma once

#include "common/arena.h"
#include "cpu/simd/vec.h"

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

// A tile is up to kTileM rows of x and some rows of W: a register for each chain, for each row of W
// and for one of x. AVX-512 has 32 registers, the others 16. With few rows of x, W comes from
// memory: many of its rows at once keep more reads under way, and share what a tile costs to begin
// and end.
constexpr int kTileM = kWidth == 16 ? 8 : 4;
constexpr int tile_rows(int M) {
  if (kWidth == 16) return M == 1 ? 16 : M < 4 ? 8 : M == 4 ? 4 : 3;
  return M == 1 ? 8 : M < 4 ? 4 : 3;
}

template <int n>
struct Count {
  static constexpr int value = n;
};

// Elements from a tile's rows of W to those that are used 16 KB later, or a tile later: they are
// fetched meanwhile, into the level-2 cache (the level-1 cache would lose them again). Nearer ones
// arrive late, and the processor's own prefetch stops at every page, so at every row or two.
template <int kRows, typename T>
inline int64_t fetch_distance(int64_t C) {
  const int64_t bytes = kRows * C * static_cast<int64_t>(sizeof(T));
  return ((16 << 10) + bytes - 1) / bytes * kRows * C;
}

// out[m * N + r] for M rows of x and the first `rows` <= kRows rows of W; past those, the last row
// is computed again, and not stored. Element i of row m of x is at x + i * kNext + m * stride if i
// is a multiple of kStep. Of the first kFetch rows, what is `distance` away is fetched.
template <int M, int kRows, int kFetch, int kNext, typename T, typename O>
void multiply_tile(const T* x, int64_t stride, const T* weight, O* out, int64_t C, int64_t N,
                   int64_t rows, int64_t distance) {
  using D = Dot<T>;
  constexpr int kChains = M * kRows, kGroups = (kChains + kWidth - 1) / kWidth;
  const T* w[kRows];
  for (int r = 0; r < kRows; ++r) w[r] = weight + (r < rows ? r : rows - 1) * C;

  vfloat chains[kGroups * kWidth] = {};  // of row m of x and row r of W at m * kRows + r
  const auto step = [&](int64_t i, auto read, auto read_x) {
    typename D::Operand values[kRows];
    for (int r = 0; r < kRows; ++r) {
      values[r] = read(w[r] + i);
      if (r < kFetch) __builtin_prefetch(w[r] + distance + i, 0, 2);
    }
    for (int m = 0; m < M; ++m) {
      const auto operand = read_x(x + i * kNext + m * stride);
      for (int r = 0; r < kRows; ++r) {
        vfloat& chain = chains[m * kRows + r];
        chain = D::add(values[r], operand, chain);
      }
    }
  };
  const auto read = [](const T* p) { return D::read(p); };
  int64_t i = 0;
  for (; i + D::kStep <= C; i += D::kStep) step(i, read, read);
  if (i < C) {
    const auto read_rest = [&](const T* p) { return D::read_n(p, C - i); };
    step(i, read_rest, read_rest);
  }

  O sums[kGroups * kWidth];
  for (int g = 0; g < kGroups; ++g) store(sums + g * kWidth, reduce_each(chains + g * kWidth));
  for (int m = 0; m < M; ++m)
    for (int64_t r = 0; r < rows; ++r) out[m * N + r] = sums[m * kRows + r];
}

// Columns begin .. end of out [M, N] for a few rows of x, so with W straight from memory.
template <int M, typename T, typename O>
void multiply_few(const T* x, const T* weight, O* out, int64_t C, int64_t N, int64_t begin,
                  int64_t end) {
  constexpr int kRows = tile_rows(M);
  const int64_t distance = fetch_distance<kRows, T>(C);
  for (int64_t n = begin; n < end; n += kRows)
    multiply_tile<M, kRows, kRows, 1>(x, C, weight + n * C, out + n, C, N,
                                      end - n < kRows ? end - n : kRows, distance);
}

// multiply_tile for M <= kTileM rows of x that pack_rows made a tile of.
template <int kFetch, typename T, typename O>
void multiply_packed(int64_t M, const T* x, const T* weight, O* out, int64_t C, int64_t N,
                     int64_t rows, int64_t distance) {
  const auto tile = [&](auto m) {
    multiply_tile<m.value, tile_rows(kTileM), kFetch, m.value>(x, Dot<T>::kStep, weight, out, C, N,
                                                               rows, distance);
  };
  switch (M) {
    case 1: return tile(Count<1>{});
    case 2: return tile(Count<2>{});
    case 3: return tile(Count<3>{});
    case 4: return tile(Count<4>{});
#if defined(__AVX512F__)
    case 5: return tile(Count<5>{});
    case 6: return tile(Count<6>{});
    case 7: return tile(Count<7>{});
    case 8: return tile(Count<8>{});
#endif
  }
}

// A tile of x, of M rows: of each kStep columns, those of all rows. Rows a multiple of 4 KB apart
// would fall on the same places of the level-1 cache, and it holds 8. What follows the last columns
// is whatever it was.
template <typename T>
void pack_rows(const T* x, int64_t M, int64_t C, T* to) {
  constexpr int64_t kStep = Dot<T>::kStep;
  for (int64_t m = 0; m < M; ++m) {
    int64_t i = 0;
    for (; i + kStep <= C; i += kStep)
      __builtin_memcpy(to + i * M + m * kStep, x + m * C + i, kStep * sizeof(T));
    __builtin_memcpy(to + i * M + m * kStep, x + m * C + i, (C - i) * sizeof(T));
  }
}

// So many bytes of x stay in the level-2 cache while W passes.
constexpr int64_t kPanelBytes = 512 << 10;

// Columns begin .. end of out [M, N] for more rows of x. W passes once for each panel of them.
template <typename T, typename O>
void multiply_many(const T* x, const T* weight, O* out, int64_t M, int64_t C, int64_t N,
                   int64_t begin, int64_t end) {
  constexpr int64_t kRows = tile_rows(kTileM), kStep = Dot<T>::kStep;
  const int64_t distance = fetch_distance<kRows, T>(C), width = (C + kStep - 1) / kStep * kStep;
  // Tiles of one height: a low one has too few chains to keep the multipliers busy.
  const int64_t tiles = (M + kTileM - 1) / kTileM, height = (M + tiles - 1) / tiles;
  const int64_t row_bytes = width * static_cast<int64_t>(sizeof(T));
  const int64_t most = kPanelBytes / (height * row_bytes) * height;
  const int64_t panel = (M < most ? M : most) * width;
  Arena count(nullptr);
  count.take<T>(panel);
  void* const block = __builtin_malloc(count.bytes());
  T* const packed = Arena(block).take<T>(panel);
  for (int64_t first = 0; first < M; first += most) {
    const int64_t last = M - first < most ? M : first + most;
    for (int64_t m = first; m < last; m += height)
      pack_rows(x + m * C, M - m < height ? M - m : height, C, packed + (m - first) * width);
    const bool several = last - first >= kRows * height;
    for (int64_t n = begin; n < end; n += kRows) {
      const int64_t rows = end - n < kRows ? end - n : kRows;
      for (int64_t m = first; m < last; m += height) {
        // The first tiles fetch for all: a row of W each, if there are enough of them.
        const int64_t turn = (m - first) / height;
        const auto tile = several
                              ? turn < kRows ? multiply_packed<1, T, O> : multiply_packed<0, T, O>
                          : turn ? multiply_packed<0, T, O>
                                 : multiply_packed<kRows, T, O>;
        tile(M - m < height ? M - m : height, packed + (m - first) * width, weight + n * C,
             out + m * N + n, C, N, rows, distance + (several ? turn * C : 0));
      }
    }
  }
  __builtin_free(block);
}

// Columns begin .. end of out [M, N] = x [M, C] times the transpose of weight [N, C]; C >= 1.
template <typename T, typename O>
void multiply(const T* x, const T* weight, O* out, int64_t M, int64_t C, int64_t N, int64_t begin,
              int64_t end) {
  // Rows too long to be packed.
  const int64_t most = C * kTileM * static_cast<int64_t>(sizeof(T)) > kPanelBytes / 2 ? 4 : M;
  for (int64_t m = 0; m < M; m += most) {
    const T* const rows = x + m * C;
    O* const to = out + m * N;
    switch (M - m < most ? M - m : most) {
      case 1: multiply_few<1>(rows, weight, to, C, N, begin, end); break;
      case 2: multiply_few<2>(rows, weight, to, C, N, begin, end); break;
      case 3: multiply_few<3>(rows, weight, to, C, N, begin, end); break;
      case 4: multiply_few<4>(rows, weight, to, C, N, begin, end); break;
      default: multiply_many(rows, weight, to, M, C, N, begin, end);
    }
  }
}

}  // namespace
}  // namespace voxkern
