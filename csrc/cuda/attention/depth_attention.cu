#include "cuda/attention/depth_attention.cuh"

// One launch of what depth_attention.cuh has for a block. The cache's rows were complete when the
// kernel was launched, but for the new one.
namespace voxkern {
namespace {

template <typename T, int L>
__global__ void __launch_bounds__(kAttentionThreads)
    depth_attention_kernel(DepthAttentionParams p) {
  using Shared = DepthAttentionShared<T, L>;
  VOX_SHARED(Shared, shared);
  attend<T, L>(p, blockIdx.x, blockIdx.y, shared, [] {
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

bool fits(const DepthAttentionParams& p) {
  const bool f32 = p.dtype == Dtype::f32;
  if (!(f32 ? kernel_for<float>(p.D) : kernel_for<bf16>(p.D))) return false;
  const int64_t lanes = p.D / (f32 ? kVector<float> : kVector<bf16>);
  return p.K <= (lanes == 8 ? kHeldKeys<8> : kHeldKeys<16>) && p.B <= 65535;
}

void depth_attention(const DepthAttentionParams& p, cudaStream_t stream) {
  launch(p.dtype == Dtype::f32 ? kernel_for<float>(p.D) : kernel_for<bf16>(p.D),
         {.grid = dim3(static_cast<unsigned>(depth_attention_parts(p)), static_cast<unsigned>(p.B)),
          .block = dim3(kAttentionThreads),
          .stream = stream,
          .overlaps_previous = true},
         p);
}

}  // namespace voxkern
