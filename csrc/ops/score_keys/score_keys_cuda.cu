// SPDX-License-Identifier: Apache-2.0
#include "core/arena.h"
#include "cuda/attention_kernels.h"
#include "ops/score_keys/score_keys.h"

namespace kvevict {
namespace {

// How the scores come about.
struct Plan {
  bool from_logits;         // of few rows, which wait for their normalizers; else from columns
  bool per_query_head;      // a part of a score is a query head, else a KV head
  int64_t parts_per_score;  // 1: parts are scores

  explicit Plan(const ScoreKeysParams& params) {
    const AttentionParams& attention = params.attention;
    const VotingRows& voting = params.voting;
    from_logits = !voting.softmax_lse && has_few_rows(attention, voting.num_rows) &&
                  params.heads_per_score() * voting.num_rows <= kMaxScoreRows;
    const bool is_group_max = params.reduction == HeadReduction::kGroupMax;
    per_query_head = params.reduction == HeadReduction::kNone ||
                     (is_group_max && params.statistic != Statistic::kMax);
    const int64_t num_parts = per_query_head ? attention.num_qo_heads : attention.num_kv_heads;
    parts_per_score =
        from_logits || params.mean_before_statistic() ? 1 : num_parts / params.num_score_heads;
  }
};

struct Workspace {
  Normalizer* normalizers;
  float* logits;  // [batch_size, num_qo_heads, num_rows, kv_len]
  float* parts;   // [batch_size, num_score_heads, parts_per_score, kv_len], or null
  Tickets tickets;

  static Workspace carve(Arena& arena, const ScoreKeysParams& params) {
    const AttentionParams& attention = params.attention;
    const Plan plan(params);
    const int64_t num_rows = params.voting.num_rows;
    const int64_t num_scores = attention.batch_size * params.num_score_heads;
    const bool in_parts = plan.parts_per_score > 1;
    const int64_t num_logits =
        plan.from_logits ? attention.batch_size * attention.num_qo_heads * num_rows : 0;
    const int64_t tickets = in_parts ? num_tickets(num_scores, attention.kv_len) : 0;
    return {arena.take<Normalizer>(
                params.voting.softmax_lse ? 0 : RowSplits::num_parts(attention, num_rows)),
            arena.take<float>(num_logits * attention.kv_len),
            in_parts ? arena.take<float>(num_scores * plan.parts_per_score * attention.kv_len)
                     : nullptr,
            {in_parts ? arena.take<unsigned>(tickets) : nullptr, tickets}};
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
  const VotingRows& voting = params.voting;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  Arena arena(static_cast<std::byte*>(memory));
  const Workspace workspace = Workspace::carve(arena, params);
  const Plan plan(params);

  const bool is_mean =
      params.reduction == HeadReduction::kGroupMean || params.reduction == HeadReduction::kAllMean;
  const float scale = is_mean ? 1.0f / static_cast<float>(params.heads_per_score()) : 1.0f;
  const bool is_max = params.reduction == HeadReduction::kGroupMax;
  RowNormalizers normalizers{nullptr, 0};
  if (!voting.softmax_lse) {
    normalizers = {workspace.normalizers, RowSplits::count(attention, voting.num_rows)};
  }

  if (plan.from_logits) {
    const cudaError_t error = launch_logits(
        {attention, voting, workspace.normalizers, workspace.logits, /*tickets=*/{}, 0, false},
        normalizers.num_splits, cuda_stream);
    if (error != cudaSuccess) return error;
    return launch_logit_scores(
        {attention, voting, normalizers, workspace.logits, params.scores, params.num_score_heads,
         params.mean_before_statistic(), is_max, scale},
        params.statistic, cuda_stream);
  }

  const cudaError_t error =
      launch_normalizers(attention, voting, workspace.normalizers, workspace.tickets, cuda_stream);
  if (error != cudaSuccess) return error;
  ColumnParams columns{};
  columns.attention = attention;
  columns.voting = voting;
  columns.normalizers = normalizers;
  columns.statistic = params.statistic;
  columns.per_query_head = plan.per_query_head;
  columns.num_keys = attention.kv_len;
  columns.scores = {params.scores, workspace.parts};
  columns.parts_per_score = plan.parts_per_score;
  columns.join_is_max = is_max;
  columns.tickets = workspace.tickets.data;
  columns.scale = scale;
  if (params.mean_before_statistic()) {
    return launch_max_of_means(columns, params.num_score_heads, cuda_stream);
  }
  return launch_columns<false>(columns, cuda_stream);
}

}  // namespace kvevict
