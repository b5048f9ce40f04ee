// SPDX-License-Identifier: Apache-2.0
// In place of csrc/binding/device.h: CUDA kernels run on CPU tensors; there are no devices to
// choose from, and no streams.
#pragma once

#include <stdexcept>
#include <string>

#include "binding/tensor.h"
#include "emulation/emulator.h"

namespace kvevict {

struct DeviceGuard {
  explicit DeviceGuard(const Tensor&) {}
};

inline void* current_stream(const Tensor&) { return nullptr; }

inline void check_launch(int cuda_error, const char* op) {
  if (cuda_error == 0) return;
  throw std::runtime_error("kvevict::" + std::string(op) + ": emulated CUDA error " +
                           std::to_string(cuda_error) + " (" + emulation::last_error + ")");
}

}  // namespace kvevict
