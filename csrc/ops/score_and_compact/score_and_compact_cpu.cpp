// SPDX-License-Identifier: Apache-2.0
#include "ops/score_and_compact/score_and_compact.h"

namespace kvevict {

template <>
void ScoreAndCompact::run_cpu<kThisIsa>(const ScoreAndCompactParams& params,
                                        const CpuWork& work) noexcept {
  for (int64_t row = work.begin; row < work.end; ++row) {
    for (int64_t key = 0; key < params.kv_len; ++key) {
      params.merged_priority[row * params.kv_len + key] = params.priority_of(row, key);
      params.pooled_scores[row * params.kv_len + key] = params.pooled(row, key);
    }
  }
}

}  // namespace kvevict
