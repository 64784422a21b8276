// A stack of layers for one token of each row, as launches of the other ops: what decode_backbone
// and decode_depth share. Results are rounded where the composed ops store them.
#pragma once

#include "../cpu/arena.h"
#include "../layers.h"
#include "ops.cuh"

namespace voxkern {
namespace {

inline int64_t element_bytes(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

inline const void* offset(const void* p, int64_t elements, Dtype dtype) {
  return static_cast<const char*>(p) + elements * element_bytes(dtype);
}
inline void* offset(void* p, int64_t elements, Dtype dtype) {
  return static_cast<char*>(p) + elements * element_bytes(dtype);
}

// Where keys and values go, and which of them each row attends to.
struct KvPlaces {
  int64_t P, S, M;            // pages of a layer, page size, pages in a row of the table
  const int64_t* positions;   // [B]
  const int64_t* slots;       // [B]
  const int32_t* page_table;  // [B, M]
  const int32_t* seq_lens;    // [B]
  void* k_pages;              // [L, P, Hkv, S, D]
  void* v_pages;              // [L, P, Hkv, S, D]
  float scale;
};

class Layers {
 public:
  void *residual, *normed, *branch;  // [B, C]

  Layers(Arena& arena, const LayersParams& params, Dtype dtype, int64_t B, const KvPlaces& places)
      : p_(params), dtype_(dtype), B_(B), places_(places) {
    const auto take = [&](int64_t columns) -> void* {
      return arena.take<char>(B * columns * element_bytes(dtype));
    };
    residual = take(p_.C);
    normed = take(p_.C);
    branch = take(p_.C);
    qkv_ = take((p_.Hq + 2 * p_.Hkv) * p_.D);
    attended_ = take(p_.Hq * p_.D);
    gate_up_ = take(2 * p_.F);
    product_ = take(p_.F);
    workspace_ = arena.take<float>(decode_attention_workspace(attention(0)));
  }

  // From `residual` to `normed`.
  void run(const KvPlaces& places, cudaStream_t stream) {
    places_ = places;
    for (int64_t layer = 0; layer < p_.L; ++layer) {
      normalise(layer > 0, p_.attn_norm, layer, stream);
      project(normed, B_, p_.qkv, layer, qkv_, stream);
      append_kv(append(layer), stream);
      decode_attention(attention(layer), workspace_, stream);
      project(attended_, B_, p_.o, layer, branch, stream);
      normalise(true, p_.mlp_norm, layer, stream);
      project(normed, B_, p_.gate_up, layer, gate_up_, stream);
      silu_mul({.dtype = dtype_, .rows = B_, .F = p_.F, .gate_up = gate_up_, .out = product_},
               stream);
      project(product_, B_, p_.down, layer, branch, stream);
    }
    normalise(p_.L > 0, p_.norm, 0, stream);
  }

  // out [rows, N] = x [rows, C] times the transpose of matrix `at`.
  void project(const void* x, int64_t rows, const Weight& weight, int64_t at, void* out,
               cudaStream_t stream) const {
    Weight one = weight;
    one.data = offset(weight.data, at * weight.N * weight.C, dtype_);
    linear({.dtype = dtype_, .M = rows, .x = x, .weight = one, .out = out}, stream);
  }

 private:
  // normed = the norm of residual, after adding the branch or not.
  void normalise(bool add, const void* weight, int64_t layer, cudaStream_t stream) const {
    rms_norm({.dtype = dtype_,
              .rows = B_,
              .C = p_.C,
              .x = add ? branch : residual,
              .residual = add ? residual : nullptr,
              .weight = offset(weight, layer * p_.C, dtype_),
              .out = normed,
              .eps = p_.eps},
             stream);
  }

  AppendKvParams append(int64_t layer) const {
    const int64_t stride = (p_.Hq + 2 * p_.Hkv) * p_.D, pages = layer * page_elements();
    return {
        .dtype = dtype_,
        .T = B_,
        .Hq = p_.Hq,
        .Hkv = p_.Hkv,
        .D = p_.D,
        .S = places_.S,
        .q = qkv_,
        .q_stride = stride,
        .k = offset(qkv_, p_.Hq * p_.D, dtype_),
        .k_stride = stride,
        .v = offset(qkv_, (p_.Hq + p_.Hkv) * p_.D, dtype_),
        .v_stride = stride,
        .rope_table = p_.rope_table,
        .positions = places_.positions,
        .slots = places_.slots,
        .k_pages = offset(places_.k_pages, pages, dtype_),
        .v_pages = offset(places_.v_pages, pages, dtype_),
    };
  }

  DecodeAttentionParams attention(int64_t layer) const {
    return {
        .dtype = dtype_,
        .B = B_,
        .Hq = p_.Hq,
        .Hkv = p_.Hkv,
        .D = p_.D,
        .S = places_.S,
        .M = places_.M,
        .q = qkv_,
        .q_stride = (p_.Hq + 2 * p_.Hkv) * p_.D,
        .k_pages = offset(places_.k_pages, layer * page_elements(), dtype_),
        .v_pages = offset(places_.v_pages, layer * page_elements(), dtype_),
        .page_table = places_.page_table,
        .seq_lens = places_.seq_lens,
        .scale = places_.scale,
        .out = attended_,
    };
  }

  int64_t page_elements() const { return places_.P * p_.Hkv * places_.S * p_.D; }

  const LayersParams p_;
  const Dtype dtype_;
  const int64_t B_;
  KvPlaces places_;
  void *qkv_, *attended_, *gate_up_, *product_;
  float* workspace_;
};

#ifdef VOX_HOST_PASS
inline void check_plain(const Weight& weight, const char* name) {
  check(weight.format == Format::plain, name, ": packed, which no CUDA kernel takes yet");
}
inline void check_plain(const LayersParams& p) {
  check_plain(p.qkv, "qkv");
  check_plain(p.o, "o");
  check_plain(p.gate_up, "gate_up");
  check_plain(p.down, "down");
}
#endif

}  // namespace
}  // namespace voxkern
