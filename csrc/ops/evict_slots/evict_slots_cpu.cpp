// SPDX-License-Identifier: Apache-2.0
#include "ops/evict_slots/evict_slots.h"

#include "core/cpu/move_rows.h"

namespace kvevict {
namespace {

// Keys and values of one list. The rows are few, so they go through the caches.
void evict_list(const EvictSlotsParams& params, const KvStream& at) {
  const int32_t* slots = params.slots.list(at.layer, at.batch, at.head);
  const int32_t* end = std::find(slots, slots + params.slots.k, -1);
  const int64_t kv_len = *params.kv_lens.list(at.layer, at.batch, at.head);
  const int64_t new_len = kv_len - (end - slots);
  const int32_t* end_of_holes = std::lower_bound(slots, end, new_len);
  const int32_t* next_evicted = end_of_holes;
  int64_t survivor = new_len;
  for (const int32_t* hole = slots; hole != end_of_holes; ++hole, ++survivor) {
    for (; next_evicted != end && *next_evicted == survivor; ++next_evicted) ++survivor;
    for (int64_t of_layer : {at.tensor, at.tensor + params.shape.num_layers}) {
      const KvTensor& tensor = params.tensors[of_layer];
      copy_row<RowStore::kCached>(tensor.row(at.batch, at.head, *hole),
                                  tensor.row(at.batch, at.head, survivor), tensor.row_bytes);
    }
  }
}

}  // namespace

template <>
void EvictSlots::run_cpu<kThisIsa>(const EvictSlotsParams& params, const CpuWork& work) noexcept {
  for (int64_t item = work.begin; item < work.end; ++item) {
    evict_list(params, params.shape.stream(item));  // of the keys
  }
}

}  // namespace kvevict
