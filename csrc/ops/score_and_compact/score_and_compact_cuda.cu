// SPDX-License-Identifier: Apache-2.0
#include "cuda/launch.h"
#include "ops/score_and_compact/score_and_compact.h"

namespace kvevict {
namespace {

constexpr int kThreads = 256;

// One thread per key, whole blocks per row.
__global__ void __launch_bounds__(kThreads)
    pool_scores_kernel(const ScoreAndCompactParams params, unsigned blocks_per_row) {
  const int64_t row = blockIdx.x / blocks_per_row;
  const int64_t key = int64_t{blockIdx.x % blocks_per_row} * kThreads + threadIdx.x;
  if (key >= params.kv_len) return;
  params.merged_priority[row * params.kv_len + key] = params.priority_of(row, key);
  params.pooled_scores[row * params.kv_len + key] = params.pooled(row, key);
}

}  // namespace

int ScoreAndCompact::launch_cuda(const ScoreAndCompactParams& params, void* /*workspace*/,
                                 void* stream) noexcept {
  const auto blocks_per_row = static_cast<unsigned>((params.kv_len + kThreads - 1) / kThreads);
  const auto blocks = static_cast<unsigned>(params.batch_size * params.num_heads * blocks_per_row);
  if (blocks == 0) return cudaSuccess;
  return launch(pool_scores_kernel, {dim3(blocks), dim3(kThreads)},
                static_cast<cudaStream_t>(stream), params, blocks_per_row);
}

}  // namespace kvevict
