// linear: out = x W^T.
#pragma once

#include "common/weight.h"

namespace voxkern {

struct LinearParams {
  Dtype dtype;
  int64_t M;
  const void* x;  // [M, C]
  Weight weight;  // [N, C]
  void* out;      // [M, N]
};

#ifndef VOX_ISA

// The uninitialised result of `linear`.
inline Tensor linear_out(const Tensor& x, const Tensor& weight) {
  check(x.dim() >= 1, "x: expected [..., C], got a scalar");
  check_dim(weight, "weight", 2);
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < x.dim(); ++i) sizes.push_back(x.size(i));
  sizes.back() = weight.size(0) * (weight_format(weight) == Format::plain ? 1 : kBlockRows);
  return torch::stable::new_empty(x, sizes);
}

// `x` and `out` contiguous.
inline LinearParams linear_params(const Tensor& x, const Tensor& weight, const Tensor& out) {
  int64_t M = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) M *= x.size(i);
  const Dtype dtype = float_dtype(x, "x");
  return {
      .dtype = dtype,
      .M = M,
      .x = x.const_data_ptr(),
      .weight = weight_of(weight, "weight", x, "[N, C]", {kAny, x.size(x.dim() - 1)}),
      .out = out.mutable_data_ptr(),
  };
}

#endif

}  // namespace voxkern
