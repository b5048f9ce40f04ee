// SPDX-License-Identifier: Apache-2.0
// Copies rows of keys and values. Only for _cpu.cpp files, as simd.h.
#pragma once

#include "core/cpu/simd.h"

namespace kvevict {
inline namespace KVEVICT_ISA {

inline constexpr int64_t kVecBytes = sizeof(Vec);

// Rows further ahead than the hardware prefetcher can guess: the next ones to keep.
inline constexpr int64_t kPrefetchRows = 16;

inline void prefetch_row(const char* row, int64_t row_bytes) {
  constexpr int64_t kLine = 64;
  for (int64_t i = 0; i < row_bytes; i += kLine) _mm_prefetch(row + i, _MM_HINT_T0);
}

// A store that leaves the caches alone; the destination must be aligned to kVecBytes.
inline void stream(char* destination, Vec v) {
  auto* address = reinterpret_cast<float*>(destination);
#if defined(__AVX512F__)
  _mm512_stream_ps(address, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(address, (__m256)v);
#else
  _mm_stream_ps(address, (__m128)v);
#endif
}

// How a row is written: kStream past the caches, kCached through them.
enum class RowStore : bool { kCached, kStream };

// Tuning. As many bytes stay in a core's cache until they are read: those are not streamed.
inline constexpr int64_t kMaxCachedBytes = 512 << 10;

// source may be at or behind destination in the same row stream; whole rows never half-overlap.
template <RowStore row_store>
inline void copy_row(char* destination, const char* source, int64_t row_bytes) {
  int64_t i = 0;
  for (; i + kVecBytes <= row_bytes; i += kVecBytes) {
    const Vec v = load<Vec>(source + i);
    if constexpr (row_store == RowStore::kStream) {
      stream(destination + i, v);
    } else {
      store(destination + i, v);
    }
  }
  for (; i < row_bytes; ++i) destination[i] = source[i];
}

// Whether every row of a stream starts aligned and is whole vectors long.
inline bool can_stream(const char* first_row, int64_t row_stride, int64_t row_bytes) {
  const auto address = reinterpret_cast<intptr_t>(first_row);
  return (address | row_stride | row_bytes) % kVecBytes == 0;
}

}  // namespace KVEVICT_ISA
}  // namespace kvevict
