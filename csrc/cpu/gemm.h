// out = x W^T on one thread: the product inside project(). Included by ISA passes alone.
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

// A tile is up to kTileM rows of x and some rows of W, one register per chain, with one operand
// per row of x and one of W beside them. AVX-512 has 32 registers, the others 16. With few rows of
// x, W comes from memory: many of its rows at once keep more reads under way, and share what a
// tile costs to begin and end. More rows of x than kTileM would cost fewer loads, but rows whose
// length is a multiple of 4 KB fall on the same places of a level-1 cache, and it holds 8.
constexpr int kTileM = 4;
constexpr int tile_rows(int M) {
  if (kWidth == 16) return M == 1 ? 16 : M < 4 ? 8 : 4;
  return M == 1 ? 8 : M < 4 ? 4 : 3;
}

template <int n>
struct Count {
  static constexpr int value = n;
};

// How the product is cut up. Nothing in it changes a result.
struct Blocks {
  int64_t rows;   // of x, worked on while W passes once
  int64_t depth;  // elements of a row, worked on by all those rows before the next ones
  int64_t tiles;  // of W, that share a pass over those rows at one depth
};

constexpr int64_t kDepthBytes = 8 << 10;
constexpr int64_t kSharedTiles = 4;
constexpr int64_t kCacheBytes = 512 << 10;

// Up to one tile of x, W passes once, whole rows at a time. Past that, a part of W is used again,
// so it should be in the level-1 cache then: 8 KB of each row. The rows of x stay in the level-2
// cache, in half a megabyte of it, while W passes; where it only holds them at one depth, several
// tiles of W share what was brought in.
template <typename T>
inline Blocks choose_blocks(int64_t M, int64_t C) {
  if (M <= kTileM) return {.rows = kTileM, .depth = C, .tiles = 1};
  constexpr int64_t bytes = sizeof(T), depth = kDepthBytes / bytes;
  if (C > depth) return {.rows = kCacheBytes / kDepthBytes, .depth = depth, .tiles = kSharedTiles};
  return {.rows = kCacheBytes / (C * bytes) / kTileM * kTileM, .depth = C, .tiles = 1};
}

// Elements from a tile's part of W to what is to be fetched meanwhile: the part that is used
// 16 KB later. Nearer ones arrive late, and the processor's own prefetch stops at every page, so
// at every row or two.
template <int kRows, typename T>
inline int64_t fetch_distance(const Blocks& blocks, int64_t C, int64_t tile, int64_t begin) {
  const int64_t part_bytes = kRows * blocks.depth * static_cast<int64_t>(sizeof(T));
  const int64_t later = tile + ((16 << 10) + part_bytes - 1) / part_bytes;
  const int64_t parts = (C + blocks.depth - 1) / blocks.depth;
  const int64_t part = begin / blocks.depth + later / blocks.tiles;
  const int64_t tiles = part / parts * blocks.tiles + later % blocks.tiles - tile;
  return tiles * kRows * C + part % parts * blocks.depth - begin;
}

// Adds elements begin .. end, of C, to the chains of M rows of x and the first `rows` <= kRows
// rows of W. The chains are zero before the first and go to out[m * N + r] after the last; between
// they lie in `waiting`. Past `rows`, the last row is computed again, and not stored. Meanwhile
// the same elements of the first kFetch rows of `ahead` are fetched into the level-2 cache (the
// level-1 cache would lose them again).
template <int M, int kRows, int kFetch, typename T>
VOX_INLINE void multiply_tile(const T* x, const T* weight, T* out, int64_t C, int64_t N,
                              int64_t rows, int64_t begin, int64_t end, const T* ahead,
                              vfloat* waiting) {
  using D = Dot<T>;
  constexpr int kChains = M * kRows, kGroups = (kChains + kWidth - 1) / kWidth;
  const T* w[kRows];
  for (int r = 0; r < kRows; ++r) w[r] = weight + (r < rows ? r : rows - 1) * C;

  vfloat chains[kGroups * kWidth] = {};  // of row m of x and row r of W at m * kRows + r
  if (begin > 0)
    for (int i = 0; i < kChains; ++i) chains[i] = waiting[i];
  const auto step = [&](int64_t i, auto read) {
    typename D::Operand values[M];
    for (int m = 0; m < M; ++m) values[m] = read(x + m * C + i);
    for (int r = 0; r < kRows; ++r) {
      const auto operand = read(w[r] + i);
      if (r < kFetch) __builtin_prefetch(ahead + r * C + i, 0, 2);
      for (int m = 0; m < M; ++m) {
        vfloat& chain = chains[m * kRows + r];
        chain = D::add(operand, values[m], chain);
      }
    }
  };
  int64_t i = begin;
  for (; i + D::kStep <= end; i += D::kStep) step(i, [](const T* p) { return D::read(p); });
  if (end < C) {
    for (int j = 0; j < kChains; ++j) waiting[j] = chains[j];
    return;
  }
  if (i < C) step(i, [&](const T* p) { return D::read_n(p, C - i); });

  T sums[kGroups * kWidth];
  for (int g = 0; g < kGroups; ++g) store(sums + g * kWidth, reduce_each(chains + g * kWidth));
  for (int m = 0; m < M; ++m)
    for (int64_t r = 0; r < rows; ++r) out[m * N + r] = sums[m * kRows + r];
}

// The same for M <= kTileM rows of x.
template <int kRows, int kFetch, typename T>
void multiply_rows(int64_t M, const T* x, const T* weight, T* out, int64_t C, int64_t N,
                   int64_t rows, int64_t begin, int64_t end, const T* ahead, vfloat* waiting) {
  const auto tile = [&](auto m) {
    multiply_tile<m.value, kRows, kFetch>(x, weight, out, C, N, rows, begin, end, ahead, waiting);
  };
  switch (M) {
    case 1: return tile(Count<1>{});
    case 2: return tile(Count<2>{});
    case 3: return tile(Count<3>{});
    case 4: return tile(Count<4>{});
  }
}

// Columns begin .. end of out [M, N] for one tile of x, so with W straight from memory.
template <int M, typename T>
void multiply_few(const T* x, const T* weight, T* out, int64_t C, int64_t N, int64_t begin,
                  int64_t end) {
  constexpr int kRows = tile_rows(M);
  const int64_t distance = fetch_distance<kRows, T>(choose_blocks<T>(M, C), C, 0, 0);
  for (int64_t n = begin; n < end; n += kRows) {
    const T* const w = weight + n * C;
    multiply_tile<M, kRows, kRows>(x, w, out + n, C, N, end - n < kRows ? end - n : kRows, 0, C,
                                   w + distance, nullptr);
  }
}

// multiply_rows for the turn-th of `turns` tiles of x, which share the fetching of kRows rows.
template <int kRows, typename T>
inline auto* choose_rows(int64_t turn, int64_t turns) {
  if (turns < kRows) return turn < 2 ? multiply_rows<kRows, 2, T> : multiply_rows<kRows, 0, T>;
  return turn < kRows ? multiply_rows<kRows, 1, T> : multiply_rows<kRows, 0, T>;
}

// The same for several tiles of x, which use a part of W in turn.
template <typename T>
void multiply_many(const T* x, const T* weight, T* out, int64_t M, int64_t C, int64_t N,
                   int64_t begin, int64_t end) {
  constexpr int kRows = tile_rows(kTileM);
  const Blocks blocks = choose_blocks<T>(M, C);
  // Only depths short of C leave chains unfinished.
  constexpr int64_t kWaitingRows = kCacheBytes / kDepthBytes;
  vfloat waiting[kSharedTiles * kWaitingRows * kRows];
  for (int64_t first = 0; first < M; first += blocks.rows) {
    const int64_t rows = M - first < blocks.rows ? M - first : blocks.rows;
    // Tiles of one height: a low one has too few chains to keep the multipliers busy.
    const int64_t turns = (rows + kTileM - 1) / kTileM, height = (rows + turns - 1) / turns;
    for (int64_t group = begin; group < end; group += blocks.tiles * kRows) {
      for (int64_t k = 0; k < C; k += blocks.depth) {
        const int64_t k_end = C - k < blocks.depth ? C : k + blocks.depth;
        for (int64_t tile = 0; tile < blocks.tiles && group + tile * kRows < end; ++tile) {
          const int64_t n = group + tile * kRows, width = end - n < kRows ? end - n : kRows;
          const T* const w = weight + n * C;
          const T* ahead = w + fetch_distance<kRows, T>(blocks, C, tile, k);
          for (int64_t turn = 0, m = 0; m < rows; ++turn, m += height) {
            choose_rows<kRows, T>(turn, turns)(
                rows - m < height ? rows - m : height, x + (first + m) * C, w,
                out + (first + m) * N + n, C, N, width, k, k_end, ahead,
                blocks.depth < C ? waiting + (tile * kWaitingRows + m) * kRows : nullptr);
            ahead += (turns < kRows ? 2 : 1) * C;
          }
        }
      }
    }
  }
}

// Columns begin .. end of out [M, N] = x [M, C] times the transpose of weight [N, C]; C >= 1.
template <typename T>
void multiply(const T* x, const T* weight, T* out, int64_t M, int64_t C, int64_t N, int64_t begin,
              int64_t end) {
  switch (M) {
    case 0: return;
    case 1: return multiply_few<1>(x, weight, out, C, N, begin, end);
    case 2: return multiply_few<2>(x, weight, out, C, N, begin, end);
    case 3: return multiply_few<3>(x, weight, out, C, N, begin, end);
    case 4: return multiply_few<4>(x, weight, out, C, N, begin, end);
    default: return multiply_many(x, weight, out, M, C, N, begin, end);
  }
}

}  // namespace
}  // namespace voxkern
