// Loads, stores and conversions. Arithmetic is fp32; storage is fp32, bf16 or fp16.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace fastcnn::cuda {

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ __forceinline__ float to_float(__half x) {
  return __half2float(x);
}

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// max(x, 0) that lets NaN through, as torch.relu does.
__device__ __forceinline__ float relu(float x) {
  return x < 0.0f ? 0.0f : x;
}

// 1 / x for a positive normal x, to within rounding: the hardware's estimate and one Newton step. IEEE division would
// bring a slow path for denormals along, as a call in the middle of the loop.
__device__ __forceinline__ float reciprocal(float x) {
  const float estimate = __fdividef(1.0f, x);
  return fmaf(estimate, fmaf(-x, estimate, 1.0f), estimate);
}

// Elements in 16 bytes.
template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// 16 bytes of global memory in one access. Through an intrinsic, because the compiler may split a plain uint4 into
// four.
__device__ __forceinline__ uint4 load_16(const void* source) {
  return __ldca(static_cast<const uint4*>(source));
}
__device__ __forceinline__ void store_16(void* destination, uint4 value) {
  __stwb(static_cast<uint4*>(destination), value);
}

// kCount elements as fp32: one 16-byte access, or one element.
template <int kCount, typename T>
__device__ __forceinline__ void load(float (&x)[kCount], const T* source) {
  static_assert(kCount == 1 || kCount == kVector<T>, "one element or 16 bytes");
  if constexpr (kCount == 1) {
    x[0] = to_float(*source);
  } else {
    const uint4 raw = load_16(source);
    T values[kCount];
    memcpy(values, &raw, 16);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = to_float(values[i]);
  }
}

template <int kCount, typename T>
__device__ __forceinline__ void store(T* destination, const float (&x)[kCount]) {
  static_assert(kCount == 1 || kCount == kVector<T>, "one element or 16 bytes");
  if constexpr (kCount == 1) {
    *destination = from_float<T>(x[0]);
  } else {
    T values[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = from_float<T>(x[i]);
    uint4 raw;
    memcpy(&raw, values, 16);
    store_16(destination, raw);
  }
}

// kCount elements as they lie in memory. A thread that loads several before it converts the first has all of them in
// flight; loads that are converted one by one wait for each other.
template <int kCount, typename T>
struct Raw {
  static_assert(kCount == 1 || kCount == kVector<T>, "one element or 16 bytes");
  std::conditional_t<kCount == 1, T, uint4> bits;
};

// Through L1.
template <int kCount, typename T>
__device__ __forceinline__ Raw<kCount, T> load_raw_cached(const T* source) {
  if constexpr (kCount == 1) {
    return {*source};
  } else {
    return {*reinterpret_cast<const uint4*>(source)};
  }
}

// Of memory that is read once: past L1.
template <int kCount, typename T>
__device__ __forceinline__ Raw<kCount, T> load_raw(const T* source) {
  if constexpr (kCount == 1) {
    return {*source};
  } else {
    return {__ldcg(reinterpret_cast<const uint4*>(source))};
  }
}

template <int kCount, typename T>
__device__ __forceinline__ void convert(float (&x)[kCount], const Raw<kCount, T>& raw) {
  T values[kCount];
  memcpy(values, &raw.bits, sizeof(values));
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = to_float(values[i]);
}

// Per-channel fp32 coefficients, `otherwise` where the vector is absent.
template <int kCount>
__device__ __forceinline__ void load_coefficients(float (&x)[kCount], const float* vector, int64_t first, int64_t count,
                                                  float otherwise) {
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    x[i] = vector != nullptr && first + i < count ? __ldca(vector + first + i) : otherwise;
}

}  // namespace fastcnn::cuda
