// SPDX-License-Identifier: Apache-2.0
#include <tuple>

#include "binding/attention_args.h"
#include "binding/registration.h"
#include "binding/run.h"
#include "ops/score_keys_by_text/score_keys_by_text.h"

namespace kvevict {
namespace {

template <DeviceType device>
std::tuple<Tensor, Tensor, Tensor> score_keys_by_text(const Tensor& query, const Tensor& key,
                                                      const Tensor& row_index,
                                                      const std::optional<Tensor>& softmax_lse,
                                                      const std::optional<Tensor>& key_mask,
                                                      std::optional<double> sm_scale) {
  const Check check("score_keys_by_text", device);
  const AttentionArgs attention =
      check_attention(check, query, key, key_mask, sm_scale, /*causal=*/true);
  const VotingArgs text =
      check_voting_rows(check, attention.params, query, row_index, std::nullopt, softmax_lse);

  const int64_t batch_size = query.size(0), kv_len = key.size(2);
  const Tensor scores = new_empty(query, {batch_size, 1, kv_len}, ScalarType::Float);
  const Tensor column_sums = new_empty(query, {batch_size, 1, kv_len}, ScalarType::Float);
  const Tensor row_weights = new_empty(query, {batch_size, row_index.size(1)}, ScalarType::Float);
  const ScoreKeysByTextParams params{
      attention.params,
      text.rows,
      static_cast<float*>(scores.mutable_data_ptr()),
      static_cast<float*>(column_sums.mutable_data_ptr()),
      static_cast<float*>(row_weights.mutable_data_ptr()),
  };
  run<ScoreKeysByText, device>("score_keys_by_text", params, scores);
  return {scores, column_sums, row_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(KVEVICT_NAMESPACE, m) {
  m.def(
      "score_keys_by_text(Tensor query, Tensor key, Tensor row_index, *, Tensor? softmax_lse=None, "
      "Tensor? key_mask=None, float? sm_scale=None) -> (Tensor, Tensor, Tensor)");
}

KVEVICT_IMPL(score_keys_by_text)

}  // namespace kvevict
