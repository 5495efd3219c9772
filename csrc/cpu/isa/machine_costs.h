// The costs (costs.h) of the instruction set this file is compiled for.
#pragma once

#include "costs.h"
#include "vector.h"

namespace fastcnn::cpu::FASTCNN_ISA {

// The portable kernels have those of AVX-512.
static constexpr MachineCosts machine_costs() {
  MachineCosts costs;
#if defined(__AVX2__) && !defined(__AVX512F__)
  // Zen 3: two 256-bit FMA units, 512 KiB of L2, 32 MiB of L3 shared, memory at some 8 bytes a cycle for both threads:
  // the choices are right with 7 for each, as other weights wait in L3.
  costs.far_bytes_per_cycle = 7;
  costs.near_weights = 640 << 10;
  costs.winograd.strided_product = 1.46;
  costs.winograd.plain = 1.8;
  costs.winograd.panel_l2 = 384 << 10;
  costs.winograd.columns_at_once = 4;
  costs.rows.l2 = 416 << 10;
  costs.rows.panel_bytes = 280 << 10;
  costs.rows.sum_bytes = 48 << 10;
  costs.rows.product = 1.02;
  costs.strassen.l2 = 350 << 10;
  costs.strassen.near_input = 1 << 20;
  costs.strassen.product = 1.35;
#endif
  return costs;
}

}  // namespace fastcnn::cpu::FASTCNN_ISA
