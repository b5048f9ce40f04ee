// SPDX-License-Identifier: Apache-2.0
#include "ops/broadcast_indices/broadcast_indices.h"

namespace kvevict {

template <>
void BroadcastIndices::run_cpu<kThisIsa>(const BroadcastIndicesParams& params,
                                         const CpuWork& work) noexcept {
  for (int64_t item = work.begin; item < work.end; ++item) {
    const int64_t head = item % params.num_kv_heads;
    const int64_t batch = item / params.num_kv_heads % params.batch_size;
    const int64_t layer = item / params.num_kv_heads / params.batch_size;
    int32_t* out = params.indices + item * params.kept.k;
    for (int64_t i = 0; i < params.kept.k; ++i) out[i] = params.entry(layer, batch, head, i);
  }
}

}  // namespace kvevict
