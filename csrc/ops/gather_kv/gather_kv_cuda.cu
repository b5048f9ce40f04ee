// SPDX-License-Identifier: Apache-2.0
#include "cuda/move_rows.h"
#include "ops/gather_kv/gather_kv.h"

namespace kvevict {

int GatherKv::launch_cuda(const GatherKvParams& params, void* /*workspace*/,
                          void* stream) noexcept {
  return launch_move_rows</*kInPlace=*/false>(params.shape, params.sources, params.destinations,
                                              params.kept, static_cast<cudaStream_t>(stream));
}

}  // namespace kvevict
