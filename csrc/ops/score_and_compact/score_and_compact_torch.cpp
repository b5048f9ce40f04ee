// SPDX-License-Identifier: Apache-2.0
#include <tuple>
#include <vector>

#include "binding/attention_args.h"
#include "binding/in_place.h"
#include "binding/kv_args.h"
#include "binding/registration.h"
#include "binding/run.h"
#include "ops/compact_kv/compact_kv.h"
#include "ops/score_and_compact/score_and_compact.h"
#include "ops/score_keys/score_keys.h"
#include "ops/score_keys_by_text/score_keys_by_text.h"
#include "ops/select_topk/select_topk.h"

namespace kvevict {
namespace {

constexpr const char* kOp = "score_and_compact";

template <DeviceType device>
Tensor score(const Tensor& query, const AttentionParams& attention, const VotingRows& voting,
             HeadReduction reduction, bool text_weighted) {
  const int64_t num_heads = text_weighted ? 1 : num_score_heads(attention, reduction);
  const Tensor scores =
      new_empty(query, {attention.batch_size, num_heads, attention.kv_len}, ScalarType::Float);
  auto* scores_data = static_cast<float*>(scores.mutable_data_ptr());
  if (!text_weighted) {
    const ScoreKeysParams params{attention, voting,      Statistic::kSum,
                                 reduction, scores_data, num_heads};
    run<ScoreKeys, device>(kOp, params, scores);
    return scores;
  }
  const Tensor column_sums = torch::stable::empty_like(scores);
  const Tensor row_weights =
      new_empty(query, {attention.batch_size, voting.num_rows}, ScalarType::Float);
  const ScoreKeysByTextParams params{attention, voting, scores_data,
                                     static_cast<float*>(column_sums.mutable_data_ptr()),
                                     static_cast<float*>(row_weights.mutable_data_ptr())};
  run<ScoreKeysByText, device>(kOp, params, scores);
  return scores;
}

template <DeviceType device>
std::tuple<Tensor, Tensor> select(const Tensor& scores, const std::optional<Tensor>& priority,
                                  const bool* key_mask, int64_t budget, int64_t pool_kernel) {
  const int64_t batch_size = scores.size(0), num_heads = scores.size(1), kv_len = scores.size(2);
  const Tensor kept_indices = new_empty(scores, {batch_size, num_heads, budget}, ScalarType::Int);
  const Tensor kept_lens = new_empty(scores, {batch_size, num_heads}, ScalarType::Int);
  SelectTopkParams params{
      static_cast<const float*>(scores.const_data_ptr()),
      data_or_null<uint8_t>(priority),
      priority && priority->dim() == 3,
      nullptr,
      static_cast<int32_t*>(kept_indices.mutable_data_ptr()),
      static_cast<int32_t*>(kept_lens.mutable_data_ptr()),
      batch_size,
      num_heads,
      kv_len,
      budget,
  };
  Tensor pooled_scores, merged_priority;  // outlive the selection
  if (key_mask || pool_kernel > 1) {
    pooled_scores = torch::stable::empty_like(scores);
    merged_priority = new_empty(scores, {batch_size, num_heads, kv_len}, ScalarType::Byte);
    const ScoreAndCompactParams prepare{
        params.scores,
        params.priority,
        params.priority_per_head,
        key_mask,
        static_cast<float*>(pooled_scores.mutable_data_ptr()),
        static_cast<uint8_t*>(merged_priority.mutable_data_ptr()),
        batch_size,
        num_heads,
        kv_len,
        pool_kernel,
    };
    run<ScoreAndCompact, device>(kOp, prepare, scores);
    params.scores = prepare.pooled_scores;
    params.priority = prepare.merged_priority;
    params.priority_per_head = true;
  }
  run<SelectTopk, device>(kOp, params, scores);
  return {kept_indices, kept_lens};
}

template <DeviceType device>
std::tuple<Tensor, Tensor, Tensor> score_and_compact(
    const Tensor& query, const Tensor& key, const Tensor& value, int64_t budget,
    const std::optional<Tensor>& row_index, const std::optional<Tensor>& row_weight,
    bool text_weighted, const std::optional<Tensor>& softmax_lse,
    const std::optional<Tensor>& priority, const std::optional<Tensor>& key_mask,
    std::optional<double> sm_scale, bool causal, int64_t head_reduction, int64_t pool_kernel) {
  const Check check(kOp, device);
  const AttentionArgs attention = check_attention(check, query, key, key_mask, sm_scale, causal);
  const int64_t batch_size = key.size(0), num_kv_heads = key.size(1), kv_len = key.size(2);
  check.device(value, "value", query, "query");
  check.shape(value, "value", {batch_size, num_kv_heads, kv_len, Check::kAny});
  check.movable(value, "value");
  check.indexable(key, "key", 2, "kv_len");
  check.in_range(budget, "budget", 0, Check::kIndexEnd);
  check_head_reduction(check, head_reduction);
  const auto reduction = static_cast<HeadReduction>(head_reduction);
  if (text_weighted) {
    if (!row_index) check.fail("row_index", "be given when text_weighted", "None");
    if (row_weight) check.fail("row_weight", "be None when text_weighted", "a tensor");
    if (!causal) check.fail("causal", "be True when text_weighted", "False");
  } else if (reduction == HeadReduction::kNone && attention.params.group_size() != 1) {
    check.fail("head_reduction", "reduce to key's " + std::to_string(num_kv_heads) + " heads",
               "0 (NONE)");
  }
  if (pool_kernel < 1 || pool_kernel % 2 == 0) {
    check.fail("pool_kernel", "be odd and at least 1", std::to_string(pool_kernel));
  }
  const int64_t num_heads = text_weighted ? 1 : num_score_heads(attention.params, reduction);
  check.priority(priority, batch_size, num_heads, kv_len, query, "query");
  check.disjoint({key, value}, {"key", "value"}, 2);
  const VotingArgs voting =
      check_voting_rows(check, attention.params, query, row_index, row_weight, softmax_lse);
  announce_writes(kOp, {key, value}, {"key", "value"});

  const Tensor scores =
      score<device>(query, attention.params, voting.rows, reduction, text_weighted);
  const auto [kept_indices, kept_lens] =
      select<device>(scores, dense(priority), attention.params.key_mask, budget, pool_kernel);

  const std::vector<KvTensor> tensors = kv_tensors({key}, {value}, Access::kWrite);
  const int64_t head_stride = num_heads == 1 ? 0 : 1;
  const CompactKvParams params{
      {1, batch_size, num_kv_heads},
      tensors.data(),
      {static_cast<const int32_t*>(kept_indices.const_data_ptr()),
       static_cast<const int32_t*>(kept_lens.const_data_ptr()), budget, 0, num_heads * budget,
       head_stride * budget, 0, num_heads, head_stride},
  };
  run<CompactKv, device>(kOp, params, scores);
  return {kept_indices, kept_lens, scores};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(KVEVICT_NAMESPACE, m) {
  m.def(
      "score_and_compact(Tensor query, Tensor(a!) key, Tensor(b!) value, SymInt budget, *, "
      "Tensor? row_index=None, Tensor? row_weight=None, bool text_weighted=False, "
      "Tensor? softmax_lse=None, Tensor? priority=None, Tensor? key_mask=None, "
      "float? sm_scale=None, bool causal=True, int head_reduction=1, SymInt pool_kernel=1) -> "
      "(Tensor, Tensor, Tensor)");
}

KVEVICT_IMPL(score_and_compact)

}  // namespace kvevict
