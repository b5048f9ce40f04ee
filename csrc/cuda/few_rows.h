// SPDX-License-Identifier: Apache-2.0
// The few query rows of a decode step. Keys go from global memory straight to the tensor cores,
// once; logits, 4 bytes for each row and key beside the key's own 2 * head_dim, wait in L2 for the
// normalizers that a second kernel divides them by.
#pragma once

#include "cuda/attention_rows.h"
#include "cuda/launch.h"
#include "cuda/mma_tiles.h"

namespace kvevict {

struct LogitParams {
  AttentionParams attention;
  VotingRows voting;
  Normalizer* parts;  // [batch_size, num_qo_heads, num_rows, num_splits]
  float* logits;      // [batch_size, num_qo_heads, num_rows, kv_len], or null; in units of log2,
                      // -inf where a row does not see a key
  Tickets tickets;
  int64_t keys_per_split;
  bool aligned;
};

template <int kColumnTiles>
struct LogitShared {
  Normalizer normalizers[kTileWarps][kColumnTiles * 8];
};

// grid: (splits, num_kv_heads, batch_size). Keys are the rows of a product, query rows its columns.
// The four lanes that hold a row of a fragment each read whole 16-byte chunks of it, which puts the
// elements of keys and queries into the same other order.
template <DType dtype, int kHeadDim, int kColumnTiles>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    logit_kernel(const LogitParams params) {
  constexpr int kChunks = kHeadDim * 2 / 16 / 4;  // per lane
  auto& shared = shared_memory<LogitShared<kColumnTiles>>();
  const AttentionParams& attention = params.attention;
  const int64_t kv_head = blockIdx.y, batch = blockIdx.z, group_size = attention.group_size();
  const RowList rows{attention, params.voting, batch, kv_head * group_size, group_size};
  const int row_bytes = static_cast<int>(attention.head_dim) * 2;
  const auto* key_data = static_cast<const char*>(attention.key.data);
  const float scale = attention.sm_scale * kLog2E;
  const int64_t first_row = (batch * attention.num_kv_heads + kv_head) * rows.size();
  params.tickets.clear();

  const auto read_row = [&](const char* row, uint4(&chunks)[kChunks]) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      chunks[i] = read_chunk(row, i * 4 + lane_index() % 4, row_bytes, params.aligned);
    }
  };
  uint4 query[kColumnTiles][kChunks];
  int64_t last_key[kColumnTiles][2];
  Normalizer normalizer[kColumnTiles][2];
#pragma unroll
  for (int c = 0; c < kColumnTiles; ++c) {
    read_row(rows.address(c * 8 + lane_index() / 4, 2), query[c]);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int64_t row = rows.query_row(product_column(c, side));
      last_key[c][side] = row < 0 ? -1 : attention.last_key(row);
      normalizer[c][side] = {kMinusInfinity, 0.0f};
    }
  }

  const int64_t first_key = blockIdx.x * params.keys_per_split;
  const int64_t end_key = min(first_key + params.keys_per_split, attention.kv_len);
  for (int64_t tile = first_key + warp_index() * 16; tile < end_key; tile += kTileWarps * 16) {
    uint4 key[2][kChunks];
    int64_t key_index[2];  // -1: there is none, or it is masked
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t index = tile + lane_index() / 4 + half * 8;
      const bool is_real = index < end_key && attention.key_is_real(batch, index);
      key_index[half] = is_real ? index : -1;
      read_row(is_real ? key_data + attention.key.offset(batch, kv_head, index) * 2 : nullptr,
               key[half]);
    }
    float products[kColumnTiles][4] = {};
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c) {
        multiply_add<dtype>(products[c], {key[0][i].x, key[1][i].x, key[0][i].y, key[1][i].y},
                            {query[c][i].x, query[c][i].y});
        multiply_add<dtype>(products[c], {key[0][i].z, key[1][i].z, key[0][i].w, key[1][i].w},
                            {query[c][i].z, query[c][i].w});
      }
    }
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        Normalizer& total = normalizer[c][side];
        float logit[2], raised = total.largest;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const bool visible = key_index[half] >= 0 && key_index[half] <= last_key[c][side];
          logit[half] = visible ? products[c][half * 2 + side] * scale : kMinusInfinity;
          raised = fmaxf(raised, logit[half]);
          const int64_t index = tile + lane_index() / 4 + half * 8;
          if (params.logits && index < end_key && product_column(c, side) < rows.size()) {
            params.logits[(first_row + product_column(c, side)) * attention.kv_len + index] =
                logit[half];
          }
        }
        const float reference = Normalizer::finite(raised);
        total.sum = total.sum * exp2_approx(total.largest - reference) +
                    exp2_approx(logit[0] - reference) + exp2_approx(logit[1] - reference);
        total.largest = raised;
      }
    }
  }

  // The eight lanes that share a column merge, then the warps, in a fixed order.
#pragma unroll
  for (int c = 0; c < kColumnTiles; ++c) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      Normalizer& total = normalizer[c][side];
      total.merge_lanes(4, kWarpSize);
      if (lane_index() < 4) shared.normalizers[warp_index()][product_column(c, side)] = total;
    }
  }
  __syncthreads();
  const int column = static_cast<int>(threadIdx.x);
  if (column < rows.size()) {
    Normalizer total = shared.normalizers[0][column];
    for (int warp = 1; warp < kTileWarps; ++warp) total.merge(shared.normalizers[warp][column]);
    params.parts[(first_row + column) * gridDim.x + blockIdx.x] = total;
  }
}

inline cudaError_t launch_logits(LogitParams params, int64_t num_splits, cudaStream_t stream) {
  const AttentionParams& attention = params.attention;
  if (attention.batch_size == 0) return cudaSuccess;
  params.keys_per_split = RowSplits::keys(attention, num_splits, kTileWarps * 16);
  params.aligned = rows_aligned(attention);
  const dim3 grid(static_cast<unsigned>(num_splits), static_cast<unsigned>(attention.num_kv_heads),
                  static_cast<unsigned>(attention.batch_size));
  cudaError_t error = cudaErrorInvalidValue;
  (void)dispatch_value<DType::kFloat16, DType::kBFloat16>(attention.dtype, [&](auto dtype) {
    error = dispatch_head_dim(attention.head_dim, [&](auto head_dim) {
      const auto run = [&](auto tiles) {
        return launch(logit_kernel<dtype.value, head_dim.value, tiles.value>,
                      {grid, dim3(kTileThreads), sizeof(LogitShared<tiles.value>)}, stream, params);
      };
      const bool one_tile = attention.group_size() * params.voting.num_rows <= 8;
      return one_tile ? run(Constant<1>{}) : run(Constant<2>{});
    });
  });
  return error;
}

// ---- Scores
// --------------------------------------------------------------------------------------

struct LogitScoreParams {
  AttentionParams attention;
  VotingRows voting;
  RowNormalizers normalizers;
  const float* logits;  // as LogitParams has them
  float* scores;        // [batch_size, num_score_heads, kv_len]
  int64_t num_score_heads;
  bool mean_before_statistic;  // over a score's heads
  bool is_max;                 // over a score's heads, else the sum
  float scale;                 // of what is written
};

// All rows of a score have their normalizers in shared memory.
inline constexpr int kMaxScoreRows = 2048;
inline constexpr int kScoreThreads = 256;

struct LogitScoreShared {
  float reference[kMaxScoreRows];  // of the row's exponentials
  float factor[kMaxScoreRows];     // weight / normalizer; 0 = no vote
};

// grid: (key blocks, num_score_heads, batch_size), one thread per key.
template <Statistic statistic>
__global__ void __launch_bounds__(kScoreThreads) logit_score_kernel(const LogitScoreParams params) {
  auto& shared = shared_memory<LogitScoreShared>();
  const AttentionParams& attention = params.attention;
  const VotingRows& voting = params.voting;
  const int64_t batch = blockIdx.z;
  const int num_heads = static_cast<int>(attention.num_qo_heads / params.num_score_heads);
  const int num_rows = static_cast<int>(voting.num_rows);
  const RowList rows{attention, voting, batch, blockIdx.y * int64_t{num_heads}, num_heads};
  const int64_t first_row = (batch * attention.num_qo_heads + rows.first_head) * num_rows;

  for (int i = warp_index(); i < num_heads * num_rows; i += kScoreThreads / kWarpSize) {
    const Normalizer normalizer = params.normalizers.merged_by_warp(first_row + i);
    if (lane_index() == 0) {
      const float weight = voting.weight(batch, attention.num_qo_heads, rows.head(i), i % num_rows);
      shared.reference[i] = Normalizer::finite(normalizer.largest);
      shared.factor[i] = rows.query_row(i) < 0 ? 0.0f : normalizer.factor(weight);
    }
  }
  __syncthreads();

  const int64_t key = int64_t{blockIdx.x} * kScoreThreads + threadIdx.x;
  if (key >= attention.kv_len) return;
  const float* logits = params.logits + first_row * attention.kv_len + key;
  const auto probability_into = [&](float& total, int i, auto stat) {
    const float logit = logits[i * attention.kv_len];
    if (logit == kMinusInfinity) return;
    total = add_to_statistic<stat.value>(total, exp2_approx(logit - shared.reference[i]),
                                         shared.factor[i]);
  };
  float score = 0.0f;
  if (params.mean_before_statistic) {
    for (int entry = 0; entry < num_rows; ++entry) {
      float mean = 0.0f;
      for (int head = 0; head < num_heads; ++head) {
        probability_into(mean, head * num_rows + entry, Constant<Statistic::kSum>{});
      }
      score = add_to_statistic<Statistic::kMax>(score, mean);
    }
  } else {
    for (int head = 0; head < num_heads; ++head) {
      float total = 0.0f;
      for (int entry = 0; entry < num_rows; ++entry) {
        probability_into(total, head * num_rows + entry, Constant<statistic>{});
      }
      score = params.is_max ? add_to_statistic<Statistic::kMax>(score, total) : score + total;
    }
  }
  params.scores[(batch * params.num_score_heads + blockIdx.y) * attention.kv_len + key] =
      score * params.scale;
}

inline cudaError_t launch_logit_scores(const LogitScoreParams& params, Statistic statistic,
                                       cudaStream_t stream) {
  const AttentionParams& attention = params.attention;
  if (attention.batch_size == 0 || attention.kv_len == 0) return cudaSuccess;
  const int64_t key_blocks = (attention.kv_len + kScoreThreads - 1) / kScoreThreads;
  const LaunchShape shape{
      dim3(static_cast<unsigned>(key_blocks), static_cast<unsigned>(params.num_score_heads),
           static_cast<unsigned>(attention.batch_size)),
      dim3(kScoreThreads), sizeof(LogitScoreShared)};
  cudaError_t error = cudaErrorInvalidValue;
  (void)dispatch_value<Statistic::kSum, Statistic::kMax, Statistic::kSumOfSquares>(
      statistic,
      [&](auto value) { error = launch(logit_score_kernel<value.value>, shape, stream, params); });
  return error;
}

}  // namespace kvevict
