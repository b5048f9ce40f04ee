// SPDX-License-Identifier: Apache-2.0
#include "ops/select_topk/select_topk.h"

#include <algorithm>

#include "core/cpu/select_keys.h"

namespace kvevict {
namespace {

// Writes the order keys of a row, with the priorities that decide by themselves turned into keys
// that beat or lose to every score. Lowers `need` to the number of keys that may be kept.
void make_keys(const float* scores, const uint8_t* priority, int64_t kv_len, int64_t& need,
               uint32_t* keys) {
  for (int64_t i = 0; i < kv_len; ++i) keys[i] = order_key(scores[i]);
  if (!priority) {
    need = std::min(need, kv_len);
    return;
  }
  int64_t count[256] = {};
  for (int64_t i = 0; i < kv_len; ++i) ++count[priority[i]];
  need = std::min(need, kv_len - count[0]);
  // The class in which the last kept key is found: all higher ones fit.
  int64_t above = 0;
  int decisive = 255;
  while (decisive > 1 && above + count[decisive] < need) above += count[decisive--];
  const auto decisive_class = static_cast<uint8_t>(decisive);
  for (int64_t i = 0; i < kv_len; ++i) {
    const uint32_t by_class = priority[i] > decisive_class ? kKeyAlways : kKeyNever;
    keys[i] = priority[i] == decisive_class ? keys[i] : by_class;
  }
}

}  // namespace

template <>
void SelectTopk::run_cpu<kThisIsa>(const SelectTopkParams& params, const CpuWork& work) noexcept {
  Arena arena(work.scratch);
  const SelectScratch scratch = SelectScratch::carve(arena, params.kv_len);
  for (int64_t row = work.begin; row < work.end; ++row) {
    int64_t need = params.row_k ? params.row_k[row] : params.k;
    make_keys(params.scores + row * params.kv_len, params.priority_of(row), params.kv_len, need,
              scratch.keys);
    int32_t* kept = params.kept_indices + row * params.k;
    params.kept_lens[row] = static_cast<int32_t>(need);
    int64_t ties = need;
    const uint32_t threshold = find_threshold(scratch, params.kv_len, ties);
    write_kept(scratch, params.kv_len, threshold, ties, need, kept, params.k);
  }
}

}  // namespace kvevict
