// SPDX-License-Identifier: Apache-2.0
#include "binding/kv_args.h"

#include <algorithm>

#include "core/validate.h"

namespace kvevict {
namespace {

KvTensor kv_tensor(const Tensor& tensor, Access access) {
  const auto bytes = static_cast<int64_t>(tensor.element_size());
  void* data = access == Access::kWrite ? tensor.mutable_data_ptr()
                                        : const_cast<void*>(tensor.const_data_ptr());
  return {{data, tensor.stride(0) * bytes, tensor.stride(1) * bytes, tensor.stride(2) * bytes},
          tensor.size(3) * bytes,
          tensor.size(2)};
}

// Every list once: shared ones (stride 0) are checked against the shortest layer.
void check_list_values(const Check& check, const IndexArgs& args, const KvShape& shape,
                       const std::vector<int64_t>& kv_lens) {
  const Tensor indices = on_host(args.indices);
  const std::optional<Tensor> lens = args.lens ? std::optional(on_host(*args.lens)) : std::nullopt;
  IndexLists lists = args.lists;
  lists.indices = static_cast<const int32_t*>(indices.const_data_ptr());
  lists.lens = data_or_null<int32_t>(lens);
  const bool per_layer = lists.stride_layer != 0 || lists.lens_stride_layer != 0;
  const bool per_head = lists.stride_head != 0 || lists.lens_stride_head != 0;
  for (int64_t layer = 0; layer < (per_layer ? shape.num_layers : 1); ++layer) {
    const int64_t kv_len = per_layer && kv_lens.size() > 1
                               ? kv_lens[layer]
                               : *std::min_element(kv_lens.begin(), kv_lens.end());
    for (int64_t batch = 0; batch < shape.batch_size; ++batch) {
      for (int64_t head = 0; head < (per_head ? shape.num_kv_heads : 1); ++head) {
        const int32_t* list = lists.list(layer, batch, head);
        const int64_t len = lists.len(layer, batch, head);
        if (len < 0 || len > lists.k) {
          check.fail("kept_lens", "be in [0, " + std::to_string(lists.k + 1) + ")",
                     std::to_string(len));
        }
        const auto place = [&](int64_t i) { return list - lists.indices + i; };
        const int64_t outside = find_outside(list, len, 0, kv_len);
        if (outside >= 0) {
          check.fail("kept_indices", "be in [0, " + std::to_string(kv_len) + ")",
                     element_text(indices, place(outside), list[outside]));
        }
        const int64_t descent = find_not_ascending(list, len);
        if (descent >= 0) {
          check.fail("kept_indices", "ascend strictly",
                     element_text(indices, place(descent), list[descent]) + " after " +
                         std::to_string(list[descent - 1]));
        }
      }
    }
  }
}

}  // namespace

std::vector<std::string> element_names(const std::string& list, size_t count) {
  std::vector<std::string> names;
  for (size_t i = 0; i < count; ++i) names.push_back(list + "[" + std::to_string(i) + "]");
  return names;
}

std::vector<KvTensor> kv_tensors(const std::vector<Tensor>& keys, const std::vector<Tensor>& values,
                                 Access access) {
  std::vector<KvTensor> tensors;
  for (const auto* list : {&keys, &values}) {
    for (const Tensor& tensor : *list) tensors.push_back(kv_tensor(tensor, access));
  }
  return tensors;
}

std::vector<KvTensor> check_kv_layers(const Check& check, const std::vector<Tensor>& keys,
                                      const std::vector<Tensor>& values, Access access) {
  constexpr auto kAny = Check::kAny;
  check.at_least(static_cast<int64_t>(keys.size()), "len(keys)", 1);
  if (values.size() != keys.size()) {
    check.fail("values", "have as many layers as keys, " + std::to_string(keys.size()),
               std::to_string(values.size()));
  }
  const auto key_names = element_names("keys", keys.size());
  const auto value_names = element_names("values", values.size());
  for (size_t layer = 0; layer < keys.size(); ++layer) {
    const Tensor &key = keys[layer], &value = values[layer];
    check.device(key, key_names[layer], keys[0], "keys[0]");
    if (layer == 0) {
      check.shape(key, key_names[layer], {kAny, kAny, kAny, kAny});
    } else {
      check.shape(key, key_names[layer], {keys[0].size(0), keys[0].size(1), kAny, kAny});
    }
    check.indexable(key, key_names[layer], 2, "kv_len");
    check.movable(key, key_names[layer]);
    check.device(value, value_names[layer], keys[0], "keys[0]");
    check.shape(value, value_names[layer], {key.size(0), key.size(1), key.size(2), kAny});
    check.movable(value, value_names[layer]);
  }
  return kv_tensors(keys, values, access);
}

IndexArgs check_kept_indices(const Check& check, const Tensor& kept_indices,
                             const std::optional<Tensor>& kept_lens, const KvShape& shape,
                             const std::vector<int64_t>& kv_lens, const Tensor& reference,
                             const std::string& reference_name) {
  const auto& [num_layers, batch_size, num_kv_heads] = shape;
  const bool all_layers = kept_indices.dim() == 3;
  std::vector<Check::Dim> dims;
  if (!all_layers) dims.push_back({num_layers, 1});
  dims.push_back(batch_size);
  dims.push_back({num_kv_heads, 1});
  dims.push_back(Check::kAny);
  check.companion(kept_indices, "kept_indices", ScalarType::Int, dims, reference, reference_name);
  check.indexable(kept_indices, "kept_indices", kept_indices.dim() - 1, "k");
  if (kept_lens) {
    const auto sizes = kept_indices.sizes();
    check.companion(*kept_lens, "kept_lens", ScalarType::Int, {sizes.begin(), sizes.end() - 1},
                    reference, reference_name);
  }

  IndexArgs args{{}, dense(kept_indices), dense(kept_lens)};
  const int64_t k = kept_indices.size(-1);
  const int64_t list_heads = kept_indices.size(-2);
  const int64_t list_layers = all_layers ? 1 : kept_indices.size(0);
  const int64_t layer_stride = list_layers == 1 ? 0 : batch_size * list_heads;
  const int64_t head_stride = list_heads == 1 ? 0 : 1;
  args.lists = {
      static_cast<const int32_t*>(args.indices.const_data_ptr()),
      data_or_null<int32_t>(args.lens),
      k,
      layer_stride * k,
      list_heads * k,
      head_stride * k,
      layer_stride,
      list_heads,
      head_stride,
  };
  if (check.reads_values() && num_layers > 0) check_list_values(check, args, shape, kv_lens);
  return args;
}

}  // namespace kvevict
