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

// Times of spinning, in calls of relax(): about 20 us, and 200 us.
constexpr int kShort = 2000;
constexpr int kLong = 20000;

// Waits until `word` differs from `old`. Spins first, because the next job or the slowest thread
// usually arrives by then; after that it sleeps until the writer notifies.
void wait_change(const std::atomic<uint32_t>& word, uint32_t old, int spins) {
  for (int i = 0; i < spins; ++i) {
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

// A run's invitation to the workers, in one word: the number of the run, whether it is closed, and
// how many workers have joined it.
struct Invitation {
  static constexpr uint64_t kClosed = uint64_t{1} << 31;
  uint64_t word;

  uint32_t run() const { return static_cast<uint32_t>(word >> 32); }
  bool closed() const { return word & kClosed; }
  int joined() const { return static_cast<int>(word & (kClosed - 1)); }
};

struct Place {
  int rank = 0;  // 0: none
  int size = 0;  // threads of the run
};

struct Workers {
  std::vector<std::thread> threads;
  std::atomic<uint64_t> invitation{Invitation::kClosed};
  std::atomic<uint32_t> round{0};    // the run of the invitation: workers wait for the next value
  std::atomic<uint32_t> arrived{0};  // threads at the current barrier
  std::atomic<uint32_t> phase{0};    // counts barriers passed
  std::atomic<bool> stop{false};
  Team::Job job = nullptr;
  void* context = nullptr;
  int size = 1;
  int patience = kLong;     // how long a run waits for workers to join
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
    invite(Invitation::kClosed);
    for (auto& thread : threads) thread.join();
  }

  void invite(uint64_t closed = 0) {
    const uint32_t next = round.load(std::memory_order_relaxed) + 1;
    invitation.store(uint64_t{next} << 32 | closed, std::memory_order_release);
    round.store(next, std::memory_order_release);
    round.notify_all();
  }

  int num_workers() const { return size - 1; }

  // Waits for the workers to join, but not for long: a worker whose processor is busy with another
  // process may take milliseconds, in which the others do its part. Returns the threads of the run.
  int gather() {
    for (int i = 0; i < patience; ++i) {
      if (Invitation{invitation.load(std::memory_order_acquire)}.joined() == num_workers()) {
        patience = kLong;
        return size;
      }
      relax();
    }
    const Invitation last{invitation.fetch_or(Invitation::kClosed, std::memory_order_acq_rel)};
    patience = last.joined() == num_workers() ? kLong : kShort;
    return last.joined() + 1;
  }

  // Joins the run that the invitation is for, unless that is `seen` or closed. The index-th thread
  // gets this rank if all join: then the data that its processor has in its caches stay there.
  Place join(int index, uint32_t& seen) {
    Invitation now{invitation.load(std::memory_order_acquire)};
    do {
      if (now.run() == seen) return {};
      if (now.closed()) {
        seen = now.run();
        return {};
      }
    } while (!invitation.compare_exchange_weak(now.word, now.word + 1, std::memory_order_acq_rel,
                                               std::memory_order_acquire));
    seen = now.run();
    const int rank = now.joined() + 1;
    for (int i = 0;; ++i) {
      now.word = invitation.load(std::memory_order_acquire);
      if (now.joined() == num_workers()) return {index, size};
      if (now.closed()) return {rank, now.joined() + 1};
      i < kShort ? relax() : std::this_thread::yield();
    }
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

  // A barrier of the run's threads.
  void meet(Place place) {
    sit(place.rank);
    const uint32_t before = phase.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(place.size)) {
      arrived.store(0, std::memory_order_relaxed);
      phase.fetch_add(1, std::memory_order_release);
      phase.notify_all();
    } else {
      wait_change(phase, before, alone_on_cpu(place.rank) ? kShort : 0);
    }
  }

  void serve(int index);
};

std::mutex mutex;            // held by resize() and by the run() that uses the workers
Workers* workers = nullptr;  // guarded by mutex; leaked at exit: threads may outlive statics
std::atomic<int> team_size{0};
thread_local Workers* joined = nullptr;  // the workers whose run() this thread is part of
thread_local Place place;                // its place there

void Workers::serve(int index) {
  joined = this;
  // The caller of run() (rank 0) is not pinned: threads it starts would inherit its mask.
  if (pinned) pin_thread(index);
  uint32_t seen = 0;
  int spins = kShort;
  for (;;) {
    wait_change(round, seen, alone_on_cpu(index) ? spins : 0);
    place = join(index, seen);
    if (stop) return;                     // the last invitation is closed: nobody joins it
    spins = place.rank ? kShort : kLong;  // whoever came too late is in time for the next run
    if (!place.rank) continue;
    sit(place.rank);
    job(place.rank, place.size, context);
    meet(place);
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
  workers->sit(0);
  workers->invite();
  place = {0, workers->gather()};
  job(0, place.size, context);
  barrier();
  joined = nullptr;
}

void Team::barrier() {
  if (joined && place.size > 1) joined->meet(place);
}

}  // namespace voxkern

STABLE_TORCH_LIBRARY_IMPL(voxkern, CompositeExplicitAutograd, m) {
  m.impl("num_threads", TORCH_BOX(&voxkern::num_threads));
  m.impl("set_num_threads", TORCH_BOX(&voxkern::set_num_threads));
}
