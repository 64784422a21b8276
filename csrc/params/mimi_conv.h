// mimi_conv: a causal convolution over blocks of samples, computed as a GEMM with windows of its
// input.
#pragma once

#include <cstdint>

#include "common/check.h"

namespace voxkern {

struct MimiConvParams {
  Dtype dtype;  // of the weight
  int64_t B, T, C, N;
  int64_t J, dilation;
  bool elu;
  const float* x;      // [B, T, C]
  float* past;         // [B, context, C], context = (J - 1) dilation
  const void* weight;  // [N / 16, J C, 16], or in bfloat16 [N / 16, J C / 2, 16, 2]
  const float* bias;   // [N]
  const float* add;    // [B, T, N] or null
  float* out;          // [B, T, N]

  int64_t context() const { return (J - 1) * dilation; }
};

#ifndef VOX_ISA

// All tensors contiguous. Leaves `out` null.
inline MimiConvParams mimi_conv_params(const Tensor& x, const Tensor& past, const Tensor& weight,
                                       const Tensor& bias, const Tensor* add, int64_t dilation,
                                       bool elu) {
  check_dtype(x, "x", ScalarType::Float);
  check_dim(x, "x", 3);
  const Dtype dtype = float_dtype(weight, "weight");
  const bool paired = dtype == Dtype::bf16;
  check_dim(weight, "weight", paired ? 4 : 3);
  check_dim(bias, "bias", 1);
  const int64_t B = x.size(0), T = x.size(1), C = x.size(2), N = bias.size(0);
  const int64_t columns = weight.size(1) * (paired ? 2 : 1), blocks = (N + 15) / 16;
  check(C >= 1, "x: expected [B, T, C] with C >= 1, got shape ", shape_string(x));
  check(columns >= C && columns % C == 0, "weight: expected columns in a multiple of C = ", C,
        ", got shape ", shape_string(weight));
  check_operand(weight, "weight", x, weight.scalar_type());
  if (paired)
    check_shape(weight, "weight", "[N / 16, J C / 2, 16, 2]", {blocks, columns / 2, 16, 2});
  else
    check_shape(weight, "weight", "[N / 16, J C, 16]", {blocks, columns, 16});
  check(dilation >= 1, "dilation: expected 1 or more, got ", dilation);
  const int64_t J = columns / C;
  check_operand(past, "past", x, ScalarType::Float);
  check_shape(past, "past", "[B, (J - 1) dilation, C]", {B, (J - 1) * dilation, C});
  check_operand(bias, "bias", x, ScalarType::Float);
  if (add) {
    check_operand(*add, "add", x, ScalarType::Float);
    check_shape(*add, "add", "[B, T, N]", {B, T, N});
  }
  return {
      .dtype = dtype,
      .B = B,
      .T = T,
      .C = C,
      .N = N,
      .J = J,
      .dilation = dilation,
      .elu = elu,
      .x = static_cast<const float*>(x.const_data_ptr()),
      .past = static_cast<float*>(past.mutable_data_ptr()),
      .weight = weight.const_data_ptr(),
      .bias = static_cast<const float*>(bias.const_data_ptr()),
      .add = add ? static_cast<const float*>(add->const_data_ptr()) : nullptr,
      .out = nullptr,
  };
}

#endif

}  // namespace voxkern
