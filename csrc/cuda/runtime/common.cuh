// The vocabulary of the CUDA kernels: launches, shared memory, 16-byte vectors, sums over warps and
// blocks. With tests/simt/simt.h in front, a host compiler takes all of it too (VOX_SIMT).
//
// A csrc/cuda/<op>.cu includes it first. It holds its kernels and, under VOX_HOST_PASS, the wrapper
// that turns tensors into Params and registers the op; torch's headers are for that pass alone.
#pragma once

#ifndef VOX_SIMT
#include <cuda_runtime.h>

#include "cuda/runtime/ptx.cuh"
#endif

#include <cstddef>
#include <cstdint>
#include <exception>
#include <map>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <type_traits>

#include "common/dtype.h"

#ifdef __CUDA_ARCH__
#define VOX_ISA device  // as in csrc/cpu/isa.h: the op's header shows its Params and no torch
#else
#define VOX_HOST_PASS 1
#endif

// The registration of this library's kernels: under SIMT, as another library for CPU tensors.
#ifdef VOX_SIMT
#define VOX_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(voxkern_simt, CPU, m)
#else
#define VOX_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(voxkern, CUDA, m)
#endif

namespace voxkern {

// Programmatic dependent launch: a kernel launched with `overlaps_previous` may start as soon as
// every block of the kernel in front has called let_next_kernel_start() or ended. Its contract:
//
// - wait_for_previous_kernel() returns when the kernel in front has ended and all that it wrote can
//   be seen. Every thread calls it before it reads what a kernel in front may write, or writes
//   anything at all.
// - At least one thread of every block calls it. So a kernel never ends before the one in front,
//   and the wait is for all kernels before, however many of them run at once.
// - Before the wait it may read weights, which no kernel of ours writes, and what was complete when
//   it was launched: if some kernel in between called let_next_kernel_start() after its own wait,
//   that is all that the ones in front of that one wrote. What may have changed since an earlier
//   kernel read it, by load_fresh() or __ldcg().
// - let_next_kernel_start() comes as early as that leaves it: right behind a kernel's own
//   prefetches, so that theirs come first. It starts nothing before all blocks of this grid have
//   started, so it takes no room from them; the next kernels' blocks take what room is left, and
//   fetch weights there while this one waits or computes.
// - Multiprocessors divide their memory anew between the first-level cache and shared memory only
//   when they are idle, so all these kernels ask for the same division.
//
// `resident`: all blocks run at once, so that they can wait for each other; more than there is room
// for are an error. It excludes `overlaps_previous`.
struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes = 0;
  cudaStream_t stream;
  bool overlaps_previous = false;
  bool resident = false;
};

#ifdef VOX_SIMT

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), const LaunchShape& shape, Args&&... args) {
  simt::launch_kernel(
      kernel,
      {shape.grid, shape.block, shape.shared_bytes, shape.resident, shape.overlaps_previous},
      std::forward<Args>(args)...);
}

// Of the device: few, so that grids that go by their number are tested; the smallest of our
// targets.
inline int64_t multiprocessors() { return simt::multiprocessors(); }
inline int64_t shared_bytes_limit() { return 99 << 10; }
// Of a resident kernel that a multiprocessor has at once.
template <typename... Params>
int64_t resident_blocks(void (*)(Params...), unsigned, int64_t shared_bytes) {
  return shared_bytes_limit() / (shared_bytes + 1024);
}

#define VOX_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(simt::dynamic_shared())
#define VOX_SHARED(type, name)                                                  \
  auto& name = *static_cast<std::type_identity_t<type>*>(simt::shared_variable( \
      [] {                                                                      \
        static const char key = 0;                                              \
        return &key;                                                            \
      }(),                                                                      \
      sizeof(type)))

#else

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next one to ask would get it too
  std::ostringstream message;
  message << what << ": " << cudaGetErrorString(status);
  throw std::runtime_error(message.str());
}

inline int64_t device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}
inline int64_t multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
// Of a block.
inline int64_t shared_bytes_limit() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

// Lets a kernel's blocks have all shared memory that there is, once for each device: what a launch
// asks for may differ from graph to graph and thread to thread. Whether its launches can overlap.
inline bool prepare_kernel(const void* kernel) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, bool> prepared;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard lock(mutex);
  const auto known = prepared.find({kernel, device});
  if (known != prepared.end()) return known->second;
  cudaFuncAttributes about = {};
  check_cuda(cudaFuncGetAttributes(&about, kernel), "cudaFuncGetAttributes");
  const auto set = [&](cudaFuncAttribute attribute, int value) {
    check_cuda(cudaFuncSetAttribute(kernel, attribute, value), "cudaFuncSetAttribute");
  };
  set(cudaFuncAttributeMaxDynamicSharedMemorySize,
      static_cast<int>(shared_bytes_limit() - static_cast<int64_t>(about.sharedSizeBytes)));
  set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  // Processors before Hopper have no such launches: there the wait is none.
  return prepared[{kernel, device}] = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
}

// Of a resident kernel that a multiprocessor has at once; none where there are no such launches.
template <typename... Params>
int64_t resident_blocks(void (*kernel)(Params...), unsigned threads, int64_t shared_bytes) {
  if (!device_attribute(cudaDevAttrCooperativeLaunch)) return 0;
  prepare_kernel(reinterpret_cast<const void*>(kernel));
  int blocks = 0;
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
                 &blocks, kernel, static_cast<int>(threads), static_cast<size_t>(shared_bytes)),
             "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return blocks;
}

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), const LaunchShape& shape, Args&&... args) {
  const bool can_overlap = prepare_kernel(reinterpret_cast<const void*>(kernel));
  cudaLaunchAttribute attribute = {};
  if (shape.resident) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  } else {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = shape.stream;
  config.attrs = &attribute;
  config.numAttrs = shape.resident || (can_overlap && shape.overlaps_previous) ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), "kernel launch");
}

// The block's dynamic shared memory, as launched.
#define VOX_DYNAMIC_SHARED(type, name)                     \
  extern __shared__ __align__(16) unsigned char vox_raw[]; \
  type* const name = reinterpret_cast<type*>(vox_raw)
// A variable of the block; arrays by way of a type's name.
template <typename T>
struct Same {
  using type = T;
};
#define VOX_SHARED(type_, name) __shared__ typename ::voxkern::Same<type_>::type name

#endif

constexpr unsigned kWholeWarp = 0xffffffff;
constexpr int kWarp = 32;
constexpr int kMaxWarps = 32;

__host__ __device__ constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads for `items` of work, one each: whole warps, at most `most`.
inline unsigned block_size(int64_t items, int64_t most) {
  const int64_t threads = divide_up(items, kWarp) * kWarp;
  return static_cast<unsigned>(threads < kWarp ? kWarp : threads < most ? threads : most);
}

// --- elements: float32 or bfloat16 in memory, float32 in registers

struct bf16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float a) { return a; }
__device__ __forceinline__ float to_float(bf16 a) {
  return __uint_as_float(static_cast<uint32_t>(a.bits) << 16);
}
template <typename T>
__device__ __forceinline__ T from_float(float a);
template <>
__device__ __forceinline__ float from_float<float>(float a) {
  return a;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float a) {
  return {static_cast<uint16_t>(bf16_bits(a))};
}

// Elements of 16 bytes.
template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

template <typename T>
__device__ __forceinline__ void unpack(uint4 a, float (&out)[kVector<T>]) {
  const uint32_t words[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      out[i] = __uint_as_float(words[i]);
    } else {
      out[2 * i] = __uint_as_float(words[i] << 16);
      out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
}
template <typename T>
__device__ __forceinline__ uint4 pack(const float (&a)[kVector<T>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4)
      words[i] = __float_as_uint(a[i]);
    else
      words[i] = bf16x2_bits(a[2 * i], a[2 * i + 1]);
  }
  return {words[0], words[1], words[2], words[3]};
}

// N elements in a row, in one access: a vector (the address a multiple of 16) or one element.
template <int N, typename T>
__device__ __forceinline__ void load(const T* p, float (&out)[N]) {
  static_assert(N == 1 || N == kVector<T>);
  if constexpr (N == 1)
    out[0] = to_float(*p);
  else
    unpack<T>(*reinterpret_cast<const uint4*>(p), out);
}
template <int N, typename T>
__device__ __forceinline__ void store(T* p, const float (&a)[N]) {
  static_assert(N == 1 || N == kVector<T>);
  if constexpr (N == 1)
    *p = from_float<T>(a[0]);
  else
    *reinterpret_cast<uint4*>(p) = pack<T>(a);
}

// Whether rows of `columns` elements from p on can be taken in vectors.
template <typename T>
bool takes_vectors(const void* p, int64_t columns) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && columns % kVector<T> == 0;
}

// --- sums over threads, in an order that depends on their number alone

// combine(a, b) over the warp; every lane gets the result.
template <typename T, typename F>
__device__ __forceinline__ T warp_reduce(T value, const F& combine) {
#pragma unroll
  for (int offset = kWarp / 2; offset; offset /= 2)
    value = combine(value, __shfl_xor_sync(kWholeWarp, value, offset));
  return value;
}

struct Add {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

// Over the block, one barrier inside. `partials` are of this call alone until the next barrier but
// one: calls in a row take turns with two.
template <typename T, typename F>
__device__ __forceinline__ T block_reduce(T value, T (&partials)[kMaxWarps], const F& combine) {
  value = warp_reduce(value, combine);
  const int warps = (blockDim.x + kWarp - 1) / kWarp;
  if (warps == 1) return value;
  if (threadIdx.x % kWarp == 0) partials[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = partials[0];
  for (int i = 1; i < warps; ++i) value = combine(value, partials[i]);
  return value;
}

}  // namespace voxkern

#ifdef VOX_HOST_PASS
#include "common/check.h"
#ifndef VOX_SIMT
#include <torch/csrc/stable/accelerator.h>
#endif

namespace voxkern {

// While it lives, `like`'s device is the current one; `stream` is torch's current stream there.
#ifdef VOX_SIMT
struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  ~OnDevice() noexcept(false) { std::uncaught_exceptions() ? simt::drop() : simt::finish(); }
  cudaStream_t stream = nullptr;
};
#else
class OnDevice {
 public:
  explicit OnDevice(const Tensor& like) : guard_(like.get_device_index()) {
    void* handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &handle));
    stream = static_cast<cudaStream_t>(handle);
  }
  cudaStream_t stream;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};
#endif

}  // namespace voxkern
#endif
