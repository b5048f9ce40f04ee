// SPDX-License-Identifier: Apache-2.0
// What the moving ops share: keys and values of many layers and the rows to keep.
#pragma once

#include <cstdint>

#include "core/head_tensor.h"

namespace kvevict {

// The keys or the values of one layer: [batch_size, num_kv_heads, kv_len, head_dim]. The strides
// count bytes here, since keys and values may have different dtypes.
struct KvTensor {
  MutableHeadTensor rows;
  int64_t row_bytes;
  int64_t kv_len;

  KVEVICT_HD char* row(int64_t batch, int64_t head, int64_t index) const {
    return static_cast<char*>(rows.data) + rows.offset(batch, head, index);
  }
};

// One stream of rows: the keys or values of a layer, a sequence and a head.
struct KvStream {
  int64_t tensor, layer, batch, head;
};

struct KvShape {
  int64_t num_layers, batch_size, num_kv_heads;

  // Tensors are listed as all layers' keys, then all layers' values.
  KVEVICT_HD int64_t num_tensors() const { return 2 * num_layers; }
  KVEVICT_HD int64_t num_lists() const { return num_layers * batch_size * num_kv_heads; }
  KVEVICT_HD int64_t num_streams() const { return 2 * num_lists(); }
  KVEVICT_HD KvStream stream(int64_t item) const {
    const int64_t head = item % num_kv_heads;
    const int64_t batch = item / num_kv_heads % batch_size;
    const int64_t tensor = item / num_kv_heads / batch_size;
    return {tensor, tensor % num_layers, batch, head};
  }
};

// How many bytes the kept rows of all tensors have, at most.
inline int64_t kept_bytes(const KvShape& shape, const KvTensor* tensors, int64_t k) {
  int64_t bytes = 0;
  for (int64_t i = 0; i < shape.num_tensors(); ++i) {
    bytes += (k < tensors[i].kv_len ? k : tensors[i].kv_len) * tensors[i].row_bytes;
  }
  return bytes * shape.batch_size * shape.num_kv_heads;
}

}  // namespace kvevict
