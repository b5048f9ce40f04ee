// SPDX-License-Identifier: Apache-2.0
// Blocks of rows of the attention matrix on the CPU: how large they are and what memory they take.
// Nothing here depends on the instruction set, so that any translation unit can plan with it.
#pragma once

#include <algorithm>

#include "core/arena.h"
#include "core/attention.h"
#include "core/cpu/panel_size.h"

namespace kvevict {

inline int64_t padded_kv_len(const AttentionParams& attention) {
  return (attention.kv_len + kMaxPanel - 1) / kMaxPanel * kMaxPanel;
}

// Rows per block: enough to pay for packing the keys, few enough for a block's exponentials to stay
// in cache.
inline int64_t row_block_size(const AttentionParams& attention) {
  constexpr int64_t kMaxRows = 128;
  constexpr int64_t kMinRows = 12;
  constexpr int64_t kCacheBytes = 4 << 20;
  const int64_t row_bytes = std::max(padded_kv_len(attention), kMaxPanel) * int64_t{sizeof(float)};
  return std::clamp(kCacheBytes / row_bytes, kMinRows, kMaxRows);
}

// A row of the attention matrix.
struct AttentionRow {
  int64_t head;      // of the query
  int64_t entry;     // of the row list
  int64_t row;       // of the query
  int64_t last_key;  // that it sees
};

// Scratch of one thread for one block.
struct RowBlock {
  int64_t capacity;
  int64_t num_rows;
  int64_t num_panels;   // that any of the rows sees
  AttentionRow* rows;   // [capacity]
  float* query;         // [capacity][head_dim], or pairs of bfloat16 in half of it
  float* panel;         // [head_dim][kPanel]
  float* sum;           // [capacity][lanes], sums of exponentials
  float* reference;     // [capacity], in units of log2
  float* normalizer;    // [capacity], sum of the exponentials against the reference
  float* factor;        // [capacity], weight / normalizer
  float* exponentials;  // [panels][capacity][kPanel], each relative to the reference of its time
  float* references;    // [panels][capacity], those references

  static RowBlock carve(Arena& arena, const AttentionParams& attention, bool with_exponentials) {
    constexpr int64_t kMaxLanes = 16;
    constexpr int64_t kMinPanel = 8;
    const int64_t capacity = row_block_size(attention);
    const int64_t kv_len = with_exponentials ? padded_kv_len(attention) : 0;
    return {capacity,
            0,
            0,
            arena.take<AttentionRow>(capacity),
            arena.take<float>(capacity * attention.head_dim),
            arena.take<float>(attention.head_dim * kMaxPanel),
            arena.take<float>(capacity * kMaxLanes),
            arena.take<float>(capacity),
            arena.take<float>(capacity),
            arena.take<float>(capacity),
            arena.take<float>(capacity * kv_len),
            arena.take<float>(capacity * kv_len / kMinPanel)};
  }
};

}  // namespace kvevict
