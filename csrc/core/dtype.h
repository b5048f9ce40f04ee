// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/dispatch.h"

namespace kvevict {

// Element types that scoring reads. Moving only needs an element's size.
enum class DType : int8_t { kFloat32, kFloat16, kBFloat16 };

template <DType dtype>
inline constexpr int kElementBytes = dtype == DType::kFloat32 ? 4 : 2;

template <typename F>
void dispatch_dtype(DType dtype, F&& f) {
  (void)dispatch_value<DType::kFloat32, DType::kFloat16, DType::kBFloat16>(dtype, f);
}

}  // namespace kvevict
