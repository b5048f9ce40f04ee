// SPDX-License-Identifier: Apache-2.0
// Vectors of the widest kind that the translation unit's instruction set has. Only for _cpu.cpp
// files: everything lives in a namespace of that instruction set, so that no linker can put an
// AVX-512 body where a baseline caller expects a baseline one.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include <immintrin.h>

#include "core/dtype.h"
#include "core/head_tensor.h"

namespace kvevict {
inline namespace KVEVICT_ISA {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t IntVec __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint32_t UintVec __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t HalfBits __attribute__((vector_size(kLanes * sizeof(uint16_t))));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename V, typename T>
inline V load(const T* source) {
  V v;
  memcpy(&v, source, sizeof(v));
  return v;
}

template <typename V, typename T>
inline void store(T* destination, const V& v) {
  memcpy(destination, &v, sizeof(v));
}

// The first elements of a vector, count of them or all; zeros behind them.
template <typename V, typename T>
inline V load_up_to(const T* source, int64_t count) {
  if (count >= kLanes) return load<V>(source);
  V v = {};
  memcpy(&v, source, count * sizeof(T));
  return v;
}
template <typename V, typename T>
inline void store_up_to(T* destination, int64_t count, const V& v) {
  if (count >= kLanes) return store(destination, v);
  memcpy(destination, &v, count * sizeof(T));
}

inline Vec broadcast(float x) { return x - Vec{}; }
inline IntVec broadcast(int32_t x) { return x - IntVec{}; }
inline UintVec broadcast(uint32_t x) { return x - UintVec{}; }

inline IntVec lane_indices() {
  IntVec v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

// Whether a lane is one of the first `count`.
inline IntVec first_lanes(int64_t count) {
  return lane_indices() < static_cast<int32_t>(count < kLanes ? count : kLanes);
}

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

inline float reduce_max(Vec v) {
  float result = v[0];
  for (int i = 1; i < kLanes; ++i) result = v[i] > result ? v[i] : result;
  return result;
}

// Adds the lanes pairwise: lane i to lane i + half, and so on.
inline float reduce_add(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// Bit i tells whether lane i of a comparison holds.
inline uint32_t to_bits(IntVec mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#else
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)mask));
#endif
}

inline bool any(IntVec mask) { return to_bits(mask) != 0; }

// 2^r for r in [-1/2, 1/2]: minimax with p(0) = 1, relative error 1.1e-8.
inline Vec exp2_fraction(Vec r) {
  Vec p = broadcast(0x1.4855c4p-13f);
  p = p * r + 0x1.5fd0eep-10f;
  p = p * r + 0x1.3b243cp-7f;
  p = p * r + 0x1.c6ad7ep-5f;
  p = p * r + 0x1.ebfbe4p-3f;
  p = p * r + 0x1.62e432p-1f;
  return p * r + 1.0f;
}

// 2^t within 2 ulp; 0 or subnormal below 2^-125, inf from 2^128, NaN for NaN.
inline Vec exp2(Vec t) {
#if defined(__AVX512F__)
  t = t < -200.0f ? broadcast(-200.0f) : t;
  const auto whole = (Vec)_mm512_roundscale_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT);
  return (Vec)_mm512_scalef_ps((__m512)exp2_fraction(t - whole), (__m512)whole);
#else
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  t = t > 128.0f ? broadcast(128.0f) : t;
  const Vec shifted = t + kRound;
  const Vec p = exp2_fraction(t - (shifted - kRound));
  const Vec result = bit_cast<Vec>(bit_cast<UintVec>(p) + (bit_cast<UintVec>(shifted) << 23));
  const Vec flushed = t < -125.0f ? Vec{} : result;
  return t != t ? t : flushed;
#endif
}

template <DType dtype>
inline const void* element_address(const HeadTensor& tensor, int64_t batch, int64_t head,
                                   int64_t index) {
  return static_cast<const char*>(tensor.data) +
         tensor.offset(batch, head, index) * kElementBytes<dtype>;
}

// kLanes elements of a tensor as floats.
template <DType dtype>
inline Vec load_as_float(const void* source, int64_t index) {
  if constexpr (dtype == DType::kFloat32) {
    return load<Vec>(static_cast<const float*>(source) + index);
  } else {
    const auto half = load<HalfBits>(static_cast<const uint16_t*>(source) + index);
#if defined(__AVX512F__)
    if constexpr (dtype == DType::kFloat16) return (Vec)_mm512_cvtph_ps((__m256i)half);
#elif defined(__F16C__)
    if constexpr (dtype == DType::kFloat16) return (Vec)_mm256_cvtph_ps((__m128i)half);
#endif
    const auto bits = __builtin_convertvector(half, UintVec);
    if constexpr (dtype == DType::kBFloat16) {
      return bit_cast<Vec>(bits << 16);
    } else {
      const UintVec magnitude = (bits & 0x7FFFu) << 13;
      const Vec scaled = bit_cast<Vec>(magnitude) * 0x1p112f;  // rebias; subnormals come out exact
      const UintVec special = (bits & 0x7C00u) == 0x7C00u ? broadcast(0x7F800000u) : UintVec{};
      return bit_cast<Vec>(bit_cast<UintVec>(scaled) | special | ((bits & 0x8000u) << 16));
    }
  }
}

// The nearest bfloat16 and float16 numbers, ties to even.
inline HalfBits round_to_bfloat16(Vec v) {
  const auto bits = bit_cast<UintVec>(v);
  const UintVec rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  return __builtin_convertvector(v != v ? bits >> 16 | 0x40u : rounded, HalfBits);
}

inline HalfBits round_to_float16(Vec v) {
#if defined(__AVX512F__)
  return (HalfBits)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (HalfBits)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  const auto bits = bit_cast<UintVec>(v);
  const UintVec magnitude = bits & 0x7FFFFFFFu;
  const UintVec normal = (magnitude - (112u << 23) + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
  // The last bit of numbers from 0.5 to 1 is worth as much as that of float16's subnormals.
  const auto shifted = bit_cast<UintVec>(bit_cast<Vec>(magnitude) + 0.5f);
  UintVec rounded = magnitude < 0x38800000u ? shifted - 0x3F000000u : normal;  // 2^-14
  rounded = magnitude >= 0x47800000u ? broadcast(0x7C00u) : rounded;           // 2^16
  rounded = v != v ? broadcast(0x7E00u) : rounded;
  return __builtin_convertvector(rounded | (bits >> 16 & 0x8000u), HalfBits);
#endif
}

// The opposite of load_as_float: kLanes elements of a tensor from floats, each rounded.
template <DType dtype>
inline void store_rounded(void* destination, int64_t index, Vec v) {
  if constexpr (dtype == DType::kFloat32) {
    store(static_cast<float*>(destination) + index, v);
  } else {
    const HalfBits half = dtype == DType::kBFloat16 ? round_to_bfloat16(v) : round_to_float16(v);
    store(static_cast<uint16_t*>(destination) + index, half);
  }
}

template <DType dtype>
inline float element_as_float(const void* source, int64_t index) {
  if constexpr (dtype == DType::kFloat32) {
    float element;
    memcpy(&element, static_cast<const char*>(source) + index * int64_t{sizeof(float)},
           sizeof(element));
    return element;
  } else {
    uint16_t lanes[kLanes] = {static_cast<const uint16_t*>(source)[index]};
    return load_as_float<dtype>(lanes, 0)[0];
  }
}

// The first `count` of kLanes elements; the others are 0.
template <DType dtype>
inline Vec load_some_as_float(const void* source, int64_t index, int64_t count) {
  constexpr int64_t kBytes = kElementBytes<dtype>;
  char lanes[kLanes * kBytes] = {};
  memcpy(lanes, static_cast<const char*>(source) + index * kBytes, count * kBytes);
  return load_as_float<dtype>(lanes, 0);
}

template <DType dtype>
inline void store_some_rounded(void* destination, int64_t index, int64_t count, Vec v) {
  constexpr int64_t kBytes = kElementBytes<dtype>;
  char lanes[kLanes * kBytes];
  store_rounded<dtype>(lanes, 0, v);
  memcpy(static_cast<char*>(destination) + index * kBytes, lanes, count * kBytes);
}

namespace detail {

template <typename V, int... lanes>
inline V interleave(V a, V b, int offset, std::integer_sequence<int, lanes...>) {
  return offset == 0
             ? __builtin_shufflevector(a, b, (lanes / 2 + lanes % 2 * kLanes)...)
             : __builtin_shufflevector(a, b, (lanes / 2 + lanes % 2 * kLanes + kLanes / 2)...);
}

}  // namespace detail

// Transposes kLanes vectors of kLanes lanes: log2(kLanes) rounds of perfect shuffles.
inline void transpose(Vec (&rows)[kLanes]) {
  using Lanes = std::make_integer_sequence<int, kLanes>;
#pragma GCC unroll 4
  for (int stride = 1; stride < kLanes; stride *= 2) {
    Vec next[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = detail::interleave(rows[i], rows[i + kLanes / 2], 0, Lanes{});
      next[2 * i + 1] = detail::interleave(rows[i], rows[i + kLanes / 2], 1, Lanes{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

// Lane i is reduce_add(rows[i]): as the transpose, but every round adds what it has shuffled.
inline Vec reduce_add(Vec (&rows)[kLanes]) {
  using Lanes = std::make_integer_sequence<int, kLanes>;
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      rows[i] = detail::interleave(rows[i], rows[i + half], 0, Lanes{}) +
                detail::interleave(rows[i], rows[i + half], 1, Lanes{});
    }
  }
  return rows[0];
}

}  // namespace KVEVICT_ISA
}  // namespace kvevict
