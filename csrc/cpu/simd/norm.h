// The norms of one row: RMS norm for rms_norm, add_rms_norm and layers.h, layer norm for the codec.
// Only ISA passes include it.
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

// out = (x - mean) / sqrt(variance + eps) * scale + bias.
inline void layer_norm_row(const float* x, const float* scale, const float* bias, float* out,
                           int64_t C, float eps) {
  const auto sum = [&](auto value) {
    vfloat sums{};
    int64_t i = 0;
    for (; i + kWidth <= C; i += kWidth) sums += value(load(x + i));
    float rest[kWidth] = {};
    for (int64_t j = 0; i + j < C; ++j) rest[j] = value(splat(x[i + j]))[0];
    return reduce_add(sums + load(rest)) / static_cast<float>(C);
  };
  const vfloat mean = splat(sum([](vfloat v) { return v; }));
  const float variance = sum([&](vfloat v) { return (v - mean) * (v - mean); });
  const vfloat factor = splat(1.0f / __builtin_sqrtf(variance + eps));
  int64_t i = 0;
  for (; i + kWidth <= C; i += kWidth)
    store(out + i, fma((load(x + i) - mean) * factor, load(scale + i), load(bias + i)));
  if (const int64_t n = C - i)
    store_n(out + i,
            fma((load_n(x + i, n) - mean) * factor, load_n(scale + i, n), load_n(bias + i, n)), n);
}

}  // namespace
}  // namespace voxkern
