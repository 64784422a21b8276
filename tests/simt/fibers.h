// Fibers, blocks and launches of the emulator: shared by scheduler.cpp, which runs them, and
// simt.cpp, which has what kernels call. simt.h documents the behaviour.
#pragma once

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "contexts.h"
#include "simt.h"

namespace simt {

constexpr int kLanes = 32;  // of a warp
constexpr uint32_t kAllLanes = 0xffffffff;

// The first two can run.
enum class State : uint8_t { ready, paused, barrier, warp, previous, done };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

// The meeting place of the lanes of a warp.
struct Warp {
  uint64_t arriving[kLanes];  // values of the lanes that wait
  uint64_t arrived[kLanes];   // all values of the last operation of the whole warp
  int waiting = 0;            // lanes
  int alike = 0;              // of these, lanes with the first one's mask and site
  uint32_t mask = 0;          // the first one's
  Site site{};
};

struct Kernel;

struct Block {
  const Kernel* kernel = nullptr;
  bool waited = false;      // for the previous launches
  bool lets_next = false;   // start
  int first = 0, size = 0;  // fibers
  int at_barrier = 0;       // threads that wait at one
  int at_partial = 0;       // of these, at one for fewer threads than the block's
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> dynamic;
  struct Variable {
    const void* key;
    std::unique_ptr<unsigned char[]> memory;
  };
  std::vector<Variable> variables;
};

struct Fiber {
  Coordinates at;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int index = 0;   // among all fibers
  int number = 0;  // in the block

  Site site{};
  int barrier_count = 0;
  uint32_t mask = 0;
  std::vector<std::vector<Copy>> copies;

  void* stack = nullptr;
  bool started = false;
  Context context;
  void* fake_stack = nullptr;
  uint64_t received[kLanes];  // in an operation of a part of the warp

  int lane() const { return number % kLanes; }
  int first_of_warp() const { return number - lane(); }
  State& state() const;
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

// splitmix64.
struct Random {
  uint64_t state = 5489;
  using result_type = uint32_t;
  static constexpr uint32_t min() { return 0; }
  static constexpr uint32_t max() { return 0xffffffff; }
  uint32_t operator()() {
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return static_cast<uint32_t>(z >> 32);
  }
  uint32_t below(size_t limit) { return static_cast<uint32_t>(uint64_t{(*this)()} * limit >> 32); }
};

extern std::vector<std::unique_ptr<Fiber>> fibers;  // reused: creating one costs system calls
extern std::vector<State> states;                   // of the fibers, side by side to be scanned
extern Fiber* running;
extern Random random_bits;
extern Order order;
extern std::string error;  // ends the launch if not empty
extern uint64_t now;       // nanoseconds

inline State& Fiber::state() const { return states[index]; }

void make_fibers(size_t count);
// Runs blocks to their end, or an early one as far as it can go.
void run(const std::vector<Block*>& blocks, bool early = false);
// A fiber that was abandoned midway starts again next time.
void abandon_fibers();
// Lets others run until the fiber that runs is ready again.
void wait(State state, Site site);
// Lets the next fiber run, or the scheduler if none is left in this round.
void let_next_run();
bool same_site(const Site& a, const Site& b);
std::string describe(const Fiber& fiber);

}  // namespace simt
