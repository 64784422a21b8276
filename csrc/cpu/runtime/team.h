// The team of threads that all CPU kernels share.
//
// run(f) has every thread call f(rank, size) and returns when all have; inside, barrier() lets
// them meet. Threads that wait spin for a few microseconds, then sleep in the kernel, so a team
// next to another busy process loses time, not the processor. Only one run() at a time uses the
// workers; a second caller's, and one inside a run(), goes on alone with size 1.
#pragma once

#include <cstdint>

namespace voxkern {

class Team {
 public:
  // rank of the calling thread, size of the team, the caller's context.
  using Job = void (*)(int rank, int size, void* context);

  static void run(Job job, void* context);
  // Every thread of the current run() waits for the others. Nothing to do at size 1.
  static void barrier();
  static int size();
  // 1 <= n <= 1024; waits for a run() in progress.
  static void resize(int n);
};

namespace {

// f(rank, size) on every thread of the team.
template <typename F>
inline void run_team(F& f) {
  Team::run([](int rank, int size, void* context) { (*static_cast<F*>(context))(rank, size); }, &f);
}

struct Range {
  int64_t begin, end;
};

// The rank-th of `size` nearly equal parts of 0..n, in multiples of `grain`.
inline Range split(int64_t n, int64_t grain, int rank, int size) {
  const int64_t grains = (n + grain - 1) / grain;
  const int64_t begin = grains * rank / size * grain;
  const int64_t end = grains * (rank + 1) / size * grain;
  return {begin < n ? begin : n, end < n ? end : n};
}

// f(begin, end) over parts of 0..n. `work` is the total in operations or bytes: a small job stays
// on the calling thread, for waking a team costs microseconds.
template <typename F>
inline void parallel_for(int64_t n, int64_t grain, int64_t work, const F& f) {
  if (work < (1 << 15) || n <= grain) {
    if (n > 0) f(static_cast<int64_t>(0), n);
    return;
  }
  auto body = [&](int rank, int size) {
    const Range part = split(n, grain, rank, size);
    if (part.begin < part.end) f(part.begin, part.end);
  };
  run_team(body);
}

}  // namespace
}  // namespace voxkern
