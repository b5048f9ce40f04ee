// SPDX-License-Identifier: Apache-2.0
#include <vector>

#include "binding/kv_args.h"
#include "binding/registration.h"
#include "binding/run.h"
#include "ops/compact_kv/compact_kv.h"

namespace kvevict {
namespace {

template <DeviceType device>
void compact_kv_(const std::vector<Tensor>& keys, const std::vector<Tensor>& values,
                 const Tensor& kept_indices, const std::optional<Tensor>& kept_lens) {
  const Check check("compact_kv_", device);
  const std::vector<KvTensor> tensors = check_kv_layers(check, keys, values, Access::kWrite);
  const KvShape shape{static_cast<int64_t>(keys.size()), keys[0].size(0), keys[0].size(1)};
  std::vector<int64_t> kv_lens;
  for (const Tensor& key : keys) kv_lens.push_back(key.size(2));
  const IndexArgs kept =
      check_kept_indices(check, kept_indices, kept_lens, shape, kv_lens, keys[0], "keys[0]");
  claim_layers(check, keys, values, {{"kept_indices", kept.indices}, {"kept_lens", kept.lens}});

  const CompactKvParams params{shape, tensors.data(), kept.lists};
  run<CompactKv, device>("compact_kv_", params, keys[0]);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(KVEVICT_NAMESPACE, m) {
  m.def(
      "compact_kv_(Tensor(a!)[] keys, Tensor(b!)[] values, Tensor kept_indices, "
      "Tensor? kept_lens=None) -> ()");
}

KVEVICT_IMPL(compact_kv_)

}  // namespace kvevict
