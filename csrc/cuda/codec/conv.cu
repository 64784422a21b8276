#include "cuda/codec/conv.cuh"
#include "cuda/codec/gemm.cuh"
#include "cuda/codec/prologues.cuh"

// A convolution is one GEMM over windows of its input. The past of the next blocks is stored by a
// launch of its own, after all blocks of the GEMM have read it.
namespace voxkern {
namespace {

// One convolution of keep_past().
struct Keep {
  float* past;           // [B, context, C]
  const float* x;        // [B, T, C]
  const bool* is_first;  // [B] or null
  int64_t items;         // B C
  int T, C, context, width;
};
constexpr int kMaxKept = 48;  // a launch's parameters have 4 KB
struct KeepBatch {
  Keep convs[kMaxKept];
};

constexpr int kKeepThreads = 256;

// A thread takes columns of a block, and for each all blocks of the past in their order: it reads
// blocks after those it writes.
__global__ void __launch_bounds__(kKeepThreads)
    keep_past_kernel(const __grid_constant__ KeepBatch batch) {
  constexpr int kBlocksInFlight = 8;
  const Keep& p = batch.convs[blockIdx.y];
  const int context = p.context, T = p.T, C = p.C;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kKeepThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kKeepThreads + threadIdx.x; i < p.items;
       i += stride) {
    const int64_t b = i / C;
    const int column = static_cast<int>(i % C);
    const bool repeats = p.is_first && p.is_first[b];
    float* const past = p.past + b * context * C + column;
    const float* const x = p.x + b * T * C;
    for (int first = 0; first < context; first += kBlocksInFlight) {
      float values[kBlocksInFlight] = {};
#pragma unroll
      for (int u = 0; u < kBlocksInFlight; ++u) {
        const int64_t at = static_cast<int64_t>(first + u) + T;
        if (first + u >= context) continue;
        if (at >= context)
          values[u] = x[(at - context) * C + column];
        else
          values[u] = repeats ? x[column % p.width] : past[at * C];
      }
#pragma unroll
      for (int u = 0; u < kBlocksInFlight; ++u)
        if (first + u < context) past[static_cast<int64_t>(first + u) * C] = values[u];
    }
  }
}

}  // namespace

void mimi_conv(const MimiConvParams& p, const MimiConvStart& start, cudaStream_t stream) {
  if (p.B == 0 || p.T == 0 || p.N == 0) return;
  const codec::Windows windows = {
      .x = p.x,
      .past = p.past,
      .is_first = start.is_first,
      .T = static_cast<int>(p.T),
      .C = static_cast<int>(p.C),
      .K = static_cast<int>(p.J * p.C),
      .dilation = static_cast<int>(p.dilation),
      .context = static_cast<int>(p.context()),
      .width = static_cast<int>(start.width),
      .elu = p.elu,
  };
  codec::gemm<true>({.M = static_cast<int>(p.B * p.T),
                     .N = static_cast<int>(p.N),
                     .K = windows.K,
                     .weight = p.weight,
                     .bias = p.bias,
                     .add = p.add,
                     .out = p.out},
                    p.dtype == Dtype::bf16, windows, stream);
}

void keep_past(const std::vector<FinishedConv>& convs, cudaStream_t stream) {
  KeepBatch batch = {};
  unsigned count = 0;
  int64_t most = 0;
  const auto flush = [&] {
    if (count == 0) return;
    const int64_t blocks = divide_up(most, kKeepThreads);
    launch(
        keep_past_kernel,
        {.grid = {blocks < 1024 ? blocks : 1024, count}, .block = kKeepThreads, .stream = stream},
        batch);
    count = 0;
    most = 0;
  };
  for (const auto& [p, start] : convs) {
    const int64_t items = p.B * p.C;
    if (p.context() == 0 || items == 0 || p.T == 0) continue;
    batch.convs[count++] = {
        .past = p.past,
        .x = p.x,
        .is_first = start.is_first,
        .items = items,
        .T = static_cast<int>(p.T),
        .C = static_cast<int>(p.C),
        .context = static_cast<int>(p.context()),
        .width = static_cast<int>(start.width),
    };
    most = items > most ? items : most;
    if (count == kMaxKept) flush();
  }
  flush();
}

}  // namespace voxkern
