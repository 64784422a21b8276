// Philox 4x32-10, the counter-based random number generator that all sampling on every device uses
// (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405). The key is the seed; the counter
// is (block, codebook, frame).
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace voxkern {
// Internal linkage: CPU kernels are compiled once per instruction set, and the linker must not
// merge the copies, or a CPU would run another instruction set's.
namespace {

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
}  // namespace voxkern
