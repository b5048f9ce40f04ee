// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "core/attention.h"
#include "core/cpu/isa.h"
#include "core/cpu/row_block.h"

namespace kvevict {

struct ScoreKeysByTextParams {
  AttentionParams attention;
  VotingRows text;     // the text rows; unweighted
  float* scores;       // [batch_size, 1, kv_len]
  float* column_sums;  // [batch_size, 1, kv_len]
  float* row_weights;  // [batch_size, num_rows]

  // The query row of a text entry that counts, or -1.
  KVEVICT_HD int64_t text_row(int64_t batch, int64_t entry) const {
    const int64_t row = text.row(batch, entry);
    return row < 0 || attention.row_is_padding(batch, row) ? -1 : row;
  }
};

// Three phases: the head-mean text rows, in a few parts by head, so that threads need not all read
// all keys; their weights from the text-text block; the two column sums.
struct ScoreKeysByText {
  // How many parts the mean over heads is computed in. It depends on shapes only, so that sums do
  // not depend on the number of threads.
  static int64_t num_parts(const ScoreKeysByTextParams& params) {
    constexpr int64_t kMaxParts = 4;
    constexpr int64_t kMaxBytes = 64 << 20;
    const int64_t bytes = std::max<int64_t>(params.text.num_rows, 1) *
                          std::max(padded_kv_len(params.attention), kMaxPanel) *
                          int64_t{sizeof(float)};
    const int64_t heads = params.attention.num_kv_heads;
    return std::clamp<int64_t>(kMaxBytes / bytes, 1, std::min(kMaxParts, heads));
  }

  static CpuPlan plan_cpu(const ScoreKeysByTextParams& params, int /*num_threads*/) {
    const AttentionParams& attention = params.attention;
    const int64_t num_rows = attention.batch_size * num_parts(params) * params.text.num_rows;
    const int64_t num_panels = attention.batch_size * padded_kv_len(attention) / kMaxPanel;
    Arena scratch;
    RowBlock::carve(scratch, attention, /*with_exponentials=*/true);
    return {3,
            {num_rows, attention.batch_size, num_panels},
            num_rows * padded_kv_len(attention) * int64_t{sizeof(float)},
            scratch.bytes()};
  }
  template <Isa isa>
  static void run_cpu(const ScoreKeysByTextParams& params, const CpuWork& work) noexcept;

  static int64_t cuda_workspace_bytes(const ScoreKeysByTextParams& params);
  static int launch_cuda(const ScoreKeysByTextParams& params, void* workspace,
                         void* stream) noexcept;
};

}  // namespace kvevict
