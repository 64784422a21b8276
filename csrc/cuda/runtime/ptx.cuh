// Instructions that CUDA C++ does not expose, one function each. tests/simt/simt.h has the same
// functions for the host.
#pragma once

#include <cstdint>

namespace voxkern {

// Bits of a bfloat16, rounded to nearest, ties to even.
VOX_DEVICE uint32_t bf16_bits(float a) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(a));
  return bits;
}
VOX_DEVICE uint32_t bf16x2_bits(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// d += A B by a warp, float32 sums of bfloat16 products: A [16, 16] and B [16, 8]. With g = lane /
// 4 and t = lane % 4, a lane holds A's rows g (words 0 and 2) and g + 8 (1 and 3), B's column g,
// and of both the k of 2 t, 2 t + 1 (words a0, a1, b0) and of 2 t + 8, 2 t + 9 (a2, a3, b1), two to
// a word; of d the columns 2 t, 2 t + 1 of rows g (d0, d1) and g + 8.
VOX_DEVICE void multiply_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d = start + A B by a warp, in integers: A [16, 32] and B [32, 8] of signed bytes. With g and
// t as above, a lane holds A's rows g (words 0 and 2) and g + 8 (1 and 3), B's column g, and of
// both the k of 4 t .. 4 t + 3 (words a0, a1, b0) and of 16 + 4 t .. (a2, a3, b1), four to a word;
// of d what it holds there.
VOX_DEVICE void multiply_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                            int32_t start) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(start));
}

// Loads 16 bytes that are read once, from memory that is not written while the kernel runs, without
// allocating in L1. Volatile, so that it is not moved before wait_for_previous_kernel().
VOX_DEVICE uint4 load_stream(const void* p) {
  uint4 r;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "l"(p));
  return r;
}

// The same for 4 and 8 bytes.
VOX_DEVICE uint32_t load_stream4(const void* p) {
  uint32_t r;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.u32 %0, [%1];" : "=r"(r) : "l"(p));
  return r;
}
VOX_DEVICE uint2 load_stream8(const void* p) {
  uint2 r;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];"
               : "=r"(r.x), "=r"(r.y)
               : "l"(p));
  return r;
}

// Copies 16 bytes asynchronously from global to shared memory; writes zeros, and reads nothing,
// unless `there`. A thread's copies since its last commit_copies() are a group; wait_copies<N>()
// returns when all but this thread's last N groups have arrived.
VOX_DEVICE void copy_async_16(void* shared, const void* global, bool there) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(there ? 16 : 0)
               : "memory");
}
VOX_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
VOX_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Prefetches to L2, from Hopper on; `p` and `bytes` are multiples of 16. L2 is shared by all
// multiprocessors, so later writes stay visible.
VOX_DEVICE void prefetch_l2(const void* p, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes));
#endif
}

// Loads 16 bytes that a previous kernel may have written, bypassing L1, which may hold stale data.
// For a scalar, __ldcg() does the same.
VOX_DEVICE uint4 load_uncached(const void* p) {
  uint4 r;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "l"(p));
  return r;
}

// A barrier between the block's first N threads, whole warps.
template <int N>
VOX_DEVICE void sync_first() {
  asm volatile("bar.sync 1, %0;" ::"n"(N) : "memory");
}

// Synchronisation between the blocks of a resident grid. add_release() adds after everything that
// the block wrote before its last barrier; load_acquire() reads before everything that it reads
// after its next one.
VOX_DEVICE void add_release(unsigned* p, unsigned value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}
VOX_DEVICE unsigned load_acquire(const unsigned* p) {
  unsigned r;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(r) : "l"(p) : "memory");
  return r;
}
// Called in a loop that waits for another block. Empty here; under SIMT, lets other fibers run.
VOX_DEVICE void let_others_run() {}
// A wall clock.
VOX_DEVICE uint64_t nanoseconds() {
  uint64_t r;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(r));
  return r;
}

// Programmatic dependent launch; launch.cuh has the contract.
VOX_DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
VOX_DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace voxkern
