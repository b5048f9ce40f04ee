// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "binding/kv_args.h"
#include "binding/registration.h"
#include "binding/run.h"
#include "core/validate.h"
#include "ops/broadcast_indices/broadcast_indices.h"

namespace kvevict {
namespace {

// Lists of an earlier eviction, -1 behind what it kept.
void check_base_values(const Check& check, const Tensor& base, int64_t num_positions) {
  if (!check.reads_values()) return;
  check.values_in_range(base, "base_indices", -1, num_positions);
  const Tensor host = on_host(base);
  const auto* values = static_cast<const int32_t*>(host.const_data_ptr());
  const int64_t k = host.size(3);
  for (int64_t first = 0; first < host.numel(); first += k) {
    const int64_t descent = find_not_ascending_then_none(values + first, k);
    if (descent < 0) continue;
    const int64_t place = first + descent;
    check.fail(
        "base_indices", "ascend strictly, with -1 only at the end",
        element_text(host, place, values[place]) + " after " + std::to_string(values[place - 1]));
  }
}

template <DeviceType device>
Tensor broadcast_indices(const Tensor& kept_indices, const Tensor& kept_lens, int64_t num_layers,
                         int64_t num_kv_heads, const std::optional<Tensor>& base_indices,
                         const std::optional<Tensor>& block_tables, int64_t page_size) {
  constexpr auto kAny = Check::kAny;
  const Check check("broadcast_indices", device);
  check.at_least(num_layers, "num_layers", 1);
  check.at_least(num_kv_heads, "num_kv_heads", 1);
  if (kept_indices.dim() < 3) {
    check.shape(kept_indices, "kept_indices", {kAny, {num_kv_heads, 1}, kAny});
  }
  const KvShape shape{num_layers, kept_indices.size(-3), num_kv_heads};
  if (base_indices) {
    check.companion(*base_indices, "base_indices", ScalarType::Int,
                    {{num_layers, 1}, shape.batch_size, {num_kv_heads, 1}, kAny}, kept_indices,
                    "kept_indices");
    check.indexable(*base_indices, "base_indices", 3, "k");
  }
  int64_t num_positions = Check::kIndexEnd;
  if (block_tables) {
    check.companion(*block_tables, "block_tables", ScalarType::Int,
                    {{num_layers, 1}, shape.batch_size, kAny}, kept_indices, "kept_indices");
    check.in_range(page_size, "page_size", 1, Check::kIndexEnd);
    num_positions =
        std::min(std::min(block_tables->size(2), num_positions) * page_size, num_positions);
  }
  const std::optional<Tensor> base = dense(base_indices), tables = dense(block_tables);
  if (base) check_base_values(check, *base, num_positions);
  if (tables) check.values_in_range(*tables, "block_tables", -1, Check::kIndexEnd / page_size);
  const int64_t kept_end = base ? base->size(3) : num_positions;
  const IndexArgs kept = check_kept_indices(check, kept_indices, kept_lens, shape, {kept_end},
                                            kept_indices, "kept_indices");

  IndexLists base_lists{};
  if (base) {
    const int64_t k0 = base->size(3), heads = base->size(2);
    base_lists.indices = data_or_null<int32_t>(base);
    base_lists.k = k0;
    base_lists.stride_layer = base->size(0) == 1 ? 0 : shape.batch_size * heads * k0;
    base_lists.stride_batch = heads * k0;
    base_lists.stride_head = heads == 1 ? 0 : k0;
  }
  const Tensor indices = new_empty(
      kept_indices, {num_layers, shape.batch_size, num_kv_heads, kept.lists.k}, ScalarType::Int);
  const BroadcastIndicesParams params{
      kept.lists,
      base_lists,
      data_or_null<int32_t>(tables),
      tables && tables->size(0) > 1 ? tables->stride(0) : 0,
      tables ? tables->size(2) : 0,
      page_size,
      static_cast<int32_t*>(indices.mutable_data_ptr()),
      num_layers,
      shape.batch_size,
      num_kv_heads,
  };
  run<BroadcastIndices, device>("broadcast_indices", params, indices);
  return indices;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(KVEVICT_NAMESPACE, m) {
  m.def(
      "broadcast_indices(Tensor kept_indices, Tensor kept_lens, SymInt num_layers, "
      "SymInt num_kv_heads, *, Tensor? base_indices=None, Tensor? block_tables=None, "
      "SymInt page_size=0) -> Tensor");
}

KVEVICT_IMPL(broadcast_indices)

}  // namespace kvevict
