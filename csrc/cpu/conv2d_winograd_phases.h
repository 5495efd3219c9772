// How the input channels of a Winograd convolution lie in vectors.
//
// A convolution with stride s is one with stride 1 over the s*s phases of its input: phase (a, b) holds the pixels
// (s*i + a, s*j + b), its filter the taps at (s*i + a, s*j + b), which are ceil((r - a) / s) rows and ceil((r - b) / s)
// columns of the r x r taps. A phase with fewer of them than phase (0, 0) has nothing to multiply at the point infinity
// (whose value is the leading tap), in rows, columns or both.
//
// A vector holds channels of one phase; or, where all columns' phases of a row fit into one (few channels), those of as
// many adjacent rows as fit, each row's (phase column, channel), as they are adjacent in memory.
#pragma once

#include <cstdint>
#include <vector>

#include "isa/table.h"

namespace fastcnn::cpu {

// Tiles of tile x tile outputs that there are kernels for, under filters of taps x taps.
constexpr bool winograd_has(int tile, int taps) {
  return tile == 2 ? taps == 2 || taps == 3 || taps == 5 : tile == 4 ? taps >= 3 && taps <= 5 : tile == 6 && taps == 3;
}

class WinogradPhases {
 public:
  // word_channels: 2 where a word of a vector is a pair of channels.
  WinogradPhases(int filter, int stride, int64_t in_channels, int word_channels);

  int taps() const { return (filter_ + stride_ - 1) / stride_; }  // of phase (0, 0), to a side
  int64_t vectors() const { return vectors_; }
  int rows_per_vector() const { return rows_per_vector_; }  // 0: a vector holds channels of one phase

  // What a word stands for; count: its channels, 0 where nothing is multiplied.
  struct Word {
    int row, column;  // the phase
    int64_t channel, count;
  };
  Word word(int64_t vector, int64_t lane) const;

  // The runs of words that are multiplied at a point that is in the row at infinity, in the column, or in both.
  const std::vector<WinogradRun>& runs(bool row, bool column) const { return runs_[2 * row + column]; }
  int64_t words(bool row, bool column) const;

 private:
  bool has_all_taps(int phase) const { return (filter_ - phase + stride_ - 1) / stride_ == taps(); }

  int filter_, stride_, word_channels_;
  int64_t in_channels_, lanes_, channel_vectors_, vectors_;  // channel_vectors_: of one phase
  int rows_per_vector_;
  std::vector<WinogradRun> runs_[4];
};

}  // namespace fastcnn::cpu
