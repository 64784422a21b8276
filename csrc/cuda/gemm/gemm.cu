#include "cuda/gemm/gemm.h"
#include "cuda/gemm/gemv.cuh"
#include "cuda/gemm/tiles.cuh"

// The choice of a kernel and the shape of its launch:
//
//   weights  bfloat16, up to 16 rows             more rows           float32
//   plain    gemv (DenseGemv, fuses)             dense_tile_kernel   float_kernel
//   packed   gemv (PackedGemv, fuses)            packed_tile_kernel  packed_tile_kernel
//
// The tile kernels also take few rows that are not vector-aligned or do not fit in shared memory. A
// sum has the same order in all kernels of a line.
namespace voxkern {
namespace gemm_kernels {
namespace {

constexpr int kBlocksPerMultiprocessor = 2;

bool is_aligned(const GemmParams& p) {
  return is_vector_aligned<bf16>(p.x, p.C) && is_vector_aligned<bf16>(p.weight, p.C) &&
         (p.prologue == Prologue::none || is_vector_aligned<bf16>(p.norm, p.C));
}

// Grid: blocks that share the tiles. Weights are loaded before the wait for the previous kernel.
template <typename Gemv, Prologue prologue, Epilogue epilogue>
__global__ void __launch_bounds__(kGemvThreads, Gemv::resident())
    gemv_kernel(GemmParams p, int stages) {
  VOX_DYNAMIC_SHARED(unsigned char, shared);
  Gemv gemv(shared, stages, gridDim.x, typename Gemv::Weights(p));
  if constexpr (requires { gemv.prefetch(); }) gemv.prefetch();
  const uint4 first_norm = load_first_norm<prologue>(p);
  let_next_kernel_start();
  wait_for_previous_kernel();
  gemv.template run<prologue, epilogue>(p, first_norm);
}

struct GemmLaunch {
  void (*kernel)(GemmParams, int);  // null where no gemv takes p
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
  int stages;  // of a gemv's pipeline
};

// The longest pipeline that fits, of no more stages than a block needs, in as many blocks a
// multiprocessor as fit beside each other: others would run one after the other, the last ones
// without a prefetch, and the next kernel could only start with them.
template <typename Gemv, Prologue prologue, Epilogue epilogue>
GemmLaunch plan_gemv(const GemmParams& p) {
  // Each block takes 1 KB of shared memory besides its own.
  constexpr int64_t kSystemBytes = 1024, kStaticBytes = sizeof(SquareSums);
  const int64_t tiles = divide_up(p.N, Gemv::Loader::tile_rows());
  // Long plain rows leave less room in shared memory.
  const bool is_long = p.format == Format::plain && p.C >= 4096;
  for (int most_stages = Gemv::Weights::max_stages() - is_long; most_stages > 0; --most_stages)
    for (int64_t each = kBlocksPerMultiprocessor; each > 0; --each) {
      const int64_t most = each * multiprocessors(), blocks = tiles < most ? tiles : most;
      const int64_t needed = divide_up(tiles, blocks) * Gemv::stages_of_tile(p.C);
      const int stages = needed < most_stages ? static_cast<int>(needed) : most_stages;
      const int64_t bytes = Gemv::Loader::bytes(stages) + Gemv::rest_bytes(p, blocks);
      if (each * (bytes + kStaticBytes + kSystemBytes) <= shared_bytes_limit() + kSystemBytes)
        return {gemv_kernel<Gemv, prologue, epilogue>, blocks, kGemvThreads, bytes, stages};
    }
  return {};
}

template <Prologue prologue, Epilogue epilogue>
GemmLaunch choose_format(const GemmParams& p) {
  const auto plan = [&]<template <int, typename> typename Gemv, Format kFormat>() {
    using Weights = SingleWeight<kFormat, epilogue>;
    if constexpr (kFormat != Format::plain)
      if (p.M == 1) return plan_gemv<Gemv<1, Weights>, prologue, epilogue>(p);
    return p.M <= 8 ? plan_gemv<Gemv<8, Weights>, prologue, epilogue>(p)
                    : plan_gemv<Gemv<kGemvRows, Weights>, prologue, epilogue>(p);
  };
  if (p.format == Format::int8) return plan.template operator()<PackedGemv, Format::int8>();
  if (p.format == Format::int4) return plan.template operator()<PackedGemv, Format::int4>();
  return plan.template operator()<DenseGemv, Format::plain>();
}

GemmLaunch choose_gemv(const GemmParams& p) {
  if (p.dtype != Dtype::bf16 || p.M > kGemvRows || !is_aligned(p)) return {};
  if (p.prologue == Prologue::norm)
    return p.epilogue == Epilogue::swiglu ? choose_format<Prologue::norm, Epilogue::swiglu>(p)
                                          : choose_format<Prologue::norm, Epilogue::store>(p);
  return p.epilogue == Epilogue::add ? choose_format<Prologue::none, Epilogue::add>(p)
                                     : choose_format<Prologue::none, Epilogue::store>(p);
}

// A block makes a tile of `rows` x `columns` of out.
GemmLaunch tiles(void (*kernel)(GemmParams, int), const GemmParams& p, int64_t rows,
                 int64_t columns, int threads, int64_t shared_bytes) {
  return {kernel, divide_up(p.M, rows) * divide_up(p.N, columns), threads, shared_bytes, 0};
}

template <int... kSizes>
GemmLaunch dense_tiles(const GemmParams& p) {
  constexpr TileShape kShape = {kSizes...};
  return tiles(dense_tile_kernel<kSizes...>, p, kShape.rows, kShape.columns, kShape.threads(),
               kShape.shared_bytes());
}

// 128 of W's rows a block, unless too few blocks would draw from memory: a multiprocessor reads up
// to 64 bytes a clock from L2, so a third of an H100's draw as much as memory gives. With fewer
// blocks than that, narrow ones win although they read x more often.
GemmLaunch choose_dense(const GemmParams& p) {
  const auto wide = [&](int64_t rows) { return divide_up(p.M, rows) * divide_up(p.N, 128) >= 44; };
  if (!is_aligned(p)) return dense_tiles<32, 32, 16, 16, false>(p);
  if (p.M <= 32) return wide(32) ? dense_tiles<32, 128, 32, 32>(p) : dense_tiles<32, 32, 16, 16>(p);
  if (p.M <= 64) return wide(64) ? dense_tiles<64, 128, 32, 32>(p) : dense_tiles<64, 32, 32, 16>(p);
  return wide(128) ? dense_tiles<128, 128, 64, 32>(p) : dense_tiles<128, 64, 32, 32>(p);
}

// 128 rows of W a block, so that x is read and quantized once for many of them. Where that would
// leave multiprocessors idle (fewer than 128 blocks; an H100 has 132): 16 rows, 8 ranges at a time.
template <typename T>
GemmLaunch choose_packed(const GemmParams& p) {
  const auto blocks = [&]<Format kFormat, int kBlocks>() {
    using Shared = PackedShared<kPackedTileRows>;
    return tiles(packed_tile_kernel<T, kFormat, kBlocks>, p, kPackedTileRows, kBlocks * kPackedTile,
                 kGemvThreads,
                 Shared::bytes(kGemvWarps / kBlocks, kGemvWarps, ceil_log2(kPackedTileRows)));
  };
  const bool wide = divide_up(p.N, 8 * kPackedTile) * divide_up(p.M, kPackedTileRows) >= 128;
  if (p.format == Format::int8)
    return wide ? blocks.template operator()<Format::int8, 8>()
                : blocks.template operator()<Format::int8, 1>();
  return wide ? blocks.template operator()<Format::int4, 8>()
              : blocks.template operator()<Format::int4, 1>();
}

GemmLaunch choose_tiles(const GemmParams& p) {
  if (p.format != Format::plain)
    return p.dtype == Dtype::f32 ? choose_packed<float>(p) : choose_packed<bf16>(p);
  if (p.dtype == Dtype::f32) return tiles(float_kernel, p, kFloatRows, kGemvWarps, kGemvThreads, 0);
  return choose_dense(p);
}

}  // namespace
}  // namespace gemm_kernels

bool can_fuse(const GemmParams& p) { return gemm_kernels::choose_gemv(p).kernel; }

void gemm(const GemmParams& p, cudaStream_t stream) {
  if (p.M == 0 || p.N == 0) return;
  if (p.format != Format::plain && reinterpret_cast<uintptr_t>(p.weight) % 16)
    throw std::runtime_error("weight: packed, expected at an address in a multiple of 16");
  auto choice = gemm_kernels::choose_gemv(p);
  if (!choice.kernel) choice = gemm_kernels::choose_tiles(p);
  launch(choice.kernel,
         {.grid = choice.blocks,
          .block = choice.threads,
          .shared_bytes = static_cast<size_t>(choice.shared_bytes),
          .stream = stream,
          .overlaps_previous = p.overlaps_previous},
         p, choice.stages);
}

}  // namespace voxkern
