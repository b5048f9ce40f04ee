// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/arena.h"
#include "core/cpu/isa.h"

namespace kvevict {

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

  // Of a kernel that selects row by row.
  static CpuPlan plan(int64_t num_rows, int64_t kv_len) {
    Arena scratch;
    carve(scratch, kv_len);
    constexpr int64_t kKeysPerThread = 1 << 15;
    return {1,
            {num_rows},
            0,
            scratch.bytes(),
            std::max<int64_t>(kKeysPerThread / std::max<int64_t>(kv_len, 1), 1)};
  }
};

}  // namespace kvevict
