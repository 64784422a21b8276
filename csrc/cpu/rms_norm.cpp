#include "../rms_norm.h"

#include "isa.h"

#ifdef VOX_ISA
#include "team.h"
#include "vec.h"

// One thread takes whole rows. The square sum runs over kWidth lanes of one accumulator; a sum
// with the residual is rounded to the dtype before it is squared, as a stored residual is.
namespace voxkern {
namespace {

template <typename T>
void normalise_row(const T* x, T* residual, const T* weight, T* out, int64_t C, float eps) {
  vfloat squares{};
  int64_t i = 0;
  const auto add = [&](int64_t at, int64_t n) {
    vfloat value = n < kWidth ? load_n(x + at, n) : load(x + at);
    if (residual) {
      value += n < kWidth ? load_n(residual + at, n) : load(residual + at);
      if (n < kWidth) {
        store_n(residual + at, value, n);
        value = load_n(residual + at, n);
      } else {
        store(residual + at, value);
        value = load(residual + at);
      }
    }
    squares = fma(value, value, squares);
  };
  for (; i + kWidth <= C; i += kWidth) add(i, kWidth);
  if (i < C) add(i, C - i);

  const float scale = 1.0f / __builtin_sqrtf(reduce_add(squares) / static_cast<float>(C) + eps);
  const T* source = residual ? residual : x;
  for (i = 0; i + kWidth <= C; i += kWidth)
    store(out + i, load(source + i) * splat(scale) * load(weight + i));
  if (i < C)
    store_n(out + i, load_n(source + i, C - i) * splat(scale) * load_n(weight + i, C - i), C - i);
}

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
