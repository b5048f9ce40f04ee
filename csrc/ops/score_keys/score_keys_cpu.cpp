// SPDX-License-Identifier: Apache-2.0
#include "ops/score_keys/score_keys.h"

#include "core/cpu/attention_rows.h"

namespace kvevict {
namespace {

// NaN wins over any number, as it does in torch.
Vec max_or_nan(Vec a, Vec b) { return (b > a) | (b != b) ? b : a; }

template <Statistic statistic>
Vec add_to_statistic(Vec sum, Vec probabilities) {
  if constexpr (statistic == Statistic::kSum) return sum + probabilities;
  if constexpr (statistic == Statistic::kMax) return max_or_nan(sum, probabilities);
  if constexpr (statistic == Statistic::kSumOfSquares) return probabilities * probabilities + sum;
}

// columns: [batch_size, num_qo_heads, padded_kv_len], the statistic of every query head.
template <DType dtype, Statistic statistic>
void score_query_heads(const ScoreKeysParams& params, const CpuWork& work, float* columns) {
  const AttentionParams& attention = params.attention;
  const int64_t stride = padded_kv_len(attention);
  Arena arena(work.scratch);
  RowBlock block = RowBlock::carve(arena, attention, /*with_exponentials=*/true);
  std::fill(columns + work.begin * stride, columns + work.end * stride, 0.0f);

  const auto flush = [&](int64_t batch, int64_t kv_head) {
    if (block.num_rows == 0) return;
    attend<dtype, true>(attention, batch, kv_head, params.voting.softmax_lse, block);
    weigh(attention, batch, block, [&](const AttentionRow& row) {
      return params.voting.weight(batch, attention.num_qo_heads, row.head, row.entry);
    });
    for (int64_t panel = 0; panel < block.num_panels; ++panel) {
      for (int64_t i = 0; i < block.num_rows;) {
        const int64_t head = block.rows[i].head;
        float* out = columns + (batch * attention.num_qo_heads + head) * stride + panel * kPanel;
        Vec sums[kTileVecs];
        for (int j = 0; j < kTileVecs; ++j) sums[j] = load<Vec>(out + j * kLanes);
        for (; i < block.num_rows && block.rows[i].head == head; ++i) {
          for_probabilities(block, panel, i, [&](int j, Vec probabilities) {
            sums[j] = add_to_statistic<statistic>(sums[j], probabilities);
          });
        }
        for (int j = 0; j < kTileVecs; ++j) store(out + j * kLanes, sums[j]);
      }
    }
    block.num_rows = 0;
  };

  // Neighbouring query heads of one KV head share its packed keys.
  for (int64_t item = work.begin; item < work.end; ++item) {
    const int64_t batch = item / attention.num_qo_heads;
    const int64_t head = item % attention.num_qo_heads;
    const int64_t kv_head = head / attention.group_size();
    for (int64_t entry = 0; entry < params.voting.num_rows; ++entry) {
      if (!append_row(attention, params.voting, batch, head, entry, block)) continue;
      if (block.num_rows == block.capacity) flush(batch, kv_head);
    }
    if ((head + 1) % attention.group_size() == 0 || item + 1 == work.end) flush(batch, kv_head);
  }
}

void reduce_query_heads(const ScoreKeysParams& params, const CpuWork& work, const float* columns) {
  const AttentionParams& attention = params.attention;
  const int64_t stride = padded_kv_len(attention);
  const int64_t num_heads = params.heads_per_score();
  const bool is_max = params.reduction == HeadReduction::kGroupMax;
  const float scale = is_max ? 1.0f : 1.0f / static_cast<float>(num_heads);
  for (int64_t item = work.begin; item < work.end; ++item) {
    const float* heads = columns + item * num_heads * stride;
    float* scores = params.scores + item * attention.kv_len;
    for (int64_t key = 0; key < attention.kv_len; ++key) {
      float result = heads[key];
      for (int64_t head = 1; head < num_heads; ++head) {
        const float score = heads[head * stride + key];
        if (!is_max) {
          result += score;
        } else if (score > result || score != score) {
          result = score;
        }
      }
      scores[key] = result * scale;
    }
  }
}

// maxima: [batch_size, num_score_heads, num_splits, padded_kv_len], over a part of the rows each.
template <DType dtype>
void max_of_mean_rows(const ScoreKeysParams& params, const CpuWork& work, int64_t num_splits,
                      float* maxima) {
  const AttentionParams& attention = params.attention;
  const int64_t stride = padded_kv_len(attention);
  const int64_t num_rows = params.voting.num_rows;
  Arena arena(work.scratch);
  RowBlock block = RowBlock::carve(arena, attention, /*with_exponentials=*/true);
  float* rows = arena.take<float>(block.capacity * stride);

  for (int64_t item = work.begin; item < work.end; ++item) {
    const int64_t split = item % num_splits;
    const int64_t score_head = item / num_splits % params.num_score_heads;
    const int64_t batch = item / num_splits / params.num_score_heads;
    const int64_t begin_head = score_head * params.heads_per_score();
    const int64_t end_entry = num_rows * (split + 1) / num_splits;
    float* maximum = maxima + item * stride;
    std::fill(maximum, maximum + stride, 0.0f);
    for (int64_t entry = num_rows * split / num_splits; entry < end_entry;
         entry += block.capacity) {
      const int64_t end = std::min(entry + block.capacity, end_entry);
      std::fill(rows, rows + (end - entry) * stride, 0.0f);
      add_mean_rows<dtype>(attention, params.voting, batch, begin_head,
                           begin_head + params.heads_per_score(), params.heads_per_score(), entry,
                           end, block, rows, stride);
      for (int64_t i = 0; i < end - entry; ++i) {
        for (int64_t key = 0; key < stride; key += kLanes) {
          const Vec row = load<Vec>(rows + i * stride + key);
          store(maximum + key, max_or_nan(load<Vec>(maximum + key), row));
        }
      }
    }
  }
}

void reduce_splits(const ScoreKeysParams& params, const CpuWork& work, int64_t num_splits,
                   const float* maxima) {
  const int64_t kv_len = params.attention.kv_len;
  const int64_t stride = padded_kv_len(params.attention);
  for (int64_t item = work.begin; item < work.end; ++item) {
    for (int64_t key = 0; key < kv_len; ++key) {
      float result = 0.0f;
      for (int64_t split = 0; split < num_splits; ++split) {
        const float maximum = maxima[(item * num_splits + split) * stride + key];
        if (maximum > result || maximum != maximum) result = maximum;
      }
      params.scores[item * kv_len + key] = result;
    }
  }
}

template <DType dtype>
void run(const ScoreKeysParams& params, const CpuWork& work) {
  auto* shared = reinterpret_cast<float*>(work.shared);
  if (params.mean_before_statistic()) {
    const int64_t splits = ScoreKeys::num_row_splits(params, work.num_threads);
    if (work.phase == 0) {
      max_of_mean_rows<dtype>(params, work, splits, shared);
    } else {
      reduce_splits(params, work, splits, shared);
    }
  } else if (work.phase == 0) {
    dispatch_value<Statistic::kSum, Statistic::kMax, Statistic::kSumOfSquares>(
        params.statistic,
        [&](auto statistic) { score_query_heads<dtype, statistic.value>(params, work, shared); });
  } else {
    reduce_query_heads(params, work, shared);
  }
}

}  // namespace

template <>
void ScoreKeys::run_cpu<kThisIsa>(const ScoreKeysParams& params, const CpuWork& work) noexcept {
  if (params.attention.kv_len == 0) return;
  dispatch_dtype(params.attention.dtype, [&](auto dtype) { run<dtype.value>(params, work); });
}

}  // namespace kvevict
