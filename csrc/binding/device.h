// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "binding/tensor.h"

namespace kvevict {

// Makes the tensor's device the current one, for a while.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor& tensor) : guard_(tensor.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

// The CUDA stream that torch uses on the tensor's device, as a cudaStream_t.
void* current_stream(const Tensor& tensor);

// Throws what a launcher's cudaError_t says, if it is one.
void check_launch(int cuda_error, const char* op);

}  // namespace kvevict
