// Switches between fibers, and decides which one runs.
#include <sys/mman.h>

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

Context scheduler;
void* scheduler_fake_stack;
const void* scheduler_stack;
size_t scheduler_stack_bytes;
bool scheduler_ran_last = false;

// Fibers to hold back until no other can continue: a warp or one thread of a block.
struct Straggler {
  int first = 0, end = 0;

  bool exists() const { return end; }
  bool has(int fiber) const { return fiber >= first && fiber < end; }
};

// In a round, each fiber that could run at its beginning has a turn. Each lets the next one run: a
// processor predicts that better than a switch to the scheduler and back.
struct Round {
  std::vector<int> turns;
  size_t next = 0;
  Straggler straggler;
  int live = 0;         // fibers that have not ended
  bool paused = false;  // the fiber that runs was
  bool any_paused = false, progress = false;
} round;

// The fiber whose turn is next, or none.
Fiber* next_turn() {
  while (round.next < round.turns.size()) {
    const int index = round.turns[round.next++];
    if (round.straggler.has(index)) continue;
    round.paused = states[index] == State::paused;
    return fibers[index].get();
  }
  return nullptr;
}

void end_turn(const Fiber& fiber) {
  const State state = fiber.state();
  round.any_paused |= round.paused;
  round.progress |= !round.paused || state != State::paused;
  round.live -= state == State::done;
}

// In a fiber, after a switch to it.
void arrive(void* fake_stack) {
  const void* stack = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(fake_stack, &stack, &bytes);
  if (scheduler_ran_last) scheduler_stack = stack, scheduler_stack_bytes = bytes;
  scheduler_ran_last = false;
}

void fiber_main() {
  arrive(nullptr);
  for (;;) {
    running->block->kernel->body(running->block->kernel->arguments.get());
    running->state() = State::done;
    let_next_run();
  }
}

void switch_to(Context& from, void** fake_stack, Fiber& fiber) {
  running = &fiber;
  current = &fiber.at;
  __sanitizer_start_switch_fiber(fake_stack, fiber.stack, kStackBytes);
  if (fiber.started) return switch_context(from, fiber.context);
  fiber.started = true;
  // Stacks at equal offsets in their pages would share few lines of the processor's cache.
  const size_t unused = fiber.index * 1088 % 16384;
  start_context(from, fiber.context, fiber.stack, kStackBytes - unused, fiber_main);
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

// A warp or one thread of a block.
Straggler choose_straggler(const std::vector<Block*>& blocks) {
  const Block* const block = blocks[random_bits.below(blocks.size())];
  const int number = static_cast<int>(random_bits.below(block->size));
  if (random_bits() % 2) return {block->first + number, block->first + number + 1};
  const int warp = block->first + number / kLanes * kLanes;
  return {warp, std::min(warp + kLanes, block->first + block->size)};
}

// The fibers that can run, in their order.
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
  if (order == Order::random)
    for (size_t i = 0; i < turns.size(); ++i)
      std::swap(turns[i], turns[i + random_bits.below(turns.size() - i)]);
}

}  // namespace

void let_next_run() {
  Fiber& me = *running;
  end_turn(me);
  if (Fiber* const next = error.empty() ? next_turn() : nullptr) {
    switch_to(me.context, &me.fake_stack, *next);
  } else {
    __sanitizer_start_switch_fiber(&me.fake_stack, scheduler_stack, scheduler_stack_bytes);
    switch_context(me.context, scheduler);
  }
  arrive(me.fake_stack);
}

void wait(State state, Site site) {
  Fiber& me = *running;
  me.state() = state;
  me.site = site;
  let_next_run();
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
  long idle_rounds = 0;
  round.live = 0;
  for (const Block* block : blocks) {
    const auto first = states.begin() + block->first;
    round.live += block->size - std::count(first, first + block->size, State::done);
  }
  round.straggler = {};
  bool all_may_go = false;
  while (round.live) {
    list_turns(blocks, round.turns);
    if (order == Order::random && !all_may_go && !round.straggler.exists())
      round.straggler = choose_straggler(blocks);
    round.next = 0;
    round.any_paused = round.progress = false;
    if (Fiber* const first = next_turn()) {
      scheduler_ran_last = true;
      switch_to(scheduler, &scheduler_fake_stack, *first);
      __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
    }
    if (!error.empty()) return;
    for (Block* block : blocks) round.progress |= release_barrier(*block);
    if (!error.empty()) return;
    all_may_go = !round.progress && round.straggler.exists();
    if (all_may_go) {
      round.straggler = {};
      continue;
    }
    if (early && !round.progress) return;
    idle_rounds = round.progress ? 0 : idle_rounds + 1;
    now += round.progress ? 0 : 1'000'000;
    if (round.live && (round.any_paused ? idle_rounds > kPatience : idle_rounds > 0))
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
