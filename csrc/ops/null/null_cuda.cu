// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cuda/launch.h"
#include "ops/null/null.h"

namespace kvevict {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;

__global__ void null_kernel(const NullParams params) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < params.numel; i += step) {
    params.output[i] = params.input[i];
  }
}

}  // namespace

int Null::launch_cuda(const NullParams& params, void* /*workspace*/, void* stream) noexcept {
  const int64_t blocks = std::min((params.numel + kThreads - 1) / kThreads, kMaxBlocks);
  if (blocks == 0) return cudaSuccess;
  return launch(null_kernel, {dim3(static_cast<unsigned>(blocks)), dim3(kThreads)},
                static_cast<cudaStream_t>(stream), params);
}

}  // namespace kvevict
