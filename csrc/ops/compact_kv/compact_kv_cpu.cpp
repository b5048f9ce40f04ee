// SPDX-License-Identifier: Apache-2.0
#include "ops/compact_kv/compact_kv.h"

#include "core/cpu/move_rows.h"

namespace kvevict {
namespace {

// Kept indices ascend, so row i comes from a place at or behind i: copying in order never reads a
// row that was written before, and prefetching further rows is always safe.
template <RowStore row_store>
void compact_stream(const CompactKvParams& params, const KvStream& at) {
  const KvTensor& tensor = params.tensors[at.tensor];
  const int32_t* kept = params.kept.list(at.layer, at.batch, at.head);
  const int64_t len = params.kept.len(at.layer, at.batch, at.head);
  int64_t i = 0;
  while (i < len && kept[i] == i) ++i;  // rows that are in place already
  for (; i < len; ++i) {
    if (i + kPrefetchRows < len) {
      prefetch_row(tensor.row(at.batch, at.head, kept[i + kPrefetchRows]), tensor.row_bytes);
    }
    copy_row<row_store>(tensor.row(at.batch, at.head, i), tensor.row(at.batch, at.head, kept[i]),
                        tensor.row_bytes);
  }
}

}  // namespace

template <>
void CompactKv::run_cpu<kThisIsa>(const CompactKvParams& params, const CpuWork& work) noexcept {
  const bool large = kept_bytes(params.shape, params.tensors, params.kept.k) > kMaxCachedBytes;
  for (int64_t item = work.begin; item < work.end; ++item) {
    const KvStream at = params.shape.stream(item);
    const KvTensor& tensor = params.tensors[at.tensor];
    if (large &&
        can_stream(tensor.row(at.batch, at.head, 0), tensor.rows.stride_seq, tensor.row_bytes)) {
      compact_stream<RowStore::kStream>(params, at);
    } else {
      compact_stream<RowStore::kCached>(params, at);
    }
  }
  _mm_sfence();
}

}  // namespace kvevict
