// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/cpu/isa.h"
#include "core/kv_layers.h"

namespace kvevict {

struct GatherKvParams {
  KvShape shape;
  const KvTensor* sources;       // [num_tensors]
  const KvTensor* destinations;  // [num_tensors], rows [batch_size, num_kv_heads, k, head_dim]
  IndexLists kept;
};

struct GatherKv {
  static CpuPlan plan_cpu(const GatherKvParams& params, int /*num_threads*/) {
    return {1, {params.shape.num_streams()}, 0, 0};
  }
  template <Isa isa>
  static void run_cpu(const GatherKvParams& params, const CpuWork& work) noexcept;

  static int64_t cuda_workspace_bytes(const GatherKvParams& /*params*/) { return 0; }
  static int launch_cuda(const GatherKvParams& params, void* workspace, void* stream) noexcept;
};

}  // namespace kvevict
