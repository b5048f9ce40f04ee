// SPDX-License-Identifier: Apache-2.0
#include "binding/kv_args.h"

#include <algorithm>

#include "binding/in_place.h"
#include "core/validate.h"

namespace kvevict {
namespace {

KvTensor kv_tensor(const Tensor& tensor, Access access) {
  const auto bytes = static_cast<int64_t>(tensor.element_size());
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  void* data = access == Access::kWrite ? tensor.mutable_data_ptr()
                                        : const_cast<void*>(tensor.const_data_ptr());
  return {{data, strides[0] * bytes, strides[1] * bytes, strides[2] * bytes},
          sizes[3] * bytes,
          sizes[2]};
}

// Every list once: shared ones (stride 0) are checked against the shortest layer.
void check_list_values(const Check& check, const IndexArgs& args, const KvShape& shape,
                       const std::vector<int64_t>& kv_lens) {
  const auto& [lists, indices, lens] = on_host(args);
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

// The dimensions of what there is once for each layer, sequence and head, or once for all layers.
std::vector<Check::Dim> list_dims(const KvShape& shape, bool all_layers) {
  std::vector<Check::Dim> dims;
  if (!all_layers) dims.push_back({shape.num_layers, 1});
  dims.push_back(shape.batch_size);
  dims.push_back({shape.num_kv_heads, 1});
  return dims;
}

// Strides over these dimensions, the first `num_dims` of a dense tensor; 0 where they are shared.
struct ListStrides {
  int64_t layer, batch, head;
};
ListStrides list_strides(const Tensor& tensor, int64_t num_dims) {
  const int64_t batch_size = tensor.size(num_dims - 2), num_heads = tensor.size(num_dims - 1);
  const bool all_layers = num_dims == 2 || tensor.size(0) == 1;
  return {all_layers ? 0 : batch_size * num_heads, num_heads, num_heads == 1 ? 0 : 1};
}

}  // namespace

std::vector<Argument> element_names(const char* list, size_t count) {
  std::vector<Argument> names;
  for (size_t i = 0; i < count; ++i) names.emplace_back(list, i);
  return names;
}

IndexArgs on_host(const IndexArgs& args) {
  IndexArgs host{args.lists, on_host(args.indices), std::nullopt};
  if (args.lens) host.lens = on_host(*args.lens);
  host.lists.indices = static_cast<const int32_t*>(host.indices.const_data_ptr());
  host.lists.lens = data_or_null<int32_t>(host.lens);
  return host;
}

std::vector<KvTensor> kv_tensors(const std::vector<Tensor>& keys, const std::vector<Tensor>& values,
                                 Access access) {
  std::vector<KvTensor> tensors;
  tensors.reserve(keys.size() + values.size());
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
  for (size_t layer = 0; layer < keys.size(); ++layer) {
    const Tensor &key = keys[layer], &value = values[layer];
    const Argument key_name("keys", layer), value_name("values", layer);
    check.device(key, key_name, keys[0], "keys[0]");
    if (layer == 0) {
      check.shape(key, key_name, {kAny, kAny, kAny, kAny});
    } else {
      check.shape(key, key_name, {keys[0].size(0), keys[0].size(1), kAny, kAny});
    }
    check.indexable(key, key_name, 2, "kv_len");
    check.movable(key, key_name);
    check.device(value, value_name, keys[0], "keys[0]");
    check.shape(value, value_name, {key.size(0), key.size(1), key.size(2), kAny});
    check.movable(value, value_name);
  }
  return kv_tensors(keys, values, access);
}

IndexArgs check_index_lists(const Check& check, const Tensor& lists, const Argument& argument,
                            const KvShape& shape, const Tensor& reference,
                            const Argument& reference_name) {
  std::vector<Check::Dim> dims = list_dims(shape, lists.dim() == 3);
  dims.push_back(Check::kAny);
  check.companion(lists, argument, ScalarType::Int, dims, reference, reference_name);
  check.indexable(lists, argument, lists.dim() - 1, "k");
  IndexArgs args{{}, dense(lists), std::nullopt};
  const int64_t k = lists.size(-1);
  const ListStrides strides = list_strides(lists, lists.dim() - 1);
  args.lists.indices = static_cast<const int32_t*>(args.indices.const_data_ptr());
  args.lists.k = k;
  args.lists.stride_layer = strides.layer * k;
  args.lists.stride_batch = strides.batch * k;
  args.lists.stride_head = strides.head * k;
  return args;
}

IndexArgs check_list_lens(const Check& check, const Tensor& lens, const Argument& argument,
                          const KvShape& shape, const Tensor& reference,
                          const Argument& reference_name) {
  check.companion(lens, argument, ScalarType::Int, list_dims(shape, lens.dim() == 2), reference,
                  reference_name);
  IndexArgs args{{}, dense(lens), std::nullopt};
  const ListStrides strides = list_strides(lens, lens.dim());
  args.lists.indices = static_cast<const int32_t*>(args.indices.const_data_ptr());
  args.lists.k = 1;
  args.lists.stride_layer = strides.layer;
  args.lists.stride_batch = strides.batch;
  args.lists.stride_head = strides.head;
  return args;
}

void claim_layers(const Check& check, const std::vector<Tensor>& keys,
                  const std::vector<Tensor>& values,
                  std::initializer_list<std::pair<Argument, std::optional<Tensor>>> lists) {
  std::vector<Tensor> written = keys;
  written.insert(written.end(), values.begin(), values.end());
  std::vector<Argument> names = element_names("keys", keys.size());
  for (const Argument& name : element_names("values", values.size())) names.push_back(name);
  claim(check, written, std::move(names), lists);
}

IndexArgs check_kept_indices(const Check& check, const Tensor& kept_indices,
                             const std::optional<Tensor>& kept_lens, const KvShape& shape,
                             const std::vector<int64_t>& kv_lens, const Tensor& reference,
                             const Argument& reference_name) {
  IndexArgs args =
      check_index_lists(check, kept_indices, "kept_indices", shape, reference, reference_name);
  if (kept_lens) {
    const auto sizes = kept_indices.sizes();
    check.companion(*kept_lens, "kept_lens", ScalarType::Int, {sizes.begin(), sizes.end() - 1},
                    reference, reference_name);
  }
  args.lens = dense(kept_lens);
  const ListStrides strides = list_strides(args.indices, args.indices.dim() - 1);
  args.lists.lens = data_or_null<int32_t>(args.lens);
  args.lists.lens_stride_layer = strides.layer;
  args.lists.lens_stride_batch = strides.batch;
  args.lists.lens_stride_head = strides.head;
  if (check.reads_values() && shape.num_layers > 0) {
    check_list_values(check, args, shape, kv_lens);
  }
  return args;
}

}  // namespace kvevict
