// Every matrix product of the CPU kernels goes through project(), whatever its weight is stored
// as. Included by ISA passes alone.
#pragma once

#include "../weight.h"
#include "gemm.h"
#include "team.h"

namespace voxkern {
namespace {

// Threads split a weight's rows at multiples of this.
constexpr int64_t kPartRows = 16;
static_assert(kPartRows % tile_rows(1) == 0);

// The columns in `parts` of out [rows, N] = x [rows, C] times the transpose of matrix `at` of
// `weight`; C >= 1.
template <int n, typename T>
inline void project(const T* x, int64_t rows, const Weight& weight, int64_t at,
                    const Range (&parts)[n], T* out) {
  const T* const matrix = static_cast<const T*>(weight.data) + at * weight.N * weight.C;
  for (const Range& part : parts)
    multiply(x, matrix, out, rows, weight.C, weight.N, part.begin, part.end);
}

}  // namespace
}  // namespace voxkern
