// SPDX-License-Identifier: Apache-2.0
// Where a thread stands in its block, sums over a block in a fixed order, and which block of
// several comes last. Blocks are one-dimensional and made of whole warps.
#pragma once

#include "cuda/ptx.h"

namespace kvevict {

inline constexpr int kWarpSize = 32;

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x % kWarpSize); }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x / kWarpSize); }

// The mask of the lanes before this one.
__device__ __forceinline__ unsigned lanes_before() { return (1u << lane_index()) - 1; }

// The sum of the values of all threads before this one. The whole block calls it, and may call it
// again at once.
template <int kThreads>
__device__ __forceinline__ unsigned block_exclusive_sum(
    unsigned value, unsigned (&warp_sums)[kThreads / kWarpSize]) {
  const int lane = lane_index(), warp = warp_index();
  unsigned sum = value;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const unsigned before = __shfl_up_sync(kFullWarp, sum, distance);
    if (lane >= distance) sum += before;
  }
  if (lane == kWarpSize - 1) warp_sums[warp] = sum;
  __syncthreads();
  const unsigned of_warps_before = __reduce_add_sync(kFullWarp, lane < warp ? warp_sums[lane] : 0u);
  __syncthreads();
  return of_warps_before + sum - value;
}

// Counters for is_last_block. A kernel before the one that uses them sets them to 0.
struct Tickets {
  unsigned* data;
  int64_t count;

  // The whole grid calls it.
  __device__ __forceinline__ void clear() const {
    const int64_t block =
        blockIdx.x + int64_t{gridDim.x} * (blockIdx.y + int64_t{gridDim.y} * blockIdx.z);
    const int64_t num_blocks = int64_t{gridDim.x} * gridDim.y * gridDim.z;
    for (int64_t i = block * blockDim.x + threadIdx.x; i < count; i += num_blocks * blockDim.x) {
      data[i] = 0;
    }
  }
};

// Whether num_blocks - 1 other blocks have called this on a ticket that started at 0: what they
// wrote before may then be read, with __ldcg. The whole block calls it.
__device__ __forceinline__ bool is_last_block(unsigned* ticket, unsigned num_blocks,
                                              unsigned& shared_place) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) shared_place = atomicAdd(ticket, 1u);
  __syncthreads();
  __threadfence();
  return shared_place == num_blocks - 1;
}

}  // namespace kvevict
