// Launches a causal convolution and updates its past, for the ops mimi_conv and mimi_convs. Defined
// in conv.cu.
#pragma once

#include <vector>

#include "cuda/runtime/launch.cuh"
#include "params/mimi_conv.h"

namespace voxkern {

struct MimiConvStart {
  // [B], true for streams whose past is their first sample, repeated; may be null.
  const bool* is_first = nullptr;
  int64_t width = 0;  // columns of a sample
};

// Does not update p.past, which other thread blocks of the launch may still read: keep_past() does.
void mimi_conv(const MimiConvParams& p, const MimiConvStart& start, cudaStream_t stream);

struct FinishedConv {
  MimiConvParams params;
  MimiConvStart start;
};
// Stores each convolution's last inputs as the past of its next call.
void keep_past(const std::vector<FinishedConv>& convs, cudaStream_t stream);

}  // namespace voxkern
