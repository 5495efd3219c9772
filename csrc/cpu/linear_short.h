// Weights of a fully connected layer stored short, without loss (the format of a value: isa/linear_short.h).
#pragma once

#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "../common/types.h"
#include "work.h"

namespace fastcnn::cpu {

// What lies together: the weights of 4 columns of the output, or those of one input value. The latter is for one input
// row, fp32, and finite weights: isa/linear_by_input.cpp.
enum class ShortLayout { by_output, by_input };

// Whether this processor's instruction set reads weights of a dtype that are stored so.
bool reads_short_weights(DType dtype);

class ShortLinearWeight {
 public:
  // weight: (K, C) with adjacent columns, fp32 or bf16. Throws std::invalid_argument where the layout does not serve
  // it.
  ShortLinearWeight(const TensorView& weight, ShortLayout layout);
  // The same with the bytes of an earlier one: `packed` holds `bytes` bytes. Throws std::invalid_argument for bytes
  // that none had.
  ShortLinearWeight(DType dtype, int64_t columns, int64_t depth, ShortLayout layout, const void* packed, int64_t bytes);

  DType dtype;
  int64_t columns, depth;  // K, C
  ShortLayout layout;

  const char* data() const { return data_.get(); }
  int64_t bytes() const { return bytes_; }

  // Its parts in memory, in this order: the header, how many exceptions lie before each group of columns and in all,
  // the exceptions, and from a multiple of 64 on the groups' blocks.
  struct Header {
    uint32_t first_exponent, exceptions;
  };
  const Header& header() const { return *reinterpret_cast<const Header*>(data()); }
  const uint32_t* first_exception() const { return reinterpret_cast<const uint32_t*>(data() + sizeof(Header)); }
  const char* exceptions() const { return data() + sizeof(Header) + (groups() + 1) * 4; }
  const uint8_t* blocks() const { return reinterpret_cast<const uint8_t*>(data() + blocks_at(header().exceptions)); }

  int64_t groups() const;
  int64_t group_columns() const { return group_columns_; }  // the last group has fewer
  int64_t blocks_bytes() const;

 private:
  int64_t block_bytes(int64_t group) const;
  int64_t blocks_in_group() const;
  int64_t blocks_at(int64_t exceptions) const;
  struct Place;
  void set_places();
  Place place_of(int64_t column, int64_t value) const;
  static void put_in_words(uint8_t* unit, int vector, int lane, uint32_t bits, int code);
  void put(uint8_t* blocks, int64_t block_bytes, const Place& place, uint32_t bits, int code) const;

  int64_t lanes_ = 0, group_columns_ = 0;
  std::array<int64_t, 16> first_position_{};  // by input: of each lane's values
  int64_t bytes_ = 0;
  std::shared_ptr<char> data_;
};

Works linear_short_work(const TensorView& out, const TensorView& input, const ShortLinearWeight& weight,
                        const float* bias, Activation activation, int threads);

}  // namespace fastcnn::cpu
