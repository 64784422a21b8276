// A convolution by its Params, for mimi_conv and mimi_convs. Defined in conv.cu.
#pragma once

#include <vector>

#include "cuda/runtime/launch.cuh"
#include "params/mimi_conv.h"

namespace voxkern {

struct MimiConvStart {
  // [B], streams whose past is their first sample repeated; may be null.
  const bool* is_first = nullptr;
  int64_t width = 0;  // of a sample
};

// Does not change the past, which other blocks of the launch may still read.
void mimi_conv(const MimiConvParams& p, const MimiConvStart& start, cudaStream_t stream);

struct FinishedConv {
  MimiConvParams params;
  MimiConvStart start;
};
// Updates the pasts of convolutions of B streams for their next blocks.
void keep_past(const std::vector<FinishedConv>& convs, cudaStream_t stream);

}  // namespace voxkern
