// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>

#include "core/arena.h"
#include "core/cpu/isa.h"
#include "core/cpu/panel_size.h"
#include "core/dtype.h"
#include "core/head_tensor.h"
#include "core/token_lists.h"

namespace kvevict {

enum class Metric : int8_t { kCosine, kDot };

struct MatchTokensParams {
  HeadTensor tokens;  // [batch_size, num_heads, num_tokens, dim]
  TokenLists source_index, target_index;
  TokenLists source_group, target_group;  // like the indices, or none: all tokens are of group 0
  DType dtype;
  Metric metric;
  int32_t* match_index;  // [batch_size, num_heads, source_index.len]
  float* similarity;     // like match_index
  int64_t batch_size, num_heads, num_tokens, dim;

  // similarity = product / (norm * norm + offset): with norms that is the cosine, with norms of 0
  // and an offset of 1 the product itself.
  KVEVICT_HD float offset() const { return metric == Metric::kCosine ? 1e-8f : 1.0f; }
  // NaN for an infinite norm: so are all similarities of such a token.
  KVEVICT_HD float norm(float sum_of_squares) const {
    const float norm = metric == Metric::kCosine ? sqrtf(sum_of_squares) : 0.0f;
    return norm + (norm - norm);
  }
};

// One thread's working memory on the CPU for a block of sources against panels of targets.
struct MatchScratch {
  struct Source {
    int64_t place;       // in the list of sources
    int32_t begin, end;  // its targets, of the compacted list
    float norm;
  };
  Source* sources;      // [capacity]
  int32_t* targets;     // [target_index.len], places of the targets that there are
  float* rows;          // [capacity][dim], a chunk of the depth after the other
  float* panel;         // [kMaxDepth][kMaxPanel]
  float* norms;         // [kMaxPanel], of the panel
  float* sums;          // [capacity][kMaxPanel], products over the chunks so far
  float* products;      // [capacity][lanes], of the best target of every lane
  float* denominators;  // [capacity][lanes], of the same
  int32_t* best;        // [capacity][lanes], its place in targets; -1 = none

  // Elements of 4 bytes that are multiplied at a time.
  static constexpr int64_t kMaxDepth = 256;

  // Rows per block: enough to pay for packing targets, few enough to stay in cache; fewer where
  // some thread would have none. A multiple of kMaxTileRows.
  static int64_t capacity(const MatchTokensParams& params, int64_t num_threads) {
    constexpr int64_t kCacheBytes = 1 << 20;
    constexpr int64_t kMinRows = 48, kMaxRows = 240;
    const int64_t lists = std::max<int64_t>(params.batch_size * params.num_heads, 1);
    const int64_t blocks_per_list = (num_threads + lists - 1) / lists;
    const int64_t in_cache = kCacheBytes / (params.dim * int64_t{sizeof(float)});
    const int64_t wanted = std::min(in_cache, params.source_index.len / blocks_per_list);
    return std::clamp(wanted, kMinRows, kMaxRows) / kMaxTileRows * kMaxTileRows;
  }

  static MatchScratch carve(Arena& arena, const MatchTokensParams& params, int64_t num_threads) {
    const int64_t rows = capacity(params, num_threads);
    constexpr int64_t kMaxLanes = 16;
    return {arena.take<Source>(rows),
            arena.take<int32_t>(params.target_index.len),
            arena.take<float>(rows * params.dim),
            arena.take<float>(kMaxDepth * kMaxPanel),
            arena.take<float>(kMaxPanel),
            arena.take<float>(rows * kMaxPanel),
            arena.take<float>(rows * kMaxLanes),
            arena.take<float>(rows * kMaxLanes),
            arena.take<int32_t>(rows * kMaxLanes)};
  }
};

struct MatchTokens {
  static int64_t blocks_per_list(const MatchTokensParams& params, int64_t num_threads) {
    const int64_t rows = MatchScratch::capacity(params, num_threads);
    return (params.source_index.len + rows - 1) / rows;
  }
  static CpuPlan plan_cpu(const MatchTokensParams& params, int num_threads) {
    Arena scratch;
    MatchScratch::carve(scratch, params, num_threads);
    const int64_t lists = params.batch_size * params.num_heads;
    return {1, {lists * blocks_per_list(params, num_threads)}, 0, scratch.bytes()};
  }
  template <Isa isa>
  static void run_cpu(const MatchTokensParams& params, const CpuWork& work) noexcept;

  static int64_t cuda_workspace_bytes(const MatchTokensParams& params);
  static int launch_cuda(const MatchTokensParams& params, void* workspace, void* stream) noexcept;
};

}  // namespace kvevict
