// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "core/cpu/isa.h"
#include "core/priority.h"

namespace kvevict {

// Which mean the diversity is scaled to.
enum class DiversityReference : int8_t { kAttention, kImportance };

struct MixScoresParams {
  const float* scores;      // [batch_size, num_heads, kv_len]
  const float* similarity;  // [batch_size, num_heads, kv_len]
  const float* value_norm;  // [batch_size, num_heads, kv_len]
  const float* redundancy;  // [batch_size, num_heads]
  const uint8_t* priority;  // [batch_size, 1 | num_heads, kv_len], or null: all are candidates
  bool priority_per_head;
  DiversityReference reference;
  float* mixed;  // [batch_size, num_heads, kv_len]
  int64_t batch_size, num_heads, kv_len;

  KVEVICT_HD const uint8_t* priority_of(int64_t row) const {
    return priority_row(priority, priority_per_head, row, num_heads, kv_len);
  }
};

// The spread of some values: what it takes to bring them to [0, 1] and to know their mean there.
struct Spread {
  float low, high;
  float excess;  // sum of value - low
};

// What is known of the candidates of a row, of which there is at least one.
struct Candidates {
  float count;
  float score_sum;
  Spread dissimilarity;  // of -similarity
  Spread value_norm;
};

// How the candidates of a row are mixed.
class Mixture {
 public:
  KVEVICT_HD Mixture(const Candidates& candidates, float redundancy, DiversityReference reference)
      : redundancy_(redundancy) {
    const float mean_score = candidates.score_sum / candidates.count;
    value_ = Scaling(candidates.value_norm, candidates.count, mean_score);
    const bool to_attention = reference == DiversityReference::kAttention;
    diversity_ = Scaling(candidates.dissimilarity, candidates.count,
                         to_attention ? mean_score : mean_score + value_.mean);
  }

  // For floats, or for vectors of them.
  template <typename T>
  KVEVICT_HD T of(T score, T similarity, T value_norm) const {
    const T importance = score + value_.of(value_norm);
    return diversity_.of(-similarity) * redundancy_ + importance * (1.0f - redundancy_);
  }

 private:
  // Brings values to [0, 1], then to a wanted mean.
  struct Scaling {
    float low, to_unit, to_mean;
    float mean;  // what it has become

    Scaling() = default;
    KVEVICT_HD Scaling(const Spread& spread, float count, float wanted_mean)
        : low(spread.low), to_unit(1.0f / (spread.high - spread.low + kTiny)) {
      const float unit_mean = spread.excess / count * to_unit;
      to_mean = wanted_mean / (unit_mean + kTiny);
      mean = unit_mean * to_mean;
    }
    template <typename T>
    KVEVICT_HD T of(T value) const {
      return (value - low) * to_unit * to_mean;
    }
  };
  static constexpr float kTiny = 1e-8f;

  float redundancy_;
  Scaling value_, diversity_;
};

struct MixScores {
  static CpuPlan plan_cpu(const MixScoresParams& params, int /*num_threads*/) {
    constexpr int64_t kKeysPerThread = 1 << 14;
    return {1,
            {params.batch_size * params.num_heads},
            0,
            0,
            std::max<int64_t>(kKeysPerThread / std::max<int64_t>(params.kv_len, 1), 1)};
  }
  template <Isa isa>
  static void run_cpu(const MixScoresParams& params, const CpuWork& work) noexcept;

  static int64_t cuda_workspace_bytes(const MixScoresParams& params);
  static int launch_cuda(const MixScoresParams& params, void* workspace, void* stream) noexcept;
};

}  // namespace kvevict
