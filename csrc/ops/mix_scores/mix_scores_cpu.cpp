// SPDX-License-Identifier: Apache-2.0
#include "ops/mix_scores/mix_scores.h"

#include <algorithm>
#include <limits>

#include "core/cpu/simd.h"

namespace kvevict {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// kLanes keys of a row. Lanes behind its end hold zeros and are no candidates.
struct KeyLanes {
  Vec score, similarity, value_norm;
  IntVec candidate;
};

// The extremes of some values, lane by lane.
struct VecSpread {
  Vec low = broadcast(kInfinity), high = broadcast(-kInfinity);

  void widen(Vec values, IntVec counted) {
    low = counted & (values < low) ? values : low;
    high = counted & (values > high) ? values : high;
  }
  Spread reduced() const { return {-reduce_max(-low), reduce_max(high), 0.0f}; }
};

class MixRow {
 public:
  MixRow(const MixScoresParams& params, int64_t row)
      : scores_(params.scores + row * params.kv_len),
        similarity_(params.similarity + row * params.kv_len),
        value_norm_(params.value_norm + row * params.kv_len),
        priority_(params.priority_of(row)),
        kv_len_(params.kv_len) {}

  // Calls f(key, lanes) for the keys from begin to end, kLanes at a time.
  template <typename F>
  void visit(int64_t begin, int64_t end, F&& f) const {
    for (int64_t key = begin; key < end; key += kLanes) f(key, load_lanes(key));
  }

  // What Mixture needs to know. A NaN shows in the sums.
  Candidates summarize() const {
    Vec count = {};
    VecSpread dissimilarity, value_norm;
    visit(0, kv_len_, [&](int64_t, const KeyLanes& lanes) {
      count += lanes.candidate ? broadcast(1.0f) : Vec{};
      dissimilarity.widen(-lanes.similarity, lanes.candidate);
      value_norm.widen(lanes.value_norm, lanes.candidate);
    });
    Candidates result{reduce_add(count), 0.0f, dissimilarity.reduced(), value_norm.reduced()};

    // Sums of parts stay small enough for float32.
    constexpr int64_t kPart = 4096;
    double score_sum = 0.0, dissimilarity_excess = 0.0, value_norm_excess = 0.0;
    for (int64_t begin = 0; begin < kv_len_; begin += kPart) {
      Vec sums[3] = {};
      visit(begin, std::min(begin + kPart, kv_len_), [&](int64_t, const KeyLanes& lanes) {
        const Vec terms[] = {lanes.score, -lanes.similarity - result.dissimilarity.low,
                             lanes.value_norm - result.value_norm.low};
        for (int i = 0; i < 3; ++i) sums[i] += lanes.candidate ? terms[i] : Vec{};
      });
      score_sum += reduce_add(sums[0]);
      dissimilarity_excess += reduce_add(sums[1]);
      value_norm_excess += reduce_add(sums[2]);
    }
    result.score_sum = static_cast<float>(score_sum);
    result.dissimilarity.excess = static_cast<float>(dissimilarity_excess);
    result.value_norm.excess = static_cast<float>(value_norm_excess);
    return result;
  }

 private:
  KeyLanes load_lanes(int64_t key) const {
    const int64_t count = kv_len_ - key;
    KeyLanes lanes{load_up_to<Vec>(scores_ + key, count), load_up_to<Vec>(similarity_ + key, count),
                   load_up_to<Vec>(value_norm_ + key, count), first_lanes(count)};
    if (priority_) {
      const auto classes = load_up_to<Bytes>(priority_ + key, count);
      lanes.candidate &= __builtin_convertvector(classes, IntVec) == int32_t{kOrdinary};
    }
    return lanes;
  }

  const float *scores_, *similarity_, *value_norm_;
  const uint8_t* priority_;  // or null
  int64_t kv_len_;
};

void mix_row(const MixScoresParams& params, int64_t row) {
  const MixRow keys(params, row);
  float* mixed = params.mixed + row * params.kv_len;
  const Mixture mixture(keys.summarize(), params.redundancy[row], params.reference);
  keys.visit(0, params.kv_len, [&](int64_t key, const KeyLanes& lanes) {
    const Vec of_all = mixture.of(lanes.score, lanes.similarity, lanes.value_norm);
    store_up_to(mixed + key, params.kv_len - key, lanes.candidate ? of_all : lanes.score);
  });
}

}  // namespace

template <>
void MixScores::run_cpu<kThisIsa>(const MixScoresParams& params, const CpuWork& work) noexcept {
  for (int64_t row = work.begin; row < work.end; ++row) mix_row(params, row);
}

}  // namespace kvevict
