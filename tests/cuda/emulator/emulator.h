// Runs CUDA kernels on the CPU, for tests: the kernels' own source, compiled by the host compiler.
//
// A block's threads are fibers on one operating-system thread; they run until a collective (barrier, shuffle, ldmatrix,
// mma.sync, wgmma) and wait there for the others. Blocks run one after another, those of a cluster together: from the
// last to the first where asynchronous work lands late, else from the first. Shared memory starts as NaN.
// Asynchronous copies and products land either as late as the program allows (at the wait that names them) or at once:
// a kernel that is right under both does not read before waiting, nor overwrite what is still to be read.
// What the instructions do is written from the PTX manual, independently of the kernels' index arithmetic.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulator {

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "CUDA emulator: %s\n", message);
  std::abort();
}

struct Copy {
  uint32_t destination;
  const void* source;
  bool valid;
};

struct Product {  // one wgmma of one thread
  float* d;
  int columns;
  uint64_t a, b;
  float (*element)(const void*);
  const uint32_t* registers = nullptr;  // of a, instead of a descriptor
};

template <typename Item>
struct Asynchronous {
  std::vector<Item> open;
  std::deque<std::vector<Item>> groups;
};

struct Block;

struct Thread {
  Block* block = nullptr;
  dim3 index;
  unsigned linear = 0;  // within the block
  bool done = false;
  bool arrived_at_cluster = false;
  unsigned long cluster_generation = 0;  // of the cluster barrier that it arrived at
  Asynchronous<Copy> copies;
  Asynchronous<Product> products;
  int store_groups = 0;   // of bulk stores, committed
  bool unfenced = false;  // copies have landed that the async proxy may not see yet
};

struct Meeting {
  unsigned arrived = 0;
  unsigned long generation = 0;
  std::vector<void*> arguments;
};

struct Block {
  dim3 index;
  unsigned rank = 0;  // within its cluster
  std::vector<Thread*> threads;
  std::vector<Meeting> warp_meetings, warpgroup_meetings;
  Meeting meeting, multipliers;
  bool fenced_at_barrier = true;  // at the last barrier, every thread's landed writes were fenced for the async proxy
  std::vector<unsigned char> storage;
  unsigned char* shared = nullptr;
};

// The running thread, and what it finds around it.
extern Thread* current;
extern dim3 block_size, grid_size;
extern bool eager;

inline Block& block() {
  return *current->block;
}

unsigned char* shared_base();
uint32_t shared_base_address();
// The host pointer behind [address, address + bytes) of shared memory; fails outside it or when misaligned.
unsigned char* shared_pointer(uint32_t address, size_t bytes);

// Clusters. Addresses in the memory of a cluster's block `rank`, as mapa makes them from the thread's own addresses.
uint32_t cluster_address(uint32_t address, int rank);
// The host pointer behind one; fails unless the block is known to have begun, and has not ended.
unsigned char* cluster_pointer(uint32_t address, size_t bytes);
void cluster_arrive();
void cluster_wait();

enum class Scope { warp, warpgroup, block };
// Every live thread of the scope hands in `argument`; the last to arrive runs `act` on the scope's first thread number
// and all arguments, in thread order.
using Act = void (*)(unsigned first_thread, const std::vector<void*>& arguments);
void collective(Scope scope, void* argument, Act act);

// Lets other threads run; a round in which no thread noted progress is a deadlock.
void yield();
void note_progress();

void run_grid(dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes, const std::function<void()>& kernel);

void land(const Copy& copy);

}  // namespace emulator
