// What a queue of weights goes along: matrices, in the order in which a block multiplies with them.
#pragma once

#include "cuda/gemm/product_ends.cuh"

namespace voxkern {
namespace {

// Whose rows go through a queue: `of` matrices [N, C], one behind the other, a tile of each in
// turn.
struct Matrix {
  const void* weight;
  int N, C, of;
  Format format = Format::plain;
};

// A walk over one alone.
template <Format kFormat, int kProducts>
class OneMatrix {
 public:
  static constexpr int kOf = kProducts;                     // of any matrix, at most
  static constexpr Format kFormats[] = {kFormat, kFormat};  // one or the other

  __device__ __forceinline__ explicit OneMatrix(const ProductParams& p)
      : matrix_{p.weight, static_cast<int>(p.N), static_cast<int>(p.C), kOf, kFormat} {}
  __device__ __forceinline__ Matrix first() const { return matrix_; }
  // Whether there is one more.
  __device__ __forceinline__ bool next(Matrix&) { return false; }

 private:
  const Matrix matrix_;
};

// Waits until all but `left` of a thread's groups of copies have arrived, kLeast to kMost of them.
template <int kLeast, int kMost>
__device__ __forceinline__ void wait_copies_but(int left) {
  if constexpr (kMost > kLeast) {
    if (left < kMost) return wait_copies_but<kLeast, kMost - 1>(left);
  }
  wait_copies<kMost>();
}

}  // namespace
}  // namespace voxkern
