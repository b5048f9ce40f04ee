// SPDX-License-Identifier: Apache-2.0
// In place of csrc/binding/registration.h: CPU tensors get an op's CUDA kernels.
#pragma once

#include "binding/tensor.h"

#define KVEVICT_IMPL(op)                                 \
  STABLE_TORCH_LIBRARY_IMPL(KVEVICT_NAMESPACE, CPU, m) { \
    m.impl(#op, TORCH_BOX(&op<DeviceType::CUDA>));       \
  }
