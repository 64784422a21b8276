#include "cpu/runtime/team.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "common/check.h"
#include "cpu/runtime/processors.h"

namespace voxkern {
namespace {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until `word` differs from `old`. With `spin`, spins for about 20 us first, because the next
// job or the slowest thread usually arrives by then; after that it sleeps until the writer
// notifies.
void wait_change(const std::atomic<uint32_t>& word, uint32_t old, bool spin) {
  for (int i = 0; spin && i < 2000; ++i) {
    if (word.load(std::memory_order_acquire) != old) return;
    relax();
  }
  word.wait(old, std::memory_order_acquire);
}

int current_cpu() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

struct alignas(64) Seat {
  std::atomic<int> cpu{-1};  // the thread's processor at its last barrier or start of a job
};

struct Workers {
  std::vector<std::thread> threads;
  std::atomic<uint32_t> round{0};    // counts runs; workers wait for the next value
  std::atomic<uint32_t> arrived{0};  // threads at the current barrier
  std::atomic<uint32_t> phase{0};    // counts barriers passed
  std::atomic<bool> stop{false};
  Team::Job job = nullptr;
  void* context = nullptr;
  int size = 1;
  std::vector<Seat> seats;  // by rank
  const bool pinned = pinning();

  explicit Workers(int n) : size(n), seats(n) {
    try {
      for (int rank = 1; rank < n; ++rank) threads.emplace_back([this, rank] { serve(rank); });
    } catch (const std::system_error& error) {
      end();
      check(false, "could not start thread ", threads.size() + 2, " of ", n, ": ", error.what());
    }
  }

  ~Workers() { end(); }

  void end() {
    stop = true;
    next_round();
    for (auto& thread : threads) thread.join();
  }

  void next_round() {
    round.fetch_add(1, std::memory_order_release);
    round.notify_all();
  }

  void sit(int rank) {
    const int cpu = current_cpu();
    if (seats[rank].cpu.load(std::memory_order_relaxed) != cpu)
      seats[rank].cpu.store(cpu, std::memory_order_relaxed);
  }

  // On a busy machine the scheduler may put two threads of the team on one processor. Spinning
  // would then delay the very thread we wait for.
  bool alone_on_cpu(int rank) const {
    const int cpu = seats[rank].cpu.load(std::memory_order_relaxed);
    for (int other = 0; other < size; ++other)
      if (other != rank && cpu >= 0 && seats[other].cpu.load(std::memory_order_relaxed) == cpu)
        return false;
    return true;
  }

  void meet(int rank) {
    sit(rank);
    const uint32_t before = phase.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(size)) {
      arrived.store(0, std::memory_order_relaxed);
      phase.fetch_add(1, std::memory_order_release);
      phase.notify_all();
    } else {
      wait_change(phase, before, alone_on_cpu(rank));
    }
  }

  void serve(int rank);
};

std::mutex mutex;            // held by resize() and by the run() that uses the workers
Workers* workers = nullptr;  // guarded by mutex; leaked at exit: threads may outlive statics
std::atomic<int> team_size{0};
thread_local Workers* joined = nullptr;  // the workers whose run() this thread is part of
thread_local int joined_rank = 0;        // its rank there

void Workers::serve(int rank) {
  joined = this;
  joined_rank = rank;
  // The caller of run() (rank 0) is not pinned: threads it starts would inherit its mask.
  if (pinned) pin_thread(rank);
  for (uint32_t seen = 0;; ++seen) {
    wait_change(round, seen, alone_on_cpu(rank));
    if (stop) return;
    sit(rank);
    job(rank, size, context);
    meet(rank);
  }
}

// A forked child has none of its parent's threads. It starts its own team when it needs one.
void after_fork() {
  new (&mutex) std::mutex;
  workers = nullptr;
  joined = nullptr;
}

[[maybe_unused]] const int fork_handled = pthread_atfork(nullptr, nullptr, after_fork);

int64_t num_threads() { return Team::size(); }

void set_num_threads(int64_t n) {
  check(n >= 1 && n <= kMaxThreads, "n: expected 1 to ", kMaxThreads, " threads, got ", n);
  Team::resize(static_cast<int>(n));
}

}  // namespace

int Team::size() {
  int n = team_size.load();
  if (n == 0) {
    n = default_num_threads();
    int unset = 0;
    if (!team_size.compare_exchange_strong(unset, n)) n = unset;
  }
  return n;
}

void Team::resize(int n) {
  std::lock_guard<std::mutex> lock(mutex);
  delete workers;
  workers = nullptr;
  team_size = n;
}

void Team::run(Job job, void* context) {
  const int n = size();
  if (n == 1 || joined || !mutex.try_lock()) {
    Workers* const outer = joined;
    joined = nullptr;
    job(0, 1, context);
    joined = outer;
    return;
  }
  std::lock_guard<std::mutex> lock(mutex, std::adopt_lock);
  if (!workers) workers = new Workers(team_size.load());
  workers->job = job;
  workers->context = context;
  joined = workers;
  joined_rank = 0;
  workers->sit(0);
  workers->next_round();
  job(0, workers->size, context);
  workers->meet(0);
  joined = nullptr;
}

void Team::barrier() {
  if (joined) joined->meet(joined_rank);
}

}  // namespace voxkern

STABLE_TORCH_LIBRARY_IMPL(voxkern, CompositeExplicitAutograd, m) {
  m.impl("num_threads", TORCH_BOX(&voxkern::num_threads));
  m.impl("set_num_threads", TORCH_BOX(&voxkern::set_num_threads));
}
