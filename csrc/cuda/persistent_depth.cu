#include "depth_products.cuh"
#include "depth_rows.cuh"
#include "grid_barrier.cuh"
#include "layers.cuh"

// The depth decoder as one kernel whose blocks stay: for up to kMostRows rows in bfloat16. Its
// codes are those of decode_depth.cu's launches, for it is made of the same parts.
//
// A phase is what is a launch there (norm and qkv, attention, o, gate and up, down; the head, the
// draw), and a grid barrier lies between two. Weights depend on nothing, so a block's queue goes on
// from matrix to matrix across all phases and positions: while blocks wait for each other, and
// while two of them have the attention, the others fetch what they multiply with next.
//
// At batch 1 on an H100, us: a layer's weights take 16.6 of memory's time, a position 67.6. Behind
// `down` come 4 barriers, two small products and an attention before gate and up begin to use what
// is fetched: about 4 x 1.2 + 3. Two blocks with queues of 80 KB hold 160 KB of a multiprocessor,
// which take 6.3 to come; so memory rests for 1 to 2 a layer, and for about 6 at the draw, where 3
// more barriers come. That is 80 a position and 2.5 ms a frame, where memory alone takes 2.1; the
// launches, which cannot fetch that far ahead, are reckoned at the same. Which is faster is
// measured where they run.
namespace voxkern {
namespace {

constexpr int64_t kStaticBytes = 1024;  // of variables that are not in the plan, at most

struct Plan {
  int length;  // of the queue
  int64_t shared_bytes;
};

// Blocks for what lies between the products, at most: an H100's other 128 take a tile of o or of
// down each.
int64_t most_row_blocks() {
  const int64_t share = multiprocessors() / 33;
  return share > 2 ? share : 2;
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

// A block's part in the products, all of whose blocks come first. Products: of depth_products.cuh.
template <typename Products>
class ProductPart {
 public:
  __device__ __forceinline__ ProductPart(const Arguments& all, unsigned char* shared)
      : all_(all), products_(shared, all), grid_(all.p.arrived) {}

  template <Before before, After after>
  __device__ __forceinline__ bool multiply(int kind, int layer) {
    const Phase& phase = all_.phases[kind];
    ProductParams product = phase.product;
    product.norm = static_cast<const char*>(product.norm) + layer * phase.norm_stride;
    if (static_cast<int>(blockIdx.x) < phase.blocks) {
      const uint4 norm_first = first_of_norm<bf16, before>(product);
      if (!grid_.wait()) return false;
      products_.template multiply<before, after>(product, kind == kHead, all_.blocks, norm_first);
      grid_.arrive();
    }
    grid_.next_phase(phase.blocks);
    return true;
  }
  __device__ __forceinline__ bool attend(int, int) {
    grid_.next_phase(all_.blocks_of_rows(all_.parts));
    return true;
  }
  __device__ __forceinline__ bool draw(int) {
    grid_.next_phase(all_.blocks_of_rows(1));
    return true;
  }

 private:
  const Arguments& all_;
  Products products_;
  GridBarrier grid_;
};

// A block's part in what lies between the products. L: lanes that share a key.
template <int L>
class RowPart {
 public:
  __device__ __forceinline__ RowPart(const Arguments& all, void* shared)
      : all_(all),
        shared_(shared),
        me_(static_cast<int>(blockIdx.x) - all.blocks),
        rows_(static_cast<int>(all.p.op.B)),
        grid_(all.p.arrived) {}

  template <Before, After>
  __device__ __forceinline__ bool multiply(int kind, int) {
    grid_.next_phase(all_.phases[kind].blocks);
    return true;
  }
  __device__ __forceinline__ bool attend(int position, int layer) {
    const LayersParams& l = all_.p.op.layers;
    const int64_t cache = layer * all_.p.op.B * l.Hkv * all_.p.op.K * l.D;
    DepthAttentionParams p = all_.attention;
    p.position = position;
    p.k_cache = static_cast<bf16*>(p.k_cache) + cache;
    p.v_cache = static_cast<bf16*>(p.v_cache) + cache;
    auto& shared = *static_cast<DepthAttentionShared<bf16, L>*>(shared_);
#pragma unroll 1
    for (int i = me_; i < all_.parts * rows_; i += all_.row_blocks) {
      if (!voxkern::attend<bf16, L>(p, i % all_.parts, i / all_.parts, shared,
                                    [this] { return grid_.wait(); }))
        return false;
      __syncthreads();
    }
    end_phase(all_.parts);
    return true;
  }
  __device__ __forceinline__ bool draw(int position) {
    const DecodeDepthParams& p = all_.p.op;
    bf16* const residual = static_cast<bf16*>(all_.p.residual);
    // Blocks without a row too: then all keys of this position are there for the next one's
    // attend().
    if (!grid_.wait()) return false;
#pragma unroll 1
    for (int b = me_; b < rows_; b += all_.row_blocks) {
      if (position == 0)
        copy_row(static_cast<const bf16*>(p.audio_rows), p.code0[b], p.V, p.layers.C,
                 residual + b * p.layers.C);
      else
        draw_and_look_up(p, position, b, static_cast<const bf16*>(all_.p.logits), residual,
                         *static_cast<SamplerShared*>(shared_));
      __syncthreads();
    }
    end_phase(1);
    return true;
  }

 private:
  // Of a phase that has `parts` parts a row.
  __device__ __forceinline__ void end_phase(int parts) {
    const int blocks = all_.blocks_of_rows(parts);
    if (me_ < blocks) grid_.arrive();
    grid_.next_phase(blocks);
  }

  const Arguments& all_;
  void* const shared_;
  const int me_, rows_;
  GridBarrier grid_;
};

template <int L, typename Products>
__global__ void __launch_bounds__(kThreads, 1)
    persistent_depth_kernel(const __grid_constant__ Arguments all) {
  VOX_DYNAMIC_SHARED(unsigned char, shared);
  if (static_cast<int>(blockIdx.x) < all.blocks) {
    ProductPart<Products> part(all, shared);
    each_phase(all.p.op, part);
  } else {
    RowPart<L> part(all, shared);
    each_phase(all.p.op, part);
  }
}

using Kernel = void (*)(Arguments);

template <typename Products>
Kernel kernel_for(int64_t D) {
  if (D == 8 * kVector<bf16>) return persistent_depth_kernel<8, Products>;
  if (D == 16 * kVector<bf16>) return persistent_depth_kernel<16, Products>;
  return nullptr;
}

// call.operator()<Products>() of what takes these weights; false if there is none.
template <typename Call>
bool with_products(const PersistentDepthParams& p, const Call& call) {
  const LayersParams& l = p.op.layers;
  const Format layers = l.qkv.format, heads = p.op.heads.format;
  for (const Weight& weight : {l.o, l.gate_up, l.down})
    if (weight.format != layers) return false;
  const auto packed = [&]<Format kLayers>() {
    return p.op.B == 1
               ? call.template operator()<PackedProducts<kLayers, Format::int8, 1>>()
               : call.template operator()<PackedProducts<kLayers, Format::int8, kMostRows>>();
  };
  if (layers == Format::plain && heads == Format::plain)
    return call.template operator()<PlainProducts>();
  if (heads != Format::int8) return false;
  if (layers == Format::int8) return packed.template operator()<Format::int8>();
  return layers == Format::int4 && packed.template operator()<Format::int4>();
}

DepthAttentionParams attention_of(const PersistentDepthParams& p) {
  const LayersParams& l = p.op.layers;
  return {
      .dtype = p.op.dtype,
      .B = p.op.B,
      .Hq = l.Hq,
      .Hkv = l.Hkv,
      .D = l.D,
      .K = p.op.K,
      .position = 0,
      .qkv = p.qkv,
      .rope_table = l.rope_table,
      .k_cache = p.k_cache,
      .v_cache = p.v_cache,
      .scale = 1.0f / sqrtf(static_cast<float>(l.D)),
      .out = p.attended,
  };
}

// All but the queue's length.
template <typename Products>
Arguments arguments(const PersistentDepthParams& p) {
  const LayersParams& l = p.op.layers;
  Arguments all = {.p = p, .attention = attention_of(p)};
  all.parts = static_cast<int>(depth_attention_parts(all.attention));
  const int64_t items = all.parts * p.op.B, most = most_row_blocks();
  all.row_blocks = static_cast<int>(items < most ? items : most);
  all.blocks = static_cast<int>(multiprocessors()) - all.row_blocks;
  const auto phase = [&](const void* x, const void* norm, const Weight& weight, void* out,
                         After after = After::store) {
    const int64_t N = after == After::swiglu ? weight.N / 2 : weight.N;
    const int64_t tiles = divide_up(N, Products::kTile);
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

// With the longest queue that there is room for; of no length where there is none.
template <typename Products>
Plan plan_for(const Arguments& all) {
  int64_t rest = 0, least = static_cast<int64_t>(sampler_shared_bytes(all.p.op.V));
  for (const Phase& phase : all.phases) {
    const int64_t bytes = Products::rest_bytes(phase.product, all.blocks);
    rest = bytes > rest ? bytes : rest;
  }
  if (constexpr int64_t bytes = sizeof(DepthAttentionShared<bf16, 16>); bytes > least)
    least = bytes;
  const Kernel kernel = kernel_for<Products>(all.attention.D);
  for (int length = Products::kMost; length >= Products::kLeast; --length) {
    const int64_t needed = Products::queue_bytes(length) + rest;
    const int64_t bytes = needed > least ? needed : least;
    if (bytes + kStaticBytes <= shared_bytes_limit() &&
        resident_blocks(kernel, kThreads, bytes) > 0)
      return {length, bytes};
  }
  return {};
}

}  // namespace

bool fits(const PersistentDepthParams& p) {
  const DecodeDepthParams& op = p.op;
  const LayersParams& l = op.layers;
  const bool narrow = l.D == 8 * kVector<bf16>;
  if (op.dtype != Dtype::bf16 || op.B > kMostRows || l.L == 0 || op.V > kThreads * kHeld ||
      (!narrow && l.D != 16 * kVector<bf16>) || op.K > (narrow ? kHeldKeys<8> : kHeldKeys<16>))
    return false;
  for (const Weight& weight : {l.qkv, l.o, l.gate_up, l.down, op.heads})
    if (!takes_vectors<bf16>(weight.data, weight.C)) return false;
  for (const void* norm : {l.attn_norm, l.mlp_norm, l.norm})
    if (!takes_vectors<bf16>(norm, l.C)) return false;
  return with_products(p, [&]<typename Products>() {
    return plan_for<Products>(arguments<Products>(p)).length > 0;
  });
}

void persistent_depth(const PersistentDepthParams& p, cudaStream_t stream) {
  with_products(p, [&]<typename Products>() {
    Arguments all = arguments<Products>(p);
    const Plan plan = plan_for<Products>(all);
    all.length = plan.length;
    launch(kernel_for<Products>(p.op.layers.D),
           {.grid = dim3(static_cast<unsigned>(multiprocessors())),
            .block = dim3(kThreads),
            .shared_bytes = static_cast<size_t>(plan.shared_bytes),
            .stream = stream,
            .resident = true},
           all);
    return true;
  });
}

}  // namespace voxkern
