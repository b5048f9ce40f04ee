// SPDX-License-Identifier: Apache-2.0
#include "ops/gather_kv/gather_kv.h"

#include <algorithm>

#include "core/cpu/move_rows.h"

namespace kvevict {
namespace {

template <RowStore row_store>
void gather_stream(const GatherKvParams& params, const KvStream& at) {
  const KvTensor& source = params.sources[at.tensor];
  const KvTensor& destination = params.destinations[at.tensor];
  const int32_t* kept = params.kept.list(at.layer, at.batch, at.head);
  const int64_t len = params.kept.len(at.layer, at.batch, at.head);
  for (int64_t i = 0; i < len; ++i) {
    if (i + kPrefetchRows < len) {
      prefetch_row(source.row(at.batch, at.head, kept[i + kPrefetchRows]), source.row_bytes);
    }
    copy_row<row_store>(destination.row(at.batch, at.head, i),
                        source.row(at.batch, at.head, kept[i]), source.row_bytes);
  }
  for (int64_t i = len; i < params.kept.k; ++i) {
    char* row = destination.row(at.batch, at.head, i);
    std::fill(row, row + destination.row_bytes, char{0});
  }
}

}  // namespace

template <>
void GatherKv::run_cpu<kThisIsa>(const GatherKvParams& params, const CpuWork& work) noexcept {
  const bool large = kept_bytes(params.shape, params.destinations, params.kept.k) > kMaxCachedBytes;
  for (int64_t item = work.begin; item < work.end; ++item) {
    const KvStream at = params.shape.stream(item);
    const KvTensor& destination = params.destinations[at.tensor];
    if (large && can_stream(destination.row(at.batch, at.head, 0), destination.rows.stride_seq,
                            destination.row_bytes)) {
      gather_stream<RowStore::kStream>(params, at);
    } else {
      gather_stream<RowStore::kCached>(params, at);
    }
  }
  _mm_sfence();
}

}  // namespace kvevict
