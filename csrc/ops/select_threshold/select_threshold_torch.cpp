// SPDX-License-Identifier: Apache-2.0
#include <tuple>

#include "binding/check.h"
#include "binding/registration.h"
#include "binding/run.h"
#include "ops/select_threshold/select_threshold.h"

namespace kvevict {
namespace {

template <DeviceType device>
std::tuple<Tensor, Tensor> select_threshold(const Tensor& sums, const Tensor& maxima,
                                            const Tensor& candidates, std::optional<double> ratio,
                                            std::optional<double> kappa, double alpha,
                                            std::optional<int64_t> max_evicted,
                                            const std::optional<Tensor>& key_mask) {
  constexpr auto kAny = Check::kAny;
  const Check check("select_threshold", device);
  check.dtype(sums, "sums", {ScalarType::Float});
  check.shape(sums, "sums", {kAny, kAny, kAny});
  const int64_t batch_size = sums.size(0), num_heads = sums.size(1), kv_len = sums.size(2);
  check.companion(maxima, "maxima", ScalarType::Float, {batch_size, num_heads, kv_len}, sums,
                  "sums");
  check.companion(candidates, "candidates", ScalarType::Bool, {batch_size, kv_len}, sums, "sums");
  if (!ratio && !kappa) check.fail("ratio", "be given if kappa is not", "None");
  if (ratio && kappa) check.fail("kappa", "be None if ratio is given", "a number");
  check.not_negative(ratio ? *ratio : *kappa, ratio ? "ratio" : "kappa");
  check.finite(static_cast<float>(alpha), "alpha");
  if (max_evicted) check.at_least(*max_evicted, "max_evicted", 0);
  if (key_mask) {
    check.companion(*key_mask, "key_mask", ScalarType::Bool, {batch_size, kv_len}, sums, "sums");
  }

  const Tensor dense_sums = dense(sums), dense_maxima = dense(maxima);
  const Tensor dense_candidates = dense(candidates);
  const std::optional<Tensor> dense_mask = dense(key_mask);
  const Tensor kept_indices = new_empty(sums, {batch_size, num_heads, kv_len}, ScalarType::Int);
  const Tensor kept_lens = new_empty(sums, {batch_size, num_heads}, ScalarType::Int);
  const SelectThresholdParams params{
      static_cast<const float*>(dense_sums.const_data_ptr()),
      static_cast<const float*>(dense_maxima.const_data_ptr()),
      static_cast<const bool*>(dense_candidates.const_data_ptr()),
      data_or_null<bool>(dense_mask),
      static_cast<float>(ratio ? *ratio : *kappa),
      kappa.has_value(),
      static_cast<float>(alpha),
      max_evicted.value_or(kv_len),
      static_cast<int32_t*>(kept_indices.mutable_data_ptr()),
      static_cast<int32_t*>(kept_lens.mutable_data_ptr()),
      batch_size,
      num_heads,
      kv_len,
  };
  run<SelectThreshold, device>("select_threshold", params, kept_lens);
  return {kept_indices, kept_lens};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(KVEVICT_NAMESPACE, m) {
  m.def(
      "select_threshold(Tensor sums, Tensor maxima, Tensor candidates, *, float? ratio=None, "
      "float? kappa=None, float alpha, SymInt? max_evicted=None, Tensor? key_mask=None) -> "
      "(Tensor, Tensor)");
}

KVEVICT_IMPL(select_threshold)

}  // namespace kvevict
