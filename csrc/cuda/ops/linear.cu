#include "cuda/gemm/product.cuh"
#include "cuda/gemm/tiled_product.cuh"
#include "cuda/ops/ops.cuh"

// Streams plain weights: product.cuh has the kernels for few rows, tiled_product.cuh the one for
// more than kTileM in bfloat16. Other many rows (float32, or rows that begin at no multiple of 16
// bytes) read W from the second-level cache once per tile of few. Packed weights have a file of
// their own, packed_linear.cu.
//
// Floor: N C elements over 3.35 TB/s: CSM's gate and up [16384, 2048] bf16 20 us, its depth
// decoder's [16384, 1024] 10 us on an H100.
namespace voxkern {
namespace {

int64_t rows_of_block(const ProductParams& p) { return p.M < kTileM ? p.M : kTileM; }

struct Layout {
  ProductPlan plan;
  int64_t blocks, shared_bytes;
};

// For up to `each` blocks a multiprocessor. Blocks without room beside each other would run one
// after the other, the last ones without a prefetch, and the next kernel could only start with
// them.
Layout layout_bf16(const ProductParams& p, int64_t each = kBlocksEach) {
  const int64_t tiles = divide_up(p.N, kTileN), most = each * multiprocessors();
  const int64_t blocks = tiles < most ? tiles : most;
  const int64_t products = p.after == After::swiglu ? 2 : 1;
  const int64_t range = divide_up(divide_up(p.C, kLanes * kVector<bf16>), kWarps);
  const int64_t needed = divide_up(tiles, blocks) * products * divide_up(range, kInGroup);
  const int64_t most_groups = queue_groups(p.C);
  const int64_t groups = needed < most_groups ? needed : most_groups;
  const int64_t before_x = groups * kInGroup * kThreads * sizeof(uint4) +
                           2 * products * kWarps * (p.M <= 8 ? 8 : kTileM) * kTileN * sizeof(float);
  const int64_t row = staged_row<bf16>(p.C);
  const int64_t x = rows_of_block(p) * row * sizeof(uint4);
  const bool staged = aligned<bf16>(p) && before_x + x <= dynamic_limit();
  const int64_t bytes = staged ? before_x + x : before_x;
  if (each > 1 && !fit_together(each, bytes)) return layout_bf16(p, each - 1);
  return {{static_cast<int>(groups), staged ? static_cast<int>(row) : 0}, blocks, bytes};
}

Layout layout_f32(const ProductParams& p, int64_t tile_m) {
  const int64_t columns = kWarps * (p.after == After::swiglu ? 1 : 2), row = staged_row<float>(p.C);
  return {{0, static_cast<int>(row)},
          divide_up(p.N, columns),
          p.before == Before::nothing ? 0 : tile_m * row * static_cast<int64_t>(sizeof(uint4))};
}
int64_t tile_m_f32(const ProductParams& p) { return p.M == 1 ? 1 : 4; }

template <typename T>
void launch_tiles(void (*kernel)(ProductParams, ProductPlan), const ProductParams& p,
                  const Layout& layout, int64_t tile_m, cudaStream_t stream) {
  // The grid's second dimension is 16 bits wide.
  const int64_t most = 65535 * tile_m;
  for (int64_t first = 0; first < p.M; first += most) {
    ProductParams part = p;
    part.M = p.M - first < most ? p.M - first : most;
    part.x = static_cast<const T*>(p.x) + first * p.C;
    part.out = static_cast<T*>(p.out) + first * p.N;
    launch(kernel,
           {.grid = dim3(static_cast<unsigned>(layout.blocks),
                         static_cast<unsigned>(divide_up(part.M, tile_m))),
            .block = dim3(kThreads),
            .shared_bytes = static_cast<size_t>(layout.shared_bytes),
            .stream = stream,
            .overlaps_previous = p.overlaps_previous},
           part, layout.plan);
  }
}

template <bool kAligned, Before before, After after>
void run(const ProductParams& p, cudaStream_t stream) {
  if (p.dtype == Dtype::bf16)
    launch_tiles<bf16>(p.M <= 8 ? bf16_product_kernel<kAligned, false, before, after>
                                : bf16_product_kernel<kAligned, true, before, after>,
                       p, layout_bf16(p), kTileM, stream);
  else
    launch_tiles<float>(p.M == 1 ? f32_product_kernel<kAligned, 1, before, after>
                                 : f32_product_kernel<kAligned, 4, before, after>,
                        p, layout_f32(p, tile_m_f32(p)), tile_m_f32(p), stream);
}

}  // namespace

bool fits(const ProductParams& p) {
  if (p.format != Format::plain) return packed_fits(p);
  if (p.M > kTileM) return false;
  if (p.dtype == Dtype::bf16)
    return aligned<bf16>(p) && (p.before == Before::nothing || layout_bf16(p).plan.row > 0);
  return aligned<float>(p) && layout_f32(p, tile_m_f32(p)).shared_bytes <= dynamic_limit();
}

void product(const ProductParams& p, cudaStream_t stream) {
  if (p.M == 0 || p.N == 0) return;
  if (p.format != Format::plain) return packed_product(p, stream);
  if (p.before == Before::norm)
    p.after == After::swiglu ? run<true, Before::norm, After::swiglu>(p, stream)
                             : run<true, Before::norm, After::store>(p, stream);
  else if (p.after == After::add)
    run<true, Before::nothing, After::add>(p, stream);
  else
    run<true, Before::nothing, After::store>(p, stream);
}

void linear(const LinearParams& p, cudaStream_t stream, bool overlaps_previous) {
  if (p.M == 0 || p.weight.N == 0) return;
  if (p.weight.format != Format::plain) return packed_linear(p, stream, overlaps_previous);
  const ProductParams plain = {.dtype = p.dtype,
                               .M = p.M,
                               .N = p.weight.N,
                               .C = p.weight.C,
                               .x = p.x,
                               .weight = p.weight.data,
                               .out = p.out,
                               .overlaps_previous = overlaps_previous};
  if (p.dtype == Dtype::bf16 && p.M > kTileM && aligned<bf16>(plain))
    return tiled_product(p, stream, overlaps_previous);
  (p.dtype == Dtype::f32 ? aligned<float>(plain) : aligned<bf16>(plain))
      ? run<true, Before::nothing, After::store>(plain, stream)
      : run<false, Before::nothing, After::store>(plain, stream);
}

}  // namespace voxkern

#ifdef VOX_HOST_PASS
namespace voxkern {
namespace {

Tensor linear_cuda(Tensor x, Tensor weight) {
  x = torch::stable::contiguous(x);
  Tensor out = linear_out(x, weight);
  const LinearParams p = linear_params(x, weight, out);
  if (p.weight.C == 0) return torch::stable::fill_(out, 0.0);
  const OnDevice device(x);
  linear(p, device.stream, false);  // `weight` may be any tensor, the result of the op before too
  return out;
}

}  // namespace
}  // namespace voxkern

VOX_CUDA_LIBRARY(m) { m.impl("linear", TORCH_BOX(&voxkern::linear_cuda)); }
#endif
