// exp and log on vectors. Only ISA passes (cpu/runtime/isa.h) include this file.
#pragma once

#include "cpu/simd/vec.h"

namespace voxkern {
namespace {

// e^a within 2 ulp for a in [-87, 88]. Smaller inputs, minus infinity included, give 0; larger ones
// give e^88. Cody and Waite's range reduction, then a Taylor polynomial of degree 7.
VOX_INLINE vfloat exp(vfloat a) {
  const vint tiny = a < splat(-87.0f);
  a = select(a > splat(88.0f), splat(88.0f), select(tiny, splat(-87.0f), a));
  const vfloat magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vfloat shifted = a * splat(1.44269504f) + magic;
  const vfloat n = shifted - magic;
  vfloat r = fma(n, splat(-0.693359375f), a);
  r = fma(n, splat(2.12194440e-4f), r);
  vfloat p = splat(1.0f / 5040);
  p = fma(p, r, splat(1.0f / 720));
  p = fma(p, r, splat(1.0f / 120));
  p = fma(p, r, splat(1.0f / 24));
  p = fma(p, r, splat(1.0f / 6));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  const vuint exponent = (as_uint(shifted) - as_uint(magic)) << 23;
  return select(tiny, vfloat{}, as_float(as_uint(p) + exponent));
}

// log(a) within 3 ulp for positive normal a, by the atanh series.
VOX_INLINE vfloat log(vfloat a) {
  // a = 2^exponent * fraction, fraction in [sqrt(1/2), sqrt(2))
  const vuint offset = as_uint(a) - 0x3f3504f3u;
  const vint exponent = reinterpret_cast<vint>(offset) >> 23;
  const vuint scaled = as_uint(a) - (reinterpret_cast<vuint>(exponent) << 23);
  const vfloat f = as_float(scaled) - splat(1.0f);
  const vfloat s = f / (splat(2.0f) + f);
  const vfloat s2 = s * s;
  vfloat p = splat(2.0f / 11);
  p = fma(p, s2, splat(2.0f / 9));
  p = fma(p, s2, splat(2.0f / 7));
  p = fma(p, s2, splat(2.0f / 5));
  p = fma(p, s2, splat(2.0f / 3));
  // log(1 + f) = 2 s + s^3 p(s^2), and 2 s = f - f s: the large term f is exact.
  const vfloat small = s * (s2 * p - f);
  const vfloat n = __builtin_convertvector(exponent, vfloat);
  return fma(n, splat(0.693359375f), fma(n, splat(-2.12194440e-4f), small) + f);
}

}  // namespace
}  // namespace voxkern
