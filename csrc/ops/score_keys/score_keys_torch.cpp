// SPDX-License-Identifier: Apache-2.0
#include "binding/attention_args.h"
#include "binding/registration.h"
#include "binding/run.h"
#include "ops/score_keys/score_keys.h"

namespace kvevict {
namespace {

template <DeviceType device>
Tensor score_keys(const Tensor& query, const Tensor& key, const std::optional<Tensor>& row_index,
                  const std::optional<Tensor>& row_weight, const std::optional<Tensor>& softmax_lse,
                  const std::optional<Tensor>& key_mask, std::optional<double> sm_scale,
                  bool causal, int64_t statistic, int64_t head_reduction) {
  const Check check("score_keys", device);
  const AttentionArgs attention = check_attention(check, query, key, key_mask, sm_scale, causal);
  const VotingArgs voting =
      check_voting_rows(check, attention.params, query, row_index, row_weight, softmax_lse);
  check_statistic(check, statistic);
  check_head_reduction(check, head_reduction);

  const auto reduction = static_cast<HeadReduction>(head_reduction);
  const int64_t num_heads = num_score_heads(attention.params, reduction);
  const Tensor scores =
      new_empty(query, {query.size(0), num_heads, key.size(2)}, ScalarType::Float);
  const ScoreKeysParams params{
      attention.params,
      voting.rows,
      static_cast<Statistic>(statistic),
      reduction,
      static_cast<float*>(scores.mutable_data_ptr()),
      num_heads,
  };
  run<ScoreKeys, device>("score_keys", params, scores);
  return scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(KVEVICT_NAMESPACE, m) {
  m.def(
      "score_keys(Tensor query, Tensor key, *, Tensor? row_index=None, Tensor? row_weight=None, "
      "Tensor? softmax_lse=None, Tensor? key_mask=None, float? sm_scale=None, bool causal=True, "
      "int statistic=0, int head_reduction=1) -> Tensor");
}

KVEVICT_IMPL(score_keys)

}  // namespace kvevict
