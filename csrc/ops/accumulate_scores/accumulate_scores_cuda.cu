// SPDX-License-Identifier: Apache-2.0
#include "cuda/launch.h"
#include "ops/accumulate_scores/accumulate_scores.h"

namespace kvevict {
namespace {

constexpr int kThreads = 256;

// One thread per key, whole blocks per row.
__global__ void __launch_bounds__(kThreads)
    accumulate_scores_kernel(const AccumulateScoresParams params, unsigned blocks_per_row) {
  const int64_t row = blockIdx.x / blocks_per_row;
  const int64_t key = int64_t{blockIdx.x % blocks_per_row} * kThreads + threadIdx.x;
  if (key >= params.kv_len) return;
  const int64_t batch = row / params.num_heads, head = row % params.num_heads;
  float* score = params.scores + batch * params.stride_batch + head * params.stride_head + key;
  // Both operations are rounded, as torch's mul_ and add_ do it.
  *score = __fadd_rn(__fmul_rn(params.decay, *score), params.new_scores[row * params.kv_len + key]);
}

}  // namespace

int AccumulateScores::launch_cuda(const AccumulateScoresParams& params, void* /*workspace*/,
                                  void* stream) noexcept {
  const auto blocks_per_row = static_cast<unsigned>((params.kv_len + kThreads - 1) / kThreads);
  const auto blocks = static_cast<unsigned>(params.batch_size * params.num_heads * blocks_per_row);
  if (blocks == 0) return cudaSuccess;
  return launch(accumulate_scores_kernel, {dim3(blocks), dim3(kThreads)},
                static_cast<cudaStream_t>(stream), params, blocks_per_row);
}

}  // namespace kvevict
