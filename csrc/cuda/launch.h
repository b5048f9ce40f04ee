// SPDX-License-Identifier: Apache-2.0
// The one way kernels are launched: no <<<>>>, so that the same sources compile for the CPU.
#pragma once

#include <cuda_runtime.h>

namespace kvevict {

struct LaunchShape {
  dim3 grid;
  dim3 block;
  unsigned shared_bytes = 0;
};

template <typename... KernelArgs, typename... Args>
cudaError_t launch(void (*kernel)(KernelArgs...), const LaunchShape& shape, cudaStream_t stream,
                   Args&&... args) {
  constexpr unsigned kDefaultShared = 48 << 10;
  if (shape.shared_bytes > kDefaultShared) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<KernelArgs>(args)...);
}

}  // namespace kvevict
