// SPDX-License-Identifier: Apache-2.0
#include "ops/attention_lse/attention_lse.h"

#include <cmath>

#include "core/cpu/attention_rows.h"

namespace kvevict {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// reference + log2(normalizer) as a natural log; -inf if the row saw no key.
float natural_lse(float reference, float normalizer) {
  constexpr double kLn2 = 0.69314718055994530942;
  if (normalizer == 0.0f) return kMinusInfinity;
  return static_cast<float>((double{reference} + std::log2(double{normalizer})) * kLn2);
}

template <DType dtype>
void run(const AttentionLseParams& params, const CpuWork& work) {
  const AttentionParams& attention = params.attention;
  Arena arena(work.scratch);
  RowBlock block = RowBlock::carve(arena, attention, /*with_exponentials=*/false);
  const VotingRows all_rows{nullptr, nullptr, false, nullptr, attention.qo_len};

  for (int64_t item = work.begin; item < work.end; ++item) {
    const int64_t batch = item / attention.num_qo_heads;
    const int64_t head = item % attention.num_qo_heads;
    float* lse = params.lse + item * attention.qo_len;
    for (int64_t row = 0; row < attention.qo_len; ++row) lse[row] = kMinusInfinity;
    if (attention.kv_len == 0) continue;
    for (int64_t row = 0; row < attention.qo_len;) {
      for (; row < attention.qo_len && block.num_rows < block.capacity; ++row) {
        append_row(attention, all_rows, batch, head, row, block);
      }
      if (block.num_rows == 0) break;
      attend<dtype, false>(attention, batch, head / attention.group_size(), nullptr, block);
      for (int64_t i = 0; i < block.num_rows; ++i) {
        lse[block.rows[i].row] = natural_lse(block.reference[i], block.normalizer[i]);
      }
      block.num_rows = 0;
    }
  }
}

}  // namespace

template <>
void AttentionLse::run_cpu<kThisIsa>(const AttentionLseParams& params,
                                     const CpuWork& work) noexcept {
  dispatch_dtype(params.attention.dtype, [&](auto dtype) { run<dtype.value>(params, work); });
}

}  // namespace kvevict
