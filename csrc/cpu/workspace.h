// Memory through which the works of one operator hand values to each other (work.h).
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "parallel.h"

namespace fastcnn::cpu {

// Operators that never run at the same time can share one: it is as large as the largest needs, and what lies in it is
// lost when the next operator begins. Works ask for its address when they run, since it moves as it grows.
class Workspace {
 public:
  // At least `bytes`. Every page is written here, so that no run meets a page fault.
  void reserve(int64_t bytes) {
    if (bytes <= bytes_) return;
    bytes_ = 0;
    memory_.reset();
    memory_.reset(allocate_aligned(bytes));
    std::memset(memory_.get(), 0, static_cast<size_t>(bytes));
    bytes_ = bytes;
  }
  void* data() const { return memory_.get(); }
  int64_t bytes() const { return bytes_; }

 private:
  std::unique_ptr<void, void (*)(void*)> memory_{nullptr, std::free};
  int64_t bytes_ = 0;
};

}  // namespace fastcnn::cpu
