// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <vector>

#include "binding/in_place.h"
#include "binding/kv_args.h"
#include "binding/registration.h"
#include "binding/run.h"
#include "core/validate.h"
#include "ops/rerotate_keys/rerotate_keys.h"

namespace kvevict {
namespace {

void check_keys(const Check& check, const std::vector<Tensor>& keys) {
  constexpr auto kAny = Check::kAny;
  check.at_least(static_cast<int64_t>(keys.size()), "len(keys)", 1);
  for (size_t layer = 0; layer < keys.size(); ++layer) {
    const Tensor& key = keys[layer];
    const Argument name("keys", layer);
    check.device(key, name, keys[0], "keys[0]");
    if (layer == 0) {
      check.shape(key, name, {kAny, kAny, kAny, kAny});
      check.dtype(key, name, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16});
    } else {
      check.shape(key, name, {keys[0].size(0), keys[0].size(1), kAny, kAny});
      check.dtype(key, name, {keys[0].scalar_type()});
    }
    check.contiguous_last_dim(key, name);
  }
}

struct PositionArgs {
  PositionLists lists;
  Tensor positions;  // keeps the pointer of lists alive
};

// num_axes: kAny for any number of axes, 0 for none.
PositionArgs check_positions(const Check& check, const Tensor& positions, const char* name,
                             int64_t num_axes, const KvShape& shape, int64_t kv_len,
                             const Tensor& reference) {
  const bool has_axes = num_axes != 0;
  const int64_t rank = positions.dim() - (has_axes ? 1 : 0);
  std::vector<Check::Dim> dims;
  if (has_axes) dims.push_back(num_axes);
  if (rank != 2 && rank != 3) dims.push_back({shape.num_layers, 1});
  dims.push_back(shape.batch_size);
  if (rank != 2) dims.push_back({shape.num_kv_heads, 1});
  dims.push_back(kv_len);
  check.companion(positions, name, ScalarType::Int, dims, reference, "keys[0]");
  if (has_axes && positions.size(0) == 0) check.fail(name, "have an axis at least", "0");

  PositionArgs args{{}, dense(positions)};
  const int64_t heads = rank == 2 ? 1 : positions.size(-2);
  const int64_t layers = rank == 4 ? positions.size(has_axes ? 1 : 0) : 1;
  const int64_t per_layer = shape.batch_size * heads * kv_len;
  args.lists = {
      static_cast<const int32_t*>(args.positions.const_data_ptr()),
      layers * per_layer,
      layers == 1 ? 0 : per_layer,
      heads * kv_len,
      heads == 1 ? 0 : kv_len,
  };
  if (check.reads_values()) {
    const Tensor host = on_host(args.positions);
    const auto* values = static_cast<const int32_t*>(host.const_data_ptr());
    const int64_t bad = find_outside(values, host.numel(), -1, Check::kIndexEnd);
    if (bad >= 0) check.fail(name, "be at least -1", element_text(host, bad, values[bad]));
  }
  return args;
}

template <DeviceType device>
void rerotate_keys_(const std::vector<Tensor>& keys, const Tensor& old_positions,
                    const Tensor& new_positions, const Tensor& inv_freq,
                    const std::optional<Tensor>& axis_of_freq, bool interleaved) {
  const Check check("rerotate_keys_", device);
  check_keys(check, keys);
  const KvShape shape{static_cast<int64_t>(keys.size()), keys[0].size(0), keys[0].size(1)};
  int64_t kv_len = 0, head_dim = keys[0].size(3);
  for (const Tensor& key : keys) {
    kv_len = std::max(kv_len, key.size(2));
    head_dim = std::min(head_dim, key.size(3));
  }
  check.companion(inv_freq, "inv_freq", ScalarType::Float, {Check::kAny}, keys[0], "keys[0]");
  const int64_t num_freqs = inv_freq.size(0);
  if (2 * num_freqs > head_dim) {
    check.fail("inv_freq",
               "have at most head_dim / 2 = " + std::to_string(head_dim / 2) + " elements",
               std::to_string(num_freqs));
  }
  if (axis_of_freq) {
    check.companion(*axis_of_freq, "axis_of_freq", ScalarType::Int, {num_freqs}, keys[0],
                    "keys[0]");
  }
  const PositionArgs from = check_positions(check, old_positions, "old_positions",
                                            axis_of_freq ? Check::kAny : 0, shape, kv_len, keys[0]);
  const int64_t num_axes = axis_of_freq ? old_positions.size(0) : 1;
  const PositionArgs to = check_positions(check, new_positions, "new_positions",
                                          axis_of_freq ? num_axes : 0, shape, kv_len, keys[0]);
  const Tensor freqs = dense(inv_freq);
  const std::optional<Tensor> axes = dense(axis_of_freq);
  const auto* freqs_data = static_cast<const float*>(freqs.const_data_ptr());
  const auto* axes_data = data_or_null<int32_t>(axes);
  if (check.reads_values()) {
    const Tensor host = on_host(freqs);
    const auto* values = static_cast<const float*>(host.const_data_ptr());
    const int64_t bad = find_not_finite(values, num_freqs);
    if (bad >= 0) check.fail("inv_freq", "be finite", element_text(host, bad, values[bad]));
  }
  if (axes) check.values_in_range(*axes, "axis_of_freq", 0, num_axes);
  claim(check, keys, element_names("keys", keys.size()),
        {{"old_positions", from.positions},
         {"new_positions", to.positions},
         {"inv_freq", freqs},
         {"axis_of_freq", axes}});

  const std::vector<KvTensor> tensors = kv_tensors(keys, {}, Access::kWrite);
  const RerotateKeysParams params{
      tensors.data(),   dtype_of(keys[0]),  from.lists, to.lists,    freqs_data,
      axes_data,        num_axes,           num_freqs,  interleaved, shape.num_layers,
      shape.batch_size, shape.num_kv_heads, kv_len,
  };
  run<RerotateKeys, device>("rerotate_keys_", params, keys[0]);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(KVEVICT_NAMESPACE, m) {
  m.def(
      "rerotate_keys_(Tensor(a!)[] keys, Tensor old_positions, Tensor new_positions, "
      "Tensor inv_freq, *, Tensor? axis_of_freq=None, bool interleaved=False) -> ()");
}

KVEVICT_IMPL(rerotate_keys_)

}  // namespace kvevict
