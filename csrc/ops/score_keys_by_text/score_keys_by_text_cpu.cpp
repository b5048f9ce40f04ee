// SPDX-License-Identifier: Apache-2.0
#include "ops/score_keys_by_text/score_keys_by_text.h"

#include "core/cpu/attention_rows.h"

namespace kvevict {
namespace {

// rows: [batch_size, num_parts, num_rows, padded_kv_len], attention rows, summed over the query
// heads of a part and divided by the number of all heads.
template <DType dtype>
void mean_text_rows(const ScoreKeysByTextParams& params, const CpuWork& work, float* rows) {
  const AttentionParams& attention = params.attention;
  const int64_t stride = padded_kv_len(attention);
  const int64_t num_rows = params.text.num_rows;
  const int64_t num_parts = ScoreKeysByText::num_parts(params);
  const int64_t group_size = attention.group_size();
  Arena arena(work.scratch);
  RowBlock block = RowBlock::carve(arena, attention, /*with_exponentials=*/true);
  std::fill(rows + work.begin * stride, rows + work.end * stride, 0.0f);

  for (int64_t item = work.begin; item < work.end;) {
    const int64_t batch = item / num_rows / num_parts;
    const int64_t part = item / num_rows % num_parts;
    const int64_t first_entry = item % num_rows;
    const int64_t end_entry =
        std::min({num_rows, first_entry + work.end - item, first_entry + block.capacity});
    const int64_t begin_head = attention.num_kv_heads * part / num_parts * group_size;
    const int64_t end_head = attention.num_kv_heads * (part + 1) / num_parts * group_size;
    add_mean_rows<dtype>(attention, params.text, batch, begin_head, end_head,
                         attention.num_qo_heads, first_entry, end_entry, block,
                         rows + item * stride, stride);
    item += end_entry - first_entry;
  }
}

// A text row weighs the mean attention that its own key gets from the text rows that see it.
void weigh_text_rows(const ScoreKeysByTextParams& params, int64_t batch, const float* rows) {
  const AttentionParams& attention = params.attention;
  const int64_t stride = padded_kv_len(attention);
  const int64_t num_rows = params.text.num_rows;
  const int64_t num_parts = ScoreKeysByText::num_parts(params);
  for (int64_t entry = 0; entry < num_rows; ++entry) {
    const int64_t row = params.text_row(batch, entry);
    float received = 0.0f;
    int64_t num_viewers = 0;
    for (int64_t viewer = 0; row >= 0 && viewer < num_rows; ++viewer) {
      if (params.text_row(batch, viewer) < row) continue;
      for (int64_t part = 0; part < num_parts; ++part) {
        received += rows[(part * num_rows + viewer) * stride + attention.position(row)];
      }
      ++num_viewers;
    }
    params.row_weights[batch * num_rows + entry] =
        row < 0 ? 0.0f : received / static_cast<float>(num_viewers);
  }
}

void sum_columns(const ScoreKeysByTextParams& params, int64_t batch, int64_t first_key,
                 const float* rows) {
  const int64_t stride = padded_kv_len(params.attention);
  const int64_t num_rows = params.text.num_rows;
  const int64_t num_parts = ScoreKeysByText::num_parts(params);
  const int64_t kv_len = params.attention.kv_len;
  const float* weights = params.row_weights + batch * num_rows;
  for (int64_t key = first_key; key < first_key + kMaxPanel; key += kLanes) {
    Vec score = {}, column_sum = {};
    for (int64_t part = 0; part < num_parts; ++part) {
      for (int64_t entry = 0; entry < num_rows; ++entry) {
        const Vec row = load<Vec>(rows + (part * num_rows + entry) * stride + key);
        score += row * weights[entry];
        column_sum += row;
      }
    }
    for (int lane = 0; lane < kLanes && key + lane < kv_len; ++lane) {
      params.scores[batch * kv_len + key + lane] = score[lane];
      params.column_sums[batch * kv_len + key + lane] = column_sum[lane];
    }
  }
}

}  // namespace

template <>
void ScoreKeysByText::run_cpu<kThisIsa>(const ScoreKeysByTextParams& params,
                                        const CpuWork& work) noexcept {
  auto* rows = reinterpret_cast<float*>(work.shared);
  const int64_t stride = padded_kv_len(params.attention);
  const int64_t batch_rows = num_parts(params) * params.text.num_rows * stride;
  switch (work.phase) {
    case 0:
      dispatch_dtype(params.attention.dtype,
                     [&](auto dtype) { mean_text_rows<dtype.value>(params, work, rows); });
      break;
    case 1:
      for (int64_t batch = work.begin; batch < work.end; ++batch) {
        weigh_text_rows(params, batch, rows + batch * batch_rows);
      }
      break;
    default:
      for (int64_t item = work.begin; item < work.end; ++item) {
        const int64_t panels = stride / kMaxPanel;
        sum_columns(params, item / panels, item % panels * kMaxPanel,
                    rows + item / panels * batch_rows);
      }
  }
}

}  // namespace kvevict
