// SPDX-License-Identifier: Apache-2.0
// The arguments that the scoring ops share: checked once, in one order, with one wording.
#pragma once

#include <optional>

#include "binding/check.h"
#include "core/attention.h"

namespace kvevict {

struct AttentionArgs {
  AttentionParams params;
  std::optional<Tensor> key_mask;  // keeps params.key_mask alive
};

AttentionArgs check_attention(const Check& check, const Tensor& query, const Tensor& key,
                              const std::optional<Tensor>& key_mask, std::optional<double> sm_scale,
                              bool causal);

struct VotingArgs {
  VotingRows rows;
  std::optional<Tensor> row_index, row_weight, softmax_lse;  // keep the pointers of rows alive
};

VotingArgs check_voting_rows(const Check& check, const AttentionParams& attention,
                             const Tensor& query, const std::optional<Tensor>& row_index,
                             const std::optional<Tensor>& row_weight,
                             const std::optional<Tensor>& softmax_lse);

void check_statistic(const Check& check, int64_t statistic);
void check_head_reduction(const Check& check, int64_t head_reduction);

// The number of heads of the scores.
int64_t num_score_heads(const AttentionParams& attention, HeadReduction reduction);

}  // namespace kvevict
