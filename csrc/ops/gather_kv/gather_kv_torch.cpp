// SPDX-License-Identifier: Apache-2.0
#include <tuple>
#include <vector>

#include "binding/kv_args.h"
#include "binding/registration.h"
#include "binding/run.h"
#include "ops/gather_kv/gather_kv.h"

namespace kvevict {
namespace {

template <DeviceType device>
std::tuple<std::vector<Tensor>, std::vector<Tensor>> gather_kv(
    const std::vector<Tensor>& keys, const std::vector<Tensor>& values, const Tensor& kept_indices,
    const std::optional<Tensor>& kept_lens) {
  const Check check("gather_kv", device);
  const std::vector<KvTensor> sources = check_kv_layers(check, keys, values, Access::kRead);
  const KvShape shape{static_cast<int64_t>(keys.size()), keys[0].size(0), keys[0].size(1)};
  std::vector<int64_t> kv_lens;
  for (const Tensor& key : keys) kv_lens.push_back(key.size(2));
  const IndexArgs kept =
      check_kept_indices(check, kept_indices, kept_lens, shape, kv_lens, keys[0], "keys[0]");

  const auto gathered = [&](const std::vector<Tensor>& tensors) {
    std::vector<Tensor> results;
    for (const Tensor& tensor : tensors) {
      results.push_back(
          new_empty(tensor, {shape.batch_size, shape.num_kv_heads, kept.lists.k, tensor.size(3)},
                    tensor.scalar_type()));
    }
    return results;
  };
  const std::vector<Tensor> new_keys = gathered(keys), new_values = gathered(values);
  const std::vector<KvTensor> destinations = kv_tensors(new_keys, new_values, Access::kWrite);
  const GatherKvParams params{shape, sources.data(), destinations.data(), kept.lists};
  run<GatherKv, device>("gather_kv", params, keys[0]);
  return {new_keys, new_values};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(KVEVICT_NAMESPACE, m) {
  m.def(
      "gather_kv(Tensor[] keys, Tensor[] values, Tensor kept_indices, Tensor? kept_lens=None) -> "
      "(Tensor[], Tensor[])");
}

KVEVICT_IMPL(gather_kv)

}  // namespace kvevict
