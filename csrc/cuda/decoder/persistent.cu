#include <algorithm>
#include <cstdlib>

#include "cuda/decoder/schedule.cuh"
#include "cuda/runtime/grid_barrier.cuh"

// The depth decoder as one persistent kernel, for up to kDepthRows rows in bfloat16. The grid has
// one block per multiprocessor. Most blocks multiply (gemv.cuh); the last few, the row blocks, run
// attention and draw codes. A grid barrier separates the phases of schedule.cuh.
//
// Weights depend on no earlier phase, so the weight pipeline of a multiplying block continues from
// matrix to matrix across all phases and positions: the block loads its next weights while it waits
// for other blocks and while the row blocks work. The arithmetic is shared with decode_depth.cu's
// launches and rounds at the same places, so the codes are equal. Floor, estimates and bytes in
// flight: docs/cuda.md.
namespace voxkern {
namespace decoder {
namespace {

using gemm_kernels::DenseGemv;
using gemm_kernels::kGemvThreads;
using gemm_kernels::PackedGemv;

constexpr int kDepthRows = 8;                        // PERSISTENT_ROWS of vox_serve/model.py
constexpr int kBlockThreads = kGemvThreads + kWarp;  // the last warp only handles grid barriers
constexpr int64_t kVariableBytes = 1024;             // of static shared memory, at most
static_assert(kGemvThreads == attention::kDepthThreads);

// Stands in for GemvWarps in the last warp of a multiplying block, which does no arithmetic.
struct BarrierWarp {
  VOX_DEVICE BarrierWarp(const Arguments&, unsigned char*) {}
  VOX_DEVICE uint4 load_norm(const GemmParams&) const { return {}; }
  VOX_DEVICE void run(const GemmParams&, uint4) {}
};

// The warps of a multiplying block that run its Gemv.
template <typename Gemv>
class GemvWarps {
 public:
  VOX_DEVICE GemvWarps(const Arguments& all, unsigned char* shared)
      : gemv_(shared, all.stages, all.blocks, typename Gemv::Weights(all)) {}
  VOX_DEVICE uint4 load_norm(const GemmParams& p) const {
    return p.prologue == Prologue::norm ? gemm_kernels::load_first_norm<Prologue::norm>(p)
                                        : uint4();
  }
  VOX_DEVICE void run(const GemmParams& p, uint4 first_norm) {
    switch (p.epilogue) {
      case Epilogue::swiglu: return run<Prologue::norm, Epilogue::swiglu>(p, first_norm);
      case Epilogue::add: return run<Prologue::none, Epilogue::add>(p, first_norm);
      case Epilogue::store: return run<Prologue::norm, Epilogue::store>(p, first_norm);
    }
  }

 private:
  template <Prologue prologue, Epilogue epilogue>
  VOX_DEVICE void run(const GemmParams& p, uint4 first_norm) {
    gemv_.template run<prologue, epilogue>(p, first_norm);
  }

  Gemv gemv_;
};

// A multiplying block. These come first in the grid.
template <typename Warps>
class GemmWorker {
 public:
  VOX_DEVICE GemmWorker(const Arguments& all, unsigned char* shared)
      : all_(all), warps_(all, shared), grid_(all.p.arrived) {}

  VOX_DEVICE bool multiply(const Schedule& at) {
    const Product& product = all_.products[at.phase];
    GemmParams p = product.params;
    p.norm = static_cast<const char*>(p.norm) + at.layer * product.norm_stride;
    if (static_cast<int>(blockIdx.x) < product.blocks) {
      const uint4 first_norm = warps_.load_norm(p);
      if (!grid_.wait()) return false;
      warps_.run(p, first_norm);
      grid_.arrive();
    }
    grid_.next_phase(product.blocks);
    return true;
  }
  VOX_DEVICE bool attend(const Schedule&) {
    grid_.next_phase(all_.blocks_of_rows(all_.parts));
    return true;
  }
  VOX_DEVICE bool draw(const Schedule&) {
    grid_.next_phase(all_.blocks_of_rows(1));
    return true;
  }

 private:
  const Arguments& all_;
  Warps warps_;
  GridBarrier grid_;
};

// A row block: runs attention and draws codes for its share of the rows. L lanes share a key.
template <int L>
class RowWorker {
 public:
  VOX_DEVICE RowWorker(const Arguments& all, void* shared)
      : all_(all),
        shared_(shared),
        me_(static_cast<int>(blockIdx.x) - all.blocks),
        rows_(static_cast<int>(all.p.op.B)),
        grid_(all.p.arrived) {}

  VOX_DEVICE bool multiply(const Schedule& at) {
    grid_.next_phase(all_.products[at.phase].blocks);
    return true;
  }
  VOX_DEVICE bool attend(const Schedule& at) {
    const LayersParams& l = all_.p.op.layers;
    const int64_t cache = at.layer * all_.p.op.B * l.Hkv * all_.p.op.K * l.D;
    attention::DepthAttentionParams p = all_.attention;
    p.position = at.position;
    p.k_cache = static_cast<bf16*>(p.k_cache) + cache;
    p.v_cache = static_cast<bf16*>(p.v_cache) + cache;
    auto& shared = *static_cast<attention::DepthShared<bf16, L>*>(shared_);
#pragma unroll 1
    for (int i = me_; i < all_.parts * rows_; i += all_.row_blocks) {
      const auto wait = [&] { return i > me_ || grid_.wait(); };
      const bool goes_on =
          threadIdx.x < kGemvThreads
              ? attention::attend_depth<bf16, L>(p, i % all_.parts, i / all_.parts, shared, wait)
              : wait();
      if (!goes_on) return false;
    }
    end_phase(all_.parts);
    return true;
  }
  VOX_DEVICE bool draw(const Schedule& at) {
    const DecodeDepthParams& p = all_.p.op;
    bf16* const residual = static_cast<bf16*>(all_.p.residual);
    // Blocks without a row wait too: at the next position, attend() loads this position's keys,
    // which other blocks may have written, before it waits.
    if (!grid_.wait()) return false;
#pragma unroll 1
    for (int b = me_; b < rows_; b += all_.row_blocks) {
      if (at.position == 0)
        copy_row(static_cast<const bf16*>(p.audio_rows), p.code0[b], p.V, p.layers.C,
                 residual + b * p.layers.C);
      else
        draw_and_look_up(p, at.position, b, static_cast<const bf16*>(all_.p.logits), residual,
                         *static_cast<sampling::Shared*>(shared_));
      __syncthreads();
    }
    end_phase(1);
    return true;
  }

 private:
  // Ends a phase that has `parts` parts per row.
  VOX_DEVICE void end_phase(int parts) {
    const int blocks = all_.blocks_of_rows(parts);
    if (me_ < blocks) grid_.arrive();
    grid_.next_phase(blocks);
  }

  const Arguments& all_;
  void* const shared_;
  const int me_, rows_;
  GridBarrier grid_;
};

// Runs a worker through all phases of a frame, or until one of them returns false.
template <typename Worker>
VOX_DEVICE void run_schedule(const Arguments& all, Worker& worker) {
#pragma unroll 1
  for (Schedule at = all.schedule(); !at.done(); at.next())
    if (!(at.multiplies()          ? worker.multiply(at)
          : at.phase == kAttention ? worker.attend(at)
                                   : worker.draw(at)))
      return;
}

template <int L, typename Gemv>
__global__ void __launch_bounds__(kBlockThreads, 1)
    persistent_depth_kernel(const __grid_constant__ Arguments all) {
  VOX_DYNAMIC_SHARED(unsigned char, shared);
  if (static_cast<int>(blockIdx.x) >= all.blocks) {
    RowWorker<L> worker(all, shared);
    run_schedule(all, worker);
  } else if (threadIdx.x < kGemvThreads) {
    GemmWorker<GemvWarps<Gemv>> worker(all, shared);
    run_schedule(all, worker);
    wait_copies<0>();  // if the grid gave up, copies are still in flight
  } else {
    GemmWorker<BarrierWarp> worker(all, shared);
    run_schedule(all, worker);
  }
}

using Kernel = void (*)(Arguments);

template <typename Gemv>
Kernel kernel_for(int64_t D) {
  if (D == 8 * kVector<bf16>) return persistent_depth_kernel<8, Gemv>;
  if (D == 16 * kVector<bf16>) return persistent_depth_kernel<16, Gemv>;
  return nullptr;
}

template <Format kLayers, int kRows>
using PackedDepth = PackedGemv<kRows, DepthWeights<kLayers, Format::int8>>;
using DenseDepth = DenseGemv<8, DepthWeights<Format::plain, Format::plain>>;

// Returns call.operator()<Gemv>() for the Gemv of these weights; false if there is none.
template <typename Call>
bool with_gemv(const DepthFrame& p, const Call& call) {
  const LayersParams& l = p.op.layers;
  const Format layers = l.qkv.format, heads = p.op.heads.format;
  for (const Weight& weight : {l.o, l.gate_up, l.down})
    if (weight.format != layers) return false;
  const auto packed = [&]<Format kLayers>() {
    return p.op.B == 1 ? call.template operator()<PackedDepth<kLayers, 1>>()
                       : call.template operator()<PackedDepth<kLayers, kDepthRows>>();
  };
  if (layers == Format::plain && heads == Format::plain)
    return call.template operator()<DenseDepth>();
  if (heads != Format::int8) return false;
  if (layers == Format::int8) return packed.template operator()<Format::int8>();
  return layers == Format::int4 && packed.template operator()<Format::int4>();
}

// Upper limit for the stages of the weight pipeline: max_stages, or the environment variable
// VOXKERN_PERSISTENT_STAGES if that is lower. bench/run.py depth compares lengths with it.
int most_stages(int max_stages) {
  const char* text = std::getenv("VOXKERN_PERSISTENT_STAGES");
  return text ? std::clamp(std::atoi(text), 1, max_stages) : max_stages;
}

// Sets all.stages to the longest weight pipeline that fits. Returns the kernel's bytes of dynamic
// shared memory, or 0 if no pipeline fits.
template <typename Gemv>
int64_t plan_shared(Arguments& all) {
  int64_t rest = 0;
  for (const int phase : {kQkv, kO, kGateUp, kDown, kHead}) {
    const GemmParams& p = all.products[phase].params;
    rest = std::max(rest, Gemv::rest_bytes(p, all.blocks));
  }
  const int64_t of_rows =
      std::max({sizeof(attention::DepthShared<bf16, 8>), sizeof(attention::DepthShared<bf16, 16>),
                sampling::shared_bytes(all.p.op.V)});
  const Kernel kernel = kernel_for<Gemv>(all.attention.D);
  for (all.stages = most_stages(Gemv::Weights::max_stages()); all.stages > 0; --all.stages) {
    const int64_t bytes = std::max(Gemv::Loader::bytes(all.stages) + rest, of_rows);
    if (bytes + kVariableBytes <= shared_bytes_limit() &&
        resident_blocks(kernel, kBlockThreads, bytes) > 0)
      return bytes;
  }
  return 0;
}

}  // namespace
}  // namespace decoder

bool persistent_depth(const DepthFrame& p, const Layers& layers, cudaStream_t stream) {
  const DecodeDepthParams& op = p.op;
  const LayersParams& l = op.layers;
  const bool narrow = l.D == 8 * kVector<bf16>;
  if (op.dtype != Dtype::bf16 || op.B > decoder::kDepthRows || l.L == 0 ||
      op.V > decoder::kBlockThreads * sampling::kMaxCodesPerThread ||
      (!narrow && l.D != 16 * kVector<bf16>) ||
      op.K > (narrow ? attention::kMaxDepthKeys<8> : attention::kMaxDepthKeys<16>))
    return false;
  for (const Weight& weight : {l.qkv, l.o, l.gate_up, l.down, op.heads})
    if (!is_vector_aligned<bf16>(weight.data, weight.C)) return false;
  for (const void* norm : {l.attn_norm, l.mlp_norm, l.norm})
    if (!is_vector_aligned<bf16>(norm, l.C)) return false;
  return decoder::with_gemv(p, [&]<typename Gemv>() {
    decoder::Arguments all = decoder::arguments(p, layers, Gemv::Loader::tile_rows());
    if (all.blocks <= 0) return false;
    const int64_t shared_bytes = decoder::plan_shared<Gemv>(all);
    if (shared_bytes == 0) return false;
    launch(decoder::kernel_for<Gemv>(l.D),
           {.grid = multiprocessors(),
            .block = decoder::kBlockThreads,
            .shared_bytes = static_cast<size_t>(shared_bytes),
            .stream = stream,
            .resident = true},
           all);
    return true;
  });
}

}  // namespace voxkern
