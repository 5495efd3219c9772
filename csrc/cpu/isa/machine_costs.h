// The costs (costs.h) of the instruction set this file is compiled for.
#pragma once

#include "costs.h"
#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {

#if defined(__AVX2__) && !defined(__AVX512F__)
// Zen 3: two 256-bit FMA units, 512 KiB of L2, 32 MiB of L3 shared, memory at some 8 bytes a cycle
// for both threads: the choices are right with 7 for each, as other weights wait in L3.
constexpr MachineCosts kMachineCosts = {
    6000,  // phase
    1000,  // task
    12,    // near_bytes_per_cycle
    7,     // far_bytes_per_cycle
    {1.14},
    // winograd: l2, l3, there, back, strided_there, product, strided_product,
    // strided_micro_tile, plain
    {832 << 10, 16 << 20, {0, 0, 0, 80, 90, 0, 270, 270}, {0, 0, 0, 60, 90, 0, 270, 330}, 2, 1.06, 1.4, 45, 1.8},
    // rows: l2, panel_bytes, sum_bytes, there, back, product, micro_tile
    {416 << 10, 280 << 10, 48 << 10, 36, 44, 1.02, 40},
    // strassen: l2, near_input, near_sums, far_sums, end, form, step, product
    {350 << 10, 1 << 20, 5, 10, 3, 2.5, 30, 1.35},
};
#else
// Measured with AVX-512 on Zen 5: two 512-bit FMA units, 1 MiB of L2, 32 MiB of L3 shared, memory at some 12 bytes a
// cycle. The portable kernels have them too.
constexpr MachineCosts kMachineCosts = {
    6000,  // phase
    1000,  // task
    12,    // near_bytes_per_cycle
    9,     // far_bytes_per_cycle
    {1.14},
    // winograd: l2, l3, there, back, strided_there, product, strided_product,
    // strided_micro_tile, plain
    {832 << 10, 16 << 20, {0, 0, 0, 80, 90, 0, 270, 270}, {0, 0, 0, 60, 90, 0, 270, 330}, 2, 1.06, 1.06, 45, 1},
    // rows: l2, panel_bytes, sum_bytes, there, back, product, micro_tile
    {832 << 10, 640 << 10, 64 << 10, 36, 44, 1.16, 40},
    // strassen: l2, near_input, near_sums, far_sums, end, form, step, product
    {700 << 10, 2 << 20, 5, 10, 3, 2.5, 30, 1.04},
};
#endif

}  // namespace fastcnn::cpu::FASTCNN_ISA
