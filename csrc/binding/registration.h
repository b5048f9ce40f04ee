// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "binding/tensor.h"

// KVEVICT_IMPL(op): tensors on a device get the op's kernels for that device, op<DeviceType::…>.
// The emulation of the tests has a file of the same name that gives the CUDA kernels CPU tensors.
#define KVEVICT_IMPL_ON(op, device)                         \
  STABLE_TORCH_LIBRARY_IMPL(KVEVICT_NAMESPACE, device, m) { \
    m.impl(#op, TORCH_BOX(&op<DeviceType::device>));        \
  }

#ifdef KVEVICT_OP_HAS_CUDA
#define KVEVICT_IMPL(op) KVEVICT_IMPL_ON(op, CPU) KVEVICT_IMPL_ON(op, CUDA)
#else
#define KVEVICT_IMPL(op) KVEVICT_IMPL_ON(op, CPU)
#endif
