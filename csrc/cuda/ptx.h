// SPDX-License-Identifier: Apache-2.0
// The only place with inline PTX: asynchronous copies, matrix multiply-accumulate, conversions,
// special stores. tests/emulation has a file of the same name that does the same on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace kvevict {

inline constexpr unsigned kFullWarp = 0xFFFFFFFFu;

// The dynamic shared memory of a block as the one struct that its kernel declares for it.
template <typename T>
__device__ __forceinline__ T& shared_memory() {
  extern __shared__ __align__(128) unsigned char kvevict_shared[];
  return *reinterpret_cast<T*>(kvevict_shared);
}

__device__ __forceinline__ unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// Starts copying 16 bytes from global to shared memory, both 16-byte aligned; zeros if not valid
// (global is then not read). The copy may land at any time up to the matching wait.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid = true) {
  const int source_bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(source_bytes)
               : "memory");
}
// Closes a group of this thread's copies.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most kPending of this thread's latest groups are still under way. Other threads'
// copies are visible only after a barrier.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Loads four 8x8 matrices of 16-bit elements. Lane l gives the address of a 16-byte row: row l % 8
// of matrix l / 8. Register i of lane l gets row l / 4, columns 2 * (l % 4) and the next, of
// matrix i.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&registers)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// d += a * b for a 16 x 16, b 16 x 8 and d 16 x 8, in the fragment layouts of PTX m16n8k16:
// d[i] of lane l is row l / 4 + 8 * (i / 2), column 2 * (l % 4) + i % 2; a holds rows l / 4 and
// + 8, b column l / 4, two neighboring k per register.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_fp16(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 2^x within 2 ulp; 0 for very small x (subnormal results are flushed).
__device__ __forceinline__ float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// A float16 as a float, and two floats rounded to the nearest 16-bit numbers, ties to even.
__device__ __forceinline__ float fp16_to_float(uint16_t bits) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(bits));
  return result;
}
__device__ __forceinline__ uint32_t pack_fp16(float low, float high) {
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

// A 16-byte store that is not expected to be read soon.
__device__ __forceinline__ void store_streaming(void* global, uint4 value) {
  __stcs(static_cast<uint4*>(global), value);
}

}  // namespace kvevict
