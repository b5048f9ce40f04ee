// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "core/arena.h"
#include "core/cpu/isa.h"
#include "core/dtype.h"
#include "core/head_tensor.h"
#include "core/token_lists.h"

namespace kvevict {

struct MergedTensor {
  MutableHeadTensor rows;  // [batch_size, num_heads, num_tokens, dim]
  int64_t dim;
  DType dtype;
};

// Positions of tokens.
struct MergePair {
  int32_t target, source;
};

// How the sum of a target and its sources is weighted and divided.
struct MergeScale {
  float divisor;
  bool plain;  // all weights count as 1

  KVEVICT_HD static MergeScale of(bool normalize, float sum_of_weights, int64_t count) {
    if (!normalize) return {1.0f, false};
    if (sum_of_weights > 1e-8f) return {sum_of_weights, false};
    return {static_cast<float>(count), true};
  }
};

struct MergeTokensParams {
  const MergedTensor* tensors;  // [num_tensors]
  TokenLists source_index;      // [batch_size, num_heads | 1, num_sources]
  TokenLists match_index;       // like source_index, the target of each source
  const float* weight;          // [batch_size, num_heads | 1, num_tokens]
  int64_t weight_stride_batch, weight_stride_head;
  bool normalize;
  int64_t num_tensors, batch_size, num_heads, num_tokens;

  KVEVICT_HD int64_t num_sources() const { return source_index.len; }

  // Heads that share both source_index and match_index have one list of pairs.
  KVEVICT_HD bool shares_lists() const {
    return source_index.stride_head == 0 && match_index.stride_head == 0;
  }
  KVEVICT_HD int64_t num_lists() const { return batch_size * (shares_lists() ? 1 : num_heads); }
  KVEVICT_HD int64_t list_of(int64_t batch, int64_t head) const {
    return shares_lists() ? batch : batch * num_heads + head;
  }

  // The pair at a place of a list; its target is num_tokens if it is not to be merged.
  KVEVICT_HD MergePair pair(int64_t list, int64_t place) const {
    const int64_t batch = shares_lists() ? list : list / num_heads;
    const int64_t head = shares_lists() ? 0 : list % num_heads;
    const int32_t source = source_index.list(batch, head)[place];
    const int32_t target = match_index.list(batch, head)[place];
    const bool merged = source >= 0 && source < num_tokens && target >= 0 && target < num_tokens;
    return {merged ? target : static_cast<int32_t>(num_tokens), source};
  }
  KVEVICT_HD const float* weights(int64_t batch, int64_t head) const {
    return weight + batch * weight_stride_batch + head * weight_stride_head;
  }
};

// On the CPU: the pairs of every list, by target and then by place.
struct MergeTables {
  MergePair* pairs;    // [num_lists][num_sources]
  int64_t* num_pairs;  // [num_lists]

  static MergeTables carve(Arena& arena, const MergeTokensParams& params) {
    return {arena.take<MergePair>(params.num_lists() * params.num_sources()),
            arena.take<int64_t>(params.num_lists())};
  }
};

struct MergeTokens {
  // Parts that the pairs of a list are split into, so that there is work for all threads.
  static int64_t parts_per_list(const MergeTokensParams& params, int64_t num_threads) {
    const int64_t items =
        std::max<int64_t>(params.num_tensors * params.batch_size * params.num_heads, 1);
    return (2 * num_threads + items - 1) / items;
  }
  static CpuPlan plan_cpu(const MergeTokensParams& params, int num_threads) {
    constexpr int64_t kPairsPerThread = 256;
    Arena shared;
    MergeTables::carve(shared, params);
    const int64_t streams = params.num_tensors * params.batch_size * params.num_heads;
    const int64_t pairs = std::max<int64_t>(params.num_sources(), 1);
    return {2,
            {params.num_lists(), streams * parts_per_list(params, num_threads)},
            shared.bytes(),
            (params.num_tokens + 1) * int64_t{sizeof(int32_t)},
            std::max<int64_t>(kPairsPerThread / pairs, 1)};
  }
  template <Isa isa>
  static void run_cpu(const MergeTokensParams& params, const CpuWork& work) noexcept;

  static int64_t cuda_workspace_bytes(const MergeTokensParams& params);
  static int launch_cuda(const MergeTokensParams& params, void* workspace, void* stream) noexcept;
};

}  // namespace kvevict
