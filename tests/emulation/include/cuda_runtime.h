// SPDX-License-Identifier: Apache-2.0
// In place of CUDA's header of this name: what kernels may use, on top of the emulator. What they
// may not use is not here (static __shared__, <<<>>>, float atomics, __activemask, clocks).
#pragma once

#include <driver_types.h>
#include <vector_types.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "emulation/emulator.h"
#include "emulation/warp.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) alignas(bytes)
#define __launch_bounds__(...)

extern const uint3 &threadIdx, &blockIdx;
extern const dim3 &blockDim, &gridDim;
inline constexpr int warpSize = 32;

// --- Host side -----------------------------------------------------------------------------------

// Parameters are copied when the kernel is launched, and once more for every thread.
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...));
  const std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
  return kvevict::emulation::launch(*config, reinterpret_cast<const void*>(kernel),
                                    (sizeof(Parameters) + ... + 0),
                                    [&] { std::apply(kernel, parameters); });
}

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute,
                                 int value) {
  return kvevict::emulation::set_attribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
  return kvevict::emulation::get_attribute(value, attribute);
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  memset(memory, value, bytes);
  return cudaSuccess;
}
// Launches report what went wrong themselves.
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : kvevict::emulation::last_error.c_str();
}

// --- Synchronization -----------------------------------------------------------------------------

inline void __syncthreads() { kvevict::emulation::barrier(); }
inline int __syncthreads_count(int predicate) {
  return kvevict::emulation::barrier(predicate != 0);
}
inline int __syncthreads_or(int predicate) {
  return kvevict::emulation::barrier(predicate != 0) != 0;
}
inline int __syncthreads_and(int predicate) {
  return kvevict::emulation::barrier(predicate == 0) == 0;
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) { kvevict::emulation::sync_warp(mask); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { kvevict::emulation::sleep(); }
[[noreturn]] inline void __trap() { kvevict::emulation::fail("__trap"); }

// Kernels that may start early wait for, and release, their neighbors: launches never overlap here.
inline void cudaGridDependencySynchronize() {}
inline void cudaTriggerProgrammaticLaunchCompletion() {}

// --- Warps ---------------------------------------------------------------------------------------

namespace kvevict::emulation {

template <typename T>
T shuffle_value(Shuffle kind, unsigned mask, T value, int argument, int width) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = shuffle(kind, mask, bits, argument, width);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace kvevict::emulation

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  using kvevict::emulation::Shuffle;
  return kvevict::emulation::shuffle_value(Shuffle::kIndex, mask, value, lane, width);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  using kvevict::emulation::Shuffle;
  return kvevict::emulation::shuffle_value(Shuffle::kUp, mask, value, static_cast<int>(delta),
                                           width);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  using kvevict::emulation::Shuffle;
  return kvevict::emulation::shuffle_value(Shuffle::kDown, mask, value, static_cast<int>(delta),
                                           width);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  using kvevict::emulation::Shuffle;
  return kvevict::emulation::shuffle_value(Shuffle::kXor, mask, value, lane_mask, width);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return kvevict::emulation::ballot(mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) {
  return kvevict::emulation::ballot(mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return kvevict::emulation::ballot(mask, predicate == 0) == 0;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
  static_assert(std::is_integral_v<T> && sizeof(T) >= 4);
  return kvevict::emulation::match_any(mask, static_cast<uint64_t>(value));
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return kvevict::emulation::reduce_unsigned(kvevict::emulation::Reduction::kAdd, mask, value);
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  return kvevict::emulation::reduce_unsigned(kvevict::emulation::Reduction::kMin, mask, value);
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return kvevict::emulation::reduce_unsigned(kvevict::emulation::Reduction::kMax, mask, value);
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return kvevict::emulation::reduce_unsigned(kvevict::emulation::Reduction::kAnd, mask, value);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return kvevict::emulation::reduce_unsigned(kvevict::emulation::Reduction::kOr, mask, value);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value) {
  return kvevict::emulation::reduce_unsigned(kvevict::emulation::Reduction::kXor, mask, value);
}
inline int __reduce_add_sync(unsigned mask, int value) {
  return kvevict::emulation::reduce_signed(kvevict::emulation::Reduction::kAdd, mask, value);
}
inline int __reduce_min_sync(unsigned mask, int value) {
  return kvevict::emulation::reduce_signed(kvevict::emulation::Reduction::kMin, mask, value);
}
inline int __reduce_max_sync(unsigned mask, int value) {
  return kvevict::emulation::reduce_signed(kvevict::emulation::Reduction::kMax, mask, value);
}

// --- Memory --------------------------------------------------------------------------------------

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, T value) {
  *address = value;
}
template <typename T>
void __stcg(T* address, T value) {
  *address = value;
}

// Integers only: the sums of floats would depend on the order.
namespace kvevict::emulation {

template <typename T, typename F>
T atomic_update(T* address, F&& f) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> ||
                std::is_same_v<T, unsigned long long>);
  const T old = *address;
  *address = f(old);
  return old;
}

}  // namespace kvevict::emulation

template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return kvevict::emulation::atomic_update(address, [=](T old) { return old + value; });
}
template <typename T>
T atomicSub(T* address, std::type_identity_t<T> value) {
  return kvevict::emulation::atomic_update(address, [=](T old) { return old - value; });
}
template <typename T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return kvevict::emulation::atomic_update(address, [=](T old) { return std::min(old, value); });
}
template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return kvevict::emulation::atomic_update(address, [=](T old) { return std::max(old, value); });
}
template <typename T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  return kvevict::emulation::atomic_update(address, [=](T old) { return old & value; });
}
template <typename T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return kvevict::emulation::atomic_update(address, [=](T old) { return old | value; });
}
template <typename T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return kvevict::emulation::atomic_update(address, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return kvevict::emulation::atomic_update(address,
                                           [=](T old) { return old == expected ? value : old; });
}
inline unsigned atomicInc(unsigned* address, unsigned last) {
  return kvevict::emulation::atomic_update(address,
                                           [=](unsigned old) { return old >= last ? 0 : old + 1; });
}

// --- Bits and numbers ----------------------------------------------------------------------------

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  x = (x & 0x55555555u) << 1 | (x >> 1 & 0x55555555u);
  x = (x & 0x33333333u) << 2 | (x >> 2 & 0x33333333u);
  x = (x & 0x0F0F0F0Fu) << 4 | (x >> 4 & 0x0F0F0F0Fu);
  return __builtin_bswap32(x);
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned choice = selector >> (4 * i) & 0xF;
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (choice & 7))) & 0xFF;
    if (choice & 8) byte = byte & 0x80 ? 0xFF : 0;
    result |= byte << (8 * i);
  }
  return result;
}

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __saturatef(float x) { return x > 0.0f ? std::min(x, 1.0f) : 0.0f; }
inline void sincospif(float x, float* sine, float* cosine) {
  constexpr double kPi = 3.14159265358979323846;
  *sine = static_cast<float>(std::sin(kPi * x));
  *cosine = static_cast<float>(std::cos(kPi * x));
}
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

template <typename T>
constexpr T min(T a, std::type_identity_t<T> b) {
  return b < a ? b : a;
}
template <typename T>
constexpr T max(T a, std::type_identity_t<T> b) {
  return a < b ? b : a;
}
