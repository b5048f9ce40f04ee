// SPDX-License-Identifier: Apache-2.0
// The two passes of scoring, on the tiles of mma_tiles.h: rows of the attention matrix give
// log-sum-exps (queries resident, keys stream by), its columns give scores (keys resident, queries
// stream by). Logits never leave registers, sums are never atomic.
#pragma once

#include "cuda/attention_rows.h"
#include "cuda/few_rows.h"
#include "cuda/launch.h"
#include "cuda/mma_tiles.h"

namespace kvevict {

// ---- Rows
// ----------------------------------------------------------------------------------------

struct RowNormalizerParams {
  AttentionParams attention;
  VotingRows voting;
  Normalizer* parts;  // [batch_size, num_qo_heads, num_rows, num_splits]
  Tickets tickets;
  int64_t keys_per_split;
  bool aligned;
};

template <typename Shape>
struct RowShared {
  TileBuffers<Shape> tiles;
  int visible[Shape::kStages][Shape::kColumns];  // whether a key is real
};

// grid: (row tiles, splits, batch_size * num_kv_heads)
template <typename Shape>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    row_normalizer_kernel(const RowNormalizerParams params) {
  auto& shared = shared_memory<RowShared<Shape>>();
  const AttentionParams& attention = params.attention;
  const int64_t kv_head = blockIdx.z % attention.num_kv_heads;
  const RowList rows{attention, params.voting, blockIdx.z / attention.num_kv_heads,
                     kv_head * attention.group_size(), attention.group_size()};
  const int64_t first_row = int64_t{blockIdx.x} * Shape::kRows;
  const int64_t first_key = blockIdx.y * params.keys_per_split;
  const int64_t end_key = min(first_key + params.keys_per_split, attention.kv_len);
  const auto* key = static_cast<const char*>(attention.key.data);
  const float scale = attention.sm_scale * kLog2E;
  params.tickets.clear();

  // A thread's rows: two of each row tile. They see keys up to last_key, none if they do not vote.
  int64_t last_key[Shape::kRowTiles][2];
  Normalizer normalizer[Shape::kRowTiles][2];
  int64_t min_last_key = end_key;
#pragma unroll
  for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = rows.query_row(first_row + product_row<Shape>(r, half * 2));
      last_key[r][half] = row < 0 ? -1 : attention.last_key(row);
      min_last_key = min(min_last_key, last_key[r][half]);
      normalizer[r][half] = {kMinusInfinity, 0.0f};
    }
  }

  const int64_t num_tiles =
      max((end_key - first_key + Shape::kColumns - 1) / Shape::kColumns, int64_t{0});
  stream_tiles<Shape>(
      shared.tiles, static_cast<int>(attention.head_dim) * Shape::kElementBytes, params.aligned,
      num_tiles, [&](int i) { return rows.address(first_row + i, Shape::kElementBytes); },
      [&](int64_t j) {
        const int64_t index = first_key + j;
        return index < end_key
                   ? key + attention.key.offset(rows.batch, kv_head, index) * Shape::kElementBytes
                   : nullptr;
      },
      [&](int stage, int64_t tile) {
        if (threadIdx.x < Shape::kColumns) {
          const int64_t index = first_key + tile * Shape::kColumns + threadIdx.x;
          shared.visible[stage][threadIdx.x] =
              index < end_key && attention.key_is_real(rows.batch, index);
        }
      },
      [&](int stage, int64_t tile, TileProducts<Shape>& products) {
        const int64_t tile_key = first_key + tile * Shape::kColumns;
        const bool all_visible = !attention.key_mask && tile_key + Shape::kColumns <= end_key &&
                                 tile_key + Shape::kColumns - 1 <= min_last_key;
#pragma unroll
        for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const auto visible = [&](int c, int i) {
              const int column = product_column(c, i);
              return all_visible ||
                     (shared.visible[stage][column] && tile_key + column <= last_key[r][half]);
            };
            Normalizer& total = normalizer[r][half];
            float raised = total.largest;
#pragma unroll
            for (int c = 0; c < Shape::kColumnTiles; ++c) {
#pragma unroll
              for (int i = half * 2; i < half * 2 + 2; ++i) {
                if (visible(c, i)) raised = fmaxf(raised, products[r][c][i] * scale);
              }
            }
            const float reference = Normalizer::finite(raised);
            float sum = total.sum * exp2_approx(total.largest - reference);
#pragma unroll
            for (int c = 0; c < Shape::kColumnTiles; ++c) {
#pragma unroll
              for (int i = half * 2; i < half * 2 + 2; ++i) {
                const float exponential = exp2_approx(fmaf(products[r][c][i], scale, -reference));
                sum += visible(c, i) ? exponential : 0.0f;
              }
            }
            total = {raised, sum};
          }
        }
      });

  // The four lanes that share a row merge in a fixed order.
#pragma unroll
  for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Normalizer total = normalizer[r][half];
      total.merge_lanes(1, 4);
      const int64_t j = first_row + product_row<Shape>(r, half * 2);
      if (lane_index() % 4 == 0 && j < rows.size()) {
        const int64_t row = rows.batch * attention.num_qo_heads * params.voting.num_rows +
                            rows.first_head * params.voting.num_rows + j;
        params.parts[row * gridDim.y + blockIdx.y] = total;
      }
    }
  }
}

// ---- Columns
// -------------------------------------------------------------------------------------

// Where scores go: straight, or in parts that the last block to write one joins.
struct JoinedScores {
  float* scores;  // [batch_size, num_scores, num_keys]
  float* parts;   // [batch_size, num_scores, parts_per_score, num_keys], or null
};

struct ColumnParams {
  AttentionParams attention;
  VotingRows voting;
  RowNormalizers normalizers;
  Statistic statistic;
  bool per_query_head;  // a part of each query head, else of each KV head
  // The keys are the own keys of the voting rows, and a score is a mean over the rows that see it.
  bool own_keys;
  int64_t num_keys;  // num_rows if own_keys, else kv_len
  // A second weight of a row, by entry; the statistic is then also taken without it.
  const float* text_weight;  // [batch_size, num_rows], or null
  JoinedScores scores, unweighted;
  int64_t parts_per_score;
  bool join_is_max;   // of parts, else their sum
  unsigned* tickets;  // [batch_size, num_scores, key tiles], or null if parts are scores
  float scale;        // of a part
  bool aligned;
};

template <typename Shape>
struct ColumnShared {
  TileBuffers<Shape> tiles;
  float reference[Shape::kStages][Shape::kColumns];  // of the row's exponentials
  float factor[Shape::kStages][Shape::kColumns];     // weight / normalizer; 0 = no vote
  float text[Shape::kStages][Shape::kColumns];       // factor * text_weight
  int64_t last_key[Shape::kStages][Shape::kColumns];
  unsigned place;
};

// Notes what belongs to row j of a list, the column threadIdx.x of a tile.
template <bool text_weighted = false, typename Shared>
__device__ __forceinline__ void prepare_column(const ColumnParams& params, const RowList& rows,
                                               int64_t j, int stage, Shared& shared) {
  constexpr int kColumns = sizeof(shared.factor[0]) / sizeof(float);
  if (threadIdx.x >= kColumns) return;
  const VotingRows& voting = params.voting;
  const int64_t row = rows.query_row(j);
  Normalizer normalizer{0.0f, 0.0f};
  float factor = 0.0f, text = 0.0f;
  if (row >= 0) {
    const int64_t head = rows.head(j), entry = j % voting.num_rows;
    normalizer = params.normalizers.of(rows.attention, voting, rows.batch, head, entry, row);
    const float weight = voting.weight(rows.batch, rows.attention.num_qo_heads, head, entry);
    factor = normalizer.factor(weight);
    if constexpr (text_weighted) {
      text = factor * params.text_weight[rows.batch * voting.num_rows + entry];
    }
  }
  shared.reference[stage][threadIdx.x] = Normalizer::finite(normalizer.largest);
  shared.factor[stage][threadIdx.x] = factor;
  if constexpr (text_weighted) shared.text[stage][threadIdx.x] = text;
  shared.last_key[stage][threadIdx.x] = row < 0 ? -1 : rows.attention.last_key(row);
}

// Joins the four lanes that share a key and writes [batch_size, heads, num_keys].
template <typename Shape, Statistic statistic>
__device__ __forceinline__ void write_columns(const float (&total)[Shape::kRowTiles][2],
                                              const JoinedScores& output,
                                              const ColumnParams& params) {
  const int64_t part = int64_t{blockIdx.z} * gridDim.y + blockIdx.y;
  float* scores = output.parts ? output.parts : output.scores;
#pragma unroll
  for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float score = total[r][half];
      for (int distance = 1; distance < 4; distance *= 2) {
        const float other = __shfl_xor_sync(kFullWarp, score, distance);
        score = statistic == Statistic::kMax ? add_to_statistic<Statistic::kMax>(score, other)
                                             : score + other;
      }
      const int64_t index = int64_t{blockIdx.x} * Shape::kRows + product_row<Shape>(r, half * 2);
      if (lane_index() % 4 == 0 && index < params.num_keys) {
        scores[part * params.num_keys + index] = score * params.scale;
      }
    }
  }
}

// The number of voting rows that see the own key of an entry's row; 0 if that row does not vote.
__device__ __forceinline__ int64_t num_viewers(const ColumnParams& params, int64_t batch,
                                               int64_t entry) {
  const RowList rows{params.attention, params.voting, batch, 0, 1};
  const int64_t row = rows.query_row(entry);
  int64_t count = 0;
  for (int64_t viewer = 0; row >= 0 && viewer < rows.size(); ++viewer) {
    count += rows.query_row(viewer) >= row;
  }
  return count;
}

// Joins the parts of this block's keys in ascending order.
template <typename Shape>
__device__ __forceinline__ void join_parts(const JoinedScores& output, const ColumnParams& params) {
  const int64_t part = int64_t{blockIdx.z} * gridDim.y + blockIdx.y;
  const int64_t score = part / params.parts_per_score;
  const int64_t index = int64_t{blockIdx.x} * Shape::kRows + threadIdx.x;
  if (threadIdx.x >= Shape::kRows || index >= params.num_keys) return;
  const float* parts = output.parts + score * params.parts_per_score * params.num_keys + index;
  float result = __ldcg(parts);
  for (int64_t i = 1; i < params.parts_per_score; ++i) {
    const float other = __ldcg(parts + i * params.num_keys);
    result = params.join_is_max ? add_to_statistic<Statistic::kMax>(result, other) : result + other;
  }
  if (params.own_keys) {
    const int64_t viewers = num_viewers(params, blockIdx.z, index);
    result = viewers == 0 ? 0.0f : result / static_cast<float>(viewers);
  }
  output.scores[score * params.num_keys + index] = result;
}

// grid: (key tiles, heads, batch_size) with a part of the scores per head
template <typename Shape, Statistic statistic, bool text_weighted>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    column_kernel(const ColumnParams params) {
  auto& shared = shared_memory<ColumnShared<Shape>>();
  const AttentionParams& attention = params.attention;
  const VotingRows& voting = params.voting;
  const int64_t group_size = attention.group_size();
  const int64_t num_heads = params.per_query_head ? 1 : group_size;
  const RowList rows{attention, voting, blockIdx.z, blockIdx.y * num_heads, num_heads};
  const int64_t kv_head = rows.first_head / group_size;
  const int64_t first_key = int64_t{blockIdx.x} * Shape::kRows;
  const auto* key = static_cast<const char*>(attention.key.data);
  const float scale = attention.sm_scale * kLog2E;

  // The position of a key of this tile, -1 if there is none or it is masked.
  const auto position = [&](int i) -> int64_t {
    int64_t index = first_key + i;
    if (index >= params.num_keys) return -1;
    if (params.own_keys) {
      const int64_t row = voting.row(rows.batch, index);
      index = row < 0 ? -1 : attention.position(row);
    }
    return index >= 0 && attention.key_is_real(rows.batch, index) ? index : -1;
  };
  int64_t thread_key[Shape::kRowTiles][2];
  int64_t max_key = 0;
  bool all_real = true;
  float total[Shape::kRowTiles][2] = {}, plain[Shape::kRowTiles][2] = {};
#pragma unroll
  for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      thread_key[r][half] = position(product_row<Shape>(r, half * 2));
      max_key = max(max_key, thread_key[r][half]);
      all_real &= thread_key[r][half] >= 0;
    }
  }

  const int64_t num_tiles = (rows.size() + Shape::kColumns - 1) / Shape::kColumns;
  stream_tiles<Shape>(
      shared.tiles, static_cast<int>(attention.head_dim) * Shape::kElementBytes, params.aligned,
      num_tiles,
      [&](int i) {
        const int64_t index = position(i);
        return index < 0
                   ? nullptr
                   : key + attention.key.offset(rows.batch, kv_head, index) * Shape::kElementBytes;
      },
      [&](int64_t j) { return rows.address(j, Shape::kElementBytes); },
      [&](int stage, int64_t tile) {
        prepare_column<text_weighted>(params, rows, tile * Shape::kColumns + threadIdx.x, stage,
                                      shared);
      },
      [&](int stage, int64_t /*tile*/, TileProducts<Shape>& products) {
#pragma unroll
        for (int c = 0; c < Shape::kColumnTiles; ++c) {
#pragma unroll
          for (int side = 0; side < 2; ++side) {
            const int column = product_column(c, side);
            const float factor = shared.factor[stage][column];
            if (factor == 0.0f) continue;
            const float reference = shared.reference[stage][column];
            const bool all_visible = all_real && max_key <= shared.last_key[stage][column];
#pragma unroll
            for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                float exponential =
                    exp2_approx(fmaf(products[r][c][half * 2 + side], scale, -reference));
                float weight = factor, text = text_weighted ? shared.text[stage][column] : 0.0f;
                if (!all_visible && (thread_key[r][half] < 0 ||
                                     thread_key[r][half] > shared.last_key[stage][column])) {
                  exponential = weight = text = 0.0f;
                }
                if constexpr (text_weighted) {
                  plain[r][half] = add_to_statistic<statistic>(plain[r][half], exponential, weight);
                  total[r][half] = add_to_statistic<statistic>(total[r][half], exponential, text);
                } else {
                  total[r][half] = add_to_statistic<statistic>(total[r][half], exponential, weight);
                }
              }
            }
          }
        }
      });

  write_columns<Shape, statistic>(total, params.scores, params);
  if constexpr (text_weighted) write_columns<Shape, statistic>(plain, params.unweighted, params);
  if (params.tickets == nullptr) return;
  const int64_t score =
      (int64_t{blockIdx.z} * gridDim.y + blockIdx.y) / params.parts_per_score * gridDim.x;
  if (!is_last_block(&params.tickets[score + blockIdx.x],
                     static_cast<unsigned>(params.parts_per_score), shared.place)) {
    return;
  }
  join_parts<Shape>(params.scores, params);
  if constexpr (text_weighted) join_parts<Shape>(params.unweighted, params);
}

// ---- Maximum of means
// ----------------------------------------------------------------------------

// grid: (key tiles, num_score_heads, batch_size). The maximum over rows of the mean over a score's
// query heads: a tile of rows goes through all heads before it counts.
template <typename Shape>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    max_of_means_kernel(const ColumnParams params) {
  auto& shared = shared_memory<ColumnShared<Shape>>();
  const AttentionParams& attention = params.attention;
  const VotingRows& voting = params.voting;
  const int64_t group_size = attention.group_size();
  const int64_t num_kv_heads = attention.num_kv_heads / gridDim.y;
  const int64_t batch = blockIdx.z;
  const int64_t first_key = int64_t{blockIdx.x} * Shape::kRows;
  const auto* key = static_cast<const char*>(attention.key.data);
  const float scale = attention.sm_scale * kLog2E;

  float total[Shape::kRowTiles][2] = {};
  for (int64_t first_entry = 0; first_entry < voting.num_rows; first_entry += Shape::kColumns) {
    TileProducts<Shape> mean = {};
    for (int64_t i = 0; i < num_kv_heads; ++i) {
      const int64_t kv_head = blockIdx.y * num_kv_heads + i;
      const RowList rows{attention, voting, batch, kv_head * group_size, group_size};
      // Tile t of the stream: this tile of entries, for query head t of the group.
      const auto row_of = [&](int64_t j) -> int64_t {
        const int64_t entry = first_entry + j % Shape::kColumns;
        return entry < voting.num_rows ? j / Shape::kColumns * voting.num_rows + entry
                                       : rows.size();
      };
      stream_tiles<Shape>(
          shared.tiles, static_cast<int>(attention.head_dim) * Shape::kElementBytes, params.aligned,
          group_size,
          [&](int a) {
            const int64_t index = first_key + a;
            return index < attention.kv_len
                       ? key + attention.key.offset(batch, kv_head, index) * Shape::kElementBytes
                       : nullptr;
          },
          [&](int64_t j) { return rows.address(row_of(j), Shape::kElementBytes); },
          [&](int stage, int64_t tile) {
            prepare_column(params, rows, row_of(tile * Shape::kColumns + threadIdx.x), stage,
                           shared);
          },
          [&](int stage, int64_t /*tile*/, TileProducts<Shape>& products) {
#pragma unroll
            for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
              for (int c = 0; c < Shape::kColumnTiles; ++c) {
#pragma unroll
                for (int p = 0; p < 4; ++p) {
                  const int column = product_column(c, p);
                  const int64_t index = first_key + product_row<Shape>(r, p);
                  const float factor = shared.factor[stage][column];
                  const bool visible = factor != 0.0f && index < attention.kv_len &&
                                       index <= shared.last_key[stage][column] &&
                                       attention.key_is_real(batch, index);
                  if (visible) {
                    const float exponential = exp2_approx(
                        fmaf(products[r][c][p], scale, -shared.reference[stage][column]));
                    mean[r][c][p] = fmaf(exponential, factor, mean[r][c][p]);
                  }
                }
              }
            }
          });
    }
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
      for (int c = 0; c < Shape::kColumnTiles; ++c) {
#pragma unroll
        for (int p = 0; p < 4; ++p) {
          total[r][p / 2] = add_to_statistic<Statistic::kMax>(total[r][p / 2], mean[r][c][p]);
        }
      }
    }
  }
  write_columns<Shape, Statistic::kMax>(total, params.scores, params);
}

// ---- Launching
// -----------------------------------------------------------------------------------

// Calls f with the tile shape for a dtype and a head_dim.
template <typename F>
cudaError_t dispatch_shape(const AttentionParams& attention, F&& f) {
  cudaError_t error = cudaErrorInvalidValue;
  dispatch_dtype(attention.dtype, [&](auto dtype) {
    error = dispatch_head_dim(attention.head_dim, [&](auto head_dim) {
      return f(TileShape<decltype(dtype)::value, head_dim.value>{});
    });
  });
  return error;
}

// Normalizers of all voting rows, in RowSplits::num_parts parts; also clears tickets. With given
// log-sum-exps it only does that.
inline cudaError_t launch_normalizers(const AttentionParams& attention, const VotingRows& voting,
                                      Normalizer* parts, const Tickets& tickets,
                                      cudaStream_t stream) {
  const int64_t num_rows = attention.group_size() * voting.num_rows;
  const int64_t heads = attention.batch_size * attention.num_kv_heads;
  if (voting.softmax_lse || num_rows * heads == 0) {
    if (tickets.count == 0) return cudaSuccess;
    return cudaMemsetAsync(tickets.data, 0, tickets.count * sizeof(*tickets.data), stream);
  }
  const int64_t splits = RowSplits::count(attention, voting.num_rows);
  if (has_few_rows(attention, voting.num_rows)) {
    return launch_logits({attention, voting, parts, nullptr, tickets, 0, false}, splits, stream);
  }
  return dispatch_shape(attention, [&](auto shape) {
    using Shape = decltype(shape);
    const RowNormalizerParams params{attention,
                                     voting,
                                     parts,
                                     tickets,
                                     RowSplits::keys(attention, splits, Shape::kColumns),
                                     rows_aligned(attention)};
    const LaunchShape launch_shape{
        dim3(static_cast<unsigned>((num_rows + Shape::kRows - 1) / Shape::kRows),
             static_cast<unsigned>(splits), static_cast<unsigned>(heads)),
        dim3(kTileThreads), sizeof(RowShared<Shape>)};
    return launch(row_normalizer_kernel<Shape>, launch_shape, stream, params);
  });
}

// How many tickets launch_columns wants, if scores have parts.
inline int64_t num_tickets(int64_t num_scores, int64_t num_keys) {
  constexpr int64_t kMinRows = kTileWarps * 16;
  return num_scores * ((num_keys + kMinRows - 1) / kMinRows);
}

template <bool text_weighted>
cudaError_t launch_columns(ColumnParams params, cudaStream_t stream) {
  const AttentionParams& attention = params.attention;
  const int64_t heads = params.per_query_head ? attention.num_qo_heads : attention.num_kv_heads;
  if (attention.batch_size == 0 || params.num_keys == 0) return cudaSuccess;
  params.aligned = rows_aligned(attention);
  return dispatch_shape(attention, [&](auto shape) {
    using Shape = decltype(shape);
    const LaunchShape launch_shape{
        dim3(static_cast<unsigned>((params.num_keys + Shape::kRows - 1) / Shape::kRows),
             static_cast<unsigned>(heads), static_cast<unsigned>(attention.batch_size)),
        dim3(kTileThreads), sizeof(ColumnShared<Shape>)};
    cudaError_t error = cudaErrorInvalidValue;
    if constexpr (text_weighted) {
      error = launch(column_kernel<Shape, Statistic::kSum, true>, launch_shape, stream, params);
    } else {
      (void)dispatch_value<Statistic::kSum, Statistic::kMax, Statistic::kSumOfSquares>(
          params.statistic, [&](auto statistic) {
            error = launch(column_kernel<Shape, decltype(statistic)::value, false>, launch_shape,
                           stream, params);
          });
    }
    return error;
  });
}

inline cudaError_t launch_max_of_means(ColumnParams params, int64_t num_score_heads,
                                       cudaStream_t stream) {
  const AttentionParams& attention = params.attention;
  if (attention.batch_size == 0 || params.num_keys == 0) return cudaSuccess;
  params.aligned = rows_aligned(attention);
  return dispatch_shape(attention, [&](auto shape) {
    using Shape = typename decltype(shape)::Small;
    const LaunchShape launch_shape{
        dim3(static_cast<unsigned>((params.num_keys + Shape::kRows - 1) / Shape::kRows),
             static_cast<unsigned>(num_score_heads), static_cast<unsigned>(attention.batch_size)),
        dim3(kTileThreads), sizeof(ColumnShared<Shape>)};
    return launch(max_of_means_kernel<Shape>, launch_shape, stream, params);
  });
}

}  // namespace kvevict
