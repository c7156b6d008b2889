#include "machine.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <set>

namespace dfssm::native {
namespace {

// CPUs of the quota of the group that is mounted, which in a container is its own; `most` where there is none.
double quota(double most) {
  double limit = 0, period = 0;
  if (std::ifstream file("/sys/fs/cgroup/cpu.max"); file >> limit >> period && period > 0)
    return limit / period;
  std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") >> limit;
  std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_period_us") >> period;
  return limit > 0 && period > 0 ? limit / period : most;
}

}  // namespace

int default_threads() {
  cpu_set_t usable;
  CPU_ZERO(&usable);
  if (sched_getaffinity(0, sizeof usable, &usable) != 0) return 1;
  std::set<std::string> cores;  // each by the list of its hyperthreads; without topology a CPU is a core
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &usable)) continue;
    std::string siblings = std::to_string(cpu);
    std::ifstream("/sys/devices/system/cpu/cpu" + siblings + "/topology/thread_siblings_list") >> siblings;
    cores.insert(siblings);
  }
  const double count = static_cast<double>(cores.size());
  return std::max(1, static_cast<int>(std::min(count, std::ceil(quota(count)))));
}

int64_t physical_memory() { return int64_t{sysconf(_SC_PAGE_SIZE)} * sysconf(_SC_PHYS_PAGES); }

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

}  // namespace dfssm::native
