#include "params/decode_backbone.h"

#include "cpu/runtime/isa.h"

#ifdef VOX_ISA
#include "cpu/attention/split_attention.h"
#include "cpu/decoder/layers.h"
#include "cpu/simd/rotary.h"

// One run() of the team computes the whole step; layers.h says how the threads partition a layer
// and where results round. In attention, a thread with key/value heads of its own appends their
// keys and values for all sequences, then computes all their splits. Otherwise the threads
// partition first the appends, then the splits of all sequences, then the query heads, with
// barriers in between. The rows of the result are partitioned, too.
namespace voxkern {
namespace {

// Buffers shared by the threads.
template <typename T>
struct Shared {
  LayerBuffers<T> layers;
  SplitBuffers splits;

  Shared(Arena& arena, const DecodeBackboneParams& p)
      : layers(arena, p.layers, p.B), splits(arena, p.seq_lens, p.B, p.layers.Hq, p.layers.D) {}
};

// A thread's own buffers.
template <typename T>
struct Private {
  LayerRows<T> rows;
  float* scratch;  // SplitAttention's

  Private(Arena& arena, const DecodeBackboneParams& p, const Shared<T>&)
      : rows(arena, p.layers, p.B),
        scratch(arena.take<float>(
            SplitAttention<T>::scratch_size(attention_params(p, 0, nullptr, nullptr)))) {}
};

// One thread's part of the call.
template <typename T>
class Worker {
 public:
  Worker(const DecodeBackboneParams& params, const Shared<T>& shared, const Private<T>& own,
         int rank, int size)
      : p_(params),
        shared_(shared),
        own_(own),
        rank_(rank),
        size_(size),
        layers_(params.layers, shared.layers, own.rows, rank, size) {}

  void run() const {
    const int64_t C = p_.layers.C;
    __builtin_memcpy(own_.rows.residual, p_.x, p_.B * C * sizeof(T));
    layers_.run(p_.B, [&](int64_t layer) { attend(layer); });
    const Range mine = partition(p_.B, 1, rank_, size_);
    __builtin_memcpy(static_cast<T*>(p_.out) + mine.begin * C, own_.rows.normed + mine.begin * C,
                     (mine.end - mine.begin) * C * sizeof(T));
  }

 private:
  void attend(int64_t layer) const {
    const DecodeAttentionParams params =
        attention_params(p_, layer, shared_.layers.qkv, shared_.layers.attended);
    const SplitAttention<T> attention(params, shared_.splits);
    layers_.each_head(p_.B, [&](int64_t b, int64_t h) { append(layer, b, h); });
    if (layers_.owns_heads()) {
      layers_.each_head(p_.B,
                        [&](int64_t b, int64_t h) { attention.attend_heads(b, h, own_.scratch); });
    } else {
      Team::barrier();
      attention.attend_part(rank_, size_, own_.scratch);
      Team::barrier();
      attention.combine_part(rank_, size_);
    }
  }

  // append_kv for sequence b, key/value head h and its query heads.
  void append(int64_t layer, int64_t b, int64_t h) const {
    const LayersParams& l = p_.layers;
    const int64_t D = l.D, group = l.Hq / l.Hkv, slot = p_.slots[b];
    const float* const table = l.rope_table + p_.positions[b] * D;
    T* const row = shared_.layers.qkv + b * (l.Hq + 2 * l.Hkv) * D;
    for (int64_t head = h * group; head < (h + 1) * group; ++head)
      rotate(row + head * D, table, D, row + head * D);
    if (slot < 0) return;
    const int64_t page = layer * p_.P + slot / p_.S;
    const int64_t at = ((page * l.Hkv + h) * p_.S + slot % p_.S) * D;
    rotate(row + (l.Hq + h) * D, table, D, static_cast<T*>(p_.k_pages) + at);
    __builtin_memcpy(static_cast<T*>(p_.v_pages) + at, row + (l.Hq + l.Hkv + h) * D, D * sizeof(T));
  }

  const DecodeBackboneParams& p_;
  const Shared<T> shared_;
  const Private<T> own_;
  const int rank_, size_;
  const Layers<T> layers_;
};

template <typename T>
void run(const DecodeBackboneParams& p) {
  run_workers<Worker<T>, Private<T>, Shared<T>>(p);
}

}  // namespace

namespace VOX_ISA {
void decode_backbone(const DecodeBackboneParams& p) {
  p.dtype == Dtype::f32 ? run<float>(p) : run<bf16>(p);
}
}  // namespace VOX_ISA

}  // namespace voxkern

#else

namespace voxkern {

VOX_KERNEL(decode_backbone, DecodeBackboneParams)

namespace {

Tensor decode_backbone_cpu(Tensor x, Tensor attn_norm, Tensor qkv, Tensor o, Tensor mlp_norm,
                           Tensor gate_up, Tensor down, Tensor norm, Tensor rope_table,
                           int64_t num_heads, int64_t num_kv_heads, double eps, Tensor positions,
                           Tensor slots, Tensor k_pages, Tensor v_pages, Tensor page_table,
                           Tensor seq_lens) {
  x = torch::stable::contiguous(x);
  Tensor out = torch::stable::empty_like(x);
  const DecodeBackboneParams p = decode_backbone_params(
      x, attn_norm, qkv, o, mlp_norm, gate_up, down, norm, rope_table, num_heads, num_kv_heads, eps,
      positions, slots, k_pages, v_pages, page_table, seq_lens, out);
  check_positions_and_slots(p.positions, p.slots, p.B, rope_table.size(0), p.P * p.S);
  check_page_table_values(p.page_table, p.seq_lens, p.B, p.M, p.S, p.P);
  if (p.B > 0) decode_backbone(p);
  return out;
}

}  // namespace
}  // namespace voxkern

STABLE_TORCH_LIBRARY_IMPL(voxkern, CPU, m) {
  m.impl("decode_backbone", TORCH_BOX(&voxkern::decode_backbone_cpu));
}

#endif
