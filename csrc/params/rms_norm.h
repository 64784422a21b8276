// rms_norm and add_rms_norm: out = x / sqrt(mean(x^2) + eps) * weight; add_rms_norm first adds a
// residual to x.
#pragma once

#include "common/check.h"

namespace voxkern {

struct RmsNormParams {
  Dtype dtype;
  int64_t rows;
  int64_t C;
  const void* x;       // [rows, C]
  void* residual;      // [rows, C], updated to residual + x; null for rms_norm
  const void* weight;  // [C]
  void* out;           // [rows, C]
  float eps;
};

#ifndef VOX_ISA

// `x` and `out` contiguous; `residual` is null for rms_norm.
inline RmsNormParams rms_norm_params(const Tensor& x, const Tensor* residual, const Tensor& weight,
                                     double eps, const Tensor& out) {
  check(x.dim() >= 1, "x: expected [..., C], got a scalar");
  const int64_t C = x.size(x.dim() - 1);
  const Dtype dtype = float_dtype(x, "x");
  check_operand(weight, "weight", x, x.scalar_type());
  check_shape(weight, "weight", "[C]", {C});
  if (residual) {
    check_operand(*residual, "residual", x, x.scalar_type());
    check(shape_string(*residual) == shape_string(x), "residual: expected x's shape ",
          shape_string(x), ", got ", shape_string(*residual));
  }
  return {
      .dtype = dtype,
      .rows = C ? x.numel() / C : 0,
      .C = C,
      .x = x.const_data_ptr(),
      .residual = residual ? residual->mutable_data_ptr() : nullptr,
      .weight = weight.const_data_ptr(),
      .out = out.mutable_data_ptr(),
      .eps = static_cast<float>(eps),
  };
}

#endif

}  // namespace voxkern
