// SPDX-License-Identifier: Apache-2.0
// The composition of scoring, selection and compaction. Its only kernel stands between scoring and
// selection: masked keys lose their priority, ordinary scores are pooled.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"
#include "core/macros.h"

namespace kvevict {

struct ScoreAndCompactParams {
  const float* scores;      // [batch_size, num_heads, kv_len]
  const uint8_t* priority;  // [batch_size, 1 | num_heads, kv_len], or null: 1
  bool priority_per_head;
  const bool* key_mask;      // [batch_size, kv_len], or null
  float* pooled_scores;      // [batch_size, num_heads, kv_len]
  uint8_t* merged_priority;  // [batch_size, num_heads, kv_len]
  int64_t batch_size, num_heads, kv_len, pool_kernel;

  KVEVICT_HD uint8_t priority_of(int64_t row, int64_t key) const {
    const int64_t batch = row / num_heads;
    if (key_mask && !key_mask[batch * kv_len + key]) return 0;
    return priority ? priority[(priority_per_head ? row : batch) * kv_len + key] : 1;
  }
  KVEVICT_HD float pooled(int64_t row, int64_t key) const {
    const float* row_scores = scores + row * kv_len;
    if (pool_kernel == 1 || priority_of(row, key) != 1) return row_scores[key];
    float sum = 0.0f;
    const int64_t reach = pool_kernel / 2;
    const int64_t first = key > reach ? key - reach : 0;
    const int64_t last = reach < kv_len - 1 - key ? key + reach : kv_len - 1;
    for (int64_t i = first; i <= last; ++i) {
      if (priority_of(row, i) == 1) sum += row_scores[i];
    }
    return sum / static_cast<float>(pool_kernel);
  }
};

struct ScoreAndCompact {
  static CpuPlan plan_cpu(const ScoreAndCompactParams& params, int /*num_threads*/) {
    return {1, {params.batch_size * params.num_heads}, 0, 0};
  }
  template <Isa isa>
  static void run_cpu(const ScoreAndCompactParams& params, const CpuWork& work) noexcept;

  static int64_t cuda_workspace_bytes(const ScoreAndCompactParams& /*params*/) { return 0; }
  static int launch_cuda(const ScoreAndCompactParams& params, void* workspace,
                         void* stream) noexcept;
};

}  // namespace kvevict
