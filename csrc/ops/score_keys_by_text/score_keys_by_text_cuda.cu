// SPDX-License-Identifier: Apache-2.0
#include "core/arena.h"
#include "cuda/attention_kernels.h"
#include "ops/score_keys_by_text/score_keys_by_text.h"

namespace kvevict {
namespace {

struct Workspace {
  Normalizer* normalizers;
  float* received;     // [batch_size, num_kv_heads, num_rows], by the text rows' own keys
  float* scores;       // [batch_size, num_kv_heads, kv_len]
  float* column_sums;  // [batch_size, num_kv_heads, kv_len]
  Tickets tickets;     // of the text rows' own keys, then of all keys
  int64_t num_text_tickets;

  static Workspace carve(Arena& arena, const ScoreKeysByTextParams& params) {
    const AttentionParams& attention = params.attention;
    const int64_t heads = attention.batch_size * attention.num_kv_heads;
    const int64_t num_rows = params.text.num_rows;
    const int64_t text_tickets = num_tickets(attention.batch_size, num_rows);
    const int64_t tickets = text_tickets + num_tickets(attention.batch_size, attention.kv_len);
    return {arena.take<Normalizer>(
                params.text.softmax_lse ? 0 : RowSplits::num_parts(attention, num_rows)),
            arena.take<float>(heads * num_rows),
            arena.take<float>(heads * attention.kv_len),
            arena.take<float>(heads * attention.kv_len),
            {arena.take<unsigned>(tickets), tickets},
            text_tickets};
  }
};

}  // namespace

int64_t ScoreKeysByText::cuda_workspace_bytes(const ScoreKeysByTextParams& params) {
  Arena arena;
  Workspace::carve(arena, params);
  return arena.bytes();
}

int ScoreKeysByText::launch_cuda(const ScoreKeysByTextParams& params, void* memory,
                                 void* stream) noexcept {
  const AttentionParams& attention = params.attention;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  Arena arena(static_cast<std::byte*>(memory));
  const Workspace workspace = Workspace::carve(arena, params);

  cudaError_t error = launch_normalizers(attention, params.text, workspace.normalizers,
                                         workspace.tickets, cuda_stream);
  if (error != cudaSuccess) return error;

  ColumnParams columns{};
  columns.attention = attention;
  columns.voting = params.text;
  if (!params.text.softmax_lse) {
    columns.normalizers = {workspace.normalizers,
                           RowSplits::count(attention, params.text.num_rows)};
  }
  columns.statistic = Statistic::kSum;
  columns.parts_per_score = attention.num_kv_heads;
  columns.scale = 1.0f / static_cast<float>(attention.num_qo_heads);

  // What text pays to text.
  columns.own_keys = true;
  columns.num_keys = params.text.num_rows;
  columns.scores = {params.row_weights, workspace.received};
  columns.tickets = workspace.tickets.data;
  error = launch_columns<false>(columns, cuda_stream);
  if (error != cudaSuccess) return error;

  // What weighted text pays to every key.
  columns.own_keys = false;
  columns.num_keys = attention.kv_len;
  columns.text_weight = params.row_weights;
  columns.scores = {params.scores, workspace.scores};
  columns.unweighted = {params.column_sums, workspace.column_sums};
  columns.tickets = workspace.tickets.data + workspace.num_text_tickets;
  return launch_columns<true>(columns, cuda_stream);
}

}  // namespace kvevict
