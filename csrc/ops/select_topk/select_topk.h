// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/cpu/select_scratch.h"
#include "core/order.h"
#include "core/priority.h"

namespace kvevict {

struct SelectTopkParams {
  const float* scores;      // [batch_size, num_heads, kv_len]
  const uint8_t* priority;  // [batch_size, 1 | num_heads, kv_len], or null: 1
  bool priority_per_head;
  const int32_t* row_k;   // [batch_size, num_heads], or null: k
  int32_t* kept_indices;  // [batch_size, num_heads, k], ascending, then -1
  int32_t* kept_lens;     // [batch_size, num_heads]
  int64_t batch_size, num_heads, kv_len, k;

  KVEVICT_HD const uint8_t* priority_of(int64_t row) const {
    return priority_row(priority, priority_per_head, row, num_heads, kv_len);
  }
};

struct SelectTopk {
  static CpuPlan plan_cpu(const SelectTopkParams& params, int /*num_threads*/) {
    return SelectScratch::plan(params.batch_size * params.num_heads, params.kv_len);
  }
  template <Isa isa>
  static void run_cpu(const SelectTopkParams& params, const CpuWork& work) noexcept;

  static int64_t cuda_workspace_bytes(const SelectTopkParams& params);
  static int launch_cuda(const SelectTopkParams& params, void* workspace, void* stream) noexcept;
};

}  // namespace kvevict
