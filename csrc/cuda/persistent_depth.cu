#include "depth_attention.cuh"
#include "depth_rows.cuh"
#include "grid_barrier.cuh"
#include "persistent_depth.h"
#include "weight_queue.cuh"

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

constexpr int kMostRows = 8;
constexpr int kLeastGroups = 2, kMostGroups = 12;
constexpr int64_t kStaticBytes = 1024;  // of variables that are not in the plan, at most

using Sums = TileSums<false, After::swiglu>;

struct Plan {
  int groups;  // of the queue
  int64_t shared_bytes;
};

// Blocks for what lies between the products, at most: an H100's other 128 take a tile of o or of
// down each.
int64_t most_row_blocks() {
  const int64_t share = multiprocessors() / 33;
  return share > 2 ? share : 2;
}

// A product of a layer or position, and how far it is to the next one's weight and norm.
struct Phase {
  ProductParams product;
  int64_t weight_stride, norm_stride;  // elements
};
enum Kind { kQkv, kO, kGateUp, kDown, kHead, kKinds };

struct Arguments {
  PersistentDepthParams p;
  Phase phases[kKinds];
  DepthAttentionParams attention;  // of position 0, layer 0
  int parts;                       // of a row's attention
  int groups;                      // of the queue
  int blocks;                      // that multiply; the others have the rows
  int row_blocks;

  // Blocks that take part in a product of N columns; in what has `parts` parts a row.
  __device__ __forceinline__ int blocks_of(int64_t N) const {
    const int tiles = static_cast<int>(divide_up(N, kTileN));
    return tiles < blocks ? tiles : blocks;
  }
  __device__ __forceinline__ int blocks_of_rows(int parts) const {
    const int items = parts * static_cast<int>(p.op.B);
    return items < row_blocks ? items : row_blocks;
  }
};

// The matrices of all positions in their order.
class DepthWalk {
 public:
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
    return {static_cast<const bf16*>(phase.product.weight) + at * phase.weight_stride,
            static_cast<int>(phase.product.N), static_cast<int>(phase.product.C),
            kind_ == kGateUp ? 2 : 1};
  }

  const Arguments& all_;
  int position_ = 0, layer_ = 0, kind_ = kQkv;
};

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

// A block's part in the products, all of whose blocks come first.
class ProductPart {
 public:
  __device__ __forceinline__ ProductPart(const Arguments& all, QueueGroup* queue)
      : all_(all),
        partials_(reinterpret_cast<Sums*>(queue + all.groups)),
        weights_(queue, all.groups, all.blocks, DepthWalk(all)),
        grid_(all.p.arrived) {}

  template <Before before, After after>
  __device__ __forceinline__ bool multiply(int kind, int layer) {
    ProductParams product = all_.phases[kind].product;
    product.norm = static_cast<const bf16*>(product.norm) + layer * all_.phases[kind].norm_stride;
    const int blocks = all_.blocks_of(product.N), rows = static_cast<int>(product.M);
    if (static_cast<int>(blockIdx.x) < blocks) {
      const uint4 norm_first = first_of_norm<bf16, before>(product);
      if (!grid_.wait()) return false;
      uint4* const staged = reinterpret_cast<uint4*>(partials_ + 2);
      const int row = staged_row<bf16>(product.C);
      stage<bf16, before>(product, 0, rows, norm_first, staged, row);
      multiply_tiles<true, false, after>(product, 0, rows, all_.blocks, weights_, staged, row,
                                         reinterpret_cast<TileSums<false, after>*>(partials_));
      grid_.arrive();
    }
    grid_.next_phase(blocks);
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
  Sums* const partials_;  // two, and x behind them
  WeightQueue<true, kLeastGroups, kMostGroups, DepthWalk> weights_;
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
    grid_.next_phase(all_.blocks_of(all_.phases[kind].product.N));
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

template <int L>
__global__ void __launch_bounds__(kThreads, 1)
    persistent_depth_kernel(const __grid_constant__ Arguments all) {
  VOX_DYNAMIC_SHARED(QueueGroup, shared);
  if (static_cast<int>(blockIdx.x) < all.blocks) {
    ProductPart part(all, shared);
    each_phase(all.p.op, part);
  } else {
    RowPart<L> part(all, shared);
    each_phase(all.p.op, part);
  }
}

void (*kernel_for(const PersistentDepthParams& p))(Arguments) {
  if (p.op.layers.D == 8 * kVector<bf16>) return persistent_depth_kernel<8>;
  if (p.op.layers.D == 16 * kVector<bf16>) return persistent_depth_kernel<16>;
  return nullptr;
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

// With the longest queue that there is room for; no groups where there is none.
Plan plan_for(const PersistentDepthParams& p) {
  const LayersParams& l = p.op.layers;
  int64_t staged = 0;
  for (const int64_t C : {l.C, l.Hq * l.D, l.F}) {
    const int64_t bytes = p.op.B * staged_row<bf16>(C) * static_cast<int64_t>(sizeof(uint4));
    staged = bytes > staged ? bytes : staged;
  }
  int64_t rest = 2 * static_cast<int64_t>(sizeof(Sums)) + staged;
  for (const size_t bytes : {sizeof(DepthAttentionShared<bf16, 16>), sampler_shared_bytes(p.op.V)})
    rest = static_cast<int64_t>(bytes) > rest ? static_cast<int64_t>(bytes) : rest;
  for (int groups = kMostGroups; groups >= kLeastGroups; --groups) {
    const int64_t bytes = groups * static_cast<int64_t>(sizeof(QueueGroup)) + rest;
    if (bytes + kStaticBytes <= shared_bytes_limit() &&
        resident_blocks(kernel_for(p), kThreads, bytes) > 0)
      return {groups, bytes};
  }
  return {};
}

}  // namespace

bool fits(const PersistentDepthParams& p) {
  const DecodeDepthParams& op = p.op;
  const LayersParams& l = op.layers;
  if (op.dtype != Dtype::bf16 || op.B > kMostRows || l.L == 0 || op.V > kThreads * kHeld ||
      !kernel_for(p) || op.K > (l.D == 8 * kVector<bf16> ? kHeldKeys<8> : kHeldKeys<16>))
    return false;
  for (const Weight& weight : {l.qkv, l.o, l.gate_up, l.down, op.heads})
    if (weight.format != Format::plain || !takes_vectors<bf16>(weight.data, weight.C)) return false;
  for (const void* norm : {l.attn_norm, l.mlp_norm, l.norm})
    if (!takes_vectors<bf16>(norm, l.C)) return false;
  return plan_for(p).groups > 0;
}

void persistent_depth(const PersistentDepthParams& p, cudaStream_t stream) {
  const Plan plan = plan_for(p);
  const LayersParams& l = p.op.layers;
  const auto product = [&](const void* x, const void* norm, const Weight& weight, void* out,
                           After after = After::store) {
    const int64_t N = after == After::swiglu ? weight.N / 2 : weight.N;
    return Phase{{.dtype = Dtype::bf16,
                  .M = p.op.B,
                  .N = N,
                  .C = weight.C,
                  .x = x,
                  .norm = norm,
                  .eps = l.eps,
                  .weight = weight.data,
                  .residual = after == After::add ? out : nullptr,
                  .out = out},
                 weight.N * weight.C,
                 norm ? l.C : 0};
  };
  Arguments all = {.p = p, .attention = attention_of(p), .groups = plan.groups};
  all.parts = static_cast<int>(depth_attention_parts(all.attention));
  const int64_t items = all.parts * p.op.B, most = most_row_blocks();
  all.row_blocks = static_cast<int>(items < most ? items : most);
  all.blocks = static_cast<int>(multiprocessors()) - all.row_blocks;
  all.phases[kQkv] = product(p.residual, l.attn_norm, l.qkv, p.qkv);
  all.phases[kO] = product(p.attended, nullptr, l.o, p.residual, After::add);
  all.phases[kGateUp] = product(p.residual, l.mlp_norm, l.gate_up, p.activated, After::swiglu);
  all.phases[kDown] = product(p.activated, nullptr, l.down, p.residual, After::add);
  all.phases[kHead] = product(p.residual, l.norm, p.op.heads, p.logits);
  launch(kernel_for(p),
         {.grid = dim3(static_cast<unsigned>(multiprocessors())),
          .block = dim3(kThreads),
          .shared_bytes = static_cast<size_t>(plan.shared_bytes),
          .stream = stream,
          .resident = true},
         all);
}

}  // namespace voxkern
