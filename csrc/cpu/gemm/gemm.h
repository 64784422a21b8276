// out = x W^T on one thread for a plain (unpacked) W. Only ISA passes include it.
//
// Every output is one chain: a vector accumulator runs over the row in steps of Dot<T>::kStep
// elements, the last step padded with zeros, and reduce_add sums its lanes. The order depends on C
// alone, not on the tile the output falls into; nothing here may change that.
#pragma once

#include "common/arena.h"
#include "cpu/simd/vec.h"

namespace voxkern {
namespace {

// One step of an inner product: how it reads its operands and adds to the chain.
template <typename T>
struct Dot {
  static constexpr int64_t kStep = kWidth;
  using Operand = vfloat;
  static VOX_INLINE Operand read(const T* p) { return load(p); }
  static VOX_INLINE Operand read_n(const T* p, int64_t n) { return load_n(p, n); }
  static VOX_INLINE vfloat add(Operand a, Operand b, vfloat sum) { return fma(a, b, sum); }
};

#if defined(__AVX512BF16__)
// Adds two adjacent products to each lane, rounding to float32 after each.
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

// A tile is up to kTileM rows of x and tile_rows(M) rows of W: one register for each chain, each
// row of W and one row of x. AVX-512 has 32 registers, the other ISAs 16. With few rows of x, W
// streams from memory; more rows of W per tile keep more loads in flight and amortise the cost of
// starting and finishing a tile.
constexpr int kTileM = kWidth == 16 ? 8 : 4;
constexpr int tile_rows(int M) {
  if (kWidth == 16) return M == 1 ? 16 : M < 4 ? 8 : M == 4 ? 4 : 3;
  return M == 1 ? 8 : M < 4 ? 4 : 3;
}

// An integer as a type, to pass it to a generic lambda.
template <int n>
struct Count {
  static constexpr int value = n;
};

// The prefetch distance of a tile's rows of W, in elements: at least 16 KB and whole tiles. The
// target is L2, because L1 would evict the lines before their use. Lines prefetched less far ahead
// arrive too late, and the hardware prefetcher stops at every page, that is at every row or two.
template <int kRows, typename T>
inline int64_t prefetch_distance(int64_t C) {
  const int64_t bytes = kRows * C * static_cast<int64_t>(sizeof(T));
  return ((16 << 10) + bytes - 1) / bytes * kRows * C;
}

// out[m * N + r] for M rows of x and the first `rows` <= kRows rows of W. If rows < kRows, the tile
// recomputes the last row and does not store it. Element i of row m of x, i a multiple of kStep, is
// at x + i * kNext + m * stride. Prefetches `distance` elements ahead for the first kPrefetch rows
// of W.
template <int M, int kRows, int kPrefetch, int kNext, typename T, typename O>
void gemm_tile(const T* x, int64_t stride, const T* weight, O* out, int64_t C, int64_t N,
               int64_t rows, int64_t distance) {
  using D = Dot<T>;
  constexpr int kChains = M * kRows, kGroups = (kChains + kWidth - 1) / kWidth;
  const T* w[kRows];
  for (int r = 0; r < kRows; ++r) w[r] = weight + (r < rows ? r : rows - 1) * C;

  vfloat chains[kGroups * kWidth];  // row m of x, row r of W at m * kRows + r
  clear(chains);
  const auto step = [&](int64_t i, auto read, auto read_x) {
    typename D::Operand values[kRows];
    for (int r = 0; r < kRows; ++r) {
      values[r] = read(w[r] + i);
      if (r < kPrefetch) __builtin_prefetch(w[r] + distance + i, 0, 2);
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

// Columns begin .. end of out [M, N] for M <= 4 rows of x: W streams from memory.
template <int M, typename T, typename O>
void gemv(const T* x, const T* weight, O* out, int64_t C, int64_t N, int64_t begin, int64_t end) {
  constexpr int kRows = tile_rows(M);
  const int64_t distance = prefetch_distance<kRows, T>(C);
  for (int64_t n = begin; n < end; n += kRows)
    gemm_tile<M, kRows, kRows, 1>(x, C, weight + n * C, out + n, C, N,
                                  end - n < kRows ? end - n : kRows, distance);
}

// gemm_tile for M <= kTileM rows of x that interleave_rows stored as one tile.
template <int kPrefetch, typename T, typename O>
void gemm_interleaved(int64_t M, const T* x, const T* weight, O* out, int64_t C, int64_t N,
                      int64_t rows, int64_t distance) {
  const auto tile = [&](auto m) {
    gemm_tile<m.value, tile_rows(kTileM), kPrefetch, m.value>(x, Dot<T>::kStep, weight, out, C, N,
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

// Copies M rows of x to one tile: kStep columns of every row, then the next kStep columns. Rows a
// multiple of 4 KB apart would map to the same L1 set, which holds 8 lines. Padding past the last
// column stays uninitialised.
template <typename T>
void interleave_rows(const T* x, int64_t M, int64_t C, T* to) {
  constexpr int64_t kStep = Dot<T>::kStep;
  for (int64_t m = 0; m < M; ++m) {
    int64_t i = 0;
    for (; i + kStep <= C; i += kStep)
      __builtin_memcpy(to + i * M + m * kStep, x + m * C + i, kStep * sizeof(T));
    __builtin_memcpy(to + i * M + m * kStep, x + m * C + i, (C - i) * sizeof(T));
  }
}

// Bytes of x that stay in L2 during one pass over W.
constexpr int64_t kPanelBytes = 512 << 10;

// Columns begin .. end of out [M, N] for more rows of x, with one pass over W per panel of rows.
template <typename T, typename O>
void gemm_tiled(const T* x, const T* weight, O* out, int64_t M, int64_t C, int64_t N, int64_t begin,
                int64_t end) {
  constexpr int64_t kRows = tile_rows(kTileM), kStep = Dot<T>::kStep;
  const int64_t distance = prefetch_distance<kRows, T>(C), width = (C + kStep - 1) / kStep * kStep;
  // Equal tiles: one with few rows has too few chains to keep the FMA units busy.
  const int64_t tiles = (M + kTileM - 1) / kTileM, height = (M + tiles - 1) / tiles;
  const int64_t row_bytes = width * static_cast<int64_t>(sizeof(T));
  const int64_t max_rows = kPanelBytes / (height * row_bytes) * height;
  const int64_t panel = (M < max_rows ? M : max_rows) * width;
  Arena count(nullptr);
  count.take<T>(panel);
  void* const block = __builtin_malloc(count.bytes());
  T* const interleaved = Arena(block).take<T>(panel);
  for (int64_t first = 0; first < M; first += max_rows) {
    const int64_t last = M - first < max_rows ? M : first + max_rows;
    for (int64_t m = first; m < last; m += height)
      interleave_rows(x + m * C, M - m < height ? M - m : height, C,
                      interleaved + (m - first) * width);
    const bool several = last - first >= kRows * height;
    for (int64_t n = begin; n < end; n += kRows) {
      const int64_t rows = end - n < kRows ? end - n : kRows;
      for (int64_t m = first; m < last; m += height) {
        // The first tiles prefetch for all: one row of W each, if there are enough tiles.
        const int64_t tile_index = (m - first) / height;
        const auto tile =
            several ? tile_index < kRows ? gemm_interleaved<1, T, O> : gemm_interleaved<0, T, O>
            : tile_index ? gemm_interleaved<0, T, O>
                         : gemm_interleaved<kRows, T, O>;
        tile(M - m < height ? M - m : height, interleaved + (m - first) * width, weight + n * C,
             out + m * N + n, C, N, rows, distance + (several ? tile_index * C : 0));
      }
    }
  }
  __builtin_free(block);
}

// Columns begin .. end of out [M, N] = x [M, C] W^T for weight [N, C]; C >= 1.
template <typename T, typename O>
void gemm(const T* x, const T* weight, O* out, int64_t M, int64_t C, int64_t N, int64_t begin,
          int64_t end) {
  // Rows too long to interleave in L2 go through gemv, 4 at a time.
  const int64_t max_rows = C * kTileM * static_cast<int64_t>(sizeof(T)) > kPanelBytes / 2 ? 4 : M;
  for (int64_t m = 0; m < M; m += max_rows) {
    const T* const rows = x + m * C;
    O* const to = out + m * N;
    switch (M - m < max_rows ? M - m : max_rows) {
      case 1: gemv<1>(rows, weight, to, C, N, begin, end); break;
      case 2: gemv<2>(rows, weight, to, C, N, begin, end); break;
      case 3: gemv<3>(rows, weight, to, C, N, begin, end); break;
      case 4: gemv<4>(rows, weight, to, C, N, begin, end); break;
      default: gemm_tiled(rows, weight, to, M, C, N, begin, end);
    }
  }
}

}  // namespace
}  // namespace voxkern
