// The first convolution of a network: one to four input channels, bf16 or fp16, on tensor cores through mma.sync.
//
//   out[m, k] = act(sum_{r,s,c} input[n, h, w, c] * weight[k, r, s, c] * scale[k] + bias[k] + residual[m, k])
//   m = output pixel (N*P*Q), k = filter; h = p*stride - pad + r, w = q*stride - pad + s
//
// A pixel of so few channels is no 16-byte vector, so im2col would be gathered element by element. But a window's part
//   of one filter row is S*C neighbouring elements of NHWC memory, and an mma.sync fragment of A is made of 32-bit
//   pairs: once the input rows lie in shared memory, fragments are read from them in place (device/stem_layout.h).
// Work: a block stays on its multiprocessor and walks over tiles of a few output rows by up to all columns of an image,
//   for 32, 64 or 96 filters. Its warps take 32 pixels by all these filters at a time: two products of 16 rows share
//   each fragment of weights, and a fragment of A serves 4, 8 or 12 products.
// Shared memory: the block's filters in fragment order, loaded once; two bands of input rows, the next tile's filled
//   (cp.async where image rows are aligned vectors) while this tile's is multiplied; scale and bias.
// Registers: accumulators (64 for 64 filters), one step of fragments. Two blocks share a multiprocessor, so that one
//   multiplies while the other stores. The accumulators leave as 16-byte vectors without passing shared memory.
// Floor: 2*N*P*Q*K*R*S*C operations (k padded to 16: 160 for 147 in a 7x7x3 filter); input and output once through
//   DRAM. At 224x224, 7x7/2, 64 filters, the output is 1.6 MB an image, the input 0.3 MB: memory bound.
#include <algorithm>

#include "conv2d_problem.h"
#include "device/conv_epilogue.cuh"
#include "device/ptx.cuh"
#include "device/stem_layout.h"
#include "host.h"

namespace fastcnn::cuda {
namespace {

constexpr int kLoadsInFlight = 8;  // words a thread fetches before it stores the first

constexpr int kBlocks = 2;  // per multiprocessor

// 96 filters take more than 128 registers a thread.
template <int kColumns>
constexpr int kMostWarps = kColumns == 96 ? 4 : 8;

// The band of `tile`, by 16-byte copies: element 8i of an image row is aligned, and whole vectors lie in the image.
template <typename T>
__device__ __forceinline__ void copy_band(const ConvProblem& problem, const StemPlan& plan, const StemTile& tile,
                                          uint32_t band, int thread, int threads) {
  const ConvShape& shape = problem.shape;
  const int vectors = plan.band_row / 8, count = plan.band_rows * vectors;
  const int first_h = tile.p * shape.stride_h - shape.pad_top;
  const int first_element = stem_start(plan, shape, tile) & ~7;
  const int row_elements = shape.width * shape.channels;
  const T* image =
      static_cast<const T*>(problem.input) + static_cast<int64_t>(tile.image) * shape.height * row_elements;
  for (int i = thread; i < count; i += threads) {
    int32_t vector;
    const int h = first_h + plan.by_band_row.divide(i, vector), element = first_element + 8 * vector;
    const bool real = static_cast<uint32_t>(h) < static_cast<uint32_t>(shape.height) &&
                      static_cast<uint32_t>(element) < static_cast<uint32_t>(row_elements);
    const T* from = real ? image + static_cast<int64_t>(h) * row_elements + element : image;
    copy_async_16(band + 16 * i, from, real);
  }
}

// The same by single elements, for any width and alignment, and for a band with a zero behind each pixel's channels.
template <typename T>
__device__ __forceinline__ void store_band(const ConvProblem& problem, const StemPlan& plan, const StemTile& tile,
                                           unsigned char* band, int thread, int threads) {
  const ConvShape& shape = problem.shape;
  const int words = plan.band_row / 2, count = plan.band_rows * words;
  const int first_h = tile.p * shape.stride_h - shape.pad_top;
  const int first_element = stem_start(plan, shape, tile) & ~7;
  const int row_elements = shape.width * shape.channels;
  const bool gaps = plan.pixel != shape.channels;
  const int log2_pixel = plan.pixel == 2 ? 1 : 2;  // with gaps, a pixel is 2 or 4 elements
  const T* image =
      static_cast<const T*>(problem.input) + static_cast<int64_t>(tile.image) * shape.height * row_elements;
  for (int first = thread; first < count; first += kLoadsInFlight * threads) {
    T values[kLoadsInFlight][2];
#pragma unroll
    for (int j = 0; j < kLoadsInFlight; ++j) {
      const int i = first + j * threads;
      int32_t word;
      const int h = first_h + plan.by_band_row.divide(i, word);
      const bool row_real = i < count && static_cast<uint32_t>(h) < static_cast<uint32_t>(shape.height);
      const T* row = image + static_cast<int64_t>(h) * row_elements;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int element = first_element + 2 * word + half;
        bool real = row_real;
        if (gaps) {
          const int channel = element & (plan.pixel - 1);
          real = real && channel < shape.channels;
          element = (element >> log2_pixel) * shape.channels + channel;
        }
        real = real && static_cast<uint32_t>(element) < static_cast<uint32_t>(row_elements);
        values[j][half] = real ? row[element] : from_float<T>(0.0f);
      }
    }
#pragma unroll
    for (int j = 0; j < kLoadsInFlight; ++j) {
      const int i = first + j * threads;
      if (i >= count) continue;
      uint32_t bits;
      memcpy(&bits, values[j], 4);
      *reinterpret_cast<uint32_t*>(band + 4 * i) = bits;
    }
  }
}

// One element of filter row r, in the band's coordinates; zero where a pair reaches past the window.
template <typename T>
__device__ __forceinline__ T weight_element(const ConvProblem& problem, const StemPlan& plan, int filter, int r,
                                            int element) {
  const int channels = problem.shape.channels;
  const int log2_pixel = plan.pixel == 2 ? 1 : 2;
  bool real =
      filter < problem.shape.filters && r < plan.filter_h && element >= 0 && element < plan.filter_w * plan.pixel;
  if (plan.pixel != channels) {
    const int channel = element & (plan.pixel - 1);
    real = real && channel < channels;
    element = (element >> log2_pixel) * channels + channel;
  }
  const T* weight = static_cast<const T*>(problem.weight) + filter * problem.weight_row_stride;
  return real ? weight[r * plan.filter_w * channels + element] : from_float<T>(0.0f);
}

template <typename T, int kColumns>
__device__ __forceinline__ void pack_weights(const ConvProblem& problem, const StemPlan& plan, int first_filter,
                                             uint32_t* weights, int thread, int threads) {
  const int depth = plan.steps * 8, count = kColumns * depth;
  for (int first = thread; first < count; first += kLoadsInFlight * threads) {
    T values[kLoadsInFlight][2];
#pragma unroll
    for (int j = 0; j < kLoadsInFlight; ++j) {
      int32_t pair, in_row;
      const int filter = first_filter + plan.by_depth.divide(first + j * threads, pair);
      const int r = plan.by_pairs.divide(pair, in_row);
      const int element = 2 * in_row - plan.odd;
      values[j][0] = weight_element<T>(problem, plan, filter, r, element);
      values[j][1] = weight_element<T>(problem, plan, filter, r, element + 1);
    }
#pragma unroll
    for (int j = 0; j < kLoadsInFlight; ++j) {
      int32_t pair;
      const int column = plan.by_depth.divide(first + j * threads, pair);
      uint32_t bits;
      memcpy(&bits, values[j], 4);
      if (column < kColumns) weights[stem_weight_word(kColumns, column, pair)] = bits;
    }
  }
}

// scale and bias of eight neighbouring filters, from shared memory.
struct Coefficients {
  float scale[8], bias[8];
  __device__ __forceinline__ Coefficients(const float* scales, const float* biases, int column) {
    eight(scale, scales + column);
    eight(bias, biases + column);
  }
  static __device__ __forceinline__ void eight(float (&x)[8], const float* from) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 four = reinterpret_cast<const float4*>(from)[i];
      x[4 * i] = four.x, x[4 * i + 1] = four.y, x[4 * i + 2] = four.z, x[4 * i + 3] = four.w;
    }
  }
};

__device__ __forceinline__ uint32_t load_pair(const unsigned char* bands, uint32_t offset, uint32_t mask) {
  return *reinterpret_cast<const uint32_t*>(bands + offset) & mask;
}

// The usual end: no residual, all filters of the block there, 16-byte stores aligned.
template <typename T, int kColumns, bool kRelu>
__device__ __forceinline__ void store_whole_pixels(const ConvProblem& problem, const float* scales, const float* biases,
                                                   const float (&acc)[2][kColumns / 8][4], const int32_t (&row)[2][2],
                                                   int first_filter, int lane) {
  T* out[2][2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[i / 2][i % 2] =
        static_cast<T*>(problem.out) + row[i / 2][i % 2] * problem.out_stride + first_filter + 8 * (lane % 4);
  }
#pragma unroll
  for (int group = 0; group < kColumns / 32; ++group) {
    Coefficients of(scales, biases, 32 * group + 8 * (lane % 4));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t words[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float* pair = &acc[i][4 * group + e][2 * half];
          words[e] = round_pair<T, kRelu>(pair[0] * of.scale[2 * e] + of.bias[2 * e],
                                          pair[1] * of.scale[2 * e + 1] + of.bias[2 * e + 1]);
        }
        if (row[i][half] >= 0) store_16(out[i][half] + 32 * group, make_uint4(words[0], words[1], words[2], words[3]));
      }
    }
  }
}

// scale and bias, then residual, activation and store, of the eight filters a lane holds of every 32.
template <typename T, int kColumns>
__device__ __forceinline__ void store_pixels(const ConvProblem& problem, const float* scales, const float* biases,
                                             const float (&acc)[2][kColumns / 8][4], const int32_t (&row)[2][2],
                                             int first_filter, int lane) {
#pragma unroll
  for (int group = 0; group < kColumns / 32; ++group) {
    const int column = 32 * group + 8 * (lane % 4);
    if (first_filter + column >= problem.shape.filters) continue;
    const Coefficients of(scales, biases, column);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (row[i][half] < 0) continue;
        float y[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) y[e] = acc[i][4 * group + e / 2][2 * half + e % 2] * of.scale[e] + of.bias[e];
        finish_row<T>(problem, y, row[i][half], first_filter + column, first_filter + column);
      }
    }
  }
}

}  // namespace

template <typename T, int kColumns>
__global__ void __launch_bounds__(32 * kMostWarps<kColumns>, kBlocks)
    conv2d_stem(const __grid_constant__ ConvProblem problem, const __grid_constant__ StemPlan plan) {
  constexpr int kProducts = kColumns / 8;
  const ConvShape& shape = problem.shape;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int threads = 32 * plan.warps;
  const int first_filter = static_cast<int>(blockIdx.y) * kColumns;

  const bool whole =
      problem.vector_output && problem.residual == nullptr && first_filter + kColumns <= problem.shape.filters;

  unsigned char* shared = dynamic_shared();
  uint32_t* weights = reinterpret_cast<uint32_t*>(shared);
  StemTap* taps = reinterpret_cast<StemTap*>(shared + plan.steps * kColumns * 32);
  float* scales = reinterpret_cast<float*>(taps + (plan.steps + 1) * 4);
  float* biases = scales + kColumns;
  unsigned char* bands = reinterpret_cast<unsigned char*>(biases + kColumns);

  const auto load_band = [&](int tile, int buffer) {
    unsigned char* band = bands + buffer * plan.band_bytes();
    if (plan.vectors) {
      copy_band<T>(problem, plan, stem_tile(plan, tile), shared_address(band), thread, threads);
    } else {
      store_band<T>(problem, plan, stem_tile(plan, tile), band, thread, threads);
    }
    copy_async_commit();
  };

  int tile = static_cast<int>(blockIdx.x), buffer = 0;
  load_band(tile, 0);
  pack_weights<T, kColumns>(problem, plan, first_filter, weights, thread, threads);
  for (int i = thread; i < (plan.steps + 1) * 4; i += threads) taps[i] = stem_tap(plan, i / 4, i % 4);
  for (int i = thread; i < kColumns; i += threads) {
    const bool real = first_filter + i < shape.filters;
    scales[i] = real && problem.scale != nullptr ? __ldg(problem.scale + first_filter + i) : 1.0f;
    biases[i] = real && problem.bias != nullptr ? __ldg(problem.bias + first_filter + i) : 0.0f;
  }

  for (; tile < plan.tiles; tile += static_cast<int>(gridDim.x), buffer ^= 1) {
    copy_async_wait<0>();  // this tile's band has arrived for this thread,
    __syncthreads();       // for all threads; and all are done reading the other one
    if (tile + static_cast<int>(gridDim.x) < plan.tiles) load_band(tile + static_cast<int>(gridDim.x), buffer ^ 1);

    const StemTile at = stem_tile(plan, tile);
    const int rows_left = at.p + plan.tile_h < plan.out_h ? plan.tile_h : plan.out_h - at.p;
    const int lead = stem_start(plan, shape, at) & 7;
    const uint32_t band = static_cast<uint32_t>(buffer * plan.band_bytes());
    for (int chunk = warp; chunk * kStemRows < rows_left * plan.tile_w; chunk += plan.warps) {
      int32_t row[2][2];      // output pixels of this lane's rows of the products; -1: not there
      uint32_t window[2][2];  // where their windows start in the bands
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          int32_t across;
          const int pixel = chunk * kStemRows + 16 * i + half * plan.half_step + lane / 4 * plan.row_step;
          const int down = plan.by_tile_w.divide(pixel, across);
          const bool real = down < rows_left && at.q + across < plan.out_w;
          row[i][half] = real ? (at.image * plan.out_h + at.p + down) * plan.out_w + at.q + across : -1;
          const int element = down * shape.stride_h * plan.band_row + across * shape.stride_w * plan.pixel + lead;
          window[i][half] = band + (real ? static_cast<uint32_t>(2 * element) : 0);
        }
      }

      float acc[2][kProducts][4] = {};
      const uint4* fragments = reinterpret_cast<const uint4*>(weights) + lane;
      const StemTap* lane_taps = taps + lane % 4;
      StemTap tap = lane_taps[0];
#pragma unroll 1
      for (int step = 0; step < plan.steps; ++step) {
        uint32_t a[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          a[i][0] = load_pair(bands, window[i][0] + tap.offset, tap.mask);
          a[i][1] = load_pair(bands, window[i][1] + tap.offset, tap.mask);
          a[i][2] = load_pair(bands, window[i][0] + tap.next_offset, tap.next_mask);
          a[i][3] = load_pair(bands, window[i][1] + tap.next_offset, tap.next_mask);
        }
        lane_taps += 4;
        tap = *lane_taps;
#pragma unroll
        for (int j = 0; j < kProducts; j += 2) {
          const uint4 b = *fragments;
          fragments += 32;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            mma_sync<T>(acc[i][j], a[i], b.x, b.y);
            mma_sync<T>(acc[i][j + 1], a[i], b.z, b.w);
          }
        }
      }
      if (!whole) {
        store_pixels<T, kColumns>(problem, scales, biases, acc, row, first_filter, lane);
      } else if (problem.relu) {
        store_whole_pixels<T, kColumns, true>(problem, scales, biases, acc, row, first_filter, lane);
      } else {
        store_whole_pixels<T, kColumns, false>(problem, scales, biases, acc, row, first_filter, lane);
      }
    }
  }
}

namespace {

// Lanes that meet in one bank when eight windows, `words` apart, are read at four neighbouring words each.
constexpr int bank_conflicts(int words) {
  int worst = 0;
  for (int bank = 0; bank < 32; ++bank) {
    int distinct = 0, last = -1;
    for (int word = bank; word < 8 * words + 4; word += 32) {
      for (int g = 0; g < 8; ++g) {
        if (word >= g * words && word < g * words + 4 && word != last) ++distinct, last = word;
      }
    }
    worst = distinct > worst ? distinct : worst;
  }
  return worst;
}

// Whether a product's 16 rows should take the even pixels first, for windows `words` apart (modulo 32).
struct PixelOrder {
  bool even_first[32] = {};
  constexpr PixelOrder() {
    for (int words = 0; words < 32; ++words) even_first[words] = bank_conflicts(2 * words) < bank_conflicts(words);
  }
};
constexpr PixelOrder kPixelOrder;

// Warps for `chunks` of 32 pixels, such that few of them idle in the last round.
int warps_for(int chunks, int most) {
  int best = 4;
  for (int warps = 5; warps <= most; ++warps) {
    const auto slots = [&](int w) { return ceil_divide(chunks, w) * w; };
    if (slots(warps) <= slots(best)) best = warps;
  }
  return best;
}

constexpr int64_t kReservedBytes = 1024;  // of shared memory, by the system, for each block

// Cuts the output into tiles for blocks that may use `room` bytes of shared memory, `resident` at a time. False: not
// even one pixel fits.
bool choose_tile(StemPlan& plan, const ConvShape& shape, int64_t images, int64_t room, int most_warps,
                 int64_t resident) {
  constexpr int kMostPixels = 512;
  room -= plan.weight_bytes() + plan.tap_bytes() + plan.coefficient_bytes();
  double best = -1.0;
  for (int64_t parts = ceil_divide(plan.out_w, kMostPixels); parts <= 4 * plan.out_w; parts *= 2) {
    const int64_t tile_w = ceil_divide(plan.out_w, parts), tiles_w = ceil_divide(plan.out_w, tile_w);
    // A row starts up to 6 elements behind a multiple of 8.
    const int64_t row = ceil_divide(6 + (tile_w - 1) * shape.stride_w * plan.pixel + 2 * plan.pairs, 8) * 8;
    const int64_t fit = room / (4 * row) - plan.filter_h;  // rows beside the first output row's
    if (fit >= 0) {
      const int64_t wanted = ceil_divide(resident, images * tiles_w);  // rows of tiles
      int64_t tile_h = std::min({fit / shape.stride_h + 1, std::max<int64_t>(kMostPixels / tile_w, 1),
                                 std::max<int64_t>(plan.out_h / wanted, 1)});
      tile_h = ceil_divide(plan.out_h, ceil_divide(plan.out_h, tile_h));
      const int64_t tiles_h = ceil_divide(plan.out_h, tile_h);
      const int chunks = static_cast<int>(ceil_divide(tile_h * tile_w, kStemRows));
      const int warps = warps_for(chunks, most_warps);
      const int64_t band_rows = (tile_h - 1) * shape.stride_h + plan.filter_h;
      // Time of the busiest block, in pixels multiplied: those of idle warps count, 256 bytes of band cost about as
      // much as one, a barrier as 32.
      const double slots = static_cast<double>(ceil_divide(chunks, warps) * warps * kStemRows);
      const int64_t rounds = ceil_divide(images * tiles_h * tiles_w, resident);
      const double cost = static_cast<double>(rounds) * (slots + band_rows * row * 2 / 256.0 + 32.0);
      if (best < 0 || cost < best) {
        best = cost;
        plan.tile_h = static_cast<int32_t>(tile_h);
        plan.tile_w = static_cast<int32_t>(tile_w);
        plan.band_rows = static_cast<int32_t>(band_rows);
        plan.band_row = static_cast<int32_t>(row);
        plan.warps = warps;
        plan.tiles = static_cast<int32_t>(images * tiles_h * tiles_w);
        plan.by_tiles_w = FastDivisor(tiles_w);
        plan.by_tiles_h = FastDivisor(tiles_h);
      }
    }
    if (tile_w <= kStemRows && best >= 0) break;
    if (tile_w == 1) break;
  }
  return best >= 0;
}

}  // namespace

static bool make_plan(StemPlan& plan, const ConvProblem& problem, const DeviceFacts& device) {
  const ConvShape& shape = problem.shape;
  plan.out_w = static_cast<int32_t>(shape.by_row.divisor);
  plan.out_h = static_cast<int32_t>(shape.by_image.divisor) / plan.out_w;
  plan.filter_w = static_cast<int32_t>(shape.by_filter_w.divisor);
  plan.filter_h = shape.reduction / (plan.filter_w * shape.channels);
  const int64_t images = shape.rows / static_cast<int64_t>(shape.by_image.divisor);
  plan.pixel = shape.channels + static_cast<int64_t>(shape.stride_w) * shape.channels % 2;
  plan.odd = static_cast<int64_t>(shape.pad_left) * plan.pixel % 2;
  const int64_t pairs = (static_cast<int64_t>(plan.filter_w) * plan.pixel + plan.odd + 1) / 2;
  const int64_t steps = ceil_divide(pairs * plan.filter_h, 8);
  if (steps * 32 * 32 > device.shared_bytes) return false;  // also keeps what follows within 32 bits
  plan.pairs = static_cast<int32_t>(pairs);
  plan.steps = static_cast<int32_t>(steps);
  const int64_t filters = shape.filters;
  const auto padded = [&](int64_t columns) { return ceil_divide(filters, columns) * columns; };
  plan.columns = filters <= 32 ? 32 : padded(96) < padded(64) ? 96 : 64;
  const int64_t column_blocks = ceil_divide(filters, plan.columns);
  if (column_blocks > 65535) return false;

  // Blocks that run at a time, for each block's worth of filters.
  const auto resident = [&](int64_t blocks) {
    return static_cast<int32_t>(std::max<int64_t>(blocks * device.multiprocessors / column_blocks, 1));
  };
  // Two blocks on a multiprocessor where their bands fit, else one.
  const int most_warps = plan.columns == 96 ? kMostWarps<96> : kMostWarps<64>;
  const int64_t half = (device.shared_bytes + kReservedBytes) / kBlocks - kReservedBytes;
  plan.most_blocks = resident(kBlocks);
  if (!choose_tile(plan, shape, images, half, most_warps, resident(kBlocks))) {
    plan.most_blocks = resident(1);
    const int64_t all = device.shared_bytes;
    if (!choose_tile(plan, shape, images, all, most_warps, resident(1))) return false;
  }

  const int64_t row_elements = static_cast<int64_t>(shape.width) * shape.channels;
  plan.vectors = plan.pixel == shape.channels && row_elements % 8 == 0 && aligned_16(problem.input);
  plan.by_band_row = FastDivisor(plan.band_row / (plan.vectors ? 8 : 2));
  plan.by_tile_w = FastDivisor(plan.tile_w);
  plan.by_pairs = FastDivisor(plan.pairs);
  plan.by_depth = FastDivisor(plan.steps * 8);
  if (kPixelOrder.even_first[static_cast<int64_t>(shape.stride_w) * plan.pixel / 2 % 32])
    plan.row_step = 2, plan.half_step = 1;
  return true;
}

bool stem_fits(const ConvProblem& problem, const DeviceFacts& device) {
  const ConvShape& shape = problem.shape;
  const bool dense =
      problem.groups == 1 && shape.rows > 0 && shape.channels <= 4 && shape.pixel_stride == shape.channels;
  if (!dense || problem.has_prologue() || shape.dilation_h != 1 || shape.dilation_w != 1) return false;
  StemPlan plan;
  return make_plan(plan, problem, device);
}

template <typename T, int kColumns>
static void launch_stem(const StemPlan& plan, const ConvProblem& problem, const LaunchTarget& target) {
  const int64_t column_blocks = ceil_divide(problem.shape.filters, kColumns);
  const dim3 grid(static_cast<unsigned>(std::min(plan.tiles, plan.most_blocks)), static_cast<unsigned>(column_blocks));
  const size_t bytes = static_cast<size_t>(plan.weight_bytes()) + plan.tap_bytes() + plan.coefficient_bytes() +
                       2 * static_cast<size_t>(plan.band_bytes());
  launch<conv2d_stem<T, kColumns>>("conv2d stem", target.device, grid, 32 * plan.warps, bytes, target.stream, problem,
                                   plan);
}

template <typename T>
void launch_conv2d_stem(const ConvProblem& problem, const LaunchTarget& target) {
  StemPlan plan;
  if (!make_plan(plan, problem, device_facts(target.device)))
    throw std::logic_error("fastcnn CUDA conv2d: not a case for the stem kernel");
  if (plan.columns == 32) return launch_stem<T, 32>(plan, problem, target);
  if (plan.columns == 64) return launch_stem<T, 64>(plan, problem, target);
  launch_stem<T, 96>(plan, problem, target);
}

template void launch_conv2d_stem<__nv_bfloat16>(const ConvProblem&, const LaunchTarget&);
template void launch_conv2d_stem<__half>(const ConvProblem&, const LaunchTarget&);

}  // namespace fastcnn::cuda
