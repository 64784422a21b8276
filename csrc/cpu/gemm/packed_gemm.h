// out = x W^T on one thread for a packed W (weight.h) and quantized rows of x. Included by ISA
// passes alone.
//
// The dot product of a group of 32 columns is an exact integer. Groups are added in ascending order
// to one float32 chain per output, each as a rounded product (no fused multiply-add), so every
// instruction set, tile and split of the work gives the same bits:
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

constexpr int kParts = kBlockRows / kWidth;  // of a block's rows

// One group of kWidth rows of W, from `w` on, times the same group of M rows of x.
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
  // Their sign, and exponents 120 .. 127 of a float.
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

// How far ahead of its use a block of W is fetched into the level-2 cache (bench/LOG.md).
constexpr int64_t kFetchBytes = 8 << 10;

// Neighbouring blocks that are read side by side. With few rows of x, int8 takes bytes faster than
// one stream of them comes.
constexpr int packed_blocks(Format format, int M) {
  return kWidth == 16 && format == Format::int8 && M <= 4 ? 2 : 1;
}

// What a tile fetches while it reads: of each of its blocks' groups, the one that is used
// kFetchBytes later, be it in the next blocks.
template <Format format, int kBlocks>
class Fetch {
 public:
  Fetch(const char* block, int64_t C)
      : groups_(C / kGroup), stride_(block_bytes(format, C)), group_(kGroups % groups_) {
    block_ = block + kGroups / groups_ * kBlocks * stride_;
  }

  VOX_INLINE void next() {
    for (int b = 0; b < kBlocks; ++b) {
      const char* const block = block_ + b * stride_;
      for (int64_t i = 0; i < group_bytes(format); i += 64)
        fetch(block + group_ * group_bytes(format) + i);
      // A cache line has the scales of four groups.
      if (scale_bytes(format) && group_ % 4 == 0)
        fetch(block + groups_ * group_bytes(format) + group_ * scale_bytes(format));
    }
    if (++group_ < groups_) return;
    for (int b = 1; b <= kBlocks; ++b) fetch(block_ + b * stride_ - 64);
    block_ += kBlocks * stride_;
    group_ = 0;
  }

 private:
  static constexpr int64_t kGroups = kFetchBytes / group_bytes(format);

  static VOX_INLINE void fetch(const char* p) { __builtin_prefetch(p, 0, 2); }

  const int64_t groups_, stride_;
  const char* block_;
  int64_t group_;
};

// out[kBlocks][M][16] for a tile of x and neighbouring blocks of W.
template <Format format, int M, int kBlocks, bool kFetch>
void multiply_tile(const int8_t* x, const float* x_scales, const int32_t* minus_8sums,
                   const char* block, int64_t C, float* out) {
  using G = Group<format>;
  const int64_t groups = C / kGroup, stride = block_bytes(format, C);
  Fetch<format, kBlocks> fetch(block, C);
  vfloat chains[kBlocks * kParts][M] = {};
  for (int64_t g = 0; g < groups; ++g, x += M * kGroup, x_scales += M, minus_8sums += M) {
    if (kFetch) fetch.next();
#pragma GCC unroll 8
    for (int p = 0; p < kBlocks * kParts; ++p) {
      const char* const values = block + p / kParts * stride + p % kParts * 4 * kWidth;
      const char* const scales = block + p / kParts * stride + groups * group_bytes(format);
      typename G::Dot::Sum sums[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) sums[m] = G::Dot::begin(minus_8sums[m]);
      G::template add<M>(values + g * group_bytes(format), x, sums);
      const vfloat scale = G::load_scales(scales + g * scale_bytes(format) + p % kParts * kWidth);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const vfloat dot = __builtin_convertvector(G::Dot::end(sums[m], minus_8sums[m]), vfloat);
        chains[p][m] += unfused(dot * G::scale(scale, splat(x_scales[m])));
      }
    }
  }
  for (int p = 0; p < kBlocks * kParts; ++p) {
    const int b = p / kParts, part = p % kParts * kWidth;
    const vfloat scale = load(reinterpret_cast<const float*>(block + (b + 1) * stride - 64) + part);
    for (int m = 0; m < M; ++m) store(out + (b * M + m) * kBlockRows + part, chains[p][m] * scale);
  }
}

using MultiplyTile = void (*)(const int8_t*, const float*, const int32_t*, const char*, int64_t,
                              float*);

template <Format format, bool kFetch>
inline MultiplyTile choose_tile(int64_t M, int64_t blocks) {
  const auto tile = [&](auto m) -> MultiplyTile {
    constexpr int kBlocks = packed_blocks(format, m.value);
    return blocks == 1 ? multiply_tile<format, m.value, 1, kFetch>
                       : multiply_tile<format, m.value, kBlocks, kFetch>;
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

// W passes once for each panel of x, whose rows' values stay in the level-2 cache meanwhile.
template <Format format, typename T>
void multiply_blocks(const QuantizedRows& x, const char* weight, T* out, int64_t M, int64_t C,
                     int64_t N, int64_t begin, int64_t end) {
  const int64_t height = packed_tile_rows(M), most = packed_blocks(format, height);
  const int64_t tiles = kPanelBytes / (height * C), panel = (tiles > 0 ? tiles : 1) * height;
  for (int64_t first = 0; first < M; first += panel) {
    const int64_t last = M - first < panel ? M : first + panel;
    for (int64_t n = begin, blocks; n < end; n += blocks * kBlockRows) {
      blocks = end - n > kBlockRows ? most : 1;
      const char* const block = weight + n / kBlockRows * block_bytes(format, C);
      for (int64_t m = first; m < last; m += height) {
        const int64_t rows = M - m < height ? M - m : height, at = m * (C / kGroup);
        float sums[2 * kPackedTileM * kBlockRows];
        // The first turn fetches for all.
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
