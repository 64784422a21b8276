// The rotations of the codec's transformer: a table [B T, D] of cosines | sines.
#pragma once

#include "cuda/runtime/launch.cuh"
#include "params/mimi_transformer.h"

namespace voxkern::codec {
namespace {

// Within 1e-7 of torch's. The angle is reduced to -pi / 4 .. pi / 4 in float64, then evaluated with
// the polynomials of Cephes (https://www.netlib.org/cephes). sinf() would need a stack.
VOX_DEVICE void sine_and_cosine(float angle, float& sine, float& cosine) {
  const double quarters = rint(static_cast<double>(angle) * 0.63661977236758134308);
  const float r =
      static_cast<float>(fma(quarters, -1.57079632679489661923, static_cast<double>(angle)));
  const float s = r * r;
  float odd = fmaf(s, -1.9515295891e-4f, 8.3321608736e-3f);
  odd = fmaf(fmaf(s, odd, -1.6666654611e-1f), s * r, r);
  float even = fmaf(s, 2.443315711809948e-5f, -1.388731625493765e-3f);
  even = fmaf(fmaf(s, even, 4.166664568298827e-2f), s * s, fmaf(s, -0.5f, 1.0f));
  const int quarter = static_cast<int>(static_cast<int64_t>(quarters) & 3);
  sine = quarter % 2 ? even : odd;
  cosine = quarter % 2 ? odd : even;
  if (quarter >= 2) sine = -sine;
  if (quarter == 1 || quarter == 2) cosine = -cosine;
}

// A thread takes one angle of one step.
__global__ void rotations_kernel(MimiTransformerParams p, const float* frequencies, float* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t half = p.D / 2, row = i / half, f = i % half;
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (row >= p.B * p.T) return;
  const float angle = static_cast<float>(p.positions[row / p.T] + row % p.T) * frequencies[f];
  sine_and_cosine(angle, out[row * p.D + half + f], out[row * p.D + f]);
}

}  // namespace
}  // namespace voxkern::codec
