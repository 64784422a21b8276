// out = x W^T for few rows x in bfloat16, fused with a prologue and an epilogue (fusion.cuh). W is
// read once, through a WeightPipeline; a Gemv is the part of one block. gemm.cu launches a gemv for
// each product; decoder/persistent.cu runs all products of a frame in one kernel.
//
// DenseGemv, plain weights, 16 rows of x at most. A tile is 8 rows of W (with SwiGLU 8 of gate and
// 8 of up). Each of the 8 warps has an equal range of the columns in whole chunks of 32 and takes
// its chunks in order: a lane has 16 bytes of one row of W and of one or two of x, which are two
// tensor core products of 16 columns, in an order of columns that both operands share. The warps'
// sums are added in order. So a sum's order depends on C alone, not on M, N, tiles or alignment.
//
// PackedGemv, packed weights. A tile is 16 rows of W (with SwiGLU 16 and 16), whose ranges of 256
// columns the warps take in turn (formats.cuh). x is quantized once a block, all columns of it.
//
// Both cost one barrier a tile, since the warps' sums alternate between two buffers. Up to
// kBlocksPerMultiprocessor blocks share the tiles evenly; docs/cuda.md has the blocks, bytes in
// flight and cycles of CSM's products. Rounding: fusion.cuh. Floor: W's bytes over 3.35 TB/s.
#pragma once

#include "cuda/gemm/weight_pipeline.cuh"

namespace voxkern::gemm_kernels {
namespace {

// The layout of a block's shared memory: the pipeline, then what the products need.
struct GemvPlan {
  int stages;  // of the ring
  int rest;    // bytes of the pipeline that are used
  int stride;  // vectors from one row of staged x to the next; 0 if x is not staged
  int64_t shared_bytes;
};

// Vectors from one row of staged x to the next. Odd chunks: the two rows that 8 lanes read together
// lie in different banks.
__host__ __device__ constexpr int dense_stride(int64_t C) {
  return static_cast<int>((divide_up(divide_up(C, kLaneValues), kChunkVectors) | 1) *
                          kChunkVectors);
}
// Rows that are quantized begin in different banks.
__host__ __device__ constexpr int packed_stride(int64_t C) {
  return static_cast<int>(C / kLaneValues | 4);
}
inline int64_t staged_bytes(const GemmParams& p, int stride) {
  return (p.M < kMaxRows ? p.M : kMaxRows) * stride * static_cast<int64_t>(sizeof(uint4));
}

// Two rows of x that a lane multiplies, `row` and row + 8; staged in shared memory, or global.
template <bool kAligned>
struct LaneRows {
  const bf16* x;
  int C, rows, row, stride;
  const uint4* vectors[2];

  __device__ __forceinline__ LaneRows(const GemmParams& p, int64_t m, int rows_,
                                      const uint4* staged, int stride_)
      : x(static_cast<const bf16*>(p.x) + m * p.C),
        C(static_cast<int>(p.C)),
        rows(rows_),
        row(threadIdx.x % kWarp / kChunkLanes),
        stride(stride_) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      vectors[half] =
          stride ? staged + (row + half * 8) * stride
                 : reinterpret_cast<const uint4*>(x + static_cast<int64_t>(row + half * 8) * C);
  }
  // Zeros past the last row.
  __device__ __forceinline__ uint4 load(int half, int i) const {
    const int r = row + half * 8;
    if (r >= rows) return {};
    if constexpr (kAligned) return stride ? vectors[half][i] : load_uncached(vectors[half] + i);
    return load_padded<bf16, false>(x + static_cast<int64_t>(r) * C, i, C);
  }
};

// kTwoRowTiles: x has more than 8 rows.
template <bool kAligned, bool kTwoRowTiles, typename Sequence, int kMinStages, int kMaxStages>
class DenseGemv {
  using Pipeline = WeightPipeline<DenseLoader<kAligned, Sequence::kMaxProducts>, Sequence,
                                  kMinStages, kMaxStages>;
  static constexpr int kRows = kTwoRowTiles ? kMaxRows : kMaxRows / 2;
  using Sums = float[Sequence::kMaxProducts][kGemvWarps][kRows][kDenseTile];  // of a tile

 public:
  using Weights = Sequence;
  static constexpr int kTile = kDenseTile, kLeast = kMinStages, kMost = kMaxStages;
  static __host__ __device__ constexpr int stride(int64_t C) { return dense_stride(C); }
  // Blocks whose registers fit on a multiprocessor: three where they do not spill.
  static constexpr int resident(Prologue prologue) {
    return kTwoRowTiles || !kAligned || (kMoreRegisters && prologue == Prologue::norm) ? 2 : 3;
  }

  static int64_t pipeline_bytes(int stages) {
    return stages * static_cast<int64_t>(Pipeline::Loader::kStageBytes);
  }
  // Bytes after the pipeline, for a product whose tiles `blocks` blocks share.
  static int64_t rest_bytes(const GemmParams& p, int64_t, int stride) {
    return 2 * static_cast<int64_t>(sizeof(Sums)) + staged_bytes(p, stride);
  }
  // The ring is as long as the waits in the code; a block uses no more of it than it has items.
  static GemvPlan plan(const GemmParams& p, int64_t blocks, int64_t limit) {
    const int64_t warp_chunks = divide_up(divide_up(p.C, kLaneValues * kChunkVectors), kGemvWarps);
    const int64_t needed = divide_up(divide_up(p.N, kTile), blocks) * Sequence::kMaxProducts *
                           divide_up(warp_chunks, kChunksPerStage);
    const int stages = p.C < kLongRow ? kMaxStages : kMinStages;
    const int64_t pipeline = pipeline_bytes(static_cast<int>(needed < stages ? needed : stages));
    int stride = kAligned ? dense_stride(p.C) : 0;
    if (pipeline + rest_bytes(p, blocks, stride) > limit) stride = 0;
    return {stages, static_cast<int>(pipeline), stride, pipeline + rest_bytes(p, blocks, stride)};
  }

  __device__ __forceinline__ DenseGemv(unsigned char* shared, int stages, int rest, int blocks,
                                       const Sequence& sequence)
      : partials_(reinterpret_cast<Sums*>(shared + rest)),
        blocks_(blocks),
        weights_(shared, stages, blocks, sequence) {
    weights_.prefill();
  }

  // Rows m .. m + rows - 1 of this block's tiles. first_norm: of load_first_norm().
  template <Prologue prologue, Epilogue epilogue, int kRowsAtOnce>
  __device__ __forceinline__ void run(const GemmParams& p, int64_t m, int rows, int stride,
                                      uint4 first_norm) {
    uint4* const staged = reinterpret_cast<uint4*>(partials_ + 2);
    if (stride) stage_rows<prologue, kRowsAtOnce>(p, m, rows, first_norm, staged, stride);
    const LaneRows<kAligned> x(p, m, rows, staged, stride);
    const LaneRange<kAligned> range(static_cast<int>(p.C));
    const int tiles = (static_cast<int>(p.N) + kTile - 1) / kTile;
    int buffer = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += blocks_, buffer ^= 1)
      multiply_tile<epilogue>(p, m, rows, tile, x, range, partials_[buffer]);
  }

 private:
  static constexpr int64_t kLongRow = 4096;  // from here on the ring has kMinStages stages

  // out's columns of one tile.
  template <Epilogue epilogue>
  __device__ __forceinline__ void multiply_tile(const GemmParams& p, int64_t m, int rows, int tile,
                                                const LaneRows<kAligned>& x,
                                                const LaneRange<kAligned>& range, Sums& partials) {
    constexpr int kOf = kProducts<epilogue>;
    const int me = threadIdx.x, lane = me % kWarp, warp = me / kWarp;
    const int row = me / kTile, n = tile * kTile + me % kTile;  // that this thread stores
    const bool stores = me < kRows * kTile && row < rows && n < static_cast<int>(p.N);
    const bf16 residual = stores ? load_residual<epilogue>(p, m + row, n) : bf16{};
#pragma unroll
    for (int of = 0; of < kOf; ++of) {
      float sums[4] = {};
      for (int first = 0; first < range.chunks; first += kChunksPerStage) {
        multiply_stage(sums, weights_.acquire(), first, x, range);
        weights_.release();
      }
#pragma unroll
      for (int i = 0; i < kRows / 4; ++i)
        partials[of][warp][lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = sums[i];
    }
    sync_first<kGemvThreads>();
    if (!stores) return;
    float totals[kOf] = {};
#pragma unroll
    for (int of = 0; of < kOf; ++of)
#pragma unroll
      for (int w = 0; w < kGemvWarps; ++w) totals[of] += partials[of][w][row][me % kTile];
    store_result<epilogue>(p, m + row, n, totals, residual);
  }

  // sums += the chunks of one stage, from chunk `first` of this warp on.
  static __device__ __forceinline__ void multiply_stage(float (&sums)[4], const uint4* w, int first,
                                                        const LaneRows<kAligned>& x,
                                                        const LaneRange<kAligned>& range) {
    const int i = range.first + first * kChunkVectors;
    if (first + kChunksPerStage <= range.whole) {
      // Two by two: all at once would need more registers than three resident blocks have.
#pragma unroll
      for (int c = 0; c < kChunksPerStage; c += 2) {
        uint4 low[2], high[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          low[k] = x.load(0, i + (c + k) * kChunkVectors);
          high[k] = kTwoRowTiles ? x.load(1, i + (c + k) * kChunkVectors) : uint4{};
        }
#pragma unroll
        for (int k = 0; k < 2; ++k)
          multiply_chunk(sums, w[(c + k) * kGemvThreads], low[k], high[k]);
      }
    } else {
      for (int c = 0; c < kChunksPerStage && first + c < range.chunks; ++c) {
        const int vector = i + c * kChunkVectors;
        const bool inside = vector < range.vectors;
        multiply_chunk(sums, w[c * kGemvThreads], inside ? x.load(0, vector) : uint4{},
                       kTwoRowTiles && inside ? x.load(1, vector) : uint4{});
      }
    }
  }
  static __device__ __forceinline__ void multiply_chunk(float (&sums)[4], uint4 w, uint4 low,
                                                        uint4 high) {
    multiply_bf16(sums, {low.x, high.x, low.y, high.y}, w.x, w.y);
    multiply_bf16(sums, {low.z, high.z, low.w, high.w}, w.z, w.w);
  }

  Sums* const partials_;  // two; no thread reads them when run() begins. Staged x follows.
  const int blocks_;
  Pipeline weights_;
};

// For up to kRows rows of x. Matrices have one of the Sequence's two formats.
template <int kRows, typename Sequence, int kMinStages, int kMaxStages>
class PackedGemv {
  static constexpr Format kFirst = Sequence::kFormats[0], kOther = Sequence::kFormats[1];
  using Loader = PackedLoader<kFirst, kOther, Sequence::kMaxProducts, kMaxStages>;
  using Shared = PackedShared<kRows>;
  // Partials that are read together, however few there are: an unrolled loop would take its
  // remainder one by one, which is all of the 4 of 1024 columns.
  static constexpr int kAddedTogether = 8;
  static constexpr int kOutRows = static_cast<int>(kBlockRows);

 public:
  using Weights = Sequence;
  static constexpr int kTile = kOutRows, kLeast = kMinStages, kMost = kMaxStages;
  static __host__ __device__ constexpr int stride(int64_t C) { return packed_stride(C); }
  static constexpr int resident(Prologue) { return kRows > 8 || kMoreRegisters ? 2 : 3; }
  // Ranges for each warp that follow the ring and are prefetched to L2 before the wait: 64 KB a
  // block in int8, so that a tile of 8192 columns, or two pairs of 2048, are all in flight by then.
  static constexpr int kL2PrefetchStages = 2;

  static int64_t pipeline_bytes(int stages) {
    return stages * static_cast<int64_t>(Loader::kStageBytes) + Loader::kScaleBytes;
  }
  // Rows that wait for their norms lie where sums come later.
  static int64_t rest_bytes(const GemmParams& p, int64_t blocks, int) {
    const int64_t ranges = packed_ranges(static_cast<int>(p.C));
    const int64_t items = p.epilogue == Epilogue::swiglu ? 2 * ranges : ranges;
    const int log_rows = ceil_log2(static_cast<int>(p.M));
    const int64_t sums =
        Shared::bytes(ranges, divide_up(p.N, kTile) > blocks ? 2 * items : items, log_rows);
    const int64_t staged = p.prologue == Prologue::norm ? staged_bytes(p, packed_stride(p.C)) : 0;
    const int64_t before = Shared::bytes(ranges, 0, log_rows) + staged;
    return sums > before ? sums : before;
  }
  static GemvPlan plan(const GemmParams& p, int64_t blocks, int64_t limit) {
    const int64_t items = Sequence::kMaxProducts * packed_ranges(static_cast<int>(p.C));
    const int64_t needed = divide_up(divide_up(p.N, kTile), blocks) * divide_up(items, kGemvWarps);
    const int64_t rest = rest_bytes(p, blocks, 0);
    int stages = static_cast<int>(needed < kMaxStages ? needed : kMaxStages);
    while (stages > kMinStages && pipeline_bytes(stages) + rest > limit) --stages;
    return {stages, static_cast<int>(pipeline_bytes(stages)), packed_stride(p.C),
            pipeline_bytes(stages) + rest};
  }

  __device__ __forceinline__ PackedGemv(unsigned char* shared, int stages, int rest, int blocks,
                                        const Sequence& sequence)
      : rest_(shared + rest), blocks_(blocks), weights_(shared, stages, blocks, sequence) {
    weights_.prefill();
  }
  __device__ __forceinline__ void prefetch() const { weights_.prefetch(kL2PrefetchStages); }

  template <Prologue prologue, Epilogue epilogue, int kRowsAtOnce>
  __device__ __forceinline__ void run(const GemmParams& p, int64_t, int, int stride,
                                      uint4 first_norm) {
    if (kFirst == kOther || p.format == kFirst)
      run<prologue, epilogue, kRowsAtOnce, kFirst>(p, stride, first_norm);
    else if constexpr (prologue == Prologue::norm && epilogue == Epilogue::store)  // a head
      run<prologue, epilogue, kRowsAtOnce, kOther>(p, stride, first_norm);
  }

 private:
  template <Prologue prologue, Epilogue epilogue, int kRowsAtOnce, Format kFormat>
  __device__ __forceinline__ void run(const GemmParams& p, int stride, uint4 first_norm) {
    const int rows = kRows == 1 ? 1 : static_cast<int>(p.M), log_rows = ceil_log2(rows);
    const int ranges = packed_ranges(static_cast<int>(p.C));
    const Shared shared(rest_, ranges, log_rows);
    quantize_x<prologue, kRowsAtOnce, kFormat>(p, rows, log_rows, stride, first_norm, shared);
    const int tiles = packed_row_tiles(static_cast<int>(p.N));
    int buffer = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += blocks_, buffer ^= 1)
      multiply_tile<epilogue, kFormat>(
          p, rows, log_rows, ranges, tile, shared,
          shared.partials + buffer * kProducts<epilogue> * ranges * kRows * Shared::kStride);
  }

  // Quantizes x's rows, normalised or not, to shared memory; ends with a barrier.
  template <Prologue prologue, int kRowsAtOnce, Format kFormat>
  __device__ __forceinline__ void quantize_x(const GemmParams& p, int rows, int log_rows,
                                             int stride, uint4 first_norm, const Shared& shared) {
    const int groups = static_cast<int>(p.C) / static_cast<int>(kGroup);
    if constexpr (prologue == Prologue::norm) {
      uint4* const staged = reinterpret_cast<uint4*>(shared.partials);
      stage_rows<prologue, kRowsAtOnce>(p, 0, rows, first_norm, staged, stride);
      quantize_rows<kFormat, kRows, kGemvThreads>(StagedRows{.x = staged, .stride = stride}, rows,
                                                  log_rows, 0, groups, shared.values,
                                                  shared.scales);
    } else {
      quantize_rows<kFormat, kRows, kGemvThreads>(
          GlobalRows<bf16>{.x = static_cast<const bf16*>(p.x), .C = p.C, .aligned = true}, rows,
          log_rows, 0, groups, shared.values, shared.scales);
    }
    sync_first<kGemvThreads>();
  }

  // out's columns of one tile.
  template <Epilogue epilogue, Format kFormat>
  __device__ __forceinline__ void multiply_tile(const GemmParams& p, int rows, int log_rows,
                                                int ranges, int tile, const Shared& shared,
                                                float* partials) {
    constexpr int kOf = kProducts<epilogue>;
    static_assert(kRows * kOutRows <= kGemvThreads);
    const int me = threadIdx.x, items = kOf * ranges;
    const int row = me / kOutRows, column = me % kOutRows;  // that this thread stores
    const int n = tile * kOutRows + column;
    const bool stores = row < rows && n < p.N;
    const bf16 residual = stores ? load_residual<epilogue>(p, row, n) : bf16{};
    for (int i = me / kWarp; i < items; i += kGemvWarps) {
      float sums[kRowTiles<kRows>][4];
      multiply_range<kFormat, kRowTiles<kRows>>(
          StagedRange<kFormat>(weights_.acquire()), shared,
          (kOf == 2 && i >= ranges ? i - ranges : i) * kRangeGroups, rows, log_rows, sums);
      weights_.release();
      store_sums<kRows>(sums, rows, partials + i * kRows * Shared::kStride);
    }
    const float* const row_scales = weights_.loader().next_row_scales();
    sync_first<kGemvThreads>();
    if (!stores) return;
    float totals[kOf] = {};
    add_ranges(totals, partials + row * Shared::kStride + column, ranges);
#pragma unroll
    for (int of = 0; of < kOf; ++of)
      totals[of] = __fmul_rn(totals[of], row_scales[of * kOutRows + column]);
    store_result<epilogue>(p, row, n, totals, residual);
  }

  // totals += the sums of the ranges in their order.
  template <int kOf>
  static __device__ __forceinline__ void add_ranges(float (&totals)[kOf], const float* partials,
                                                    int ranges) {
    for (int first = 0; first < ranges; first += kAddedTogether) {
      float sums[kOf][kAddedTogether];
#pragma unroll
      for (int of = 0; of < kOf; ++of)
#pragma unroll
        for (int r = 0; r < kAddedTogether; ++r)  // adding -0 changes no number, not even 0
          sums[of][r] = first + r < ranges
                            ? partials[(of * ranges + first + r) * kRows * Shared::kStride]
                            : -0.0f;
#pragma unroll
      for (int of = 0; of < kOf; ++of)
#pragma unroll
        for (int r = 0; r < kAddedTogether; ++r) totals[of] += sums[of][r];
    }
  }

  unsigned char* const rest_;  // PackedShared
  const int blocks_;
  WeightPipeline<Loader, Sequence, kMinStages, kMaxStages> weights_;
};

template <typename Gemv, Prologue prologue>
constexpr int kResident = Gemv::resident(prologue);

// Grid: blocks that share the tiles, tiles of kMaxRows rows of x. Weights are loaded before the
// wait for the previous kernel.
template <typename Gemv, Prologue prologue, Epilogue epilogue>
__global__ void __launch_bounds__(kGemvThreads, kResident<Gemv, prologue>)
    gemv_kernel(GemmParams p, GemvPlan plan) {
  VOX_DYNAMIC_SHARED(unsigned char, shared);
  const int64_t m = static_cast<int64_t>(blockIdx.y) * kMaxRows;
  const int rows = p.M - m < kMaxRows ? static_cast<int>(p.M - m) : kMaxRows;
  Gemv gemv(shared, plan.stages, plan.rest, gridDim.x, typename Gemv::Weights(p));
  if constexpr (requires { gemv.prefetch(); }) gemv.prefetch();
  const uint4 first_norm = load_first_norm<prologue>(p);
  let_next_kernel_start();
  wait_for_previous_kernel();
  gemv.template run<prologue, epilogue, kNormRows>(p, m, rows, plan.stride, first_norm);
}

}  // namespace
}  // namespace voxkern::gemm_kernels
