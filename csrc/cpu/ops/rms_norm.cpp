#include "params/rms_norm.h"

#include "cpu/runtime/isa.h"

#ifdef VOX_ISA
#include "cpu/runtime/team.h"
#include "cpu/simd/norm.h"

// RMS norm of each row of x, optionally after adding x to `residual` in place. The rows are divided
// among the threads; norm.h defines the summation order and the rounding.
namespace voxkern {
namespace {

template <typename T>
void run(const RmsNormParams& p) {
  parallel_for(p.rows, 1, p.rows * p.C, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * p.C;
      normalise_row(static_cast<const T*>(p.x) + at,
                    p.residual ? static_cast<T*>(p.residual) + at : nullptr,
                    static_cast<const T*>(p.weight), static_cast<T*>(p.out) + at, p.C, p.eps);
    }
  });
}

}  // namespace

namespace VOX_ISA {
void rms_norm(const RmsNormParams& p) { p.dtype == Dtype::f32 ? run<float>(p) : run<bf16>(p); }
}  // namespace VOX_ISA

}  // namespace voxkern

#else

namespace voxkern {

VOX_KERNEL(rms_norm, RmsNormParams)

namespace {

Tensor rms_norm_cpu(Tensor x, Tensor weight, double eps) {
  x = torch::stable::contiguous(x);
  Tensor out = torch::stable::empty_like(x);
  rms_norm(rms_norm_params(x, nullptr, weight, eps, out));
  return out;
}

Tensor add_rms_norm_cpu(Tensor x, Tensor residual, Tensor weight, double eps) {
  x = torch::stable::contiguous(x);
  Tensor out = torch::stable::empty_like(x);
  rms_norm(rms_norm_params(x, &residual, weight, eps, out));
  return out;
}

}  // namespace
}  // namespace voxkern

STABLE_TORCH_LIBRARY_IMPL(voxkern, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&voxkern::rms_norm_cpu));
  m.impl("add_rms_norm", TORCH_BOX(&voxkern::add_rms_norm_cpu));
}

#endif
