#include "cuda/gemm/packed_product.cuh"
#include "cuda/ops/ops.cuh"

// Products of up to kTileM rows with packed weights, for `linear` and for what is made of it.
//
// Floor on an H100: CSM's gate and up [16384, 2048] 33.5 MB in int8, 10 us, and 17.8 MB in int4,
// 5.3 us; its depth decoder's [16384, 1024] the half.
namespace voxkern {
namespace {

struct Layout {
  PackedPlan plan;
  int64_t blocks, shared_bytes;
};

// For up to `each` blocks a multiprocessor, with a shorter queue where there is no room for all.
template <typename T, Format kFormat, int kMost>
Layout layout(const ProductParams& p, int64_t each = kBlocksEach) {
  using Shared = PackedShared<kMost>;
  const int64_t tiles = divide_up(p.N, kBlockRows), most = each * multiprocessors();
  const int64_t blocks = tiles < most ? tiles : most, of_block = divide_up(tiles, blocks);
  const int64_t ranges = divide_up(p.C, kRange * kGroup);
  const int64_t products = p.after == After::swiglu ? 2 : 1, items = ranges * products;
  const int64_t needed = of_block * divide_up(items, kWarps);
  const int64_t x =
      Shared::bytes(ranges, of_block > 1 ? 2 * items : items, log_up(static_cast<int>(p.M)));
  const int64_t staged = p.before == Before::norm
                             ? packed_staged_row<T>(p.C) * p.M * static_cast<int64_t>(sizeof(uint4))
                             : 0;
  int64_t slots = needed < kSlots<kFormat> ? needed : kSlots<kFormat>;
  const auto bytes = [&]() -> int64_t {
    const int queue = static_cast<int>(slots);
    return x + staged +
           (products == 2 ? PackedWeights<kFormat, After::swiglu>::bytes(queue)
                          : PackedWeights<kFormat, After::store>::bytes(queue));
  };
  while (slots > 1 && bytes() > dynamic_limit()) --slots;
  if (each > 1 && !fit_together(each, bytes())) return layout<T, kFormat, kMost>(p, each - 1);
  return {{.slots = static_cast<int>(slots), .staged = static_cast<int>(bytes() - staged)},
          blocks,
          bytes()};
}

// call(kernel's rows at most) for p.M rows.
template <typename T, typename Call>
auto with_most(const ProductParams& p, const Call& call) {
  if constexpr (sizeof(T) == 2) {
    if (p.M == 1) return call(std::integral_constant<int, 1>());
    if (p.M > 8) return call(std::integral_constant<int, kTileM>());
  }
  return call(std::integral_constant<int, 8>());
}

template <typename T, Format kFormat, Before before, After after>
void run(const ProductParams& p, cudaStream_t stream) {
  with_most<T>(p, [&](auto most) {
    const Layout l = layout<T, kFormat, most>(p);
    launch(packed_product_kernel<T, kFormat, most, before, after>,
           {.grid = dim3(static_cast<unsigned>(l.blocks)),
            .block = dim3(kThreads),
            .shared_bytes = static_cast<size_t>(l.shared_bytes),
            .stream = stream,
            .overlaps_previous = p.overlaps_previous},
           p, l.plan);
  });
}

template <typename T, Format kFormat>
void run(const ProductParams& p, cudaStream_t stream) {
  if (p.before == Before::norm)
    p.after == After::swiglu ? run<T, kFormat, Before::norm, After::swiglu>(p, stream)
                             : run<T, kFormat, Before::norm, After::store>(p, stream);
  else if (p.after == After::add)
    run<T, kFormat, Before::nothing, After::add>(p, stream);
  else
    run<T, kFormat, Before::nothing, After::store>(p, stream);
}

// call(element, format) with types for both.
template <typename Call>
auto with_types(const ProductParams& p, const Call& call) {
  using Int8 = std::integral_constant<Format, Format::int8>;
  using Int4 = std::integral_constant<Format, Format::int4>;
  if (p.dtype == Dtype::f32)
    return p.format == Format::int8 ? call(float(), Int8()) : call(float(), Int4());
  return p.format == Format::int8 ? call(bf16(), Int8()) : call(bf16(), Int4());
}

}  // namespace

bool packed_fits(const ProductParams& p) {
  return with_types(p, [&](auto element, auto format) {
    using T = decltype(element);
    if (p.M > (sizeof(T) == 4 ? 8 : kTileM) || !aligned<T>(p)) return false;
    return with_most<T>(
        p, [&](auto most) { return layout<T, format, most>(p).shared_bytes <= dynamic_limit(); });
  });
}

void packed_product(const ProductParams& p, cudaStream_t stream) {
  with_types(p, [&](auto element, auto format) { run<decltype(element), format>(p, stream); });
}

}  // namespace voxkern
