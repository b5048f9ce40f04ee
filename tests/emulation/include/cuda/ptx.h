// SPDX-License-Identifier: Apache-2.0
// In place of csrc/cuda/ptx.h: the same functions on the CPU. That file says what they do.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace kvevict {

inline constexpr unsigned kFullWarp = 0xFFFFFFFFu;

template <typename T>
T& shared_memory() {
  return *static_cast<T*>(emulation::shared_memory(sizeof(T), alignof(T)));
}

inline void cp_async_16(void* shared, const void* global, bool valid = true) {
  emulation::copy_async(shared, global, 16, valid);
}
inline void cp_async_commit() { emulation::commit_copies(); }
template <int kPending>
void cp_async_wait() {
  emulation::wait_for_copies(kPending);
}

inline void ldmatrix_x4(uint32_t (&registers)[4], const void* shared_row) {
  emulation::load_matrices(registers, shared_row, /*transpose=*/false);
}

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::mma_bf16(d, a, b);
}
inline void mma_fp16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::mma_fp16(d, a, b);
}

inline float exp2_approx(float x) {
  const float result = exp2f(x);
  return fabsf(result) < 0x1p-126f ? 0.0f : result;
}

inline float fp16_to_float(uint16_t bits) { return emulation::fp16_to_float(bits); }
inline uint32_t pack_fp16(float low, float high) {
  const auto bits = [](float x) { return std::bit_cast<uint16_t>(static_cast<_Float16>(x)); };
  return bits(low) | static_cast<uint32_t>(bits(high)) << 16;
}
inline uint32_t pack_bf16(float low, float high) {
  const auto rounded = [](float x) -> uint32_t {
    const auto bits = std::bit_cast<uint32_t>(x);
    return x != x ? 0x7FFFu : (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16;
  };
  return rounded(low) | rounded(high) << 16;
}

inline void store_streaming(void* global, uint4 value) {
  emulation::check_aligned(global, sizeof(value), "store_streaming");
  *static_cast<uint4*>(global) = value;
}

}  // namespace kvevict
