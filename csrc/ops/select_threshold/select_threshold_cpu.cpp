// SPDX-License-Identifier: Apache-2.0
#include "ops/select_threshold/select_threshold.h"

#include <algorithm>

#include "core/cpu/select_keys.h"
#include "core/order.h"

namespace kvevict {
namespace {

float add_lanes(float (&lanes)[kSumLanes]) {
  for (int half = kSumLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// Masks have all bits where a flag is set, none where it is not. These loops are kept simple, so
// that compilers see vectors in them.
void make_masks(const bool* flags, int64_t count, uint32_t* masks) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(flags);
  for (int64_t i = 0; i < count; ++i) masks[i] = bytes[i] != 0 ? ~uint32_t{0} : 0;
}

uint32_t count_masks(const uint32_t* masks, int64_t count) {
  uint32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += masks[i] & 1;
  return sum;
}

// Of the candidates, by their masks.
float sum_segment(const float* sums, const uint32_t* masks, int64_t count) {
  constexpr int kVecs = kSumLanes / kLanes;
  Vec vecs[kVecs] = {};
  int64_t i = 0;
  for (; i + kSumLanes <= count; i += kSumLanes) {
    for (int v = 0; v < kVecs; ++v) {
      const int64_t first = i + v * kLanes;
      vecs[v] += bit_cast<Vec>(load<UintVec>(sums + first) & load<UintVec>(masks + first));
    }
  }
  float lanes[kSumLanes];
  store(lanes, vecs);
  for (int64_t lane = 0; i < count; ++i, ++lane) lanes[lane] += masks[i] ? sums[i] : 0.0f;
  return add_lanes(lanes);
}

float sum_candidates(const float* sums, const uint32_t* masks, int64_t kv_len) {
  float lanes[kSumLanes] = {};
  for (int64_t segment = 0; segment * kSegmentKeys < kv_len; ++segment) {
    const int64_t first = segment * kSegmentKeys;
    const int64_t count = std::min(kv_len - first, kSegmentKeys);
    lanes[segment % kSumLanes] += sum_segment(sums + first, masks + first, count);
  }
  return add_lanes(lanes);
}

// How many keys of a row may be evicted, and how many of them stay.
struct Verdict {
  int64_t num_kept;    // all in all
  int64_t num_spared;  // of those that may be evicted
};

// Writes the keys of a row: those that are kept are above, padding is below all that may be
// evicted.
Verdict make_keys(const SelectThresholdParams& params, int64_t row, const SelectScratch& scratch) {
  static_assert(kKeyAlways == ~uint32_t{0} && kKeyNever == 0);  // so that keys are masks, too
  const int64_t kv_len = params.kv_len, batch = row / params.num_heads;
  const float* sums = params.sums + row * kv_len;
  const float* maxima = params.maxima + row * kv_len;
  uint32_t* keys = scratch.keys;
  uint32_t* masks = scratch.candidates;
  if (params.key_mask) {
    make_masks(params.key_mask + batch * kv_len, kv_len, keys);
  } else {
    std::fill(keys, keys + kv_len, kKeyAlways);
  }
  make_masks(params.candidates + batch * kv_len, kv_len, masks);
  for (int64_t i = 0; i < kv_len; ++i) masks[i] &= keys[i];
  const int64_t num_real = count_masks(keys, kv_len);

  const float total = sum_candidates(sums, masks, kv_len);
  const float threshold = params.threshold(total, count_masks(masks, kv_len));
  const float alpha = params.alpha;
  uint32_t num_evictable = 0;
  for (int64_t i = 0; i < kv_len; ++i) {
    const uint32_t low_sum = sums[i] < threshold ? masks[i] : 0;
    const uint32_t evictable = maxima[i] < alpha ? low_sum : 0;
    keys[i] = (order_key(sums[i]) & evictable) | (keys[i] & ~evictable);
    num_evictable += evictable & 1;
  }
  const int64_t num_evicted = std::min<int64_t>(num_evictable, params.max_evicted);
  return {num_real - num_evicted, num_evictable - num_evicted};
}

}  // namespace

template <>
void SelectThreshold::run_cpu<kThisIsa>(const SelectThresholdParams& params,
                                        const CpuWork& work) noexcept {
  Arena arena(work.scratch);
  const SelectScratch scratch = SelectScratch::carve(arena, params.kv_len);
  for (int64_t row = work.begin; row < work.end; ++row) {
    const auto [num_kept, num_spared] = make_keys(params, row, scratch);
    int64_t ties = num_kept;
    const uint32_t threshold =
        num_spared > 0 ? find_threshold(scratch, params.kv_len, ties) : kKeyAlways;
    write_kept(scratch, params.kv_len, threshold, ties, num_kept,
               params.kept_indices + row * params.kv_len, params.kv_len);
    params.kept_lens[row] = static_cast<int32_t>(num_kept);
  }
}

}  // namespace kvevict
