// An operator prepared and cut into tasks, apart from running them: an operator called on its own prepares and runs at
// once; a plan (plan.h) prepares once and runs many times.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "parallel.h"

namespace fastcnn::cpu {

// Tasks that may run in any order, on any thread. Owns what it allocated, not the tensors it reads and writes.
struct Work {
  int64_t tasks = 0;
  int threads = 1;  // more do not pay
  int64_t scratch_bytes = 0;
  std::function<void(int64_t task, void* scratch)> run;
  // Constants that the tasks read: a plan brings their beginning into the caches while what comes before runs.
  const void* constants = nullptr;
  int64_t constant_bytes = 0;
};

// One operator: works in order, each to be complete before the next begins.
using Works = std::vector<Work>;

inline void run_now(const Works& works) {
  for (const Work& work : works) {
    parallel_tasks(work.tasks, work.threads, work.scratch_bytes,
                   [&](int64_t task, void* scratch) { work.run(task, scratch); });
  }
}

}  // namespace fastcnn::cpu
