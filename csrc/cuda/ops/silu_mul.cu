#include "cuda/runtime/elements.cuh"
#include "params/silu_mul.h"

// A thread takes one vector of a row (16 bytes of gate, 16 of up), or one element if rows are not
// aligned. float32 arithmetic, rounded once.
//
// Floor: 3 F elements a row over 3.35 TB/s: [256, 8192] bf16 3.8 us on an H100, [1, 8192] nothing
// but latency. One vector a thread keeps every load in flight at once.
namespace voxkern {
namespace {

constexpr int kSiluThreads = 256;

template <typename T, int N>
__global__ void __launch_bounds__(kSiluThreads) silu_mul_kernel(SiluMulParams p) {
  const uint32_t per_row = static_cast<uint32_t>(p.F) / N;
  const uint32_t item = blockIdx.x * blockDim.x + threadIdx.x;
  let_next_kernel_start();
  wait_for_previous_kernel();
  if (item < static_cast<uint32_t>(p.rows) * per_row) {
    const int64_t row = item / per_row, at = static_cast<int64_t>(item % per_row) * N;
    const T* const gate_row = static_cast<const T*>(p.gate_up) + row * 2 * p.F;
    float gate[N], up[N];
    load_uncached<N>(gate_row + at, gate);
    load_uncached<N>(gate_row + p.F + at, up);
#pragma unroll
    for (int j = 0; j < N; ++j) up[j] = swiglu(gate[j], up[j]);
    store<N>(static_cast<T*>(p.out) + row * p.F + at, up);
  }
}

template <typename T>
void run(const SiluMulParams& p, cudaStream_t stream) {
  const bool vectors = is_vector_aligned<T>(p.gate_up, p.F) && is_vector_aligned<T>(p.out, p.F);
  const int64_t items = p.rows * (vectors ? p.F / kVector<T> : p.F);
  if (items == 0) return;
  // 64-bit divisions would cost more than all else here.
  if (items >= (int64_t{1} << 32) - kSiluThreads)
    throw std::runtime_error("gate_up: more than 2^32 vectors");
  launch(vectors ? silu_mul_kernel<T, kVector<T>> : silu_mul_kernel<T, 1>,
         {.grid = divide_up(items, kSiluThreads), .block = kSiluThreads, .stream = stream}, p);
}

}  // namespace

void silu_mul(const SiluMulParams& p, cudaStream_t stream) {
  p.dtype == Dtype::f32 ? run<float>(p, stream) : run<bf16>(p, stream);
}

#ifdef VOX_HOST_PASS
Tensor silu_mul_cuda(Tensor gate_up) {
  gate_up = torch::stable::contiguous(gate_up);
  Tensor out = silu_mul_out(gate_up);
  const OnDevice device(gate_up);
  silu_mul(silu_mul_params(gate_up, out), device.stream);
  return out;
}

VOX_CUDA_LIBRARY(m) { m.impl("silu_mul", TORCH_BOX(&silu_mul_cuda)); }
#endif

}  // namespace voxkern
