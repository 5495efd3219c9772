// Preparing and running a plan: see plan.h.
#include "plan.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace fastcnn::cpu {
namespace {

// Of the next phase's constants: half of an L2 where they come from memory, a beginning where all constants stay in a
// last-level cache, from which kernels fetch the rest in time.
constexpr int64_t kAheadBytes = 512 << 10, kAheadBytesInCache = 16 << 10, kCacheBytes = 16 << 20;

// Where all values of an operand lie within the first `used` of every `bytes` bytes, counted from its first value:
// channels of pixels that lie in a wider tensor. Else zeros.
struct Ring {
  int64_t bytes = 0, used = 0;
};

Ring ring_of(const Operand& o) {
  int64_t width = 1, ring = 0;  // of what is adjacent; the smallest other stride
  for (size_t i = 0; i < o.shape.size(); ++i) {
    if (o.shape[i] == 1) continue;
    if (o.strides[i] == 1 && width == 1) {
      width = o.shape[i];
    } else if (ring == 0 || o.strides[i] < ring) {
      ring = o.strides[i];
      if (ring == 0) return {};
    }
  }
  if (width > ring) return {};
  for (size_t i = 0; i < o.shape.size(); ++i) {
    if (o.shape[i] > 1 && o.strides[i] != 1 && o.strides[i] % ring != 0) return {};
  }
  const int64_t item = size_in_bytes(o.dtype);
  return {ring * item, width * item};
}

// Whether two operands may share memory. Different channels of one buffer do not.
bool may_overlap(const Operand& a, const Operand& b) {
  if (a.region != b.region || a.shape.empty() || b.shape.empty()) return false;
  const auto end = [](const Operand& o) {
    int64_t last = 0;
    for (size_t i = 0; i < o.shape.size(); ++i) last += (o.shape[i] - 1) * o.strides[i];
    return o.offset + (last + 1) * size_in_bytes(o.dtype);
  };
  if (end(a) <= b.offset || end(b) <= a.offset) return false;
  const Ring ring = ring_of(a), other = ring_of(b);
  if (ring.bytes == 0 || ring.bytes != other.bytes) return true;
  const int64_t distance = ((b.offset - a.offset) % ring.bytes + ring.bytes) % ring.bytes;
  return distance < ring.used || distance + other.used > ring.bytes;
}

int64_t tasks_of(const Work& work) {
  return work.threads > 1 ? work.tasks : std::min<int64_t>(work.tasks, 1);
}

// Task `task` of a work, or all of them where it is not worth several threads.
void run_task(const Work& work, int64_t task, void* scratch) {
  if (work.threads > 1) {
    work.run(task, scratch);
  } else {
    for (int64_t i = 0; i < work.tasks; ++i) work.run(i, scratch);
  }
}

}  // namespace

Plan::Plan(int64_t arena_bytes, void* constants, int64_t constant_bytes, const std::vector<int64_t>& input_bytes,
           const std::vector<int64_t>& output_bytes)
    : arena_(static_cast<char*>(allocate_aligned(arena_bytes)), std::free),
      bases_(2 + input_bytes.size() + output_bytes.size(), nullptr),
      sizes_{arena_bytes, constant_bytes},
      inputs_(input_bytes.size()) {
  fill_arena(0);  // every page is met here, not in the first run
  bases_[0] = arena_.get();
  bases_[1] = static_cast<char*>(constants);
  sizes_.insert(sizes_.end(), input_bytes.begin(), input_bytes.end());
  sizes_.insert(sizes_.end(), output_bytes.begin(), output_bytes.end());
}

void Plan::check(const Operand& operand, const char* name) const {
  const auto fail = [&](const char* what) { throw std::invalid_argument(std::string(name) + " " + what); };
  if (operand.region < 0 || static_cast<size_t>(operand.region) >= sizes_.size()) fail("must lie in a known region");
  if (operand.shape.size() != operand.strides.size()) fail("must have as many strides as sizes");
  // Sizes are first held to a bound that keeps the products below within 64 bits.
  constexpr int64_t limit = int64_t{1} << 40;
  const int64_t item = size_in_bytes(operand.dtype);
  if (operand.offset < 0 || operand.offset > limit || operand.offset % item != 0) fail("must have an aligned offset");
  int64_t last = 0, count = 1;
  for (size_t i = 0; i < operand.shape.size(); ++i) {
    const int64_t size = operand.shape[i], stride = operand.strides[i];
    if (size < 1 || size > limit || stride < 0 || stride > limit) fail("must have positive sizes and strides");
    if (stride > 0 && size - 1 > (limit - last) / stride) fail("must fit into its region");
    last += (size - 1) * stride;
    if (size > limit / count) fail("must have at most 2^40 values");
    count *= size;
  }
  const int64_t bytes = sizes_[static_cast<size_t>(operand.region)];
  if (operand.offset + (last + 1) * item > bytes) fail("must fit into its region");
}

void Plan::add(const std::vector<Operand>& operands, Prepare prepare) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<size_t> external;
  for (const Operand& operand : operands) {
    if (operand.region >= 2) external.push_back(static_cast<size_t>(operand.region));
  }
  steps_.push_back({std::move(prepare), operands, external, {}, {}, {}});
  threads_ = 0;
}

void Plan::set_lanes(int64_t lanes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto count = static_cast<int64_t>(steps_.size());
  if (lanes < 1 || count % lanes != 0) throw std::invalid_argument("lanes must divide the number of steps");
  const int64_t length = count / lanes;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < count; ++j) {
      if (i / length == j / length) continue;
      for (const Operand& operand : steps_[static_cast<size_t>(j)].operands) {
        if (may_overlap(steps_[static_cast<size_t>(i)].operands.front(), operand)) {
          throw std::invalid_argument("lanes must not touch what another one writes");
        }
      }
    }
  }
  lanes_ = lanes;
  threads_ = 0;
}

void Plan::fill_arena(int value) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::memset(arena_.get(), value, static_cast<size_t>(sizes_[0]));
}

void Plan::prepare(int threads, bool moved) {
  if (threads == threads_ && !moved) return;
  const bool all = threads != threads_;
  threads_ = 0;                               // an exception leaves the plan unprepared
  const int each = lanes_ > 1 ? 1 : threads;  // for each step
  for (Step& step : steps_) {
    if (all) {
      step.works = step.prepare(bases_, each);
      step.at.clear();
      for (const size_t region : step.external) step.at.push_back(bases_[region]);
      step.elsewhere.clear();
    } else {
      move(step, each);
    }
  }
  if (all) {
    phases_.clear();
    scratch_bytes_ = 0;
    team_ = 1;
    lanes_ > 1 ? make_lanes(threads) : make_phases(threads);
    barrier_.reserve(team_);
  }
  threads_ = threads;
}

void Plan::make_phases(int threads) {
  std::vector<const Step*> group;
  for (const Step& step : steps_) {
    if (!may_join(group, step)) {
      append(group, threads);
      group.clear();
    }
    group.push_back(&step);
  }
  append(group, threads);
  counter_count_ = 0;
  for (Phase& phase : phases_) {
    phase.first_counter = counter_count_;
    phase.drawn = !phase.serial && std::any_of(phase.works.begin(), phase.works.end(),
                                               [&](const Work* work) { return tasks_of(*work) > team_; });
    if (phase.drawn) counter_count_ += phase.works.size() * team_;
  }
  counters_.reset(new Counter[counter_count_]);
  int64_t constant_bytes = 0;
  for (const Phase& phase : phases_) {
    for (const Work* work : phase.works) constant_bytes += work->constant_bytes;
  }
  for (size_t i = 0; i + 1 < phases_.size(); ++i) {
    int64_t room = constant_bytes <= kCacheBytes ? kAheadBytesInCache : kAheadBytes;
    for (const Work* work : phases_[i + 1].works) {
      const int64_t bytes = std::min(room, work->constant_bytes);
      if (bytes > 0) phases_[i].ahead.push_back({static_cast<const char*>(work->constants), bytes});
      room -= bytes;
    }
  }
}

void Plan::make_lanes(int threads) {
  int64_t scratch_bytes = 0;
  for (const Step& step : steps_) {
    for (const Work& work : step.works) scratch_bytes = std::max(scratch_bytes, work.scratch_bytes);
  }
  lane_work_ = {lanes_, threads, scratch_bytes, [this](int64_t lane, void* scratch) { run_lane(lane, scratch); }};
  scratch_bytes_ = scratch_bytes;
  team_ = static_cast<int>(std::min<int64_t>(lanes_, threads));
  Phase phase;
  phase.works = {&lane_work_};
  phase.tasks = lanes_;
  phase.serial = threads == 1;
  phase.drawn = !phase.serial && lanes_ > team_;
  phases_ = {phase};
  counter_count_ = phase.drawn ? team_ : 0;
  counters_.reset(new Counter[counter_count_]);
}

void Plan::run_lane(int64_t lane, void* scratch) const {
  const size_t length = steps_.size() / static_cast<size_t>(lanes_);
  for (size_t i = 0; i < length; ++i) {
    for (const Work& work : steps_[static_cast<size_t>(lane) * length + i].works) {
      for (int64_t task = 0; task < work.tasks; ++task) work.run(task, scratch);
    }
  }
}

// The same works at other addresses: phases_ keeps its pointers to them.
void Plan::move(Step& step, int threads) {
  constexpr size_t kMostPlaces = 4;
  const auto here = [&](const std::vector<char*>& at) {
    for (size_t i = 0; i < at.size(); ++i) {
      if (at[i] != bases_[step.external[i]]) return false;
    }
    return true;
  };
  if (here(step.at)) return;
  auto known =
      std::find_if(step.elsewhere.begin(), step.elsewhere.end(), [&](const auto& place) { return here(place.first); });
  if (known == step.elsewhere.end()) {
    std::vector<char*> at;
    for (const size_t region : step.external) at.push_back(bases_[region]);
    Works works = step.prepare(bases_, threads);
    if (step.elsewhere.size() == kMostPlaces) step.elsewhere.erase(step.elsewhere.begin());
    step.elsewhere.emplace_back(std::move(at), std::move(works));
    known = step.elsewhere.end() - 1;
  }
  std::swap_ranges(step.works.begin(), step.works.end(), known->second.begin());
  step.at.swap(known->first);
  std::rotate(known, known + 1, step.elsewhere.end());  // the last one left stays longest
}

// Whether a step neither writes what a group touches nor touches what it writes.
bool Plan::may_join(const std::vector<const Step*>& group, const Step& step) const {
  for (const Step* other : group) {
    if (other->works.size() != 1 || step.works.size() != 1) return false;
    for (const Operand& operand : other->operands) {
      if (may_overlap(step.operands.front(), operand)) return false;
    }
    for (const Operand& operand : step.operands) {
      if (may_overlap(other->operands.front(), operand)) return false;
    }
  }
  return true;
}

// Phases for steps that may run side by side, or for the works of one step.
void Plan::append(const std::vector<const Step*>& group, int threads) {
  Phase phase = {};
  const auto close = [&] {
    if (phase.works.empty()) return;
    phase.serial = std::none_of(phase.works.begin(), phase.works.end(),
                                [](const Work* work) { return work->threads > 1 && work->tasks > 1; });
    if (!phase.serial) team_ = std::max<int>(team_, static_cast<int>(std::min<int64_t>(phase.tasks, threads)));
    if (phase.serial && !phases_.empty() && phases_.back().serial) {
      phases_.back().works.insert(phases_.back().works.end(), phase.works.begin(), phase.works.end());
    } else {
      phases_.push_back(phase);
    }
    phase = {};
  };
  for (const Step* step : group) {
    for (const Work& work : step->works) {
      if (step->works.size() > 1) close();
      phase.works.push_back(&work);
      phase.tasks += tasks_of(work);
      scratch_bytes_ = std::max(scratch_bytes_, work.scratch_bytes);
    }
  }
  close();
}

// A task's share of what the next phase reads first, on its way into L2.
void Plan::fetch_ahead(const Phase& phase, int64_t task) const {
  for (const auto& [begin, bytes] : phase.ahead) {
    const int64_t end = bytes * (task + 1) / phase.tasks;
    for (int64_t at = bytes * task / phase.tasks; at < end; at += 64) __builtin_prefetch(begin + at, 0, 2);
  }
}

// The tasks of a phase with no more tasks than threads: no counter has to go from core to core. Works with fewer begin
// with a thread after the other.
void Plan::take_tasks(const Phase& phase, int me, int team, void* scratch) const {
  int64_t first = 0;  // of the work's tasks among the phase's
  for (const Work* work : phase.works) {
    const int64_t tasks = tasks_of(*work);
    for (int64_t part = me; part < team_; part += team) {
      const int64_t run = tasks < team_ ? (part + first) % team_ : part;
      for (int64_t task = tasks * run / team_; task < tasks * (run + 1) / team_; ++task) {
        fetch_ahead(phase, first + task);
        run_task(*work, task, scratch);
      }
    }
    first += tasks;
  }
}

// The tasks of a phase that fall to this thread. Each work's tasks are cut into as many runs as there are threads; a
// thread does its own run of every work, then helps with the others'. So it mostly meets the same part of the picture
// in every layer, in its own cache.
void Plan::draw_tasks(const Phase& phase, int me, void* scratch) {
  for (int64_t distance = 0; distance < team_; ++distance) {
    const int64_t run = (me + distance) % team_;
    int64_t first = 0;  // of the work's tasks among the phase's
    for (size_t at = 0; at < phase.works.size(); ++at) {
      const int64_t tasks = tasks_of(*phase.works[at]);
      const int64_t begin = tasks * run / team_, end = tasks * (run + 1) / team_;
      std::atomic<int64_t>& next = counters_[phase.first_counter + at * team_ + run].next;
      for (int64_t task; (task = begin + next.fetch_add(1, std::memory_order_relaxed)) < end;) {
        fetch_ahead(phase, first + task);
        run_task(*phase.works[at], task, scratch);
      }
      first += tasks;
    }
  }
}

void Plan::execute(Stamps* stamps) {
  // All are the first thread's: of its own serial works, and behind a phase's barrier.
  const auto stamp = [stamps](size_t entry) {
    if (stamps != nullptr) (*stamps)[entry + 1] = std::chrono::steady_clock::now();
  };
  if (stamps != nullptr) (*stamps)[0] = std::chrono::steady_clock::now();
  if (team_ == 1) {
    void* scratch = scratch_bytes_ > 0 ? thread_scratch(scratch_bytes_) : nullptr;
    if (scratch_bytes_ > 0 && scratch == nullptr) throw std::bad_alloc();
    size_t entry = 0;
    for (const Phase& phase : phases_) {
      for (const Work* work : phase.works) {
        for (int64_t task = 0; task < work->tasks; ++task) work->run(task, scratch);
        stamp(entry);
        entry += phase.serial;
      }
      entry += !phase.serial;
    }
    return;
  }
  for (size_t i = 0; i < counter_count_; ++i) counters_[i].next.store(0, std::memory_order_relaxed);
  std::atomic<bool> out_of_memory{false};
  int came = 1;
#pragma omp parallel num_threads(team_)
  {
#ifdef _OPENMP
    const int team = omp_get_num_threads();  // the runtime may give fewer than were asked for
    const int me = omp_get_thread_num();
#else
    const int team = 1, me = 0;
#endif
    if (team != last_team_) {  // nobody writes last_team_ within the region
#pragma omp single
      barrier_.restart();
    }
    if (me == 0) came = team;
    void* scratch = scratch_bytes_ > 0 ? thread_scratch(scratch_bytes_) : nullptr;
    // A thread without memory does nothing but meet the others.
    const bool works = scratch_bytes_ == 0 || scratch != nullptr;
    if (!works) out_of_memory = true;
    size_t entry = 0;
    for (size_t i = 0; i < phases_.size(); ++i) {
      const Phase& phase = phases_[i];
      if (phase.serial) {
        if (me == 0) {
          for (size_t at = 0; at < phase.works.size(); ++at) {
            const Work& work = *phase.works[at];
            for (int64_t task = 0; works && task < work.tasks; ++task) work.run(task, scratch);
            stamp(entry + at);
          }
        }
      } else if (works) {
        phase.drawn ? draw_tasks(phase, me, scratch) : take_tasks(phase, me, team, scratch);
      }
      if (i + 1 < phases_.size() || stamps != nullptr) barrier_.wait(me, team);  // the region's end is one, too
      entry += phase.entries();
      if (!phase.serial && me == 0) stamp(entry - 1);
    }
  }
  last_team_ = came;
  if (out_of_memory) throw std::bad_alloc();
}

void Plan::place_and_prepare(Addresses inputs, Addresses outputs, int threads) {
  bool moved = false;
  const auto place = [&](size_t region, void* data) {
    moved = moved || bases_[region] != data;
    bases_[region] = static_cast<char*>(data);
  };
  for (size_t i = 0; i < input_count(); ++i) place(2 + i, inputs[i]);
  for (size_t i = 0; i < output_count(); ++i) place(2 + inputs_ + i, outputs[i]);
  prepare(threads, moved);
}

std::vector<Plan::Timed> Plan::profile_lanes() {
  void* scratch = scratch_bytes_ > 0 ? thread_scratch(scratch_bytes_) : nullptr;
  if (scratch_bytes_ > 0 && scratch == nullptr) throw std::bad_alloc();
  const size_t length = steps_.size() / static_cast<size_t>(lanes_);
  std::vector<Timed> timed(length);
  for (size_t i = 0; i < steps_.size(); ++i) {
    const auto start = std::chrono::steady_clock::now();
    for (const Work& work : steps_[i].works) {
      for (int64_t task = 0; task < work.tasks; ++task) work.run(task, scratch);
    }
    Timed& entry = timed[i % length];
    entry.steps.push_back(static_cast<int64_t>(i));
    entry.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / team_;
  }
  return timed;
}

void Plan::run(Addresses inputs, Addresses outputs, int threads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  place_and_prepare(inputs, outputs, threads);
  execute();
}

std::vector<Plan::Timed> Plan::profile(Addresses inputs, Addresses outputs, int threads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  place_and_prepare(inputs, outputs, threads);
  if (lanes_ > 1) return profile_lanes();
  std::vector<Timed> timed;
  const auto step_of = [&](const Work* work) {
    const auto owner = std::find_if(steps_.begin(), steps_.end(), [&](const Step& step) {
      return std::any_of(step.works.begin(), step.works.end(), [&](const Work& own) { return &own == work; });
    });
    return static_cast<int64_t>(owner - steps_.begin());
  };
  for (const Phase& phase : phases_) {
    for (size_t at = 0; at < phase.works.size(); ++at) {
      if (at == 0 || phase.serial) timed.push_back({{}, 0});
      timed.back().steps.push_back(step_of(phase.works[at]));
    }
  }
  Stamps stamps(timed.size() + 1);
  execute(&stamps);
  for (size_t i = 0; i < timed.size(); ++i) {
    timed[i].seconds = std::chrono::duration<double>(stamps[i + 1] - stamps[i]).count();
  }
  return timed;
}

}  // namespace fastcnn::cpu
