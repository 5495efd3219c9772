#include "emulator.h"

#include <ucontext.h>

#include <memory>

namespace emulator {

Thread* current = nullptr;
dim3 block_size, grid_size;
bool eager = false;

namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr uint32_t kSharedStart = 128;       // not a multiple of 1024: kernels that need more alignment must see to it
constexpr uint32_t kClusterStep = 1u << 24;  // between the addresses of a cluster's blocks, the first one's included

struct Fiber {
  Thread thread;
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
};

std::vector<std::unique_ptr<Fiber>> fibers;  // of the running cluster, block by block
std::vector<std::unique_ptr<Block>> blocks;
Meeting cluster_meeting;
ucontext_t scheduler;
const std::function<void()>* body = nullptr;
unsigned long progress = 0;
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
  if (fiber->thread.arrived_at_cluster) fail("a thread ended between arriving at a cluster barrier and waiting there");
  fiber->thread.done = true;
  ++progress;
  swapcontext(&fiber->context, &scheduler);
}

Fiber& fiber_of(const Thread& thread) {
  return *fibers[thread.block->rank * block_size.x + thread.linear];
}

unsigned alive(const std::vector<Thread*>& threads, unsigned first, unsigned count) {
  unsigned n = 0;
  for (unsigned i = first; i < first + count && i < threads.size(); ++i) n += !threads[i]->done;
  return n;
}

void begin_block(Block& block, dim3 index, unsigned rank) {
  const size_t count = block_size.x;
  block.index = index;
  block.rank = rank;
  block.threads.clear();
  for (size_t i = 0; i < count; ++i) {
    Fiber& fiber = *fibers[rank * count + i];
    fiber.thread = Thread();
    fiber.thread.block = &block;
    fiber.thread.linear = static_cast<unsigned>(i);
    fiber.thread.index = dim3(static_cast<unsigned>(i), 0, 0);
    block.threads.push_back(&fiber.thread);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    const auto address = reinterpret_cast<uintptr_t>(&fiber);
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(enter), 2, static_cast<unsigned>(address >> 32),
                static_cast<unsigned>(address));
  }
  block.warp_meetings.assign((count + 31) / 32, Meeting());
  block.warpgroup_meetings.assign((count + 127) / 128, Meeting());
  block.meeting = block.multipliers = Meeting();
  block.fenced_at_barrier = true;
  std::memset(block.shared, 0xFF, shared_size);  // NaN in fp32, bf16 and fp16
  std::memset(block.shared + shared_size, kCanary, kCanaryBytes);
}

void run_cluster(unsigned cluster) {
  cluster_meeting = Meeting();
  for (;;) {
    const unsigned long before = progress;
    bool all_done = true;
    for (unsigned turn = 0; turn < cluster; ++turn) {
      for (Thread* thread : blocks[eager ? turn : cluster - 1 - turn]->threads) {
        if (thread->done) continue;
        all_done = false;
        current = thread;
        swapcontext(&scheduler, &fiber_of(*thread).context);
      }
    }
    if (all_done) return;
    if (progress == before) fail("deadlock: every thread waits at a collective that others never reach");
  }
}

// Whether all live threads of the cluster have arrived; the first to see it opens the barrier.
bool cluster_open(unsigned long generation) {
  if (cluster_meeting.generation != generation) return true;
  unsigned living = 0;
  for (const auto& member : blocks) living += alive(member->threads, 0, block_size.x);
  if (cluster_meeting.arrived != living) return false;
  cluster_meeting.arrived = 0;
  ++cluster_meeting.generation;
  ++progress;
  return true;
}

}  // namespace

void yield() {
  Thread* self = current;
  swapcontext(&fiber_of(*self).context, &scheduler);
}

void note_progress() {
  ++progress;
}

unsigned char* shared_base() {
  return block().shared;
}
uint32_t shared_base_address() {
  return kSharedStart;
}

unsigned char* shared_pointer(uint32_t address, size_t bytes) {
  if (address % bytes != 0) fail("misaligned access to shared memory");
  if (address < kSharedStart || address + bytes > kSharedStart + shared_size) fail("access outside shared memory");
  return block().shared + (address - kSharedStart);
}

uint32_t cluster_address(uint32_t address, int rank) {
  shared_pointer(address, 1);
  return address + (static_cast<uint32_t>(rank) + 1) * kClusterStep;
}

unsigned char* cluster_pointer(uint32_t address, size_t bytes) {
  const uint32_t rank = address / kClusterStep - 1;
  if (rank >= blocks.size() || blocks[rank]->threads.empty()) fail("no such block in the cluster");
  if (cluster_meeting.generation == 0) fail("another block's shared memory before a barrier showed that it has begun");
  const Block& owner = *blocks[rank];
  if (alive(owner.threads, 0, static_cast<unsigned>(owner.threads.size())) == 0) {
    fail("access to the shared memory of a block that has ended");
  }
  return owner.shared + (shared_pointer(address % kClusterStep, bytes) - block().shared);
}

void cluster_arrive() {
  if (current->arrived_at_cluster) fail("a thread arrived twice at a cluster barrier");
  current->arrived_at_cluster = true;
  current->cluster_generation = cluster_meeting.generation;
  ++cluster_meeting.arrived;
  ++progress;
}

void cluster_wait() {
  if (!current->arrived_at_cluster) fail("a thread waits at a cluster barrier that it did not arrive at");
  while (!cluster_open(current->cluster_generation)) yield();
  current->arrived_at_cluster = false;
}

void collective(Scope scope, void* argument, Act act) {
  Block& here = block();
  const unsigned size = scope == Scope::warp        ? 32
                        : scope == Scope::warpgroup ? 128
                                                    : static_cast<unsigned>(here.threads.size());
  const unsigned first = current->linear / size * size;
  Meeting& meeting = scope == Scope::warp        ? here.warp_meetings[first / 32]
                     : scope == Scope::warpgroup ? here.warpgroup_meetings[first / 128]
                                                 : here.meeting;
  if (meeting.arguments.size() != size) meeting.arguments.assign(size, nullptr);
  meeting.arguments[current->linear - first] = argument;
  ++meeting.arrived;
  const unsigned long generation = meeting.generation;
  while (meeting.generation == generation) {
    if (meeting.arrived == alive(here.threads, first, size)) {
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

void run_grid(dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes, const std::function<void()>& kernel) {
  if (block.y != 1 || block.z != 1) fail("blocks are one-dimensional here");
  if (cluster == 0 || grid.x % cluster != 0) fail("the grid is no multiple of the cluster");
  while (fibers.size() < cluster * block.x) fibers.push_back(std::make_unique<Fiber>());
  while (blocks.size() < cluster) blocks.push_back(std::make_unique<Block>());
  for (const auto& idle : blocks) idle->threads.clear();
  for (unsigned rank = 0; rank < cluster; ++rank) {
    Block& here = *blocks[rank];
    here.storage.assign(shared_bytes + 2048 + kCanaryBytes, 0);
    const auto start = reinterpret_cast<uintptr_t>(here.storage.data());
    here.shared = here.storage.data() + ((1024 - start % 1024) % 1024 + kSharedStart);
  }
  shared_size = shared_bytes;
  body = &kernel;
  grid_size = grid;
  block_size = block;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; x += cluster) {
        for (unsigned rank = 0; rank < cluster; ++rank) begin_block(*blocks[rank], dim3(x + rank, y, z), rank);
        run_cluster(cluster);
        for (unsigned rank = 0; rank < cluster; ++rank) {
          for (size_t i = 0; i < kCanaryBytes; ++i) {
            if (blocks[rank]->shared[shared_bytes + i] != kCanary) fail("a kernel wrote past its shared memory");
          }
        }
      }
    }
  }
}

}  // namespace emulator
