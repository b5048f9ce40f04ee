// SPDX-License-Identifier: Apache-2.0
// The two passes of scoring, on the tiles of mma_tiles.h: rows of the attention matrix give
// log-sum-exps (queries resident, keys stream by), its columns give scores (keys resident, queries
// stream by). Logits never leave registers, sums are never atomic.
#pragma once

#include <algorithm>

#include "core/attention.h"
#include "cuda/launch.h"
#include "cuda/mma_tiles.h"
#include "cuda/vector_loads.h"

namespace kvevict {

inline constexpr float kLog2E = 1.44269504088896341f;
inline constexpr float kMinusInfinity = -__builtin_inff();

// The rows that vote, of all query heads of one KV head: row j is entry j % num_rows of query head
// first_head + j / num_rows.
struct RowList {
  const AttentionParams& attention;
  const VotingRows& voting;
  int64_t batch, first_head, num_heads;

  __device__ __forceinline__ int64_t size() const { return num_heads * voting.num_rows; }
  // The query row, or -1 if the row does not vote.
  __device__ __forceinline__ int64_t query_row(int64_t j) const {
    if (j >= size()) return -1;
    const int64_t row = voting.row(batch, j % voting.num_rows);
    return row < 0 || attention.row_is_padding(batch, row) ? -1 : row;
  }
  __device__ __forceinline__ int64_t head(int64_t j) const {
    return first_head + j / voting.num_rows;
  }
  __device__ __forceinline__ const char* address(int64_t j, int element_bytes) const {
    const int64_t row = query_row(j);
    if (row < 0) return nullptr;
    return static_cast<const char*>(attention.query.data) +
           attention.query.offset(batch, head(j), row) * element_bytes;
  }
};

// A softmax normalizer: the largest logit in units of log2, and the sum of 2^(logit - largest).
struct Normalizer {
  float largest, sum;

  // What to subtract from logits whose largest is this: where there are none, anything finite.
  static __device__ __forceinline__ float finite(float largest) {
    return largest == kMinusInfinity ? 0.0f : largest;
  }

  __device__ __forceinline__ void merge(const Normalizer& other) {
    const float raised = fmaxf(largest, other.largest);
    const float reference = finite(raised);
    sum =
        sum * exp2_approx(largest - reference) + other.sum * exp2_approx(other.largest - reference);
    largest = raised;
  }
  // The log-sum-exp, natural; -inf if nothing was seen.
  __device__ __forceinline__ float lse() const {
    constexpr double kLn2 = 0.69314718055994530942;
    if (sum == 0.0f) return kMinusInfinity;
    return static_cast<float>((double{largest} + double{log2f(sum)}) * kLn2);
  }
};

// Where a row's normalizer comes from: parts from row_normalizer_kernel, or a given log-sum-exp.
struct RowNormalizers {
  const Normalizer* parts;  // [batch_size, num_qo_heads, num_rows, num_splits], or null
  int64_t num_splits;

  // The whole normalizer of a row of parts, splits in ascending order.
  __device__ __forceinline__ Normalizer merged(int64_t row) const {
    Normalizer total = parts[row * num_splits];
    for (int64_t split = 1; split < num_splits; ++split) {
      total.merge(parts[row * num_splits + split]);
    }
    return total;
  }
  // A given log-sum-exp is a largest logit with a sum of 1, or of 0 if nothing was seen.
  __device__ __forceinline__ Normalizer of(const AttentionParams& attention,
                                           const VotingRows& voting, int64_t batch, int64_t head,
                                           int64_t entry, int64_t row) const {
    const int64_t list = batch * attention.num_qo_heads + head;
    if (parts) return merged(list * voting.num_rows + entry);
    const float lse = voting.softmax_lse[list * attention.qo_len + row];
    return {kLog2E * lse, lse == kMinusInfinity ? 0.0f : 1.0f};
  }
};

// ---- Rows
// ----------------------------------------------------------------------------------------

struct RowNormalizerParams {
  AttentionParams attention;
  VotingRows voting;
  Normalizer* parts;  // [batch_size, num_qo_heads, num_rows, num_splits]
  int64_t num_splits, keys_per_split;
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
      for (int distance = 1; distance < 4; distance *= 2) {
        const float largest = __shfl_xor_sync(kFullWarp, total.largest, distance);
        const float sum = __shfl_xor_sync(kFullWarp, total.sum, distance);
        total.merge({largest, sum});  // the same bits in both lanes: sums commute
      }
      const int64_t j = first_row + product_row<Shape>(r, half * 2);
      if (lane_id() % 4 == 0 && j < rows.size()) {
        const int64_t row = rows.batch * attention.num_qo_heads * params.voting.num_rows +
                            rows.first_head * params.voting.num_rows + j;
        params.parts[row * params.num_splits + blockIdx.y] = total;
      }
    }
  }
}

// ---- Columns
// -------------------------------------------------------------------------------------

struct ColumnParams {
  AttentionParams attention;
  VotingRows voting;
  RowNormalizers normalizers;
  Statistic statistic;
  bool per_query_head;      // a score of each query head, else of each KV head
  const int32_t* key_rows;  // [batch_size, num_keys], query rows whose own keys are scored, -1 =
                            // none; null: all keys in order
  int64_t num_keys;         // of key_rows, or kv_len
  // A second weight of a row, by entry; the statistic is then also taken without it.
  const float* text_weight;  // [batch_size, num_rows], or null
  float* scores;             // [batch_size, num_parts, num_keys]
  float* unweighted;         // like scores; with text_weight
  float scale;               // of what is written
  bool aligned;
};

template <typename Shape>
struct ColumnShared {
  TileBuffers<Shape> tiles;
  float reference[Shape::kStages][Shape::kColumns];  // of the row's exponentials
  float factor[Shape::kStages][Shape::kColumns];     // weight / normalizer; 0 = no vote
  float text[Shape::kStages][Shape::kColumns];       // factor * text_weight
  int64_t last_key[Shape::kStages][Shape::kColumns];
};

// Adds the probability exponential * factor to a statistic.
template <Statistic statistic>
__device__ __forceinline__ float add_to_statistic(float total, float exponential,
                                                  float factor = 1.0f) {
  if constexpr (statistic == Statistic::kSum) return fmaf(exponential, factor, total);
  const float probability = exponential * factor;
  if constexpr (statistic == Statistic::kSumOfSquares) {
    return fmaf(probability, probability, total);
  }
  // NaN wins over any number, as it does on the CPU.
  return probability > total || probability != probability ? probability : total;
}

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
    if (normalizer.sum != 0.0f) factor = weight / normalizer.sum;
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
                                              float* scores, const ColumnParams& params) {
  const int64_t part = int64_t{blockIdx.z} * gridDim.y + blockIdx.y;
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
      if (lane_id() % 4 == 0 && index < params.num_keys) {
        scores[part * params.num_keys + index] = score * params.scale;
      }
    }
  }
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
    if (params.key_rows) {
      const int64_t row = params.key_rows[rows.batch * params.num_keys + index];
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
    constexpr DType kDType = decltype(dtype)::value;
    if (attention.head_dim <= 64) {
      error = f(TileShape<kDType, 64>{});
    } else if (attention.head_dim <= 96) {
      error = f(TileShape<kDType, 96>{});
    } else if (attention.head_dim <= 128) {
      error = f(TileShape<kDType, 128>{});
    } else {
      error = f(TileShape<kDType, 256>{});
    }
  });
  return error;
}

inline bool tiles_aligned(const AttentionParams& attention) {
  const int bytes = attention.dtype == DType::kFloat32 ? 4 : 2;
  return rows_aligned(attention.query, bytes) && rows_aligned(attention.key, bytes);
}

// How the keys are split for row normalizers: enough blocks to fill a large GPU with the few rows
// of a window, while each still reads a stretch of keys worth its start.
struct RowSplits {
  static constexpr int64_t kBlocks = 264;  // two per multiprocessor of an H200
  static constexpr int64_t kMinKeys = 512;
  static constexpr int64_t kMaxSplits = 16;

  static int64_t count(const AttentionParams& attention, int64_t num_rows) {
    const int64_t row_tiles = (attention.group_size() * num_rows + 127) / 128;
    const int64_t blocks =
        std::max<int64_t>(attention.batch_size * attention.num_kv_heads * row_tiles, 1);
    const int64_t wanted = (kBlocks + blocks - 1) / blocks;
    const int64_t possible = (attention.kv_len + kMinKeys - 1) / kMinKeys;
    return std::clamp<int64_t>(std::min(wanted, possible), 1, kMaxSplits);
  }
  static int64_t bytes(const AttentionParams& attention, int64_t num_rows) {
    return attention.batch_size * attention.num_qo_heads * num_rows * count(attention, num_rows) *
           int64_t{sizeof(Normalizer)};
  }
};

inline cudaError_t launch_row_normalizers(const AttentionParams& attention,
                                          const VotingRows& voting, Normalizer* parts,
                                          cudaStream_t stream) {
  const int64_t splits = RowSplits::count(attention, voting.num_rows);
  const int64_t num_rows = attention.group_size() * voting.num_rows;
  const int64_t heads = attention.batch_size * attention.num_kv_heads;
  if (num_rows * heads == 0) return cudaSuccess;
  return dispatch_shape(attention, [&](auto shape) {
    using Shape = decltype(shape);
    const int64_t keys = (attention.kv_len + splits - 1) / splits;
    const RowNormalizerParams params{
        attention,
        voting,
        parts,
        splits,
        (keys + Shape::kColumns - 1) / Shape::kColumns * Shape::kColumns,
        tiles_aligned(attention)};
    const LaunchShape launch_shape{
        dim3(static_cast<unsigned>((num_rows + Shape::kRows - 1) / Shape::kRows),
             static_cast<unsigned>(splits), static_cast<unsigned>(heads)),
        dim3(kTileThreads), sizeof(RowShared<Shape>)};
    return launch(row_normalizer_kernel<Shape>, launch_shape, stream, params);
  });
}

template <bool text_weighted>
cudaError_t launch_columns(ColumnParams params, cudaStream_t stream) {
  const AttentionParams& attention = params.attention;
  const int64_t heads = params.per_query_head ? attention.num_qo_heads : attention.num_kv_heads;
  if (attention.batch_size == 0 || params.num_keys == 0) return cudaSuccess;
  params.aligned = tiles_aligned(attention);
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
  params.aligned = tiles_aligned(attention);
  return dispatch_shape(attention, [&](auto shape) {
    using Shape = typename decltype(shape)::Small;
    const LaunchShape launch_shape{
        dim3(static_cast<unsigned>((params.num_keys + Shape::kRows - 1) / Shape::kRows),
             static_cast<unsigned>(num_score_heads), static_cast<unsigned>(attention.batch_size)),
        dim3(kTileThreads), sizeof(ColumnShared<Shape>)};
    return launch(max_of_means_kernel<Shape>, launch_shape, stream, params);
  });
}

// ---- Heads
// ---------------------------------------------------------------------------------------

struct ReduceHeadsParams {
  const float* parts;  // [num_scores, parts_per_score, num_keys]
  float* scores;       // [num_scores, num_keys]
  int64_t num_scores, parts_per_score, num_keys;
  bool is_max;
};

inline constexpr int kReduceThreads = 256;

// One thread per score; parts in ascending order.
static __global__ void reduce_heads_kernel(const ReduceHeadsParams params) {
  const int64_t i = int64_t{blockIdx.x} * kReduceThreads + threadIdx.x;
  if (i >= params.num_scores * params.num_keys) return;
  const float* parts = params.parts +
                       i / params.num_keys * params.parts_per_score * params.num_keys +
                       i % params.num_keys;
  float result = parts[0];
  for (int64_t part = 1; part < params.parts_per_score; ++part) {
    const float score = parts[part * params.num_keys];
    result = params.is_max ? add_to_statistic<Statistic::kMax>(result, score) : result + score;
  }
  params.scores[i] = result;
}

inline cudaError_t launch_reduce_heads(const ReduceHeadsParams& params, cudaStream_t stream) {
  const int64_t count = params.num_scores * params.num_keys;
  if (count == 0) return cudaSuccess;
  const LaunchShape shape{
      dim3(static_cast<unsigned>((count + kReduceThreads - 1) / kReduceThreads)),
      dim3(kReduceThreads)};
  return launch(reduce_heads_kernel, shape, stream, params);
}

}  // namespace kvevict
