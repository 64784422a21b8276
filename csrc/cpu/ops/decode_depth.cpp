#include "params/decode_depth.h"

#include "cpu/decoder/layers.h"
#include "cpu/runtime/isa.h"

namespace voxkern {
namespace {

// Buffers shared by the threads. A pass has B rows, the first one 2B.
template <typename T>
struct Shared {
  LayerBuffers<T> layers;
  T* logits;   // [B, V]
  T* k_cache;  // [L, B, Hkv, K, D]
  T* v_cache;  // [L, B, Hkv, K, D]

  Shared(Arena& arena, const DecodeDepthParams& p) : layers(arena, p.layers, 2 * p.B) {
    const int64_t cache = p.layers.L * p.B * p.layers.Hkv * p.K * p.layers.D;
    logits = arena.take<T>(p.B * p.V);
    k_cache = arena.take<T>(cache);
    v_cache = arena.take<T>(cache);
  }
};

}  // namespace
}  // namespace voxkern

#ifdef VOX_ISA
#include "cpu/attention/depth_attention.h"
#include "cpu/runtime/team.h"
#include "cpu/sampling/sampler.h"
#include "cpu/simd/rotary.h"

// One run() of the team computes the whole frame, with a barrier between phases. layers.h says how
// the threads partition a layer and where results round. Attention is partitioned by row and
// key/value head, sampling by row.
namespace voxkern {
namespace {

// A thread's own buffers.
template <typename T>
struct Private {
  LayerRows<T> rows;
  T* query;       // [D], rotated
  float* scores;  // attend_row's scratch
  void* sampler;  // sample_row's scratch

  Private(Arena& arena, const DecodeDepthParams& p, const Shared<T>&)
      : rows(arena, p.layers, 2 * p.B, p.Cb) {
    query = arena.take<T>(p.layers.D);
    scores = arena.take<float>(attend_scratch(p.K));
    sampler = arena.take<char>(sampler_scratch_bytes(p.V));
  }
};

// One thread's part of the call.
template <typename T>
class Worker {
 public:
  Worker(const DecodeDepthParams& params, const Shared<T>& shared, const Private<T>& own, int rank,
         int size)
      : p_(params),
        shared_(shared),
        own_(own),
        rank_(rank),
        size_(size),
        layers_(params.layers, shared.layers, own.rows, rank, size) {}

  void run() const {
    const T* const hidden = static_cast<const T*>(p_.hidden);
    layers_.project_part(hidden, p_.B, p_.projection, 0, shared_.layers.branch);
    // The inputs of positions 0 and 1 are known from the start: they share one pass.
    for (int64_t position = 0, n = 2; position < p_.K; position += n, n = 1) {
      Team::barrier();
      for (int64_t i = 0; i < n * p_.B; ++i)
        copy(input(position + i / p_.B, i % p_.B), own_.rows.residual + i * p_.layers.C,
             p_.layers.C);
      layers_.run(n * p_.B, [&](int64_t layer) { attend(layer, position, n); });
      draw(position + n - 1);
    }
  }

 private:
  static void copy(const T* from, T* to, int64_t n) { __builtin_memcpy(to, from, n * sizeof(T)); }

  // Row b's input of a position: the projected hidden state at 0, then the embeddings of codes.
  const T* input(int64_t position, int64_t b) const {
    if (position == 0) return shared_.layers.branch + b * p_.layers.C;
    const int64_t codebook = position - 1, drawn = p_.out[b * p_.K + codebook];
    const int64_t code = drawn < 0 ? 0 : drawn;  // sample_row() may have drawn none
    return static_cast<const T*>(p_.audio_rows) + (codebook * p_.V + code) * p_.layers.C;
  }

  void attend(int64_t layer, int64_t position, int64_t n) const {
    const LayersParams& l = p_.layers;
    const int64_t D = l.D, group = l.Hq / l.Hkv, heads = l.Hq + 2 * l.Hkv;
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(D));
    layers_.each_head(p_.B, [&](int64_t b, int64_t kv_head) {
      const int64_t cache = ((layer * p_.B + b) * l.Hkv + kv_head) * p_.K * D;
      T* const k = shared_.k_cache + cache;
      T* const v = shared_.v_cache + cache;
      for (int64_t t = position; t < position + n; ++t) {
        const int64_t row = (t - position) * p_.B + b;
        const T* const q = shared_.layers.qkv + row * heads * D;
        const float* const table = l.rope_table + t * D;
        rotate(q + (l.Hq + kv_head) * D, table, D, k + t * D);
        copy(q + (l.Hq + l.Hkv + kv_head) * D, v + t * D, D);
        for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
          rotate(q + head * D, table, D, own_.query);
          attend_row(own_.query, k, v, t + 1, D, scale, own_.scores,
                     shared_.layers.attended + (row * l.Hq + head) * D);
        }
      }
    });
  }

  // Draws the codes of `codebook` from the last B rows of the pass.
  void draw(int64_t codebook) const {
    const T* const last = own_.rows.normed + (codebook == 1 ? p_.B * p_.layers.C : 0);
    layers_.project_part(last, p_.B, p_.heads, codebook - 1, shared_.logits);
    Team::barrier();
    const Range mine = partition(p_.B, 1, rank_, size_);
    for (int64_t b = mine.begin; b < mine.end; ++b) {
      const SamplerRow row = sampler_row(p_, b, codebook);
      p_.out[b * p_.K + codebook] = sample_row(shared_.logits + b * p_.V, p_.V, row, own_.sampler);
    }
  }

  const DecodeDepthParams& p_;
  const Shared<T> shared_;
  const Private<T> own_;
  const int rank_, size_;
  const Layers<T> layers_;
};

template <typename T>
void run(const DecodeDepthParams& p) {
  Arena arena(p.workspace);
  run_workers<Worker<T>, Private<T>>(p, Shared<T>(arena, p));
}

}  // namespace

namespace VOX_ISA {
void decode_depth(const DecodeDepthParams& p) {
  p.dtype == Dtype::f32 ? run<float>(p) : run<bf16>(p);
}
}  // namespace VOX_ISA

}  // namespace voxkern

#else

namespace voxkern {

VOX_KERNEL(decode_depth, DecodeDepthParams)

namespace {

Tensor decode_depth_cpu(Tensor hidden, Tensor code0, Tensor audio_rows, Tensor projection,
                        Tensor attn_norm, Tensor qkv, Tensor o, Tensor mlp_norm, Tensor gate_up,
                        Tensor down, Tensor norm, Tensor heads, Tensor rope_table,
                        int64_t num_heads, int64_t num_kv_heads, double eps, Tensor temperature,
                        Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds, Tensor frames) {
  hidden = torch::stable::contiguous(hidden);
  DecodeDepthParams p =
      decode_depth_params(hidden, code0, audio_rows, projection, attn_norm, qkv, o, mlp_norm,
                          gate_up, down, norm, heads, rope_table, num_heads, num_kv_heads, eps,
                          temperature, top_k, top_p, min_p, seeds, frames);
  Tensor out = torch::stable::new_empty(code0, {p.B, p.K});
  p.out = static_cast<int64_t*>(out.mutable_data_ptr());
  for (int64_t b = 0; b < p.B; ++b) {
    check(p.code0[b] >= -1 && p.code0[b] < p.V, "code0: expected codes of -1 to ", p.V - 1,
          ", got ", p.code0[b], " in row ", b);
    p.out[b * p.K] = p.code0[b];
  }
  if (p.B == 0) return out;
  const int64_t bytes =
      p.dtype == Dtype::f32 ? arena_bytes<Shared<float>>(p) : arena_bytes<Shared<uint16_t>>(p);
  const Tensor workspace = torch::stable::new_empty(hidden, {bytes}, ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();
  decode_depth(p);
  return out;
}

}  // namespace
}  // namespace voxkern

STABLE_TORCH_LIBRARY_IMPL(voxkern, CPU, m) {
  m.impl("decode_depth", TORCH_BOX(&voxkern::decode_depth_cpu));
}

#endif
