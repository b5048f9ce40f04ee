// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "core/dtype.h"
#include "core/head_tensor.h"

// Where the ops are registered: torch.ops.kvevict.
#ifndef KVEVICT_NAMESPACE
#define KVEVICT_NAMESPACE kvevict
#endif

namespace kvevict {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The element type of a tensor that was checked to have one of these.
inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: return DType::kFloat32;
  }
}

inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> shape,
                        ScalarType dtype) {
  return torch::stable::new_empty(like, {shape.begin(), shape.size()}, dtype);
}

// The tensor with its elements in order; small arguments are read that way.
inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}
inline std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(dense(*tensor)) : std::nullopt;
}

// The tensor where the host can read it; waits for its device.
inline Tensor on_host(const Tensor& tensor) {
  return tensor.is_cpu() ? tensor
                         : torch::stable::to(tensor, torch::stable::Device(DeviceType::CPU));
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

inline HeadTensor head_tensor(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}
inline MutableHeadTensor mutable_head_tensor(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

}  // namespace kvevict
