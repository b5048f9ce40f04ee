// SPDX-License-Identifier: Apache-2.0
// The composition of scoring and a running sum. Its only kernel comes after scoring: old scores
// decay, new ones are added.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"

namespace kvevict {

struct AccumulateScoresParams {
  const float* new_scores;            // [batch_size, num_heads, kv_len]
  float* scores;                      // [batch_size, num_heads, at least kv_len]
  int64_t stride_batch, stride_head;  // of scores
  float decay;
  int64_t batch_size, num_heads, kv_len;
};

struct AccumulateScores {
  static constexpr int64_t kCpuBlock = 4096;  // keys per work item

  static int64_t blocks_per_row(const AccumulateScoresParams& params) {
    return (params.kv_len + kCpuBlock - 1) / kCpuBlock;
  }
  static CpuPlan plan_cpu(const AccumulateScoresParams& params, int /*num_threads*/) {
    const int64_t items = params.batch_size * params.num_heads * blocks_per_row(params);
    return {1, {items}, 0, 0, /*min_items=*/4};
  }
  template <Isa isa>
  static void run_cpu(const AccumulateScoresParams& params, const CpuWork& work) noexcept;

  static int64_t cuda_workspace_bytes(const AccumulateScoresParams& /*params*/) { return 0; }
  static int launch_cuda(const AccumulateScoresParams& params, void* workspace,
                         void* stream) noexcept;
};

}  // namespace kvevict
