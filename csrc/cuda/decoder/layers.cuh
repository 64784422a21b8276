// A stack of layers for one token of each row, shared by decode_backbone and decode_depth. A layer
// of few rows in bfloat16 is five launches:
//
//   norm, qkv | rope, append, attention | o, residual | norm, gate and up, SwiGLU | down, residual
//
// The attention is the op's own. Where gemm() cannot fuse (many rows, odd widths, float32),
// rms_norm and silu_mul are launches of their own. Either way results are rounded where those store
// them.
#pragma once

#include "common/arena.h"
#include "common/layers.h"
#include "cuda/gemm/gemm.h"
#include "params/rms_norm.h"
#include "params/silu_mul.h"

namespace voxkern {

// Each is defined in its own ops/<op>.cu.
void rms_norm(const RmsNormParams& p, cudaStream_t stream);
void silu_mul(const SiluMulParams& p, cudaStream_t stream);

inline int64_t element_bytes(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

inline const void* offset(const void* p, int64_t elements, Dtype dtype) {
  return static_cast<const char*>(p) + elements * element_bytes(dtype);
}
inline void* offset(void* p, int64_t elements, Dtype dtype) {
  return static_cast<char*>(p) + elements * element_bytes(dtype);
}

inline int64_t matrix_bytes(const Weight& weight, Dtype dtype) {
  if (weight.format == Format::plain) return weight.N * weight.C * element_bytes(dtype);
  return divide_up(weight.N, kBlockRows) * block_bytes(weight.format, weight.C);
}
// Matrix `at` of a stack.
inline Weight matrix(Weight weight, int64_t at, Dtype dtype) {
  weight.data = static_cast<const char*>(weight.data) + at * matrix_bytes(weight, dtype);
  return weight;
}

class Layers {
 public:
  void* residual;          // [B, C], the input of run()
  void *qkv, *attended;    // [B, (Hq + 2 Hkv) D], [B, Hq D]
  void* activated;         // [B, F], of SwiGLU
  bool keys_only = false;  // of the last layer only the attention runs

  Layers(Arena& arena, const LayersParams& params, Dtype dtype, int64_t B)
      : p_(params), dtype_(dtype), B_(B) {
    const auto take = [&](int64_t columns) -> void* {
      return arena.take<char>(B * columns * element_bytes(dtype));
    };
    residual = take(p_.C);
    qkv = take((p_.Hq + 2 * p_.Hkv) * p_.D);
    attended = take(p_.Hq * p_.D);
    normed_ = take(p_.C);
    branch_ = take(p_.C);
    gate_up_ = take(2 * p_.F);
    activated = take(p_.F);
  }

  // attend(layer) is the attention between `qkv` and `attended`.
  template <typename Attend>
  void run(const Attend& attend, cudaStream_t stream) {
    for (int64_t layer = 0; layer < p_.L; ++layer) {
      const int64_t norm = layer * p_.C;
      multiply(normed(offset(p_.attn_norm, norm, dtype_), matrix(p_.qkv, layer, dtype_), qkv),
               stream);
      attend(layer);
      if (keys_only && layer == p_.L - 1) return;
      multiply(added(attended, matrix(p_.o, layer, dtype_)), stream);
      multiply(gated(offset(p_.mlp_norm, norm, dtype_), matrix(p_.gate_up, layer, dtype_)), stream);
      multiply(added(activated, matrix(p_.down, layer, dtype_)), stream);
    }
  }

  // Products for multiply(): out = x [B, C] W^T; of the residual's norm; activated = SwiGLU of the
  // residual's norm; residual += x W^T.
  GemmParams product(const void* x, const Weight& weight, void* out) const {
    return {.dtype = dtype_,
            .M = B_,
            .N = weight.N,
            .C = weight.C,
            .x = x,
            .eps = p_.eps,
            .format = weight.format,
            .weight = weight.data,
            .out = out};
  }
  GemmParams normed(const void* norm, const Weight& weight, void* out) const {
    GemmParams p = product(residual, weight, out);
    p.prologue = Prologue::norm;
    p.norm = norm;
    return p;
  }
  GemmParams gated(const void* norm, const Weight& weight) const {
    GemmParams p = normed(norm, weight, activated);
    p.N = p_.F;
    p.epilogue = Epilogue::swiglu;
    return p;
  }
  GemmParams added(const void* x, const Weight& weight) const {
    GemmParams p = product(x, weight, residual);
    p.epilogue = Epilogue::add;
    p.residual = residual;
    return p;
  }

  // One launch, or one for each op that p fuses.
  void multiply(GemmParams p, cudaStream_t stream) {
    if (!has_branch_ && can_fuse(p)) return gemm(p, stream);
    if (p.prologue == Prologue::norm) {
      normalise(p.norm, normed_, stream);
      p.prologue = Prologue::none;
      p.x = normed_;
    }
    const Epilogue epilogue = p.epilogue;
    p.epilogue = Epilogue::store;
    if (epilogue == Epilogue::swiglu) {
      p.N = 2 * p_.F;
      p.out = gate_up_;
    } else if (epilogue == Epilogue::add) {
      p.out = branch_;
      has_branch_ = true;
    }
    gemm(p, stream);
    if (epilogue == Epilogue::swiglu)
      silu_mul({.dtype = dtype_, .rows = B_, .F = p_.F, .gate_up = gate_up_, .out = activated},
               stream);
  }

  // out = the norm of the residual.
  void normalise(const void* weight, void* out, cudaStream_t stream) {
    rms_norm({.dtype = dtype_,
              .rows = B_,
              .C = p_.C,
              .x = has_branch_ ? branch_ : residual,
              .residual = has_branch_ ? residual : nullptr,
              .weight = weight,
              .out = out,
              .eps = p_.eps},
             stream);
    has_branch_ = false;
  }

 private:
  const LayersParams p_;
  const Dtype dtype_;
  const int64_t B_;
  void *normed_, *branch_, *gate_up_;
  bool has_branch_ = false;  // the residual still lacks branch_
};

#ifdef VOX_HOST_PASS
// Checks the limits of the attention kernels.
inline void check_attention(const LayersParams& p, int64_t B) {
  check(p.D <= 256, "rope_table: on CUDA expected heads of at most 256 elements, got ", p.D);
  check(B <= 65535, "on CUDA expected at most 65535 rows, got ", B);
}
#endif

}  // namespace voxkern
