// SPDX-License-Identifier: Apache-2.0
// The template op: copies its input. README, "Adding an op", starts here.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"

namespace kvevict {

struct NullParams {
  const float* input;  // [numel]
  float* output;       // [numel]
  int64_t numel;
};

struct Null {
  static constexpr int64_t kCpuBlock = 16384;  // elements per work item

  static CpuPlan plan_cpu(const NullParams& params, int /*num_threads*/) {
    return {1, {(params.numel + kCpuBlock - 1) / kCpuBlock}, 0, 0};
  }
  template <Isa isa>
  static void run_cpu(const NullParams& params, const CpuWork& work) noexcept;

  // Enqueues the kernels; returns a cudaError_t.
  static int64_t cuda_workspace_bytes(const NullParams& /*params*/) { return 0; }
  static int launch_cuda(const NullParams& params, void* workspace, void* stream) noexcept;
};

}  // namespace kvevict
