// What CUDA C++ has no words for, one function an instruction. tests/simt/simt.h has the same
// functions for the host.
#pragma once

#include <cstdint>

namespace voxkern {

// Bits of a bfloat16, rounded to nearest, ties to even.
__device__ __forceinline__ uint32_t bf16_bits(float a) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(a));
  return bits;
}
__device__ __forceinline__ uint32_t bf16x2_bits(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// d += A B of a warp, float32 sums of bfloat16 products: A [16, 16] and B [16, 8]. With g = lane /
// 4 and t = lane % 4, a lane holds A's rows g (words 0 and 2) and g + 8 (1 and 3), B's column g,
// and of both the k of 2 t, 2 t + 1 (words a0, a1, b0) and of 2 t + 8, 2 t + 9 (a2, a3, b1), two to
// a word; of d the columns 2 t, 2 t + 1 of rows g (d0, d1) and g + 8.
__device__ __forceinline__ void multiply_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                              uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d = start + A B of a warp, in integers: A [16, 32] and B [32, 8] of bytes with signs. With g and
// t as above, a lane holds A's rows g (words 0 and 2) and g + 8 (1 and 3), B's column g, and of
// both the k of 4 t .. 4 t + 3 (words a0, a1, b0) and of 16 + 4 t .. (a2, a3, b1), four to a word;
// of d what it holds there.
__device__ __forceinline__ void multiply_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1, int32_t start) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(start));
}

// 16 bytes that are read once, of memory that nobody writes while the kernel runs: they need no
// place in the first-level cache. Volatile, so that it stays behind wait_for_previous_kernel().
__device__ __forceinline__ uint4 load_stream(const void* p) {
  uint4 r;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "l"(p));
  return r;
}

// 4 and 8 bytes of the same.
__device__ __forceinline__ uint32_t load_stream4(const void* p) {
  uint32_t r;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.u32 %0, [%1];" : "=r"(r) : "l"(p));
  return r;
}
__device__ __forceinline__ uint2 load_stream8(const void* p) {
  uint2 r;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];"
               : "=r"(r.x), "=r"(r.y)
               : "l"(p));
  return r;
}

// 16 bytes on their way from global to shared memory, zeros if not `there` (nothing is read then).
// A thread's copies since its last commit_copies() are a group; wait_copies<N>() returns when all
// but its last N groups have arrived, for this thread.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool there) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(there ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Bytes in a multiple of 16, as their address is, on their way to the second-level cache, from
// Hopper on. That is where multiprocessors meet: what is written later is not missed.
__device__ __forceinline__ void prefetch_l2(const void* p, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes));
#endif
}

// 16 bytes that a kernel in front may have written, past the first-level cache, which may hold what
// was there before. For one number __ldcg() does the same.
__device__ __forceinline__ uint4 load_uncached(const void* p) {
  uint4 r;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "l"(p));
  return r;
}

// A barrier of the block's first N threads, whole warps.
template <int N>
__device__ __forceinline__ void sync_first() {
  asm volatile("bar.sync 1, %0;" ::"n"(N) : "memory");
}

// Between the blocks of a resident grid: adds, after all that the block wrote before the barrier in
// front; reads, before all that it reads behind the next one.
__device__ __forceinline__ void add_release(unsigned* p, unsigned value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}
__device__ __forceinline__ unsigned load_acquire(const unsigned* p) {
  unsigned r;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(r) : "l"(p) : "memory");
  return r;
}
// In a loop that waits for another block: nothing here, a fiber lets others run.
__device__ __forceinline__ void let_others_run() {}
// Of a clock.
__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t r;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(r));
  return r;
}

// Programmatic dependent launch; launch.cuh has the contract.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace voxkern
