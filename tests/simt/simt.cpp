// Launches, and what kernels call; simt.h documents the behaviour.
#include "simt.h"

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <stdexcept>

#include "fibers.h"

namespace simt {

namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxOverlapped = 3;  // launches in flight at once

std::mutex one_launch;
std::deque<Kernel> pending;
int launches = 0;

Order chosen_order() {
  const char* name = std::getenv("VOXKERN_SIMT_ORDER");
  if (!name || !*name || std::string(name) == "random") return Order::random;
  if (std::string(name) == "ascending") return Order::ascending;
  if (std::string(name) == "descending") return Order::descending;
  throw std::runtime_error(std::string("VOXKERN_SIMT_ORDER=") + name +
                           ": expected random, ascending or descending");
}

// Memory filled with the bytes of a NaN, so that sums with uninitialised values show.
std::unique_ptr<unsigned char[]> nan_memory(size_t bytes) {
  std::unique_ptr<unsigned char[]> memory(new unsigned char[bytes]);
  std::memset(memory.get(), 0xff, bytes);
  return memory;
}

std::unique_ptr<Block> make_block(const Kernel& kernel, dim3 index, int first_fiber) {
  const Launch& shape = kernel.shape;
  auto block = std::make_unique<Block>();
  block->kernel = &kernel;
  block->dynamic = nan_memory(shape.shared_bytes);
  block->first = first_fiber;
  block->size = static_cast<int>(shape.block.x * shape.block.y * shape.block.z);
  block->warps.resize((block->size + kLanes - 1) / kLanes);
  int number = 0;
  for (unsigned z = 0; z < shape.block.z; ++z)
    for (unsigned y = 0; y < shape.block.y; ++y)
      for (unsigned x = 0; x < shape.block.x; ++x, ++number) {
        Fiber& fiber = *fibers[first_fiber + number];
        fiber.at = {{x, y, z}, index, shape.block, shape.grid};
        fiber.number = number;
        fiber.copies.clear();
        fiber.state() = State::ready;
        fiber.block = block.get();
        fiber.warp = &block->warps[number / kLanes];
      }
  return block;
}

// Runs a launch to its end, after all previous launches.
void complete(Kernel& kernel) {
  const Launch& shape = kernel.shape;
  const int total = static_cast<int>(kernel.indices.size());
  const int threads = static_cast<int>(shape.block.x * shape.block.y * shape.block.z);
  make_fibers(shape.resident ? size_t{1} * threads * total : threads);
  kernel.previous_done = true;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Block*> together;
  for (int i = 0; i < total && error.empty(); ++i) {
    if (i == 0 && kernel.early) {
      blocks.push_back(std::move(kernel.early));
      const auto states_of = states.begin() + blocks.back()->first;
      std::replace(states_of, states_of + blocks.back()->size, State::previous, State::ready);
    } else {
      blocks.push_back(make_block(kernel, kernel.indices[i], shape.resident ? i * threads : 0));
    }
    together.push_back(blocks.back().get());
    if (shape.resident && i + 1 < total) continue;
    run(together);
    for (const Block* block : together)
      if (error.empty() && shape.overlaps_previous && !block->waited)
        error = "overlaps the previous launch, but does not wait for it: " +
                describe(*fibers[block->first]);
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
    const int first = (1 + launches++ % (kMaxOverlapped + 1)) * kMaxThreads;
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
  running->block->waited = true;
  if (!running->block->kernel->previous_done) wait(State::previous, site);
}

void let_next() { running->block->lets_next = true; }

void sync_threads(Site site, int count) {
  running->barrier_count = count;
  ++running->block->at_barrier;
  if (count) ++running->block->at_partial;
  wait(State::barrier, site);
}

void pause() { wait(State::paused, {"__nanosleep", "", 0}); }

uint64_t nanoseconds() { return now; }

int multiprocessors() {
  const char* const text = std::getenv("VOXKERN_SIMT_MULTIPROCESSORS");
  return text ? std::atoi(text) : 3;
}

void fail(Site site, const char* what) {
  running->site = site;
  running->state() = State::warp;
  error = describe(*running) + ": " + what;
  let_next_run();
  __builtin_unreachable();
}

// True if all lanes of the mask wait in the same operation; an error if in different ones.
static bool all_arrived(const Fiber& me) {
  const Block& block = *me.block;
  const Fiber* differing = nullptr;
  for (int i = 0; i < kLanes; ++i) {
    if (!(me.mask >> i & 1)) continue;
    const int number = me.first_of_warp() + i;
    if (number >= block.size) return false;
    const Fiber& other = *fibers[block.first + number];
    if (other.state() != State::warp || other.mask != me.mask) return false;
    if (!same_site(other.site, me.site)) differing = &other;
  }
  if (differing)
    error = "lanes meet in different operations: " + describe(me) + ", " + describe(*differing);
  return !differing;
}

// Gives the lanes of the mask, who have all arrived, the values of all of them.
static void release_lanes(const Fiber& me, Combine* combine) {
  Warp& warp = *me.warp;
  if (combine) combine(warp.arriving, me.mask);
  const int first = me.index - me.lane();
  if (me.mask == kAllLanes) {
    std::memcpy(warp.arrived, warp.arriving, sizeof warp.arrived);
    std::fill_n(states.begin() + first, kLanes, State::ready);
    warp.waiting = 0;
    return;
  }
  for (int i = 0; i < kLanes; ++i) {
    if (!(me.mask >> i & 1)) continue;
    Fiber& other = *fibers[first + i];
    std::memcpy(other.received, warp.arriving, sizeof other.received);
    other.state() = State::ready;
    --warp.waiting;
  }
  warp.alike = 0;  // the lanes left, if any, are checked one by one
}

const uint64_t* exchange(Site site, uint32_t mask, uint64_t value, Combine* combine) {
  Fiber& me = *running;
  if (!(mask >> me.lane() & 1)) fail(site, "the mask lacks its caller");
  me.mask = mask;
  me.site = site;
  me.state() = State::warp;
  Warp& warp = *me.warp;
  warp.arriving[me.lane()] = value;
  if (warp.waiting++ == 0) {
    warp.mask = mask;
    warp.site = site;
    warp.alike = 1;
  } else if (mask == warp.mask && site.line == warp.site.line && site.file == warp.site.file &&
             site.operation == warp.site.operation) {
    ++warp.alike;
  }
  const int lanes = __builtin_popcount(mask);
  if (warp.waiting >= lanes && ((warp.alike == lanes && warp.waiting == lanes) || all_arrived(me)))
    release_lanes(me, combine);
  if (me.state() != State::ready) let_next_run();
  return mask == kAllLanes ? warp.arrived : me.received;
}

void* dynamic_shared() { return running->block->dynamic.get(); }

void* shared_variable(const void* key, size_t bytes) {
  auto& variables = running->block->variables;
  for (const auto& variable : variables)
    if (variable.key == key) return variable.memory.get();
  variables.push_back({key, nan_memory(bytes)});
  return variables.back().memory.get();
}

void copy_async(void* to, const void* from, size_t bytes) {
  auto& groups = running->copies;
  if (groups.empty()) groups.emplace_back();
  if (order == Order::ascending || (order == Order::random && random_bits() % 2))
    std::memcpy(to, from, bytes);
  else
    groups.back().push_back({to, from, bytes});
}

void commit_copies() {
  auto& groups = running->copies;
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}

void wait_copies(int groups_left) {
  auto& groups = running->copies;
  while (static_cast<int>(groups.size()) - 1 > groups_left) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
    groups.erase(groups.begin());
  }
}

}  // namespace simt
