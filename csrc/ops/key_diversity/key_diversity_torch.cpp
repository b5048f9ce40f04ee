// SPDX-License-Identifier: Apache-2.0
#include <tuple>

#include "binding/check.h"
#include "binding/registration.h"
#include "binding/run.h"
#include "ops/key_diversity/key_diversity.h"

namespace kvevict {
namespace {

template <DeviceType device>
std::tuple<Tensor, Tensor> key_diversity(const Tensor& key, const std::optional<Tensor>& key_mask) {
  const Check check("key_diversity", device);
  check.scorable(key, "key");
  const int64_t batch_size = key.size(0), num_kv_heads = key.size(1), kv_len = key.size(2);
  if (key_mask) {
    check.companion(*key_mask, "key_mask", ScalarType::Bool, {batch_size, kv_len}, key, "key");
  }
  const std::optional<Tensor> dense_mask = dense(key_mask);

  const Tensor similarity = new_empty(key, {batch_size, num_kv_heads, kv_len}, ScalarType::Float);
  const Tensor redundancy = new_empty(key, {batch_size, num_kv_heads}, ScalarType::Float);
  const KeyDiversityParams params{
      head_tensor(key),
      data_or_null<bool>(dense_mask),
      dtype_of(key),
      static_cast<float*>(similarity.mutable_data_ptr()),
      static_cast<float*>(redundancy.mutable_data_ptr()),
      batch_size,
      num_kv_heads,
      kv_len,
      key.size(3),
  };
  run<KeyDiversity, device>("key_diversity", params, similarity);
  return {similarity, redundancy};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(KVEVICT_NAMESPACE, m) {
  m.def("key_diversity(Tensor key, *, Tensor? key_mask=None) -> (Tensor, Tensor)");
}

KVEVICT_IMPL(key_diversity)

}  // namespace kvevict
