// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/cpu/isa.h"
#include "core/kv_layers.h"

namespace kvevict {

struct EvictSlotsParams {
  KvShape shape;
  const KvTensor* tensors;  // [num_tensors]
  IndexLists slots;         // of rows to evict; -1 behind the last one
  IndexLists kv_lens;       // lists of one entry: how many rows are live
};

// With e of kv_len rows evicted, the evicted rows below kv_len - e are holes, and as many of the e
// rows behind survive: the i-th survivor fills the i-th hole. No row that is read is written.
struct EvictSlots {
  static CpuPlan plan_cpu(const EvictSlotsParams& params, int /*num_threads*/) {
    constexpr int64_t kRowsPerThread = 512;
    const int64_t rows_per_list = 2 * std::max<int64_t>(params.slots.k, 1);
    return {
        1, {params.shape.num_lists()}, 0, 0, std::max<int64_t>(kRowsPerThread / rows_per_list, 1)};
  }
  template <Isa isa>
  static void run_cpu(const EvictSlotsParams& params, const CpuWork& work) noexcept;

  static int64_t cuda_workspace_bytes(const EvictSlotsParams& /*params*/) { return 0; }
  static int launch_cuda(const EvictSlotsParams& params, void* workspace, void* stream) noexcept;
};

}  // namespace kvevict
