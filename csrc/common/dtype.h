// The floating-point types that kernels know. No torch here: ISA passes and device code include it.
#pragma once

#include <cstdint>

namespace voxkern {

enum class Dtype : int32_t { f32, bf16 };

}  // namespace voxkern
