// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/cpu/isa.h"
#include "core/head_tensor.h"

namespace kvevict {

struct BroadcastIndicesParams {
  IndexLists kept;
  IndexLists base;              // indices null: kept indices are positions already
  const int32_t* block_tables;  // [num_layers | 1, batch_size, max_pages], or null: no pages
  int64_t tables_stride_layer, max_pages, page_size;
  int32_t* indices;  // [num_layers, batch_size, num_kv_heads, k]
  int64_t num_layers, batch_size, num_kv_heads;

  KVEVICT_HD int64_t num_lists() const { return num_layers * batch_size * num_kv_heads; }

  // The pages of a sequence in a layer; only with block_tables.
  KVEVICT_HD const int32_t* table(int64_t layer, int64_t batch) const {
    return block_tables + layer * tables_stride_layer + batch * max_pages;
  }
  // The slot of a position; -1 without a page.
  KVEVICT_HD int32_t slot(const int32_t* table, int32_t position) const {
    constexpr int64_t kPositions = int64_t{1} << 31;
    const auto size = static_cast<uint32_t>(page_size < kPositions ? page_size : kPositions);
    const auto at = static_cast<uint32_t>(position);
    if (position < 0 || at / size >= max_pages) return -1;
    const int32_t page = table[at / size];
    return page < 0 ? -1 : static_cast<int32_t>(page * size + at % size);
  }

  // Entry i of a list: a position or, through a block table, a slot; -1 stays -1, and so becomes
  // what is out of range.
  KVEVICT_HD int32_t entry(int64_t layer, int64_t batch, int64_t head, int64_t i) const {
    if (i >= kept.len(layer, batch, head)) return -1;
    int32_t position = kept.list(layer, batch, head)[i];
    if (base.indices) {
      const bool found = position >= 0 && position < base.k;
      position = found ? base.list(layer, batch, head)[position] : -1;
    }
    return block_tables ? slot(table(layer, batch), position) : position;
  }
};

struct BroadcastIndices {
  static CpuPlan plan_cpu(const BroadcastIndicesParams& params, int /*num_threads*/) {
    return {1, {params.num_lists()}, 0, 0};
  }
  template <Isa isa>
  static void run_cpu(const BroadcastIndicesParams& params, const CpuWork& work) noexcept;

  static int64_t cuda_workspace_bytes(const BroadcastIndicesParams& /*params*/) { return 0; }
  static int launch_cuda(const BroadcastIndicesParams& params, void* workspace,
                         void* stream) noexcept;
};

}  // namespace kvevict
