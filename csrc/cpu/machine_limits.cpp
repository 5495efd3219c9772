// Sharing the loops of isa/machine_limits.cpp among threads.
#include "machine_limits.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "isa/table.h"
#include "parallel.h"

namespace fastcnn::cpu {
namespace {

constexpr int64_t kPieces = 16;           // to a thread, so that one that begins late does less instead of ending late
constexpr int64_t kPieceBytes = 1 << 20;  // of memory to a task

template <typename Loop>
LoopResult in_registers(Loop loop, int64_t iterations, int threads) {
  const int64_t tasks = kPieces * threads, each = std::max<int64_t>(1, iterations / kPieces);
  std::vector<double> operations(static_cast<size_t>(tasks));
  std::vector<float> means(static_cast<size_t>(tasks));
  parallel_tasks(tasks, threads, 0, [&](int64_t task, void*) {
    operations[static_cast<size_t>(task)] = loop(each, &means[static_cast<size_t>(task)]);
  });
  LoopResult result = {0, 0};
  for (size_t i = 0; i < operations.size(); ++i) {
    result.operations += operations[i];
    result.mean += means[i];
  }
  result.mean /= static_cast<double>(tasks);
  return result;
}

// body(first byte, bytes) for pieces of a memory.
template <typename Body>
void in_pieces(int64_t bytes, int threads, Body body) {
  parallel_tasks((bytes + kPieceBytes - 1) / kPieceBytes, threads, 0, [&](int64_t task, void*) {
    const int64_t begin = task * kPieceBytes;
    body(begin, std::min(kPieceBytes, bytes - begin));
  });
}

}  // namespace

LoopResult fma_limit(int64_t iterations, int threads) {
  return in_registers(kernels().fma_loop, iterations, threads);
}

LoopResult bf16_dot_limit(int64_t iterations, int threads) {
  return in_registers(kernels().bf16_dot_loop, iterations, threads);
}

double read_limit(const float* data, int64_t count, int threads) {
  std::vector<double> sums(static_cast<size_t>((4 * count + kPieceBytes - 1) / kPieceBytes));
  in_pieces(4 * count, threads, [&](int64_t begin, int64_t bytes) {
    sums[static_cast<size_t>(begin / kPieceBytes)] = kernels().read_loop(data + begin / 4, bytes / 4);
  });
  double sum = 0;
  for (const double s : sums) sum += s;
  return sum;
}

void copy_limit(void* to, const void* from, int64_t bytes, int threads) {
  in_pieces(bytes, threads, [&](int64_t begin, int64_t length) {
    std::memcpy(static_cast<char*>(to) + begin, static_cast<const char*>(from) + begin, static_cast<size_t>(length));
  });
}

}  // namespace fastcnn::cpu
