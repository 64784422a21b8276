// The thread team shared by all CPU kernels.
//
// run(f) calls f(rank, size) on every thread and returns when all calls have returned; barrier()
// synchronises the threads inside f. Waiting threads spin for a few microseconds, then sleep in the
// operating system. A run() has fewer threads if some do not come at once, because another process
// keeps their processors busy: no result may depend on the size. One run() at a time uses the
// workers; a concurrent or nested run() executes on its own thread alone with size 1.
#pragma once

#include <cstdint>

#include "common/arena.h"

namespace voxkern {

class Team {
 public:
  // Gets the calling thread's rank, the size of the team and the caller's context.
  using Job = void (*)(int rank, int size, void* context);

  static void run(Job job, void* context);
  // Waits for all threads of the current run(). Does nothing at size 1.
  static void barrier();
  static int size();
  // 1 <= n <= kMaxThreads. Waits for a run() in progress.
  static void resize(int n);
};

namespace {

// Calls f(rank, size) on every thread of the team.
template <typename F>
inline void run_team(F& f) {
  Team::run([](int rank, int size, void* context) { (*static_cast<F*>(context))(rank, size); }, &f);
}

// Calls Worker(p, shared, own, rank, size).run() in every thread. `own` is Own(arena, p, shared), a
// thread's buffers: the thread allocates them, so that their pages are local to its processor
// (NUMA).
template <typename Worker, typename Own, typename Params, typename Shared>
void run_workers(const Params& p, const Shared& shared) {
  auto job = [&](int rank, int size) {
    void* const block = __builtin_malloc(arena_bytes<Own>(p, shared));
    Arena arena(block);
    Worker(p, shared, Own(arena, p, shared), rank, size).run();
    __builtin_free(block);
  };
  run_team(job);
}

// The same with shared buffers of its own: Shared(arena, p).
template <typename Worker, typename Own, typename Shared, typename Params>
void run_workers(const Params& p) {
  void* const block = __builtin_malloc(arena_bytes<Shared>(p));
  Arena arena(block);
  run_workers<Worker, Own>(p, Shared(arena, p));
  __builtin_free(block);
}

struct Range {
  int64_t begin, end;
};

// The rank-th of `size` nearly equal ranges of 0..n, cut at multiples of `grain`.
inline Range partition(int64_t n, int64_t grain, int rank, int size) {
  const int64_t grains = (n + grain - 1) / grain;
  const int64_t begin = grains * rank / size * grain;
  const int64_t end = grains * (rank + 1) / size * grain;
  return {begin < n ? begin : n, end < n ? end : n};
}

// Operations or bytes below which a job stays on one thread: waking the team costs microseconds.
// The thread sanitizer's build has small cases run on the team too.
#ifdef VOX_MIN_TEAM_WORK
constexpr int64_t kMinTeamWork = VOX_MIN_TEAM_WORK;
#else
constexpr int64_t kMinTeamWork = 1 << 15;
#endif

// Calls f(begin, end) on ranges that cover 0..n. `work` is the total in operations or bytes: a job
// below kMinTeamWork stays on the calling thread, because waking the team costs microseconds.
template <typename F>
inline void parallel_for(int64_t n, int64_t grain, int64_t work, const F& f) {
  if (work < kMinTeamWork || n <= grain) {
    if (n > 0) f(static_cast<int64_t>(0), n);
    return;
  }
  auto body = [&](int rank, int size) {
    const Range mine = partition(n, grain, rank, size);
    if (mine.begin < mine.end) f(mine.begin, mine.end);
  };
  run_team(body);
}

}  // namespace
}  // namespace voxkern
