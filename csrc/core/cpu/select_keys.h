// SPDX-License-Identifier: Apache-2.0
// Finds the best of a row of keys and lists them in order. Only for _cpu.cpp files, as simd.h.
#pragma once

#include <algorithm>
#include <utility>

#include "core/cpu/select_scratch.h"
#include "core/cpu/simd.h"
#include "core/order.h"

namespace kvevict {
inline namespace KVEVICT_ISA {

// Appends the lanes that a mask picks; may write a whole vector beyond the end of the list.
inline uint32_t* append(uint32_t* end, UintVec values, uint32_t mask) {
#if defined(__AVX512F__)
  store(end, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), (__m512i)values));
  return end + __builtin_popcount(mask);
#else
  for (; mask; mask &= mask - 1) *end++ = values[__builtin_ctz(mask)];
  return end;
#endif
}

inline uint32_t largest_key(const uint32_t* keys, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, keys[i]);
  return largest;
}

// find_threshold for a few keys: counts how many are above each.
inline uint32_t find_threshold_of_few(const uint32_t* keys, int64_t count, int64_t& need) {
  for (int64_t candidate = 0;; ++candidate) {
    int64_t above = 0, equal = 0;
    for (int64_t i = 0; i < count; ++i) {
      above += keys[i] > keys[candidate];
      equal += keys[i] == keys[candidate];
    }
    if (above < need && need <= above + equal) {
      need -= above;
      return keys[candidate];
    }
  }
}

// The key of the need-th largest of keys (need <= count), and in `need` how many that equal it are
// wanted: a radix select, 11 + 11 + 10 bits.
inline uint32_t find_threshold(const SelectScratch& scratch, int64_t count, int64_t& need) {
  if (need == 0) return kKeyAlways;
  constexpr int64_t kFew = 64;
  const uint32_t* keys = scratch.keys;
  uint32_t prefix = 0;
  for (const auto& [shift, bits] : {std::pair{21, 11}, {10, 11}, {0, 10}}) {
    if (count <= kFew) return find_threshold_of_few(keys, count, need);
    const uint32_t mask = (1u << bits) - 1;
    std::fill(scratch.histogram, scratch.histogram + mask + 1, 0u);
    for (int64_t i = 0; i < count; ++i) ++scratch.histogram[(keys[i] >> shift) & mask];
    uint32_t bucket = (largest_key(keys, count) >> shift) & mask;
    while (scratch.histogram[bucket] < need) need -= scratch.histogram[bucket--];
    prefix |= bucket << shift;
    if (shift == 0 || scratch.histogram[bucket] == count) continue;

    uint32_t* end = scratch.candidates;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      const UintVec vec = load<UintVec>(keys + i);
      end = append(end, vec, to_bits(((vec >> shift) & mask) == bucket));
    }
    for (; i < count; ++i) {
      if (((keys[i] >> shift) & mask) == bucket) *end++ = keys[i];
    }
    keys = scratch.candidates;
    count = end - scratch.candidates;
  }
  return prefix;
}

// Lists the indices of the keys above the threshold and of the first `ties` that equal it.
inline void list_kept(const uint32_t* keys, int64_t kv_len, uint32_t threshold, int64_t ties,
                      uint32_t* kept) {
  const IntVec lanes = lane_indices();
  int64_t i = 0;
  for (; i + kLanes <= kv_len; i += kLanes) {
    const UintVec vec = load<UintVec>(keys + i);
    uint32_t equal = to_bits(vec == threshold);
    for (; __builtin_popcount(equal) > ties; equal &= ~(0x80000000u >> __builtin_clz(equal))) {
    }
    ties -= __builtin_popcount(equal);
    const uint32_t mask = to_bits(vec > threshold) | equal;
    kept = append(kept, (UintVec)(lanes + static_cast<int32_t>(i)), mask);
  }
  for (; i < kv_len; ++i) {
    if (keys[i] > threshold || (keys[i] == threshold && ties-- > 0)) {
      *kept++ = static_cast<uint32_t>(i);
    }
  }
}

// Writes the same list, of `need` indices, where only k fit, and -1 behind them. Listed aside:
// vectors of indices may overshoot.
inline void write_kept(const SelectScratch& scratch, int64_t kv_len, uint32_t threshold,
                       int64_t ties, int64_t need, int32_t* kept, int64_t k) {
  list_kept(scratch.keys, kv_len, threshold, ties, scratch.candidates);
  std::copy(scratch.candidates, scratch.candidates + need, kept);
  std::fill(kept + need, kept + k, -1);
}

}  // namespace KVEVICT_ISA
}  // namespace kvevict
