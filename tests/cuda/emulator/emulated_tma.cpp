// Bulk copies, their barriers and their maps. See emulated_tma.h.
#include "emulated_tma.h"

#include <map>
#include <memory>

#include "tensor_map.h"

namespace fastcnn::cuda {

namespace emulated {

namespace {

struct Barrier {
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;                                          // announced and not yet landed
  uint32_t parity = 0;                                        // of the running phase
  std::vector<std::pair<int, std::function<void()>>> copies;  // in flight: bytes, and what lands them
};

std::map<std::pair<unsigned, uint32_t>, Barrier> barriers;  // by the block's rank and the address
std::vector<std::unique_ptr<Map>> maps;

struct Store {
  const emulator::Thread* thread;
  int group;  // of the thread's groups of stores
  std::function<void()> run;
};
std::vector<Store> stores;

Barrier& barrier_at(uint32_t address) {
  emulator::shared_pointer(address, 8);
  const auto found = barriers.find({emulator::block().rank, address});
  if (found == barriers.end()) emulator::fail("a barrier that was never initialised");
  return found->second;
}

void complete_if_due(Barrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.arrivals;
  barrier.parity ^= 1;
  emulator::note_progress();
}

void land(Barrier& barrier, int bytes, const std::function<void()>& copy) {
  copy();
  barrier.bytes -= bytes;
  complete_if_due(barrier);
}

void issue(uint32_t address, int bytes, std::function<void()> copy) {
  Barrier& barrier = barrier_at(address);
  if (emulator::eager) {
    land(barrier, bytes, copy);
  } else {
    barrier.copies.emplace_back(bytes, std::move(copy));
  }
  emulator::note_progress();
}

// Bytes [at, ...) of row `row` of a copy in shared memory. A map's rows are 128 bytes in the 128B swizzle, or 64 in the
// 64B swizzle, whose patterns repeat after eight rows.
uint32_t swizzled(const Map& map, uint32_t start, int row, int at) {
  if (start % (map.row * 16) != 0) emulator::fail("a swizzle starts on a boundary of eight rows");
  const uint32_t address = start + row * map.row * 2 + at;
  return address ^ (address >> 7 & (map.row == 64 ? 7 : 3)) << 4;
}

// Row `row` of a copy's rows, `from` null for zeros; `values` of it are real.
void place_row(const Map& map, uint32_t destination, int row, const unsigned char* from, int values) {
  for (int chunk = 0; chunk < map.row / 8; ++chunk) {
    unsigned char line[16] = {};
    for (int i = 0; i < 8; ++i) {
      const int value = chunk * 8 + i;
      if (from != nullptr && value < values) std::memcpy(line + 2 * i, from + 2 * value, 2);
    }
    std::memcpy(emulator::shared_pointer(swizzled(map, destination, row, chunk * 16), 16), line, 16);
  }
}

int values_from(const Map& map, int x) {
  const int64_t left = map.sizes[0] - x;
  return left < 0 ? 0 : left > map.row ? map.row : static_cast<int>(left);
}

const unsigned char* element(const Map& map, int64_t x, int64_t y, int64_t z, int64_t u) {
  const int64_t index = x + y * map.strides[1] + z * map.strides[2] + u * map.strides[3];
  return static_cast<const unsigned char*>(map.data) + 2 * index;
}

}  // namespace

const Map& map_of(const TensorMap& map) {
  const Map* found;
  std::memcpy(&found, map.opaque, sizeof(found));
  return *found;
}

TensorMap remember(const Map& map) {
  if (reinterpret_cast<uintptr_t>(map.data) % 16 != 0) emulator::fail("a tensor map's address is misaligned");
  for (int i = 1; i < map.rank; ++i) {
    if (map.strides[i] * 2 % 16 != 0) emulator::fail("a tensor map's stride is no multiple of 16 bytes");
  }
  maps.push_back(std::make_unique<Map>(map));
  const Map* pointer = maps.back().get();
  TensorMap result = {};
  std::memcpy(result.opaque, &pointer, sizeof(pointer));
  return result;
}

void barrier_init(uint32_t address, int arrivals) {
  emulator::shared_pointer(address, 8);
  Barrier fresh;
  fresh.arrivals = fresh.pending = arrivals;
  barriers[{emulator::block().rank, address}] = std::move(fresh);
}

void barrier_arrive(uint32_t address, int expected_bytes) {
  Barrier& barrier = barrier_at(address);
  if (barrier.pending == 0) emulator::fail("more arrivals than a barrier expects");
  barrier.bytes += expected_bytes;
  --barrier.pending;
  emulator::note_progress();
  complete_if_due(barrier);
}

void barrier_wait(uint32_t address, uint32_t parity) {
  while (barrier_at(address).parity == parity) {
    Barrier& barrier = barrier_at(address);
    if (barrier.pending == 0 && !barrier.copies.empty()) {
      auto copies = std::move(barrier.copies);
      barrier.copies.clear();
      for (const auto& [bytes, copy] : copies) land(barrier, bytes, copy);
    } else {
      emulator::yield();
    }
  }
}

void copy_pixels(uint32_t destination, const Map& map, uint32_t barrier, int c, int w, int h, int n, int shift_w,
                 int shift_h) {
  if (!map.pixels) emulator::fail("copy_pixels wants a map of pixels");
  issue(barrier, map.tile_pixels * map.row * 2, [=, &map] {
    int64_t at_w = w, at_h = h, at_n = n;
    const int64_t end_w = map.first_w + static_cast<int64_t>(map.columns) * map.stride_w;
    const int64_t end_h = map.first_h + static_cast<int64_t>(map.rows) * map.stride_h;
    for (int pixel = 0; pixel < map.tile_pixels; ++pixel) {
      const int64_t x = at_w + shift_w, y = at_h + shift_h;
      const bool real = x >= 0 && x < map.sizes[1] && y >= 0 && y < map.sizes[2] && at_n < map.sizes[3];
      place_row(map, destination, pixel, real ? element(map, c, x, y, at_n) : nullptr, values_from(map, c));
      at_w += map.stride_w;
      if (at_w < end_w) continue;
      at_w = map.first_w;
      at_h += map.stride_h;
      if (at_h < end_h) continue;
      at_h = map.first_h;
      ++at_n;
    }
  });
}

// Calls `visit(row, element or null)` for each row of a box's shared memory: of its last axis for 2 and 3 axes, of the
// three outer ones for 4.
template <typename Visit>
void for_each_row(const Map& map, int x, int y, int z, int u, const Visit& visit) {
  const bool image = map.rank == 4;
  const int rows_y = map.rank == 3 ? 1 : map.box[1], rows_z = image ? map.box[2] : map.rank == 3 ? map.box[2] : 1;
  const int rows_u = image ? map.box[3] : 1;
  int row = 0;
  for (int c = 0; c < rows_u; ++c) {
    for (int b = 0; b < rows_z; ++b) {
      for (int a = 0; a < rows_y; ++a, ++row) {
        const int64_t at_y = y + a, at_z = z + b, at_u = u + c;
        const bool real = at_y >= 0 && at_y < map.sizes[1] && (map.rank < 3 || (at_z >= 0 && at_z < map.sizes[2])) &&
                          (!image || (at_u >= 0 && at_u < map.sizes[3]));
        visit(row, real ? element(map, x, at_y, at_z, at_u) : nullptr);
      }
    }
  }
}

int rows_of_box(const Map& map) {
  return (map.rank == 3 ? 1 : map.box[1]) * (map.rank >= 3 ? map.box[2] : 1) * (map.rank == 4 ? map.box[3] : 1);
}

void copy_box(uint32_t destination, const Map& map, uint32_t barrier, int x, int y, int z, int u) {
  if (map.pixels) emulator::fail("copy_box wants a map of boxes");
  issue(barrier, rows_of_box(map) * map.row * 2, [=, &map] {
    for_each_row(map, x, y, z, u, [&](int row, const unsigned char* from) {
      place_row(map, destination, row, from, values_from(map, x));
    });
  });
}

void store_box(const Map& map, uint32_t source, int x, int y, int z, int u) {
  const auto run = [=, &map] {
    for_each_row(map, x, y, z, u, [&](int row, const unsigned char* to) {
      for (int value = 0; to != nullptr && value < values_from(map, x); ++value) {
        const unsigned char* from = emulator::shared_pointer(swizzled(map, source, row, value * 2), 2);
        std::memcpy(const_cast<unsigned char*>(to) + 2 * value, from, 2);
      }
    });
  };
  if (emulator::eager) {
    run();
  } else {
    stores.push_back({emulator::current, emulator::current->store_groups, run});
  }
}

void multipliers_barrier() {
  emulator::Meeting& meeting = emulator::block().multipliers;
  const unsigned long mine = meeting.generation;
  if (++meeting.arrived == 256) {
    meeting.arrived = 0;
    ++meeting.generation;
    emulator::note_progress();
  }
  while (meeting.generation == mine) emulator::yield();
}

void store_commit() {
  ++emulator::current->store_groups;
}

// Runs what this thread has committed, but for the last `pending` groups.
void store_wait(int pending) {
  const int last = emulator::current->store_groups - pending;
  std::vector<Store> left;
  for (Store& store : stores) {
    if (store.thread == emulator::current && store.group < last) {
      store.run();
    } else {
      left.push_back(std::move(store));
    }
  }
  stores = std::move(left);
}

}  // namespace emulated

TensorMap pixel_map(const TensorView& image, const PixelMap& pixels) {
  emulated::Map map = {};
  map.data = image.data;
  map.rank = 4;
  map.pixels = true;
  const int64_t sizes[4] = {image.c, image.w, image.h, image.n};
  const int64_t strides[4] = {1, image.pixel_stride, image.pixel_stride * image.w,
                              image.pixel_stride * image.w * image.h};
  for (int i = 0; i < 4; ++i) {
    map.sizes[i] = sizes[i];
    map.strides[i] = strides[i];
  }
  map.first_w = static_cast<int32_t>(pixels.first_w);
  map.first_h = static_cast<int32_t>(pixels.first_h);
  map.columns = static_cast<int32_t>(pixels.columns);
  map.rows = static_cast<int32_t>(pixels.rows);
  map.stride_w = static_cast<int32_t>(pixels.stride_w);
  map.stride_h = static_cast<int32_t>(pixels.stride_h);
  map.tile_pixels = pixels.tile_pixels;
  map.row = pixels.row;
  return emulated::remember(map);
}

TensorMap filter_map(const void* weight, DType, int64_t filters, int64_t taps, int64_t channels, int64_t row_stride,
                     int tile_filters, int row) {
  emulated::Map map = {};
  map.row = row;
  map.data = const_cast<void*>(weight);
  map.rank = 3;
  const int64_t sizes[3] = {channels, taps, filters}, strides[3] = {1, channels, row_stride};
  for (int i = 0; i < 3; ++i) {
    map.sizes[i] = sizes[i];
    map.strides[i] = strides[i];
  }
  map.box[2] = tile_filters;
  return emulated::remember(map);
}

TensorMap image_map(const TensorView& view, int box_w, int box_h, int box_n) {
  emulated::Map map = {};
  map.row = kTensorMapRow;
  map.data = view.data;
  map.rank = 4;
  const int64_t sizes[4] = {view.c, view.w, view.h, view.n};
  const int64_t strides[4] = {1, view.pixel_stride, view.pixel_stride * view.w, view.pixel_stride * view.w * view.h};
  for (int i = 0; i < 4; ++i) {
    map.sizes[i] = sizes[i];
    map.strides[i] = strides[i];
  }
  map.box[1] = box_w;
  map.box[2] = box_h;
  map.box[3] = box_n;
  for (int i = 1; i < 4; ++i) {
    if (map.box[i] < 1 || map.box[i] > 256) emulator::fail("a box has 1 to 256 pixels along each axis");
  }
  return emulated::remember(map);
}

TensorMap matrix_map(const TensorView& view, int tile_pixels, bool) {
  emulated::Map map = {};
  map.row = kTensorMapRow;
  map.data = view.data;
  map.rank = 2;
  map.sizes[0] = view.c;
  map.sizes[1] = view.pixels();
  map.strides[0] = 1;
  map.strides[1] = view.pixel_stride;
  map.box[1] = tile_pixels;
  return emulated::remember(map);
}

}  // namespace fastcnn::cuda
