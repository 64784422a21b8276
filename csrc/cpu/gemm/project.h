// One thread's part of a GEMM, for a weight of any format. Only ISA passes include it.
#pragma once

#include "common/weight.h"
#include "cpu/gemm/gemm.h"
#include "cpu/gemm/packed_gemm.h"
#include "cpu/runtime/team.h"

namespace voxkern {
namespace {

// Threads partition the rows of a weight at multiples of this.
constexpr int64_t kRowGrain = 16;
static_assert(kRowGrain % tile_rows(1) == 0 && kRowGrain % kBlockRows == 0);

// Computes the columns in `parts` of out [rows, N] = x [rows, C] W^T, where W is matrix `index` of
// `weight` and C >= 1. Ranges begin at multiples of kRowGrain and end at one or at N. A packed
// weight reads `quantized` in place of x.
template <int n, typename T>
inline void project(const T* x, const QuantizedRows& quantized, int64_t rows, const Weight& weight,
                    int64_t index, const Range (&parts)[n], T* out) {
  const int64_t N = weight.N, C = weight.C;
  if (weight.format == Format::plain) {
    const T* const matrix = static_cast<const T*>(weight.data) + index * N * C;
    for (const Range& part : parts) gemm(x, matrix, out, rows, C, N, part.begin, part.end);
  } else {
    const int64_t bytes = (N + kBlockRows - 1) / kBlockRows * block_bytes(weight.format, C);
    const void* const matrix = static_cast<const char*>(weight.data) + index * bytes;
    for (const Range& part : parts)
      packed_gemm(quantized, weight.format, matrix, out, rows, C, N, part.begin, part.end);
  }
}

}  // namespace
}  // namespace voxkern
