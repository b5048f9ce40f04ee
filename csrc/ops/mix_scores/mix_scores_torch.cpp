// SPDX-License-Identifier: Apache-2.0
#include "binding/check.h"
#include "binding/registration.h"
#include "binding/run.h"
#include "ops/mix_scores/mix_scores.h"

namespace kvevict {
namespace {

template <DeviceType device>
Tensor mix_scores(const Tensor& scores, const Tensor& similarity, const Tensor& value_norm,
                  const Tensor& redundancy, const std::optional<Tensor>& priority,
                  int64_t diversity_reference) {
  constexpr auto kAny = Check::kAny;
  const Check check("mix_scores", device);
  check.dtype(scores, "scores", {ScalarType::Float});
  check.shape(scores, "scores", {kAny, kAny, kAny});
  const int64_t batch_size = scores.size(0), num_heads = scores.size(1), kv_len = scores.size(2);
  check.companion(similarity, "similarity", ScalarType::Float, {batch_size, num_heads, kv_len},
                  scores, "scores");
  check.companion(value_norm, "value_norm", ScalarType::Float, {batch_size, num_heads, kv_len},
                  scores, "scores");
  check.companion(redundancy, "redundancy", ScalarType::Float, {batch_size, num_heads}, scores,
                  "scores");
  check.priority(priority, batch_size, num_heads, kv_len, scores, "scores");
  check.one_of(diversity_reference, "diversity_reference", {"ATTENTION", "IMPORTANCE"});
  const Tensor dense_scores = dense(scores), dense_similarity = dense(similarity);
  const Tensor dense_value_norm = dense(value_norm), dense_redundancy = dense(redundancy);
  const std::optional<Tensor> dense_priority = dense(priority);

  const Tensor mixed = new_empty(scores, {batch_size, num_heads, kv_len}, ScalarType::Float);
  const MixScoresParams params{
      static_cast<const float*>(dense_scores.const_data_ptr()),
      static_cast<const float*>(dense_similarity.const_data_ptr()),
      static_cast<const float*>(dense_value_norm.const_data_ptr()),
      static_cast<const float*>(dense_redundancy.const_data_ptr()),
      data_or_null<uint8_t>(dense_priority),
      priority && priority->dim() == 3,
      static_cast<DiversityReference>(diversity_reference),
      static_cast<float*>(mixed.mutable_data_ptr()),
      batch_size,
      num_heads,
      kv_len,
  };
  run<MixScores, device>("mix_scores", params, mixed);
  return mixed;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(KVEVICT_NAMESPACE, m) {
  m.def(
      "mix_scores(Tensor scores, Tensor similarity, Tensor value_norm, Tensor redundancy, *, "
      "Tensor? priority=None, int diversity_reference=0) -> Tensor");
}

KVEVICT_IMPL(mix_scores)

}  // namespace kvevict
