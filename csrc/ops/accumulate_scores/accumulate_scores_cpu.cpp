// SPDX-License-Identifier: Apache-2.0
#include "ops/accumulate_scores/accumulate_scores.h"

#include <algorithm>

#include "core/cpu/simd.h"

namespace kvevict {
namespace {

// decay * old + added with both operations rounded, as torch's mul_ and add_ do it: the compiler,
// which may contract a product and a sum, does not see through the assembler.
template <typename T>
T accumulate(T decay, T old, T added) {
  T decayed = decay * old;
  asm("" : "+x"(decayed));
  return decayed + added;
}

}  // namespace

template <>
void AccumulateScores::run_cpu<kThisIsa>(const AccumulateScoresParams& params,
                                         const CpuWork& work) noexcept {
  const Vec decay = broadcast(params.decay);
  for (int64_t item = work.begin; item < work.end; ++item) {
    const int64_t row = item / blocks_per_row(params);
    const int64_t batch = row / params.num_heads, head = row % params.num_heads;
    const float* added = params.new_scores + row * params.kv_len;
    float* scores = params.scores + batch * params.stride_batch + head * params.stride_head;
    int64_t key = item % blocks_per_row(params) * kCpuBlock;
    const int64_t end = std::min(key + kCpuBlock, params.kv_len);
    for (; key + kLanes <= end; key += kLanes) {
      store(scores + key, accumulate(decay, load<Vec>(scores + key), load<Vec>(added + key)));
    }
    for (; key < end; ++key) scores[key] = accumulate(params.decay, scores[key], added[key]);
  }
}

}  // namespace kvevict
