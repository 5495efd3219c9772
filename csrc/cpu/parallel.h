// Threads and scratch memory for the CPU kernels.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fastcnn::cpu {

// Memory aligned to a cache line, freed with std::free. Large blocks ask for huge pages: a network's weights are read
// from one end to the other in every run, past what the processor's table of small pages covers.
inline void* allocate_aligned(int64_t bytes) {
  constexpr int64_t kHugePage = 2 << 20;
  const int64_t alignment = bytes >= kHugePage ? kHugePage : 64;
  const int64_t rounded = (bytes + 63) / 64 * 64 + 64;
  void* memory = std::aligned_alloc(static_cast<size_t>(alignment), static_cast<size_t>(rounded));
  if (memory == nullptr) throw std::bad_alloc();
#ifdef __linux__
  if (alignment == kHugePage) madvise(memory, static_cast<size_t>(bytes / kHugePage * kHugePage), MADV_HUGEPAGE);
#endif
  return memory;
}

// The threads that OpenMP would use.
inline int default_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// This thread's scratch buffer, at least `bytes` long; it grows and is kept until the thread ends. Returns null when
// memory runs out (an exception may not leave an OpenMP region). Slots are buffers that live side by side.
template <int Slot = 0>
void* thread_scratch(int64_t bytes) {
  struct Buffer {
    void* memory = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(memory); }
  };
  static thread_local Buffer buffer;
  if (buffer.size < bytes) {
    std::free(buffer.memory);
    buffer.size = 0;
    buffer.memory = std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64));
    if (buffer.memory != nullptr) buffer.size = bytes;
  }
  return buffer.memory;
}

// Runs body(task, scratch) for every task on at most `threads` threads, each with a scratch buffer of its own.
template <typename Body>
void parallel_tasks(int64_t tasks, int threads, int64_t scratch_bytes, Body body) {
  if (tasks < threads) threads = static_cast<int>(tasks);
  bool out_of_memory = false;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    void* scratch = scratch_bytes > 0 ? thread_scratch(scratch_bytes) : nullptr;
    if (scratch_bytes > 0 && scratch == nullptr) {
#pragma omp atomic write
      out_of_memory = true;
    }
#pragma omp barrier
    if (!out_of_memory) {
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t task = 0; task < tasks; ++task) body(task, scratch);
    }
  }
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace fastcnn::cpu
