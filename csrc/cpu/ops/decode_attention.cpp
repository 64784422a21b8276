#include "params/decode_attention.h"

#include "cpu/runtime/isa.h"

#ifdef VOX_ISA
#include "cpu/attention/split_attention.h"

// Threads partition the splits of all sequences, then, after a barrier, the query heads, whose
// splits they combine. split_attention.h says where results round.
namespace voxkern {
namespace {

template <typename T>
void attend(const DecodeAttentionParams& p, const SplitBuffers& buffers, int rank, int size) {
  const SplitAttention<T> attention(p, buffers);
  void* const scratch = __builtin_malloc(attention.scratch_size(p) * sizeof(float));
  attention.attend_part(rank, size, static_cast<float*>(scratch));
  __builtin_free(scratch);
  if (size > 1) Team::barrier();
  attention.combine_part(rank, size);
}

template <typename T>
void run(const DecodeAttentionParams& p) {
  Arena count(nullptr);
  SplitBuffers(count, p.seq_lens, p.B, p.Hq, p.D);
  void* const block = __builtin_malloc(count.bytes());
  Arena arena(block);
  const SplitBuffers buffers(arena, p.seq_lens, p.B, p.Hq, p.D);

  if (buffers.first_split[p.B] * p.Hq * p.D * kSplit < kMinTeamWork) {
    attend<T>(p, buffers, 0, 1);
  } else {
    auto job = [&](int rank, int size) { attend<T>(p, buffers, rank, size); };
    run_team(job);
  }
  __builtin_free(block);
}

}  // namespace

namespace VOX_ISA {
void decode_attention(const DecodeAttentionParams& p) {
  p.dtype == Dtype::f32 ? run<float>(p) : run<bf16>(p);
}
}  // namespace VOX_ISA

}  // namespace voxkern

#else

namespace voxkern {

VOX_KERNEL(decode_attention, DecodeAttentionParams)

namespace {

Tensor decode_attention_cpu(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table,
                            Tensor seq_lens, double scale) {
  check_dim(q, "q", 3);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  const DecodeAttentionParams p =
      decode_attention_params(q, k_pages, v_pages, page_table, seq_lens, scale, out);
  check_page_table_values(p.page_table, p.seq_lens, p.B, p.M, p.S, k_pages.size(0));
  decode_attention(p);
  return out;
}

}  // namespace
}  // namespace voxkern

STABLE_TORCH_LIBRARY_IMPL(voxkern, CPU, m) {
  m.impl("decode_attention", TORCH_BOX(&voxkern::decode_attention_cpu));
}

#endif
