// Loops that reach the machine's own limits, for whoever holds a kernel's speed against them. They only do the work:
// the caller holds the watch. See isa/machine_limits.cpp.
#pragma once

#include <cstdint>

namespace fastcnn::cpu {

struct LoopResult {
  double operations;  // floating-point operations done, two to a multiply-accumulate; 0: no such instruction here
  double mean;        // of what the accumulators hold: shows that the work was done
};

// `iterations` rounds of multiply-adds in the registers of each of `threads` threads.
LoopResult fma_limit(int64_t iterations, int threads);
// The same with AVX512-BF16's dot product.
LoopResult bf16_dot_limit(int64_t iterations, int threads);
// Loads every value once; returns their sum.
double read_limit(const float* data, int64_t count, int threads);
// Copies `bytes` bytes.
void copy_limit(void* to, const void* from, int64_t bytes, int threads);

}  // namespace fastcnn::cpu
