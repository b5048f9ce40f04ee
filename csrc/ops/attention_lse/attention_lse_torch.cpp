// SPDX-License-Identifier: Apache-2.0
#include "binding/attention_args.h"
#include "binding/registration.h"
#include "binding/run.h"
#include "ops/attention_lse/attention_lse.h"

namespace kvevict {
namespace {

template <DeviceType device>
Tensor attention_lse(const Tensor& query, const Tensor& key, const std::optional<Tensor>& key_mask,
                     std::optional<double> sm_scale, bool causal) {
  const Check check("attention_lse", device);
  const AttentionArgs args = check_attention(check, query, key, key_mask, sm_scale, causal);
  const Tensor lse =
      new_empty(query, {query.size(0), query.size(1), query.size(2)}, ScalarType::Float);
  const AttentionLseParams params{args.params, static_cast<float*>(lse.mutable_data_ptr())};
  run<AttentionLse, device>("attention_lse", params, lse);
  return lse;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(KVEVICT_NAMESPACE, m) {
  m.def(
      "attention_lse(Tensor query, Tensor key, *, Tensor? key_mask=None, float? sm_scale=None, "
      "bool causal=True) -> Tensor");
}

KVEVICT_IMPL(attention_lse)

}  // namespace kvevict
