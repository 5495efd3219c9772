// A fully connected layer with one input row whose weights are stored short and input value by input value, so that
// those which meet a zero are not read: behind ReLU that is half of them and more.
//
//   y[k] = act(sum_{c: x[c] != 0} x[c] * w[k, c] + bias[k])
//
// Weights are finite (linear_short.cpp), so what is left out would add zeros.
//
// Layout of the weights, in blocks of columns k that a task or a few share:
//
//   [block][position of c][unit of columns]   a unit: two vectors of 16 (short_floats.h) or eight of 8 (short_words.h)
//
// The sums have the bits of isa/linear.cpp, which adds every 16th (8th) value in a lane and then the lanes: here a
// lane's values of c follow each other, so position is by lane first, in the order of kLinearLaneOrder, and the columns
// are across the vector.
//
// Work: a task owns some units of one block, lists the input's other values than zeros, and goes over the
// list, some rows of weights at a time, while the next ones are fetched. Where nearly all rows are read it takes one
// at a time and fetches none: memory then gives one long stream faster, and the processor finds it by itself. In L1:
// the task's sums of the lane at hand, and up to four that wait for the lanes they are added to.
//
// Floor: 3.5 bytes a weight of a column whose input is not zero, from memory.
//
// Compiled for every instruction set, with AVX-512 and AVX2 alone it has something to do.
#include "table.h"
#include "variant.h"

#if defined(__AVX512BW__)
#include "short_floats.h"
#elif defined(__AVX2__)
#include "short_words.h"
#endif

#if defined(__AVX2__)
#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

constexpr int kLanes = kVectorWidth;
constexpr int kUnitVectors = linear_unit_vectors(kShortFormat), kUnitColumns = linear_unit_columns(kShortFormat);
constexpr int kUnitBytes = linear_unit_bytes(kShortFormat);
constexpr int kRowsAtOnce = 8;
constexpr int kSums = 6;  // four kept, one at work, and what it was before an exception

// The columns of a task, in units of a block.
struct Columns {
  int64_t block, first_unit, units;
  int64_t block_units;                                         // of the whole block
  int64_t first() const { return first_unit * kUnitColumns; }  // within the block
};

static int64_t units_of(int64_t columns) {
  return (columns + kUnitColumns - 1) / kUnitColumns;
}

static Columns columns_of(const LinearByInputProblem& problem, int64_t index) {
  const int64_t block = index / problem.parts, part = index % problem.parts;
  const int64_t left = problem.columns - block * problem.block_columns;
  const int64_t units = units_of(left < problem.block_columns ? left : problem.block_columns);
  const int64_t begin = units * part / problem.parts, end = units * (part + 1) / problem.parts;
  return {block, begin, end - begin, units};
}

// The input's values that are not zero, in the order of their positions, and where each lane's end.
struct Values {
  float* value;
  int32_t* position;
  int64_t end[kLanes];
};

// Values that a list has room for: some behind the last one are written, too.
static int64_t room_of_list(const LinearByInputProblem& problem) {
  return (problem.depth + 3 * kLanes - 1) / kLanes * kLanes;
}

typedef float AlignedVector __attribute__((vector_size(kVectorWidth * 4), may_alias));

static inline Vector load_aligned(const float* p) {
  return *reinterpret_cast<const AlignedVector*>(p);
}
static inline void store_aligned(float* p, Vector v) {
  *reinterpret_cast<AlignedVector*>(p) = v;
}

// Of every value of a lane from `from` on, `count` in all: those that are not zero, and their positions from `position`
// on. Returns how many.
static int64_t list_lane(const float* from, int64_t count, int64_t position, float* values, int32_t* places);

static void list_values(const LinearByInputProblem& problem, Values& list) {
  int64_t listed = 0, position = 0;
  for (int i = 0; i < kLanes; ++i) {
    const int lane = kLinearLaneOrder[i] * kLanes / 16;
    const int64_t count = (problem.depth - lane + kLanes - 1) / kLanes;  // not positive where a lane has no value
    listed += list_lane(problem.input + lane, count, position, list.value + listed, list.position + listed);
    if (count > 0) position += count;
    list.end[i] = listed;
  }
  // What is fetched ahead at the end: the last row once more.
  for (int i = 0; i < kRowsAtOnce; ++i) list.position[listed + i] = listed > 0 ? list.position[listed - 1] : 0;
}

#if defined(__AVX512BW__)
using Decoder = ShortFloatDecoder;

static int64_t list_lane(const float* from, int64_t count, int64_t position, float* values, int32_t* places) {
  const __m512i lane_numbers = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i apart = _mm512_maskz_slli_epi32(kAll, lane_numbers, 4);  // every 16th value
  int64_t listed = 0;
  for (int64_t at = 0; at < count; at += kLanes) {
    const __mmask16 live = count - at < kLanes ? first_lanes(count - at) : kAll;
    const __m512 x = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), live, apart, from + at * kLanes, 4);
    const __mmask16 kept = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NEQ_UQ);  // NaN is kept
    const __m512i positions =
        _mm512_maskz_add_epi32(kAll, lane_numbers, _mm512_set1_epi32(static_cast<int>(position + at)));
    _mm512_storeu_ps(values + listed, _mm512_maskz_compress_ps(kept, x));
    _mm512_storeu_si512(places + listed, _mm512_maskz_compress_epi32(kept, positions));
    listed += __builtin_popcount(kept);
  }
  return listed;
}

// sum[k] += sum over `Rows` values x of x * w[k], in this order.
template <int Rows, bool Fetches>
static void add_rows(const Decoder& decoder, const uint8_t* weights, int64_t row_bytes, int64_t units,
                     const float* value, const int32_t* position, float* sum) {
  const uint8_t *row[Rows], *later[Rows];
  __m512 x[Rows];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
    row[i] = weights + position[i] * row_bytes;
    later[i] = weights + position[i + kRowsAtOnce] * row_bytes;
    x[i] = _mm512_set1_ps(value[i]);
  }
  for (int64_t at = 0; at < units * kUnitBytes; at += kUnitBytes, sum += 2 * kLanes) {
    __m512 a = _mm512_load_ps(sum), b = _mm512_load_ps(sum + kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const uint8_t* pair = row[i] + at;
      __m512 u, v;
      decoder.decode(pair, pair + 48, pair + 96, u, v);
      a = _mm512_fmadd_ps(x[i], u, a);
      b = _mm512_fmadd_ps(x[i], v, b);
      if constexpr (Fetches) {
        __builtin_prefetch(later[i] + at, 0, 0);
        __builtin_prefetch(later[i] + at + 64, 0, 0);
      }
    }
    _mm512_store_ps(sum, a);
    _mm512_store_ps(sum + kLanes, b);
  }
}

#else
using Decoder = ShortWordDecoder;

static int64_t list_lane(const float* from, int64_t count, int64_t position, float* values, int32_t* places) {
  int64_t listed = 0;
  for (int64_t at = 0; at < count; ++at) {
    const float x = from[at * kLanes];
    values[listed] = x;
    places[listed] = static_cast<int32_t>(position + at);
    listed += x != 0.0f;  // NaN is kept
  }
  return listed;
}

// sum[k] += x * weight[k] of a unit.
static inline void add_unit(const ShortWordDecoder& decoder, const uint8_t* unit, Vector x, Vector (&sum)[8]) {
  decoder.decode(unit, [&](int i, __m256 weight) { sum[i] = fused(x, (Vector)weight, sum[i]); });
}

// sum[k] += sum over `Rows` values x of x * w[k], in this order.
template <int Rows, bool Fetches>
static void add_rows(const Decoder& decoder, const uint8_t* weights, int64_t row_bytes, int64_t units,
                     const float* value, const int32_t* position, float* sum) {
  const uint8_t *row[Rows], *later[Rows];
  Vector x[Rows];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
    row[i] = weights + position[i] * row_bytes;
    later[i] = weights + position[i + kRowsAtOnce] * row_bytes;
    x[i] = broadcast(value[i]);
  }
  for (int64_t at = 0; at < units * kUnitBytes; at += kUnitBytes, sum += kUnitColumns) {
    Vector of_unit[kUnitVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kUnitVectors; ++i) of_unit[i] = load_aligned(sum + i * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      add_unit(decoder, row[i] + at, x[i], of_unit);
      if constexpr (Fetches) {
#pragma GCC unroll 4
        for (int line = 0; line < kUnitBytes; line += 64) __builtin_prefetch(later[i] + at + line, 0, 3);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kUnitVectors; ++i) store_aligned(sum + i * kLanes, of_unit[i]);
  }
}
#endif

// Those of a block's exceptions that a task meets, position by position.
class Exceptions {
 public:
  Exceptions(const LinearByInputProblem& problem, const Columns& columns)
      : at_(problem.exceptions + problem.first_exception[columns.block]),
        end_(problem.exceptions + problem.first_exception[columns.block + 1]),
        first_vector_(kUnitVectors * columns.first_unit),
        vectors_(kUnitVectors * columns.units) {}

  // Whether one lies at `position` or before `last`, those before `position` being passed over.
  bool lie_between(int64_t position, int64_t last) {
    while (at_ < end_ && at_->block < position) ++at_;
    return at_ < end_ && at_->block <= last;
  }

  // add_rows() for the one value at that position. `before` has room for the sums.
  void add_row(const Decoder& decoder, const uint8_t* weights, int64_t row_bytes, int64_t units, const float* value,
               const int32_t* position, float* sum, float* before) {
    __builtin_memcpy(before, sum, static_cast<size_t>(vectors_ * kLanes) * 4);
    add_rows<1, true>(decoder, weights, row_bytes, units, value, position, sum);
    for (; at_ < end_ && at_->block == static_cast<uint32_t>(*position); ++at_) {
      const int64_t vector = at_->row - first_vector_;
      if (vector < 0 || vector >= vectors_) continue;
      float weight;
      __builtin_memcpy(&weight, &at_->bits, 4);
      const int64_t column = vector * kLanes + at_->lane;
      sum[column] = __builtin_fmaf(*value, weight, before[column]);
    }
  }

 private:
  const LinearException *at_, *end_;
  int64_t first_vector_, vectors_;
};

static void add_sums(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kLanes) {
    store_aligned(to + i, load_aligned(from + i) + load_aligned(to + i));
  }
}

static void store_columns(const LinearByInputProblem& problem, const Columns& columns, const float* sum) {
  const int64_t first = columns.block * problem.block_columns + columns.first();
  for (int64_t i = 0; i < columns.units * kUnitColumns; i += kLanes) {
    const int64_t left = problem.columns - first - i, lanes = left < kLanes ? left : kLanes;
    if (lanes <= 0) break;
    Vector value = load(sum + i);
    if (problem.bias != nullptr) value += load_some(problem.bias + first + i, lanes);
    if (problem.relu) value = relu(value);
    store_some(problem.out + first + i, value, lanes);
  }
}

}  // namespace

// Lists, then sums.
int64_t linear_by_input_scratch_bytes(const LinearByInputProblem& problem) {
  const int64_t room = room_of_list(problem);
  return (2 * room + kSums * units_of(problem.block_columns) * kUnitColumns) * 4;
}

void linear_by_input_task(const LinearByInputProblem& problem, int64_t index, void* scratch) {
  const int64_t room = room_of_list(problem);
  Values list;
  list.value = static_cast<float*>(scratch);
  list.position = reinterpret_cast<int32_t*>(list.value + room);
  list_values(problem, list);

  const Columns columns = columns_of(problem, index);
  const int64_t count = columns.units * kUnitColumns, row_bytes = columns.block_units * kUnitBytes;
  const uint8_t* weights = problem.blocks + columns.first_unit * kUnitBytes +
                           columns.block * units_of(problem.block_columns) * kUnitBytes * problem.depth;
  const Decoder decoder(problem.first_exponent);
  Exceptions exceptions(problem, columns);
  float* kept = list.value + 2 * room;  // [level of the lanes' tree][column]
  float *sum = kept + 4 * count, *before = sum + count;
  const bool nearly_all = 8 * list.end[kLanes - 1] > 7 * problem.depth;
  const int64_t at_once = nearly_all ? 1 : kRowsAtOnce;
  int64_t at = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int64_t i = 0; i < count; i += kLanes) store_aligned(sum + i, Vector{});
    while (at < list.end[lane]) {
      const int64_t rows = list.end[lane] - at < at_once ? 1 : at_once;
      const float* value = list.value + at;
      const int32_t* position = list.position + at;
      if (exceptions.lie_between(position[0], position[rows - 1])) {
        exceptions.add_row(decoder, weights, row_bytes, columns.units, value, position, sum, before);
        at += 1;
        continue;
      }
      const auto add = rows > 1 ? add_rows<kRowsAtOnce, true> : nearly_all ? add_rows<1, false> : add_rows<1, true>;
      add(decoder, weights, row_bytes, columns.units, value, position, sum);
      at += rows;
    }
    // Up the tree as far as all below is there.
    int level = 0;
    for (; lane >> level & 1; ++level) add_sums(kept + level * count, count, sum);
    if (lane < kLanes - 1) __builtin_memcpy(kept + level * count, sum, static_cast<size_t>(count) * 4);
  }
  store_columns(problem, columns, sum);
}

}  // namespace fastcnn::cpu::FASTCNN_ISA
#endif
