// SPDX-License-Identifier: Apache-2.0
// Blocks of rows of the attention matrix on the CPU, for attention_lse and the scoring ops.
//
// Keys are the lanes, query rows the registers (see panel.h). Each row keeps a running
// reference close to its maximum, so that exponentials leave the registers once, unnormalised, and
// are never computed again. A row's numbers depend on nothing but the row and its keys: not on the
// block, the thread or the batch it is computed in.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/cpu/isa.h"
#include "core/cpu/panel.h"
#include "core/cpu/row_block.h"

namespace kvevict {
inline namespace KVEVICT_ISA {

template <DType dtype>
inline int64_t packed_depth(const AttentionParams& attention) {
  return attention.head_dim / ProductOf<dtype>::type::kElements;
}

// Queries take over the sign of sm_scale, so that larger products are larger logits.
template <DType dtype>
void pack_queries(const AttentionParams& attention, int64_t batch, RowBlock& block) {
  constexpr uint32_t kSigns = ProductOf<dtype>::type::kElements == 2 ? 0x80008000u : 0x80000000u;
  const uint32_t flip = attention.sm_scale < 0.0f ? kSigns : 0;
  const int64_t depth = packed_depth<dtype>(attention);
  for (int64_t i = 0; i < block.num_rows; ++i) {
    const AttentionRow& row = block.rows[i];
    pack_row<dtype>(element_address<dtype>(attention.query, batch, row.head, row.row), 0, depth,
                    block.query + i * depth, flip);
  }
}

// Packs keys [first_key, first_key + kPanel); beyond kv_len the last key stands in.
template <DType dtype>
void pack_panel(const AttentionParams& attention, int64_t batch, int64_t kv_head, int64_t first_key,
                float* panel) {
  pack_panel<dtype>(0, packed_depth<dtype>(attention), panel, [&](int64_t i) {
    return element_address<dtype>(attention.key, batch, kv_head,
                                  std::min(first_key + i, attention.kv_len - 1));
  });
}

// Fetches the keys of a panel into the second-level cache, a few lines at a time.
class PanelPrefetch {
 public:
  template <DType dtype>
  static PanelPrefetch of(const AttentionParams& attention, int64_t batch, int64_t kv_head,
                          int64_t first_key) {
    PanelPrefetch prefetch;
    if (first_key >= attention.kv_len) return prefetch;
    prefetch.key_ = static_cast<const std::byte*>(
        element_address<dtype>(attention.key, batch, kv_head, first_key));
    prefetch.key_stride_ = attention.key.stride_seq * kElementBytes<dtype>;
    prefetch.key_bytes_ = attention.head_dim * kElementBytes<dtype>;
    prefetch.keys_left_ = std::min<int64_t>(kPanel, attention.kv_len - first_key);
    return prefetch;
  }

  int64_t num_lines() const { return keys_left_ * ((key_bytes_ + kLine - 1) / kLine); }

  void fetch(int64_t num_lines) {
    for (; num_lines > 0 && keys_left_ > 0; --num_lines) {
      _mm_prefetch(reinterpret_cast<const char*>(key_ + offset_), _MM_HINT_T1);
      offset_ += kLine;
      if (offset_ >= key_bytes_) {
        offset_ = 0;
        key_ += key_stride_;
        --keys_left_;
      }
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  const std::byte* key_ = nullptr;
  int64_t key_stride_ = 0, key_bytes_ = 0, keys_left_ = 0, offset_ = 0;
};

// Calls use_row(i, products) for every row of the block, with its products with the panel's keys.
template <typename Product, typename F>
inline void multiply_panel(const RowBlock& block, int64_t depth, F&& use_row) {
  int64_t first = 0;
  const auto tile = [&](auto num_rows) {
    multiply_tile<Product, num_rows.value, kTileVecs>(
        block.query + first * depth, block.panel, depth,
        [&](int i, Vec(&sums)[kTileVecs]) { use_row(first + i, sums); });
  };
  for (; first + kTileRows <= block.num_rows; first += kTileRows) tile(Constant<kTileRows>{});
  (void)dispatch_value<1, 2, 3, 4, 5>(static_cast<int>(block.num_rows - first), tile);
}

// Appends an entry of the row list to the block, if it votes.
inline bool append_row(const AttentionParams& attention, const VotingRows& voting, int64_t batch,
                       int64_t head, int64_t entry, RowBlock& block) {
  const int64_t row = voting.row(batch, entry);
  if (row < 0 || attention.row_is_padding(batch, row)) return false;
  if (voting.weight(batch, attention.num_qo_heads, head, entry) == 0.0f) return false;
  const int64_t lse_row = (batch * attention.num_qo_heads + head) * attention.qo_len + row;
  if (voting.softmax_lse &&
      voting.softmax_lse[lse_row] == -std::numeric_limits<float>::infinity()) {
    return false;
  }
  block.rows[block.num_rows++] = {head, entry, row, attention.last_key(row)};
  return true;
}

// Runs the softmax of a block of rows over the keys of one KV head. Fills reference and normalizer
// and, if wanted, the exponentials. With a log-sum-exp given, the reference is that and the
// normalizer 1.
template <DType dtype, bool with_exponentials>
void attend(const AttentionParams& attention, int64_t batch, int64_t kv_head,
            const float* softmax_lse, RowBlock& block) {
  using Product = typename ProductOf<dtype>::type;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kLog2E = 1.44269504088896341f;
  constexpr float kLowest = std::numeric_limits<float>::lowest();
  // From here on logits are more than 100 apart, or equal: only the largest have a share.
  constexpr float kCoarse = 0x1p30f;
  const float slack = softmax_lse ? kInfinity : 16.0f;
  const int64_t depth = packed_depth<dtype>(attention);
  const float scale = std::fabs(attention.sm_scale) * kLog2E;

  pack_queries<dtype>(attention, batch, block);
  int64_t last_key = 0, first_edge = attention.kv_len - 1;
  for (int64_t i = 0; i < block.num_rows; ++i) {
    const AttentionRow& row = block.rows[i];
    last_key = std::max(last_key, row.last_key);
    first_edge = std::min(first_edge, row.last_key);
    store(block.sum + i * kLanes, Vec{});
    block.reference[i] =
        softmax_lse
            ? kLog2E * softmax_lse[(batch * attention.num_qo_heads + row.head) * attention.qo_len +
                                   row.row]
            : kLowest;
  }

  block.num_panels = last_key / kPanel + 1;
  for (int64_t panel = 0; panel < block.num_panels; ++panel) {
    const int64_t first_key = panel * kPanel;
    pack_panel<dtype>(attention, batch, kv_head, first_key, block.panel);
    const bool masked = attention.key_mask || first_key + kPanel - 1 > first_edge;
    IntVec real[kTileVecs];
    for (int j = 0; masked && j < kTileVecs; ++j) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t key_index = first_key + j * kLanes + lane;
        real[j][lane] =
            key_index < attention.kv_len && attention.key_is_real(batch, key_index) ? -1 : 0;
      }
    }
    float* exponentials = block.exponentials + panel * block.capacity * kPanel;
    float* references = block.references + panel * block.capacity;
    auto next_panel = PanelPrefetch::of<dtype>(attention, batch, kv_head, first_key + kPanel);
    const int64_t lines_per_row = next_panel.num_lines() / block.num_rows + 1;

    multiply_panel<Product>(block, depth, [&](int64_t i, Vec(&products)[kTileVecs]) {
      next_panel.fetch(lines_per_row);
      IntVec visible[kTileVecs];
      Vec largest = broadcast(-kInfinity);
      if (masked) {
        const auto seen = static_cast<int32_t>(
            std::clamp<int64_t>(block.rows[i].last_key - first_key, -1, kPanel));
        for (int j = 0; j < kTileVecs; ++j) {
          visible[j] = real[j] & (lane_indices() + j * kLanes <= seen);
          largest = max(visible[j] ? products[j] * scale : broadcast(-kInfinity), largest);
        }
      } else {
        for (int j = 0; j < kTileVecs; ++j) largest = max(products[j], largest);
        largest *= scale;
      }
      Vec sum = load<Vec>(block.sum + i * kLanes);
      float reference = block.reference[i];
      if (any(largest > reference + slack)) {
        const float raised = reduce_max(largest);
        sum *= exp2(broadcast(reference - raised));
        block.reference[i] = reference = raised;
      }
      Vec exponents[kTileVecs];
      for (int j = 0; j < kTileVecs; ++j) exponents[j] = products[j] * scale - reference;
      if (!softmax_lse && std::fabs(reference) > kCoarse) [[unlikely]] {
        // Fused, the difference of equals is the rounding of a product, which is huge.
        for (int j = 0; j < kTileVecs; ++j) {
          const Vec zero = products[j] - products[j];  // or NaN
          exponents[j] = products[j] * scale < reference ? broadcast(-kInfinity) : zero;
        }
      }
      for (int j = 0; j < kTileVecs; ++j) {
        Vec exponential = exp2(exponents[j]);
        if (masked) exponential = visible[j] ? exponential : Vec{};
        sum += exponential;
        if constexpr (with_exponentials) {
          store(exponentials + i * kPanel + j * kLanes, exponential);
        }
      }
      if constexpr (with_exponentials) references[i] = reference;
      store(block.sum + i * kLanes, sum);
    });
  }
  for (int64_t i = 0; i < block.num_rows; ++i) {
    block.normalizer[i] = softmax_lse ? 1.0f : reduce_add(load<Vec>(block.sum + i * kLanes));
  }
}

// A row that saw a NaN makes the keys that it sees NaN, and no others.
inline void spread_nan(const AttentionParams& attention, int64_t batch, RowBlock& block,
                       int64_t i) {
  for (int64_t panel = 0; panel < block.num_panels; ++panel) {
    float* exponentials = block.exponentials + (panel * block.capacity + i) * kPanel;
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      const int64_t key = panel * kPanel + lane;
      const bool visible = key < attention.kv_len && key <= block.rows[i].last_key &&
                           attention.key_is_real(batch, key);
      exponentials[lane] = visible ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
    }
    block.references[panel * block.capacity + i] = 0.0f;
  }
  block.reference[i] = 0.0f;
  block.factor[i] = 1.0f;
}

// Fills block.factor: what turns exponentials against the final reference into weighted
// probabilities. A row that sees no key has none.
template <typename Weight>
void weigh(const AttentionParams& attention, int64_t batch, RowBlock& block, Weight&& weight) {
  for (int64_t i = 0; i < block.num_rows; ++i) {
    const float normalizer = block.normalizer[i];
    block.factor[i] = normalizer == 0.0f ? 0.0f : weight(block.rows[i]) / normalizer;
    if (std::isnan(block.factor[i]) || std::isnan(block.reference[i])) {
      spread_nan(attention, batch, block, i);
    }
  }
}

// Calls use(j, probabilities) for the vectors of a row's panel.
template <typename F>
inline void for_probabilities(const RowBlock& block, int64_t panel, int64_t i, F&& use) {
  const float* exponentials = block.exponentials + (panel * block.capacity + i) * kPanel;
  const float reference = block.references[panel * block.capacity + i];
  float factor = block.factor[i];
  if (reference != block.reference[i]) {
    factor *= exp2(broadcast(reference - block.reference[i]))[0];
  }
  for (int j = 0; j < kTileVecs; ++j) use(j, load<Vec>(exponentials + j * kLanes) * factor);
}

// Adds to rows[entry - first_entry] ([..][stride]) the weighted rows of the attention matrix of
// query heads [begin_head, end_head), divided by num_heads, for voting entries [first_entry,
// end_entry). Heads are added in ascending order.
template <DType dtype>
void add_mean_rows(const AttentionParams& attention, const VotingRows& voting, int64_t batch,
                   int64_t begin_head, int64_t end_head, int64_t num_heads, int64_t first_entry,
                   int64_t end_entry, RowBlock& block, float* rows, int64_t stride) {
  const float scale = 1.0f / static_cast<float>(num_heads);
  const int64_t group_size = attention.group_size();
  const auto flush = [&](int64_t kv_head) {
    if (block.num_rows == 0) return;
    attend<dtype, true>(attention, batch, kv_head, voting.softmax_lse, block);
    weigh(attention, batch, block, [&](const AttentionRow& row) {
      return scale * voting.weight(batch, attention.num_qo_heads, row.head, row.entry);
    });
    for (int64_t panel = 0; panel < block.num_panels; ++panel) {
      for (int64_t i = 0; i < block.num_rows; ++i) {
        float* out = rows + (block.rows[i].entry - first_entry) * stride + panel * kPanel;
        for_probabilities(block, panel, i, [&](int j, Vec probabilities) {
          store(out + j * kLanes, load<Vec>(out + j * kLanes) + probabilities);
        });
      }
    }
    block.num_rows = 0;
  };
  for (int64_t head = begin_head; head < end_head; ++head) {
    for (int64_t entry = first_entry; entry < end_entry; ++entry) {
      if (!append_row(attention, voting, batch, head, entry, block)) continue;
      if (block.num_rows == block.capacity) flush(head / group_size);
    }
    if ((head + 1) % group_size == 0 || head + 1 == end_head) flush(head / group_size);
  }
}

}  // namespace KVEVICT_ISA

}  // namespace kvevict
