// The sampling parameters of one row, as the samplers of all devices take them.
#pragma once

#include <cstdint>

#include "common/dtype.h"

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

namespace {  // internal linkage: CPU kernels are compiled once per instruction set

// Row b of an op's [B] sampling arguments, without a repetition penalty.
template <typename Params>
VOX_HOST_DEVICE inline SamplerRow sampler_row(const Params& p, int64_t b, int64_t codebook) {
  return {
      .temperature = p.temperature[b],
      .top_k = p.top_k[b],
      .top_p = p.top_p[b],
      .min_p = p.min_p[b],
      .repetition_penalty = 1.0f,
      .history = nullptr,
      .W = 0,
      .seed = p.seeds[b],
      .frame = p.frames[b],
      .codebook = codebook,
  };
}

}  // namespace

}  // namespace voxkern
