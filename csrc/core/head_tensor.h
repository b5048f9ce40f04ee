// SPDX-License-Identifier: Apache-2.0
// Addressing of query, key, value and index lists. Strides count elements; offsets are 64-bit.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace kvevict {

// A tensor [batch_size, num_heads, len, head_dim] whose last dimension is contiguous.
template <typename Pointer>
struct HeadTensorOf {
  Pointer data;
  int64_t stride_batch;
  int64_t stride_head;
  int64_t stride_seq;

  KVEVICT_HD int64_t offset(int64_t batch, int64_t head, int64_t index) const {
    return batch * stride_batch + head * stride_head + index * stride_seq;
  }
};
using HeadTensor = HeadTensorOf<const void*>;
using MutableHeadTensor = HeadTensorOf<void*>;

// Index lists [num_layers, batch_size, num_kv_heads, k]; a stride of 0 shares one list.
struct IndexLists {
  const int32_t* indices;
  const int32_t* lens;  // [num_layers, batch_size, num_kv_heads], or null: every list has k entries
  int64_t k;
  int64_t stride_layer, stride_batch, stride_head;  // of indices
  int64_t lens_stride_layer, lens_stride_batch, lens_stride_head;

  KVEVICT_HD const int32_t* list(int64_t layer, int64_t batch, int64_t head) const {
    return indices + layer * stride_layer + batch * stride_batch + head * stride_head;
  }
  KVEVICT_HD int64_t len(int64_t layer, int64_t batch, int64_t head) const {
    return lens ? lens[layer * lens_stride_layer + batch * lens_stride_batch +
                       head * lens_stride_head]
                : k;
  }
};

}  // namespace kvevict
