// A product of few rows with what comes right before and right after it, for ops that are made of
// others; linear.cu defines it, packed_product.cu for packed weights.
#pragma once

#include "common/weight.h"
#include "cuda/runtime/launch.cuh"

namespace voxkern {

enum class Before { nothing, norm };
enum class After {
  store,   // out [M, N] = x W^T
  add,     // out = residual + x W^T
  swiglu,  // out = silu(x gate^T) x up^T
};

struct ProductParams {
  Dtype dtype;
  int64_t M, N, C;
  const void* x;  // [M, C]
  Before before = Before::nothing;
  const void* norm = nullptr;  // [C], Before::norm's weight
  float eps = 0;
  Format format = Format::plain;
  const void* weight;  // [N, C]; with SwiGLU [2 N, C], gate's rows first
  After after = After::store;
  const void* residual = nullptr;  // [M, N]
  void* out;                       // [M, N]; may be `residual`
  bool overlaps_previous = true;
};

// Whether product() takes it.
bool fits(const ProductParams& p);
void product(const ProductParams& p, cudaStream_t stream);
// The same of packed weights alone.
bool packed_fits(const ProductParams& p);
void packed_product(const ProductParams& p, cudaStream_t stream);

}  // namespace voxkern
