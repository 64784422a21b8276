// An emulation of CUDA for the host compiler: the kernels of csrc/cuda run on a CPU unchanged.
// Force-included before each .cu; scheduler.cpp runs the fibers, simt.cpp has what they call.
//
// Every thread of a block is a fiber that runs until it waits: at __syncthreads, or at a warp
// operation whose mask names lanes that have not arrived yet. VOXKERN_SIMT_ORDER sets the order of
// the fibers: `random` (a new order whenever all have run, with one thread or warp held back until
// no other can continue), `ascending` or `descending`. If a necessary barrier is missing, one of
// them gives wrong results. A launch throws if threads wait for others that never arrive (ended, or
// waiting elsewhere), if a mask lacks its caller, or if lanes meet in different operations. Shared
// memory is filled with NaN before a block starts, and is a separate allocation for the address
// sanitizer.
//
// A launch that may overlap the previous one does so: one of its blocks runs up to
// wait_for_previous_kernel() before the last few launches have begun, but not before the previous
// one has reached its let_next_kernel_start(). Data it should have waited for does not exist yet
// then. Every block must wait somewhere, or a later launch could not rely on earlier ones. So a
// launch may run, and throw, as late as finish().
//
// Not modelled: memory order between fences (each access is visible at once) and registers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>

#define VOX_SIMT 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

using cudaStream_t = void*;
using std::isinf;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace simt {

// The place in a kernel where a thread waits, for messages.
struct Site {
  const char* operation;
  const char* file;
  int line;
};

struct Coordinates {
  dim3 thread_index, block_index, block_size, grid_size;
};
extern const Coordinates* current;  // of the running thread

struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
  bool resident;  // all blocks at once, so that they can wait for each other
  bool overlaps_previous = false;
};
// Runs body(arguments) in every thread, now or later; throws std::runtime_error.
void launch(const Launch& shape, void (*body)(const void*), std::shared_ptr<const void> arguments);
// Completes all launches; throws std::runtime_error.
void finish();
// Discards all launches.
void drop();

// A barrier between all threads of the block, or its first `count`.
void sync_threads(Site site, int count = 0);
void wait_for_previous(Site site);
void let_next();
// Waits for all lanes of `mask`; returns their values by lane, until the caller's next operation.
// The last lane to arrive may first replace the values (of the lanes of the mask) by results.
using Combine = void(uint64_t (&values)[32], uint32_t mask);
const uint64_t* exchange(Site site, uint32_t mask, uint64_t value, Combine* combine = nullptr);
// Lets other fibers run, in a loop that waits for memory to change.
void pause();
// A clock that advances by a millisecond whenever all threads wait for memory to change.
uint64_t nanoseconds();
// Multiprocessors of the device: VOXKERN_SIMT_MULTIPROCESSORS, or 3.
int multiprocessors();
// Records the error and ends the launch.
[[noreturn]] void fail(Site site, const char* what);
void* dynamic_shared();
// The block's variable with this key.
void* shared_variable(const void* key, size_t bytes);
// Asynchronous copies of this thread, done at once or as late as allowed.
void copy_async(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_copies(int groups_left);

inline unsigned lane() {
  const Coordinates& c = *current;
  const dim3 &t = c.thread_index, &n = c.block_size;
  return ((t.z * n.y + t.y) * n.x + t.x) % 32;
}

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The value of lane source_of(lane, first lane of its segment); the caller's own value if that is
// outside the segment of `width` lanes.
template <typename T, typename F>
T shuffle(Site site, uint32_t mask, T value, int width, const F& source_of) {
  const uint64_t* const all = exchange(site, mask, to_bits(value));
  const int me = static_cast<int>(lane()), first = me / width * width;
  const int source = source_of(me, first);
  if (source < first || source >= first + width) return value;
  if (!(mask >> source & 1)) fail(site, "reads a lane outside the mask");
  return from_bits<T>(all[source]);
}

// F: combines two values.
template <typename F, typename T>
T reduce(Site site, uint32_t mask, T value) {
  Combine* const combine = [](uint64_t (&values)[32], uint32_t lanes) {
    T result = from_bits<T>(values[__builtin_ctz(lanes)]);
    for (uint32_t rest = lanes & (lanes - 1); rest; rest &= rest - 1)
      result = F()(result, from_bits<T>(values[__builtin_ctz(rest)]));
    for (uint64_t& value : values) value = to_bits(result);
  };
  return from_bits<T>(exchange(site, mask, to_bits(value), combine)[lane()]);
}

inline uint32_t ballot(Site site, uint32_t mask, int predicate) {
  const uint32_t mine = predicate ? 1u << lane() : 0;
  const auto both = [](uint32_t a, uint32_t b) { return a | b; };
  return reduce<decltype(both)>(site, mask, mine);
}

template <typename... Params, typename... Args>
void launch_kernel(void (*kernel)(Params...), const Launch& shape, Args&&... args) {
  using Call = std::pair<void (*)(Params...), std::tuple<Params...>>;
  std::tuple<Params...> values{std::forward<Args>(args)...};
  launch(
      shape,
      [](const void* p) {
        const Call& c = *static_cast<const Call*>(p);
        std::apply(c.first, c.second);
      },
      std::make_shared<const Call>(kernel, std::move(values)));
}

}  // namespace simt

#define threadIdx (::simt::current->thread_index)
#define blockIdx (::simt::current->block_index)
#define blockDim (::simt::current->block_size)
#define gridDim (::simt::current->grid_size)

#define VOX_SIMT_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(VOX_SIMT_HERE) { simt::sync_threads({"__syncthreads", file, line}); }
inline void __syncwarp(uint32_t mask = 0xffffffff, VOX_SIMT_HERE) {
  simt::exchange({"__syncwarp", file, line}, mask, 0);
}
inline void __threadfence() {}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
inline void __nanosleep(unsigned) { simt::pause(); }

template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, VOX_SIMT_HERE) {
  return simt::shuffle({"__shfl_sync", file, line}, mask, value, width,
                       [&](int, int first) { return first + (source & (width - 1)); });
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, VOX_SIMT_HERE) {
  return simt::shuffle({"__shfl_xor_sync", file, line}, mask, value, width,
                       [&](int me, int) { return me ^ bits; });
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, VOX_SIMT_HERE) {
  return simt::shuffle({"__shfl_up_sync", file, line}, mask, value, width,
                       [&](int me, int) { return me - static_cast<int>(delta); });
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, VOX_SIMT_HERE) {
  return simt::shuffle({"__shfl_down_sync", file, line}, mask, value, width,
                       [&](int me, int) { return me + static_cast<int>(delta); });
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate, VOX_SIMT_HERE) {
  return simt::ballot({"__ballot_sync", file, line}, mask, predicate);
}
inline int __any_sync(uint32_t mask, int predicate, VOX_SIMT_HERE) {
  return simt::ballot({"__any_sync", file, line}, mask, predicate) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, VOX_SIMT_HERE) {
  return simt::ballot({"__all_sync", file, line}, mask, predicate) == mask;
}
// Reductions of 32-bit integers, as the hardware has them.
template <typename T>
T __reduce_add_sync(uint32_t mask, T value, VOX_SIMT_HERE) {
  static_assert(std::is_same_v<T, unsigned> || std::is_same_v<T, int>);
  const auto add = [](T a, T b) {
    return static_cast<T>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
  };
  return simt::reduce<decltype(add)>({"__reduce_add_sync", file, line}, mask, value);
}
template <typename T>
T __reduce_max_sync(uint32_t mask, T value, VOX_SIMT_HERE) {
  static_assert(std::is_same_v<T, unsigned> || std::is_same_v<T, int>);
  const auto max = [](T a, T b) { return a > b ? a : b; };
  return simt::reduce<decltype(max)>({"__reduce_max_sync", file, line}, mask, value);
}
template <typename T>
T __reduce_min_sync(uint32_t mask, T value, VOX_SIMT_HERE) {
  static_assert(std::is_same_v<T, unsigned> || std::is_same_v<T, int>);
  const auto min = [](T a, T b) { return a < b ? a : b; };
  return simt::reduce<decltype(min)>({"__reduce_min_sync", file, line}, mask, value);
}

// Fibers are never interrupted: plain code is atomic.
template <typename T>
T atomicAdd(T* p, std::type_identity_t<T> value) {
  const T old = *p;
  *p = old + value;
  return old;
}
template <typename T>
T atomicMax(T* p, std::type_identity_t<T> value) {
  const T old = *p;
  if (value > old) *p = value;
  return old;
}
template <typename T>
T atomicOr(T* p, std::type_identity_t<T> value) {
  const T old = *p;
  *p = old | value;
  return old;
}
template <typename T>
T atomicExch(T* p, std::type_identity_t<T> value) {
  return std::exchange(*p, value);
}
template <typename T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  const T old = *p;
  if (old == expected) *p = value;
  return old;
}

inline float __uint_as_float(uint32_t a) { return simt::from_bits<float>(a); }
inline uint32_t __float_as_uint(float a) { return static_cast<uint32_t>(simt::to_bits(a)); }
inline int32_t __float_as_int(float a) { return simt::from_bits<int32_t>(simt::to_bits(a)); }
inline float __int_as_float(int32_t a) { return simt::from_bits<float>(simt::to_bits(a)); }
inline float __fmul_rn(float a, float b) { return a * b; }  // never contracted to an fma
inline int __popc(uint32_t a) { return __builtin_popcount(a); }
inline int __ffs(uint32_t a) { return __builtin_ffs(static_cast<int>(a)); }
inline int __clz(uint32_t a) { return a ? __builtin_clz(a) : 32; }

// The functions of csrc/cuda/runtime/ptx.cuh.
namespace voxkern {

inline uint32_t bf16_bits(float a) {
  const uint32_t bits = __float_as_uint(a);
  if (a != a) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t bf16x2_bits(float low, float high) {
  return bf16_bits(low) | bf16_bits(high) << 16;
}
inline uint32_t load_stream4(const void* p) {
  uint32_t r;
  std::memcpy(&r, __builtin_assume_aligned(p, 4), sizeof r);
  return r;
}
inline uint2 load_stream8(const void* p) {
  uint2 r;
  std::memcpy(&r, __builtin_assume_aligned(p, 8), sizeof r);
  return r;
}
inline uint4 load_stream(const void* p) {
  uint4 r;
  std::memcpy(&r, __builtin_assume_aligned(p, 16), sizeof r);
  return r;
}
inline void copy_async_16(void* shared, const void* global, bool there) {
  static const uint4 zeros = {};
  simt::copy_async(__builtin_assume_aligned(shared, 16), there ? global : &zeros, 16);
}
inline void commit_copies() { simt::commit_copies(); }
template <int N>
void wait_copies() {
  simt::wait_copies(N);
}
inline void prefetch_l2(const void* p, int bytes, VOX_SIMT_HERE) {
  if (reinterpret_cast<uintptr_t>(p) % 16 || bytes <= 0 || bytes % 16)
    simt::fail({"prefetch_l2", file, line}, "not in multiples of 16 bytes");
  // For the address sanitizer.
  const volatile char* const from = static_cast<const volatile char*>(p);
  static_cast<void>(from[0]), static_cast<void>(from[bytes - 1]);
}
inline uint4 load_uncached(const void* p) { return load_stream(p); }
template <int N>
void sync_first(VOX_SIMT_HERE) {
  static_assert(N % 32 == 0);
  simt::sync_threads({"sync_first", file, line}, N);
}
inline void add_release(unsigned* p, unsigned value) { *p += value; }
inline unsigned load_acquire(const unsigned* p) { return *p; }
inline void let_others_run() { simt::pause(); }
inline uint64_t nanoseconds() { return simt::nanoseconds(); }
inline void wait_for_previous_kernel(VOX_SIMT_HERE) {
  simt::wait_for_previous({"wait_for_previous_kernel", file, line});
}
inline void let_next_kernel_start() { simt::let_next(); }

}  // namespace voxkern

#include "matrices.h"
