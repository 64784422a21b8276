// linear of packed weights (packed_product.cuh). Shapes of a block:
//
// - Up to 8 rows of x: 16 rows of W, and a warp for each range of 256 columns, so that a matrix of
//   few rows that are long (down [1024, 8192]: 64 blocks) still has all of it under way at once.
// - More, 32 at a time: 128 rows of W, so that x is read and quantized once for many of them.
// - The same where that would leave multiprocessors idle: 16 rows of W, 8 ranges at a time.
//
// Floor on an H100: CSM's gate and up [16384, 2048] 33.5 MB in int8, 10 us, and 17.8 MB in int4,
// 5.3 us; its depth decoder's [16384, 1024] the half.
#include "ops.cuh"
#include "packed_product.cuh"

namespace voxkern {
namespace {

constexpr int kWide = 8;  // blocks of 16 rows
constexpr int64_t kMultiprocessors = 128;

// Threads of a block by rows of x. A warp's weights are 32 registers, more rows than one take some
// more; and each thread has few outputs.
template <int kTile>
constexpr int kMost = kTile == 1   ? 1024
                      : kTile == 8 ? 512
                                   : 256;
template <int kTile>
constexpr int kLeast = kTile == 1   ? 32
                       : kTile == 8 ? 128
                                    : 256;

// blockIdx.x counts tiles of x, so that the next blocks find the weights still near.
template <typename T, Format kFormat, int kBlocks, int kTile>
__global__ void __launch_bounds__(kMost<kTile>, kTile == 32 ? 2 : 1) packed_kernel(LinearParams p) {
  constexpr int kRows = kBlocks * static_cast<int>(kBlockRows);
  constexpr int kOutputs = divide_up(kRows * kTile, kLeast<kTile>);
  const int64_t m = kTile == 32 ? static_cast<int64_t>(blockIdx.x) * kTile : 0;
  const int64_t n = static_cast<int64_t>(kTile == 32 ? blockIdx.y : blockIdx.x) * kRows;
  const int64_t N = p.weight.N, C = p.weight.C;
  const char* const weight = static_cast<const char*>(p.weight.data);
  T* const out = static_cast<T*>(p.out) + m * N + n;
  packed_product<kFormat, kBlocks, kTile, kOutputs>(
      [&](int i) {
        const int64_t block = n / kBlockRows + i;
        return block * kBlockRows < N ? weight + block * block_bytes(kFormat, C) : nullptr;
      },
      static_cast<int>(C),
      PlainRows<T>{.x = static_cast<const T*>(p.x) + m * C,
                   .C = C,
                   .aligned = reinterpret_cast<uintptr_t>(p.x) % 16 == 0},
      kTile == 1 ? 1 : static_cast<int>(p.M - m < kTile ? p.M - m : kTile),
      [&](int row, int at, float sum) {
        if (n + row < N) out[at * N + row] = from_float<T>(sum);
      });
}

template <typename T, Format kFormat, int kBlocks, int kTile>
void launch_blocks(const LinearParams& p, cudaStream_t stream, bool overlaps_previous) {
  const int log_rows = log_up(static_cast<int>(p.M < kTile ? p.M : kTile));
  const int64_t ranges = divide_up(p.weight.C, kRange * kGroup);
  unsigned threads = block_size(ranges * kBlocks * kWarp, kMost<kTile>);
  if (threads < kLeast<kTile>) threads = kLeast<kTile>;
  const unsigned blocks = static_cast<unsigned>(divide_up(p.weight.N, kBlocks * kBlockRows));
  launch(packed_kernel<T, kFormat, kBlocks, kTile>,
         {.grid = kTile == 32 ? dim3(static_cast<unsigned>(divide_up(p.M, kTile)), blocks)
                              : dim3(blocks),
          .block = dim3(threads),
          .shared_bytes = PackedShared<kTile>::bytes(threads / kWarp / kBlocks, kBlocks, log_rows),
          .stream = stream,
          .overlaps_previous = overlaps_previous},
         p);
}

template <typename T, Format kFormat>
void run(const LinearParams& p, cudaStream_t stream, bool overlaps_previous) {
  if (p.M == 1 && p.weight.C <= kMost<1> / kWarp * kRange * kGroup)
    launch_blocks<T, kFormat, 1, 1>(p, stream, overlaps_previous);
  else if (p.M <= 8)
    launch_blocks<T, kFormat, 1, 8>(p, stream, overlaps_previous);
  else if (divide_up(p.weight.N, kWide * kBlockRows) * divide_up(p.M, 32) >= kMultiprocessors)
    launch_blocks<T, kFormat, kWide, 32>(p, stream, overlaps_previous);
  else
    launch_blocks<T, kFormat, 1, 32>(p, stream, overlaps_previous);
}

}  // namespace

void packed_linear(const LinearParams& p, cudaStream_t stream, bool overlaps_previous) {
  if (reinterpret_cast<uintptr_t>(p.weight.data) % 16)
    throw std::runtime_error("weight: packed, expected at an address in a multiple of 16");
  const bool int8 = p.weight.format == Format::int8;
  if (p.dtype == Dtype::f32)
    int8 ? run<float, Format::int8>(p, stream, overlaps_previous)
         : run<float, Format::int4>(p, stream, overlaps_previous);
  else
    int8 ? run<bf16, Format::int8>(p, stream, overlaps_previous)
         : run<bf16, Format::int4>(p, stream, overlaps_previous);
}

}  // namespace voxkern
