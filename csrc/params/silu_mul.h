// silu_mul: out = gate / (1 + exp(-gate)) * up.
#pragma once

#include "common/check.h"

namespace voxkern {

struct SiluMulParams {
  Dtype dtype;
  int64_t rows;
  int64_t F;
  const void* gate_up;  // [rows, 2F]
  void* out;            // [rows, F]
};

#ifndef VOX_ISA

// The uninitialised result of `silu_mul`.
inline Tensor silu_mul_out(const Tensor& gate_up) {
  check(gate_up.dim() >= 1 && gate_up.size(gate_up.dim() - 1) % 2 == 0,
        "gate_up: expected [..., 2F], got shape ", shape_string(gate_up));
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < gate_up.dim(); ++i) sizes.push_back(gate_up.size(i));
  sizes.back() /= 2;
  return torch::stable::new_empty(gate_up, sizes);
}

// `gate_up` and `out` contiguous.
inline SiluMulParams silu_mul_params(const Tensor& gate_up, const Tensor& out) {
  const int64_t F = gate_up.size(gate_up.dim() - 1) / 2;
  return {
      .dtype = float_dtype(gate_up, "gate_up"),
      .rows = F ? out.numel() / F : 0,
      .F = F,
      .gate_up = gate_up.const_data_ptr(),
      .out = out.mutable_data_ptr(),
  };
}

#endif

}  // namespace voxkern
