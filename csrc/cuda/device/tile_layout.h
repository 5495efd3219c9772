// Where a tile's values sit in shared memory and in a warp's registers.
//
// A tile is rows of kRowBytes (64 or 128), cut into 16-byte chunks. ldmatrix reads 8 consecutive rows at one chunk;
// laid out plainly they would fall into the same banks, so the chunk index is xor-ed with row bits ("swizzled"):
//   128-byte rows: chunk ^ (row & 7)         the pattern wgmma calls "128B swizzle"
//    64-byte rows: chunk ^ ((row >> 1) & 3)  two rows share the 128 bytes of one pass over the banks
//
// Lane maps below follow the PTX manual, "Matrix Fragments for mma.m16n8k16" and "ldmatrix".
#pragma once

#include <cstdint>

#include "portable.h"

namespace fastcnn::cuda {

template <int kRowBytes>
FASTCNN_HD uint32_t tile_offset(int row, int chunk) {
  static_assert(kRowBytes == 64 || kRowBytes == 128, "rows are 64 or 128 bytes");
  const int swizzle = kRowBytes == 128 ? (row & 7) : ((row >> 1) & 3);
  return static_cast<uint32_t>(row * kRowBytes + ((chunk ^ swizzle) << 4));
}

// ldmatrix.x4 takes its 32 row addresses from the 32 lanes. For an operand tile of 16 rows by 32 bytes:
// A (16 rows of m): registers 0..3 become rows 0-7 | rows 8-15 | rows 0-7, second chunk | rows 8-15, second chunk.
FASTCNN_HD int a_lane_row(int lane) {
  return lane & 15;
}
FASTCNN_HD int a_lane_chunk(int lane) {
  return lane >> 4;
}
// B (16 rows of n, two mma columns of 8): registers 0, 1 are the first 8 rows' two chunks, 2, 3 the next 8 rows'.
FASTCNN_HD int b_lane_row(int lane) {
  return (lane & 7) + ((lane >> 4) << 3);
}
FASTCNN_HD int b_lane_chunk(int lane) {
  return (lane >> 3) & 1;
}

// Accumulator of a 16x8 product (and each 8 columns of a wgmma warp): register i of a lane is row, column
FASTCNN_HD int accumulator_row(int lane, int i) {
  return (lane >> 2) + ((i >> 1) << 3);
}
FASTCNN_HD int accumulator_column(int lane, int i) {
  return ((lane & 3) << 1) + (i & 1);
}

// Epilogue slab: 16 rows by 32 fp32 columns per warp. The row pitch of 40 floats spreads a half-warp's 8-byte stores
// over all 32 banks.
constexpr int kSlabRows = 16;
constexpr int kSlabColumns = 32;
constexpr int kSlabPitch = 40;
constexpr int kSlabBytes = kSlabRows * kSlabPitch * 4;

// wgmma's shared-memory descriptor for a K-major tile with rows of 128 or 64 bytes in the swizzle of as many bytes,
// from PTX "Matrix Descriptor Format": address / 16 in bits 0-13; leading offset (unused here, 1) in 16-29; stride
// between groups of 8 rows / 16 in 32-45; swizzle mode (1: 128B, 2: 64B) in 62-63. The tile starts on a boundary of 8
// rows; 16 values of k further is 32 bytes further, the hardware applies the xor to the final address.
template <int kRowBytes = 128>
FASTCNN_HD uint64_t wgmma_descriptor(uint32_t shared_address) {
  static_assert(kRowBytes == 64 || kRowBytes == 128, "rows are 64 or 128 bytes");
  return static_cast<uint64_t>((shared_address & 0x3FFFF) >> 4) | (uint64_t{1} << 16) |
         (uint64_t{kRowBytes * 8 >> 4} << 32) | (uint64_t{kRowBytes == 128 ? 1 : 2} << 62);
}

}  // namespace fastcnn::cuda
