// out = x W^T, optionally fused with a step before it and one after it. gemm.cu chooses the kernel.
#pragma once

#include "common/weight.h"
#include "cuda/runtime/launch.cuh"

namespace voxkern {

enum class Prologue { none, norm };  // norm: x normalised as by rms_norm
enum class Epilogue {
  store,   // out [M, N] = x W^T
  add,     // out = residual + x W^T
  swiglu,  // out = silu(x gate^T) x up^T
};

struct GemmParams {
  Dtype dtype;
  int64_t M, N, C;
  const void* x;  // [M, C]
  Prologue prologue = Prologue::none;
  const void* norm = nullptr;  // [C], the weight of Prologue::norm
  float eps = 0;
  Format format = Format::plain;
  const void* weight;  // [N, C]; for SwiGLU [2 N, C], gate's rows first
  Epilogue epilogue = Epilogue::store;
  const void* residual = nullptr;  // [M, N]
  void* out;                       // [M, N]; may be `residual`
  // The kernel reads the weight before the previous kernel has ended.
  bool overlaps_previous = true;
};

// True if gemm() takes this prologue and this epilogue: few rows in bfloat16, vector-aligned.
bool can_fuse(const GemmParams& p);
// Takes any shape with Prologue::none and Epilogue::store; everything else needs can_fuse(p).
void gemm(const GemmParams& p, cudaStream_t stream);

}  // namespace voxkern
