// Contexts of execution: registers and a stack, between which the emulator switches.
#pragma once

#include <cstddef>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace simt {

// noipa: a caller may not take the registers that such a function leaves alone as preserved.
#ifdef __clang__
#define VOX_PLAIN __attribute__((noinline, no_sanitize("address", "undefined")))
#else
#define VOX_PLAIN __attribute__((noinline, noipa, no_sanitize("address", "undefined")))
#endif

#ifdef __x86_64__

struct Context {
  void* top;  // of the stack: the registers that a call preserves, and where to go on
};

// A call and a return, on two stacks. Contexts that wait at the same place, as the lanes of a warp
// do, so follow each other as a processor predicts: each returns to where the last one was called.
__attribute__((naked)) VOX_PLAIN inline void switch_context(Context&, Context&) {
  asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp, (%rdi)\n mov (%rsi), %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret");
}

// Switches to a new context, which runs main() on the stack; main never returns.
inline void start_context(Context& from, Context& to, void* stack, size_t bytes, void (*main)()) {
  constexpr int kRegisters = 6;
  void** const end = reinterpret_cast<void**>(static_cast<char*>(stack) + bytes / 16 * 16);
  void** const top = end - 2 - kRegisters;  // main finds its stack as after a call
  for (int i = 0; i < kRegisters; ++i) top[i] = nullptr;
  top[kRegisters] = reinterpret_cast<void*>(main);
  top[kRegisters + 1] = nullptr;
  to.top = top;
  switch_context(from, to);
}

#else

struct Context {
  void* jump[5];
};

// The compiler's built-in setjmp: three words, no system call. The jump is in a separate function,
// as the manual requires.
[[noreturn]] VOX_PLAIN inline void jump(void** to) { __builtin_longjmp(to, 1); }
VOX_PLAIN inline void switch_context(Context& from, Context& to) {
  if (__builtin_setjmp(from.jump) == 0) jump(to.jump);
}

VOX_PLAIN inline void start_context(Context& from, Context&, void* stack, size_t bytes,
                                    void (*main)()) {
  static ucontext_t context;
  getcontext(&context);
  context.uc_stack = {};
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, main, 0);
  if (__builtin_setjmp(from.jump) == 0) setcontext(&context);
}

#endif

}  // namespace simt
