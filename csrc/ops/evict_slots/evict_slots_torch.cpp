// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <vector>

#include "binding/kv_args.h"
#include "binding/registration.h"
#include "binding/run.h"
#include "core/validate.h"
#include "ops/evict_slots/evict_slots.h"

namespace kvevict {
namespace {

// Where a list begins in the tensor of all lists.
int64_t place_of(const IndexLists& lists, const int32_t* list) { return list - lists.indices; }

// Every list once: what is shared by several layers (stride 0) fits the one of least capacity.
void check_values(const Check& check, const IndexArgs& slots, const IndexArgs& kv_lens,
                  const std::vector<KvTensor>& tensors, const KvShape& shape) {
  const bool per_layer = slots.lists.stride_layer != 0 || kv_lens.lists.stride_layer != 0;
  const bool per_head = slots.lists.stride_head != 0 || kv_lens.lists.stride_head != 0;
  const auto keys_end = tensors.begin() + shape.num_layers;
  const int64_t least_capacity =
      std::min_element(tensors.begin(), keys_end, [](const KvTensor& a, const KvTensor& b) {
        return a.kv_len < b.kv_len;
      })->kv_len;
  for (int64_t layer = 0; layer < (per_layer ? shape.num_layers : 1); ++layer) {
    const int64_t capacity = per_layer ? tensors[layer].kv_len : least_capacity;
    for (int64_t batch = 0; batch < shape.batch_size; ++batch) {
      for (int64_t head = 0; head < (per_head ? shape.num_kv_heads : 1); ++head) {
        const int32_t* kv_len = kv_lens.lists.list(layer, batch, head);
        if (*kv_len < 0 || *kv_len > capacity) {
          check.fail("kv_lens", "be in [0, " + std::to_string(capacity + 1) + ")",
                     element_text(kv_lens.indices, place_of(kv_lens.lists, kv_len), *kv_len));
        }
        const int32_t* list = slots.lists.list(layer, batch, head);
        const int64_t num_evicted = std::find(list, list + slots.lists.k, -1) - list;
        const auto element = [&](int64_t i) {
          return element_text(slots.indices, place_of(slots.lists, list + i), list[i]);
        };
        const int64_t outside = find_outside(list, num_evicted, 0, *kv_len);
        if (outside >= 0) {
          check.fail("slots", "be in [0, " + std::to_string(*kv_len) + ")", element(outside));
        }
        const int64_t descent = find_not_ascending(list, num_evicted);
        if (descent >= 0) {
          check.fail("slots", "ascend strictly",
                     element(descent) + " after " + std::to_string(list[descent - 1]));
        }
        const int64_t behind = find_outside(list + num_evicted, slots.lists.k - num_evicted, -1, 0);
        if (behind >= 0) {
          check.fail("slots", "be -1 behind the first -1", element(num_evicted + behind));
        }
      }
    }
  }
}

template <DeviceType device>
void evict_slots_(const std::vector<Tensor>& keys, const std::vector<Tensor>& values,
                  const Tensor& slots, const Tensor& kv_lens) {
  const Check check("evict_slots_", device);
  const std::vector<KvTensor> tensors = check_kv_layers(check, keys, values, Access::kWrite);
  const KvShape shape{static_cast<int64_t>(keys.size()), keys[0].size(0), keys[0].size(1)};
  const IndexArgs slot_lists = check_index_lists(check, slots, "slots", shape, keys[0], "keys[0]");
  const IndexArgs lens = check_list_lens(check, kv_lens, "kv_lens", shape, keys[0], "keys[0]");
  if (check.reads_values()) {
    check_values(check, on_host(slot_lists), on_host(lens), tensors, shape);
  }
  claim_layers(check, keys, values, {{"slots", slot_lists.indices}, {"kv_lens", lens.indices}});

  const EvictSlotsParams params{shape, tensors.data(), slot_lists.lists, lens.lists};
  run<EvictSlots, device>("evict_slots_", params, keys[0]);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(KVEVICT_NAMESPACE, m) {
  m.def("evict_slots_(Tensor(a!)[] keys, Tensor(b!)[] values, Tensor slots, Tensor kv_lens) -> ()");
}

KVEVICT_IMPL(evict_slots_)

}  // namespace kvevict
