// All positions of decode_depth behind the projection in one launch; persistent_depth.cu defines
// it.
#pragma once

#include "cuda/runtime/common.cuh"
#include "params/decode_depth.h"

namespace voxkern {

struct PersistentDepthParams {
  DecodeDepthParams op;
  void* residual;           // [B, C], at first position 0's
  void *qkv, *attended;     // [B, (Hq + 2 Hkv) D], [B, Hq D]
  void* activated;          // [B, F]
  void* logits;             // [B, V]
  void *k_cache, *v_cache;  // [L, B, Hkv, K, D]
  unsigned* arrived;        // 0
};

// False, and no launch, if it does not take these sizes, weights or this device.
bool persistent_depth(const PersistentDepthParams& p, cudaStream_t stream);

}  // namespace voxkern
