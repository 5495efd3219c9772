// Index arithmetic is shared between kernels and host tests: one macro marks a function usable on both sides.
#pragma once

#if defined(__CUDACC__)
#define FASTCNN_HD __host__ __device__ __forceinline__
#else
#define FASTCNN_HD inline
#endif
