#include "cuda/attention/depth.cuh"

// Attention of the depth decoder as a kernel: one block per (part of a row, batch row), grid x =
// part (depth_blocks_per_row() of them), y = row; depth.cuh says what a part is.
//
// Only the newest key and value, in qkv, come from the preceding kernel; the cache rows before them
// were complete when this kernel was launched. So attend_depth() reads those before it calls its
// wait. Here the wait always returns true: qkv is complete. (The persistent decoder's wait may give
// up and return false.)
//
// Precondition: supports_depth_attention(). D is 32, 64 or 128 in float32, 64 or 128 in bf16; a
// block must hold all K keys, and B is at most 65535, the limit of gridDim.y.
namespace voxkern {
namespace {

template <typename T, int L>
__global__ void __launch_bounds__(attention::kDepthThreads)
    depth_attention_kernel(DepthAttentionParams p) {
  using Shared = attention::DepthShared<T, L>;
  VOX_SHARED(Shared, shared);
  attention::attend_depth<T, L>(p, blockIdx.x, blockIdx.y, shared, [] {
    let_next_kernel_start();
    wait_for_previous_kernel();
    return true;
  });
}

template <typename T>
void (*kernel_for(int64_t D))(DepthAttentionParams) {
  if (D == 8 * kVector<T>) return depth_attention_kernel<T, 8>;
  if (D == 16 * kVector<T>) return depth_attention_kernel<T, 16>;
  if constexpr (sizeof(T) == 4)
    if (D == 32 * kVector<T>) return depth_attention_kernel<T, 32>;
  return nullptr;
}

}  // namespace

bool supports_depth_attention(const DepthAttentionParams& p) {
  const bool f32 = p.dtype == Dtype::f32;
  if (!(f32 ? kernel_for<float>(p.D) : kernel_for<bf16>(p.D))) return false;
  const int64_t lanes = p.D / (f32 ? kVector<float> : kVector<bf16>);
  return p.K <= (lanes == 8 ? attention::kMaxDepthKeys<8> : attention::kMaxDepthKeys<16>) &&
         p.B <= 65535;
}

void depth_attention(const DepthAttentionParams& p, cudaStream_t stream) {
  launch(p.dtype == Dtype::f32 ? kernel_for<float>(p.D) : kernel_for<bf16>(p.D),
         {.grid = dim3(static_cast<unsigned>(attention::depth_blocks_per_row(p)),
                       static_cast<unsigned>(p.B)),
          .block = dim3(attention::kDepthThreads),
          .stream = stream,
          .overlaps_previous = true},
         p);
}

}  // namespace voxkern
