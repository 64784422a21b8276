// One thread's part of a stack of Llama layers inside a run() of the team, for decode_backbone and
// decode_depth. Host and ISA passes include it; only ISA passes see Layers.
//
// A thread computes the same rows of every matrix at each step. If the key/value heads divide
// evenly among the threads, a thread projects and attends with heads of its own, and there are four
// barriers per layer: after attention, o, gate and up, and down. Otherwise the rows of qkv are
// split as evenly as possible, with a fifth barrier after qkv. The norms take a few microseconds on
// data that every thread needs next, so each thread computes all of them on its own copy of the
// residual. The same holds for quantizing the input of a packed weight, except for down's wide
// input, which each thread quantizes where it computes it.
//
// Results are rounded to the dtype where the separate ops would store them, so in float32 the
// layers equal the composition of those ops, and no row depends on another.
#pragma once

#include "common/arena.h"
#include "common/layers.h"
#include "cpu/gemm/quantize.h"

namespace voxkern {
namespace {

// Buffers shared by the threads, for up to R rows.
template <typename T>
struct LayerBuffers {
  T* branch;    // [R, C], the next addend of the residual
  T* qkv;       // [R, (Hq + 2 Hkv) D]
  T* attended;  // [R, Hq D]
  T* gate_up;   // [R, 2F]
  T* product;   // [R, F]
  QuantizedRows quantized_product;

  LayerBuffers(Arena& arena, const LayersParams& p, int64_t R)
      : quantized_product(arena, p.down.format == Format::plain ? 0 : R, p.F) {
    branch = arena.take<T>(R * p.C);
    qkv = arena.take<T>(R * (p.Hq + 2 * p.Hkv) * p.D);
    attended = arena.take<T>(R * p.Hq * p.D);
    gate_up = arena.take<T>(R * 2 * p.F);
    product = arena.take<T>(R * p.F);
  }
};

}  // namespace
}  // namespace voxkern

#ifdef VOX_ISA
#include "cpu/gemm/project.h"
#include "cpu/simd/norm.h"
#include "cpu/simd/silu.h"

namespace voxkern {
namespace {

// A thread's own buffers, for up to R rows.
template <typename T>
struct LayerRows {
  T* residual;  // [R, C]
  T* normed;    // [R, C]
  QuantizedRows quantized;

  // `width`: columns of the widest input of project_part() outside the layers.
  LayerRows(Arena& arena, const LayersParams& p, int64_t R, int64_t width = 0)
      : quantized(arena, R, widest(p, width)) {
    residual = arena.take<T>(R * p.C);
    normed = arena.take<T>(R * p.C);
  }

 private:
  static int64_t widest(const LayersParams& p, int64_t width) {
    if (p.C > width) width = p.C;
    return p.Hq * p.D > width ? p.Hq * p.D : width;
  }
};

template <typename T>
class Layers {
 public:
  Layers(const LayersParams& params, const LayerBuffers<T>& shared, const LayerRows<T>& own,
         int rank, int size)
      : p_(params),
        shared_(shared),
        own_(own),
        rank_(rank),
        size_(size),
        owns_heads_(params.Hkv % size == 0 && params.D % kRowGrain == 0) {}

  // True if this thread itself projected everything that its each_head() reads.
  bool owns_heads() const { return owns_heads_; }

  // Calls f(b, kv_head) for this thread's part of the key/value heads of B rows.
  template <typename F>
  void each_head(int64_t B, const F& f) const {
    if (owns_heads_) {
      const Range mine = partition(p_.Hkv, 1, rank_, size_);
      for (int64_t b = 0; b < B; ++b)
        for (int64_t h = mine.begin; h < mine.end; ++h) f(b, h);
    } else {
      const Range mine = partition(B * p_.Hkv, 1, rank_, size_);
      for (int64_t i = mine.begin; i < mine.end; ++i) f(i / p_.Hkv, i % p_.Hkv);
    }
  }

  // Computes this thread's part of out [rows, N] = x [rows, C] W^T, W = matrix `index` of `weight`.
  void project_part(const T* x, int64_t rows, const Weight& weight, int64_t index, T* out) const {
    quantize_for(weight, x, rows);
    project(x, own_.quantized, rows, weight, index, {part_of(weight.N)}, out);
  }

  // Runs all layers on `rows` rows, from own.residual to own.normed. attend(layer) computes this
  // thread's part of the attention from shared.qkv to shared.attended.
  template <typename Attend>
  void run(int64_t rows, const Attend& attend) const {
    for (int64_t layer = 0; layer < p_.L; ++layer) {
      normalise(layer ? shared_.branch : own_.residual, layer, p_.attn_norm, layer, rows);
      project_heads(layer, rows);
      if (!owns_heads_) Team::barrier();
      attend(layer);
      Team::barrier();
      project_part(shared_.attended, rows, p_.o, layer, shared_.branch);
      Team::barrier();
      normalise(shared_.branch, true, p_.mlp_norm, layer, rows);
      gate_and_up(layer, rows);
      Team::barrier();
      project(shared_.product, shared_.quantized_product, rows, p_.down, layer, {part_of(p_.C)},
              shared_.branch);
      Team::barrier();
    }
    normalise(p_.L ? shared_.branch : own_.residual, p_.L, p_.norm, 0, rows);
  }

 private:
  Range part_of(int64_t n, int64_t grain = kRowGrain) const {
    return partition(n, grain, rank_, size_);
  }

  void quantize_for(const Weight& weight, const T* x, int64_t rows) const {
    if (weight.format != Format::plain)
      quantize(x, own_.quantized, rows, weight.C, 0, rows * weight.C);
  }

  void normalise(const T* x, bool add, const void* weight, int64_t at, int64_t rows) const {
    for (int64_t i = 0; i < rows; ++i)
      normalise_row(x + i * p_.C, add ? own_.residual + i * p_.C : nullptr,
                    static_cast<const T*>(weight) + at * p_.C, own_.normed + i * p_.C, p_.C,
                    p_.eps);
  }

  void project_heads(int64_t layer, int64_t rows) const {
    if (!owns_heads_) return project_part(own_.normed, rows, p_.qkv, layer, shared_.qkv);
    const Range mine = partition(p_.Hkv, 1, rank_, size_);
    const int64_t begin = mine.begin * p_.D, end = mine.end * p_.D, group = p_.Hq / p_.Hkv;
    const int64_t k = p_.Hq * p_.D, v = k + p_.Hkv * p_.D;
    const Range q_rows = {begin * group, end * group};
    quantize_for(p_.qkv, own_.normed, rows);
    project(own_.normed, own_.quantized, rows, p_.qkv, layer,
            {q_rows, Range{k + begin, k + end}, Range{v + begin, v + end}}, shared_.qkv);
  }

  // A thread computes its gate rows and the up rows that multiply them.
  void gate_and_up(int64_t layer, int64_t rows) const {
    const int64_t F = p_.F;
    const bool packed_down = p_.down.format != Format::plain;
    const Range gates = part_of(F, packed_down ? kGroup : kRowGrain);
    const Range ups = {F + gates.begin, F + gates.end};
    quantize_for(p_.gate_up, own_.normed, rows);
    project(own_.normed, own_.quantized, rows, p_.gate_up, layer, {gates, ups}, shared_.gate_up);
    for (int64_t i = 0; i < rows; ++i) {
      const T* const row = shared_.gate_up + i * 2 * F;
      silu_mul_row(row + gates.begin, row + ups.begin, shared_.product + i * F + gates.begin,
                   gates.end - gates.begin);
      if (packed_down)
        quantize(shared_.product, shared_.quantized_product, rows, F, i * F + gates.begin,
                 i * F + gates.end);
    }
  }

  const LayersParams& p_;
  const LayerBuffers<T> shared_;
  const LayerRows<T> own_;
  const int rank_, size_;
  const bool owns_heads_;
};

}  // namespace
}  // namespace voxkern
#endif
