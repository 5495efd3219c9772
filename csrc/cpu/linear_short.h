// Weights of a fully connected layer stored short, without loss (the format: isa/linear_short.h).
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "../common/types.h"
#include "work.h"

namespace fastcnn::cpu {

// Whether this processor's instruction set reads weights of a dtype that are stored so.
bool reads_short_weights(DType dtype);

class ShortLinearWeight {
 public:
  // weight: (K, C) with adjacent columns, fp32 or bf16.
  explicit ShortLinearWeight(const TensorView& weight);
  // The same with the bytes of an earlier one: `packed` holds `bytes` bytes. Throws std::invalid_argument for bytes
  // that none had.
  ShortLinearWeight(DType dtype, int64_t columns, int64_t depth, const void* packed, int64_t bytes);

  DType dtype;
  int64_t columns, depth;  // K, C

  const char* data() const { return data_.get(); }
  int64_t bytes() const { return bytes_; }

 private:
  friend Works linear_short_work(const TensorView& out, const TensorView& input, const ShortLinearWeight& weight,
                                 const float* bias, Activation activation, int threads);

  // In this order in memory.
  struct Header {
    uint32_t first_exponent, exceptions;
  };
  void set_sizes();
  int64_t blocks_at(int64_t exceptions) const;  // bytes before the blocks

  int64_t groups_, group_bytes_;
  int64_t bytes_ = 0;
  std::shared_ptr<char> data_;
};

Works linear_short_work(const TensorView& out, const TensorView& input, const ShortLinearWeight& weight,
                        const float* bias, Activation activation, int threads);

}  // namespace fastcnn::cpu
