#include "cuda/runtime/elements.cuh"
#include "params/append_kv.h"

// Applies RoPE to q in place, and writes rotated k, and v, to their token's slot of the paged cache
// (neither if the slot is negative). Pages are [page, Hkv, S, D]; a row of the RoPE table is the
// D/2 cosines, then the D/2 sines.
//
// A block handles one token. Its threads loop over items: N elements at i and N at i + D/2 of one
// head, which are N rotation pairs of q or k, or 2 N elements of v to copy. N is a vector of 16
// bytes, or one element if a pointer, a stride or D/2 is not aligned to vectors. float32
// arithmetic, rounded once. q and k run the same code; only the destination differs.
//
// Floor: latency. A token of CSM's backbone (32 + 8 + 8 heads of 64 in bf16) is 6 KB read and 6 KB
// written, so 256 tokens are 0.9 us of an H100's memory; every thread has its two loads and the
// table's in flight at once.
namespace voxkern {
namespace {

constexpr int kAppendThreads = 256;

template <typename T, int N>
__global__ void __launch_bounds__(kAppendThreads) append_kv_kernel(AppendKvParams p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int64_t t = blockIdx.x, half = p.D / 2;
  const int per_head = static_cast<int>(half) / N, Hq = static_cast<int>(p.Hq),
            Hkv = static_cast<int>(p.Hkv);
  const float* const table = p.rope_table + p.positions[t] * p.D;
  const int64_t slot = p.slots[t];
  const int heads = Hq + (slot < 0 ? 0 : 2 * Hkv);
  const int64_t page_at = slot < 0 ? 0 : slot / p.S * p.Hkv * p.S + slot % p.S;
  for (int item = threadIdx.x; item < heads * per_head; item += blockDim.x) {
    const int head = item / per_head, i = item % per_head * N;
    const int64_t h = head < Hq ? head : head < Hq + Hkv ? head - Hq : head - Hq - Hkv;
    const int64_t in_page = (page_at + h * p.S) * p.D;
    const T* from;
    T* to;
    bool rotate = true;
    if (head < Hq) {
      to = static_cast<T*>(p.q) + t * p.q_stride + h * p.D;
      from = to;
    } else if (head < Hq + Hkv) {
      from = static_cast<const T*>(p.k) + t * p.k_stride + h * p.D;
      to = static_cast<T*>(p.k_pages) + in_page;
    } else {
      from = static_cast<const T*>(p.v) + t * p.v_stride + h * p.D;
      to = static_cast<T*>(p.v_pages) + in_page;
      rotate = false;
    }
    float low[N], high[N];
    load<N>(from + i, low);
    load<N>(from + half + i, high);
    if (rotate) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float cos = table[i + j], sin = table[half + i + j], a = low[j], b = high[j];
        low[j] = rotated_low(a, b, cos, sin);
        high[j] = rotated_high(a, b, cos, sin);
      }
    }
    store<N>(to + i, low);
    store<N>(to + half + i, high);
  }
}

template <typename T>
void run(const AppendKvParams& p, cudaStream_t stream) {
  const int64_t half = p.D / 2;
  const bool vectors = is_vector_aligned<T>(p.q, half) && is_vector_aligned<T>(p.k, half) &&
                       is_vector_aligned<T>(p.v, half) && is_vector_aligned<T>(p.k_pages, half) &&
                       is_vector_aligned<T>(p.v_pages, half) && p.q_stride % kVector<T> == 0 &&
                       p.k_stride % kVector<T> == 0 && p.v_stride % kVector<T> == 0;
  const int64_t items = (p.Hq + 2 * p.Hkv) * (vectors ? half / kVector<T> : half);
  launch(vectors ? append_kv_kernel<T, kVector<T>> : append_kv_kernel<T, 1>,
         {.grid = p.T, .block = block_size(items, kAppendThreads), .stream = stream}, p);
}

}  // namespace

void append_kv(const AppendKvParams& p, cudaStream_t stream) {
  if (p.T == 0) return;
  p.dtype == Dtype::f32 ? run<float>(p, stream) : run<bf16>(p, stream);
}

#ifdef VOX_HOST_PASS
void append_kv_cuda(Tensor q, Tensor k, Tensor v, Tensor rope_table, Tensor positions, Tensor slots,
                    Tensor k_pages, Tensor v_pages) {
  const AppendKvParams p =
      append_kv_params(q, k, v, rope_table, positions, slots, k_pages, v_pages);
  const OnDevice device(q);
  append_kv(p, device.stream);
}

VOX_CUDA_LIBRARY(m) { m.impl("append_kv", TORCH_BOX(&append_kv_cuda)); }
#endif

}  // namespace voxkern
