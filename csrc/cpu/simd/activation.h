// The activation functions of the codec. Only ISA passes include it.
#pragma once

#include "cpu/simd/silu.h"

namespace voxkern {
namespace {

VOX_INLINE vfloat elu(vfloat a) { return select(a > vfloat{}, a, exp(a) - splat(1.0f)); }

// x * Phi(x), Phi the standard normal CDF; erfc by Abramowitz and Stegun 7.1.26, within 1.5e-7.
VOX_INLINE vfloat gelu(vfloat x) {
  const vint negative = x < vfloat{};
  const vfloat z = select(negative, -x, x) * splat(0.70710678f);
  const vfloat t = splat(1.0f) / fma(splat(0.3275911f), z, splat(1.0f));
  vfloat p = splat(1.061405429f);
  p = fma(p, t, splat(-1.453152027f));
  p = fma(p, t, splat(1.421413741f));
  p = fma(p, t, splat(-0.284496736f));
  p = fma(p, t, splat(0.254829592f));
  const vfloat half_erfc = splat(0.5f) * p * t * exp(-z * z);
  return x * select(negative, half_erfc, splat(1.0f) - half_erfc);
}

// GELU's tanh approximation: x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)).
VOX_INLINE vfloat gelu_tanh(vfloat x) {
  const vfloat a = splat(1.5957691216f) * fma(splat(0.044715f) * x * x, x, x);
  const vint negative = a < vfloat{};
  const vfloat e = exp(select(negative, a, -a));
  return x * select(negative, e, splat(1.0f)) / (splat(1.0f) + e);
}

VOX_INLINE vfloat relu(vfloat a) { return select(a < vfloat{}, vfloat{}, a); }

// x[i] = f(x[i]), a vector at a time.
template <typename F>
inline void for_each_vector(float* x, int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(x + i, f(load(x + i)));
  if (i < n) store_n(x + i, f(load_n(x + i, n - i)), n - i);
}

}  // namespace
}  // namespace voxkern
