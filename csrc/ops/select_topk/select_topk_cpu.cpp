// SPDX-License-Identifier: Apache-2.0
#include "ops/select_topk/select_topk.h"

#include <algorithm>

#include "core/cpu/simd.h"

namespace kvevict {
namespace {

// Appends the lanes that a mask picks; may write a whole vector beyond the end of the list.
uint32_t* append(uint32_t* end, UintVec values, uint32_t mask) {
#if defined(__AVX512F__)
  store(end, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), (__m512i)values));
  return end + __builtin_popcount(mask);
#else
  for (; mask; mask &= mask - 1) *end++ = values[__builtin_ctz(mask)];
  return end;
#endif
}

// Writes the order keys of a row, with the priorities that decide by themselves turned into keys
// that beat or lose to every score. Lowers `need` to the number of keys that may be kept.
void make_keys(const float* scores, const uint8_t* priority, int64_t kv_len, int64_t& need,
               uint32_t* keys) {
  for (int64_t i = 0; i < kv_len; ++i) keys[i] = order_key(scores[i]);
  if (!priority) {
    need = std::min(need, kv_len);
    return;
  }
  int64_t count[256] = {};
  for (int64_t i = 0; i < kv_len; ++i) ++count[priority[i]];
  need = std::min(need, kv_len - count[0]);
  // The class in which the last kept key is found: all higher ones fit.
  int64_t above = 0;
  int decisive = 255;
  while (decisive > 1 && above + count[decisive] < need) above += count[decisive--];
  const auto decisive_class = static_cast<uint8_t>(decisive);
  for (int64_t i = 0; i < kv_len; ++i) {
    const uint32_t by_class = priority[i] > decisive_class ? kKeyAlways : kKeyNever;
    keys[i] = priority[i] == decisive_class ? keys[i] : by_class;
  }
}

uint32_t largest_key(const uint32_t* keys, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, keys[i]);
  return largest;
}

// find_threshold for a few keys: counts how many are above each.
uint32_t find_threshold_of_few(const uint32_t* keys, int64_t count, int64_t& need) {
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

// The key of the need-th largest of keys (1 <= need <= count), and in `need` how many that equal it
// are wanted: a radix select, 11 + 11 + 10 bits.
uint32_t find_threshold(const SelectScratch& scratch, int64_t count, int64_t& need) {
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
void list_kept(const uint32_t* keys, int64_t kv_len, uint32_t threshold, int64_t ties,
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

}  // namespace

template <>
void SelectTopk::run_cpu<kThisIsa>(const SelectTopkParams& params, const CpuWork& work) noexcept {
  Arena arena(work.scratch);
  const SelectScratch scratch = SelectScratch::carve(arena, params.kv_len);
  for (int64_t row = work.begin; row < work.end; ++row) {
    int64_t need = params.row_k ? params.row_k[row] : params.k;
    make_keys(params.scores + row * params.kv_len, params.priority_of(row), params.kv_len, need,
              scratch.keys);
    int32_t* kept = params.kept_indices + row * params.k;
    params.kept_lens[row] = static_cast<int32_t>(need);
    std::fill(kept + need, kept + params.k, -1);
    if (need == 0) continue;
    int64_t ties = need;
    const uint32_t threshold = find_threshold(scratch, params.kv_len, ties);
    // Listed aside: vectors of indices may overshoot the row.
    list_kept(scratch.keys, params.kv_len, threshold, ties, scratch.candidates);
    std::copy(scratch.candidates, scratch.candidates + need, kept);
  }
}

}  // namespace kvevict
