// The functions of the instruction-set variant with bf16 dot products; table_bf16.cpp gathers them.
#pragma once

#include "conv2d_bf16.h"
#include "table.h"

namespace fastcnn::cpu::FASTCNN_ISA {

int64_t conv2d_bf16_scratch_bytes(const Conv2dBf16Problem& problem);
void conv2d_bf16_task(const Conv2dBf16Problem& problem, int64_t index, void* scratch);
void conv2d_grouped_bf16_task(const Conv2dBf16Problem& problem, int64_t index);
int64_t winograd_bf16_scratch_bytes(const WinogradProblem& problem);
void winograd_bf16_task(const WinogradProblem& problem, int64_t index, void* scratch);
void linear_few_rows_bf16_task(const LinearProblem& problem, int64_t index);
void linear_short_bf16_task(const LinearShortProblem& problem, int64_t index);

}  // namespace fastcnn::cpu::FASTCNN_ISA
