// Fibers and their scheduler; simt.h documents the behaviour.
#include "simt.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

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

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kGuardBytes = 4096;
constexpr long kPatience = 1 << 14;  // rounds in which all threads only pause
uint64_t now = 1;                    // nanoseconds
constexpr size_t kMaxThreads = 1024;
constexpr size_t kMaxOverlapped = 3;  // launches in flight at once

enum class State { ready, paused, barrier, warp, previous, done };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Kernel;

struct Block {
  const Kernel* kernel = nullptr;
  bool waited = false;     // for the previous launches
  bool lets_next = false;  // start
  std::vector<int> threads;
  std::unique_ptr<unsigned char[]> dynamic;
  struct Variable {
    const void* key;
    std::unique_ptr<unsigned char[]> memory;
  };
  std::vector<Variable> variables;
  int waiting_lanes[32] = {};  // of each warp, at a warp operation
};

struct Fiber {
  Coordinates at;
  Block* block = nullptr;
  int first_of_warp = 0;  // by number in the block
  int lane = 0;

  State state = State::done;
  Site site{};
  int barrier_count = 0;
  uint32_t mask = 0;
  uint64_t value = 0;
  uint64_t received[32];
  std::vector<std::vector<Copy>> copies;

  void* stack = nullptr;
  bool started = false;
  void* jump[5];
  ucontext_t context;
  void* fake_stack = nullptr;
};

// A launch that has not completed.
struct Kernel {
  Launch shape;
  void (*body)(const void*);
  std::shared_ptr<const void> arguments;
  std::vector<dim3> indices;
  std::unique_ptr<Block> early;  // the first block, run as far as it can go alone
  bool previous_done = false;
};

enum class Order { ascending, descending, random };

Order chosen_order() {
  const char* name = std::getenv("VOXKERN_SIMT_ORDER");
  if (!name || !*name || std::string(name) == "random") return Order::random;
  if (std::string(name) == "ascending") return Order::ascending;
  if (std::string(name) == "descending") return Order::descending;
  throw std::runtime_error(std::string("VOXKERN_SIMT_ORDER=") + name +
                           ": expected random, ascending or descending");
}

std::mutex one_launch;
std::vector<std::unique_ptr<Fiber>> fibers;  // reused: creating one costs system calls
int running = -1;
std::mt19937 random_bits;
Order order;
std::string error;
std::deque<Kernel> pending;
size_t launches = 0;

void* main_jump[5];
void* main_fake_stack;
const void* main_stack;
size_t main_stack_bytes;

// The compiler's built-in setjmp: three words, no system call. The jump is in a separate function,
// as the manual requires.
#define VOX_PLAIN __attribute__((noinline, no_sanitize("address", "undefined")))
[[noreturn]] VOX_PLAIN void jump(void** to) { __builtin_longjmp(to, 1); }
VOX_PLAIN void switch_context(void** from, void** to) {
  if (__builtin_setjmp(from) == 0) jump(to);
}
VOX_PLAIN void enter_context(void** from, const ucontext_t* to) {
  if (__builtin_setjmp(from) == 0) setcontext(to);
}

Fiber& self() { return *fibers[running]; }

void back_to_scheduler() {
  Fiber& me = self();
  __sanitizer_start_switch_fiber(&me.fake_stack, main_stack, main_stack_bytes);
  switch_context(me.jump, main_jump);
  __sanitizer_finish_switch_fiber(me.fake_stack, &main_stack, &main_stack_bytes);
}

void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_stack_bytes);
  for (;;) {
    self().block->kernel->body(self().block->kernel->arguments.get());
    self().state = State::done;
    back_to_scheduler();
  }
}

void resume(int index) {
  Fiber& fiber = *fibers[index];
  running = index;
  current = &fiber.at;
  __sanitizer_start_switch_fiber(&main_fake_stack, fiber.stack, kStackBytes);
  if (fiber.started) {
    switch_context(main_jump, fiber.jump);
  } else {
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack = {};
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
    enter_context(main_jump, &fiber.context);
  }
  __sanitizer_finish_switch_fiber(main_fake_stack, nullptr, nullptr);
}

void make_fibers(size_t count) {
  while (fibers.size() < count) {
    auto fiber = std::make_unique<Fiber>();
    void* const memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("simt: no memory for stacks");
    mprotect(memory, kGuardBytes, PROT_NONE);
    fiber->stack = static_cast<char*>(memory) + kGuardBytes;
    fibers.push_back(std::move(fiber));
  }
}

// Memory filled with the bytes of a NaN, so that sums with uninitialised values show.
std::unique_ptr<unsigned char[]> nan_memory(size_t bytes) {
  std::unique_ptr<unsigned char[]> memory(new unsigned char[bytes]);
  std::memset(memory.get(), 0xff, bytes);
  return memory;
}

std::string describe(const Fiber& fiber) {
  std::ostringstream text;
  const dim3 &t = fiber.at.thread_index, &b = fiber.at.block_index;
  text << "block (" << b.x << ", " << b.y << ", " << b.z << ") thread (" << t.x << ", " << t.y
       << ", " << t.z << ")";
  if (fiber.state == State::done) {
    text << " has ended";
  } else {
    text << " is at " << fiber.site.operation << " of " << fiber.site.file << ":"
         << fiber.site.line;
    if (fiber.state == State::warp) text << " with mask 0x" << std::hex << fiber.mask;
  }
  return text.str();
}

// The fiber of a lane in the same warp; null past the block's end.
Fiber* lane_of(const Fiber& fiber, int lane) {
  const size_t index = fiber.first_of_warp + lane;
  return index < fiber.block->threads.size() ? fibers[fiber.block->threads[index]].get() : nullptr;
}

void wait(State state, Site site) {
  self().state = state;
  self().site = site;
  back_to_scheduler();
  self().state = State::ready;
}

bool same_site(const Site& a, const Site& b) {
  return a.line == b.line && std::strcmp(a.file, b.file) == 0 &&
         std::strcmp(a.operation, b.operation) == 0;
}

// Releases the threads of a block that have all arrived at one barrier.
bool release_barrier(Block& block) {
  const auto waits = [](int index) { return fibers[index]->state == State::barrier; };
  const auto first = std::find_if(block.threads.begin(), block.threads.end(), waits);
  if (first == block.threads.end()) return false;
  const Fiber& one = *fibers[*first];
  // Threads may wait at two barriers: then the first is of fewer threads than the block's.
  const size_t count = one.barrier_count ? one.barrier_count : block.threads.size();
  if (count > block.threads.size()) {
    error = "a barrier of more threads than the block has: " + describe(one);
    return false;
  }
  for (size_t i = 0; i < count; ++i) {
    const Fiber& other = *fibers[block.threads[i]];
    if (other.state != State::barrier) return false;
    if (!same_site(other.site, one.site)) {
      error = "threads meet at different barriers: " + describe(other) + ", " + describe(one);
      return false;
    }
  }
  for (size_t i = 0; i < count; ++i) fibers[block.threads[i]]->state = State::ready;
  return true;
}

// Explains a deadlock: a thread that waits, and one that it waits for.
void explain_deadlock(const std::vector<int>& threads) {
  for (int index : threads) {
    const Fiber& waiting = *fibers[index];
    if (waiting.state == State::done || waiting.state == State::paused) continue;
    for (int other : waiting.block->threads) {
      const Fiber& missing = *fibers[other];
      const bool wanted = waiting.state == State::barrier
                              ? missing.state != State::barrier
                              : missing.first_of_warp == waiting.first_of_warp &&
                                    (waiting.mask >> missing.lane & 1) &&
                                    !(missing.state == State::warp && missing.mask == waiting.mask);
      if (!wanted) continue;
      error = "threads wait for ever: " + describe(waiting) + ", but " + describe(missing);
      return;
    }
    error = "threads wait for ever: " + describe(waiting) + " for lanes that the block lacks";
    return;
  }
  error = "threads wait for ever for memory to change";
}

// A warp or one thread of a block that is held back until no other thread can continue.
struct Straggler {
  const Block* block = nullptr;
  int first = 0, last = 0;  // by number in the block

  bool has(const Fiber& fiber) const {
    const int number = fiber.first_of_warp + fiber.lane;
    return fiber.block == block && number >= first && number <= last;
  }
};

Straggler choose_straggler(const std::vector<int>& threads) {
  const Fiber& fiber = *fibers[threads[random_bits() % threads.size()]];
  const int number = fiber.first_of_warp + fiber.lane;
  if (random_bits() % 2) return {fiber.block, number, number};
  return {fiber.block, fiber.first_of_warp, fiber.first_of_warp + 31};
}

// Runs blocks to their end, or an early one as far as it can go.
void run(const std::vector<Block*>& blocks, bool early = false) {
  std::vector<int> threads;
  for (Block* block : blocks)
    threads.insert(threads.end(), block->threads.begin(), block->threads.end());
  if (order == Order::descending) std::reverse(threads.begin(), threads.end());
  long idle_rounds = 0;
  const auto lives = [](int index) { return fibers[index]->state != State::done; };
  size_t live = std::count_if(threads.begin(), threads.end(), lives);
  Straggler straggler;
  bool all_may_go = false;
  while (live) {
    if (order == Order::random) {
      std::shuffle(threads.begin(), threads.end(), random_bits);
      if (!all_may_go && !straggler.block) straggler = choose_straggler(threads);
    }
    bool progress = false, pausing = false;
    for (int index : threads) {
      const State before = fibers[index]->state;
      if (before != State::ready && before != State::paused) continue;
      if (straggler.has(*fibers[index])) continue;
      resume(index);
      if (!error.empty()) return;
      pausing |= before == State::paused;
      progress |= before == State::ready || fibers[index]->state != State::paused;
      live -= fibers[index]->state == State::done;
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
      return explain_deadlock(threads);
  }
}

// A fiber that was abandoned midway starts again next time.
void abandon_fibers() {
  for (auto& fiber : fibers) {
    if (fiber->state != State::done) {
      fiber->started = false;
      __asan_unpoison_memory_region(fiber->stack, kStackBytes);
    }
    fiber->state = State::done;
    fiber->copies.clear();
  }
}

std::unique_ptr<Block> make_block(const Kernel& kernel, dim3 index, size_t first_fiber) {
  const Launch& shape = kernel.shape;
  auto block = std::make_unique<Block>();
  block->kernel = &kernel;
  block->dynamic = nan_memory(shape.shared_bytes);
  int number = 0;
  for (unsigned z = 0; z < shape.block.z; ++z)
    for (unsigned y = 0; y < shape.block.y; ++y)
      for (unsigned x = 0; x < shape.block.x; ++x) {
        const int fiber_index = static_cast<int>(first_fiber) + number;
        Fiber& fiber = *fibers[fiber_index];
        fiber.at = {{x, y, z}, index, shape.block, shape.grid};
        fiber.first_of_warp = number / 32 * 32;
        fiber.lane = number % 32;
        fiber.copies.clear();
        fiber.state = State::ready;
        fiber.block = block.get();
        block->threads.push_back(fiber_index);
        ++number;
      }
  return block;
}

// Runs a launch to its end, after all previous launches.
void complete(Kernel& kernel) {
  const Launch& shape = kernel.shape;
  const size_t total = kernel.indices.size();
  const size_t threads = static_cast<size_t>(shape.block.x) * shape.block.y * shape.block.z;
  make_fibers(shape.resident ? threads * total : threads);
  kernel.previous_done = true;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Block*> together;
  for (size_t i = 0; i < total && error.empty(); ++i) {
    if (i == 0 && kernel.early) {
      blocks.push_back(std::move(kernel.early));
      for (int index : blocks.back()->threads)
        if (fibers[index]->state == State::previous) fibers[index]->state = State::ready;
    } else {
      const size_t first = shape.resident ? i * threads : 0;
      blocks.push_back(make_block(kernel, kernel.indices[i], first));
    }
    together.push_back(blocks.back().get());
    if (shape.resident && i + 1 < total) continue;
    run(together);
    for (const Block* block : together)
      if (error.empty() && shape.overlaps_previous && !block->waited)
        error = "overlaps the previous launch, but does not wait for it: " +
                describe(*fibers[block->threads[0]]);
    blocks.clear();
    together.clear();
  }
}

// Completes the oldest launches until `left` are left.
void complete_until(size_t left) {
  while (pending.size() > left && error.empty()) {
    complete(pending.front());
    if (error.empty()) pending.pop_front();
  }
  if (error.empty()) return;
  abandon_fibers();
  pending.clear();
  throw std::runtime_error("simt: " + std::exchange(error, {}));
}

}  // namespace

void launch(const Launch& shape, void (*body)(const void*), std::shared_ptr<const void> arguments) {
  const std::lock_guard lock(one_launch);
  order = chosen_order();
  const auto count = [](dim3 n) { return static_cast<size_t>(n.x) * n.y * n.z; };
  const size_t threads = count(shape.block), total = count(shape.grid);
  if (threads == 0 || threads > kMaxThreads || total == 0 || shape.grid.y > 65535 ||
      shape.grid.z > 65535 || shape.shared_bytes > (227 << 10) ||
      (shape.resident && shape.overlaps_previous))
    throw std::runtime_error("simt: no GPU takes such a launch");
  std::vector<dim3> indices;
  for (unsigned z = 0; z < shape.grid.z; ++z)
    for (unsigned y = 0; y < shape.grid.y; ++y)
      for (unsigned x = 0; x < shape.grid.x; ++x) indices.emplace_back(x, y, z);
  if (order == Order::descending) std::reverse(indices.begin(), indices.end());
  if (order == Order::random) std::shuffle(indices.begin(), indices.end(), random_bits);

  if (!shape.overlaps_previous) complete_until(0);
  // The previous launch first waits for those before it.
  if (!pending.empty() && pending.back().early && !pending.back().early->lets_next)
    complete_until(1);
  const bool overlaps = !pending.empty() && !shape.resident;
  pending.push_back({shape, body, std::move(arguments), std::move(indices), nullptr});
  if (overlaps) {
    // After the threads of blocks that run to their end.
    const size_t first = (1 + launches++ % (kMaxOverlapped + 1)) * kMaxThreads;
    make_fibers(first + threads);
    Kernel& kernel = pending.back();
    kernel.early = make_block(kernel, kernel.indices[0], first);
    run({kernel.early.get()}, true);
  }
  complete_until(kMaxOverlapped);
}

void finish() {
  const std::lock_guard lock(one_launch);
  complete_until(0);
}

void drop() {
  const std::lock_guard lock(one_launch);
  abandon_fibers();
  pending.clear();
}

void wait_for_previous(Site site) {
  self().block->waited = true;
  if (!self().block->kernel->previous_done) wait(State::previous, site);
}

void let_next() { self().block->lets_next = true; }

void sync_threads(Site site, int count) {
  self().barrier_count = count;
  wait(State::barrier, site);
}

void pause() { wait(State::paused, {"__nanosleep", "", 0}); }

uint64_t nanoseconds() { return now; }

int multiprocessors() {
  const char* const text = std::getenv("VOXKERN_SIMT_MULTIPROCESSORS");
  return text ? std::atoi(text) : 3;
}

void fail(Site site, const char* what) {
  self().site = site;
  self().state = State::warp;
  error = describe(self()) + ": " + what;
  back_to_scheduler();
  __builtin_unreachable();
}

// Gives the lanes of the mask the values of all of them, once all have arrived.
static bool release_lanes(Fiber& me) {
  uint64_t values[32] = {};
  Fiber* lanes[32] = {};
  for (int i = 0; i < 32; ++i) {
    if (!(me.mask >> i & 1)) continue;
    lanes[i] = lane_of(me, i);
    if (!lanes[i] || lanes[i]->state != State::warp || lanes[i]->mask != me.mask) return false;
    values[i] = lanes[i]->value;
  }
  for (Fiber* other : lanes) {
    if (!other || same_site(other->site, me.site)) continue;
    error = "lanes meet in different operations: " + describe(me) + ", " + describe(*other);
    return false;
  }
  for (Fiber* other : lanes) {
    if (!other) continue;
    std::memcpy(other->received, values, sizeof values);
    other->state = State::ready;
  }
  return true;
}

void exchange(Site site, uint32_t mask, uint64_t value, uint64_t (&all)[32]) {
  Fiber& me = self();
  if (!(mask >> me.lane & 1)) fail(site, "the mask lacks its caller");
  me.mask = mask;
  me.value = value;
  me.site = site;
  me.state = State::warp;
  int& waiting = me.block->waiting_lanes[me.first_of_warp / 32];
  ++waiting;
  if (waiting >= __builtin_popcount(mask) && release_lanes(me)) waiting -= __builtin_popcount(mask);
  if (me.state != State::ready) back_to_scheduler();
  std::memcpy(all, self().received, sizeof all);
}

void* dynamic_shared() { return self().block->dynamic.get(); }

void* shared_variable(const void* key, size_t bytes) {
  auto& variables = self().block->variables;
  for (const auto& variable : variables)
    if (variable.key == key) return variable.memory.get();
  variables.push_back({key, nan_memory(bytes)});
  return variables.back().memory.get();
}

void copy_async(void* to, const void* from, size_t bytes) {
  auto& groups = self().copies;
  if (groups.empty()) groups.emplace_back();
  if (order == Order::ascending || (order == Order::random && random_bits() % 2))
    std::memcpy(to, from, bytes);
  else
    groups.back().push_back({to, from, bytes});
}

void commit_copies() {
  auto& groups = self().copies;
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}

void wait_copies(int groups_left) {
  auto& groups = self().copies;
  while (static_cast<int>(groups.size()) - 1 > groups_left) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
    groups.erase(groups.begin());
  }
}

}  // namespace simt
