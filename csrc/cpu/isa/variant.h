// The functions that every instruction-set variant defines, in its own namespace; table.cpp gathers them.
#pragma once

#include "table.h"

namespace fastcnn::cpu::FASTCNN_ISA {

constexpr int kConv2dMaxChunk = 384;
int64_t conv2d_scratch_bytes(const Conv2dProblem& problem);
void conv2d_task(const Conv2dProblem& problem, int64_t index, void* scratch);
int64_t conv2d_grouped_scratch_bytes(const Conv2dProblem& problem);
void conv2d_grouped_task(const Conv2dProblem& problem, int64_t index, void* scratch);
int64_t winograd_scratch_bytes(const WinogradProblem& problem);
void winograd_task(const WinogradProblem& problem, int64_t index, void* scratch);
int64_t winograd_plain_scratch_bytes(const WinogradProblem& problem);
void winograd_plain_task(const WinogradProblem& problem, int64_t index, void* scratch);
int64_t winograd_grouped_scratch_bytes(const WinogradProblem& problem);
void winograd_grouped_task(const WinogradProblem& problem, int64_t index, void* scratch);
int64_t winograd_rows_scratch_bytes(const WinogradRowsProblem& problem);
void winograd_rows_task(const WinogradRowsProblem& problem, int64_t index, void* scratch);
int64_t strassen_scratch_bytes(const StrassenProblem& problem);
void strassen_task(const StrassenProblem& problem, int64_t index, void* scratch);
void pool2d_task(const Pool2dProblem& problem, int64_t index);
int64_t local_response_norm_scratch_bytes(const LocalResponseNormProblem& problem);
void local_response_norm_task(const LocalResponseNormProblem& problem, int64_t index, void* scratch);
int64_t linear_scratch_bytes(const LinearProblem& problem);
void linear_pack_task(const LinearProblem& problem, float* packed, int64_t index);
void linear_few_rows_task(const LinearProblem& problem, int64_t index);
void linear_short_task(const LinearShortProblem& problem, int64_t index);
int64_t linear_by_input_scratch_bytes(const LinearByInputProblem& problem);
void linear_by_input_task(const LinearByInputProblem& problem, int64_t index, void* scratch);
void linear_many_rows_task(const LinearProblem& problem, const float* packed, int64_t index, void* scratch);
void channel_affine_task(const ChannelAffineProblem& problem, int64_t index);
void map_block(const MapProblem& problem);
void rows_task(const RowsProblem& problem, int64_t index);
void batch_statistics_task(const BatchStatisticsProblem& problem, int64_t index);
double fma_loop(int64_t iterations, float* mean);
double bf16_dot_loop(int64_t iterations, float* mean);
float read_loop(const float* data, int64_t count);

}  // namespace fastcnn::cpu::FASTCNN_ISA
