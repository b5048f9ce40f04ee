// SPDX-License-Identifier: Apache-2.0
#include "core/arena.h"
#include "cuda/attention_kernels.h"
#include "ops/score_keys/score_keys.h"

namespace kvevict {
namespace {

// How the scores come about: columns of the attention matrix in parts, then joined.
struct Plan {
  bool per_query_head;      // a part is a query head, else a KV head
  int64_t parts_per_score;  // 1: parts are scores

  explicit Plan(const ScoreKeysParams& params) {
    const bool is_group_max = params.reduction == HeadReduction::kGroupMax;
    per_query_head = params.reduction == HeadReduction::kNone ||
                     (is_group_max && params.statistic != Statistic::kMax);
    const AttentionParams& attention = params.attention;
    const int64_t num_parts = per_query_head ? attention.num_qo_heads : attention.num_kv_heads;
    parts_per_score = params.mean_before_statistic() ? 1 : num_parts / params.num_score_heads;
  }
};

struct Workspace {
  Normalizer* normalizers;
  float* parts;

  static Workspace carve(Arena& arena, const ScoreKeysParams& params) {
    const AttentionParams& attention = params.attention;
    const int64_t parts_per_score = Plan(params).parts_per_score;
    const int64_t num_parts =
        parts_per_score == 1 ? 0 : attention.batch_size * params.num_score_heads * parts_per_score;
    const int64_t num_rows = params.voting.softmax_lse ? 0 : params.voting.num_rows;
    return {
        arena.take<Normalizer>(RowSplits::bytes(attention, num_rows) / int64_t{sizeof(Normalizer)}),
        arena.take<float>(num_parts * attention.kv_len)};
  }
};

}  // namespace

int64_t ScoreKeys::cuda_workspace_bytes(const ScoreKeysParams& params) {
  Arena arena;
  Workspace::carve(arena, params);
  return arena.bytes();
}

int ScoreKeys::launch_cuda(const ScoreKeysParams& params, void* memory, void* stream) noexcept {
  const AttentionParams& attention = params.attention;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  Arena arena(static_cast<std::byte*>(memory));
  const Workspace workspace = Workspace::carve(arena, params);
  const Plan plan(params);

  RowNormalizers normalizers{nullptr, 0};
  if (!params.voting.softmax_lse) {
    normalizers = {workspace.normalizers, RowSplits::count(attention, params.voting.num_rows)};
    const cudaError_t error =
        launch_row_normalizers(attention, params.voting, workspace.normalizers, cuda_stream);
    if (error != cudaSuccess) return error;
  }

  const bool is_mean =
      params.reduction == HeadReduction::kGroupMean || params.reduction == HeadReduction::kAllMean;
  ColumnParams columns{};
  columns.attention = attention;
  columns.voting = params.voting;
  columns.normalizers = normalizers;
  columns.statistic = params.statistic;
  columns.per_query_head = plan.per_query_head;
  columns.num_keys = attention.kv_len;
  columns.scores = plan.parts_per_score == 1 ? params.scores : workspace.parts;
  columns.scale = is_mean ? 1.0f / static_cast<float>(params.heads_per_score()) : 1.0f;
  if (params.mean_before_statistic()) {
    return launch_max_of_means(columns, params.num_score_heads, cuda_stream);
  }
  const cudaError_t error = launch_columns<false>(columns, cuda_stream);
  if (error != cudaSuccess || plan.parts_per_score == 1) return error;
  return launch_reduce_heads(
      {workspace.parts, params.scores, attention.batch_size * params.num_score_heads,
       plan.parts_per_score, attention.kv_len, params.reduction == HeadReduction::kGroupMax},
      cuda_stream);
}

}  // namespace kvevict
