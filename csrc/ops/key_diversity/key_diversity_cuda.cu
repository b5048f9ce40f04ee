// SPDX-License-Identifier: Apache-2.0
// Two kernels: unit keys are summed up by chunks, then every block adds the sums of its head's
// chunks, always in the same order, and takes products with the mean. Heads go through both in
// groups whose keys the second kernel still finds in the L2.
#include <algorithm>

#include "core/arena.h"
#include "core/dispatch.h"
#include "cuda/launch.h"
#include "cuda/reductions.h"
#include "cuda/vector_loads.h"
#include "ops/key_diversity/key_diversity.h"

namespace kvevict {
namespace {

// Tuning.
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBlocksPerSm = 3;  // that registers are for; without it ptxas spills to fit more
constexpr int kUnroll = 4;       // keys of a thread that are read at a time
constexpr int64_t kMinChunkKeys = 128;
constexpr int64_t kMaxChunks = 128;  // few, since every block of the second kernel reads their sums
constexpr int kElements = 8;         // of a key, per lane

// kLanes lanes share a key: the head_dim that they have room for, and the keys side by side in a
// block.
template <int kLanes>
inline constexpr int kHeadDim = kLanes * kElements;
template <int kLanes>
inline constexpr int kKeys = kThreads / kLanes;

struct Chunks {
  int64_t num_chunks, chunk_keys;
  float* sums;    // [batch_size, num_kv_heads, num_chunks, head_dim]
  int32_t* lens;  // [batch_size, num_kv_heads, num_chunks], real keys
  int64_t bytes;

  // The same for any batch.
  Chunks(const KeyDiversityParams& params, void* workspace) {
    const int64_t least = (params.kv_len + kMaxChunks - 1) / kMaxChunks;
    chunk_keys = std::max(least, kMinChunkKeys);
    num_chunks = std::max<int64_t>((params.kv_len + chunk_keys - 1) / chunk_keys, 1);
    Arena arena(static_cast<std::byte*>(workspace));
    sums = arena.take<float>(params.num_heads() * num_chunks * params.head_dim);
    lens = arena.take<int32_t>(params.num_heads() * num_chunks);
    bytes = arena.bytes();
  }
};

// The keys of a block, shared out to its threads.
template <DType dtype, int kLanes>
struct KeyPlace {
  const KeyDiversityParams& params;
  bool aligned;
  int64_t head, chunk;  // of all heads; of the head
  int64_t begin, end;   // of the chunk
  const char* rows;     // of this thread's elements
  const bool* mask;     // of the sequence, or null
  bool has_elements;    // whether head_dim reaches to this lane

  __device__ KeyPlace(const KeyDiversityParams& params, const Chunks& chunks, int64_t first_head,
                      bool aligned)
      : params(params),
        aligned(aligned),
        head(first_head + blockIdx.x / chunks.num_chunks),
        chunk(blockIdx.x % chunks.num_chunks),
        begin(chunk * chunks.chunk_keys),
        end(min(begin + chunks.chunk_keys, params.kv_len)),
        mask(params.mask_of(head)),
        has_elements(first_element() < params.head_dim) {
    const int64_t batch = head / params.num_kv_heads;
    const int64_t row = params.key.offset(batch, head - batch * params.num_kv_heads, 0);
    rows =
        static_cast<const char*>(params.key.data) + (row + first_element()) * kElementBytes<dtype>;
  }

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kLanes; }
  // Of the keys side by side, which one is this thread's.
  static __device__ __forceinline__ int key_in_block() {
    return static_cast<int>(threadIdx.x) / kLanes;
  }
  static __device__ __forceinline__ int first_element() { return lane() * kElements; }

  // Calls f(key_index, real, elements) for the keys of this thread, with whole warps. Elements of a
  // key that is not real are zeros.
  template <typename F>
  __device__ __forceinline__ void visit(const F& f) const {
    for (int64_t first = begin; first < end; first += kUnroll * kKeys<kLanes>) {
      EightElements<dtype> loaded[kUnroll];
      bool real[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const int64_t key_index = first + i * kKeys<kLanes> + key_in_block();
        real[i] = key_index < end && (!mask || mask[key_index]);
        loaded[i] = {};
        if (real[i] && has_elements) {
          loaded[i].load(rows + key_index * params.key.stride_seq * kElementBytes<dtype>, aligned);
        }
      }
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        float elements[kElements];
        loaded[i].to_floats(elements);
        f(first + i * kKeys<kLanes> + key_in_block(), real[i], elements);
      }
    }
  }
};

// The sum over the lanes that share a key; all of them get it.
template <int kLanes>
__device__ __forceinline__ float sum_of_key(float value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, distance);
  }
  return value;
}

template <int kLanes>
struct SumShared {
  float sums[kKeys<kLanes>][kHeadDim<kLanes>];
  int32_t lens[kKeys<kLanes>];
};

// Sums up the unit keys of a chunk and leaves their scales where their similarities will be.
// grid: num_chunks per head
template <DType dtype, int kLanes>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    sum_unit_keys_kernel(const KeyDiversityParams params, const Chunks chunks, int64_t first_head,
                         bool aligned) {
  auto& shared = shared_memory<SumShared<kLanes>>();
  const KeyPlace<dtype, kLanes> place(params, chunks, first_head, aligned);
  float* scales = params.similarity + place.head * params.kv_len;
  float sums[kElements] = {};
  int32_t len = 0;
  place.visit([&](int64_t key_index, bool real, const float (&key)[kElements]) {
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < kElements; ++j) squares = fmaf(key[j], key[j], squares);
    squares = sum_of_key<kLanes>(squares);
    const float scale = real ? unit_scale(squares) : 0.0f;
    if (place.lane() == 0 && key_index < place.end) scales[key_index] = scale;
#pragma unroll
    for (int j = 0; j < kElements; ++j) sums[j] = fmaf(key[j], scale, sums[j]);
    len += real;
  });

  const int row = place.key_in_block();
#pragma unroll
  for (int j = 0; j < kElements; ++j) shared.sums[row][place.first_element() + j] = sums[j];
  if (place.lane() == 0) shared.lens[row] = len;
  __syncthreads();
  const int64_t chunk = place.head * chunks.num_chunks + place.chunk;
  const auto head_dim = static_cast<int>(params.head_dim);
  if (static_cast<int>(threadIdx.x) < head_dim) {
    float sum = shared.sums[0][threadIdx.x];
    for (int i = 1; i < kKeys<kLanes>; ++i) sum += shared.sums[i][threadIdx.x];
    chunks.sums[chunk * head_dim + threadIdx.x] = sum;
  }
  if (threadIdx.x == 0) {
    int32_t total = 0;
    for (int i = 0; i < kKeys<kLanes>; ++i) total += shared.lens[i];
    chunks.lens[chunk] = total;
  }
}

template <int kLanes>
struct CompareShared {
  static constexpr int kParts = kThreads / kHeadDim<kLanes>;
  float parts[kParts][kHeadDim<kLanes>];  // sums of every kParts-th chunk
  double squares[kWarps];
};

// Turns the scales of a chunk into similarities. grid: num_chunks per head
template <DType dtype, int kLanes>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    compare_keys_kernel(const KeyDiversityParams params, const Chunks chunks, int64_t first_head,
                        bool aligned) {
  auto& shared = shared_memory<CompareShared<kLanes>>();
  constexpr int kParts = CompareShared<kLanes>::kParts;
  const KeyPlace<dtype, kLanes> place(params, chunks, first_head, aligned);
  const auto num_chunks = static_cast<int>(chunks.num_chunks);
  const auto head_dim = static_cast<int>(params.head_dim);

  // The sum over all chunks, a column per thread.
  const int column = static_cast<int>(threadIdx.x) % kHeadDim<kLanes>;
  const int part = static_cast<int>(threadIdx.x) / kHeadDim<kLanes>;
  const float* sums = chunks.sums + place.head * num_chunks * head_dim + column;
  float sum = 0.0f;
#pragma unroll 8
  for (int i = part; i < num_chunks; i += kParts) {
    sum += column < head_dim ? __ldg(sums + i * head_dim) : 0.0f;
  }
  shared.parts[part][column] = sum;
  const int32_t* lens = chunks.lens + place.head * num_chunks;
  int len = 0;
  for (int i = lane_index(); i < num_chunks; i += kWarpSize) len += __ldg(lens + i);
  len = __reduce_add_sync(kFullWarp, len);
  __syncthreads();
  if (part == 0) {
#pragma unroll
    for (int i = 1; i < kParts; ++i) sum += shared.parts[i][column];
    shared.parts[0][column] = sum;
  }

  if (place.chunk == 0) {
    double square = part == 0 ? double{sum} * double{sum} : 0.0;
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      square += __shfl_down_sync(kFullWarp, square, distance);
    }
    if (lane_index() == 0) shared.squares[warp_index()] = square;
  }
  __syncthreads();
  if (place.chunk == 0 && threadIdx.x == 0) {
    double square = 0.0;
    for (int warp = 0; warp < kWarps; ++warp) square += shared.squares[warp];
    params.redundancy[place.head] = mean_cosine(square, len);
  }

  float mean[kElements];
#pragma unroll
  for (int j = 0; j < kElements; ++j) {
    mean[j] = shared.parts[0][place.first_element() + j] / static_cast<float>(max(len, 1));
  }
  float* similarity = params.similarity + place.head * params.kv_len;
  place.visit([&](int64_t key_index, bool real, const float (&key)[kElements]) {
    float product = 0.0f;
#pragma unroll
    for (int j = 0; j < kElements; ++j) product = fmaf(key[j], mean[j], product);
    product = sum_of_key<kLanes>(product);
    if (place.lane() == 0 && real) similarity[key_index] *= product;
  });
}

// How many heads go through both kernels before the next ones do: as many as half of the L2 has
// room for, evenly; all of them where it has no room for one.
int64_t heads_per_group(const KeyDiversityParams& params, int64_t element_bytes) {
  int device = 0, l2_bytes = 0;
  (void)cudaGetDevice(&device);
  (void)cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, device);
  const int64_t head_bytes = params.kv_len * params.head_dim * element_bytes;
  const int64_t most = l2_bytes / 2 / std::max<int64_t>(head_bytes, 1);
  if (most == 0) return params.num_heads();
  const int64_t num_groups = (params.num_heads() + most - 1) / most;
  return (params.num_heads() + num_groups - 1) / num_groups;
}

template <DType dtype, int kLanes>
cudaError_t launch_groups(const KeyDiversityParams& params, const Chunks& chunks,
                          cudaStream_t stream) {
  const bool aligned = rows_aligned(params.key, kElementBytes<dtype>);
  const int64_t num_heads = params.num_heads();
  const int64_t step = heads_per_group(params, kElementBytes<dtype>);
  cudaError_t error = cudaSuccess;
  for (int64_t head = 0; head < num_heads && error == cudaSuccess; head += step) {
    const int64_t num_blocks = std::min(step, num_heads - head) * chunks.num_chunks;
    const dim3 grid(static_cast<unsigned>(num_blocks)), block(kThreads);
    error = launch(sum_unit_keys_kernel<dtype, kLanes>, {grid, block, sizeof(SumShared<kLanes>)},
                   stream, params, chunks, head, aligned);
    if (error != cudaSuccess) break;
    error = launch(compare_keys_kernel<dtype, kLanes>, {grid, block, sizeof(CompareShared<kLanes>)},
                   stream, params, chunks, head, aligned);
  }
  return error;
}

}  // namespace

int64_t KeyDiversity::cuda_workspace_bytes(const KeyDiversityParams& params) {
  return Chunks(params, nullptr).bytes;
}

int KeyDiversity::launch_cuda(const KeyDiversityParams& params, void* workspace,
                              void* stream) noexcept {
  if (params.num_heads() == 0) return cudaSuccess;
  const Chunks chunks(params, workspace);
  const int lanes = params.head_dim <= 64 ? 8 : params.head_dim <= 128 ? 16 : 32;
  cudaError_t error = cudaSuccess;
  dispatch_dtype(params.dtype, [&](auto dtype) {
    (void)dispatch_value<8, 16, 32>(lanes, [&](auto num_lanes) {
      error = launch_groups<dtype.value, num_lanes.value>(params, chunks,
                                                          static_cast<cudaStream_t>(stream));
    });
  });
  return error;
}

}  // namespace kvevict
