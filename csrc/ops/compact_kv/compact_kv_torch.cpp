// SPDX-License-Identifier: Apache-2.0
#include <vector>

#include "binding/in_place.h"
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
  std::vector<Tensor> written = keys;
  std::vector<std::string> names = element_names("keys", keys.size());
  written.insert(written.end(), values.begin(), values.end());
  for (std::string& name : element_names("values", values.size())) names.push_back(name);
  // The lists are read while rows move.
  std::vector<Tensor> used = written;
  used.push_back(kept.indices);
  names.push_back("kept_indices");
  if (kept.lens) {
    used.push_back(*kept.lens);
    names.push_back("kept_lens");
  }
  check.disjoint(used, names, written.size());
  announce_writes("compact_kv_", written, names);

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
