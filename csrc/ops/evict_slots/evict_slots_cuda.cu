// SPDX-License-Identifier: Apache-2.0
// A warp finds out how many rows of its list must move, then each lane copies a vector of one after
// the other. Nothing that is read is written, so neither lanes nor warps need any order.
#include "cuda/move_rows.h"
#include "cuda/reductions.h"
#include "ops/evict_slots/evict_slots.h"

namespace kvevict {
namespace {

// Tuning.
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBlocksPerSm = 6;

struct EvictSlotsKernelParams {
  KvShape shape;  // of all tensors of the op
  IndexLists slots, kv_lens;
  uint32_t first_tensor;    // of this launch
  uint32_t warps_per_list;  // that share the moves of a list
  MovedTensor tensors[kMaxMovedTensors];
};
static_assert(sizeof(EvictSlotsKernelParams) <= 4096);

// How many entries of an ascending list are below `bound`; -1 counts as larger than any. The warp
// looks at 32 places at a time.
__device__ uint32_t count_below(const int32_t* list, uint32_t count, uint32_t bound) {
  uint32_t begin = 0, end = count;  // between which the answer lies
  while (begin < end) {
    const uint32_t part = (end - begin + kWarpSize - 1) / kWarpSize;
    const uint32_t last = begin + part * (lane_index() + 1) - 1;  // of the lane's part
    const bool below = last < end && static_cast<uint32_t>(__ldg(list + last)) < bound;
    begin += part * __popc(__ballot_sync(kFullWarp, below));
    end = min(begin + part - 1, end);
  }
  return begin;
}

// The row that has `place` rows before it when those of an ascending list are taken out.
__device__ uint32_t row_without(const int32_t* list, uint32_t count, uint32_t place) {
  uint32_t begin = 0, end = count;
  while (begin < end) {
    const uint32_t middle = (begin + end) / 2;
    if (static_cast<uint32_t>(__ldg(list + middle)) - middle <= place) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return place + begin;
}

template <typename Vec>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    evict_slots_kernel(const __grid_constant__ EvictSlotsKernelParams params) {
  const auto num_kv_heads = static_cast<uint32_t>(params.shape.num_kv_heads);
  const uint32_t warp = blockIdx.x * kWarps + warp_index();
  const uint32_t part = warp % params.warps_per_list, stream = warp / params.warps_per_list;
  const uint32_t layer = (params.first_tensor + blockIdx.y) % params.shape.num_layers;
  const uint32_t head = stream % num_kv_heads, batch = stream / num_kv_heads;
  const KvTensor& tensor = params.tensors[blockIdx.y].source;
  const auto num_columns = static_cast<uint32_t>(tensor.row_bytes / sizeof(Vec));
  if (batch >= params.shape.batch_size || num_columns == 0) return;

  // Lists that break their contract give arbitrary rows, but stay inside the tensor.
  const int32_t* slots = params.slots.list(layer, batch, head);
  const int64_t live = __ldg(params.kv_lens.list(layer, batch, head));
  const auto kv_len = static_cast<uint32_t>(min(max(live, int64_t{0}), tensor.kv_len));
  const uint32_t num_slots = count_below(slots, static_cast<uint32_t>(params.slots.k), 1u << 31);
  const uint32_t num_evicted = min(num_slots, kv_len);
  const uint32_t new_len = kv_len - num_evicted;
  const uint32_t num_moves = count_below(slots, num_evicted, new_len);

  const uint32_t first = part * kWarpSize + lane_index();
  const uint32_t step = params.warps_per_list * kWarpSize;
  const uint32_t move_step = step / num_columns, column_step = step % num_columns;
  char* rows = tensor.row(batch, head, 0);
  uint32_t move = first / num_columns, column = first % num_columns;
  while (move < num_moves) {
    const auto hole = static_cast<uint32_t>(__ldg(slots + move));
    const uint32_t survivor =
        row_without(slots + num_moves, num_evicted - num_moves, new_len + move);
    if (hole < new_len) {
      char* vectors = rows + int64_t{column} * sizeof(Vec);
      *reinterpret_cast<Vec*>(vectors + hole * tensor.rows.stride_seq) =
          *reinterpret_cast<const Vec*>(vectors + survivor * tensor.rows.stride_seq);
    }
    move += move_step;
    column += column_step;
    if (column >= num_columns) {
      column -= num_columns;
      ++move;
    }
  }
}

// As many as the device has room for.
int64_t num_warps_wanted() {
  int device = 0, num_sms = 1;
  (void)cudaGetDevice(&device);
  (void)cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  return int64_t{num_sms} * kBlocksPerSm * kWarps;
}

}  // namespace

int EvictSlots::launch_cuda(const EvictSlotsParams& params, void* /*workspace*/,
                            void* stream) noexcept {
  const KvShape& shape = params.shape;
  const int64_t num_streams = shape.batch_size * shape.num_kv_heads;
  if (num_streams == 0 || params.slots.k == 0) return cudaSuccess;
  if (params.slots.k > kMaxMovedRows) return cudaErrorInvalidValue;
  for (int64_t first = 0; first < shape.num_tensors(); first += kMaxMovedTensors) {
    const int64_t count = std::min<int64_t>(shape.num_tensors() - first, kMaxMovedTensors);
    EvictSlotsKernelParams launched{
        shape, params.slots, params.kv_lens, static_cast<uint32_t>(first), 1, {}};
    int64_t widest = 1;
    for (int64_t i = 0; i < count; ++i) {
      launched.tensors[i] = {params.tensors[first + i], nullptr};
      widest = std::max(widest, params.tensors[first + i].row_bytes);
    }
    const int vector_bytes = common_vector_bytes</*kInPlace=*/true>(launched.tensors, count);
    const int64_t wanted = (num_warps_wanted() - 1) / (num_streams * count) + 1;
    const int64_t most = (params.slots.k * widest - 1) / (vector_bytes * kWarpSize) + 1;
    launched.warps_per_list = static_cast<uint32_t>(std::min(wanted, most));
    const int64_t num_warps = num_streams * launched.warps_per_list;
    const dim3 grid(static_cast<unsigned>((num_warps - 1) / kWarps + 1),
                    static_cast<unsigned>(count));

    cudaError_t error = cudaSuccess;
    (void)dispatch_value<1, 2, 4, 8, 16>(vector_bytes, [&](auto bytes) {
      using Vec = typename VectorOf<bytes>::Type;
      error = launch(evict_slots_kernel<Vec>, {grid, dim3(kThreads)},
                     static_cast<cudaStream_t>(stream), launched);
    });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace kvevict
