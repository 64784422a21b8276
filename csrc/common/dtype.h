// The floating-point types of the kernels. Must not include torch: device code and the
// per-instruction-set CPU builds include this file. Also defines VOX_HOST_DEVICE.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define VOX_HOST_DEVICE __host__ __device__
#else
#define VOX_HOST_DEVICE
#endif

namespace voxkern {

enum class Dtype : int32_t { f32, bf16 };

}  // namespace voxkern
