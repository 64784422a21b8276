#include "cpu/runtime/processors.h"

#if defined(__linux__)
#include <sched.h>
#endif

#include <cmath>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <thread>

#include "common/check.h"

namespace voxkern {
namespace {

// The CPU limit that one cgroup's own files set, in processors; 0 for no limit.
double quota_of(const std::string& folder, bool version2) {
  double quota = 0, period = 0;
  if (version2) {
    std::string limit;  // a number or "max"
    std::ifstream(folder + "/cpu.max") >> limit >> period;
    quota = std::atof(limit.c_str());
  } else {
    std::ifstream(folder + "/cpu.cfs_quota_us") >> quota;
    std::ifstream(folder + "/cpu.cfs_period_us") >> period;
  }
  return quota > 0 && period > 0 ? quota / period : 0;
}

// The smallest limit of the cgroup `path` and its ancestors up to the mount; 0 for none. Inside a
// container the path may be the host's, whose folders do not exist here; the mount is then the
// container's own group.
double quota_from(const std::string& mount, std::string path, bool version2) {
  double least = 0;
  while (true) {
    const double quota = quota_of(mount + path, version2);
    if (quota > 0 && (least == 0 || quota < least)) least = quota;
    const size_t slash = path.rfind('/');
    if (slash == std::string::npos) return least;
    path.resize(slash);
  }
}

}  // namespace

double cpu_quota(const std::string& root) {
  double least = 0;
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // hierarchy:controllers:path
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string path = line.substr(second + 1), mounts = root + "/sys/fs/cgroup";
    bool cpu = controllers.empty();
    std::istringstream names(controllers);
    for (std::string name; std::getline(names, name, ',');) cpu = cpu || name == "cpu";
    if (!cpu) continue;
    const double quota =
        quota_from(controllers.empty() ? mounts : mounts + "/cpu", path, controllers.empty());
    if (quota > 0 && (least == 0 || quota < least)) least = quota;
  }
  return least;
}

int default_num_threads() {
  if (const char* value = std::getenv("VOXKERN_NUM_THREADS"); value && *value) {
    char* end;
    const long n = std::strtol(value, &end, 10);
    check(*end == 0 && n >= 1 && n <= kMaxThreads, "VOXKERN_NUM_THREADS=", value,
          ": expected 1 to ", kMaxThreads);
    return static_cast<int>(n);
  }
  // May list a number per nesting level. It is not our variable, so no value is an error.
  if (const char* value = std::getenv("OMP_NUM_THREADS"))
    if (const int n = std::atoi(value); n > 0) return n < kMaxThreads ? n : kMaxThreads;
  int n = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) n = CPU_COUNT(&set);
  const double quota = cpu_quota("");
  if (quota > 0 && std::lround(quota) < n) n = static_cast<int>(std::lround(quota));
#endif
  return n < 1 ? 1 : n < kMaxThreads ? n : kMaxThreads;
}

bool pinning() {
  const char* const value = std::getenv("VOXKERN_PIN");
  const std::string wanted = value ? value : "";
  check(wanted.empty() || wanted == "0" || wanted == "1", "VOXKERN_PIN=", wanted,
        ": expected 0 or 1");
  return wanted == "1";
}

void pin_thread([[maybe_unused]] int rank) {
#if defined(__linux__)
  cpu_set_t allowed, one;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  CPU_ZERO(&one);
  int nth = rank % CPU_COUNT(&allowed);
  for (int cpu = 0; nth >= 0; ++cpu)
    if (CPU_ISSET(cpu, &allowed) && nth-- == 0) CPU_SET(cpu, &one);
  sched_setaffinity(0, sizeof one, &one);
#endif
}

}  // namespace voxkern

STABLE_TORCH_LIBRARY_IMPL(voxkern, CompositeExplicitAutograd, m) {
  m.impl("cpu_quota", TORCH_BOX(&voxkern::cpu_quota));
}
