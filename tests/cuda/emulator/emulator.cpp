#include "emulator.h"

#include <ucontext.h>

#include <memory>

namespace emulator {

Thread* current = nullptr;
std::vector<Thread*> threads;
dim3 block_index, block_size, grid_size;
bool eager = false;
bool fenced_at_barrier = true;

namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr uint32_t kSharedStart = 128;  // not a multiple of 1024: kernels that need more alignment must see to it

struct Fiber {
  Thread thread;
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
};

struct Meeting {
  unsigned arrived = 0;
  unsigned long generation = 0;
  std::vector<void*> arguments;
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Meeting> warp_meetings, warpgroup_meetings;
Meeting block_meeting;
ucontext_t scheduler;
const std::function<void()>* body = nullptr;
unsigned long progress = 0;

std::vector<unsigned char> shared_storage;
unsigned char* shared = nullptr;
size_t shared_size = 0;
constexpr unsigned char kCanary = 0xA5;
constexpr size_t kCanaryBytes = 256;

void enter(unsigned high, unsigned low) {
  auto* fiber = reinterpret_cast<Fiber*>((static_cast<uintptr_t>(high) << 32) | low);
  (*body)();
  if (!fiber->thread.copies.open.empty()) fail("a thread ended with asynchronous copies never committed");
  for (const auto& group : fiber->thread.copies.groups) {
    if (!group.empty()) fail("a thread ended with asynchronous copies in flight");
  }
  fiber->thread.done = true;
  ++progress;
  swapcontext(&fiber->context, &scheduler);
}

unsigned alive(unsigned first, unsigned count) {
  unsigned n = 0;
  for (unsigned i = first; i < first + count && i < threads.size(); ++i) n += !threads[i]->done;
  return n;
}

void run_block(size_t count) {
  for (size_t i = 0; i < count; ++i) {
    Fiber& fiber = *fibers[i];
    fiber.thread = Thread();
    fiber.thread.linear = static_cast<unsigned>(i);
    fiber.thread.index = dim3(static_cast<unsigned>(i), 0, 0);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    const auto address = reinterpret_cast<uintptr_t>(&fiber);
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(enter), 2, static_cast<unsigned>(address >> 32),
                static_cast<unsigned>(address));
  }
  warp_meetings.assign((count + 31) / 32, Meeting());
  warpgroup_meetings.assign((count + 127) / 128, Meeting());
  block_meeting = Meeting();
  for (;;) {
    const unsigned long before = progress;
    bool all_done = true;
    for (size_t i = 0; i < count; ++i) {
      if (fibers[i]->thread.done) continue;
      all_done = false;
      current = &fibers[i]->thread;
      swapcontext(&scheduler, &fibers[i]->context);
    }
    if (all_done) return;
    if (progress == before) fail("deadlock: every thread waits at a collective that others never reach");
  }
}

}  // namespace

void yield() {
  Fiber* fiber = fibers[current->linear].get();
  swapcontext(&fiber->context, &scheduler);
  current = &fiber->thread;
}

void note_progress() {
  ++progress;
}

unsigned char* shared_base() {
  return shared;
}
uint32_t shared_base_address() {
  return kSharedStart;
}

unsigned char* shared_pointer(uint32_t address, size_t bytes) {
  if (address % bytes != 0) fail("misaligned access to shared memory");
  if (address < kSharedStart || address + bytes > kSharedStart + shared_size) fail("access outside shared memory");
  return shared + (address - kSharedStart);
}

void collective(Scope scope, void* argument, Act act) {
  const unsigned size = scope == Scope::warp        ? 32
                        : scope == Scope::warpgroup ? 128
                                                    : static_cast<unsigned>(threads.size());
  const unsigned first = current->linear / size * size;
  Meeting& meeting = scope == Scope::warp        ? warp_meetings[first / 32]
                     : scope == Scope::warpgroup ? warpgroup_meetings[first / 128]
                                                 : block_meeting;
  if (meeting.arguments.size() != size) meeting.arguments.assign(size, nullptr);
  meeting.arguments[current->linear - first] = argument;
  ++meeting.arrived;
  const unsigned long generation = meeting.generation;
  while (meeting.generation == generation) {
    if (meeting.arrived == alive(first, size)) {
      if (act != nullptr) act(first, meeting.arguments);
      meeting.arguments.assign(size, nullptr);
      meeting.arrived = 0;
      ++meeting.generation;
      ++progress;
      return;
    }
    yield();
  }
}

void land(const Copy& copy) {
  unsigned char* to = shared_pointer(copy.destination, 16);
  if (copy.valid) {
    if (reinterpret_cast<uintptr_t>(copy.source) % 16 != 0) fail("misaligned source of an asynchronous copy");
    std::memcpy(to, copy.source, 16);
  } else {
    std::memset(to, 0, 16);
  }
}

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  const size_t count = block.x;
  if (block.y != 1 || block.z != 1) fail("blocks are one-dimensional here");
  while (fibers.size() < count) fibers.push_back(std::make_unique<Fiber>());
  threads.clear();
  for (size_t i = 0; i < count; ++i) threads.push_back(&fibers[i]->thread);
  shared_storage.assign(shared_bytes + 2048 + kCanaryBytes, 0);
  const auto start = reinterpret_cast<uintptr_t>(shared_storage.data());
  shared = shared_storage.data() + ((1024 - start % 1024) % 1024 + kSharedStart);
  shared_size = shared_bytes;
  body = &kernel;
  grid_size = grid;
  block_size = block;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index = dim3(x, y, z);
        std::memset(shared, 0xFF, shared_bytes);  // NaN in fp32, bf16 and fp16
        std::memset(shared + shared_bytes, kCanary, kCanaryBytes);
        run_block(count);
        for (size_t i = 0; i < kCanaryBytes; ++i) {
          if (shared[shared_bytes + i] != kCanary) fail("a kernel wrote past its shared memory");
        }
      }
    }
  }
}

}  // namespace emulator
