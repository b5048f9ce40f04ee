// SPDX-License-Identifier: Apache-2.0
#include "ops/null/null.h"

namespace kvevict {

template <>
void Null::run_cpu<kThisIsa>(const NullParams& params, const CpuWork& work) noexcept {
  const int64_t end = work.end * kCpuBlock < params.numel ? work.end * kCpuBlock : params.numel;
  for (int64_t i = work.begin * kCpuBlock; i < end; ++i) params.output[i] = params.input[i];
}

}  // namespace kvevict
