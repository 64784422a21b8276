// A bump allocator for scratch memory. ISA passes include it too.
#pragma once

#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace voxkern {
namespace {

// Carves a block of memory into parts, each on its own cache lines. Without a block it only counts
// bytes. The address sanitizer detects overruns of a part as it does those of a heap block.
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

  // Bytes that a block needs for the parts taken so far, however it is aligned.
  int64_t bytes() const { return used_ + 63; }

 private:
  char* const block_;
  int64_t used_ = 0;
};

// Bytes of the block that Buffers(arena, arguments...) needs.
template <typename Buffers, typename... Arguments>
int64_t arena_bytes(const Arguments&... arguments) {
  Arena count(nullptr);
  Buffers(count, arguments...);
  return count.bytes();
}

}  // namespace
}  // namespace voxkern
