// float32 activations in the form that the weight's format needs: float32, bfloat16 or quantized.
// Only ISA passes include it.
#pragma once

#include "cpu/gemm/project.h"

namespace voxkern {
namespace {

// The x of a GEMM with one weight.
struct Operand {
  float* plain;   // [rows, C]
  bf16* rounded;  // [rows, C]
  QuantizedRows quantized;

  Operand(Arena& arena, const Weight& weight, int64_t rows, float* x)
      : plain(x),
        rounded(arena.take<bf16>(weight.format == Format::bf16 ? rows * weight.C : 0)),
        quantized(arena, is_packed(weight) ? rows : 0, weight.C) {}

  static bool is_packed(const Weight& weight) {
    return weight.format == Format::int8 || weight.format == Format::int4;
  }

  // Converts elements begin .. end of x, counted across all rows. Both are multiples of 32 for a
  // packed weight.
  void prepare(const Weight& weight, int64_t rows, int64_t begin, int64_t end) const {
    if (is_packed(weight)) return quantize(plain, quantized, rows, weight.C, begin, end);
    if (weight.format != Format::bf16) return;
    int64_t i = begin;
    for (; i + kWidth <= end; i += kWidth) store(rounded + i, load(plain + i));
    if (i < end) store_n(rounded + i, load_n(plain + i, end - i), end - i);
  }
};

// project() of project.h for one range of columns and activations in any form.
inline void project(const Operand& x, int64_t rows, const Weight& weight, int64_t index,
                    const Range& part, float* out) {
  const int64_t N = weight.N, C = weight.C;
  if (weight.format == Format::bf16)
    gemm(x.rounded, static_cast<const bf16*>(weight.data) + index * N * C, out, rows, C, N,
         part.begin, part.end);
  else
    project(x.plain, x.quantized, rows, weight, index, {part}, out);
}

}  // namespace
}  // namespace voxkern
