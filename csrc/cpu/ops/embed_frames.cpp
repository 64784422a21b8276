#include "params/embed_frames.h"

#include "cpu/runtime/isa.h"

#ifdef VOX_ISA
#include "cpu/runtime/team.h"
#include "cpu/simd/vec.h"

// embed_frames on the CPU. A work item is kItemColumns columns of one frame. The rows whose mask is
// set are summed in float32, in codebook order and the text row last; the sum is rounded once, at
// the store.
namespace voxkern {
namespace {

constexpr int64_t kItemColumns = 256;
constexpr int kVectors = 4;  // of sums, kept in registers while rows are added

// Sums `count` rows over N vectors of columns from column i on. Without kWhole, N is 1 and only the
// first n columns of the vector exist.
template <int N, bool kWhole, typename T>
VOX_INLINE void sum_rows(const T* const* rows, int64_t count, int64_t i, int64_t n, T* out) {
  vfloat sums[N];
  clear(sums);
  for (int64_t r = 0; r < count; ++r)
    for (int v = 0; v < N; ++v)
      sums[v] += kWhole ? load(rows[r] + i + v * kWidth) : load_n(rows[r] + i, n);
  for (int v = 0; v < N; ++v) {
    if (kWhole)
      store(out + i + v * kWidth, sums[v]);
    else
      store_n(out + i, sums[v], n);
  }
}

template <typename T>
void embed_part(const EmbedFramesParams& p, int64_t t, int64_t begin, int64_t end, const T** rows) {
  int64_t count = 0;
  for (int64_t k = 0; k <= p.K; ++k) {
    if (!p.mask[t * (p.K + 1) + k]) continue;
    const int64_t id = p.frames[t * (p.K + 1) + k];
    rows[count++] = k < p.K ? static_cast<const T*>(p.audio_table) + (k * p.V + id) * p.C
                            : static_cast<const T*>(p.text_table) + id * p.C;
  }
  T* out = static_cast<T*>(p.out) + t * p.C;
  int64_t i = begin;
  for (; i + kVectors * kWidth <= end; i += kVectors * kWidth)
    sum_rows<kVectors, true>(rows, count, i, kWidth, out);
  for (; i + kWidth <= end; i += kWidth) sum_rows<1, true>(rows, count, i, kWidth, out);
  if (i < end) sum_rows<1, false>(rows, count, i, end - i, out);
}

template <typename T>
void run(const EmbedFramesParams& p) {
  const int64_t parts = (p.C + kItemColumns - 1) / kItemColumns;
  parallel_for(p.T * parts, 1, p.T * p.C * (p.K + 1), [&](int64_t first, int64_t last) {
    auto** const rows = static_cast<const T**>(__builtin_malloc((p.K + 1) * sizeof(const T*)));
    for (int64_t item = first; item < last; ++item) {
      const int64_t begin = item % parts * kItemColumns;
      const int64_t end = begin + kItemColumns < p.C ? begin + kItemColumns : p.C;
      embed_part(p, item / parts, begin, end, rows);
    }
    __builtin_free(rows);
  });
}

}  // namespace

namespace VOX_ISA {
void embed_frames(const EmbedFramesParams& p) {
  p.dtype == Dtype::f32 ? run<float>(p) : run<bf16>(p);
}
}  // namespace VOX_ISA

}  // namespace voxkern

#else

namespace voxkern {

VOX_KERNEL(embed_frames, EmbedFramesParams)

namespace {

Tensor embed_frames_cpu(Tensor frames, Tensor mask, Tensor audio_table, Tensor text_table) {
  frames = torch::stable::contiguous(frames);
  mask = torch::stable::contiguous(mask);
  check_dim(frames, "frames", 2);
  check_dim(audio_table, "audio_table", 2);
  Tensor out = torch::stable::new_empty(audio_table, {frames.size(0), audio_table.size(1)});
  const EmbedFramesParams p = embed_frames_params(frames, mask, audio_table, text_table, out);
  for (int64_t i = 0; i < p.T * (p.K + 1); ++i) {
    if (!p.mask[i]) continue;
    const int64_t column = i % (p.K + 1);
    const int64_t rows = column < p.K ? p.V : p.text_rows;
    check(p.frames[i] >= 0 && p.frames[i] < rows, "frames: expected 0 to ", rows - 1, ", the ",
          column < p.K ? "codes of a codebook" : "rows of text_table", ", got ", p.frames[i],
          " at index [", i / (p.K + 1), ", ", column, "]");
  }
  embed_frames(p);
  return out;
}

}  // namespace
}  // namespace voxkern

STABLE_TORCH_LIBRARY_IMPL(voxkern, CPU, m) {
  m.impl("embed_frames", TORCH_BOX(&voxkern::embed_frames_cpu));
}

#endif
