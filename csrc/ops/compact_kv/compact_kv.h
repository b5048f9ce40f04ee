// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/cpu/isa.h"
#include "core/kv_layers.h"

namespace kvevict {

struct CompactKvParams {
  KvShape shape;
  const KvTensor* tensors;  // [num_tensors]
  IndexLists kept;
};

struct CompactKv {
  static CpuPlan plan_cpu(const CompactKvParams& params, int /*num_threads*/) {
    return {1, {params.shape.num_streams()}, 0, 0};
  }
  template <Isa isa>
  static void run_cpu(const CompactKvParams& params, const CpuWork& work) noexcept;

  static int64_t cuda_workspace_bytes(const CompactKvParams& /*params*/) { return 0; }
  static int launch_cuda(const CompactKvParams& params, void* workspace, void* stream) noexcept;
};

}  // namespace kvevict
