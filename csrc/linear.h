// linear: out = x W^T.
#pragma once

#include "dtype.h"

namespace voxkern {

struct LinearParams {
  Dtype dtype;
  int64_t M, N, C;
  const void* x;       // [M, C]
  const void* weight;  // [N, C]
  void* out;           // [M, N]
};

}  // namespace voxkern

#ifndef VOX_ISA
#include <vector>

#include "check.h"

namespace voxkern {

// What `linear` returns for x and weight, not filled.
inline Tensor linear_out(const Tensor& x, const Tensor& weight) {
  check(x.dim() >= 1, "x: expected [..., C], got a scalar");
  check_dim(weight, "weight", 2);
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < x.dim(); ++i) sizes.push_back(x.size(i));
  sizes.back() = weight.size(0);
  return torch::stable::new_empty(x, sizes);
}

// `x` and `out` contiguous.
inline LinearParams linear_params(const Tensor& x, const Tensor& weight, const Tensor& out) {
  const int64_t C = x.size(x.dim() - 1);
  int64_t M = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) M *= x.size(i);
  const Dtype dtype = float_dtype(x, "x");
  check_operand(weight, "weight", x, x.scalar_type());
  check_shape(weight, "weight", "[N, C]", {kAny, C});
  return {
      .dtype = dtype,
      .M = M,
      .N = weight.size(0),
      .C = C,
      .x = x.const_data_ptr(),
      .weight = weight.const_data_ptr(),
      .out = out.mutable_data_ptr(),
  };
}

}  // namespace voxkern
#endif
