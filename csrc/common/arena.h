// Scratch memory in parts; included by ISA passes too.
#pragma once

#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace voxkern {
namespace {

// Hands out parts of a block of memory, each on cache lines of its own. With no block it only
// counts. The address sanitizer sees the parts' ends as it sees a block's.
class Arena {
 public:
  explicit Arena(void* block)
      : block_(reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(block) + 63) / 64 * 64)) {}

  template <typename T>
  T* take(int64_t n) {
    const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
    char* const part = block_ ? block_ + used_ : nullptr;
    used_ += (bytes + 63) / 64 * 64;
#if defined(__SANITIZE_ADDRESS__)
    used_ += 64;
    if (part) __asan_poison_memory_region(part + bytes, block_ + used_ - (part + bytes));
#endif
    return reinterpret_cast<T*>(part);
  }

  // What a block must have for the parts taken so far, wherever it begins.
  int64_t bytes() const { return used_ + 63; }

 private:
  char* const block_;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace voxkern
