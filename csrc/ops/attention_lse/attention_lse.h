// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/attention.h"
#include "core/cpu/isa.h"
#include "core/cpu/row_block.h"

namespace kvevict {

struct AttentionLseParams {
  AttentionParams attention;
  float* lse;  // [batch_size, num_qo_heads, qo_len], natural log
};

struct AttentionLse {
  static CpuPlan plan_cpu(const AttentionLseParams& params, int /*num_threads*/) {
    Arena scratch;
    RowBlock::carve(scratch, params.attention, /*with_exponentials=*/false);
    const int64_t heads = params.attention.batch_size * params.attention.num_qo_heads;
    return {1, {heads}, 0, scratch.bytes()};
  }
  template <Isa isa>
  static void run_cpu(const AttentionLseParams& params, const CpuWork& work) noexcept;

  static int64_t cuda_workspace_bytes(const AttentionLseParams& params);
  static int launch_cuda(const AttentionLseParams& params, void* workspace, void* stream) noexcept;
};

}  // namespace kvevict
