// sanitize_planted NAME: runs one small job on the thread team. "sound" has no bug; each of the
// others has one, which a sanitizer must report: "race" and "missing barrier" the thread sanitizer,
// "overrun" the address sanitizer, "overflow" the undefined-behaviour sanitizer. Built with these
// sanitizers only (see `make tsan` and `make sanitize`).
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "cpu/runtime/team.h"

namespace voxkern {
namespace {

constexpr int kThreads = 3;

// The sum of the ranks: each thread writes its own part, or in a race all write one sum.
int sum_of_ranks(bool racy) {
  int64_t sum = 0;
  std::vector<int64_t> parts(kThreads);
  auto job = [&](int rank, int) {
    if (racy)
      sum += rank + 1;
    else
      parts[rank] = rank + 1;
  };
  run_team(job);
  for (const int64_t part : parts) sum += part;
  return static_cast<int>(sum);
}

// Each thread writes a value, then reads its neighbour's.
int neighbours(bool with_barrier) {
  std::vector<int> written(kThreads), read(kThreads);
  auto job = [&](int rank, int size) {
    written[rank] = rank + 1;
    if (with_barrier) Team::barrier();
    read[rank] = written[(rank + 1) % size];
  };
  run_team(job);
  return read[0] + read[1] + read[2];
}

int overrun() {
  std::vector<int> values(kThreads);
  int* const data = values.data();
  auto job = [&](int rank, int) { data[rank + 1] = rank; };
  run_team(job);
  return values[0];
}

int overflow() {
  int value = std::numeric_limits<int>::max();
  auto job = [&](int rank, int) { value += rank == 0 ? kThreads : 0; };
  run_team(job);
  return value;
}

int run(const std::string& name) {
  Team::resize(kThreads);
  if (name == "sound") return sum_of_ranks(false) + neighbours(true);
  if (name == "race") return sum_of_ranks(true);
  if (name == "missing barrier") return neighbours(false);
  if (name == "overrun") return overrun();
  if (name == "overflow") return overflow();
  return -1;
}

}  // namespace
}  // namespace voxkern

int main(int, char** arguments) { std::printf("%d\n", voxkern::run(arguments[1])); }
