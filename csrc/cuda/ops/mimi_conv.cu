#include <climits>

#include "cuda/codec/conv.cuh"
#include "cuda/codec/gemm.cuh"

// A convolution is one product of gemm.cuh; its Source reads the blocks of a window from x
// and the past where they lie, and takes the ELU. What comes before the next blocks is put into the
// past by a launch of its own, when all of the product's blocks have read it.
namespace voxkern {
namespace {

struct Windows {
  const float* x;     // [B, T, C]
  const float* past;  // [B, context, C]
  const bool* fresh;  // [B] or null
  int T, C, K, dilation, context, width;
  bool elu;

  // Of an output: where its block 0 would be in x and in the past, the blocks that are in the past,
  // and whether these are the stream's first sample.
  struct Row {
    int64_t in_x, in_past;
    int past_blocks;
    bool repeats;
  };
  // Blocks before it and the column in its block; elementwise the column of the window.
  template <int V>
  struct Columns {
    int blocks, column;
  };

  bool aligned(int vector) const {
    return C % vector == 0 && (width % vector == 0 || !fresh) && is_vector_aligned<float>(x, C) &&
           is_vector_aligned<float>(past, C);
  }

  template <int kM, bool kAligned>
  __device__ __forceinline__ void prepare(int, int, int, int, float (&)[kM][2]) const {}

  __device__ __forceinline__ Row row(int m, const float*) const {
    const int64_t b = m / T;
    const int t = m % T;
    Row found;
    found.in_x = (m - static_cast<int64_t>(context)) * C;
    found.past_blocks = context - t;
    found.repeats = found.past_blocks > 0 && fresh && fresh[b];
    found.in_past = found.repeats ? b * T * C : (b * context + t) * C;
    return found;
  }

  template <int V, bool kAligned>
  __device__ __forceinline__ Columns<V> columns(int k) const {
    if constexpr (!kAligned) return {0, k};
    const int tap = k / C;  // behind the last too
    return {tap * dilation, k - tap * C};
  }

  __device__ __forceinline__ const float* place(const Row& row, int blocks, int column) const {
    if (blocks >= row.past_blocks) return x + row.in_x + static_cast<int64_t>(blocks) * C + column;
    if (row.repeats) return x + row.in_past + column % width;
    return past + row.in_past + static_cast<int64_t>(blocks) * C + column;
  }

  template <int V, bool kAligned>
  __device__ __forceinline__ void read(const Row& row, const Columns<V>& columns,
                                       float (&out)[V]) const {
    if constexpr (kAligned) {
      const bool inside = columns.blocks <= context;  // the last taps' lanes may have no column
      const float* const from = inside ? place(row, columns.blocks, columns.column) : nullptr;
      codec::read_columns<V, true>(from, 0, inside ? V : 0, out);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int k = columns.column + i, tap = k / C;
        out[i] = k < K ? *place(row, tap * dilation, k - tap * C) : 0.0f;
      }
    }
  }

  template <int V>
  __device__ __forceinline__ void finish(const Row&, const Columns<V>&, float (&values)[V]) const {
    if (!elu) return;
#pragma unroll
    for (int i = 0; i < V; ++i) values[i] = values[i] > 0.0f ? values[i] : expf(values[i]) - 1.0f;
  }
};

// What keep_past() does to one convolution.
struct Keep {
  float* past;        // [B, context, C]
  const float* x;     // [B, T, C]
  const bool* fresh;  // [B] or null
  int64_t items;      // B C
  int T, C, context, width;
};
constexpr int kMostKept = 48;  // a launch's parameters have 4 KB
struct Keeps {
  Keep of[kMostKept];
};

constexpr int kThreads = 256;

// A thread takes columns of a block, and of those all blocks of the past in their order: what it
// reads lies behind what it writes.
__global__ void __launch_bounds__(kThreads) keep_past_kernel(const __grid_constant__ Keeps keeps) {
  constexpr int kAtOnce = 8;
  const Keep& p = keeps.of[blockIdx.y];
  const int context = p.context, T = p.T, C = p.C;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < p.items;
       i += stride) {
    const int64_t b = i / C;
    const int column = static_cast<int>(i % C);
    const bool repeats = p.fresh && p.fresh[b];
    float* const past = p.past + b * context * C + column;
    const float* const x = p.x + b * T * C;
    for (int first = 0; first < context; first += kAtOnce) {
      float values[kAtOnce] = {};
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int64_t at = static_cast<int64_t>(first + u) + T;
        if (first + u >= context) continue;
        if (at >= context)
          values[u] = x[(at - context) * C + column];
        else
          values[u] = repeats ? x[column % p.width] : past[at * C];
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u)
        if (first + u < context) past[static_cast<int64_t>(first + u) * C] = values[u];
    }
  }
}

}  // namespace

void mimi_conv(const MimiConvParams& p, const MimiConvStart& start, cudaStream_t stream) {
  if (p.B == 0 || p.T == 0 || p.N == 0) return;
  const Windows windows = {
      .x = p.x,
      .past = p.past,
      .fresh = start.fresh,
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
                     .out = p.out,
                     .activates = false,
                     .activation = {},
                     .splits = 0,
                     .tiles = 0,
                     .tiles_m = 0},
                    p.dtype == Dtype::bf16, windows, stream);
}

void keep_past(const std::vector<FinishedConv>& convs, cudaStream_t stream) {
  Keeps keeps = {};
  unsigned count = 0;
  int64_t most = 0;
  const auto flush = [&] {
    if (count == 0) return;
    const int64_t blocks = divide_up(most, kThreads);
    launch(keep_past_kernel,
           {.grid = dim3(static_cast<unsigned>(blocks < 1024 ? blocks : 1024), count),
            .block = dim3(kThreads),
            .stream = stream,
            .overlaps_previous = true},
           keeps);
    count = 0;
    most = 0;
  };
  for (const auto& [p, start] : convs) {
    const int64_t items = p.B * p.C;
    if (p.context() == 0 || items == 0 || p.T == 0) continue;
    keeps.of[count++] = {
        .past = p.past,
        .x = p.x,
        .fresh = start.fresh,
        .items = items,
        .T = static_cast<int>(p.T),
        .C = static_cast<int>(p.C),
        .context = static_cast<int>(p.context()),
        .width = static_cast<int>(start.width),
    };
    most = items > most ? items : most;
    if (count == kMostKept) flush();
  }
  flush();
}

}  // namespace voxkern

#ifdef VOX_HOST_PASS
#include <optional>

namespace voxkern {
namespace {

Tensor mimi_conv_cuda(Tensor x, Tensor past, Tensor weight, Tensor bias, std::optional<Tensor> add,
                      int64_t dilation, bool elu) {
  x = torch::stable::contiguous(x);
  if (add) add = torch::stable::contiguous(*add);
  MimiConvParams p = mimi_conv_params(x, past, weight, bias, add ? &*add : nullptr, dilation, elu);
  check(p.B * p.T <= INT_MAX, "x: on CUDA expected B T below 2^31, got shape ", shape_string(x));
  Tensor out = torch::stable::new_empty(x, {p.B, p.T, p.N});
  p.out = static_cast<float*>(out.mutable_data_ptr());
  const OnDevice device(x);
  mimi_conv(p, {}, device.stream);
  keep_past({{p, {}}}, device.stream);
  return out;
}

}  // namespace
}  // namespace voxkern

VOX_CUDA_LIBRARY(m) { m.impl("mimi_conv", TORCH_BOX(&voxkern::mimi_conv_cuda)); }
#endif
