// SPDX-License-Identifier: Apache-2.0
#include "ops/broadcast_indices/broadcast_indices.h"

#include <algorithm>

namespace kvevict {

template <>
void BroadcastIndices::run_cpu<kThisIsa>(const BroadcastIndicesParams& params,
                                         const CpuWork& work) noexcept {
  for (int64_t item = work.begin; item < work.end; ++item) {
    const int64_t head = item % params.num_kv_heads;
    const int64_t batch = item / params.num_kv_heads % params.batch_size;
    const int64_t layer = item / params.num_kv_heads / params.batch_size;
    int32_t* out = params.indices + item * params.kept.k;
    const int32_t* kept = params.kept.list(layer, batch, head);
    const int64_t len = params.kept.len(layer, batch, head);
    std::copy(kept, kept + len, out);
    std::fill(out + len, out + params.kept.k, -1);
    if (params.base.indices) {
      const int32_t* base = params.base.list(layer, batch, head);
      for (int64_t i = 0; i < len; ++i) out[i] = base[out[i]];
    }
    if (params.block_tables) {
      const int32_t* table = params.table(layer, batch);
      for (int64_t i = 0; i < len; ++i) out[i] = params.slot(table, out[i]);
    }
  }
}

}  // namespace kvevict
