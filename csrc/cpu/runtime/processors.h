// The number of processors this process may use, and pinning threads to them. Host only.
#pragma once

#include <string>

namespace voxkern {

constexpr int kMaxThreads = 1024;

// VOXKERN_NUM_THREADS if set, else OMP_NUM_THREADS, else the processors that affinity and cgroups
// allow; 1 to kMaxThreads.
int default_num_threads();

// True if VOXKERN_PIN=1: worker threads are pinned to one processor each.
bool pinning();

// Pins the calling thread to the rank-th processor of its affinity mask, modulo their number.
void pin_thread(int rank);

// The CPU limit of this process's cgroup and its ancestors (cgroup v1 or v2), in processors; 0 for
// no limit. `root` is the file system's root, prepended to paths: "" except in tests.
double cpu_quota(const std::string& root);

}  // namespace voxkern
