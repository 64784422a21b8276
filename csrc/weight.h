// The weight of linear layers, as every matrix product takes it.
#pragma once

#include "dtype.h"

namespace voxkern {

// Matrices of one shape, one after the other.
struct Weight {
  const void* data;  // [..., N, C], of the op's dtype
  int64_t N, C;
};

}  // namespace voxkern

#ifndef VOX_ISA
#include "check.h"

namespace voxkern {

// `sizes` end in N and C.
inline Weight weight_of(const Tensor& t, const char* name, const Tensor& like, const char* letters,
                        std::initializer_list<int64_t> sizes) {
  check_operand(t, name, like, like.scalar_type());
  check_shape(t, name, letters, sizes);
  return {.data = t.const_data_ptr(), .N = t.size(t.dim() - 2), .C = t.size(t.dim() - 1)};
}

}  // namespace voxkern
#endif
