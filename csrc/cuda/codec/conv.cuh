// A convolution by its Params, for mimi_convs. Defined in mimi_conv.cu.
#pragma once

#include <vector>

#include "cuda/runtime/launch.cuh"
#include "params/mimi_conv.h"

namespace voxkern {

struct MimiConvStart {
  const bool* fresh =
      nullptr;        // [B], streams whose past is their first sample over and over; or null
  int64_t width = 0;  // of a sample
};

// Leaves the past as it was: other blocks of the launch may still read it.
void mimi_conv(const MimiConvParams& p, const MimiConvStart& start, cudaStream_t stream);

struct FinishedConv {
  MimiConvParams params;
  MimiConvStart start;
};
// Makes of the pasts of convolutions of B streams what comes before their next blocks.
void keep_past(const std::vector<FinishedConv>& convs, cudaStream_t stream);

}  // namespace voxkern
