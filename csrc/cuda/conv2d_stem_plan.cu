// Which convolutions the stem kernels serve, and with which tiles.
#include <algorithm>

#include "conv2d_stem_plan.h"
#include "host.h"

namespace fastcnn::cuda {
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

constexpr int64_t kReservedBytes = 1024;  // of shared memory, by the system, for each block
constexpr int64_t kMostPixels = 512;      // of a tile
constexpr int64_t kNarrowTile = 32;       // columns; a tile need not be narrower

// Elements of a band's row. The first window starts up to 6 elements behind a multiple of 8.
int64_t band_row(const StemPlan& plan, const ConvShape& shape, int64_t tile_w) {
  return ceil_divide(6 + (tile_w - 1) * shape.stride_w * plan.pixel + 2 * plan.pairs, 8) * 8;
}

// What is left for the bands of `room` bytes of shared memory.
int64_t room_for_bands(const StemPlan& plan, int64_t room) {
  return room - plan.alignment - plan.weight_bytes - plan.tap_bytes() - plan.coefficient_bytes();
}

// All but the tiles, for blocks of `columns` filters; 0: as many as waste least. False: not even one pixel's bands fit
// in shared memory.
bool describe(StemPlan& plan, const ConvProblem& problem, const DeviceFacts& device, bool wgmma, int32_t columns = 0) {
  const ConvShape& shape = problem.shape;
  plan.out_w = static_cast<int32_t>(shape.by_row.divisor);
  plan.out_h = static_cast<int32_t>(shape.by_image.divisor) / plan.out_w;
  plan.filter_w = static_cast<int32_t>(shape.by_filter_w.divisor);
  plan.filter_h = shape.reduction / (plan.filter_w * shape.channels);
  plan.pixel = shape.channels + static_cast<int64_t>(shape.stride_w) * shape.channels % 2;
  plan.odd = static_cast<int64_t>(shape.pad_left) * plan.pixel % 2;
  const int64_t pairs = (static_cast<int64_t>(plan.filter_w) * plan.pixel + plan.odd + 1) / 2;
  const int64_t steps = wgmma ? ceil_divide(pairs * plan.filter_h, 16) * 2 : ceil_divide(pairs * plan.filter_h, 8);
  if (steps * 32 * 32 > device.shared_bytes) return false;  // also keeps what follows within 32 bits
  plan.pairs = static_cast<int32_t>(pairs);
  plan.steps = static_cast<int32_t>(steps);
  const auto padded = [&](int64_t columns) { return ceil_divide(shape.filters, columns) * columns; };
  plan.columns = columns > 0 ? columns : shape.filters <= 32 ? 32 : padded(96) < padded(64) ? 96 : 64;
  plan.alignment = wgmma ? 1024 : 0;
  plan.weight_bytes = static_cast<int32_t>(plan.columns * (wgmma ? ceil_divide(steps, 4) * 128 : steps * 32));
  return ceil_divide(shape.filters, plan.columns) <= 65535 &&
         4 * plan.filter_h * band_row(plan, shape, 1) <= room_for_bands(plan, device.shared_bytes);
}

// What multiplies: warps, or with wgmma warpgroups of four.
struct Workers {
  int warps, chunk;  // of one; the pixels it takes at a time
  int least, most;   // in a block
};

// Time of a tile, in pixels multiplied: those of idle warps count, 256 bytes of band cost about as much as one, a
// barrier as 32. Sets the number of warps, such that few of them idle in the last round.
int64_t tile_cost(const Workers& workers, int64_t pixels, int64_t band_bytes, int32_t& warps) {
  const int64_t chunks = ceil_divide(pixels, workers.chunk);
  int64_t least = 0;
  for (int n = workers.least; n <= workers.most; ++n) {
    const int64_t slots = ceil_divide(chunks, n) * n;
    if (n == workers.least || slots <= least) least = slots, warps = n * workers.warps;
  }
  return least * workers.chunk + band_bytes / 256 + 32;
}

// Cuts the output into tiles for blocks that may use `room` bytes of shared memory, `resident` at a time. False: not
// even one pixel fits.
bool choose_tile(StemPlan& plan, const ConvShape& shape, int64_t images, int64_t room, const Workers& workers,
                 int64_t resident) {
  room = room_for_bands(plan, room);
  int64_t best = -1;
  for (int64_t parts = ceil_divide(plan.out_w, kMostPixels);; parts *= 2) {
    const int64_t tile_w = ceil_divide(plan.out_w, parts), tiles_w = ceil_divide(plan.out_w, tile_w);
    const int64_t row = band_row(plan, shape, tile_w);
    const int64_t fit = room / (4 * row) - plan.filter_h;  // rows beside the first output row's
    if (fit >= 0) {
      const int64_t most = std::min(fit / shape.stride_h + 1, std::max<int64_t>(kMostPixels / tile_w, 1));
      for (const int64_t wanted : {most, most / 2, most / 4, most / 8}) {
        if (wanted == 0) break;
        const int64_t tiles_h = ceil_divide(plan.out_h, wanted), tile_h = ceil_divide(plan.out_h, tiles_h);
        const int64_t band_rows = (tile_h - 1) * shape.stride_h + plan.filter_h;
        const int64_t rounds = ceil_divide(images * tiles_h * tiles_w, resident);
        int32_t warps = 0;
        const int64_t cost = rounds * tile_cost(workers, tile_h * tile_w, 2 * band_rows * row, warps);
        if (best >= 0 && cost >= best) continue;
        best = cost;
        plan.tile_h = static_cast<int32_t>(tile_h);
        plan.tile_w = static_cast<int32_t>(tile_w);
        plan.band_rows = static_cast<int32_t>(band_rows);
        plan.band_row = static_cast<int32_t>(row);
        plan.warps = warps;
        plan.tiles = static_cast<int32_t>(images * tiles_h * tiles_w);
        plan.most_blocks = static_cast<int32_t>(resident);
        plan.by_tiles_w = FastDivisor(tiles_w);
        plan.by_tiles_h = FastDivisor(tiles_h);
      }
    }
    if (tile_w == 1 || (tile_w <= kNarrowTile && best >= 0)) return best >= 0;
  }
}

void order_pixels(StemPlan& plan, const ConvShape& shape) {
  const bool even_first = kPixelOrder.even_first[static_cast<int64_t>(shape.stride_w) * plan.pixel / 2 % 32];
  plan.row_step = even_first ? 2 : 1, plan.half_step = even_first ? 1 : 8;
}

// What follows from the tiles.
void complete(StemPlan& plan, const ConvProblem& problem) {
  const ConvShape& shape = problem.shape;
  const int64_t row_elements = static_cast<int64_t>(shape.width) * shape.channels;
  plan.vectors = plan.pixel == shape.channels && row_elements % 8 == 0 && aligned_16(problem.input);
  plan.by_band_row = FastDivisor(plan.band_row / (plan.vectors ? 8 : 2));
  plan.by_tile_w = FastDivisor(plan.tile_w);
  plan.by_pairs = FastDivisor(plan.pairs);
  plan.by_depth = FastDivisor(plan.steps * 8);
  order_pixels(plan, shape);
}

constexpr int64_t kStemPoolStrip = kStemWgmmaWarps / 4 * kStemWgmmaChunk / 2 - 1;  // output columns, at most
constexpr int64_t kStemPoolTile = 4;                                               // convolution rows, at most
constexpr int64_t kStemPoolFilling = 2;      // what a walk's beginning costs, in rows
constexpr int64_t kStemPoolMostWalks = 512;  // down an image

}  // namespace

bool make_stem_plan(StemPlan& plan, const ConvProblem& problem, const DeviceFacts& device, bool wgmma) {
  const ConvShape& shape = problem.shape;
  if (!describe(plan, problem, device, wgmma)) return false;
  const int64_t images = shape.rows / static_cast<int64_t>(shape.by_image.divisor);
  const int64_t column_blocks = ceil_divide(shape.filters, plan.columns);

  // Blocks that run at a time, for each block's worth of filters.
  const auto resident = [&](int64_t blocks) {
    return std::max<int64_t>(blocks * device.multiprocessors / column_blocks, 1);
  };

  // Several blocks on a multiprocessor where their bands fit, else fewer.
  const Workers workers = wgmma ? Workers{4, kStemWgmmaChunk, kStemWgmmaWarps / 4, kStemWgmmaWarps / 4}
                                : Workers{1, kStemChunk, 4, stem_most_warps(plan.columns)};
  int64_t blocks = kStemBlocks;
  const auto fits = [&] {
    const int64_t room = (device.shared_bytes + kReservedBytes) / blocks - kReservedBytes;
    return choose_tile(plan, shape, images, room, workers, resident(blocks));
  };
  while (!fits()) {
    if (--blocks == 0) return false;
  }

  complete(plan, problem);
  return true;
}

bool make_stem_pool_plan(StemPoolPlan& plan, const ConvProblem& problem, const DeviceFacts& device) {
  const ConvShape& shape = problem.shape;
  StemPlan& stem = plan.stem;
  if (!stem_fits(problem, device, true) || !describe(stem, problem, device, true, kStemPoolColumns)) return false;
  const int64_t images = shape.rows / static_cast<int64_t>(shape.by_image.divisor);
  const int64_t strips = ceil_divide(plan.out_w, kStemPoolStrip);
  plan.columns = static_cast<int32_t>(ceil_divide(plan.out_w, strips));
  stem.tile_w = 2 * plan.columns + 1;
  order_pixels(stem, shape);
  stem.band_row = static_cast<int32_t>(band_row(stem, shape, stem.tile_w + stem.half_step));
  stem.warps = stem.tile_w <= kStemWgmmaChunk ? 4 : kStemWgmmaWarps;

  // As many blocks on a multiprocessor as find room, each with at least a row's bands.
  int64_t blocks = kStemBlocks * kStemWgmmaWarps / stem.warps, rows = 0;
  for (; blocks > 0; --blocks) {
    const int64_t room = (device.shared_bytes + kReservedBytes) / blocks - kReservedBytes - 2 * plan.staged_bytes();
    const int64_t fit = room_for_bands(stem, room) / (4 * stem.band_row) - stem.filter_h;
    rows = fit < 0 ? 0 : std::min<int64_t>(fit / shape.stride_h + 1, kStemPoolTile);
    if (rows > 0) break;
  }
  if (blocks == 0) return false;

  // Walks as long as the device stays evenly busy: their first row is computed twice, and filling takes a while.
  const int64_t resident =
      std::max<int64_t>(blocks * device.multiprocessors / ceil_divide(shape.filters, kStemPoolColumns), 1);
  int64_t best = -1, walks = 1;
  for (int64_t parts = 1; parts <= std::min<int64_t>(plan.out_h, kStemPoolMostWalks); ++parts) {
    const int64_t cost =
        ceil_divide(images * strips * parts, resident) * (2 * ceil_divide(plan.out_h, parts) + 1 + kStemPoolFilling);
    if (best < 0 || cost < best) best = cost, walks = parts;
  }
  plan.rows = static_cast<int32_t>(ceil_divide(plan.out_h, walks));
  walks = ceil_divide(plan.out_h, plan.rows);
  plan.walks = static_cast<int32_t>(images * strips * walks);
  plan.by_strips = FastDivisor(strips);
  plan.by_walks = FastDivisor(walks);
  stem.tile_h = static_cast<int32_t>(std::min<int64_t>(rows, 2 * plan.rows + 1));
  stem.tiles = static_cast<int32_t>(ceil_divide(2 * plan.rows + 1, stem.tile_h));
  stem.band_rows = (stem.tile_h - 1) * shape.stride_h + stem.filter_h;
  stem.most_blocks = static_cast<int32_t>(resident);
  complete(stem, problem);
  return true;
}

bool stem_fits(const ConvProblem& problem, const DeviceFacts& device, bool wgmma) {
  const ConvShape& shape = problem.shape;
  const bool dense =
      problem.groups == 1 && shape.rows > 0 && shape.channels <= 4 && shape.pixel_stride == shape.channels;
  if (!dense || problem.has_prologue() || shape.dilation_h != 1 || shape.dilation_w != 1) return false;
  if (wgmma && (!device.wgmma || shape.filters <= 32)) return false;
  StemPlan plan;
  return describe(plan, problem, device, wgmma);
}

}  // namespace fastcnn::cuda
