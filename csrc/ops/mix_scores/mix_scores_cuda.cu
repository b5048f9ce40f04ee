// SPDX-License-Identifier: Apache-2.0
// A block takes a row, or a segment of a long one, whose summary is then put together from those of
// all segments. Rows are read twice; the second time they are in cache.
#include "core/arena.h"
#include "cuda/launch.h"
#include "cuda/reductions.h"
#include "ops/mix_scores/mix_scores.h"

namespace kvevict {
namespace {

// Tuning.
constexpr int kThreads = 512;
constexpr int kUnroll = 4;  // keys of a thread that are read at a time
constexpr int64_t kMaxWholeRow = 8 << 10;
constexpr int64_t kSegmentKeys = kThreads * kUnroll;

// What is known of some candidates of a row; count may be 0.
struct Summary {
  Candidates candidates;

  static __device__ __forceinline__ Summary none() { return {{0.0f, 0.0f, {}, {}}}; }
  static __device__ __forceinline__ Summary of(float score, float similarity, float value_norm) {
    return {{1.0f, score, {-similarity, -similarity, 0.0f}, {value_norm, value_norm, 0.0f}}};
  }

  __device__ __forceinline__ void merge(const Summary& summary) {
    Candidates& mine = candidates;
    const Candidates& other = summary.candidates;
    if (other.count == 0.0f) return;
    if (mine.count == 0.0f) {
      mine = other;
      return;
    }
    merge_spread(mine.dissimilarity, mine.count, other.dissimilarity, other.count);
    merge_spread(mine.value_norm, mine.count, other.value_norm, other.count);
    mine.score_sum += other.score_sum;
    mine.count += other.count;
  }

  // That of the lane `distance` behind.
  __device__ __forceinline__ Summary shuffled_down(int distance) const {
    const auto shuffled = [&](float x) { return __shfl_down_sync(kFullWarp, x, distance); };
    const auto shuffled_spread = [&](const Spread& spread) {
      return Spread{shuffled(spread.low), shuffled(spread.high), shuffled(spread.excess)};
    };
    return {{shuffled(candidates.count), shuffled(candidates.score_sum),
             shuffled_spread(candidates.dissimilarity), shuffled_spread(candidates.value_norm)}};
  }

 private:
  // No term of the new excess is negative, so that nothing cancels. A NaN stays in it.
  static __device__ __forceinline__ void merge_spread(Spread& mine, float my_count,
                                                      const Spread& other, float other_count) {
    const float low = fminf(mine.low, other.low);
    mine.excess = fmaf(my_count, mine.low - low, mine.excess) +
                  fmaf(other_count, other.low - low, other.excess);
    mine.low = low;
    mine.high = fmaxf(mine.high, other.high);
  }
};

struct MixShared {
  Summary warps[kThreads / kWarpSize];
};

// Puts together what all threads know, in a fixed order.
__device__ __forceinline__ Summary merge_block(Summary summary, MixShared& shared) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    summary.merge(summary.shuffled_down(distance));
  }
  if (lane_index() == 0) shared.warps[warp_index()] = summary;
  __syncthreads();
  summary = shared.warps[0];
#pragma unroll
  for (int warp = 1; warp < kThreads / kWarpSize; ++warp) summary.merge(shared.warps[warp]);
  return summary;
}

// The part of a row that a block takes.
struct Part {
  int64_t row, begin, end;
  const uint8_t* priority;  // of the row, or null

  __device__ Part(const MixScoresParams& params, int64_t num_segments)
      : row(blockIdx.x / num_segments),
        begin(num_segments == 1 ? 0 : blockIdx.x % num_segments * kSegmentKeys),
        end(num_segments == 1 ? params.kv_len : min(begin + kSegmentKeys, params.kv_len)),
        priority(params.priority_of(row)) {}

  // Calls f(place, candidate) for the keys of this thread; place is that in the whole tensor.
  template <typename F>
  __device__ __forceinline__ void visit(int64_t kv_len, const F& f) const {
#pragma unroll kUnroll
    for (int64_t key = begin + threadIdx.x; key < end; key += kThreads) {
      f(row * kv_len + key, !priority || __ldg(priority + key) == kOrdinary);
    }
  }
};

__device__ __forceinline__ Summary summarize(const MixScoresParams& params, const Part& part) {
  Summary summary = Summary::none();
  part.visit(params.kv_len, [&](int64_t place, bool candidate) {
    const float score = __ldg(params.scores + place);
    const float similarity = __ldg(params.similarity + place);
    const float value_norm = __ldg(params.value_norm + place);
    if (candidate) summary.merge(Summary::of(score, similarity, value_norm));
  });
  return summary;
}

// grid: num_segments per row. summaries: [batch_size, num_heads, num_segments]
__global__ void __launch_bounds__(kThreads)
    summarize_segments_kernel(const MixScoresParams params, int64_t num_segments,
                              Summary* summaries) {
  auto& shared = shared_memory<MixShared>();
  const Part part(params, num_segments);
  const Summary summary = merge_block(summarize(params, part), shared);
  if (threadIdx.x == 0) summaries[blockIdx.x] = summary;
}

// summaries are null where a block takes a whole row.
__global__ void __launch_bounds__(kThreads)
    mix_scores_kernel(const MixScoresParams params, int64_t num_segments,
                      const Summary* summaries) {
  auto& shared = shared_memory<MixShared>();
  const Part part(params, num_segments);
  Summary summary = Summary::none();
  if (num_segments == 1) {
    summary = summarize(params, part);
  } else {
    for (int64_t i = threadIdx.x; i < num_segments; i += kThreads) {
      summary.merge(summaries[part.row * num_segments + i]);
    }
  }
  summary = merge_block(summary, shared);
  const Mixture mixture(summary.candidates, params.redundancy[part.row], params.reference);
  part.visit(params.kv_len, [&](int64_t place, bool candidate) {
    const float score = __ldg(params.scores + place);
    params.mixed[place] = candidate ? mixture.of(score, __ldg(params.similarity + place),
                                                 __ldg(params.value_norm + place))
                                    : score;
  });
}

int64_t count_segments(const MixScoresParams& params) {
  return params.kv_len <= kMaxWholeRow ? 1 : (params.kv_len + kSegmentKeys - 1) / kSegmentKeys;
}

}  // namespace

int64_t MixScores::cuda_workspace_bytes(const MixScoresParams& params) {
  const int64_t num_segments = count_segments(params);
  if (num_segments == 1) return 0;
  return params.batch_size * params.num_heads * num_segments * int64_t{sizeof(Summary)};
}

int MixScores::launch_cuda(const MixScoresParams& params, void* workspace, void* stream) noexcept {
  const int64_t num_segments = count_segments(params);
  const int64_t num_blocks = params.batch_size * params.num_heads * num_segments;
  if (num_blocks == 0) return cudaSuccess;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  auto* summaries = static_cast<Summary*>(workspace);
  const LaunchShape shape{dim3(static_cast<unsigned>(num_blocks)), dim3(kThreads),
                          sizeof(MixShared)};
  if (num_segments > 1) {
    const cudaError_t error =
        launch(summarize_segments_kernel, shape, cuda_stream, params, num_segments, summaries);
    if (error != cudaSuccess) return error;
  }
  return launch(mix_scores_kernel, shape, cuda_stream, params, num_segments, summaries);
}

}  // namespace kvevict
