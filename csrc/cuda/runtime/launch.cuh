// Kernel launches, the device's limits, shared memory and the guard of an op's wrapper. With
// tests/simt/simt.h included first, a host compiler compiles all of it too (VOX_SIMT).
//
// Every csrc/cuda/ops/<op>.cu holds kernels and, under VOX_HOST_PASS, the wrapper that turns
// tensors into Params and registers the op; only that pass sees torch's headers.
#pragma once

#define VOX_DEVICE __device__ __forceinline__

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

#ifdef __CUDA_ARCH__
#define VOX_ISA \
  device  // as in csrc/cpu/runtime/isa.h: an op's header declares its Params without torch
#else
#define VOX_HOST_PASS 1
#ifndef VOX_SIMT
#include <torch/csrc/stable/accelerator.h>
#endif
#endif

#include "common/check.h"

// Registers the kernels; under SIMT in a library of their own, for CPU tensors.
#ifdef VOX_SIMT
#define VOX_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(voxkern_simt, CPU, m)
#else
#define VOX_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(voxkern, CUDA, m)
#endif

namespace voxkern {

// Programmatic dependent launch: a kernel launched with `overlaps_previous` may start as soon as
// every block of the previous kernel has called let_next_kernel_start() or ended. The contract:
//
// - wait_for_previous_kernel() returns when the previous kernel has ended and everything it wrote
//   is visible. A thread calls it before it writes anything, and before it reads data that a
//   previous kernel may write.
// - At least one thread of every block calls it. So no kernel ends before the previous one, and the
//   wait covers all earlier kernels, however many run at once.
// - Before the wait a kernel may read weights, which none of our kernels writes, and data that was
//   complete when it was launched: if a kernel in between called let_next_kernel_start() after its
//   own wait, this is everything that the kernels before that one wrote. If the data may have
//   changed since an earlier kernel read it, use load_uncached() or __ldcg().
// - let_next_kernel_start() is called as early as this allows: right after a kernel's own
//   prefetches, so that they are issued first. No block of the next kernel starts before all blocks
//   of this grid have started, so it takes no resources from them; the next kernel's blocks use
//   what is left, and fetch weights there while this one waits or computes.
// - A multiprocessor changes the split of its memory between L1 and shared memory only when it is
//   idle, so all these kernels request the same split.
//
// `resident`: all blocks run at once and can wait for each other; a grid too large for that is an
// error. Such a kernel does not overlap the previous one.
struct Extent : dim3 {
  Extent(int64_t x, int64_t y = 1, int64_t z = 1)
      : dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)) {}
  Extent(const dim3& size) : dim3(size) {}
};
struct LaunchShape {
  Extent grid, block;
  size_t shared_bytes = 0;
  cudaStream_t stream;
  bool overlaps_previous = true;
  bool resident = false;
};

#ifdef VOX_SIMT

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), const LaunchShape& shape, Args&&... args) {
  simt::launch_kernel(kernel,
                      {shape.grid, shape.block, shape.shared_bytes, shape.resident,
                       shape.overlaps_previous && !shape.resident},
                      std::forward<Args>(args)...);
}

// Few multiprocessors, so that tests cover the grids sized by their number; the shared memory of
// the smallest of our targets.
inline int64_t multiprocessors() { return simt::multiprocessors(); }
inline int64_t shared_bytes_limit() { return 99 << 10; }
// Blocks of a resident kernel per multiprocessor.
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
  cudaGetLastError();  // clear it, or the next call would report it again
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
// Maximum shared memory per block.
inline int64_t shared_bytes_limit() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

// Opts a kernel in to all shared memory of a block, once per device: the size of a launch may
// differ from graph to graph and thread to thread. Returns true if the kernel's launches can
// overlap.
inline bool prepare_kernel(const void* kernel) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, bool> prepared;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard lock(mutex);
  const auto known = prepared.find({kernel, device});
  if (known != prepared.end()) return known->second;
  cudaFuncAttributes attributes = {};
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  const auto set = [&](cudaFuncAttribute attribute, int value) {
    check_cuda(cudaFuncSetAttribute(kernel, attribute, value), "cudaFuncSetAttribute");
  };
  set(cudaFuncAttributeMaxDynamicSharedMemorySize,
      static_cast<int>(shared_bytes_limit() - static_cast<int64_t>(attributes.sharedSizeBytes)));
  set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  // Programmatic launches need Hopper; before it, wait_for_previous_kernel() is empty.
  return prepared[{kernel, device}] = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
}

// Blocks of a resident kernel per multiprocessor; 0 where cooperative launches are unsupported.
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

// Dynamic shared memory of the block; its size is set at launch.
#define VOX_DYNAMIC_SHARED(type, name)                     \
  extern __shared__ __align__(16) unsigned char vox_raw[]; \
  type* const name = reinterpret_cast<type*>(vox_raw)
// A variable in shared memory; type_identity lets its type be an array.
#define VOX_SHARED(type, name) __shared__ std::type_identity_t<type> name

#endif

constexpr unsigned kWholeWarp = 0xffffffff;
constexpr int kWarp = 32;
constexpr int kMaxWarps = 32;

__host__ __device__ constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads for one work item each: whole warps, at most `most`.
inline unsigned block_size(int64_t items, int64_t most) {
  const int64_t threads = divide_up(items, kWarp) * kWarp;
  return static_cast<unsigned>(threads < kWarp ? kWarp : threads < most ? threads : most);
}

#ifdef VOX_HOST_PASS
// Makes `like`'s device current while in scope; `stream` is torch's current stream there.
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
#endif

}  // namespace voxkern
