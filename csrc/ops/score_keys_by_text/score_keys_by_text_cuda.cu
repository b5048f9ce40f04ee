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

  static Workspace carve(Arena& arena, const ScoreKeysByTextParams& params) {
    const AttentionParams& attention = params.attention;
    const int64_t heads = attention.batch_size * attention.num_kv_heads;
    const int64_t num_rows = params.text.num_rows;
    const int64_t normalizer_rows = params.text.softmax_lse ? 0 : num_rows;
    return {arena.take<Normalizer>(RowSplits::bytes(attention, normalizer_rows) /
                                   int64_t{sizeof(Normalizer)}),
            arena.take<float>(heads * num_rows), arena.take<float>(heads * attention.kv_len),
            arena.take<float>(heads * attention.kv_len)};
  }
};

constexpr int kThreads = 128;

// One thread per text row: its weight is the attention that its own key received, over heads and
// over the text rows that see it.
__global__ void text_weight_kernel(const ScoreKeysByTextParams params, const float* received) {
  const AttentionParams& attention = params.attention;
  const int64_t num_rows = params.text.num_rows;
  const int64_t batch = blockIdx.y;
  const int64_t entry = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (entry >= num_rows) return;
  const int64_t row = params.text_row(batch, entry);
  float sum = 0.0f;
  int64_t num_viewers = 0;
  if (row >= 0) {
    for (int64_t head = 0; head < attention.num_kv_heads; ++head) {
      sum += received[(batch * attention.num_kv_heads + head) * num_rows + entry];
    }
    for (int64_t viewer = 0; viewer < num_rows; ++viewer) {
      num_viewers += params.text_row(batch, viewer) >= row;
    }
  }
  params.row_weights[batch * num_rows + entry] =
      row < 0 ? 0.0f : sum / static_cast<float>(num_viewers);
}

}  // namespace

int64_t ScoreKeysByText::cuda_workspace_bytes(const ScoreKeysByTextParams& params) {
  Arena arena;
  Workspace::carve(arena, params);
  return arena.bytes();
}

int ScoreKeysByText::launch_cuda(const ScoreKeysByTextParams& params, void* memory,
                                 void* stream) noexcept {
  const AttentionParams& attention = params.attention;
  const int64_t num_rows = params.text.num_rows;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  Arena arena(static_cast<std::byte*>(memory));
  const Workspace workspace = Workspace::carve(arena, params);

  cudaError_t error = cudaSuccess;
  ColumnParams columns{};
  columns.attention = attention;
  columns.voting = params.text;
  columns.statistic = Statistic::kSum;
  columns.scale = 1.0f / static_cast<float>(attention.num_qo_heads);
  if (!params.text.softmax_lse) {
    columns.normalizers = {workspace.normalizers, RowSplits::count(attention, num_rows)};
    error = launch_row_normalizers(attention, params.text, workspace.normalizers, cuda_stream);
    if (error != cudaSuccess) return error;
  }

  // What text pays to text.
  columns.key_rows = params.text.row_index;
  columns.num_keys = num_rows;
  columns.scores = workspace.received;
  error = launch_columns<false>(columns, cuda_stream);
  if (error != cudaSuccess) return error;
  if (num_rows * attention.batch_size > 0) {
    const LaunchShape shape{dim3(static_cast<unsigned>((num_rows + kThreads - 1) / kThreads),
                                 static_cast<unsigned>(attention.batch_size)),
                            dim3(kThreads)};
    error = launch(text_weight_kernel, shape, cuda_stream, params, workspace.received);
    if (error != cudaSuccess) return error;
  }

  // What weighted text pays to every key.
  columns.key_rows = nullptr;
  columns.num_keys = attention.kv_len;
  columns.text_weight = params.row_weights;
  columns.scores = workspace.scores;
  columns.unweighted = workspace.column_sums;
  error = launch_columns<true>(columns, cuda_stream);
  for (const auto& [parts, scores] :
       {std::pair{workspace.scores, params.scores}, {workspace.column_sums, params.column_sums}}) {
    if (error != cudaSuccess) return error;
    error = launch_reduce_heads({parts, scores, attention.batch_size, attention.num_kv_heads,
                                 attention.kv_len, /*is_max=*/false},
                                cuda_stream);
  }
  return error;
}

}  // namespace kvevict
