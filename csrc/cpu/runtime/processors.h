// How many processors this process may use; host only.
#pragma once

#include <string>

namespace voxkern {

constexpr int kMaxThreads = 1024;

// VOXKERN_NUM_THREADS, else OMP_NUM_THREADS, else what affinity and cgroups leave; 1 to
// kMaxThreads.
int default_num_threads();

// Whether VOXKERN_PIN asks for threads that stay on one processor.
bool pinning();

// Keeps the calling thread on the rank-th of the processors that it may use, the first again after
// the last.
void pin_thread(int rank);

// Processors' worth of time that cgroups (either version) leave to this process, its own group and
// those around it; 0 for no limit. `root`: of the file system, other than "/" in tests.
double cpu_quota(const std::string& root);

}  // namespace voxkern
