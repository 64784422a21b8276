// How one row's code is drawn: what the samplers of all devices take.
#pragma once

#include <cstdint>

namespace voxkern {

struct SamplerRow {
  float temperature;
  int32_t top_k;
  float top_p;
  float min_p;
  float repetition_penalty;
  const int64_t* history;  // [W]; may be null if W is 0
  int64_t W;
  int64_t seed;
  int64_t frame;
  int64_t codebook;
};

}  // namespace voxkern
