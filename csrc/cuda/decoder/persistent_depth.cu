#include "cuda/decoder/depth_products.cuh"
#include "cuda/decoder/depth_rows.cuh"
#include "cuda/runtime/grid_barrier.cuh"

// The depth decoder as one kernel whose blocks stay: for up to kMostRows rows in bfloat16. Its
// codes are those of decode_depth.cu's launches, for it is made of the same parts.
//
// A phase is what is a launch there (norm and qkv, attention, o, gate and up, down; the head, the
// draw), and a grid barrier lies between two. Weights depend on nothing, so a block's queue goes on
// from matrix to matrix across all phases and positions: while blocks wait for each other, and
// while the few that have the rows attend or draw, the others fetch what they multiply with next.
//
// At batch 1 on an H100, us: a layer's weights take 16.6 of memory's time, a position 67.6. Behind
// `down` come 4 barriers, two small products and an attention before gate and up begin to use what
// is fetched: about 4 x 1.2 + 3. A queue of 192 KB a multiprocessor takes 7.5 to come, about as
// long; so memory hardly rests in a layer, and for some 5 at the draw, where 3 more barriers come.
// That is 75 a position and 2.3 ms a frame, where memory alone takes 2.1; the launches, which
// cannot fetch that far ahead, are reckoned at 2.5.
//
// Packed, a position takes 34 of memory's time in int8 and 18 in int4, less than its phases one
// after the other: 22 barriers are 26, and what each does between them (x to be read, normalised
// and quantized, sums to be added, keys to be looked at) is reckoned at 1.5, 33 in all. So it is
// some 60 a position and 1.8 ms a frame in either, if no phase waits for its weights. Tiles are of
// 16 rows here: 64 of a grid's blocks have one of o and one of down besides 4 of gate and up, 290
// KB a layer in int8 and 154 in int4, the others half of that. Of those, 192 and 102 KB are under
// way ahead of a block. With 8 rows, x of down's 8192 columns and its sums take 94 KB; that leaves
// 128 and 68. The launches have the same phases, about 1.2 apart, and less ahead.
//
// With 8 rows a block that has the rows attends to 8 of them in turn, and draws 2: some 1 ms a
// frame more. V = 2051 is a tile more than a grid's 128 blocks take at a time. And of some 140 KB
// of code a block runs a part over and over that is reckoned to stay near; what it costs to fetch
// is not in these figures. Which is faster is measured where they run.
namespace voxkern {
namespace {

constexpr int kBlockThreads = kThreads + kWarp;  // the last warp is at the grid's barriers alone
constexpr int64_t kStaticBytes = 1024;           // of variables that are not in the plan, at most

struct Plan {
  int length;  // of the queue
  int64_t shared_bytes;
};

// The last warp's products.
struct Nothing {
  __device__ __forceinline__ Nothing(unsigned char*, const Arguments&) {}
  template <Before, After>
  __device__ __forceinline__ void multiply(const ProductParams&, bool, int, uint4) {}
};

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
    auto& shared = *static_cast<attention::DepthShared<bf16, L>*>(shared_);
#pragma unroll 1
    for (int i = me_; i < all_.parts * rows_; i += all_.row_blocks) {
      const auto wait = [&] { return i > me_ || grid_.wait(); };
      const bool goes_on =
          threadIdx.x < kThreads
              ? attention::attend_depth<bf16, L>(p, i % all_.parts, i / all_.parts, shared, wait)
              : wait();
      if (!goes_on) return false;
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
                         *static_cast<sampling::Shared*>(shared_));
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
__global__ void __launch_bounds__(kBlockThreads, 1)
    persistent_depth_kernel(const __grid_constant__ Arguments all) {
  static_assert(kThreads == attention::kDepthThreads);
  VOX_DYNAMIC_SHARED(unsigned char, shared);
  if (static_cast<int>(blockIdx.x) < all.blocks && threadIdx.x < kThreads) {
    ProductPart<Products> part(all, shared);
    each_phase(all.p.op, part);
    wait_copies<0>();  // where the grid gave up
  } else if (static_cast<int>(blockIdx.x) < all.blocks) {
    ProductPart<Nothing> part(all, shared);
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

// With the longest queue that there is room for; of no length where there is none.
template <typename Products>
Plan plan_for(const Arguments& all) {
  int64_t rest = 0;
  for (const Phase& phase : all.phases)
    rest = std::max(rest, Products::rest_bytes(phase.product, all.blocks));
  const int64_t of_rows =
      std::max({sizeof(attention::DepthShared<bf16, 8>), sizeof(attention::DepthShared<bf16, 16>),
                sampling::shared_bytes(all.p.op.V)});
  const Kernel kernel = kernel_for<Products>(all.attention.D);
  for (int length = Products::kMost; length >= Products::kLeast; --length) {
    const int64_t bytes = std::max(Products::queue_bytes(length) + rest, of_rows);
    if (bytes + kStaticBytes <= shared_bytes_limit() &&
        resident_blocks(kernel, kBlockThreads, bytes) > 0)
      return {length, bytes};
  }
  return {};
}

}  // namespace

bool persistent_depth(const PersistentDepthParams& p, cudaStream_t stream) {
  const DecodeDepthParams& op = p.op;
  const LayersParams& l = op.layers;
  const bool narrow = l.D == 8 * kVector<bf16>;
  if (op.dtype != Dtype::bf16 || op.B > kMostRows || l.L == 0 ||
      op.V > kBlockThreads * sampling::kMaxCodesPerThread ||
      (!narrow && l.D != 16 * kVector<bf16>) ||
      op.K > (narrow ? attention::kMaxDepthKeys<8> : attention::kMaxDepthKeys<16>))
    return false;
  for (const Weight& weight : {l.qkv, l.o, l.gate_up, l.down, op.heads})
    if (!is_vector_aligned<bf16>(weight.data, weight.C)) return false;
  for (const void* norm : {l.attn_norm, l.mlp_norm, l.norm})
    if (!is_vector_aligned<bf16>(norm, l.C)) return false;
  return with_products(p, [&]<typename Products>() {
    Arguments all = arguments(p, Products::kTile);
    if (all.blocks <= 0) return false;
    const Plan plan = plan_for<Products>(all);
    if (plan.length == 0) return false;
    all.length = plan.length;
    launch(kernel_for<Products>(l.D),
           {.grid = dim3(static_cast<unsigned>(multiprocessors())),
            .block = dim3(kBlockThreads),
            .shared_bytes = static_cast<size_t>(plan.shared_bytes),
            .stream = stream,
            .resident = true},
           all);
    return true;
  });
}

}  // namespace voxkern
