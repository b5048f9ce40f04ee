// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace kvevict {

// The priority of keys that scores decide about.
inline constexpr uint8_t kOrdinary = 1;

// The priorities of one row of scores [batch_size, num_heads, kv_len], or null if there are none.
// They are the same for all heads unless per_head.
KVEVICT_HD inline const uint8_t* priority_row(const uint8_t* priority, bool per_head, int64_t row,
                                              int64_t num_heads, int64_t kv_len) {
  return priority ? priority + (per_head ? row : row / num_heads) * kv_len : nullptr;
}

}  // namespace kvevict
