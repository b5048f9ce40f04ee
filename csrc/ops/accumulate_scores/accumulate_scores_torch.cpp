// SPDX-License-Identifier: Apache-2.0
#include "binding/attention_args.h"
#include "binding/in_place.h"
#include "binding/registration.h"
#include "binding/run.h"
#include "ops/accumulate_scores/accumulate_scores.h"
#include "ops/score_keys/score_keys.h"

namespace kvevict {
namespace {

constexpr const char* kOp = "accumulate_scores_";

template <DeviceType device>
void accumulate_scores_(const Tensor& scores, const Tensor& query, const Tensor& key, double decay,
                        const std::optional<Tensor>& row_weight,
                        const std::optional<Tensor>& key_mask, std::optional<double> sm_scale,
                        bool causal, int64_t head_reduction) {
  const Check check(kOp, device);
  const AttentionArgs attention = check_attention(check, query, key, key_mask, sm_scale, causal);
  const VotingArgs voting =
      check_voting_rows(check, attention.params, query, std::nullopt, row_weight, std::nullopt);
  check_head_reduction(check, head_reduction);
  const auto reduction = static_cast<HeadReduction>(head_reduction);
  const int64_t batch_size = query.size(0), kv_len = key.size(2);
  const int64_t num_heads = num_score_heads(attention.params, reduction);
  check.finite(static_cast<float>(decay), "decay");
  check.companion(scores, "scores", ScalarType::Float, {batch_size, num_heads, Check::kAny}, query,
                  "query");
  check.contiguous_last_dim(scores, "scores");
  if (scores.size(2) < kv_len) {
    check.fail("scores", "have room for kv_len = " + std::to_string(kv_len) + " keys",
               std::to_string(scores.size(2)));
  }
  claim(check, {scores}, {"scores"},
        {{"query", query},
         {"key", key},
         {"row_weight", voting.row_weight},
         {"key_mask", attention.key_mask}});

  const Tensor new_scores = new_empty(query, {batch_size, num_heads, kv_len}, ScalarType::Float);
  const ScoreKeysParams score{
      attention.params,
      voting.rows,
      Statistic::kSum,
      reduction,
      static_cast<float*>(new_scores.mutable_data_ptr()),
      num_heads,
  };
  run<ScoreKeys, device>(kOp, score, new_scores);
  const AccumulateScoresParams params{
      score.scores,
      static_cast<float*>(scores.mutable_data_ptr()),
      scores.stride(0),
      scores.stride(1),
      static_cast<float>(decay),
      batch_size,
      num_heads,
      kv_len,
  };
  run<AccumulateScores, device>(kOp, params, new_scores);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(KVEVICT_NAMESPACE, m) {
  m.def(
      "accumulate_scores_(Tensor(a!) scores, Tensor query, Tensor key, *, float decay=1.0, "
      "Tensor? row_weight=None, Tensor? key_mask=None, float? sm_scale=None, bool causal=True, "
      "int head_reduction=1) -> ()");
}

KVEVICT_IMPL(accumulate_scores_)

}  // namespace kvevict
