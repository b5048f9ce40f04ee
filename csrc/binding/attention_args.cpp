// SPDX-License-Identifier: Apache-2.0
#include "binding/attention_args.h"

#include <cmath>

#include "core/validate.h"

namespace kvevict {

AttentionArgs check_attention(const Check& check, const Tensor& query, const Tensor& key,
                              const std::optional<Tensor>& key_mask, std::optional<double> sm_scale,
                              bool causal) {
  constexpr auto kAny = Check::kAny;
  check.scorable(query, "query");
  const int64_t head_dim = query.size(3);
  check.companion(key, "key", query.scalar_type(), {query.size(0), kAny, kAny, head_dim}, query,
                  "query");
  check.contiguous_last_dim(key, "key");
  const int64_t num_qo_heads = query.size(1), num_kv_heads = key.size(1);
  const int64_t qo_len = query.size(2), kv_len = key.size(2);
  check.at_least(num_kv_heads, "key's num_kv_heads", 1);
  if (num_qo_heads < 1 || num_qo_heads % num_kv_heads != 0) {
    check.fail("query", "have a multiple of key's " + std::to_string(num_kv_heads) + " heads",
               std::to_string(num_qo_heads));
  }
  if (causal && qo_len > kv_len) {
    check.fail("query", "have at most kv_len = " + std::to_string(kv_len) + " rows when causal",
               std::to_string(qo_len));
  }
  if (key_mask) {
    check.companion(*key_mask, "key_mask", ScalarType::Bool, {query.size(0), kv_len}, query,
                    "query");
  }
  if (sm_scale) check.finite(static_cast<float>(*sm_scale), "sm_scale");

  AttentionArgs args{{}, dense(key_mask)};
  args.params = {
      head_tensor(query),
      head_tensor(key),
      data_or_null<bool>(args.key_mask),
      dtype_of(query),
      causal,
      static_cast<float>(sm_scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim)))),
      query.size(0),
      num_qo_heads,
      num_kv_heads,
      qo_len,
      kv_len,
      head_dim,
  };
  return args;
}

VotingArgs check_voting_rows(const Check& check, const AttentionParams& attention,
                             const Tensor& query, const std::optional<Tensor>& row_index,
                             const std::optional<Tensor>& row_weight,
                             const std::optional<Tensor>& softmax_lse) {
  const int64_t batch_size = attention.batch_size;
  if (row_index) {
    check.companion(*row_index, "row_index", ScalarType::Int, {batch_size, Check::kAny}, query,
                    "query");
    check.indexable(query, "query", 2, "qo_len");
  }
  const int64_t num_rows = row_index ? row_index->size(1) : attention.qo_len;
  const bool weight_per_head = row_weight && row_weight->dim() == 3;
  if (row_weight) {
    if (weight_per_head) {
      check.companion(*row_weight, "row_weight", ScalarType::Float,
                      {batch_size, attention.num_qo_heads, num_rows}, query, "query");
    } else {
      check.companion(*row_weight, "row_weight", ScalarType::Float, {batch_size, num_rows}, query,
                      "query");
    }
  }
  if (softmax_lse) {
    check.companion(*softmax_lse, "softmax_lse", ScalarType::Float,
                    {batch_size, attention.num_qo_heads, attention.qo_len}, query, "query");
  }

  VotingArgs args{{}, dense(row_index), dense(row_weight), dense(softmax_lse)};
  args.rows = {data_or_null<int32_t>(args.row_index),
               data_or_null<float>(args.row_weight),
               weight_per_head,
               data_or_null<float>(args.softmax_lse),
               num_rows,
               attention.qo_len};
  if (row_index) check.values_in_range(*args.row_index, "row_index", -1, attention.qo_len);
  if (row_weight && check.reads_values()) {
    const Tensor host = on_host(*args.row_weight);
    const auto* weights = static_cast<const float*>(host.const_data_ptr());
    const int64_t bad = find_bad_weight(weights, host.numel());
    if (bad >= 0) {
      check.fail("row_weight", "be finite and at least 0", element_text(host, bad, weights[bad]));
    }
  }
  return args;
}

void check_statistic(const Check& check, int64_t statistic) {
  check.one_of(statistic, "statistic", {"SUM", "MAX", "SUM_OF_SQUARES"});
}

void check_head_reduction(const Check& check, int64_t head_reduction) {
  check.one_of(head_reduction, "head_reduction", {"NONE", "GROUP_MEAN", "GROUP_MAX", "ALL_MEAN"});
}

int64_t num_score_heads(const AttentionParams& attention, HeadReduction reduction) {
  switch (reduction) {
    case HeadReduction::kNone: return attention.num_qo_heads;
    case HeadReduction::kAllMean: return 1;
    default: return attention.num_kv_heads;
  }
}

}  // namespace kvevict
