#include "../linear.h"

#include "isa.h"

#ifdef VOX_ISA
#include "project.h"

// Each thread takes a contiguous part of W's rows, so every weight is read once and by one thread;
// where W is too small for that, a part of x's rows.
namespace voxkern {
namespace {

// With a grain for every thread, W's rows do; below that, the longer side has more to share.
bool split_weight_rows(int64_t M, int64_t N, int threads) {
  return N >= M || N >= kPartRows * threads;
}

template <typename T>
void run(const LinearParams& p) {
  const auto* x = static_cast<const T*>(p.x);
  auto* out = static_cast<T*>(p.out);
  const int64_t N = p.weight.N, C = p.weight.C, work = p.M * N * C;
  if (split_weight_rows(p.M, N, Team::size())) {
    parallel_for(N, kPartRows, work, [&](int64_t begin, int64_t end) {
      project(x, p.M, p.weight, 0, {Range{begin, end}}, out);
    });
  } else {
    parallel_for(p.M, kTileM, work, [&](int64_t begin, int64_t end) {
      project(x + begin * C, end - begin, p.weight, 0, {Range{0, N}}, out + begin * N);
    });
  }
}

}  // namespace

namespace VOX_ISA {
void linear(const LinearParams& p) { p.dtype == Dtype::f32 ? run<float>(p) : run<bf16>(p); }
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
