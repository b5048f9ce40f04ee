// SPDX-License-Identifier: Apache-2.0
#include <tuple>

#include "binding/check.h"
#include "binding/registration.h"
#include "binding/run.h"
#include "ops/select_topk/select_topk.h"

namespace kvevict {
namespace {

template <DeviceType device>
std::tuple<Tensor, Tensor> select_topk(const Tensor& scores, int64_t k,
                                       const std::optional<Tensor>& row_k,
                                       const std::optional<Tensor>& priority) {
  constexpr auto kAny = Check::kAny;
  const Check check("select_topk", device);
  check.dtype(scores, "scores", {ScalarType::Float});
  check.shape(scores, "scores", {kAny, kAny, kAny});
  check.indexable(scores, "scores", 2, "kv_len");
  check.in_range(k, "k", 0, Check::kIndexEnd);
  const int64_t batch_size = scores.size(0), num_heads = scores.size(1), kv_len = scores.size(2);
  if (row_k) {
    check.companion(*row_k, "row_k", ScalarType::Int, {batch_size, num_heads}, scores, "scores");
  }
  check.priority(priority, batch_size, num_heads, kv_len, scores, "scores");
  const Tensor dense_scores = dense(scores);
  const std::optional<Tensor> dense_row_k = dense(row_k), dense_priority = dense(priority);
  if (row_k) check.values_in_range(*dense_row_k, "row_k", 0, k + 1);

  const Tensor kept_indices = new_empty(scores, {batch_size, num_heads, k}, ScalarType::Int);
  const Tensor kept_lens = new_empty(scores, {batch_size, num_heads}, ScalarType::Int);
  const SelectTopkParams params{
      static_cast<const float*>(dense_scores.const_data_ptr()),
      data_or_null<uint8_t>(dense_priority),
      priority && priority->dim() == 3,
      data_or_null<int32_t>(dense_row_k),
      static_cast<int32_t*>(kept_indices.mutable_data_ptr()),
      static_cast<int32_t*>(kept_lens.mutable_data_ptr()),
      batch_size,
      num_heads,
      kv_len,
      k,
  };
  run<SelectTopk, device>("select_topk", params, kept_lens);
  return {kept_indices, kept_lens};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(KVEVICT_NAMESPACE, m) {
  m.def(
      "select_topk(Tensor scores, SymInt k, *, Tensor? row_k=None, Tensor? priority=None) -> "
      "(Tensor, Tensor)");
}

KVEVICT_IMPL(select_topk)

}  // namespace kvevict
