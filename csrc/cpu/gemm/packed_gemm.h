// out = x W^T on one thread for a packed W (weight.h) and quantized x. Only ISA passes include it.
//
// The dot product over a group of 32 columns is an exact integer. Each output is one float32 chain
// to which the groups are added in ascending order, each as a rounded product (no FMA), so every
// ISA, tile and partition of the work gives the same bits:
//
//   int4  chain += dot * (scale of W's group * scale of x's group)
//   int8  chain += dot * scale of x's group
//
// and out = chain * scale of W's row.
#pragma once

#include "common/weight.h"
#include "cpu/gemm/gemm.h"
#include "cpu/gemm/packed_dot.h"
#include "cpu/gemm/quantize.h"

namespace voxkern {
namespace {

constexpr int kVectors = kBlockRows / kWidth;  // vectors of kWidth rows in a block

// The dot products of one group: kWidth rows of W, from `w` on, with M rows of x.
template <Format format>
struct Group;

template <>
struct Group<Format::int4> {
  using Dot = NibbleDot;
  template <int M>
  static VOX_INLINE void add(const char* w, const int8_t* x, Dot::Sum* sums) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const vpairs both = reinterpret_cast<vpairs>(load_columns(w + 64 * i));
      const vbytes low = reinterpret_cast<vbytes>(both & 0x0f0f);
      const vbytes high = reinterpret_cast<vbytes>((both >> 4) & 0x0f0f);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        sums[m] = Dot::add(sums[m], low, splat_columns(x + m * kGroup + 8 * i));
        sums[m] = Dot::add(sums[m], high, splat_columns(x + m * kGroup + 8 * i + 4));
      }
    }
  }
  // Expands scale bytes to floats: the sign, exponents 120 .. 127, 4 bits of mantissa.
  static VOX_INLINE vfloat load_scales(const char* p) {
    const vuint bits = reinterpret_cast<vuint>(load_bytes(reinterpret_cast<const int8_t*>(p)));
    return as_float(((bits << 19) & 0x83ffffffu) | 0x3c000000u);
  }
  static VOX_INLINE vfloat scale(vfloat group, vfloat x) { return group * x; }
};

template <>
struct Group<Format::int8> {
  using Dot = ByteDot;
  template <int M>
  static VOX_INLINE void add(const char* w, const int8_t* x, Dot::Sum* sums) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const vbytes four = Dot::prepare(load_columns(w + 64 * i));
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
        sums[m] = Dot::add(sums[m], four, splat_columns(x + m * kGroup + 4 * i));
    }
  }
  static VOX_INLINE vfloat load_scales(const char*) { return vfloat{}; }
  static VOX_INLINE vfloat scale(vfloat, vfloat x) { return x; }
};

// The prefetch distance of W, to L2 (bench/LOG.md).
constexpr int64_t kPrefetchBytes = 8 << 10;

// Adjacent blocks of W that a tile reads side by side. With few rows of x, int8 consumes bytes
// faster than a single stream delivers them.
constexpr int packed_blocks(Format format, int M) {
  return kWidth == 16 && format == Format::int8 && M <= 4 ? 2 : 1;
}

// Prefetches for a tile: next() prefetches the group of each block that the tile reads
// kPrefetchBytes later, in the following blocks where it runs past these.
template <Format format, int kBlocks>
class Prefetcher {
 public:
  Prefetcher(const char* block, int64_t C)
      : groups_(C / kGroup), stride_(block_bytes(format, C)), group_(kGroups % groups_) {
    block_ = block + kGroups / groups_ * kBlocks * stride_;
  }

  VOX_INLINE void next() {
    for (int b = 0; b < kBlocks; ++b) {
      const char* const block = block_ + b * stride_;
      for (int64_t i = 0; i < group_bytes(format); i += 64)
        prefetch(block + group_ * group_bytes(format) + i);
      // A cache line holds the scales of four groups.
      if (scale_bytes(format) && group_ % 4 == 0)
        prefetch(block + groups_ * group_bytes(format) + group_ * scale_bytes(format));
    }
    if (++group_ < groups_) return;
    for (int b = 1; b <= kBlocks; ++b) prefetch(block_ + b * stride_ - 64);
    block_ += kBlocks * stride_;
    group_ = 0;
  }

 private:
  static constexpr int64_t kGroups = kPrefetchBytes / group_bytes(format);

  static VOX_INLINE void prefetch(const char* p) { __builtin_prefetch(p, 0, 2); }

  const int64_t groups_, stride_;
  const char* block_;
  int64_t group_;
};

// out[kBlocks][M][16] for a tile of x and adjacent blocks of W.
template <Format format, int M, int kBlocks, bool kPrefetch>
void packed_gemm_tile(const int8_t* x, const float* x_scales, const int32_t* minus_8sums,
                      const char* block, int64_t C, float* out) {
  using G = Group<format>;
  const int64_t groups = C / kGroup, stride = block_bytes(format, C);
  Prefetcher<format, kBlocks> prefetcher(block, C);
  vfloat chains[kBlocks * kVectors][M];
  clear(chains);
  for (int64_t g = 0; g < groups; ++g, x += M * kGroup, x_scales += M, minus_8sums += M) {
    if (kPrefetch) prefetcher.next();
#pragma GCC unroll 8
    for (int p = 0; p < kBlocks * kVectors; ++p) {
      const char* const values = block + p / kVectors * stride + p % kVectors * 4 * kWidth;
      const char* const scales = block + p / kVectors * stride + groups * group_bytes(format);
      typename G::Dot::Sum sums[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) sums[m] = G::Dot::begin(minus_8sums[m]);
      G::template add<M>(values + g * group_bytes(format), x, sums);
      const vfloat scale = G::load_scales(scales + g * scale_bytes(format) + p % kVectors * kWidth);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const vfloat dot = __builtin_convertvector(G::Dot::end(sums[m], minus_8sums[m]), vfloat);
        chains[p][m] += unfused(dot * G::scale(scale, splat(x_scales[m])));
      }
    }
  }
  for (int p = 0; p < kBlocks * kVectors; ++p) {
    const int b = p / kVectors, row = p % kVectors * kWidth;
    const vfloat scale = load(reinterpret_cast<const float*>(block + (b + 1) * stride - 64) + row);
    for (int m = 0; m < M; ++m) store(out + (b * M + m) * kBlockRows + row, chains[p][m] * scale);
  }
}

using PackedGemmTile = void (*)(const int8_t*, const float*, const int32_t*, const char*, int64_t,
                                float*);

template <Format format, bool kPrefetch>
inline PackedGemmTile choose_tile(int64_t M, int64_t blocks) {
  const auto tile = [&](auto m) -> PackedGemmTile {
    constexpr int kBlocks = packed_blocks(format, m.value);
    return blocks == 1 ? packed_gemm_tile<format, m.value, 1, kPrefetch>
                       : packed_gemm_tile<format, m.value, kBlocks, kPrefetch>;
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
  return nullptr;
}

// Makes one pass over W per panel of x, whose values stay in L2 meanwhile.
template <Format format, typename T>
void packed_gemm_blocks(const QuantizedRows& x, const char* weight, T* out, int64_t M, int64_t C,
                        int64_t N, int64_t begin, int64_t end) {
  const int64_t height = packed_tile_rows(M), max_blocks = packed_blocks(format, height);
  const int64_t tiles = kPanelBytes / (height * C), panel = (tiles > 0 ? tiles : 1) * height;
  for (int64_t first = 0; first < M; first += panel) {
    const int64_t last = M - first < panel ? M : first + panel;
    for (int64_t n = begin, blocks; n < end; n += blocks * kBlockRows) {
      blocks = end - n > kBlockRows ? max_blocks : 1;
      const char* const block = weight + n / kBlockRows * block_bytes(format, C);
      for (int64_t m = first; m < last; m += height) {
        const int64_t rows = M - m < height ? M - m : height, at = m * (C / kGroup);
        float sums[2 * kPackedTileM * kBlockRows];
        // The first tile of the panel prefetches for all.
        const auto tile = m == first ? choose_tile<format, true>(rows, blocks)
                                     : choose_tile<format, false>(rows, blocks);
        tile(x.values + at * kGroup, x.scales + at, x.minus_8sums + at, block, C, sums);
        for (int64_t i = 0; i < blocks * rows; ++i)
          for (int64_t j = 0; j < kBlockRows; j += kWidth) {
            const int64_t column = n + i / rows * kBlockRows + j, left = end - column;
            if (left <= 0) break;
            T* const to = out + (m + i % rows) * N + column;
            const vfloat sum = load(sums + i * kBlockRows + j);
            left < kWidth ? store_n(to, sum, left) : store(to, sum);
          }
      }
    }
  }
}

// Columns begin .. end of out [M, N] = x [M, C] W^T for a packed weight [N, C]. `begin` is a
// multiple of 16; `end` is one, or N.
template <typename T>
void packed_gemm(const QuantizedRows& x, Format format, const void* weight, T* out, int64_t M,
                 int64_t C, int64_t N, int64_t begin, int64_t end) {
  const auto* w = static_cast<const char*>(weight);
  if (M == 0) return;
  if (format == Format::int4)
    packed_gemm_blocks<Format::int4>(x, w, out, M, C, N, begin, end);
  else
    packed_gemm_blocks<Format::int8>(x, w, out, M, C, N, begin, end);
}

}  // namespace
}  // namespace voxkern
