// What the instructions of csrc/cuda/device/tma.cuh do, from the PTX manual (sections "mbarrier",
// "cp.async.bulk.tensor" and "im2col mode"), and tensor maps as plain structs.
//
// A copy lands at once, or as late as the program allows: when a thread waits for a barrier whose phase cannot complete
// otherwise. A store reads shared memory at once, or when its thread waits for it.
#pragma once

#include <cuda_runtime.h>

#include "emulated_wgmma.h"
#include "tensor_map.h"

namespace fastcnn::cuda {

namespace emulated {

struct Map {  // a TensorMap's opaque words hold its address
  void* data;
  int64_t sizes[4], strides[4];  // elements; innermost first
  int32_t box[4];                // of a tiled map
  int32_t rank;                  // 2, 3, 4
  int32_t row;                   // values in a row of shared memory: 64, 32
  bool pixels;                   // walks a convolution's pixels, no box
  int32_t first_w, first_h, columns, rows, stride_w, stride_h, tile_pixels;
};

const Map& map_of(const TensorMap& map);
TensorMap remember(const Map& map);

void barrier_init(uint32_t barrier, int arrivals);
void barrier_arrive(uint32_t barrier, int expected_bytes);
void barrier_wait(uint32_t barrier, uint32_t parity);
void copy_pixels(uint32_t destination, const Map& map, uint32_t barrier, int c, int w, int h, int n, int shift_w,
                 int shift_h);
void copy_box(uint32_t destination, const Map& map, uint32_t barrier, int x, int y, int z, int u);
void store_box(const Map& map, uint32_t source, int x, int y, int z, int u);
void multipliers_barrier();
void store_commit();
void store_wait(int pending);

}  // namespace emulated

inline void barrier_init(uint32_t barrier, int arrivals) {
  emulated::barrier_init(barrier, arrivals);
}
inline void barrier_init_fence() {}
inline void barrier_arrive(uint32_t barrier) {
  emulated::barrier_arrive(barrier, 0);
}
inline void barrier_arrive_expecting(uint32_t barrier, int bytes) {
  emulated::barrier_arrive(barrier, bytes);
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  emulated::barrier_wait(barrier, parity);
}
inline void prefetch_tensor_map(const TensorMap&) {}

inline void copy_pixels(uint32_t destination, const TensorMap& map, uint32_t barrier, int c, int w, int h, int n,
                        int shift_w, int shift_h) {
  emulated::copy_pixels(destination, emulated::map_of(map), barrier, c, w, h, n, shift_w, shift_h);
}
inline void copy_box_4d(uint32_t destination, const TensorMap& map, uint32_t barrier, int x, int y, int z, int u) {
  emulated::copy_box(destination, emulated::map_of(map), barrier, x, y, z, u);
}
inline void copy_box_3d(uint32_t destination, const TensorMap& map, uint32_t barrier, int x, int y, int z) {
  emulated::copy_box(destination, emulated::map_of(map), barrier, x, y, z, 0);
}
inline void copy_box_2d(uint32_t destination, const TensorMap& map, uint32_t barrier, int x, int y) {
  emulated::copy_box(destination, emulated::map_of(map), barrier, x, y, 0, 0);
}
inline void store_box_4d(const TensorMap& map, uint32_t source, int x, int y, int z, int u) {
  if (emulator::current->unfenced) emulator::fail("a bulk store reads shared memory that was not fenced for it");
  emulated::store_box(emulated::map_of(map), source, x, y, z, u);
}
inline void store_box_2d(const TensorMap& map, uint32_t source, int x, int y) {
  store_box_4d(map, source, x, y, 0, 0);
}
inline void store_commit() {
  emulated::store_commit();
}
template <int kPending = 0>
void store_wait_read() {
  emulated::store_wait(kPending);
}
inline void store_wait() {
  emulated::store_wait(0);
}

inline int uniform(int value) {
  return value;
}
inline void warpgroup_barrier(int) {
  emulator::collective(emulator::Scope::warpgroup, nullptr, nullptr);
}
inline void multipliers_barrier() {
  emulated::multipliers_barrier();
}

inline void cluster_arrive() {
  emulator::cluster_arrive();
}
inline void cluster_wait() {
  emulator::cluster_wait();
}
inline uint32_t cluster_address(uint32_t address, int rank) {
  return emulator::cluster_address(address, rank);
}
inline float4 load_cluster_16(uint32_t address) {
  float4 value;
  std::memcpy(&value, emulator::cluster_pointer(address, 16), 16);
  return value;
}

template <int kRegisters>
void release_registers() {}
template <int kRegisters>
void claim_registers() {}

inline uint4 load_shared_16(uint32_t address) {
  uint4 value;
  std::memcpy(&value, emulator::shared_pointer(address, 16), 16);
  return value;
}
inline uint32_t load_shared_4(uint32_t address) {
  uint32_t value;
  std::memcpy(&value, emulator::shared_pointer(address, 4), 4);
  return value;
}
inline void store_shared_8(uint32_t address, float2 value) {
  std::memcpy(emulator::shared_pointer(address, 8), &value, 8);
  emulator::current->unfenced = true;
}
inline void store_shared_4(uint32_t address, uint32_t value) {
  std::memcpy(emulator::shared_pointer(address, 4), &value, 4);
  emulator::current->unfenced = true;
}

}  // namespace fastcnn::cuda
