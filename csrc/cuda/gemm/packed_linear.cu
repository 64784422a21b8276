// linear of packed weights. Up to 16 rows of x, in float32 8, are packed_product.cu's; more than
// those, and rows that it does not take, go 32 at a time (packed_tiles.cuh). Shapes of a block:
//
// - 128 rows of W, so that x is read and quantized once for many of them.
// - Where that would leave multiprocessors idle: 16 rows of W, 8 ranges at a time.
#include "cuda/gemm/packed_tiles.cuh"
#include "cuda/ops/ops.cuh"

namespace voxkern {
namespace {

constexpr int kWide = 8;            // blocks of 16 rows
constexpr int64_t kWideFrom = 128;  // blocks: nearly one a multiprocessor of an H100

template <typename T, Format kFormat, int kBlocks>
void launch_blocks(const LinearParams& p, cudaStream_t stream, bool overlaps_previous) {
  const int log_rows = log_up(static_cast<int>(p.M < kTileM ? p.M : kTileM));
  const int64_t blocks = divide_up(p.weight.N, kBlocks * kBlockRows);
  if (blocks > 65535)  // the grid's second dimension is 16 bits wide
    throw std::runtime_error("weight: packed, on CUDA expected at most " +
                             std::to_string(65535 * kBlocks * kBlockRows) + " rows");
  launch(
      packed_tile_kernel<T, kFormat, kBlocks>,
      {.grid = dim3(static_cast<unsigned>(divide_up(p.M, kTileM)), static_cast<unsigned>(blocks)),
       .block = dim3(kThreads),
       .shared_bytes = static_cast<size_t>(
           PackedShared<kTileM>::bytes(kThreads / kWarp / kBlocks, kThreads / kWarp, log_rows)),
       .stream = stream,
       .overlaps_previous = overlaps_previous},
      p);
}

template <typename T, Format kFormat>
void run(const LinearParams& p, cudaStream_t stream, bool overlaps_previous) {
  if (divide_up(p.weight.N, kWide * kBlockRows) * divide_up(p.M, kTileM) >= kWideFrom)
    launch_blocks<T, kFormat, kWide>(p, stream, overlaps_previous);
  else
    launch_blocks<T, kFormat, 1>(p, stream, overlaps_previous);
}

}  // namespace

void packed_linear(const LinearParams& p, cudaStream_t stream, bool overlaps_previous) {
  if (reinterpret_cast<uintptr_t>(p.weight.data) % 16)
    throw std::runtime_error("weight: packed, expected at an address in a multiple of 16");
  const ProductParams few = {.dtype = p.dtype,
                             .M = p.M,
                             .N = p.weight.N,
                             .C = p.weight.C,
                             .x = p.x,
                             .format = p.weight.format,
                             .weight = p.weight.data,
                             .out = p.out,
                             .overlaps_previous = overlaps_previous};
  if (fits(few)) return product(few, stream);
  const bool int8 = p.weight.format == Format::int8;
  if (p.dtype == Dtype::f32)
    int8 ? run<float, Format::int8>(p, stream, overlaps_previous)
         : run<float, Format::int4>(p, stream, overlaps_previous);
  else
    int8 ? run<bf16, Format::int8>(p, stream, overlaps_previous)
         : run<bf16, Format::int4>(p, stream, overlaps_previous);
}

}  // namespace voxkern
