// SPDX-License-Identifier: Apache-2.0
#include "cuda/launch.h"
#include "ops/broadcast_indices/broadcast_indices.h"

namespace kvevict {
namespace {

constexpr int kThreads = 256;

// One thread per entry, whole blocks per list.
__global__ void __launch_bounds__(kThreads)
    broadcast_indices_kernel(const BroadcastIndicesParams params, unsigned blocks_per_list) {
  const int64_t item = blockIdx.x / blocks_per_list;
  const int64_t i = int64_t{blockIdx.x % blocks_per_list} * kThreads + threadIdx.x;
  if (i >= params.kept.k) return;
  const int64_t head = item % params.num_kv_heads;
  const int64_t batch = item / params.num_kv_heads % params.batch_size;
  const int64_t layer = item / params.num_kv_heads / params.batch_size;
  params.indices[item * params.kept.k + i] = params.entry(layer, batch, head, i);
}

}  // namespace

int BroadcastIndices::launch_cuda(const BroadcastIndicesParams& params, void* /*workspace*/,
                                  void* stream) noexcept {
  const auto blocks_per_list = static_cast<unsigned>((params.kept.k + kThreads - 1) / kThreads);
  const auto blocks = static_cast<unsigned>(params.num_lists() * blocks_per_list);
  if (blocks == 0) return cudaSuccess;
  return launch(broadcast_indices_kernel, {dim3(blocks), dim3(kThreads)},
                static_cast<cudaStream_t>(stream), params, blocks_per_list);
}

}  // namespace kvevict
