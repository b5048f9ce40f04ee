// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace kvevict {

// Numbers of tokens, in lists [batch_size, num_heads | 1, len]: positions (-1 = none) or groups.
struct TokenLists {
  const int32_t* data;  // or null: there are no lists
  int64_t len;
  int64_t stride_batch, stride_head;  // 0 between heads that share a list

  KVEVICT_HD const int32_t* list(int64_t batch, int64_t head) const {
    return data ? data + batch * stride_batch + head * stride_head : nullptr;
  }
};

}  // namespace kvevict
