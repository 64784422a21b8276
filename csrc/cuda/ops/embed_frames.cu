#include "cuda/runtime/elements.cuh"
#include "params/embed_frames.h"

// Sums the embeddings that a frame's mask selects: frames and mask [T, K + 1], audio_table
// [K * V, C], text_table [text_rows, C], out [T, C].
//
// One block computes blockDim.x vectors (16 bytes each) of one frame's output row: grid x =
// columns, y = frame. Warp 0 lists the selected rows, up to kMaxListedRows at a time; then each
// thread adds its vector of them in float32, in the order of the codebooks with the text last, and
// rounds once. If a table or out is not aligned to 16 bytes, or C is not a multiple of a vector's
// elements, each thread handles one element instead (the scalar path). An id outside its table adds
// nothing: reporting it would need a copy to the host and a synchronisation.
//
// Floor: K + 1 rows read and 1 written, C elements each, over 3.35 TB/s: 139 KB for CSM-1B's frame
// in bf16, 11 us at 256 frames on an H100. The audio table of CSM-1B is 134 M elements (269 MB in
// bf16), so L2 helps little. With one frame, latency dominates: a round trip for the mask, one for
// the ids, then one per kRowsInFlight rows.
namespace voxkern {
namespace {

constexpr int kEmbedThreads = 128;
constexpr int kRowsInFlight = 8;     // a thread loads these before it adds them
constexpr int kMaxListedRows = 128;  // rows listed at a time

template <typename T, int N>
__global__ void __launch_bounds__(kEmbedThreads) embed_frames_kernel(EmbedFramesParams p) {
  VOX_SHARED(const T* [kMaxListedRows], rows);
  VOX_SHARED(int, count);
  const int64_t t = blockIdx.y;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;

  let_next_kernel_start();
  wait_for_previous_kernel();
  float sums[N] = {};
  for (int64_t first = 0; first <= p.K; first += kMaxListedRows) {
    if (threadIdx.x < kWarp) {
      int listed = 0;
      for (int64_t k0 = first; k0 <= p.K && k0 < first + kMaxListedRows; k0 += kWarp) {
        const int64_t k = k0 + threadIdx.x, place = t * (p.K + 1) + k;
        const bool marked = k <= p.K && p.mask[place];
        const int64_t id = marked ? p.frames[place] : -1;
        const bool used = id >= 0 && id < (k < p.K ? p.V : p.text_rows);
        const unsigned all = __ballot_sync(kWholeWarp, used);
        if (used)
          rows[listed + __popc(all & ((1u << threadIdx.x) - 1))] =
              k < p.K ? static_cast<const T*>(p.audio_table) + (k * p.V + id) * p.C
                      : static_cast<const T*>(p.text_table) + id * p.C;
        listed += __popc(all);
      }
      if (threadIdx.x == 0) count = listed;
    }
    __syncthreads();
    if (at < p.C) {
      for (int r = 0; r < count; r += kRowsInFlight) {
        float values[kRowsInFlight][N];
#pragma unroll
        for (int i = 0; i < kRowsInFlight; ++i)
          if (r + i < count) load<N>(rows[r + i] + at, values[i]);
#pragma unroll
        for (int i = 0; i < kRowsInFlight; ++i)
#pragma unroll
          for (int j = 0; j < N; ++j)
            if (r + i < count) sums[j] += values[i][j];
      }
    }
    if (first + kMaxListedRows <= p.K) __syncthreads();
  }
  if (at < p.C) store<N>(static_cast<T*>(p.out) + t * p.C + at, sums);
}

template <typename T>
void run(const EmbedFramesParams& p, cudaStream_t stream) {
  const bool vectors = is_vector_aligned<T>(p.audio_table, p.C) &&
                       is_vector_aligned<T>(p.text_table, p.C) && is_vector_aligned<T>(p.out, p.C);
  const int64_t items = vectors ? p.C / kVector<T> : p.C;
  const unsigned threads = block_size(items, kEmbedThreads);
  // gridDim.y is limited to 65535.
  for (int64_t first = 0; first < p.T; first += 65535) {
    EmbedFramesParams part = p;
    part.T = p.T - first < 65535 ? p.T - first : 65535;
    part.frames += first * (p.K + 1);
    part.mask += first * (p.K + 1);
    part.out = static_cast<T*>(p.out) + first * p.C;
    launch(vectors ? embed_frames_kernel<T, kVector<T>> : embed_frames_kernel<T, 1>,
           {.grid = {divide_up(items, threads), part.T}, .block = threads, .stream = stream}, part);
  }
}

}  // namespace

void embed_frames(const EmbedFramesParams& p, cudaStream_t stream) {
  if (p.C == 0) return;
  p.dtype == Dtype::f32 ? run<float>(p, stream) : run<bf16>(p, stream);
}

#ifdef VOX_HOST_PASS
Tensor embed_frames_cuda(Tensor frames, Tensor mask, Tensor audio_table, Tensor text_table) {
  frames = torch::stable::contiguous(frames);
  mask = torch::stable::contiguous(mask);
  check_dim(frames, "frames", 2);
  check_dim(audio_table, "audio_table", 2);
  Tensor out = torch::stable::new_empty(audio_table, {frames.size(0), audio_table.size(1)});
  const OnDevice device(frames);
  embed_frames(embed_frames_params(frames, mask, audio_table, text_table, out), device.stream);
  return out;
}

VOX_CUDA_LIBRARY(m) { m.impl("embed_frames", TORCH_BOX(&embed_frames_cuda)); }
#endif

}  // namespace voxkern
