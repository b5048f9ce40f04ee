// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <type_traits>

#include "core/dispatch.h"
#include "cuda/launch.h"
#include "cuda/vector_loads.h"
#include "ops/rerotate_keys/rerotate_keys.h"

namespace kvevict {
namespace {

// Tuning.
constexpr int kThreads = 256;
constexpr int kRowsInFlight = 2;  // of a thread
constexpr int64_t kEnoughBlocks = 768;

// Limits.
constexpr int kMaxLayers = 64;                          // per launch: parameters stay under 4 KiB
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;  // so that 32 bits count blocks
constexpr int64_t kMaxBlocksPerList = (int64_t{1} << 31) / kThreads;  // and threads

struct LaunchParams {
  RerotateKeysParams op;
  int64_t first_layer;
  uint32_t list_heads, heads_per_list, layers_per_list;  // the layers of this launch
  uint32_t threads_per_slot, blocks_per_list, splits_per_list;
  KvTensor keys[kMaxLayers];
};
static_assert(sizeof(LaunchParams) <= 4096);

// Elements as they lie in memory: 16 bytes of them, or one.
template <DType dtype, int kCount>
using Words = std::conditional_t<kCount != 1, uint4,
                                 std::conditional_t<dtype == DType::kFloat32, uint32_t, uint16_t>>;

// Turns pairs of channels: those at the same place of both halves, or neighbors.
template <DType dtype, int kPairs, bool kInterleaved>
__device__ __forceinline__ void rotate(Words<dtype, kPairs> (&halves)[2],
                                       const float (&cos)[kPairs], const float (&sin)[kPairs]) {
  float values[2 * kPairs];
  unpack<dtype>(halves[0], values);
  unpack<dtype>(halves[1], values + kPairs);
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    float& a = values[kInterleaved ? 2 * i : i];
    float& b = values[kInterleaved ? 2 * i + 1 : kPairs + i];
    const float turned = a * cos[i] - b * sin[i];
    b = b * cos[i] + a * sin[i];
    a = turned;
  }
  pack<dtype>(values, halves[0]);
  pack<dtype>(values + kPairs, halves[1]);
}

// A thread owns kPairs neighboring frequencies of a slot. It computes their angles once and turns
// the channels of some of the layers and heads that share the positions.
template <DType dtype, int kPairs, bool kInterleaved>
__global__ void __launch_bounds__(kThreads)
    rerotate_keys_kernel(const __grid_constant__ LaunchParams launch) {
  using Half = Words<dtype, kPairs>;
  const RerotateKeysParams& params = launch.op;
  const uint32_t part = blockIdx.x / launch.blocks_per_list;
  const uint32_t thread = blockIdx.x % launch.blocks_per_list * kThreads + threadIdx.x;
  const int64_t slot = thread / launch.threads_per_slot;
  if (slot >= params.kv_len) return;
  const int64_t begin_freq = int64_t{thread % launch.threads_per_slot} * kPairs;

  const uint32_t split = part % launch.splits_per_list, list = part / launch.splits_per_list;
  const uint32_t begin_head = list % launch.list_heads * launch.heads_per_list;
  const uint32_t of_heads = list / launch.list_heads;
  const auto batch_size = static_cast<uint32_t>(params.batch_size);
  const uint32_t batch = of_heads % batch_size, begin_layer = of_heads / batch_size;
  const Move move = params.move(launch.first_layer + begin_layer, batch, begin_head, slot);
  if (!params.turns(move)) return;

  float cos[kPairs], sin[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    int64_t axis = params.num_axes == 1 ? 0 : params.axis_of_freq[begin_freq + i];
    axis = min(max(axis, int64_t{0}), params.num_axes - 1);  // if it breaks its contract
    const uint64_t turns = turns_per_position(params.inv_freq[begin_freq + i]);
    constexpr float kHalfTurns = 0x1p-31f;
    sincospif(static_cast<float>(turn_by(turns, move.distance(axis))) * kHalfTurns, &sin[i],
              &cos[i]);
  }

  const uint32_t num_rows = launch.layers_per_list * launch.heads_per_list;
  const uint32_t begin = num_rows * split / launch.splits_per_list;
  const uint32_t end = num_rows * (split + 1) / launch.splits_per_list;
  constexpr int64_t kBytes = sizeof(Half) / kPairs;
  const int64_t offset = begin_freq * kBytes * (kInterleaved ? 2 : 1);
  const int64_t second = (kInterleaved ? kPairs : params.num_freqs) * kBytes;
  for (uint32_t row = begin; row < end; row += kRowsInFlight) {
    char* places[kRowsInFlight];
    Half halves[kRowsInFlight][2];
#pragma unroll
    for (uint32_t i = 0; i < kRowsInFlight; ++i) {
      const uint32_t at = min(row + i, end - 1);
      const KvTensor& key = launch.keys[begin_layer + at / launch.heads_per_list];
      const bool valid = row + i < end && slot < key.kv_len;
      const uint32_t head = begin_head + at % launch.heads_per_list;
      places[i] = valid ? key.row(batch, head, slot) + offset : nullptr;
      if (!valid) continue;
      halves[i][0] = *reinterpret_cast<const Half*>(places[i]);
      halves[i][1] = *reinterpret_cast<const Half*>(places[i] + second);
    }
#pragma unroll
    for (uint32_t i = 0; i < kRowsInFlight; ++i) {
      if (!places[i]) continue;
      rotate<dtype, kPairs, kInterleaved>(halves[i], cos, sin);
      *reinterpret_cast<Half*>(places[i]) = halves[i][0];
      *reinterpret_cast<Half*>(places[i] + second) = halves[i][1];
    }
  }
}

// Whether the halves of all rows are made of aligned vectors.
bool has_vectors(const RerotateKeysParams& params, const KvTensor* keys, int64_t count) {
  constexpr int64_t kVecBytes = 16;
  int64_t bits = params.num_freqs * (params.dtype == DType::kFloat32 ? 4 : 2);
  for (int64_t i = 0; i < count; ++i) {
    const MutableHeadTensor& rows = keys[i].rows;
    bits |= reinterpret_cast<int64_t>(rows.data) | rows.stride_batch | rows.stride_head |
            rows.stride_seq;
  }
  return bits % kVecBytes == 0;
}

// Turns the keys of `count` layers.
cudaError_t launch_layers(const RerotateKeysParams& params, int64_t first, int64_t count,
                          cudaStream_t stream) {
  const bool per_layer = params.list_layers() > 1;
  const int64_t layers_per_list = per_layer ? 1 : count;
  const int64_t lists = (per_layer ? count : 1) * params.batch_size * params.list_heads();
  const int64_t rows_per_list = layers_per_list * params.heads_per_list();
  const KvTensor* keys = params.keys + first;
  cudaError_t error = cudaSuccess;
  dispatch_dtype(params.dtype, [&](auto dtype) {
    (void)dispatch_value<false, true>(has_vectors(params, keys, count), [&](auto vectors) {
      (void)dispatch_value<false, true>(params.interleaved, [&](auto interleaved) {
        constexpr int kVector = dtype.value == DType::kFloat32 ? 4 : 8;
        constexpr int kPairs = vectors.value ? kVector : 1;
        const int64_t threads_per_slot = params.num_freqs / kPairs;
        const int64_t blocks = (params.kv_len * threads_per_slot + kThreads - 1) / kThreads;
        const int64_t splits =
            std::clamp<int64_t>((kEnoughBlocks - 1) / (lists * blocks) + 1, 1,
                                (rows_per_list + kRowsInFlight - 1) / kRowsInFlight);
        if (blocks > kMaxBlocksPerList || lists * blocks > kMaxBlocks / splits) {
          error = cudaErrorInvalidValue;
          return;
        }
        LaunchParams launch_params{params,
                                   first,
                                   static_cast<uint32_t>(params.list_heads()),
                                   static_cast<uint32_t>(params.heads_per_list()),
                                   static_cast<uint32_t>(layers_per_list),
                                   static_cast<uint32_t>(threads_per_slot),
                                   static_cast<uint32_t>(blocks),
                                   static_cast<uint32_t>(splits),
                                   {}};
        std::copy_n(keys, count, launch_params.keys);
        error = launch(rerotate_keys_kernel<dtype.value, kPairs, interleaved.value>,
                       {dim3(static_cast<unsigned>(lists * splits * blocks)), dim3(kThreads)},
                       stream, launch_params);
      });
    });
  });
  return error;
}

}  // namespace

int RerotateKeys::launch_cuda(const RerotateKeysParams& params, void* /*workspace*/,
                              void* stream) noexcept {
  if (params.batch_size * params.num_kv_heads * params.kv_len * params.num_freqs == 0) {
    return cudaSuccess;
  }
  for (int64_t first = 0; first < params.num_layers; first += kMaxLayers) {
    const int64_t count = std::min<int64_t>(params.num_layers - first, kMaxLayers);
    const cudaError_t error =
        launch_layers(params, first, count, static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace kvevict
