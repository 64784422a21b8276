// One row of rms_norm and add_rms_norm; layers.h calls it too. Only ISA passes include it.
#pragma once

#include "cpu/simd/vec.h"

namespace voxkern {
namespace {

// The sum of squares uses one accumulator of kWidth lanes. `residual` may be null; otherwise
// residual + x is stored there, so it is rounded to the dtype before it is squared.
template <typename T>
inline void normalise_row(const T* x, T* residual, const T* weight, T* out, int64_t C, float eps) {
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

}  // namespace
}  // namespace voxkern
