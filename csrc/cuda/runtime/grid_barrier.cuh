// Phases of a resident grid, in which blocks read what other blocks wrote in the phases before.
//
// Only blocks that do something in a phase take part in it: they wait until all that took part
// before have come, and say so themselves at its end. So a phase of two blocks costs the others
// nothing, and what is written to memory that an earlier phase reads is safe: its readers have
// come.
//
// A round trip is a store's way to the second-level cache, one addition there for each block, and
// the poll that finds the last one: some 1.2 us on an H100.
//
// The last warp of a block does it, and should have no asynchronous copies of its own under way: a
// release might wait for those.
//
// Whoever waits for longer than kPatience gives up for the whole grid: all blocks leave at their
// next wait, and the kernel ends with what it has. A resident grid never waits as long.
#pragma once

#include "cuda/runtime/launch.cuh"

namespace voxkern {
namespace {

class GridBarrier {
 public:
  // `arrived` is 0 before the launch.
  __device__ __forceinline__ explicit GridBarrier(unsigned* arrived) : arrived_(arrived) {}

  // The whole block, until all phases so far have ended; false if some block gave up.
  __device__ __forceinline__ bool wait() {
    VOX_SHARED(bool[2], goes_on);
    turn_ ^= 1;
    if (threadIdx.x == blockDim.x - kWarp) {
      unsigned seen = load_acquire(arrived_);
      uint64_t waited = 0, last = 0;
      for (unsigned polls = 1; seen < expected_; ++polls) {
        let_others_run();
        if (polls % kPolls == 0) {
          const uint64_t now = nanoseconds(), since = last ? now - last : 0;
          waited += since < kMostSince ? since : kMostSince;
          last = now;
          if (waited > kPatience) atomicOr(arrived_, kGivenUp);
        }
        seen = load_acquire(arrived_);
      }
      goes_on[turn_] = seen < kGivenUp;
    }
    __syncthreads();
    return goes_on[turn_];
  }

  // The whole block: its part of this phase is written.
  __device__ __forceinline__ void arrive() const {
    __syncthreads();
    if (threadIdx.x == blockDim.x - kWarp) add_release(arrived_, 1);
  }

  // All blocks, whether they took part or not: `blocks` did in the phase that ends here.
  __device__ __forceinline__ void next_phase(unsigned blocks) { expected_ += blocks; }

 private:
  static constexpr unsigned kGivenUp = 1u << 31;  // more than ever arrive
  static constexpr unsigned kPolls = 64;          // from one look at the clock to the next
  // ns. A look adds but so much: a card that was halted meanwhile is no reason to give up.
  static constexpr uint64_t kPatience = 2'000'000'000, kMostSince = 10'000'000;

  unsigned* const arrived_;
  unsigned expected_ = 0;
  int turn_ = 0;
};

}  // namespace
}  // namespace voxkern
