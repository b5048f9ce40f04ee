// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/arena.h"
#include "core/cpu/isa.h"
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

// One thread's working memory for a row. Lists have room for a vector's worth of overshoot.
struct SelectScratch {
  static constexpr int64_t kOvershoot = 16;
  static constexpr int64_t kBuckets = 2048;
  uint32_t* keys;        // [kv_len]
  uint32_t* candidates;  // [kv_len]
  uint32_t* histogram;   // [kBuckets]

  static SelectScratch carve(Arena& arena, int64_t kv_len) {
    return {arena.take<uint32_t>(kv_len + kOvershoot), arena.take<uint32_t>(kv_len + kOvershoot),
            arena.take<uint32_t>(kBuckets)};
  }
};

struct SelectTopk {
  static CpuPlan plan_cpu(const SelectTopkParams& params, int /*num_threads*/) {
    Arena scratch;
    SelectScratch::carve(scratch, params.kv_len);
    constexpr int64_t kKeysPerThread = 1 << 15;
    return {1,
            {params.batch_size * params.num_heads},
            0,
            scratch.bytes(),
            std::max<int64_t>(kKeysPerThread / std::max<int64_t>(params.kv_len, 1), 1)};
  }
  template <Isa isa>
  static void run_cpu(const SelectTopkParams& params, const CpuWork& work) noexcept;

  static int64_t cuda_workspace_bytes(const SelectTopkParams& params);
  static int launch_cuda(const SelectTopkParams& params, void* workspace, void* stream) noexcept;
};

}  // namespace kvevict
