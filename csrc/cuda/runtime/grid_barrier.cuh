// Phases of a resident grid, in which blocks read what other blocks wrote in earlier phases.
//
// Only blocks with work in a phase take part in it: they wait until all participants of the earlier
// phases have arrived, and arrive themselves at its end. So a phase of two blocks costs the others
// nothing, and overwriting memory that an earlier phase reads is safe: its readers have arrived.
//
// A round trip is a store to L2, one addition there per block, and the poll that sees the last one
// (docs/cuda.md has its estimated time).
//
// The last warp of a block does it. It should have no asynchronous copies in flight: a release
// might wait for those.
//
// A block that waits for longer than kPatience gives up for the whole grid: all blocks leave at
// their next wait, and the kernel ends with incomplete results. A resident grid never waits that
// long.
#pragma once

#include "cuda/runtime/launch.cuh"

namespace voxkern {
namespace {

class GridBarrier {
 public:
  // `arrived` is 0 before the launch.
  VOX_DEVICE explicit GridBarrier(unsigned* arrived) : arrived_(arrived) {}

  // Called by the whole block: waits until all phases so far have ended; false if a block gave up.
  VOX_DEVICE bool wait() {
    VOX_SHARED(bool[2], continues);
    buffer_ ^= 1;
    if (threadIdx.x == blockDim.x - kWarp) {
      unsigned seen = load_acquire(arrived_);
      uint64_t waited = 0, last = 0;
      for (unsigned polls = 1; seen < expected_; ++polls) {
        let_others_run();
        if (polls % kPolls == 0) {
          const uint64_t now = nanoseconds(), since = last ? now - last : 0;
          waited += since < kMaxSince ? since : kMaxSince;
          last = now;
          if (waited > kPatience) atomicOr(arrived_, kGivenUp);
        }
        seen = load_acquire(arrived_);
      }
      continues[buffer_] = seen < kGivenUp;
    }
    __syncthreads();
    return continues[buffer_];
  }

  // Called by the whole block, after it has written its part of this phase.
  VOX_DEVICE void arrive() const {
    __syncthreads();
    if (threadIdx.x == blockDim.x - kWarp) add_release(arrived_, 1);
  }

  // Called by all blocks, participants or not: `blocks` of them took part in the phase that ends.
  VOX_DEVICE void next_phase(unsigned blocks) { expected_ += blocks; }

 private:
  static constexpr unsigned kGivenUp = 1u << 31;  // more blocks than can ever arrive
  static constexpr unsigned kPolls = 64;          // between two readings of the clock
  // In ns. A reading adds at most kMaxSince: a GPU that was halted meanwhile must not give up.
  static constexpr uint64_t kPatience = 2'000'000'000, kMaxSince = 10'000'000;

  unsigned* const arrived_;
  unsigned expected_ = 0;
  int buffer_ = 0;
};

}  // namespace
}  // namespace voxkern
