// SPDX-License-Identifier: Apache-2.0
// What the scoring ops share: the attention matrix that none of them ever writes out.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/head_tensor.h"

namespace kvevict {

enum class Statistic : int8_t { kSum, kMax, kSumOfSquares };
enum class HeadReduction : int8_t { kNone, kGroupMean, kGroupMax, kAllMean };

struct AttentionParams {
  HeadTensor query;      // [batch_size, num_qo_heads, qo_len, head_dim]
  HeadTensor key;        // [batch_size, num_kv_heads, kv_len, head_dim]
  const bool* key_mask;  // [batch_size, kv_len] or null; true = real token
  DType dtype;
  bool causal;
  float sm_scale;
  int64_t batch_size, num_qo_heads, num_kv_heads, qo_len, kv_len, head_dim;

  KVEVICT_HD int64_t group_size() const { return num_qo_heads / num_kv_heads; }

  KVEVICT_HD bool key_is_real(int64_t batch, int64_t key_index) const {
    return !key_mask || key_mask[batch * kv_len + key_index];
  }

  // The key at which a query row stands, and the last one that it sees.
  KVEVICT_HD int64_t position(int64_t row) const { return kv_len - qo_len + row; }
  KVEVICT_HD int64_t last_key(int64_t row) const { return causal ? position(row) : kv_len - 1; }

  KVEVICT_HD bool row_is_padding(int64_t batch, int64_t row) const {
    return causal && !key_is_real(batch, position(row));
  }
};

// Which query rows vote, and how much.
struct VotingRows {
  const int32_t* row_index;  // [batch_size, num_rows], -1 = none; null: all query rows
  const float* row_weight;   // [batch_size, 1 | num_qo_heads, num_rows], or null: 1
  bool weight_per_head;
  const float* softmax_lse;  // [batch_size, num_qo_heads, qo_len], or null: computed
  int64_t num_rows;
  int64_t qo_len = 0;  // with row_index

  // The query row of an entry, or less than 0. A row that does not exist, which CUDA does not
  // refuse, is none.
  KVEVICT_HD int64_t row(int64_t batch, int64_t entry) const {
    if (!row_index) return entry;
    const int64_t row = row_index[batch * num_rows + entry];
    return row < qo_len ? row : -1;
  }
  KVEVICT_HD float weight(int64_t batch, int64_t num_qo_heads, int64_t head, int64_t entry) const {
    if (!row_weight) return 1.0f;
    const int64_t list = weight_per_head ? batch * num_qo_heads + head : batch;
    return row_weight[list * num_rows + entry];
  }
};

}  // namespace kvevict
