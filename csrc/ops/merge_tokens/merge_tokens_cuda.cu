// SPDX-License-Identifier: Apache-2.0
// The pairs of a list are sorted by target, a block per list; then a target and its sources stand
// together, in the order of source_index, and are added up by a few threads in that order.
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/reductions.h"
#include "cuda/vector_loads.h"
#include "ops/merge_tokens/merge_tokens.h"

namespace kvevict {
namespace {

// --- Tuning and limits ---------------------------------------------------------------------------

constexpr int kSortThreads = 512;
constexpr int kSortWarps = kSortThreads / kWarpSize;
constexpr int kDigitBits = 8;
constexpr int kBuckets = 1 << kDigitBits;
constexpr int kMergeThreads = 128;
constexpr int kThreadsPerRun = 16;
constexpr int kColumnsPerThread = 8;
constexpr int kColumnsPerRun = kThreadsPerRun * kColumnsPerThread;
constexpr int kMaxMergedTensors = 64;  // per launch: parameters stay under 4 KiB

struct MergeParams {
  MergeTokensParams op;
  MergePair* pairs;   // [num_lists][num_sources], sorted
  MergePair* buffer;  // like pairs
  int num_digits;
};

// --- Sorting -------------------------------------------------------------------------------------

struct SortShared {
  uint32_t counts[kBuckets][kSortWarps];
  uint32_t warp_sums[kSortWarps];
};

// A stable radix sort by target, from the lowest digit: every warp counts the digits of a stretch
// of the pairs, and puts them where those of the warps before it end.
__global__ void __launch_bounds__(kSortThreads) sort_pairs_kernel(const MergeParams params) {
  auto& shared = shared_memory<SortShared>();
  const int64_t list = blockIdx.x, num_pairs = params.op.num_sources();
  const int64_t stretch = (num_pairs + kSortThreads - 1) / kSortThreads * kWarpSize;
  const int64_t begin = min(warp_index() * stretch, num_pairs);
  const int64_t end = min(begin + stretch, num_pairs);
  const int warp = warp_index(), lane = lane_index();

  // The last digit's pairs come to params.pairs.
  MergePair* from = (params.num_digits % 2 ? params.buffer : params.pairs) + list * num_pairs;
  MergePair* to = (params.num_digits % 2 ? params.pairs : params.buffer) + list * num_pairs;
  for (int digit = 0; digit < params.num_digits; ++digit) {
    // Calls f(pair, bucket, peers) for the stretch, 32 pairs at a time; peers are the lanes with
    // the same bucket, there are none where there is no pair.
    const auto visit = [&](const auto& f) {
      for (int64_t first = begin; first < end; first += kWarpSize) {
        const int64_t place = first + lane;
        MergePair pair{};
        if (place < end) pair = digit == 0 ? params.op.pair(list, place) : from[place];
        const uint32_t bucket = place < end ? pair.target >> digit * kDigitBits & (kBuckets - 1)
                                            : static_cast<uint32_t>(kBuckets);
        const unsigned peers = __match_any_sync(kFullWarp, bucket);
        if (place < end) f(pair, bucket, peers);
        __syncwarp();  // the next 32 may have the same buckets
      }
    };
    for (int i = threadIdx.x; i < kBuckets * kSortWarps; i += kSortThreads) {
      shared.counts[i / kSortWarps][i % kSortWarps] = 0;
    }
    __syncthreads();
    visit([&](const MergePair&, uint32_t bucket, unsigned peers) {
      if (lane == __ffs(peers) - 1) shared.counts[bucket][warp] += __popc(peers);
    });
    __syncthreads();

    constexpr int kPerThread = kBuckets * kSortWarps / kSortThreads;
    static_assert(kSortWarps % kPerThread == 0);
    uint32_t* counts =
        &shared
             .counts[threadIdx.x * kPerThread / kSortWarps][threadIdx.x * kPerThread % kSortWarps];
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) sum += counts[i];
    uint32_t before = block_exclusive_sum<kSortThreads>(sum, shared.warp_sums);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const uint32_t count = counts[i];
      counts[i] = before;
      before += count;
    }
    __syncthreads();
    visit([&](const MergePair& pair, uint32_t bucket, unsigned peers) {
      const uint32_t first = shared.counts[bucket][warp];
      to[first + __popc(peers & lanes_before())] = pair;
      __syncwarp(peers);
      if (lane == __ffs(peers) - 1) shared.counts[bucket][warp] = first + __popc(peers);
    });
    __syncthreads();
    MergePair* const sorted = to;
    to = from;
    from = sorted;
  }
}

// --- Merging -------------------------------------------------------------------------------------

struct MergeTensors {
  struct Tensor {
    MergedTensor tensor;
    bool aligned;
  };
  Tensor data[kMaxMergedTensors];
};
static_assert(sizeof(MergeParams) + sizeof(MergeTensors) <= 4096);

template <DType dtype>
__device__ __forceinline__ void store_eight(char* destination, bool aligned,
                                            const float (&elements)[8]) {
  if (aligned) {
    constexpr int kVectors = EightElements<dtype>::kVectors;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      pack<dtype>(elements + i * (8 / kVectors), reinterpret_cast<uint4*>(destination)[i]);
    }
    return;
  }
  using Element = std::conditional_t<dtype == DType::kFloat32, uint32_t, uint16_t>;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    pack<dtype>(elements + i, reinterpret_cast<Element*>(destination)[i]);
  }
}

// Merges the pairs [begin, end), all of one target, in eight columns.
template <DType dtype>
__device__ __forceinline__ void merge_columns(const MergePair* begin, const MergePair* end,
                                              const float* weights, const MergeScale& scale,
                                              char* columns, int64_t row_bytes, bool aligned) {
  const auto add = [&](float (&sums)[8], int32_t token) {
    EightElements<dtype> row;
    row.read(columns + token * row_bytes, 0, 8 * kElementBytes<dtype>, aligned);
    float elements[8];
    row.to_floats(elements);
    const float weight = scale.plain ? 1.0f : weights[token];
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i] = fmaf(elements[i], weight, sums[i]);
  };
  float sums[8] = {};
  const int32_t target = begin->target;
  add(sums, target);
#pragma unroll 4
  for (const MergePair* pair = begin; pair < end; ++pair) add(sums, pair->source);
#pragma unroll
  for (int i = 0; i < 8; ++i) sums[i] /= scale.divisor;
  store_eight<dtype>(columns + target * row_bytes, aligned, sums);
}

// grid: (pairs of all heads, 16 threads each; column chunks; tensors). The threads of the first
// pair of a target work, those of the others have nothing to do.
__global__ void __launch_bounds__(kMergeThreads)
    merge_rows_kernel(const MergeParams params, const __grid_constant__ MergeTensors tensors) {
  const MergeTokensParams& op = params.op;
  const int64_t num_pairs = op.num_sources();
  const int64_t item = (int64_t{blockIdx.x} * kMergeThreads + threadIdx.x) / kThreadsPerRun;
  const auto& [tensor, aligned] = tensors.data[blockIdx.z];
  const int64_t column =
      int64_t{blockIdx.y} * kColumnsPerRun + threadIdx.x % kThreadsPerRun * kColumnsPerThread;
  if (item >= op.batch_size * op.num_heads * num_pairs || column >= tensor.dim) return;
  const int64_t place = item % num_pairs, stream = item / num_pairs;
  const int64_t head = stream % op.num_heads, batch = stream / op.num_heads;
  const MergePair* pairs = params.pairs + op.list_of(batch, head) * num_pairs;
  const int32_t target = pairs[place].target;
  if (target >= op.num_tokens || (place > 0 && pairs[place - 1].target == target)) return;

  const float* weights = op.weights(batch, head);
  float sum = weights[target];
  int64_t end = place;
  for (; end < num_pairs && pairs[end].target == target; ++end) sum += weights[pairs[end].source];
  const MergeScale scale = MergeScale::of(op.normalize, sum, end - place + 1);

  const int element_bytes = tensor.dtype == DType::kFloat32 ? 4 : 2;
  char* columns = static_cast<char*>(tensor.rows.data) +
                  (tensor.rows.offset(batch, head, 0) + column) * element_bytes;
  const int64_t row_bytes = tensor.rows.stride_seq * element_bytes;
  const MergePair *begin = pairs + place, *behind = pairs + end;
  switch (tensor.dtype) {
    case DType::kFloat32:
      return merge_columns<DType::kFloat32>(begin, behind, weights, scale, columns, row_bytes,
                                            aligned);
    case DType::kFloat16:
      return merge_columns<DType::kFloat16>(begin, behind, weights, scale, columns, row_bytes,
                                            aligned);
    case DType::kBFloat16:
      return merge_columns<DType::kBFloat16>(begin, behind, weights, scale, columns, row_bytes,
                                             aligned);
  }
}

// --- Launches ------------------------------------------------------------------------------------

MergeParams carve(Arena& arena, const MergeTokensParams& op) {
  const int64_t num_pairs = op.num_lists() * op.num_sources();
  int num_digits = 1;  // of positions, and of num_tokens itself
  while (op.num_tokens >> num_digits * kDigitBits) ++num_digits;
  return {op, arena.take<MergePair>(num_pairs), arena.take<MergePair>(num_pairs), num_digits};
}

}  // namespace

int64_t MergeTokens::cuda_workspace_bytes(const MergeTokensParams& params) {
  Arena arena;
  carve(arena, params);
  return arena.bytes();
}

int MergeTokens::launch_cuda(const MergeTokensParams& op, void* workspace, void* stream) noexcept {
  const int64_t num_items = op.batch_size * op.num_heads * op.num_sources();
  if (num_items == 0) return cudaSuccess;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  Arena arena(static_cast<std::byte*>(workspace));
  const MergeParams params = carve(arena, op);
  const dim3 lists(static_cast<unsigned>(op.num_lists()));
  cudaError_t error = launch(sort_pairs_kernel, {lists, dim3(kSortThreads), sizeof(SortShared)},
                             cuda_stream, params);

  constexpr int64_t kRunsPerBlock = kMergeThreads / kThreadsPerRun;
  for (int64_t first = 0; first < op.num_tensors; first += kMaxMergedTensors) {
    if (error != cudaSuccess) return error;
    const int64_t count = std::min<int64_t>(op.num_tensors - first, kMaxMergedTensors);
    MergeTensors tensors{};
    int64_t widest = 0;
    for (int64_t i = 0; i < count; ++i) {
      const MergedTensor& tensor = op.tensors[first + i];
      const HeadTensor rows{tensor.rows.data, tensor.rows.stride_batch, tensor.rows.stride_head,
                            tensor.rows.stride_seq};
      tensors.data[i] = {tensor, rows_aligned(rows, tensor.dtype == DType::kFloat32 ? 4 : 2)};
      widest = std::max(widest, tensor.dim);
    }
    const dim3 grid(static_cast<unsigned>((num_items + kRunsPerBlock - 1) / kRunsPerBlock),
                    static_cast<unsigned>((widest + kColumnsPerRun - 1) / kColumnsPerRun),
                    static_cast<unsigned>(count));
    error = launch(merge_rows_kernel, {grid, dim3(kMergeThreads)}, cuda_stream, params, tensors);
  }
  return error;
}

}  // namespace kvevict
