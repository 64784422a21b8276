// out = x W^T for few rows x in bfloat16, fused with a prologue and an epilogue. W is read once,
// through a WeightPipeline; a Gemv is the part of one block: of a launch (gemm.cu), or of all
// products of a frame (decoder/persistent.cu).
//
// DenseGemv, plain weights, 16 rows of x at most. A tile is 8 rows of W (with SwiGLU 8 of gate and
// 8 of up). Each of the 8 warps has an equal range of the columns in whole chunks of 32 and takes
// its chunks in order: a lane has 16 bytes of one row of W and of one or two of x, which are two
// tensor core products of 16 columns, in an order of columns that both operands share. The warps'
// sums are added in order. So a sum's order depends on C alone, not on M, N or tiles.
//
// PackedGemv, packed weights. A tile is 16 rows of W (with SwiGLU 16 and 16), whose ranges of 256
// columns the warps take in turn (formats.cuh). x is quantized once a block, all columns of it.
//
// One barrier a tile: the warps' sums alternate between two buffers. Results are rounded wherever
// the separate ops store them, so fused and separate results are equal to the bit. Floor: W's bytes
// over 3.35 TB/s; docs/cuda.md has the blocks, bytes in flight and cycles of CSM's products.
#pragma once

#include "cuda/gemm/weight_pipeline.cuh"

namespace voxkern::gemm_kernels {
namespace {

static_assert(kGemvThreads == kNormThreads, "a fused norm adds squares in the order of rms_norm");
constexpr int kGemvRows = 16;  // of x in a block, at most
using SquareSums = float[kGemvRows][kGemvWarps];

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kMoreRegisters = true;
#else
constexpr bool kMoreRegisters = false;
#endif

// This thread's first vector of the norm's weight; may precede the wait for the previous kernel.
template <Prologue prologue>
VOX_DEVICE uint4 load_first_norm(const GemmParams& p) {
  if constexpr (prologue == Prologue::norm)
    if (static_cast<int64_t>(threadIdx.x) < p.C / kLaneValues)
      return load_stream(static_cast<const bf16*>(p.norm) + threadIdx.x * kLaneValues);
  return {};
}

// Copies `rows` adjacent rows of `vectors` vectors each, which become `stride` vectors apart. A
// thread copies the same vectors of all rows, and loads kLoadsInFlight before it stores any.
template <int kLoadsInFlight>
VOX_DEVICE void copy_rows(const bf16* from, int rows, int vectors, uint4* to, int stride) {
  const int me = threadIdx.x;
  const auto advance = [&](int& row, int& i) {
    i += kGemvThreads;
    if (i < vectors) return;
    i = me;
    ++row;
  };
  for (int row = me < vectors ? 0 : rows, i = me; row < rows;) {
    uint4 raw[kLoadsInFlight] = {};
    int to_row = row, to_i = i;
#pragma unroll
    for (int k = 0; k < kLoadsInFlight; ++k) {
      if (row < rows) raw[k] = load_uncached(from + (row * vectors + i) * kLaneValues);
      advance(row, i);
    }
#pragma unroll
    for (int k = 0; k < kLoadsInFlight; ++k) {
      if (to_row < rows) to[to_row * stride + to_i] = raw[k];
      advance(to_row, to_i);
    }
  }
}

// Leaves each warp's sum of the squares of each staged row in `sums`.
VOX_DEVICE void add_squares(const uint4* staged, int rows, int vectors, int stride,
                            SquareSums& sums) {
  constexpr int kRowsAtOnce = 4;
  const int me = threadIdx.x;
  for (int first = 0; first < rows; first += kRowsAtOnce) {
    float squares[kRowsAtOnce] = {};
#pragma unroll 1
    for (int i = me; i < vectors; i += kGemvThreads)
#pragma unroll
      for (int k = 0; k < kRowsAtOnce; ++k) {
        if (first + k >= rows) break;
        float values[kLaneValues];
        unpack<bf16>(staged[(first + k) * stride + i], values);
#pragma unroll
        for (int j = 0; j < kLaneValues; ++j) squares[k] = fmaf(values[j], values[j], squares[k]);
      }
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
      if (first + k >= rows) break;
      const float sum = warp_reduce(squares[k], Add());
      if (me % kWarp == 0) sums[first + k][me / kWarp] = sum;
    }
  }
}

// Multiplies the staged rows by the norm's weight and by their scales; lane l holds row l's.
VOX_DEVICE void scale_rows(const GemmParams& p, int rows, float lane_scale, uint4 first_norm,
                           uint4* staged, int stride) {
  const int vectors = static_cast<int>(p.C / kLaneValues), me = threadIdx.x;
  for (int row = 0; row < rows; ++row) {
    const float scale = __shfl_sync(kWholeWarp, lane_scale, row);
#pragma unroll 1
    for (int i = me; i < vectors; i += kGemvThreads) {
      float weight[kLaneValues], values[kLaneValues];
      unpack<bf16>(
          i == me ? first_norm : load_stream(static_cast<const bf16*>(p.norm) + i * kLaneValues),
          weight);
      unpack<bf16>(staged[row * stride + i], values);
#pragma unroll
      for (int j = 0; j < kLaneValues; ++j) values[j] = values[j] * scale * weight[j];
      staged[row * stride + i] = pack<bf16>(values);
    }
  }
}

// Copies x's rows to shared memory, normalised or not, `stride` vectors apart; ends with a barrier.
template <Prologue prologue>
VOX_DEVICE void stage_rows(const GemmParams& p, int rows, uint4 first_norm, uint4* to, int stride) {
  const int vectors = static_cast<int>(p.C / kLaneValues);
  // Rows with a norm are short.
  copy_rows<prologue == Prologue::norm ? 4 : 8>(static_cast<const bf16*>(p.x), rows, vectors, to,
                                                stride);
  if constexpr (prologue == Prologue::norm) {
    VOX_SHARED(SquareSums, sums);
    add_squares(to, rows, vectors, stride, sums);
    sync_first<kGemvThreads>();
    // Each warp computes all scales, a lane one of them, in the order of rms_norm.
    const int lane = threadIdx.x % kWarp, row = lane < rows ? lane : 0;
    float sum = sums[row][0];
#pragma unroll
    for (int w = 1; w < kGemvWarps; ++w) sum += sums[row][w];
    scale_rows(p, rows, rms_scale(sum, p.C, p.eps), first_norm, to, stride);
  }
  sync_first<kGemvThreads>();
}

// The residual of row m, column n, loaded ahead of store_result().
template <Epilogue epilogue>
VOX_DEVICE bf16 load_residual(const GemmParams& p, int m, int n) {
  if constexpr (epilogue == Epilogue::add)
    return load_element_uncached(static_cast<const bf16*>(p.residual) + m * p.N + n);
  return {};
}

// Stores row m, column n of out, from its sums (SwiGLU: gate's and up's).
template <Epilogue epilogue>
VOX_DEVICE void store_result(const GemmParams& p, int m, int n,
                             const float (&sums)[products_of(epilogue)], bf16 residual) {
  float result = sums[0];
  if constexpr (epilogue == Epilogue::add) result = rounded<bf16>(result) + to_float(residual);
  if constexpr (epilogue == Epilogue::swiglu)
    result = swiglu(rounded<bf16>(sums[0]), rounded<bf16>(sums[1]));
  static_cast<bf16*>(p.out)[m * p.N + n] = from_float<bf16>(result);
}

// For up to kRows rows of x, 8 or 16.
template <int kRows, typename Sequence>
class DenseGemv {
  using Sums = float[Sequence::max_products()][kGemvWarps][kRows][kDenseTile];  // of a tile

 public:
  using Weights = Sequence;
  using Loader = DenseLoader;
  // Blocks whose registers fit on a multiprocessor.
  static VOX_HOST_DEVICE constexpr int resident() { return 3; }
  // Vectors from one row of staged x to the next. Odd chunks: the two rows that 8 lanes read
  // together lie in different banks.
  static VOX_HOST_DEVICE constexpr int stride(int64_t C) {
    return static_cast<int>((divide_up(C, kChunkColumns) | 1) * kChunkLanes);
  }
  // Stages of a tile in the busiest warp.
  static int64_t stages_of_tile(int64_t C) {
    return Sequence::max_products() * divide_up(C, kGemvWarps * kChunksPerStage * kChunkColumns);
  }
  // Bytes after the pipeline.
  static int64_t rest_bytes(const GemmParams& p, int64_t) {
    return 2 * static_cast<int64_t>(sizeof(Sums)) + p.M * stride(p.C) * 16;
  }

  VOX_DEVICE DenseGemv(unsigned char* shared, int stages, int blocks, const Sequence& sequence)
      : partials_(reinterpret_cast<Sums*>(shared + Loader::bytes(stages))),
        weights_(shared, stages, blocks, sequence) {}

  // This block's tiles. first_norm: of load_first_norm().
  template <Prologue prologue, Epilogue epilogue>
  VOX_DEVICE void run(const GemmParams& p, uint4 first_norm) {
    uint4* const staged = reinterpret_cast<uint4*>(partials_ + 2);
    stage_rows<prologue>(p, static_cast<int>(p.M), first_norm, staged, stride(p.C));
    int buffer = 0;
    for (int tile = blockIdx.x; tile * kDenseTile < p.N; tile += weights_.blocks(), buffer ^= 1)
      multiply_tile<epilogue>(p, tile, staged, partials_[buffer]);
  }

 private:
  // out's columns of one tile.
  template <Epilogue epilogue>
  VOX_DEVICE void multiply_tile(const GemmParams& p, int tile, const uint4* staged,
                                Sums& partials) {
    constexpr int kOf = products_of(epilogue);
    const int me = threadIdx.x, lane = me % kWarp, warp = me / kWarp;
    const int rows = static_cast<int>(p.M);
    const int row = me / kDenseTile, n = tile * kDenseTile + me % kDenseTile;  // stored here
    const bool stores = row < rows && n < static_cast<int>(p.N);
    const bf16 residual = stores ? load_residual<epilogue>(p, row, n) : bf16{};
    const LaneRange range(static_cast<int>(p.C));
    // The two rows of x that a lane multiplies; past the last row any will do.
    const int low_row = lane / kChunkLanes, high_row = low_row + 8;
    const uint4* const low = staged + (low_row < rows ? low_row : 0) * stride(p.C);
    const uint4* const high = staged + (high_row < rows ? high_row : 0) * stride(p.C);
#pragma unroll
    for (int of = 0; of < kOf; ++of) {
      float sums[4] = {};
      for (int stage = 0; stage < range.stages; ++stage) {
        multiply_stage(sums, weights_.acquire(), low, high,
                       range.first + stage * kChunksPerStage * kChunkLanes, range.end);
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
      for (int w = 0; w < kGemvWarps; ++w) totals[of] += partials[of][w][row][me % kDenseTile];
    store_result<epilogue>(p, row, n, totals, residual);
  }

  // sums += a stage, whose first vector of x is `first`. W is zero from `end` on.
  static VOX_DEVICE void multiply_stage(float (&sums)[4], const uint4* w, const uint4* low,
                                        const uint4* high, int first, int end) {
    // Two by two: all at once would need more registers than three resident blocks have.
#pragma unroll
    for (int c = 0; c < kChunksPerStage; c += 2) {
      uint4 x[2][2] = {};
#pragma unroll
      for (int k = 0; k < 2; ++k)
        if (const int i = first + (c + k) * kChunkLanes; i < end) {
          x[k][0] = low[i];
          if constexpr (kRows > 8) x[k][1] = high[i];
        }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const uint4 a = x[k][0], b = x[k][1], columns = w[(c + k) * kGemvThreads];
        multiply_bf16(sums, {a.x, b.x, a.y, b.y}, columns.x, columns.y);
        multiply_bf16(sums, {a.z, b.z, a.w, b.w}, columns.z, columns.w);
      }
    }
  }

  Sums* const partials_;  // two; no thread reads them when run() begins. Staged x follows.
  WeightPipeline<DenseLoader, Sequence> weights_;
};

// total += the sums of `ranges` ranges in their order, kStride floats apart. Reads 8 together,
// however few there are: an unrolled loop would take its remainder one by one, which is all of the
// 4 of 1024 columns.
template <int kStride>
VOX_DEVICE void add_ranges(float& total, const float* partials, int ranges) {
  constexpr int kAddedTogether = 8;
  for (int first = 0; first < ranges; first += kAddedTogether) {
    float sums[kAddedTogether];
#pragma unroll
    for (int r = 0; r < kAddedTogether; ++r)  // adding -0 changes no number, not even 0
      sums[r] = first + r < ranges ? partials[(first + r) * kStride] : -0.0f;
#pragma unroll
    for (int r = 0; r < kAddedTogether; ++r) total += sums[r];
  }
}

// For up to kRows rows of x: 1, 8 or 16. Matrices have one of the Sequence's two formats.
template <int kRows, typename Sequence>
class PackedGemv {
  static constexpr Format kFirst = Sequence::format(0), kOther = Sequence::format(1);
  using Shared = PackedShared<kRows>;
  static constexpr int kPartialSize = kRows * kSumStride;

 public:
  using Weights = Sequence;
  using Loader = PackedLoader<Sequence>;
  // Two where three would spill: ptxas needs more registers from sm_100 on.
  static VOX_HOST_DEVICE constexpr int resident() { return kRows > 8 || kMoreRegisters ? 2 : 3; }
  // Rows that are quantized begin in different banks.
  static VOX_HOST_DEVICE constexpr int stride(int64_t C) {
    return static_cast<int>(C / kLaneValues | 4);
  }
  static int64_t stages_of_tile(int64_t C) {
    return divide_up(Sequence::max_products() * packed_ranges(C), kGemvWarps);
  }
  // Bytes after the pipeline, for a product whose tiles `blocks` blocks share. Rows that wait for
  // their norms lie where sums come later.
  static int64_t rest_bytes(const GemmParams& p, int64_t blocks) {
    const int64_t ranges = packed_ranges(p.C);
    const int64_t items = p.epilogue == Epilogue::swiglu ? 2 * ranges : ranges;
    const int log_rows = ceil_log2(static_cast<int>(p.M));
    const int64_t sums =
        Shared::bytes(ranges, divide_up(p.N, kPackedTile) > blocks ? 2 * items : items, log_rows);
    const int64_t staged = p.prologue == Prologue::norm ? p.M * stride(p.C) * 16 : 0;
    const int64_t before = Shared::bytes(ranges, 0, log_rows) + staged;
    return sums > before ? sums : before;
  }

  VOX_DEVICE PackedGemv(unsigned char* shared, int stages, int blocks, const Sequence& sequence)
      : rest_(shared + Loader::bytes(stages)), weights_(shared, stages, blocks, sequence) {}
  // Prefetches to L2, before the wait, the two stages after the ring: 64 KB a block in int8, so
  // that a tile of 8192 columns, or two pairs of 2048, are all in flight by then.
  VOX_DEVICE void prefetch() const { weights_.prefetch(2); }

  template <Prologue prologue, Epilogue epilogue>
  VOX_DEVICE void run(const GemmParams& p, uint4 first_norm) {
    if (kFirst == kOther || p.format == kFirst)
      run<prologue, epilogue, kFirst>(p, first_norm);
    else if constexpr (prologue == Prologue::norm && epilogue == Epilogue::store)  // a head
      run<prologue, epilogue, kOther>(p, first_norm);
  }

 private:
  template <Prologue prologue, Epilogue epilogue, Format kFormat>
  VOX_DEVICE void run(const GemmParams& p, uint4 first_norm) {
    const int rows = kRows == 1 ? 1 : static_cast<int>(p.M), log_rows = ceil_log2(rows);
    const int ranges = packed_ranges(p.C);
    const Shared shared(rest_, ranges, log_rows);
    const int groups = static_cast<int>(p.C) / kGroupColumns;
    constexpr bool kStaged = prologue == Prologue::norm;
    SourceRows<bf16, kStaged> x = {static_cast<const bf16*>(p.x), p.C, true};
    if constexpr (kStaged) {
      uint4* const staged = reinterpret_cast<uint4*>(shared.partials);
      stage_rows<prologue>(p, rows, first_norm, staged, stride(p.C));
      x = {reinterpret_cast<bf16*>(staged), stride(p.C) * kLaneValues, true};
    }
    quantize_rows<kFormat>(x, rows, log_rows, 0, groups, shared);
    sync_first<kGemvThreads>();
    int buffer = 0;
    for (int tile = blockIdx.x; tile * kPackedTile < p.N; tile += weights_.blocks(), buffer ^= 1)
      multiply_tile<epilogue, kFormat>(
          p, rows, log_rows, ranges, tile, shared,
          shared.partials + buffer * products_of(epilogue) * ranges * kPartialSize);
  }

  // out's columns of one tile.
  template <Epilogue epilogue, Format kFormat>
  VOX_DEVICE void multiply_tile(const GemmParams& p, int rows, int log_rows, int ranges, int tile,
                                const Shared& shared, float* partials) {
    constexpr int kOf = products_of(epilogue);
    static_assert(kRows * kPackedTile <= kGemvThreads);
    const int me = threadIdx.x, items = kOf * ranges;
    const int row = me / kPackedTile, column = me % kPackedTile;  // that this thread stores
    const int n = tile * kPackedTile + column;
    const bool stores = row < rows && n < p.N;
    const bf16 residual = stores ? load_residual<epilogue>(p, row, n) : bf16{};
    for (int i = me / kWarp; i < items; i += kGemvWarps) {
      float sums[kRowTiles<kRows>][4];
      multiply_range<kFormat>(StagedRange<kFormat>(weights_.acquire()), shared,
                              (kOf == 2 && i >= ranges ? i - ranges : i) * kRangeGroups, rows,
                              log_rows, sums);
      weights_.release();
      store_sums<kRows>(sums, rows, partials + i * kPartialSize);
    }
    const float* const row_scales = weights_.loader().next_row_scales();
    sync_first<kGemvThreads>();
    if (!stores) return;
    float totals[kOf] = {};
    partials += row * kSumStride + column;
#pragma unroll
    for (int of = 0; of < kOf; ++of) {
      add_ranges<kPartialSize>(totals[of], partials + of * ranges * kPartialSize, ranges);
      totals[of] = __fmul_rn(totals[of], row_scales[of * kPackedTile + column]);
    }
    store_result<epilogue>(p, row, n, totals, residual);
  }

  unsigned char* const rest_;  // PackedShared
  WeightPipeline<Loader, Sequence> weights_;
};

}  // namespace
}  // namespace voxkern::gemm_kernels
