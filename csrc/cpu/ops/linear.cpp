#include "params/linear.h"

#include "cpu/runtime/isa.h"

#ifdef VOX_ISA
#include "cpu/gemm/project.h"

// Each thread computes the outputs of a contiguous range of W's rows, so every weight is read once,
// by one thread. If a plain W has too few rows for that, threads partition the rows of x. The order
// of sums and the rounding are those of gemm.h and packed_gemm.h.
namespace voxkern {
namespace {

// True to partition W's rows: if they give every thread a grain, or are the longer side anyway.
bool split_weight_rows(int64_t M, int64_t N, int threads) {
  return N >= M || N >= kRowGrain * threads;
}

template <typename T>
void run_plain(const LinearParams& p) {
  const auto* x = static_cast<const T*>(p.x);
  const auto* weight = static_cast<const T*>(p.weight.data);
  auto* out = static_cast<T*>(p.out);
  const int64_t N = p.weight.N, C = p.weight.C, work = p.M * N * C;
  if (split_weight_rows(p.M, N, Team::size())) {
    parallel_for(N, kRowGrain, work,
                 [&](int64_t begin, int64_t end) { gemm(x, weight, out, p.M, C, N, begin, end); });
  } else {
    parallel_for(p.M, kTileM, work, [&](int64_t begin, int64_t end) {
      gemm(x + begin * C, weight, out + begin * N, end - begin, C, N, 0, N);
    });
  }
}

template <typename T>
void run_packed(const LinearParams& p) {
  const auto* x = static_cast<const T*>(p.x);
  const int64_t N = p.weight.N, C = p.weight.C;
  Arena count(nullptr);
  QuantizedRows(count, p.M, C);
  void* const block = __builtin_malloc(count.bytes());
  Arena arena(block);
  const QuantizedRows quantized(arena, p.M, C);
  auto job = [&](int rank, int size) {
    const Range mine = partition(p.M * C, kGroup, rank, size);
    quantize(x, quantized, p.M, C, mine.begin, mine.end);
    Team::barrier();
    const Range columns = partition(N, kRowGrain, rank, size);
    packed_gemm(quantized, p.weight.format, p.weight.data, static_cast<T*>(p.out), p.M, C, N,
                columns.begin, columns.end);
  };
  if (p.M * N * C < kMinTeamWork)
    job(0, 1);
  else
    run_team(job);
  __builtin_free(block);
}

}  // namespace

namespace VOX_ISA {
void linear(const LinearParams& p) {
  if (p.weight.format == Format::plain)
    p.dtype == Dtype::f32 ? run_plain<float>(p) : run_plain<bf16>(p);
  else
    p.dtype == Dtype::f32 ? run_packed<float>(p) : run_packed<bf16>(p);
}
}  // namespace VOX_ISA

}  // namespace voxkern

#else

namespace voxkern {

VOX_KERNEL(linear, LinearParams)

namespace {

Tensor linear_cpu(Tensor x, Tensor weight) {
  x = torch::stable::contiguous(x);
  Tensor out = linear_out(x, weight);
  const LinearParams p = linear_params(x, weight, out);
  if (p.weight.C == 0) return torch::stable::fill_(out, 0.0);
  linear(p);
  return out;
}

}  // namespace
}  // namespace voxkern

STABLE_TORCH_LIBRARY_IMPL(voxkern, CPU, m) { m.impl("linear", TORCH_BOX(&voxkern::linear_cpu)); }

#endif
