// The weight of a linear layer, as every GEMM takes it: plain, or packed by voxkern/quantize.py
// into blocks of 16 rows, each read from first byte to last. Rows past N are zeros.
//
//   int8: int8 [..., N / 16, 16 C + 64]. Byte 64 i + 4 r + c is row r, column 4 i + c. The 16 row
//     scales follow in float32.
//   int4: uint8 [..., N / 16, 8 C + C / 2 + 64]. Byte 64 i + 4 r + c holds row r's columns 8 i + c
//     (low half) and 8 i + 4 + c (high half), both stored plus 8. Byte 16 g + r of the next C / 2
//     is the scale of row r's columns 32 g .. 32 g + 31: a sign, 3 bits of exponent, 4 of mantissa,
//     (-1)^s 2^(e - 7) (1 + m / 16). The 16 row scales follow in float32; they multiply the group
//     scales.
#pragma once

#include "common/check.h"

namespace voxkern {

// plain: unpacked, in the op's dtype. bf16: unpacked bfloat16 in an op with float32 activations.
enum class Format : int32_t { plain, bf16, int8, int4 };

constexpr int64_t kBlockRows = 16;
constexpr int64_t kGroup = 32;  // columns that share a scale: always in x, in W for int4

// Bytes of the values of 16 rows and 32 columns.
VOX_HOST_DEVICE constexpr int64_t group_bytes(Format format) {
  return format == Format::int4 ? 256 : 512;
}
// Bytes of the group scales of 16 rows and 32 columns.
VOX_HOST_DEVICE constexpr int64_t scale_bytes(Format format) {
  return format == Format::int4 ? 16 : 0;
}
// Bytes of a block of 16 rows, row scales included.
VOX_HOST_DEVICE constexpr int64_t block_bytes(Format format, int64_t C) {
  return C / kGroup * (group_bytes(format) + scale_bytes(format)) + 64;
}

// One or more matrices of the same shape, stored contiguously.
struct Weight {
  Format format;
  const void* data;  // [..., N, C], in the op's dtype or packed
  int64_t N, C;
};

#ifndef VOX_ISA

// The format by dtype: uint8 is int4, int8 is int8, all else is plain.
inline Format weight_format(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Byte: return Format::int4;
    case ScalarType::Char: return Format::int8;
    default: return Format::plain;
  }
}

// The number of columns C. The caller has checked t.dim().
inline int64_t weight_columns(const Tensor& t) {
  const int64_t last = t.size(t.dim() - 1);
  switch (weight_format(t)) {
    case Format::int4: return (last - 64) * 2 / 17;
    case Format::int8: return (last - 64) / 16;
    case Format::bf16:
    case Format::plain: break;
  }
  return last;
}

// Checks and returns a weight of plain shape `sizes` = [..., N, C]; `letters` spells the shape for
// the error message. N may be kAny; a packed weight then has all the rows of its blocks.
inline Weight weight_of(const Tensor& t, const char* name, const Tensor& like, const char* letters,
                        std::initializer_list<int64_t> sizes) {
  const Format format = weight_format(t);
  const int64_t N = sizes.end()[-2], C = sizes.end()[-1];
  check_operand(t, name, like, format == Format::plain ? like.scalar_type() : t.scalar_type());
  if (format == Format::plain) {
    check_shape(t, name, letters, sizes);
    return {.format = format, .data = t.const_data_ptr(), .N = t.size(t.dim() - 2), .C = C};
  }
  check(C % kGroup == 0, name, ": packed, which needs columns in a multiple of 32, got ", C);
  std::vector<int64_t> packed(sizes.begin(), sizes.end() - 2);
  packed.push_back(N == kAny ? kAny : (N + kBlockRows - 1) / kBlockRows);
  packed.push_back(block_bytes(format, C));
  check_sizes(t, name, (std::string(letters) + " packed").c_str(), packed.data(), packed.size());
  return {
      .format = format,
      .data = t.const_data_ptr(),
      .N = N == kAny ? t.size(t.dim() - 2) * kBlockRows : N,
      .C = C,
  };
}

// weight_of for ops with float32 activations, where a plain weight may also be bfloat16.
inline Weight mixed_weight_of(const Tensor& t, const char* name, const Tensor& like,
                              const char* letters, std::initializer_list<int64_t> sizes) {
  if (t.scalar_type() != ScalarType::BFloat16) return weight_of(t, name, like, letters, sizes);
  check_device(t, name, like);
  Weight weight = weight_of(t, name, t, letters, sizes);
  weight.format = Format::bf16;
  return weight;
}

#endif

}  // namespace voxkern
