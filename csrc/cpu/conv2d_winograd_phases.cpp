#include "conv2d_winograd_phases.h"

#include <algorithm>

#include "preparation.h"

namespace fastcnn::cpu {

WinogradPhases::WinogradPhases(int filter, int stride, int64_t in_channels, int word_channels)
    : filter_(filter),
      stride_(stride),
      word_channels_(word_channels),
      in_channels_(in_channels),
      lanes_(kernels().vector_width),
      channel_vectors_(ceil_div(in_channels, lanes_ * word_channels)) {
  const int64_t row = stride * in_channels;  // values of a row's phases that are adjacent
  rows_per_vector_ = stride > 1 && word_channels == 1 ? static_cast<int>(std::min<int64_t>(lanes_ / row, stride)) : 0;
  vectors_ = rows_per_vector_ > 0 ? ceil_div(stride, rows_per_vector_) : stride * stride * channel_vectors_;
  for (int at = 0; at < 4; ++at) {
    for (int64_t vector = 0; vector < vectors_; ++vector) {
      bool open = false;
      for (int64_t lane = 0; lane < lanes_; ++lane) {
        const Word w = word(vector, lane);
        const bool zero = (at / 2 == 1 && !has_all_taps(w.row)) || (at % 2 == 1 && !has_all_taps(w.column));
        if (w.count == 0 || zero) {
          open = false;
          continue;
        }
        if (!open) runs_[at].push_back({static_cast<int32_t>(vector), static_cast<int32_t>(lane), 0});
        ++runs_[at].back().count;
        open = true;
      }
    }
  }
}

WinogradPhases::Word WinogradPhases::word(int64_t vector, int64_t lane) const {
  if (rows_per_vector_ > 0) {
    const int64_t run = stride_ * in_channels_, row = vector * rows_per_vector_ + lane / run;
    const int64_t column = lane % run / in_channels_;
    const bool used = lane / run < rows_per_vector_ && row < stride_;
    return {static_cast<int>(row), static_cast<int>(column), lane % in_channels_, used ? 1 : 0};
  }
  const int64_t phase = vector / channel_vectors_;
  const int64_t channel = (vector % channel_vectors_ * lanes_ + lane) * word_channels_;
  return {static_cast<int>(phase / stride_), static_cast<int>(phase % stride_), channel,
          std::clamp<int64_t>(in_channels_ - channel, 0, word_channels_)};
}

int64_t WinogradPhases::words(bool row, bool column) const {
  int64_t sum = 0;
  for (const WinogradRun& run : runs(row, column)) sum += run.count;
  return sum;
}

}  // namespace fastcnn::cpu
