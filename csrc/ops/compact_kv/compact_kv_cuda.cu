// SPDX-License-Identifier: Apache-2.0
#include "cuda/move_rows.h"
#include "ops/compact_kv/compact_kv.h"

namespace kvevict {

int CompactKv::launch_cuda(const CompactKvParams& params, void* /*workspace*/,
                           void* stream) noexcept {
  return launch_move_rows</*kInPlace=*/true>(params.shape, params.tensors, nullptr, params.kept,
                                             static_cast<cudaStream_t>(stream));
}

}  // namespace kvevict
