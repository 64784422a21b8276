#include "../decode_depth.h"

#include "arena.h"
#include "isa.h"

namespace voxkern {
namespace {

// What the threads share. A pass has B rows, the first one R = 2B.
template <typename T>
struct Shared {
  T* input;     // [R, Cb], what is projected: hidden states or audio rows
  T* branch;    // [R, C], what is added to the residual
  T* qkv;       // [R, (Hq + 2 Hkv) D]
  T* attended;  // [R, Hq D]
  T* gate_up;   // [R, 2F]
  T* product;   // [R, F]
  T* logits;    // [B, V]
  T* k_cache;   // [L, B, Hkv, K, D]
  T* v_cache;   // [L, B, Hkv, K, D]

  Shared(Arena& arena, const DecodeDepthParams& p) {
    const int64_t R = 2 * p.B;
    input = arena.take<T>(R * p.Cb);
    branch = arena.take<T>(R * p.C);
    qkv = arena.take<T>(R * (p.Hq + 2 * p.Hkv) * p.D);
    attended = arena.take<T>(R * p.Hq * p.D);
    gate_up = arena.take<T>(R * 2 * p.F);
    product = arena.take<T>(R * p.F);
    logits = arena.take<T>(p.B * p.V);
    k_cache = arena.take<T>(p.L * p.B * p.Hkv * p.K * p.D);
    v_cache = arena.take<T>(p.L * p.B * p.Hkv * p.K * p.D);
  }
};

}  // namespace
}  // namespace voxkern

#ifdef VOX_ISA
#include "depth_attention.h"
#include "gemm.h"
#include "norm.h"
#include "rotary.h"
#include "sampler.h"
#include "silu.h"
#include "team.h"

// One run() of the team makes the whole frame; between two phases, all threads meet.
//
// A thread takes the same contiguous part of every matrix's rows at every position. Attention is
// split by row and key/value head, sampling by row. The norms are a few microseconds' work on
// data that every thread needs next: each does them all, on residuals of its own.
//
// Results are rounded to the dtype where the composed ops would store them, so in float32 a frame
// is what a composition of these ops gives, and no row depends on another.
namespace voxkern {
namespace {

// What a thread has for itself.
template <typename T>
struct Private {
  T* residual;    // [R, C]
  T* normed;      // [R, C]
  T* query;       // [D], rotated
  float* scores;  // attend_row's scratch
  void* sampler;  // sample_row's scratch

  Private(Arena& arena, const DecodeDepthParams& p) {
    residual = arena.take<T>(2 * p.B * p.C);
    normed = arena.take<T>(2 * p.B * p.C);
    query = arena.take<T>(p.D);
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
      : p_(params), all_(shared), own_(own), rank_(rank), size_(size) {}

  void frame() {
    const Range mine = split(p_.B, 1, rank_, size_);
    for (int64_t b = mine.begin; b < mine.end; ++b) {
      copy(static_cast<const T*>(p_.hidden) + b * p_.Cb, all_.input + b * p_.Cb, p_.Cb);
      embed(b, 0, all_.input + (p_.B + b) * p_.Cb);
    }
    // Positions 0 and 1 are known from the start: they go through the layers together.
    for (int64_t position = 0, n = 2; position < p_.K; position += n, n = 1) {
      Team::barrier();
      layers(position, n);
      draw(position + n - 1);
    }
  }

 private:
  static void copy(const T* from, T* to, int64_t n) { __builtin_memcpy(to, from, n * sizeof(T)); }

  // The audio row of row b's code of `codebook`.
  void embed(int64_t b, int64_t codebook, T* to) {
    const int64_t code = p_.out[b * p_.K + codebook];
    copy(static_cast<const T*>(p_.audio_table) + (codebook * p_.V + code) * p_.Cb, to, p_.Cb);
  }

  // This thread's part of out [rows, N] = x [rows, C] times the transpose of weight [N, C].
  void project(const T* x, const void* weight, int64_t at, T* out, int64_t rows, int64_t C,
               int64_t N) {
    const Range part = split(N, kGrain, rank_, size_);
    multiply(x, static_cast<const T*>(weight) + at * N * C, out, rows, C, N, part.begin, part.end);
  }

  void normalise(const T* x, bool add, const void* weight, int64_t at, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i)
      normalise_row(x + i * p_.C, add ? own_.residual + i * p_.C : nullptr,
                    static_cast<const T*>(weight) + at * p_.C, own_.normed + i * p_.C, p_.C,
                    p_.eps);
  }

  // From all_.input to own_.normed, for n positions of all rows: position by position, row by row.
  void layers(int64_t position, int64_t n) {
    const int64_t rows = n * p_.B, heads = p_.Hq + 2 * p_.Hkv;
    project(all_.input, p_.projection, 0, all_.branch, rows, p_.Cb, p_.C);
    Team::barrier();
    copy(all_.branch, own_.residual, rows * p_.C);
    for (int64_t layer = 0; layer < p_.L; ++layer) {
      normalise(layer ? all_.branch : own_.residual, layer, p_.attn_norm, layer, rows);
      project(own_.normed, p_.qkv, layer, all_.qkv, rows, p_.C, heads * p_.D);
      Team::barrier();
      attend(layer, position, n);
      Team::barrier();
      project(all_.attended, p_.o, layer, all_.branch, rows, p_.Hq * p_.D, p_.C);
      Team::barrier();
      normalise(all_.branch, true, p_.mlp_norm, layer, rows);
      gate_and_up(layer, rows);
      Team::barrier();
      project(all_.product, p_.down, layer, all_.branch, rows, p_.F, p_.C);
      Team::barrier();
    }
    normalise(p_.L ? all_.branch : own_.residual, p_.L, p_.norm, 0, rows);
  }

  // A thread's gate rows and the up rows that they are multiplied with are both its own.
  void gate_and_up(int64_t layer, int64_t rows) {
    const int64_t F = p_.F;
    const Range part = split(F, kGrain, rank_, size_);
    const T* const weight = static_cast<const T*>(p_.gate_up) + layer * 2 * F * p_.C;
    for (int64_t first = 0; first <= F; first += F)
      multiply(own_.normed, weight, all_.gate_up, rows, p_.C, 2 * F, first + part.begin,
               first + part.end);
    for (int64_t i = 0; i < rows; ++i) {
      const T* const gate = all_.gate_up + i * 2 * F + part.begin;
      silu_mul_row(gate, gate + F, all_.product + i * F + part.begin, part.end - part.begin);
    }
  }

  void attend(int64_t layer, int64_t position, int64_t n) {
    const int64_t D = p_.D, group = p_.Hq / p_.Hkv, heads = p_.Hq + 2 * p_.Hkv;
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(D));
    const Range mine = split(p_.B * p_.Hkv, 1, rank_, size_);
    for (int64_t item = mine.begin; item < mine.end; ++item) {
      const int64_t b = item / p_.Hkv, kv_head = item % p_.Hkv;
      const int64_t cache = (layer * p_.B * p_.Hkv + item) * p_.K * D;
      T* const k = all_.k_cache + cache;
      T* const v = all_.v_cache + cache;
      for (int64_t t = position; t < position + n; ++t) {
        const int64_t row = (t - position) * p_.B + b;
        const T* const q = all_.qkv + row * heads * D;
        const float* const table = p_.rope_table + t * D;
        rotate(q + (p_.Hq + kv_head) * D, table, D, k + t * D);
        copy(q + (p_.Hq + p_.Hkv + kv_head) * D, v + t * D, D);
        for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
          rotate(q + head * D, table, D, own_.query);
          attend_row(own_.query, k, v, t + 1, D, scale, own_.scores,
                     all_.attended + (row * p_.Hq + head) * D);
        }
      }
    }
  }

  // Draws `codebook` for all rows, from the last B rows of the pass, and embeds the codes.
  void draw(int64_t codebook) {
    const T* const last = own_.normed + (codebook == 1 ? p_.B * p_.C : 0);
    project(last, p_.heads, codebook - 1, all_.logits, p_.B, p_.C, p_.V);
    Team::barrier();
    const Range mine = split(p_.B, 1, rank_, size_);
    for (int64_t b = mine.begin; b < mine.end; ++b) {
      const SamplerRow row = {
          .temperature = p_.temperature[b],
          .top_k = p_.top_k[b],
          .top_p = p_.top_p[b],
          .min_p = p_.min_p[b],
          .repetition_penalty = 1.0f,
          .history = nullptr,
          .W = 0,
          .seed = p_.seeds[b],
          .frame = p_.frames[b],
          .codebook = codebook,
      };
      p_.out[b * p_.K + codebook] = sample_row(all_.logits + b * p_.V, p_.V, row, own_.sampler);
      embed(b, codebook, all_.input + b * p_.Cb);
    }
  }

  const DecodeDepthParams& p_;
  const Shared<T> all_;
  const Private<T> own_;
  const int rank_, size_;
};

template <typename T>
void run(const DecodeDepthParams& p) {
  Arena shared(p.workspace);
  const Shared<T> all(shared, p);
  auto job = [&](int rank, int size) {
    Arena count(nullptr);
    Private<T>(count, p);
    // Taken by the thread that uses it, so it lies in that processor's memory.
    void* const block = __builtin_malloc(count.bytes());
    Arena arena(block);
    Worker<T>(p, all, Private<T>(arena, p), rank, size).frame();
    __builtin_free(block);
  };
  run_team(job);
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

int64_t workspace_bytes(const DecodeDepthParams& p) {
  Arena count(nullptr);
  p.dtype == Dtype::f32 ? (void)Shared<float>(count, p) : (void)Shared<uint16_t>(count, p);
  return count.bytes();
}

Tensor decode_depth_cpu(Tensor hidden, Tensor code0, Tensor audio_table, Tensor projection,
                        Tensor attn_norm, Tensor qkv, Tensor o, Tensor mlp_norm, Tensor gate_up,
                        Tensor down, Tensor norm, Tensor heads, Tensor rope_table,
                        int64_t num_heads, int64_t num_kv_heads, double eps, Tensor temperature,
                        Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds, Tensor frames) {
  hidden = torch::stable::contiguous(hidden);
  DecodeDepthParams p =
      decode_depth_params(hidden, code0, audio_table, projection, attn_norm, qkv, o, mlp_norm,
                          gate_up, down, norm, heads, rope_table, num_heads, num_kv_heads, eps,
                          temperature, top_k, top_p, min_p, seeds, frames);
  Tensor out = torch::stable::new_empty(code0, {p.B, p.K});
  p.out = static_cast<int64_t*>(out.mutable_data_ptr());
  for (int64_t b = 0; b < p.B; ++b) {
    check(p.code0[b] >= 0 && p.code0[b] < p.V, "code0: expected codes of 0 to ", p.V - 1, ", got ",
          p.code0[b], " in row ", b);
    p.out[b * p.K] = p.code0[b];
  }
  if (p.B == 0) return out;
  const Tensor workspace = torch::stable::new_empty(hidden, {workspace_bytes(p)}, ScalarType::Byte);
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
