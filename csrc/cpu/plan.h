// A network as a fixed list of steps over planned memory, run without Python.
//
// Memory is a set of regions: 0 the arena (activations; their places were planned, fastcnn/graph/freezing/memory.py),
// 1 constants, then the caller's inputs and outputs. Steps name tensors by region and offset. Preparing a step (padded
// epilogue vectors, the cut into tasks, addresses) happens once for a number of threads; only steps that touch inputs
// or outputs are prepared again, when those lie where they did not lie in one of the last runs.
//
// A run opens one parallel region. Works follow each other in phases with a barrier between them; threads draw a
// phase's tasks from counters, each from its own part first, or, where there are no more tasks than threads, take
// their own. Neighbouring steps that share no memory make one phase (the branches of an inception module), and works
// too small for a second thread are joined and run by the first thread without barriers.
//
// The steps of a small network's batch may be in lanes, equal parts of the steps that share no memory. Then a lane is a
// task, all of it run by one thread, and there is one phase.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../common/types.h"
#include "team_barrier.h"
#include "work.h"

namespace fastcnn::cpu {

// A tensor of a plan: strides in elements, the offset in bytes from its region's start.
struct Operand {
  int region = 0;
  int64_t offset = 0;
  DType dtype = DType::f32;
  std::vector<int64_t> shape, strides;
};

class Plan {
 public:
  using Bases = std::vector<char*>;  // where each region lies
  using Prepare = std::function<Works(const Bases& bases, int threads)>;

  // `constants` must outlive the plan.
  Plan(int64_t arena_bytes, void* constants, int64_t constant_bytes, const std::vector<int64_t>& input_bytes,
       const std::vector<int64_t>& output_bytes);

  // Throws std::invalid_argument where the operand reaches beyond its region.
  void check(const Operand& operand, const char* name) const;
  void add(const std::vector<Operand>& operands, Prepare prepare);
  // After all steps were added: each equal part of them is a lane. Throws std::invalid_argument where lanes have not
  // equally many steps, or one touches what another writes.
  void set_lanes(int64_t lanes);

  // inputs and outputs: as many addresses, of memory as long, as were announced. One run at a time: others wait.
  using Addresses = void* const*;
  void run(Addresses inputs, Addresses outputs, int threads);
  // run() with a watch: what each phase took. Works that one thread ran in a row have an entry each. Lanes are run one
  // after the other by one thread; an entry is what the same step of all lanes took, shared out among the threads.
  struct Timed {
    std::vector<int64_t> steps;  // whose works these are; several where steps ran side by side
    double seconds;
  };
  std::vector<Timed> profile(Addresses inputs, Addresses outputs, int threads);
  void fill_arena(int value);

  int64_t arena_bytes() const { return sizes_[0]; }
  int64_t step_count() const { return static_cast<int64_t>(steps_.size()); }
  int64_t phase_count() const { return static_cast<int64_t>(phases_.size()); }  // of the last run
  size_t input_count() const { return inputs_; }
  size_t output_count() const { return sizes_.size() - 2 - inputs_; }
  int64_t region_bytes(size_t region) const { return sizes_[region]; }

 private:
  struct Step {
    Prepare prepare;
    std::vector<Operand> operands;  // the first is written
    std::vector<size_t> external;   // the inputs and outputs among its regions
    Works works;
    std::vector<char*> at;  // where the external regions lie that `works` are for
    // The same for other places: a caller that keeps some results meets few addresses in turn.
    std::vector<std::pair<std::vector<char*>, Works>> elsewhere;
  };
  // Works whose tasks may run side by side; in a serial phase, works that one thread runs in order.
  struct Phase {
    std::vector<const Work*> works;
    int64_t tasks = 0;
    bool serial = false;
    bool drawn = false;                                           // its tasks are drawn from counters
    std::vector<std::pair<const char*, int64_t>> ahead;           // constants of the next phase: where, how many bytes
    size_t first_counter = 0;                                     // one for each work and thread, where tasks are drawn
    size_t entries() const { return serial ? works.size() : 1; }  // of a profile
  };

  struct alignas(64) Counter {  // of tasks that have been drawn; a cache line each
    std::atomic<int64_t> next{0};
  };

  bool may_join(const std::vector<const Step*>& group, const Step& step) const;
  void append(const std::vector<const Step*>& group, int threads);
  void prepare(int threads, bool moved);
  void move(Step& step, int threads);
  void place_and_prepare(Addresses inputs, Addresses outputs, int threads);
  using Stamps = std::vector<std::chrono::steady_clock::time_point>;  // the start, then the end of each entry
  void make_phases(int threads);
  void make_lanes(int threads);
  void run_lane(int64_t lane, void* scratch) const;
  std::vector<Timed> profile_lanes();
  void fetch_ahead(const Phase& phase, int64_t task) const;
  void take_tasks(const Phase& phase, int me, int team, void* scratch) const;
  void draw_tasks(const Phase& phase, int me, void* scratch);
  void execute(Stamps* stamps = nullptr);

  std::mutex mutex_;
  std::unique_ptr<char, void (*)(void*)> arena_;
  Bases bases_;
  std::vector<int64_t> sizes_;
  size_t inputs_;
  std::vector<Step> steps_;
  int threads_ = 0;  // what steps_ are prepared for; 0: not yet
  std::vector<Phase> phases_;
  std::unique_ptr<Counter[]> counters_;
  size_t counter_count_ = 0;
  TeamBarrier barrier_;
  int team_ = 1, last_team_ = 0;
  int64_t lanes_ = 1;
  Work lane_work_;  // a task for each lane
  int64_t scratch_bytes_ = 0;
};

}  // namespace fastcnn::cpu
