// SPDX-License-Identifier: Apache-2.0
// The rows of the attention matrix: which of them vote, and the normalizers of their softmax.
#pragma once

#include <algorithm>

#include "core/attention.h"
#include "core/dispatch.h"
#include "cuda/reductions.h"
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
  // Merges with other lanes of the warp, at distances from a first one up to half an end.
  __device__ __forceinline__ void merge_lanes(int first_distance, int end_distance) {
    for (int distance = first_distance; distance < end_distance; distance *= 2) {
      merge({__shfl_xor_sync(kFullWarp, largest, distance),
             __shfl_xor_sync(kFullWarp, sum, distance)});
    }
  }
  // What turns 2^(logit - largest) into a weighted probability; 0 where nothing was seen.
  __device__ __forceinline__ float factor(float weight) const {
    return sum == 0.0f ? 0.0f : weight / sum;
  }
  // The log-sum-exp, natural; -inf if nothing was seen.
  __device__ __forceinline__ float lse() const {
    constexpr double kLn2 = 0.69314718055994530942;
    if (sum == 0.0f) return kMinusInfinity;
    return static_cast<float>((double{largest} + double{log2f(sum)}) * kLn2);
  }
};

// Where a row's normalizer comes from: parts for splits of the keys, or a given log-sum-exp.
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
  // The same by a whole warp, for many splits; the lanes agree but for rounding, lane 0 counts.
  __device__ __forceinline__ Normalizer merged_by_warp(int64_t row) const {
    Normalizer total{kMinusInfinity, 0.0f};
    for (int64_t split = threadIdx.x % 32; split < num_splits; split += 32) {
      total.merge(parts[row * num_splits + split]);
    }
    total.merge_lanes(1, 32);
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

// Calls f(Constant<n>{}) with the head_dim that kernels are compiled for.
template <typename F>
cudaError_t dispatch_head_dim(int64_t head_dim, F&& f) {
  if (head_dim <= 64) return f(Constant<64>{});
  if (head_dim <= 96) return f(Constant<96>{});
  if (head_dim <= 128) return f(Constant<128>{});
  return f(Constant<256>{});
}

// Rows per KV head that are few enough for the kernels of few_rows.h. float32 has no tensor cores.
inline bool has_few_rows(const AttentionParams& attention, int64_t num_rows) {
  constexpr int64_t kMaxRows = 16;
  return attention.dtype != DType::kFloat32 && attention.group_size() * num_rows <= kMaxRows;
}

// How the keys are split for row normalizers: enough blocks to fill a large GPU with the few rows
// of a window or of a decode step, while each still reads a stretch of keys worth its start.
struct RowSplits {
  struct Tuning {
    int64_t row_tile, num_blocks, min_keys, max_splits;
  };
  static constexpr int64_t kMultiprocessors = 132;  // of an H200
  static constexpr Tuning kManyRows = {128, 2 * kMultiprocessors, 512, 16};
  static constexpr Tuning kFewRows = {16, 6 * kMultiprocessors, 256, 128};

  static int64_t count(const AttentionParams& attention, int64_t num_rows) {
    const Tuning tuning = has_few_rows(attention, num_rows) ? kFewRows : kManyRows;
    const int64_t tiles =
        (attention.group_size() * num_rows + tuning.row_tile - 1) / tuning.row_tile;
    const int64_t blocks =
        std::max<int64_t>(attention.batch_size * attention.num_kv_heads * tiles, 1);
    const int64_t wanted = (tuning.num_blocks + blocks - 1) / blocks;
    const int64_t possible = (attention.kv_len + tuning.min_keys - 1) / tuning.min_keys;
    return std::clamp<int64_t>(std::min(wanted, possible), 1, tuning.max_splits);
  }
  // How many normalizers that makes.
  static int64_t num_parts(const AttentionParams& attention, int64_t num_rows) {
    return attention.batch_size * attention.num_qo_heads * num_rows * count(attention, num_rows);
  }
  // The keys of a split, whole tiles of them.
  static int64_t keys(const AttentionParams& attention, int64_t num_splits, int64_t tile) {
    const int64_t keys = (attention.kv_len + num_splits - 1) / num_splits;
    return (keys + tile - 1) / tile * tile;
  }
};

// Whether all rows of query and key start on 16 bytes.
inline bool rows_aligned(const AttentionParams& attention) {
  const int bytes = attention.dtype == DType::kFloat32 ? 4 : 2;
  return rows_aligned(attention.query, bytes) && rows_aligned(attention.key, bytes);
}

}  // namespace kvevict
