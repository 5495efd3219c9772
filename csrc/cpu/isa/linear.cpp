// A fully connected layer on the CPU. The weights are read as the user left them: nothing of them is packed or kept.
//
//   y[m, k] = act(sum_c x[m, c] * w[k, c] + bias[k])
//
// Shapes: x (M, C), w (K, C), y (M, K), rows at any stride. Two ways, by the number of input rows:
//
// Few rows (at most kLinearFewRows): dot products. Both operands are contiguous along the reduction, so a vector holds
// consecutive c of one row, an accumulator the partial sums of one (m, k) pair, and lanes are added only at the end
// (linear_dot.h). A task owns all M input rows x `columns_per_task` weight rows. Registers: a tile's accumulators (up
// to 6 x 4, or 1 x 8), its weight vectors, one input. L2: the input rows of a pass, or, where tiles have few rows, L1:
// a piece of 4 weight rows that several tiles meet. Floor: K*C weights from memory, each read once.
//
// Many rows: a matrix product, with input rows across the lanes. The input is first transposed into panels
// [panel][c][kColumnBlock rows]. A task owns `panels_per_task` panels x `columns_per_task` weight rows and goes over
// the reduction in chunks: kMicroRows weight rows of a chunk are copied (and widened) to a padded panel in L1, since
// rows a power of two apart would share a cache set, and their values are broadcast against the input's vectors.
// Registers: kMicroRows x 2 accumulators. L2: a chunk of the task's input panels. Floor: 2*M*K*C FLOPs.

#include "linear_dot.h"
#include "linear_lanes.h"
#include "variant.h"
#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {
namespace {

constexpr int64_t kL1Depth = 1024;  // of 4 weight rows: half of an L1
constexpr int64_t kChunk = kLinearChunk;
constexpr int64_t kPanelStride = kChunk + 16;  // not a multiple of 1 KiB: rows spread over the cache's sets

// ---- few rows: dot products
// ------------------------------------------------------------------------------------------

// A tile of the task's output: row `m` on, column `k` on. Its sums lie at `sums`.
struct Tile {
  int64_t m, height, k, width;
  float* sums;
};

// Calls body(tile) for every tile: nearly equal numbers of rows, full tiles of columns and single ones. A sum is the
// same in each of them.
template <typename Body>
static void for_tiles(const LinearProblem& problem, int64_t first, int64_t last, float* sums, Body body) {
  const int64_t tiles = (problem.rows + kTileRows - 1) / kTileRows;
  for (int64_t k = first; k < last;) {
    const int64_t width = problem.rows == 1 && last - k >= kRowTileColumns ? kRowTileColumns
                          : last - k >= kTileColumns                       ? kTileColumns
                                                                           : 1;
    int64_t m = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t height = (problem.rows - m + tiles - tile - 1) / (tiles - tile);
      body(Tile{m, height, k, width, sums});
      sums += height * width * kVectorWidth;
      m += height;
    }
    k += width;
  }
}

template <typename T>
static void run_few_rows(const LinearProblem& problem, int64_t index) {
  const int64_t first = index * problem.columns_per_task;
  const int64_t last =
      first + problem.columns_per_task < problem.columns ? first + problem.columns_per_task : problem.columns;
  const T* x = static_cast<const T*>(problem.input);
  const T* w = static_cast<const T*>(problem.weight);
  T* out = static_cast<T*>(problem.out);
  alignas(64) float sums[kLinearFewRows * kLinearFewRowsColumns * kVectorWidth];
  // Passes over the reduction: the rows of a pass stay in L2 while all columns go by, or, where several tiles of input
  // rows meet a piece of four weight rows, that piece stays in L1.
  constexpr int64_t kPassBytes = 256 << 10;
  const bool in_l1 = kWeightsInL1 && problem.rows > kTileRows;
  const int64_t whole = in_l1 ? kL1Depth : kPassBytes / (problem.rows * static_cast<int64_t>(sizeof(T)));
  const int64_t pass = problem.depth <= whole ? problem.depth : whole / kVectorWidth * kVectorWidth;
  const int64_t columns = in_l1 ? kTileColumns : last - first;
  for (int64_t k = first; k < last; k += columns) {
    const int64_t end = k + columns < last ? k + columns : last;
    for (int64_t c = 0; c < problem.depth; c += pass) {
      const int64_t depth = problem.depth - c < pass ? problem.depth - c : pass;
      for_tiles(problem, k, end, sums + (k - first) * problem.rows * kVectorWidth, [&](const Tile& t) {
        Dot<T>::kernel(t.height, t.width)(x + t.m * problem.input_stride + c, problem.input_stride,
                                          w + t.k * problem.weight_stride + c, problem.weight_stride, depth, t.sums,
                                          c > 0);
      });
    }
  }
  for_tiles(problem, first, last, sums, [&](const Tile& t) {
    if (kVectorWidth > kRowTileColumns && t.width == kRowTileColumns) {
      Vector value = add_lanes_of_8(t.sums);
      if (problem.bias != nullptr) value += load_some(problem.bias + t.k, t.width);
      store_some(out + t.k, problem.relu ? relu(value) : value, t.width);
      return;
    }
    for (int64_t i = 0; i < t.height; ++i) {
      for (int64_t j = 0; j < t.width; ++j) {
        float value = add_lanes(load(t.sums + (i * t.width + j) * kVectorWidth));
        if (problem.bias != nullptr) value += problem.bias[t.k + j];
        store_one(out + (t.m + i) * problem.out_stride + t.k + j, problem.relu ? relu(value) : value);
      }
    }
  });
}

// ---- many rows: a matrix product
// ---------------------------------------------------------------------------------------

// Values [begin, end) of one panel's input rows, transposed. Rows beyond the last become zeros.
template <typename T>
static void pack_panel(const LinearProblem& problem, float* packed, int64_t panel, int64_t begin, int64_t end) {
  float* to = packed + panel * problem.depth * kColumnBlock;
  const int64_t first = panel * kColumnBlock;
  for (int64_t c = begin; c < end; c += kVectorWidth) {
    const int64_t count = end - c < kVectorWidth ? end - c : kVectorWidth;
    for (int64_t m = 0; m < kColumnBlock; ++m) {
      const T* from = static_cast<const T*>(problem.input) + (first + m) * problem.input_stride + c;
      const bool inside = first + m < problem.rows;
      for (int64_t i = 0; i < count; ++i) to[(c + i) * kColumnBlock + m] = inside ? load_one(from + i) : 0.0f;
    }
  }
}

// `Rows` weight rows against one panel, over a chunk: sums[row][kColumnBlock].
template <int Rows, int Vectors>
static void multiply(const float* weights, const float* inputs, int64_t depth, float* sums, bool resume) {
  Vector sum[Rows][Vectors];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) sum[i][j] = resume ? load(sums + i * kColumnBlock + j * kVectorWidth) : Vector{};
  }
  for (int64_t c = 0; c < depth; ++c) {
    Vector x[Vectors];
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) x[j] = load(inputs + c * kColumnBlock + j * kVectorWidth);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const Vector w = broadcast(weights[i * kPanelStride + c]);
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) sum[i][j] += w * x[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) store(sums + i * kColumnBlock + j * kVectorWidth, sum[i][j]);
  }
}

using Multiply = void (*)(const float*, const float*, int64_t, float*, bool);

template <int Vectors>
struct MultiplyKernels {
  Multiply by_rows[kMicroRows + 1] = {};
  constexpr MultiplyKernels() { fill<kMicroRows>(); }
  template <int Rows>
  constexpr void fill() {
    by_rows[Rows] = multiply<Rows, Vectors>;
    if constexpr (Rows > 1) fill<Rows - 1>();
  }
};

constexpr MultiplyKernels<1> kOneVector;
constexpr MultiplyKernels<2> kTwoVectors;

template <typename T>
static void run_many_rows(const LinearProblem& problem, const float* packed, int64_t index, float* scratch) {
  const int64_t panels_total = (problem.rows + kColumnBlock - 1) / kColumnBlock;
  const int64_t column_tasks = (problem.columns + problem.columns_per_task - 1) / problem.columns_per_task;
  // Columns vary fastest: a group of input panels stays in the cache while weights pass.
  const int64_t panel0 = index / column_tasks * problem.panels_per_task;
  const int64_t panels =
      panels_total - panel0 < problem.panels_per_task ? panels_total - panel0 : problem.panels_per_task;
  const int64_t k0 = index % column_tasks * problem.columns_per_task;
  const int64_t columns =
      problem.columns - k0 < problem.columns_per_task ? problem.columns - k0 : problem.columns_per_task;
  const T* w = static_cast<const T*>(problem.weight) + k0 * problem.weight_stride;
  float* weights = scratch;                           // [kMicroRows][kPanelStride]
  float* sums = scratch + kMicroRows * kPanelStride;  // [column][panel][kColumnBlock], in blocks of kMicroRows columns

  for (int64_t begin = 0; begin < problem.depth; begin += kChunk) {
    const int64_t depth = problem.depth - begin < kChunk ? problem.depth - begin : kChunk;
    for (int64_t k = 0; k < columns; k += kMicroRows) {
      const int64_t height = columns - k < kMicroRows ? columns - k : kMicroRows;
      for (int64_t i = 0; i < height; ++i) {
        const T* from = w + (k + i) * problem.weight_stride + begin;
        float* to = weights + i * kPanelStride;
        int64_t c = 0;
        for (; c + kVectorWidth <= depth; c += kVectorWidth) store(to + c, load(from + c));
        for (; c < depth; ++c) to[c] = load_one(from + c);
      }
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t rows = problem.rows - (panel0 + p) * kColumnBlock;
        const float* inputs = packed + ((panel0 + p) * problem.depth + begin) * kColumnBlock;
        (rows <= kVectorWidth ? kOneVector.by_rows : kTwoVectors.by_rows)[height](
            weights, inputs, depth, sums + (k * panels + p * height) * kColumnBlock, begin > 0);
      }
    }
  }

  for (int64_t k = 0; k < columns; k += kMicroRows) {
    const int64_t height = columns - k < kMicroRows ? columns - k : kMicroRows;
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t m0 = (panel0 + p) * kColumnBlock;
      const int64_t rows = problem.rows - m0 < kColumnBlock ? problem.rows - m0 : kColumnBlock;
      const float* from = sums + (k * panels + p * height) * kColumnBlock;
      for (int64_t m = 0; m < rows; ++m) {
        T* out = static_cast<T*>(problem.out) + (m0 + m) * problem.out_stride + k0 + k;
        for (int64_t i = 0; i < height; ++i) {
          float value = from[i * kColumnBlock + m];
          if (problem.bias != nullptr) value += problem.bias[k0 + k + i];
          store_one(out + i, problem.relu ? relu(value) : value);
        }
      }
    }
  }
}

}  // namespace

int64_t linear_scratch_bytes(const LinearProblem& problem) {
  return (kMicroRows * kPanelStride + problem.columns_per_task * problem.panels_per_task * kColumnBlock) * 4;
}

void linear_pack_task(const LinearProblem& problem, float* packed, int64_t index) {
  const int64_t chunks = (problem.depth + kChunk - 1) / kChunk;
  const int64_t begin = index % chunks * kChunk;
  const int64_t end = begin + kChunk < problem.depth ? begin + kChunk : problem.depth;
  if (problem.dtype == DType::f32) {
    pack_panel<float>(problem, packed, index / chunks, begin, end);
  } else {
    pack_panel<uint16_t>(problem, packed, index / chunks, begin, end);
  }
}

void linear_few_rows_task(const LinearProblem& problem, int64_t index) {
  problem.dtype == DType::f32 ? run_few_rows<float>(problem, index) : run_few_rows<uint16_t>(problem, index);
}

void linear_many_rows_task(const LinearProblem& problem, const float* packed, int64_t index, void* scratch) {
  float* memory = static_cast<float*>(scratch);
  problem.dtype == DType::f32 ? run_many_rows<float>(problem, packed, index, memory)
                              : run_many_rows<uint16_t>(problem, packed, index, memory);
}

}  // namespace fastcnn::cpu::FASTCNN_ISA
