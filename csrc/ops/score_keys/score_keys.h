// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "core/attention.h"
#include "core/cpu/isa.h"
#include "core/cpu/row_block.h"

namespace kvevict {

struct ScoreKeysParams {
  AttentionParams attention;
  VotingRows voting;
  Statistic statistic;
  HeadReduction reduction;
  float* scores;  // [batch_size, num_score_heads, kv_len]
  int64_t num_score_heads;

  // The maximum over rows of a mean over heads needs a row's heads together; every other score is
  // made of statistics that each query head has by itself.
  bool mean_before_statistic() const {
    return statistic == Statistic::kMax &&
           (reduction == HeadReduction::kGroupMean || reduction == HeadReduction::kAllMean);
  }
  int64_t heads_per_score() const { return attention.num_qo_heads / num_score_heads; }
};

struct ScoreKeys {
  static CpuPlan plan_cpu(const ScoreKeysParams& params, int num_threads) {
    const AttentionParams& attention = params.attention;
    const int64_t num_scores = attention.batch_size * params.num_score_heads;
    const int64_t columns_bytes = padded_kv_len(attention) * int64_t{sizeof(float)};
    Arena scratch;
    RowBlock::carve(scratch, attention, /*with_exponentials=*/true);
    if (!params.mean_before_statistic()) {
      const int64_t num_columns = attention.batch_size * attention.num_qo_heads;
      return {2, {num_columns, num_scores}, num_columns * columns_bytes, scratch.bytes()};
    }
    scratch.take<float>(row_block_size(attention) * padded_kv_len(attention));
    const int64_t splits = num_row_splits(params, num_threads);
    return {
        2, {num_scores * splits, num_scores}, num_scores * splits * columns_bytes, scratch.bytes()};
  }
  template <Isa isa>
  static void run_cpu(const ScoreKeysParams& params, const CpuWork& work) noexcept;

  static int64_t cuda_workspace_bytes(const ScoreKeysParams& params);
  static int launch_cuda(const ScoreKeysParams& params, void* workspace, void* stream) noexcept;

  // How many parts the rows are split into where there are fewer scores than threads. A maximum of
  // maxima is exact, so the scores do not depend on it.
  static int64_t num_row_splits(const ScoreKeysParams& params, int64_t num_threads) {
    const int64_t num_scores = params.attention.batch_size * params.num_score_heads;
    if (num_scores == 0) return 1;
    return std::clamp<int64_t>(num_threads / num_scores, 1,
                               std::max<int64_t>(params.voting.num_rows, 1));
  }
};

}  // namespace kvevict
