// The vector type of the instruction set this file is compiled for, by the compiler's own vector extension: one source
// serves AVX-512, AVX2 and whatever the plain target has (SSE2, NEON). Products are contracted into FMA by the
// compiler.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../../common/types.h"
#include "table.h"

#ifndef FASTCNN_ISA
#error "compile isa/ files with FASTCNN_ISA set to portable, avx2 or avx512"
#endif

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define FASTCNN_HAS_SHUFFLE 1
#endif
#endif

namespace fastcnn::cpu::FASTCNN_ISA {

#if defined(__AVX512F__)
constexpr int kVectorWidth = 16;
constexpr int kMicroRows = 14;  // 14 x 2 accumulators + 2 weights + 1 broadcast of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorWidth = 8;
constexpr int kMicroRows = 6;  // 6 x 2 accumulators + 2 weights + 1 broadcast of 16 registers
#elif defined(__aarch64__)
constexpr int kVectorWidth = 4;
constexpr int kMicroRows = 12;
#else
constexpr int kVectorWidth = 4;
constexpr int kMicroRows = 6;
#endif
// Whether conv2d_micro.h takes four steps of the reduction at a time.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr bool kStepsInFours = true;
#else
constexpr bool kStepsInFours = false;
#endif
#if defined(__AVX2__)
constexpr bool kPermutes = true;
#else
constexpr bool kPermutes = false;
#endif
// How a frozen model's fully connected weights are stored (table.h), and whether few input rows meet pieces of the
// weights in L1 (linear.cpp): input rows in tiles of 3, not of 6, pass by often.
#if defined(__AVX512BW__)
constexpr ShortFormat kShortFormat = ShortFormat::bytes;
constexpr bool kWeightsInL1 = false;
#elif defined(__AVX2__)
constexpr ShortFormat kShortFormat = ShortFormat::words;
constexpr bool kWeightsInL1 = true;
#else
constexpr ShortFormat kShortFormat = ShortFormat::none;
constexpr bool kWeightsInL1 = false;
#endif
// Zen 3 takes about 6 stores of vectors into its window of instructions. The 12 of a micro-tile in a row stop what
// follows until the first of them retires, and the FMA units run dry: 16 of 210 cycles for a chunk of 32 channels.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr bool kSpreadStores = true;
// With half the lanes a micro-tile is done sooner, and divisions that prepare it count.
constexpr bool kFewDivisions = true;
#else
constexpr bool kSpreadStores = false;
constexpr bool kFewDivisions = false;
#endif
constexpr int kMicroVectors = 2;
constexpr int kColumnBlock = kMicroVectors * kVectorWidth;

typedef float Vector __attribute__((vector_size(kVectorWidth * 4)));
typedef float UnalignedVector __attribute__((vector_size(kVectorWidth * 4), aligned(4), may_alias));

static inline Vector load(const float* p) {
  return *reinterpret_cast<const UnalignedVector*>(p);
}
static inline void store(float* p, Vector v) {
  *reinterpret_cast<UnalignedVector*>(p) = v;
}
static inline Vector broadcast(float x) {
  return x - Vector{};
}

// The same value. A product that passes through is rounded for itself: where a sum has two of them, the compiler would
// choose which one to contract into FMA, and could choose otherwise in another function.
static inline Vector rounded(Vector x) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(x));
#elif defined(__x86_64__)
  __asm__("" : "+x"(x));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x));
#endif
  return x;
}

// a * b + c, rounded once where there is an instruction for it.
static inline Vector fused(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
  return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
static inline Vector fused(float a, Vector b, Vector c) {
  return fused(broadcast(a), b, c);
}

// sum += a * b, in the register that holds the sum. Where there are 16 of them, a compiler that may put the result
// where a factor was moves values about.
static inline void add_product(Vector& sum, Vector a, Vector b) {
#if defined(__AVX512F__) || !defined(__FMA__)
  sum += a * b;
#else
  __asm__("vfmadd231ps %1, %2, %0" : "+x"(sum) : "x"(a), "x"(b));
#endif
}

// max(x, bound) that lets a NaN in x through.
static inline Vector at_least(Vector x, Vector bound) {
#if defined(__AVX512F__)
  return (Vector)_mm512_maskz_max_ps(0xffff, (__m512)bound, (__m512)x);  // where one is NaN: the second
#elif defined(__AVX2__)
  return (Vector)_mm256_max_ps((__m256)bound, (__m256)x);
#else
  return x < bound ? bound : x;
#endif
}
// As torch.relu.
static inline Vector relu(Vector x) {
  return at_least(x, Vector{});
}
static inline float relu(float x) {
  return x < 0.0f ? 0.0f : x;
}

static inline float bf16_to_float(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

// The larger one; NaN wins, as in max_pool2d.
static inline Vector larger(Vector a, Vector b) {
#if defined(__AVX512F__)
  const __m512 most = _mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);  // where one is NaN: b
  return (Vector)_mm512_mask_mov_ps(most, _mm512_cmp_ps_mask((__m512)a, (__m512)a, _CMP_UNORD_Q), (__m512)a);
#else
  return (a > b) | (a != a) ? a : b;
#endif
}

// Round to nearest even; NaN stays NaN.
static inline uint16_t float_to_bf16(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  const uint32_t rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
  return (word & 0x7fffffffu) > 0x7f800000u ? 0x7fc0 : static_cast<uint16_t>(rounded);
}

// ---- bf16 in memory, fp32 in registers ---------------------------------------------------------------------------

typedef uint32_t Words __attribute__((vector_size(kVectorWidth * 4)));
typedef uint16_t Halves __attribute__((vector_size(kVectorWidth * 2)));
typedef uint16_t UnalignedHalves __attribute__((vector_size(kVectorWidth * 2), aligned(2), may_alias));

// The compiler's own conversion takes vectors apart.
static inline Vector widened(Halves bits) {
#if defined(__AVX512F__)
  const Words words = (Words)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)bits);
#elif defined(__AVX2__)
  const Words words = (Words)_mm256_cvtepu16_epi32((__m128i)bits);
#else
  const Words words = __builtin_convertvector(bits, Words);
#endif
  return reinterpret_cast<Vector>(words << 16);
}

static inline Vector load(const uint16_t* p) {
  return widened(*reinterpret_cast<const UnalignedHalves*>(p));
}

// The bf16 nearest to each value (ties to even, NaN stays NaN) in the upper half of its word, zeros below.
static inline Words bf16_bits_high(Vector v) {
  const Words word = reinterpret_cast<Words>(v);
  const Words rounded = word + 0x7fffu + ((word >> 16) & 1u);
  return (v == v ? rounded : Words{} + 0x7fc00000u) & 0xffff0000u;
}

static inline void store(uint16_t* p, Vector v) {
#if defined(__AVX512BF16__)
  *reinterpret_cast<UnalignedHalves*>(p) = (Halves)_mm512_cvtneps_pbh((__m512)v);
#elif defined(__AVX512F__)
  *reinterpret_cast<UnalignedHalves*>(p) =
      (Halves)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)(bf16_bits_high(v) >> 16));
#else
  *reinterpret_cast<UnalignedHalves*>(p) = __builtin_convertvector(bf16_bits_high(v) >> 16, Halves);
#endif
}

// Two vectors of adjacent bf16 values, even ones in `even`, odd ones in `odd` (little-endian): half the work of two
// loads.
typedef uint32_t UnalignedWords __attribute__((vector_size(kVectorWidth * 4), aligned(2), may_alias));

static inline void load_pair(const uint16_t* p, Vector& even, Vector& odd) {
  const Words bits = *reinterpret_cast<const UnalignedWords*>(p);
  even = reinterpret_cast<Vector>(bits << 16);
  odd = reinterpret_cast<Vector>(bits & 0xffff0000u);
}

static inline void store_pair(uint16_t* p, Vector even, Vector odd) {
  *reinterpret_cast<UnalignedWords*>(p) = (bf16_bits_high(even) >> 16) | bf16_bits_high(odd);
}

static inline float load_one(const float* p) {
  return *p;
}
static inline float load_one(const uint16_t* p) {
  return bf16_to_float(*p);
}
static inline void store_one(float* p, float v) {
  *p = v;
}
static inline void store_one(uint16_t* p, float v) {
  *p = float_to_bf16(v);
}

// The first `count` < kVectorWidth lanes; the others read as zero and are not written.
template <typename T>
static inline Vector load_some(const T* p, int64_t count) {
  Vector v{};
  for (int64_t i = 0; i < count; ++i) v[i] = load_one(p + i);
  return v;
}

template <typename T>
static inline void store_some(T* p, Vector v, int64_t count) {
  for (int64_t i = 0; i < count; ++i) store_one(p + i, v[i]);
}

// v with its lanes [low, high) from p + low, ...; nothing else is read.
template <typename T>
static inline Vector load_range(Vector v, const T* p, int64_t low, int64_t high) {
  for (int64_t i = low; i < high; ++i) v[i] = load_one(p + i);
  return v;
}

#if defined(__AVX512F__)
static inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>((1u << count) - 1);
}

static inline Vector load_some(const float* p, int64_t count) {
  return reinterpret_cast<Vector>(_mm512_maskz_loadu_ps(first_lanes(count), p));
}

static inline Vector load_range(Vector v, const float* p, int64_t low, int64_t high) {
  const __mmask16 lanes = static_cast<__mmask16>((1u << high) - (1u << low));
  return reinterpret_cast<Vector>(_mm512_mask_loadu_ps(reinterpret_cast<__m512>(v), lanes, p));
}

static inline void store_some(float* p, Vector v, int64_t count) {
  _mm512_mask_storeu_ps(p, first_lanes(count), reinterpret_cast<__m512>(v));
}

static inline Vector load_some(const uint16_t* p, int64_t count) {
  return widened(reinterpret_cast<Halves>(_mm256_maskz_loadu_epi16(first_lanes(count), p)));
}
#elif defined(__AVX2__)
static inline __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

static inline Vector load_some(const float* p, int64_t count) {
  return reinterpret_cast<Vector>(_mm256_maskload_ps(p, first_lanes(count)));
}

static inline void store_some(float* p, Vector v, int64_t count) {
  _mm256_maskstore_ps(p, first_lanes(count), reinterpret_cast<__m256>(v));
}
#endif

}  // namespace fastcnn::cpu::FASTCNN_ISA
