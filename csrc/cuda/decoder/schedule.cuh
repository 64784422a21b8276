// The phases of the depth decoder as one kernel (persistent.cu): their order, which the blocks and
// the weight pipelines ahead of them both follow, and the arguments of each.
#pragma once

#include "cuda/decoder/depth.cuh"
#include "cuda/gemm/gemv.cuh"

namespace voxkern::decoder {
namespace {

using gemm_kernels::Matrix;

// In the order of a position. The first five are those of a layer.
enum Phase { kQkv, kAttention, kO, kGateUp, kDown, kHead, kDraw, kPhases };

// A place in the order of all phases of a frame, at first the first.
struct Schedule {
  int positions, layers;
  int position = 0, layer = 0;
  int phase = kQkv;

  VOX_DEVICE bool done() const { return position == positions; }
  VOX_DEVICE bool multiplies() const { return phase != kAttention && phase != kDraw; }
  VOX_DEVICE void next() {
    if (phase == kDraw) {
      ++position;
      layer = 0;
      phase = kQkv;
    } else if (phase == kAttention && position == 0 && layer == layers - 1) {
      phase = kDraw;  // later positions need only the keys of position 0's last layer
    } else if (phase == kDown && layer + 1 < layers) {
      ++layer;
      phase = kQkv;
    } else {
      ++phase;
    }
  }
};

// A phase that multiplies, of layer 0 or position 1, and the way to the next one's operands.
struct Product {
  GemmParams params;
  int64_t weight_stride, norm_stride;  // bytes
  int blocks;                          // that have a tile of it
};

struct Arguments {
  DepthFrame p;
  Product products[kPhases];                  // those of phases that multiply
  attention::DepthAttentionParams attention;  // of position 0, layer 0
  int parts;                                  // of a row's attention
  int blocks;                                 // that multiply; the others have the rows
  int row_blocks;
  int stages;  // of a pipeline

  VOX_DEVICE Schedule schedule() const {
    return {static_cast<int>(p.op.K), static_cast<int>(p.op.layers.L)};
  }
  // Blocks that take part in a phase with `parts` parts a row.
  VOX_DEVICE int blocks_of_rows(int parts) const {
    const int items = parts * static_cast<int>(p.op.B);
    return items < row_blocks ? items : row_blocks;
  }
};

// Blocks for the phases between the products, at most: the other 128 of an H100 take a tile of o
// or of down each.
inline int64_t most_row_blocks() {
  const int64_t share = multiprocessors() / 33;
  return share > 2 ? share : 2;
}

// All arguments but the pipeline's, for products in tiles of `tile` rows of W.
inline Arguments arguments(const DepthFrame& p, const Layers& layers, int64_t tile) {
  const LayersParams& l = p.op.layers;
  Arguments all = {};
  all.p = p;
  all.attention = depth_attention_params(p, 0, 0);
  all.parts = static_cast<int>(attention::depth_blocks_per_row(all.attention));
  const int64_t items = all.parts * p.op.B, most = most_row_blocks();
  all.row_blocks = static_cast<int>(items < most ? items : most);
  all.blocks = static_cast<int>(multiprocessors()) - all.row_blocks;
  const auto set = [&](Phase phase, const GemmParams& params, const Weight& weight,
                       int64_t norm_stride) {
    const int64_t tiles = divide_up(params.N, tile);
    all.products[phase] = {.params = params,
                           .weight_stride = matrix_bytes(weight, p.op.dtype),
                           .norm_stride = norm_stride,
                           .blocks = tiles < all.blocks ? static_cast<int>(tiles) : all.blocks};
  };
  const int64_t norm_bytes = l.C * element_bytes(p.op.dtype);
  set(kQkv, layers.normed(l.attn_norm, l.qkv, p.qkv), l.qkv, norm_bytes);
  set(kO, layers.added(p.attended, l.o), l.o, 0);
  set(kGateUp, layers.gated(l.mlp_norm, l.gate_up), l.gate_up, norm_bytes);
  set(kDown, layers.added(p.activated, l.down), l.down, 0);
  set(kHead, layers.normed(l.norm, p.op.heads, p.logits), p.op.heads, 0);
  return all;
}

// The WeightSequence of a frame: the matrices of all phases that multiply.
template <Format kLayers, Format kHeads>
class DepthWeights {
 public:
  static VOX_HOST_DEVICE constexpr int max_products() { return 2; }
  static VOX_HOST_DEVICE constexpr int max_stages() { return kLayers == Format::plain ? 12 : 6; }
  static VOX_HOST_DEVICE constexpr Format format(int i) { return i == 0 ? kLayers : kHeads; }

  VOX_DEVICE explicit DepthWeights(const Arguments& all) : all_(all), at_(all.schedule()) {}

  VOX_DEVICE Matrix first() const { return matrix(); }
  VOX_DEVICE bool next(Matrix& next) {
    if (at_.done()) return false;
    do at_.next();
    while (!at_.done() && !at_.multiplies());
    if (at_.done()) return false;
    next = matrix();
    return true;
  }

 private:
  VOX_DEVICE Matrix matrix() const {
    const Product& product = all_.products[at_.phase];
    const bool head = at_.phase == kHead;
    const int64_t i = head ? at_.position - 1 : at_.layer;
    return {static_cast<const char*>(product.params.weight) + i * product.weight_stride,
            static_cast<int>(product.params.N), static_cast<int>(product.params.C),
            at_.phase == kGateUp ? 2 : 1, head ? kHeads : kLayers};
  }

  const Arguments& all_;
  Schedule at_;
};

}  // namespace
}  // namespace voxkern::decoder
