// simt_planted NAME: runs one small kernel. A correct one prints "right"; each of the others has a
// bug, and either throws (the message is printed), prints "wrong" or is stopped by the sanitizer.
// tests/simt/test_simt.py says which.
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "cuda/runtime/elements.cuh"
#include "cuda/runtime/grid_barrier.cuh"

namespace voxkern {
namespace {

constexpr int kThreads = 96;

// Sum over the block of i + 1, in every thread.
__global__ void sum_kernel(int* out) {
  VOX_SHARED(int[kMaxWarps], partials);
  out[blockIdx.x * blockDim.x + threadIdx.x] =
      block_reduce(static_cast<int>(threadIdx.x) + 1, partials, Add());
}

// Each thread writes an element and reads its neighbour's; kBarrier: with a barrier in between.
template <bool kBarrier>
__global__ void neighbour_kernel(int* out) {
  VOX_SHARED(int[kThreads], places);
  places[threadIdx.x] = threadIdx.x;
  if (kBarrier) __syncthreads();
  out[threadIdx.x] =
      places[(threadIdx.x + 1) % kThreads] == static_cast<int>(threadIdx.x + 1) % kThreads;
}

// The same for the first 64 threads, while the others wait for them; kMissing: one of them is
// missing.
template <bool kMissing>
__global__ void first_threads_kernel(int* out) {
  VOX_SHARED(int[64], places);
  const int me = threadIdx.x;
  bool right = true;
  if (me < 64 && !(kMissing && me == 50)) {
    places[me] = me;
    sync_first<64>();
    right = places[(me + 33) % 64] == (me + 33) % 64;
  }
  __syncthreads();
  out[me] = right;
}

// The same with a barrier, but the element is overwritten without one.
__global__ void overwrite_kernel(int* out) {
  VOX_SHARED(int[kThreads], places);
  bool right = true;
  for (int round = 0; round < 3; ++round) {
    places[threadIdx.x] = threadIdx.x + round;
    __syncthreads();
    right &= places[(threadIdx.x + 1) % kThreads] ==
             static_cast<int>(threadIdx.x + 1) % kThreads + round;
  }
  out[threadIdx.x] = right;
}

// The same, undetected unless one warp falls back.
__global__ void late_overwrite_kernel(int* out) {
  VOX_SHARED(int[kThreads], places);
  bool right = true;
  for (int round = 0; round < 20; ++round) {
    places[threadIdx.x] = threadIdx.x;
    __syncthreads();
    right &= places[(threadIdx.x + 32) % kThreads] == static_cast<int>(threadIdx.x + 32) % kThreads;
    for (int i = 0; i < 8; ++i) __syncwarp();
    places[threadIdx.x] = -1;
    __syncthreads();
  }
  out[threadIdx.x] = right;
}

template <bool kWait>
__global__ void warp_kernel(int* out) {
  VOX_SHARED(int[kThreads], places);
  places[threadIdx.x] = threadIdx.x;
  if (kWait) __syncwarp();
  out[threadIdx.x] = places[threadIdx.x ^ 1] == static_cast<int>(threadIdx.x ^ 1);
}

__global__ void unwritten_kernel(int* out) {
  VOX_SHARED(float[kThreads], places);
  if (threadIdx.x > 0) places[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = places[kThreads - 1 - threadIdx.x] == 1;
}

__global__ void divergent_kernel(int* out) {
  if (threadIdx.x < 40)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void left_kernel(int* out) {
  out[threadIdx.x] = 1;
  if (threadIdx.x == 50) return;
  __syncthreads();
}

__global__ void missing_lane_kernel(int* out) {
  out[threadIdx.x] = 1;
  if (threadIdx.x % 32 < 31) out[threadIdx.x] = __shfl_sync(kWholeWarp, 1, 0);
}

__global__ void mask_kernel(int* out) { out[threadIdx.x] = __any_sync(0x0fffffff, 1); }

__global__ void outside_mask_kernel(int* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_sync(0xffff, 1, 20);
}

__global__ void mixed_kernel(int* out) {
  if (threadIdx.x % 2)
    out[threadIdx.x] = __any_sync(kWholeWarp, 1);
  else
    out[threadIdx.x] = __all_sync(kWholeWarp, 1);
}

__global__ void shared_overrun_kernel(int* out) {
  VOX_DYNAMIC_SHARED(int, places);
  places[threadIdx.x] = 1;  // 95 elements
  out[threadIdx.x] = 1;
}

__global__ void static_overrun_kernel(int* out) {
  VOX_SHARED(int[kThreads - 1], places);
  int* const all = places;
  all[threadIdx.x] = 1;
  out[threadIdx.x] = 1;
}

__global__ void misaligned_kernel(int* out) {
  VOX_DYNAMIC_SHARED(unsigned char, bytes);
  const uint4 zero = {};
  *reinterpret_cast<uint4*>(bytes + 8) = zero;
  out[threadIdx.x] = 1;
}

// Copies complete when they are waited for, or earlier.
template <bool kWait>
__global__ void copy_kernel(int* out) {
  VOX_SHARED(int[kThreads], places);
  const int from = threadIdx.x;
  simt::copy_async(&places[threadIdx.x], &from, sizeof from);
  simt::commit_copies();
  if (kWait) simt::wait_copies(0);
  out[threadIdx.x] = places[threadIdx.x] == from;
}

// Resident blocks wait for each other.
__global__ void grid_kernel(int* arrived, int* out) {
  if (threadIdx.x == 0) {
    atomicAdd(arrived, 1);
    while (*static_cast<volatile int*>(arrived) < static_cast<int>(gridDim.x)) __nanosleep(20);
  }
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = *arrived == static_cast<int>(gridDim.x);
}

// In phase k, blocks 0 .. k % blocks add one to the count of the previous phase. kMissing: block 1
// leaves without arriving, and the others give up.
constexpr int kPhases = 60;
template <bool kMissing>
__global__ void phases_kernel(unsigned* arrived, int* counts, int* out) {
  GridBarrier grid(arrived);
  const int blocks = gridDim.x, me = blockIdx.x;
  int expected = 0;
  bool goes_on = !(kMissing && me == 1);
  for (int k = 0; k < kPhases && goes_on; ++k) {
    const int part = k % blocks + 1, before = k ? (k - 1) % blocks + 1 : 0;
    if (me < part && (goes_on = grid.wait())) {
      int sum = 1;
      for (int b = 0; b < before; ++b) sum += counts[(k - 1) * blocks + b];
      if (threadIdx.x == kThreads - 1) counts[k * blocks + me] = sum % 1009;
      grid.arrive();
    }
    grid.next_phase(part);
    expected = (expected * before + 1) % 1009;
  }
  const bool right =
      kMissing ? !goes_on : goes_on && grid.wait() && counts[(kPhases - 1) * blocks] == expected;
  out[blockIdx.x * blockDim.x + threadIdx.x] = right;
}

// The first of two kernels writes, the second reads; kWait: after waiting for the first.
__global__ void first_kernel(int* out) { out[threadIdx.x] = 0; }
template <bool kWait>
__global__ void second_kernel(int* out) {
  const int early = kWait ? 0 : out[threadIdx.x];
  if (threadIdx.x < 64) wait_for_previous_kernel();
  __syncthreads();
  out[threadIdx.x] = (kWait ? out[threadIdx.x] : early) == 0;
}
__global__ void wait_kernel() {
  let_next_kernel_start();
  wait_for_previous_kernel();
}
// Lets no kernel start before all previous ones have ended.
__global__ void late_kernel() {
  wait_for_previous_kernel();
  let_next_kernel_start();
}
// Reads before it waits.
__global__ void early_kernel(int* out) {
  const int early = out[threadIdx.x];
  let_next_kernel_start();
  wait_for_previous_kernel();
  out[threadIdx.x] = early == 0;
}
// One of its blocks does not wait.
__global__ void third_kernel(int* out) {
  if (blockIdx.x == 0) wait_for_previous_kernel();
  if (blockIdx.x == 0) out[threadIdx.x] = 1;
}

// One warp's product: rows of A [16, 32] and columns of B, [8, 32] here, to d [16, 8].
__global__ void product_kernel(const int8_t* a, const int8_t* b, int* d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto four = [](const int8_t* p) { return *reinterpret_cast<const uint32_t*>(p); };
  const int8_t *low = a + g * 32 + t * 4, *high = low + 8 * 32, *column = b + g * 32 + t * 4;
  int32_t mine[4];
  multiply_s8(mine, {four(low), four(high), four(low + 16), four(high + 16)}, four(column),
              four(column + 16), 1000);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = mine[i];
}

bool product_is_right() {
  alignas(4) int8_t a[16 * 32], b[8 * 32];
  uint32_t state = 1;
  const auto next = [&] {
    return static_cast<int8_t>((state = state * 1664525 + 1013904223) >> 24);
  };
  for (int8_t& value : a) value = next();
  for (int8_t& value : b) value = next();
  int d[16 * 8];
  simt::launch_kernel(product_kernel, {1, kWarp, 0, false}, a, b, d);
  simt::finish();
  for (int i = 0; i < 16 * 8; ++i) {
    int expected = 1000;
    for (int k = 0; k < 32; ++k) expected += a[i / 8 * 32 + k] * b[i % 8 * 32 + k];
    if (d[i] != expected) return false;
  }
  return true;
}

struct Case {
  void (*kernel)(int*);
  size_t shared_bytes = 0;
};

const std::map<std::string, Case> kCases = {
    {"neighbour", {neighbour_kernel<true>}},
    {"neighbour without barrier", {neighbour_kernel<false>}},
    {"first threads", {first_threads_kernel<false>}},
    {"first threads that lack one", {first_threads_kernel<true>}},
    {"overwrite without barrier", {overwrite_kernel}},
    {"late overwrite without barrier", {late_overwrite_kernel}},
    {"warp", {warp_kernel<true>}},
    {"warp without syncwarp", {warp_kernel<false>}},
    {"unwritten", {unwritten_kernel}},
    {"divergent barrier", {divergent_kernel}},
    {"left before a barrier", {left_kernel}},
    {"missing lane", {missing_lane_kernel}},
    {"mask without its caller", {mask_kernel}},
    {"outside the mask", {outside_mask_kernel}},
    {"mixed operations", {mixed_kernel}},
    {"shared overrun", {shared_overrun_kernel, (kThreads - 1) * sizeof(int)}},
    {"static overrun", {static_overrun_kernel}},
    {"misaligned", {misaligned_kernel, 64}},
    {"copy", {copy_kernel<true>}},
    {"copy without wait", {copy_kernel<false>}},
};

bool all_ones(const std::vector<int>& values) {
  for (int value : values)
    if (value != 1) return false;
  return true;
}

bool run(const std::string& name) {
  if (name == "sum") {
    std::vector<int> out(5 * kThreads);
    simt::launch_kernel(sum_kernel, {5, kThreads, 0, false}, out.data());
    simt::finish();
    for (int value : out)
      if (value != kThreads * (kThreads + 1) / 2) return false;
    return true;
  }
  if (name == "product") return product_is_right();
  if (name == "grid" || name == "grid that is not resident") {
    std::vector<int> out(4 * kThreads);
    int arrived = 0;
    simt::launch_kernel(grid_kernel, {4, kThreads, 0, name == "grid"}, &arrived, out.data());
    simt::finish();
    return all_ones(out);
  }
  if (name == "phases" || name == "phases that lack a block") {
    std::vector<int> out(4 * kThreads), counts(kPhases * 4, -1);
    unsigned arrived = 0;
    auto* const kernel = name == "phases" ? phases_kernel<false> : phases_kernel<true>;
    simt::launch_kernel(kernel, {4, kThreads, 0, true}, &arrived, counts.data(), out.data());
    simt::finish();
    return all_ones(out);
  }
  if (name.starts_with("overlap")) {
    std::vector<int> out(kThreads, -1);
    const simt::Launch overlapping = {2, kThreads, 0, false, true};
    const bool late = name == "overlap after a late start";
    if (late || name == "overlap without a late start") {
      simt::launch_kernel(first_kernel, {1, kThreads, 0, false}, out.data());
      simt::launch_kernel(late ? late_kernel : wait_kernel, overlapping);
      simt::launch_kernel(early_kernel, {1, kThreads, 0, false, true}, out.data());
      simt::finish();
      return all_ones(out);
    }
    simt::launch_kernel(first_kernel, {1, kThreads, 0, false}, out.data());
    if (name == "overlap that lasts")
      for (int i = 0; i < 6; ++i) simt::launch_kernel(wait_kernel, overlapping);
    auto* const second = name == "overlap that reads" ? second_kernel<false> : second_kernel<true>;
    simt::launch_kernel(second, {1, kThreads, 0, false, true}, out.data());
    if (name == "overlap that never waits")
      simt::launch_kernel(third_kernel, overlapping, out.data());
    simt::finish();
    return all_ones(out);
  }
  const Case& chosen = kCases.at(name);
  // A launch that throws must not affect the next one.
  for (int again = 0; again < 2; ++again) {
    std::vector<int> out(kThreads, -1);
    try {
      simt::launch_kernel(chosen.kernel, {1, kThreads, chosen.shared_bytes, false}, out.data());
      simt::finish();
    } catch (const std::exception& error) {
      if (again) throw;
      continue;
    }
    if (!all_ones(out)) return false;
  }
  return true;
}

}  // namespace
}  // namespace voxkern

int main(int, char** arguments) {
  try {
    std::puts(voxkern::run(arguments[1]) ? "right" : "wrong");
  } catch (const std::exception& error) {
    std::puts(error.what());
  }
}
