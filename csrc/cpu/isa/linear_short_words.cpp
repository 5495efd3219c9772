// A fully connected layer with few input rows whose weights are stored short in words of 32 bits (short_words.h): what
// linear_short.h computes, for AVX2.
//
//   y[m, k] = act(sum_c x[m, c] * w[k, c] + bias[k])
//
// Shapes: x (M, C), y (M, K), rows at any stride, M at most kLinearFewRows; w (K, C), packed by linear_short.cpp:
// [group of 4 rows k][block of 16 c] a unit of eight vectors, of which vector j is the first 8 c of row j, vector 4 + j
// the others.
//
// Work: a task owns all M input rows x some groups. One input row is multiplied in the registers in which weights are
// decoded. For more, a chunk of a group is decoded into L1 and meets all rows there, in the tiles of plain weights. The
// order of additions is that of isa/linear.cpp, so the bits are too. kStreams groups are gone through side by side, a
// few blocks of each in turn, and what is read kAhead bytes later is fetched meanwhile: memory gives several streams
// faster than one.
//
// L1: of more rows, a chunk of 4 weight rows and of the input, and the tiles' sums. Floor: 3.5 bytes a weight.
//
// Compiled for every instruction set, with AVX2 alone it has something to do.
#include "table.h"
#include "variant.h"

#if defined(__AVX2__) && !defined(__AVX512BW__)
#include "linear_dot.h"
#include "linear_lanes.h"
#include "short_words.h"
#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

constexpr int64_t kBlockDepth = kLinearShortLanes, kBlockBytes = kLinearShortBlockBytes;
constexpr int64_t kAhead = 1024;
constexpr int64_t kStreams = 4;    // groups that are read side by side
constexpr int64_t kRowBlocks = 2;  // of one input row, from one stream to the next
constexpr int64_t kChunkBlocks = 16, kChunkDepth = kChunkBlocks * kBlockDepth;
constexpr int64_t kRowPitch = kChunkDepth + kVectorWidth;  // rows spread over the cache's sets

static_assert(kBlockDepth == 2 * kVectorWidth && kLinearShortRows == kTileColumns);

// The weights of a group: where their blocks and exceptions lie.
struct Group {
  const uint8_t* blocks;
  const LinearException *exception, *last;
};

static inline void fetch(const uint8_t* block) {
#pragma GCC unroll 4
  for (int line = 0; line < kBlockBytes; line += 64) __builtin_prefetch(block + line);
}

// Decodes `count` blocks from block `first` on, rows kRowPitch apart.
static void decode_blocks(const ShortWordDecoder& decoder, Group& group, int64_t first, int64_t count, float* rows) {
  for (int64_t at = 0; at < count; ++at) {
    const uint8_t* block = group.blocks + (first + at) * kBlockBytes;
    fetch(block + kAhead);
    decoder.decode(block, [&](int i, __m256 weight) {
      _mm256_storeu_ps(rows + i % 4 * kRowPitch + at * kBlockDepth + i / 4 * kVectorWidth, weight);
    });
  }
  for (; group.exception < group.last && group.exception->block < first + count; ++group.exception) {
    const LinearException& e = *group.exception;
    __builtin_memcpy(rows + e.row * kRowPitch + (e.block - first) * kBlockDepth + e.lane, &e.bits, 4);
  }
}

// Blocks [first, end) of a group against one input row: adds to its four sums, each a vector of partial sums.
static void multiply_row(const ShortWordDecoder& decoder, Group& group, const float* x, int64_t depth, int64_t first,
                         int64_t end, float* sums) {
  Vector sum[kLinearShortRows];
#pragma GCC unroll 4
  for (int j = 0; j < kLinearShortRows; ++j) sum[j] = first > 0 ? load(sums + j * kVectorWidth) : Vector{};
  const int64_t whole = depth / kBlockDepth < end ? depth / kBlockDepth : end;
  const uint8_t* block = group.blocks + first * kBlockBytes;
  for (int64_t at = first;; ++at, block += kBlockBytes) {
    const int64_t stop =
        group.exception < group.last && group.exception->block < whole ? group.exception->block : whole;
    for (; at < stop; ++at, block += kBlockBytes) {
      fetch(block + kAhead);
      const Vector input[2] = {load(x + at * kBlockDepth), load(x + at * kBlockDepth + kVectorWidth)};
      decoder.decode(block,
                     [&](int i, __m256 weight) { sum[i % 4] = fused(input[i / 4], (Vector)weight, sum[i % 4]); });
    }
    if (at == end) break;
    // A block with exceptions, or the last one, which has fewer values.
    float rows[kLinearShortRows * kRowPitch];
    decode_blocks(decoder, group, at, 1, rows);
    const int64_t left = depth - at * kBlockDepth;
    for (int64_t c = 0; c < kBlockDepth && c < left; c += kVectorWidth) {
      const float* from = x + at * kBlockDepth + c;
      const Vector input = left - c < kVectorWidth ? load_some(from, left - c) : load(from);
      for (int j = 0; j < kLinearShortRows; ++j) sum[j] = fused(input, load(rows + j * kRowPitch + c), sum[j]);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < kLinearShortRows; ++j) store(sums + j * kVectorWidth, sum[j]);
}

// The same for all rows: [tile][row of the tile][row of the group] vectors of partial sums.
static void multiply_rows(const LinearShortProblem& problem, const ShortWordDecoder& decoder, Group& group,
                          int64_t first, int64_t end, float* sums) {
  const float* x = static_cast<const float*>(problem.input);
  const int64_t tiles = (problem.rows + kTileRows - 1) / kTileRows, c = first * kBlockDepth;
  const int64_t depth = problem.depth - c < kChunkDepth ? problem.depth - c : kChunkDepth;
  alignas(64) float weights[kLinearShortRows * kRowPitch];
  decode_blocks(decoder, group, first, end - first, weights);
  int64_t m = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t height = (problem.rows - m + tiles - tile - 1) / (tiles - tile);  // nearly equal tiles
    Dot<float>::kernel(height, kLinearShortRows)(x + m * problem.input_stride + c, problem.input_stride, weights,
                                                 kRowPitch, depth, sums, first > 0);
    sums += height * kLinearShortRows * kVectorWidth;
    m += height;
  }
}

static void store_sums(const LinearShortProblem& problem, int64_t group, const float* sums) {
  const int64_t k = group * kLinearShortRows;
  const int64_t width = problem.columns - k < kLinearShortRows ? problem.columns - k : kLinearShortRows;
  for (int64_t m = 0; m < problem.rows; ++m) {
    float* out = static_cast<float*>(problem.out) + m * problem.out_stride + k;
    for (int64_t j = 0; j < width; ++j) {
      float y = add_lanes(load(sums + (m * kLinearShortRows + j) * kVectorWidth));
      if (problem.bias != nullptr) y += problem.bias[k + j];
      out[j] = problem.relu ? relu(y) : y;
    }
  }
}

}  // namespace

void linear_short_task(const LinearShortProblem& problem, int64_t index) {
  const ShortWordDecoder decoder(problem.first_exponent);
  const int64_t begin = index * problem.groups_per_task;
  const int64_t groups = (problem.columns + kLinearShortRows - 1) / kLinearShortRows;
  const int64_t end = begin + problem.groups_per_task < groups ? begin + problem.groups_per_task : groups;
  const int64_t blocks = (problem.depth + kBlockDepth - 1) / kBlockDepth;
  alignas(64) float sums[kStreams][kLinearFewRows * kLinearShortRows * kVectorWidth];
  for (int64_t first = begin; first < end; first += kStreams) {
    const int64_t streams = end - first < kStreams ? end - first : kStreams;
    Group group[kStreams];
    for (int64_t i = 0; i < streams; ++i) {
      group[i] = {problem.blocks + (first + i) * blocks * kBlockBytes,
                  problem.exceptions + problem.first_exception[first + i],
                  problem.exceptions + problem.first_exception[first + i + 1]};
    }
    const int64_t chunk = problem.rows == 1 ? kRowBlocks : kChunkBlocks;
    for (int64_t at = 0; at < blocks; at += chunk) {
      const int64_t stop = at + chunk < blocks ? at + chunk : blocks;
      for (int64_t i = 0; i < streams; ++i) {
        if (problem.rows == 1) {
          multiply_row(decoder, group[i], static_cast<const float*>(problem.input), problem.depth, at, stop, sums[i]);
        } else {
          multiply_rows(problem, decoder, group[i], at, stop, sums[i]);
        }
      }
    }
    for (int64_t i = 0; i < streams; ++i) store_sums(problem, first + i, sums[i]);
  }
}

}  // namespace fastcnn::cpu::FASTCNN_ISA
#endif
