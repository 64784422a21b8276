// The floating-point types of the kernels. No torch here: ISA passes and device code include it.
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
