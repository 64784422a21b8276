// One thread's part of a matrix product, whatever the weight is stored as. Included by ISA passes
// alone.
#pragma once

#include "common/weight.h"
#include "cpu/gemm/gemm.h"
#include "cpu/gemm/packed_gemm.h"
#include "cpu/runtime/team.h"

namespace voxkern {
namespace {

// Threads split a weight's rows at multiples of this.
constexpr int64_t kPartRows = 16;
static_assert(kPartRows % tile_rows(1) == 0 && kPartRows % kBlockRows == 0);

// The columns in `parts`, at multiples of kPartRows or N, of out [rows, N] = x [rows, C] times the
// transpose of matrix `at` of `weight`; C >= 1. A packed weight takes x as `quantized`.
template <int n, typename T>
inline void project(const T* x, const QuantizedRows& quantized, int64_t rows, const Weight& weight,
                    int64_t at, const Range (&parts)[n], T* out) {
  const int64_t N = weight.N, C = weight.C;
  if (weight.format == Format::plain) {
    const T* const matrix = static_cast<const T*>(weight.data) + at * N * C;
    for (const Range& part : parts) multiply(x, matrix, out, rows, C, N, part.begin, part.end);
  } else {
    const int64_t bytes = (N + kBlockRows - 1) / kBlockRows * block_bytes(weight.format, C);
    const void* const matrix = static_cast<const char*>(weight.data) + at * bytes;
    for (const Range& part : parts)
      multiply(quantized, weight.format, matrix, out, rows, C, N, part.begin, part.end);
  }
}

}  // namespace
}  // namespace voxkern
