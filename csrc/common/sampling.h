// The sampling parameters of one row, as the samplers of all devices take them, and their random
// numbers: Philox 4x32-10, the counter-based generator that all sampling uses (Salmon et al. 2011,
// https://doi.org/10.1145/2063384.2063405). Its key is the seed; its counter is (block, codebook,
// frame).
#pragma once

#include "common/check.h"

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

// Internal linkage: CPU kernels are compiled once per instruction set, and the linker must not
// merge the copies, or a CPU would run another instruction set's.
namespace {

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

struct PhiloxWords {
  uint32_t word[4];
};

VOX_HOST_DEVICE inline PhiloxWords philox(PhiloxWords counter, uint32_t key0, uint32_t key1) {
  uint32_t a = counter.word[0], b = counter.word[1], c = counter.word[2], d = counter.word[3];
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(a) * 0xD2511F53u;
    const uint64_t product1 = static_cast<uint64_t>(c) * 0xCD9E8D57u;
    a = static_cast<uint32_t>(product1 >> 32) ^ b ^ key0;
    c = static_cast<uint32_t>(product0 >> 32) ^ d ^ key1;
    b = static_cast<uint32_t>(product1);
    d = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{a, b, c, d}};
}

// One draw is (seed, frame, codebook). Returns the words for its candidate codes 4 * block to
// 4 * block + 3.
VOX_HOST_DEVICE inline PhiloxWords draw_words(int64_t seed, int64_t frame, int64_t codebook,
                                              int64_t block) {
  const uint64_t s = static_cast<uint64_t>(seed), f = static_cast<uint64_t>(frame);
  const PhiloxWords counter = {{static_cast<uint32_t>(block), static_cast<uint32_t>(codebook),
                                static_cast<uint32_t>(f), static_cast<uint32_t>(f >> 32)}};
  return philox(counter, static_cast<uint32_t>(s), static_cast<uint32_t>(s >> 32));
}

// A uniform number in (0, 1), symmetric about 1/2, exact in float32.
VOX_HOST_DEVICE inline float uniform(uint32_t word) {
  return static_cast<float>(word >> 9) * 0x1p-23f + 0x1p-24f;
}

}  // namespace

#ifndef VOX_ISA

// Checks the sampling arguments of an op that draws: contiguous [B] tensors.
inline void check_sampling(const Tensor& like, int64_t B, const Tensor& temperature,
                           const Tensor& top_k, const Tensor& top_p, const Tensor& min_p,
                           const Tensor& seeds, const Tensor& frames) {
  const auto check_rows = [&](const Tensor& t, const char* name, ScalarType type) {
    check_operand(t, name, like, type);
    check_shape(t, name, "[B]", {B});
  };
  check_rows(temperature, "temperature", ScalarType::Float);
  check_rows(top_k, "top_k", ScalarType::Int);
  check_rows(top_p, "top_p", ScalarType::Float);
  check_rows(min_p, "min_p", ScalarType::Float);
  check_rows(seeds, "seeds", ScalarType::Long);
  check_rows(frames, "frames", ScalarType::Long);
}

#endif

}  // namespace voxkern
