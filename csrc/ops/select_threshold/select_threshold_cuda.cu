// SPDX-License-Identifier: Apache-2.0
// Two sweeps, a warp per segment of a row: the totals of all segments, then every key's rank, by
// which select_topk's kernels choose the kept keys: evicted are the last ones.
#include <cmath>

#include "core/arena.h"
#include "cuda/launch.h"
#include "cuda/reductions.h"
#include "ops/select_threshold/select_threshold.h"
#include "ops/select_topk/select_topk.h"

namespace kvevict {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kWords = kSegmentKeys / kWarpSize;  // of a segment: 32 keys, one per lane
constexpr int kWordsInFlight = 8;
static_assert(kSumLanes == kWarpSize);

struct SegmentTotal {
  float sum;
  uint32_t num_candidates;
};

struct ThresholdWorkspace {
  SegmentTotal* totals;     // [num_rows, num_segments]
  uint32_t* num_evictable;  // [num_rows]
  int32_t* row_k;           // [num_rows], how many are kept
  float* ranks;  // [num_rows, kv_len]: inf of a key that is kept, NaN of padding, else its sum
  std::byte* selection;  // of select_topk
  int64_t bytes;

  ThresholdWorkspace(const SelectThresholdParams& params, int64_t selection_bytes, void* base) {
    Arena arena(static_cast<std::byte*>(base));
    totals = arena.take<SegmentTotal>(params.num_rows() * params.num_segments());
    num_evictable = arena.take<uint32_t>(params.num_rows());
    row_k = arena.take<int32_t>(params.num_rows());
    ranks = arena.take<float>(params.num_rows() * params.kv_len);
    selection = arena.take<std::byte>(selection_bytes);
    bytes = arena.bytes();
  }
};

// The segment of a warp.
struct SegmentPlace {
  int64_t row;
  uint32_t segment;
  bool valid;

  __device__ explicit SegmentPlace(const SelectThresholdParams& params) {
    const int64_t warp = int64_t{blockIdx.x} * kWarps + warp_index();
    row = warp / params.num_segments();
    segment = static_cast<uint32_t>(warp % params.num_segments());
    valid = row < params.num_rows();
  }
};

// What the lane's key of a word is.
struct KeyOfWord {
  int64_t index;  // in the row
  bool real, candidate;

  __device__ __forceinline__ KeyOfWord(const SelectThresholdParams& params,
                                       const SegmentPlace& place, int word)
      : index(place.segment * kSegmentKeys + word * kWarpSize + lane_index()) {
    const int64_t first = place.row / params.num_heads * params.kv_len;
    real = index < params.kv_len && (!params.key_mask || params.key_mask[first + index]);
    candidate = real && params.candidates[first + index];
  }
};

// The sum of all lanes, in every lane.
__device__ __forceinline__ float add_lanes(float sum) {
#pragma unroll
  for (int distance = kSumLanes / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(kFullWarp, sum, distance);
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads)
    sum_candidates_kernel(const SelectThresholdParams params, const ThresholdWorkspace workspace) {
  const SegmentPlace place(params);
  if (!place.valid) return;
  const float* sums = params.sums + place.row * params.kv_len;
  float sum = 0.0f;
  uint32_t num_candidates = 0;
#pragma unroll kWordsInFlight
  for (int word = 0; word < kWords; ++word) {
    const KeyOfWord key(params, place, word);
    sum += key.candidate ? __ldg(sums + key.index) : 0.0f;
    num_candidates += __popc(__ballot_sync(kFullWarp, key.candidate));
  }
  sum = add_lanes(sum);
  if (lane_index() == 0) {
    workspace.totals[place.row * params.num_segments() + place.segment] = {sum, num_candidates};
    if (place.segment == 0) {
      workspace.num_evictable[place.row] = 0;
      workspace.row_k[place.row] = 0;
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    rank_keys_kernel(const SelectThresholdParams params, const ThresholdWorkspace workspace) {
  const SegmentPlace place(params);
  if (!place.valid) return;
  const SegmentTotal* totals = workspace.totals + place.row * params.num_segments();
  float sum = 0.0f;
  uint32_t num_candidates = 0;
  for (int64_t i = lane_index(); i < params.num_segments(); i += kWarpSize) {
    sum += totals[i].sum;
    num_candidates += totals[i].num_candidates;
  }
  const float threshold =
      params.threshold(add_lanes(sum), __reduce_add_sync(kFullWarp, num_candidates));

  const int64_t row = place.row * params.kv_len;
  uint32_t num_real = 0, num_evictable = 0;
#pragma unroll kWordsInFlight
  for (int word = 0; word < kWords; ++word) {
    const KeyOfWord key(params, place, word);
    const float key_sum = key.candidate ? __ldg(params.sums + row + key.index) : 0.0f;
    const float maximum = key.candidate ? __ldg(params.maxima + row + key.index) : 0.0f;
    const bool evictable = key.candidate && key_sum < threshold && maximum < params.alpha;
    if (key.index < params.kv_len) {
      workspace.ranks[row + key.index] = evictable ? key_sum : key.real ? INFINITY : NAN;
    }
    num_real += __popc(__ballot_sync(kFullWarp, key.real));
    num_evictable += __popc(__ballot_sync(kFullWarp, evictable));
  }
  if (lane_index() != 0) return;
  // However the segments of a row take turns, what they evict adds up to as many as may be evicted.
  const uint32_t limit = static_cast<uint32_t>(min(params.max_evicted, params.kv_len));
  const uint32_t before = atomicAdd(&workspace.num_evictable[place.row], num_evictable);
  const uint32_t num_evicted = min(before + num_evictable, limit) - min(before, limit);
  atomicAdd(&workspace.row_k[place.row], static_cast<int32_t>(num_real - num_evicted));
}

// The selection of the kept keys by their ranks.
SelectTopkParams selection(const SelectThresholdParams& params,
                           const ThresholdWorkspace& workspace) {
  return {workspace.ranks,
          nullptr,
          false,
          workspace.row_k,
          params.kept_indices,
          params.kept_lens,
          params.batch_size,
          params.num_heads,
          params.kv_len,
          params.kv_len};
}

ThresholdWorkspace workspace_of(const SelectThresholdParams& params, void* base) {
  const ThresholdWorkspace without_selection(params, 0, nullptr);
  const int64_t bytes = SelectTopk::cuda_workspace_bytes(selection(params, without_selection));
  return {params, bytes, base};
}

}  // namespace

int64_t SelectThreshold::cuda_workspace_bytes(const SelectThresholdParams& params) {
  return workspace_of(params, nullptr).bytes;
}

int SelectThreshold::launch_cuda(const SelectThresholdParams& params, void* workspace,
                                 void* stream) noexcept {
  const ThresholdWorkspace buffers = workspace_of(params, workspace);
  const int64_t num_warps = params.num_rows() * params.num_segments();
  if (num_warps > 0) {
    const LaunchShape shape{dim3(static_cast<unsigned>((num_warps + kWarps - 1) / kWarps)),
                            dim3(kThreads)};
    for (auto* kernel : {sum_candidates_kernel, rank_keys_kernel}) {
      const cudaError_t error =
          launch(kernel, shape, static_cast<cudaStream_t>(stream), params, buffers);
      if (error != cudaSuccess) return error;
    }
  }
  return SelectTopk::launch_cuda(selection(params, buffers), buffers.selection, stream);
}

}  // namespace kvevict
