// The phases of the depth decoder as one kernel (persistent_depth.cu): what there is to each, and
// their order, for what runs them and for the queue of weights that is ahead of it.
#pragma once

#include "cuda/attention/depth.cuh"
#include "cuda/decoder/layers.cuh"
#include "cuda/decoder/persistent_depth.h"
#include "cuda/gemm/matrix_walk.cuh"

namespace voxkern {
namespace {

// A product of a layer or position, and how far it is to the next one's weight and norm.
struct Phase {
  ProductParams product;
  int64_t weight_stride, norm_stride;  // bytes
  int blocks;                          // that have a tile of it
};
enum Kind { kQkv, kO, kGateUp, kDown, kHead, kKinds };

struct Arguments {
  PersistentDepthParams p;
  Phase phases[kKinds];
  DepthAttentionParams attention;  // of position 0, layer 0
  int parts;                       // of a row's attention
  int blocks;                      // that multiply; the others have the rows
  int row_blocks;
  int length;  // of the queue

  // Blocks that take part in what has `parts` parts a row.
  __device__ __forceinline__ int blocks_of_rows(int parts) const {
    const int items = parts * static_cast<int>(p.op.B);
    return items < row_blocks ? items : row_blocks;
  }
};

// Blocks for what lies between the products, at most: an H100's other 128 take a tile of o or of
// down each.
inline int64_t most_row_blocks() {
  const int64_t share = multiprocessors() / 33;
  return share > 2 ? share : 2;
}

// All but the queue's length, with tiles of `tile` columns.
inline Arguments arguments(const PersistentDepthParams& p, int64_t tile) {
  const LayersParams& l = p.op.layers;
  Arguments all = {};
  all.p = p;
  all.attention = depth_attention_params(p, 0, 0);
  all.parts = static_cast<int>(attention::depth_blocks_per_row(all.attention));
  const int64_t items = all.parts * p.op.B, most = most_row_blocks();
  all.row_blocks = static_cast<int>(items < most ? items : most);
  all.blocks = static_cast<int>(multiprocessors()) - all.row_blocks;
  const auto phase = [&](const void* x, const void* norm, const Weight& weight, void* out,
                         After after = After::store) {
    const int64_t N = after == After::swiglu ? weight.N / 2 : weight.N;
    const int64_t tiles = divide_up(N, tile);
    return Phase{.product = {.dtype = Dtype::bf16,
                             .M = p.op.B,
                             .N = N,
                             .C = weight.C,
                             .x = x,
                             .before = norm ? Before::norm : Before::nothing,
                             .norm = norm,
                             .eps = l.eps,
                             .format = weight.format,
                             .weight = weight.data,
                             .after = after,
                             .residual = after == After::add ? out : nullptr,
                             .out = out},
                 .weight_stride = matrix_bytes(weight, Dtype::bf16),
                 .norm_stride = norm ? l.C * element_bytes(Dtype::bf16) : 0,
                 .blocks = tiles < all.blocks ? static_cast<int>(tiles) : all.blocks};
  };
  all.phases[kQkv] = phase(p.residual, l.attn_norm, l.qkv, p.qkv);
  all.phases[kO] = phase(p.attended, nullptr, l.o, p.residual, After::add);
  all.phases[kGateUp] = phase(p.residual, l.mlp_norm, l.gate_up, p.activated, After::swiglu);
  all.phases[kDown] = phase(p.activated, nullptr, l.down, p.residual, After::add);
  all.phases[kHead] = phase(p.residual, l.norm, p.op.heads, p.logits);
  return all;
}

// Calls part.multiply<before, after>(kind, layer), part.attend(position, layer) and
// part.draw(position) for all phases in their order, until one of them is false.
template <typename Part>
__device__ __forceinline__ void each_phase(const DecodeDepthParams& p, Part& part) {
  const int K = static_cast<int>(p.K), L = static_cast<int>(p.layers.L);
#pragma unroll 1
  for (int position = 0; position < K; ++position) {
    // Behind the last layer comes the head.
#pragma unroll 1
    for (int layer = 0; layer < L + (position > 0); ++layer) {
      const bool head = layer == L;
      if (!part.template multiply<Before::norm, After::store>(head ? kHead : kQkv,
                                                              head ? 0 : layer))
        return;
      if (head) break;
      if (!part.attend(position, layer)) return;
      if (position == 0 && layer == L - 1) break;
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        if (half && !part.template multiply<Before::norm, After::swiglu>(kGateUp, layer)) return;
        if (!part.template multiply<Before::nothing, After::add>(half ? kDown : kO, layer)) return;
      }
    }
    if (!part.draw(position)) return;
  }
}

// The matrices of all positions in their order.
template <Format kLayers, Format kHeads>
class DepthWalk {
 public:
  static constexpr int kOf = 2;
  static constexpr Format kFormats[] = {kLayers, kHeads};

  __device__ __forceinline__ explicit DepthWalk(const Arguments& all) : all_(all) {}

  __device__ __forceinline__ Matrix first() const { return here(); }
  __device__ __forceinline__ bool next(Matrix& matrix) {
    const int K = static_cast<int>(all_.p.op.K), L = static_cast<int>(all_.p.op.layers.L);
    if (position_ == K) return false;
    // Of position 0's last layer only the keys are wanted.
    if (kind_ == kHead || (position_ == 0 && layer_ == L - 1)) {
      ++position_;
      layer_ = 0;
      kind_ = kQkv;
    } else if (kind_ == kDown) {
      kind_ = ++layer_ < L ? kQkv : kHead;
    } else {
      ++kind_;
    }
    if (position_ == K) return false;
    matrix = here();
    return true;
  }

 private:
  __device__ __forceinline__ Matrix here() const {
    const Phase& phase = all_.phases[kind_];
    const int64_t at = kind_ == kHead ? position_ - 1 : layer_;
    return {static_cast<const char*>(phase.product.weight) + at * phase.weight_stride,
            static_cast<int>(phase.product.N), static_cast<int>(phase.product.C),
            kind_ == kGateUp ? 2 : 1, kind_ == kHead ? kHeads : kLayers};
  }

  const Arguments& all_;
  int position_ = 0, layer_ = 0, kind_ = kQkv;
};

}  // namespace
}  // namespace voxkern
