// Switches between fibers, and decides which one runs.
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <sstream>
#include <stdexcept>

#include "fibers.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define __sanitizer_start_switch_fiber(fake, bottom, size) (void)(fake), (void)(bottom)
#define __sanitizer_finish_switch_fiber(fake, bottom, size) (void)(bottom), (void)(size)
#define __asan_unpoison_memory_region(p, size)
#endif

namespace simt {

const Coordinates* current = nullptr;
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<State> states;
Fiber* running = nullptr;
Random random_bits;
Order order;
std::string error;
uint64_t now = 1;

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kGuardBytes = 4096;
constexpr long kPatience = 1 << 14;  // rounds in which all threads only pause

void* main_jump[5];
void* main_fake_stack;
const void* main_stack;
size_t main_stack_bytes;

// The compiler's built-in setjmp: three words, no system call. The jump is in a separate function,
// as the manual requires.
// noipa: a caller may not take the registers that such a function leaves alone as preserved.
#ifdef __clang__
#define VOX_PLAIN __attribute__((noinline, no_sanitize("address", "undefined")))
#else
#define VOX_PLAIN __attribute__((noinline, noipa, no_sanitize("address", "undefined")))
#endif
[[noreturn]] VOX_PLAIN void jump(void** to) { __builtin_longjmp(to, 1); }
VOX_PLAIN void switch_context(void** from, void** to) {
  if (__builtin_setjmp(from) == 0) jump(to);
}
VOX_PLAIN void enter_context(void** from, const ucontext_t* to) {
  if (__builtin_setjmp(from) == 0) setcontext(to);
}

void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_stack_bytes);
  for (;;) {
    running->block->kernel->body(running->block->kernel->arguments.get());
    running->state() = State::done;
    back_to_scheduler();
  }
}

void resume(Fiber& fiber) {
  running = &fiber;
  current = &fiber.at;
  __sanitizer_start_switch_fiber(&main_fake_stack, fiber.stack, kStackBytes);
  if (fiber.started) {
    switch_context(main_jump, fiber.jump);
  } else {
    fiber.started = true;
    // Stacks at equal offsets in their pages would share few lines of the processor's cache.
    const size_t unused = fiber.index * 1088 % 16384;
    static ucontext_t context;
    getcontext(&context);
    context.uc_stack = {};
    context.uc_stack.ss_sp = fiber.stack;
    context.uc_stack.ss_size = kStackBytes - unused;
    context.uc_link = nullptr;
    makecontext(&context, fiber_main, 0);
    enter_context(main_jump, &context);
  }
  __sanitizer_finish_switch_fiber(main_fake_stack, nullptr, nullptr);
}

// Releases the threads of a block that have all arrived at one barrier.
bool release_barrier(Block& block) {
  if (!block.at_barrier || (!block.at_partial && block.at_barrier < block.size)) return false;
  int first = 0;
  while (fibers[block.first + first]->state() != State::barrier) ++first;
  const Fiber& one = *fibers[block.first + first];
  // Threads may wait at two barriers: then the first is of fewer threads than the block's.
  const int count = one.barrier_count ? one.barrier_count : block.size;
  if (count > block.size) {
    error = "a barrier of more threads than the block has: " + describe(one);
    return false;
  }
  for (int i = 0; i < count; ++i) {
    const Fiber& other = *fibers[block.first + i];
    if (other.state() != State::barrier) return false;
    if (!same_site(other.site, one.site)) {
      error = "threads meet at different barriers: " + describe(other) + ", " + describe(one);
      return false;
    }
  }
  block.at_barrier -= count;
  if (one.barrier_count) block.at_partial -= count;
  std::fill_n(states.begin() + block.first, count, State::ready);
  return true;
}

// Explains a deadlock: a thread that waits, and one that it waits for.
void explain_deadlock(const std::vector<Block*>& blocks) {
  for (const Block* block : blocks) {
    for (int index = block->first; index < block->first + block->size; ++index) {
      const Fiber& waiting = *fibers[index];
      if (waiting.state() == State::done || waiting.state() == State::paused) continue;
      for (int other = block->first; other < block->first + block->size; ++other) {
        const Fiber& missing = *fibers[other];
        const bool wanted =
            waiting.state() == State::barrier
                ? missing.state() != State::barrier
                : missing.warp == waiting.warp && (waiting.mask >> missing.lane() & 1) &&
                      !(missing.state() == State::warp && missing.mask == waiting.mask);
        if (!wanted) continue;
        error = "threads wait for ever: " + describe(waiting) + ", but " + describe(missing);
        return;
      }
      error = "threads wait for ever: " + describe(waiting) + " for lanes that the block lacks";
      return;
    }
  }
  error = "threads wait for ever for memory to change";
}

// A warp or one thread of a block that is held back until no other thread can continue.
struct Straggler {
  const Block* block = nullptr;
  int first = 0, last = 0;  // by number in the block

  bool has(const Fiber& fiber) const {
    return fiber.block == block && fiber.number >= first && fiber.number <= last;
  }
};

Straggler choose_straggler(const std::vector<Block*>& blocks) {
  const Block* const block = blocks[random_bits.below(blocks.size())];
  const int number = static_cast<int>(random_bits.below(block->size));
  if (random_bits() % 2) return {block, number, number};
  const int first = number / kLanes * kLanes;
  return {block, first, first + kLanes - 1};
}

// The fibers that can run, in ascending or descending order.
void list_turns(const std::vector<Block*>& blocks, std::vector<int>& turns) {
  turns.clear();
  const auto can_run = [](State state) { return state <= State::paused; };
  for (const Block* block : blocks) {
    const int end = block->first + block->size;
    for (int warp = block->first; warp < end; warp += kLanes) {
      const int lanes = std::min(kLanes, end - warp);
      int count = 0;
      for (int i = 0; i < lanes; ++i) count += can_run(states[warp + i]);
      for (int i = warp; count; ++i) {
        if (!can_run(states[i])) continue;
        turns.push_back(i);
        --count;
      }
    }
  }
  if (order == Order::descending) std::reverse(turns.begin(), turns.end());
}

}  // namespace

void back_to_scheduler() {
  Fiber& me = *running;
  __sanitizer_start_switch_fiber(&me.fake_stack, main_stack, main_stack_bytes);
  switch_context(me.jump, main_jump);
  __sanitizer_finish_switch_fiber(me.fake_stack, &main_stack, &main_stack_bytes);
}

void wait(State state, Site site) {
  Fiber& me = *running;
  me.state() = state;
  me.site = site;
  back_to_scheduler();
  me.state() = State::ready;
}

void make_fibers(size_t count) {
  while (fibers.size() < count) {
    auto fiber = std::make_unique<Fiber>();
    fiber->index = static_cast<int>(fibers.size());
    void* const memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("simt: no memory for stacks");
    mprotect(memory, kGuardBytes, PROT_NONE);
    fiber->stack = static_cast<char*>(memory) + kGuardBytes;
    fibers.push_back(std::move(fiber));
    states.push_back(State::done);
  }
}

void abandon_fibers() {
  for (auto& fiber : fibers) {
    if (fiber->state() != State::done) {
      fiber->started = false;
      __asan_unpoison_memory_region(fiber->stack, kStackBytes);
    }
    fiber->state() = State::done;
    fiber->copies.clear();
  }
}

void run(const std::vector<Block*>& blocks, bool early) {
  std::vector<int> turns;
  long idle_rounds = 0;
  int live = 0;
  for (const Block* block : blocks) {
    const auto first = states.begin() + block->first;
    live += block->size - std::count(first, first + block->size, State::done);
  }
  Straggler straggler;
  bool all_may_go = false;
  while (live) {
    list_turns(blocks, turns);
    if (order == Order::random && !all_may_go && !straggler.block)
      straggler = choose_straggler(blocks);
    bool progress = false, pausing = false;
    for (size_t i = 0; i < turns.size(); ++i) {
      if (order == Order::random)
        std::swap(turns[i], turns[i + random_bits.below(turns.size() - i)]);
      Fiber& fiber = *fibers[turns[i]];
      if (straggler.has(fiber)) continue;
      const bool paused = fiber.state() == State::paused;
      resume(fiber);
      if (!error.empty()) return;
      pausing |= paused;
      progress |= !paused || fiber.state() != State::paused;
      live -= fiber.state() == State::done;
    }
    for (Block* block : blocks) progress |= release_barrier(*block);
    if (!error.empty()) return;
    all_may_go = !progress && straggler.block;
    if (all_may_go) {
      straggler = {};
      continue;
    }
    if (early && !progress) return;
    idle_rounds = progress ? 0 : idle_rounds + 1;
    now += progress ? 0 : 1'000'000;
    if (live && (pausing ? idle_rounds > kPatience : idle_rounds > 0))
      return explain_deadlock(blocks);
  }
}

bool same_site(const Site& a, const Site& b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0) &&
         (a.operation == b.operation || std::strcmp(a.operation, b.operation) == 0);
}

std::string describe(const Fiber& fiber) {
  std::ostringstream text;
  const dim3 &t = fiber.at.thread_index, &b = fiber.at.block_index;
  text << "block (" << b.x << ", " << b.y << ", " << b.z << ") thread (" << t.x << ", " << t.y
       << ", " << t.z << ")";
  if (fiber.state() == State::done) {
    text << " has ended";
  } else {
    text << " is at " << fiber.site.operation << " of " << fiber.site.file << ":"
         << fiber.site.line;
    if (fiber.state() == State::warp) text << " with mask 0x" << std::hex << fiber.mask;
  }
  return text.str();
}

}  // namespace simt
