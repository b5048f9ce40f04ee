// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/cpu/select_scratch.h"
#include "core/macros.h"

namespace kvevict {

// The total has one order on every backend: sums of 1024 consecutive keys, then the sum of these.
// In each of them lane l of 32 adds up every 32nd value from the l-th on, and the lanes are added
// pairwise at a distance of 16, 8, 4, 2, 1.
inline constexpr int kSumLanes = 32;
inline constexpr int64_t kSegmentKeys = 1024;

struct SelectThresholdParams {
  const float* sums;       // [batch_size, num_heads, kv_len]
  const float* maxima;     // [batch_size, num_heads, kv_len]
  const bool* candidates;  // [batch_size, kv_len]
  const bool* key_mask;    // [batch_size, kv_len], or null
  float factor;            // of the total
  bool per_candidate;      // factor is yet to be divided by their number
  float alpha;
  int64_t max_evicted;    // of a row
  int32_t* kept_indices;  // [batch_size, num_heads, kv_len], ascending, then -1
  int32_t* kept_lens;     // [batch_size, num_heads]
  int64_t batch_size, num_heads, kv_len;

  KVEVICT_HD int64_t num_rows() const { return batch_size * num_heads; }
  KVEVICT_HD int64_t num_segments() const { return (kv_len + kSegmentKeys - 1) / kSegmentKeys; }
  KVEVICT_HD float threshold(float total, int64_t num_candidates) const {
    return (per_candidate ? factor / static_cast<float>(num_candidates) : factor) * total;
  }
};

struct SelectThreshold {
  static CpuPlan plan_cpu(const SelectThresholdParams& params, int /*num_threads*/) {
    return SelectScratch::plan(params.num_rows(), params.kv_len);
  }
  template <Isa isa>
  static void run_cpu(const SelectThresholdParams& params, const CpuWork& work) noexcept;

  static int64_t cuda_workspace_bytes(const SelectThresholdParams& params);
  static int launch_cuda(const SelectThresholdParams& params, void* workspace,
                         void* stream) noexcept;
};

}  // namespace kvevict
