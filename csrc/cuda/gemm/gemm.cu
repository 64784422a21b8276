#include "cuda/gemm/dense_tiles.cuh"
#include "cuda/gemm/gemm.h"
#include "cuda/gemm/gemv.cuh"
#include "cuda/gemm/packed_tiles.cuh"

// The choice of a kernel and the shape of its launch:
//
//   weights  bfloat16, up to 16 rows             more rows           float32
//   plain    gemv (DenseGemv, fuses)             dense_tile_kernel   float_kernel
//   packed   gemv (PackedGemv, fuses)            packed_tile_kernel  packed_tile_kernel
//
// The gemv for plain weights also takes all rows that are not vector-aligned, 16 at a time. A sum
// has the same order in all kernels of a line. float32 is for tests of equality: it fuses nothing,
// and more than a tile of rows read W from L2 once for each tile.
namespace voxkern {
namespace gemm_kernels {
namespace {

constexpr int kBlocksPerMultiprocessor = 2;

// Each block takes this much shared memory besides its own; a block may have all the rest of a
// multiprocessor's, less the variables of stage_rows().
constexpr int64_t kSystemBytes = 1024;
constexpr int64_t kStaticBytes = sizeof(SquareSums);
int64_t dynamic_limit() { return shared_bytes_limit() - kStaticBytes; }
bool co_resident(int64_t blocks, int64_t shared_bytes) {
  return blocks * (shared_bytes + kStaticBytes + kSystemBytes) <=
         shared_bytes_limit() + kSystemBytes;
}

template <typename T>
bool is_aligned(const GemmParams& p) {
  return is_vector_aligned<T>(p.x, p.C) && is_vector_aligned<T>(p.weight, p.C) &&
         (p.prologue == Prologue::none || is_vector_aligned<T>(p.norm, p.C));
}

struct GemvLaunch {
  void (*kernel)(GemmParams, GemvPlan);
  GemvPlan plan;
  int64_t blocks;
  bool possible;
};

// For up to `each` blocks a multiprocessor. Blocks that do not fit beside each other would run one
// after the other, the last ones without a prefetch, and the next kernel could only start with
// them.
template <typename Gemv, Prologue prologue, Epilogue epilogue>
GemvLaunch plan_gemv(const GemmParams& p, int64_t each = kBlocksPerMultiprocessor) {
  const int64_t tiles = divide_up(p.N, Gemv::kTile), most = each * multiprocessors();
  const int64_t blocks = tiles < most ? tiles : most;
  const GemvPlan plan = Gemv::plan(p, blocks, dynamic_limit());
  if (each > 1 && !co_resident(each, plan.shared_bytes))
    return plan_gemv<Gemv, prologue, epilogue>(p, each - 1);
  return {gemv_kernel<Gemv, prologue, epilogue>, plan, blocks,
          plan.shared_bytes <= dynamic_limit() && (prologue == Prologue::none || plan.stride > 0)};
}

template <Format kFormat, Prologue prologue, Epilogue epilogue>
GemvLaunch choose_rows(const GemmParams& p) {
  using Weights = SingleWeight<kFormat, kProducts<epilogue>>;
  if constexpr (kFormat == Format::plain) {
    // A product of 16 KB a block (8 rows of 1024 columns) has all of its weights in flight before
    // the wait, a large one 64 KB.
    constexpr int kMin = 3, kMax = 4;
    return p.M <= 8 ? plan_gemv<DenseGemv<true, false, Weights, kMin, kMax>, prologue, epilogue>(p)
                    : plan_gemv<DenseGemv<true, true, Weights, kMin, kMax>, prologue, epilogue>(p);
  } else {
    // 64 KB a block in int8, 51 in int4: two blocks leave room for one of the next kernel.
    constexpr int kMax = kFormat == Format::int8 ? 2 : 3;
    if (p.M == 1) return plan_gemv<PackedGemv<1, Weights, 1, kMax>, prologue, epilogue>(p);
    return p.M <= 8 ? plan_gemv<PackedGemv<8, Weights, 1, kMax>, prologue, epilogue>(p)
                    : plan_gemv<PackedGemv<kMaxRows, Weights, 1, kMax>, prologue, epilogue>(p);
  }
}

template <Prologue prologue, Epilogue epilogue>
GemvLaunch choose_format(const GemmParams& p) {
  if (p.format == Format::int8) return choose_rows<Format::int8, prologue, epilogue>(p);
  if (p.format == Format::int4) return choose_rows<Format::int4, prologue, epilogue>(p);
  return choose_rows<Format::plain, prologue, epilogue>(p);
}

// The gemv for p, not `possible` where there is none.
GemvLaunch choose_gemv(const GemmParams& p) {
  if (p.dtype != Dtype::bf16 || p.M > kMaxRows || !is_aligned<bf16>(p)) return {};
  if (p.prologue == Prologue::norm)
    return p.epilogue == Epilogue::swiglu ? choose_format<Prologue::norm, Epilogue::swiglu>(p)
                                          : choose_format<Prologue::norm, Epilogue::store>(p);
  return p.epilogue == Epilogue::add ? choose_format<Prologue::none, Epilogue::add>(p)
                                     : choose_format<Prologue::none, Epilogue::store>(p);
}

// Calls launch(rows) for as many rows at a time as a grid's second dimension, 16 bits wide, takes.
template <typename T, typename Launch>
void each_grid(const GemmParams& p, int64_t tile_rows, const Launch& launch) {
  const int64_t most = 65535 * tile_rows;
  for (int64_t first = 0; first < p.M; first += most) {
    GemmParams rows = p;
    rows.M = p.M - first < most ? p.M - first : most;
    rows.x = static_cast<const T*>(p.x) + first * p.C;
    rows.out = static_cast<T*>(p.out) + first * p.N;
    launch(rows);
  }
}

void launch_gemv(const GemmParams& p, const GemvLaunch& gemv, cudaStream_t stream) {
  each_grid<bf16>(p, kMaxRows, [&](const GemmParams& rows) {
    launch(gemv.kernel,
           {.grid = dim3(static_cast<unsigned>(gemv.blocks),
                         static_cast<unsigned>(divide_up(rows.M, kMaxRows))),
            .block = dim3(kGemvThreads),
            .shared_bytes = static_cast<size_t>(gemv.plan.shared_bytes),
            .stream = stream,
            .overlaps_previous = p.overlaps_previous},
           rows, gemv.plan);
  });
}

void launch_unaligned(const GemmParams& p, cudaStream_t stream) {
  using Weights = SingleWeight<Format::plain, 1>;
  constexpr Epilogue kStore = Epilogue::store;
  launch_gemv(p,
              p.M <= 8
                  ? plan_gemv<DenseGemv<false, false, Weights, 3, 4>, Prologue::none, kStore>(p)
                  : plan_gemv<DenseGemv<false, true, Weights, 3, 4>, Prologue::none, kStore>(p),
              stream);
}

template <bool kAligned, int kTile>
void launch_float(const GemmParams& p, cudaStream_t stream) {
  each_grid<float>(p, kTile, [&](const GemmParams& rows) {
    launch(float_kernel<kAligned, kTile>,
           {.grid = dim3(static_cast<unsigned>(divide_up(p.N, kGemvWarps * kFloatRows)),
                         static_cast<unsigned>(divide_up(rows.M, kTile))),
            .block = dim3(kGemvThreads),
            .stream = stream,
            .overlaps_previous = p.overlaps_previous},
           rows);
  });
}

void launch_plain(const GemmParams& p, cudaStream_t stream) {
  if (p.dtype == Dtype::bf16)
    return is_aligned<bf16>(p) ? launch_dense_tiles(p, stream) : launch_unaligned(p, stream);
  if (is_aligned<float>(p))
    p.M == 1 ? launch_float<true, 1>(p, stream) : launch_float<true, 4>(p, stream);
  else
    p.M == 1 ? launch_float<false, 1>(p, stream) : launch_float<false, 4>(p, stream);
}

template <typename T>
void launch_packed_tiles(const GemmParams& p, cudaStream_t stream) {
  p.format == Format::int8 ? launch_packed_tiles<T, Format::int8>(p, stream)
                           : launch_packed_tiles<T, Format::int4>(p, stream);
}

}  // namespace
}  // namespace gemm_kernels

bool can_fuse(const GemmParams& p) { return gemm_kernels::choose_gemv(p).possible; }

void gemm(const GemmParams& p, cudaStream_t stream) {
  namespace kernels = gemm_kernels;
  if (p.M == 0 || p.N == 0) return;
  if (p.format != Format::plain && reinterpret_cast<uintptr_t>(p.weight) % 16)
    throw std::runtime_error("weight: packed, expected at an address in a multiple of 16");
  if (const kernels::GemvLaunch gemv = kernels::choose_gemv(p); gemv.possible)
    return kernels::launch_gemv(p, gemv, stream);
  if (p.format == Format::plain) return kernels::launch_plain(p, stream);
  p.dtype == Dtype::f32 ? kernels::launch_packed_tiles<float>(p, stream)
                        : kernels::launch_packed_tiles<bf16>(p, stream);
}

}  // namespace voxkern
