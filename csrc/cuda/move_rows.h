// SPDX-License-Identifier: Apache-2.0
// Moves the kept rows of keys and values: gathers them elsewhere or compacts them in place.
//
// A block owns a stream: a slice of the columns of one tensor, sequence and head. No other block
// touches its bytes, so blocks need no order among themselves. A thread owns one vector of every
// n-th row and passes it through slots of its own in a ring of asynchronous copies, which reads
// several batches of rows ahead of the writes.
#pragma once

#include <algorithm>

#include "core/dispatch.h"
#include "core/kv_layers.h"
#include "cuda/launch.h"
#include "cuda/ptx.h"

namespace kvevict {

// Tuning. With this many items and slots, shared memory has room for 768 threads on an H200's SM.
inline constexpr int kMoveThreads = 128;
inline constexpr int kMoveThreadsOfFewBlocks = 256;  // blocks with an SM to themselves
inline constexpr int kMoveThreadsPerSm = 768;
inline constexpr int kMoveItems = 4;  // rows of a thread in a batch
inline constexpr int kMoveAhead = 3;  // batches of reads ahead of the writes
inline constexpr int kMoveSlots = kMoveAhead + 1;
inline constexpr int64_t kFewMoveBlocks = 256;
inline constexpr int64_t kEnoughMoveBlocks = 768;
inline constexpr int64_t kSectorBytes = 32;  // the narrowest slice: a unit of DRAM traffic

// Limits.
inline constexpr int64_t kMaxMovedRows = 1 << 30;  // of a list; leaves room to count beyond
inline constexpr int kMaxMovedTensors = 64;        // per launch: parameters stay under 4 KiB

struct MovedTensor {
  KvTensor source;
  void* destination;  // [batch_size, num_kv_heads, k, row] without gaps; not used in place
};

struct MoveRowsParams {
  KvShape shape;  // of all tensors of the op
  IndexLists kept;
  uint32_t first_tensor;  // of this launch
  uint32_t num_slices;
  MovedTensor tensors[kMaxMovedTensors];
};
static_assert(sizeof(MoveRowsParams) <= 4096);

template <int kBytes>
struct VectorOf;
template <>
struct VectorOf<1> {
  using Type = uint8_t;
};
template <>
struct VectorOf<2> {
  using Type = uint16_t;
};
template <>
struct VectorOf<4> {
  using Type = uint32_t;
};
template <>
struct VectorOf<8> {
  using Type = uint2;
};
template <>
struct VectorOf<16> {
  using Type = uint4;
};

// The kept rows on their way, every slot used by one thread only.
template <typename Vec, int kThreads>
struct MoveRing {
  Vec slots[kMoveSlots][kMoveItems][kThreads];
};

// Starts reading a vector, or puts zeros.
template <typename Vec>
__device__ __forceinline__ void fetch(Vec* slot, const void* source, bool valid) {
  if constexpr (sizeof(Vec) == 16) {
    cp_async_16(slot, source, valid);
  } else {
    *slot = valid ? *static_cast<const Vec*>(source) : Vec{};
  }
}

template <typename Vec>
__device__ __forceinline__ void put(void* destination, const Vec& value) {
  if constexpr (sizeof(Vec) == 16) {
    store_streaming(destination, value);
  } else {
    *static_cast<Vec*>(destination) = value;
  }
}

template <typename Vec, int kThreads, bool kInPlace>
__global__ void __launch_bounds__(kThreads, kMoveThreadsPerSm / kThreads)
    move_rows_kernel(const __grid_constant__ MoveRowsParams params) {
  constexpr int kVecBytes = sizeof(Vec);
  constexpr int kSector = kSectorBytes / kVecBytes;
  auto& ring = shared_memory<MoveRing<Vec, kThreads>>();
  const uint32_t thread = threadIdx.x;

  const auto num_layers = static_cast<uint32_t>(params.shape.num_layers);
  const auto num_kv_heads = static_cast<uint32_t>(params.shape.num_kv_heads);
  const uint32_t layer = (params.first_tensor + blockIdx.y) % num_layers;
  const uint32_t slice = blockIdx.x % params.num_slices, stream = blockIdx.x / params.num_slices;
  const uint32_t head = stream % num_kv_heads, batch = stream / num_kv_heads;
  const MovedTensor& tensor = params.tensors[blockIdx.y];
  const KvTensor& source = tensor.source;

  // The columns of the slice.
  const auto num_columns = static_cast<uint32_t>(source.row_bytes / kVecBytes);
  const uint32_t num_sectors = (num_columns + kSector - 1) / kSector;
  const uint32_t begin = num_sectors * slice / params.num_slices * kSector;
  const uint32_t end = min(num_sectors * (slice + 1) / params.num_slices * kSector, num_columns);
  if (begin >= end) return;
  const uint32_t width = end - begin;

  // Kept rows, and rows to write: a gather fills up with zeros. Lists that break their contract
  // give arbitrary rows, but stay inside the tensors.
  const int32_t* list = params.kept.list(layer, batch, head);
  const auto k = static_cast<uint32_t>(params.kept.k);
  const auto kv_len = static_cast<uint32_t>(min(source.kv_len, int64_t{1} << 31));
  const auto kept_len = static_cast<uint32_t>(max(params.kept.len(layer, batch, head), int64_t{0}));
  const uint32_t len = min(kept_len, kInPlace ? min(k, kv_len) : k);
  const uint32_t num_rows = kInPlace ? len : k;

  // The thread's column and its first row; threads that are left over get none.
  const uint32_t row_step = kThreads / width;
  const uint32_t first_row = thread < row_step * width ? thread / width : 1u << 31;
  const int64_t column_offset = int64_t{begin + thread % width} * kVecBytes;
  const int64_t source_offset = source.rows.offset(batch, head, 0) + column_offset;
  const int64_t destination_offset =
      kInPlace ? source_offset : stream * params.kept.k * source.row_bytes + column_offset;
  const int64_t destination_stride = kInPlace ? source.rows.stride_seq : source.row_bytes;
  const auto* source_data = static_cast<const char*>(source.rows.data);
  auto* destination_data = static_cast<char*>(kInPlace ? source.rows.data : tensor.destination);

  // Three walks through the rows: their places in the list are read, then rows read, then written.
  uint32_t listed = first_row, read = first_row, written = first_row;
  int32_t places[kMoveAhead][kMoveItems];  // of the next rows to read
  const auto list_batch = [&](int32_t (&batch_places)[kMoveItems]) {
#pragma unroll
    for (int i = 0; i < kMoveItems; ++i, listed += row_step) {
      batch_places[i] = listed < k ? __ldg(list + listed) : -1;
    }
  };
  // Returns a bit for each row that is to be written.
  const auto read_batch = [&](Vec(&slots)[kMoveItems][kThreads]) {
    unsigned moved = 0;
#pragma unroll
    for (int i = 0; i < kMoveItems; ++i, read += row_step) {
      const auto place = static_cast<uint32_t>(places[0][i]);
      const bool valid = read < len && place < kv_len;
      if (kInPlace ? !valid || place == read : read >= num_rows) continue;
      const bool copied = kInPlace || valid;
      const int64_t offset = copied ? source_offset + place * source.rows.stride_seq : 0;
      fetch(&slots[i][thread], source_data + offset, copied);
      moved |= 1u << i;
    }
    cp_async_commit();
#pragma unroll
    for (int ahead = 1; ahead < kMoveAhead; ++ahead) {
#pragma unroll
      for (int i = 0; i < kMoveItems; ++i) places[ahead - 1][i] = places[ahead][i];
    }
    list_batch(places[kMoveAhead - 1]);
    return moved;
  };
  const auto write_batch = [&](const Vec(&slots)[kMoveItems][kThreads], unsigned moved) {
    Vec values[kMoveItems];
#pragma unroll
    for (int i = 0; i < kMoveItems; ++i) values[i] = slots[i][thread];
#pragma unroll
    for (int i = 0; i < kMoveItems; ++i, written += row_step) {
      if (moved >> i & 1) {
        put(destination_data + (destination_offset + written * destination_stride), values[i]);
      }
    }
  };

#pragma unroll
  for (int ahead = 0; ahead < kMoveAhead; ++ahead) list_batch(places[ahead]);
  const uint32_t batch_rows = row_step * kMoveItems;
  const int num_batches = static_cast<int>((num_rows + batch_rows - 1) / batch_rows);
  unsigned moved = 0;  // kMoveItems bits for each batch between reading and writing
  for (int i = -kMoveAhead; i < num_batches; ++i) {
    moved |= read_batch(ring.slots[(i + kMoveAhead) % kMoveSlots]) << (kMoveAhead * kMoveItems);
    if (i >= 0) {
      cp_async_wait<kMoveAhead>();
      // In place: indices ascend, so the sources of row r and of later rows lie at or behind r. The
      // reads of this batch and of those before it end at the barrier; later ones read behind it.
      if (kInPlace) __syncthreads();
      write_batch(ring.slots[i % kMoveSlots], moved);
    }
    moved >>= kMoveItems;
  }
}

// The largest vector that every row of every tensor is made of.
template <bool kInPlace>
int common_vector_bytes(const MovedTensor* tensors, int64_t count) {
  int64_t bits = 16;
  for (int64_t i = 0; i < count; ++i) {
    const auto& [rows, row_bytes, kv_len] = tensors[i].source;
    bits |= reinterpret_cast<int64_t>(rows.data) | rows.stride_batch | rows.stride_head |
            rows.stride_seq | row_bytes;
    if (!kInPlace) bits |= reinterpret_cast<int64_t>(tensors[i].destination);
  }
  return static_cast<int>(bits & -bits);
}

// destinations are null in place.
template <bool kInPlace>
cudaError_t launch_move_rows(const KvShape& shape, const KvTensor* sources,
                             const KvTensor* destinations, const IndexLists& kept,
                             cudaStream_t stream) {
  const int64_t num_lists = shape.batch_size * shape.num_kv_heads;
  if (num_lists == 0 || kept.k == 0) return cudaSuccess;
  if (kept.k > kMaxMovedRows) return cudaErrorInvalidValue;
  for (int64_t first = 0; first < shape.num_tensors(); first += kMaxMovedTensors) {
    const int64_t count = std::min<int64_t>(shape.num_tensors() - first, kMaxMovedTensors);
    MoveRowsParams params{shape, kept, static_cast<uint32_t>(first), 1, {}};
    int64_t widest = 1;
    for (int64_t i = 0; i < count; ++i) {
      params.tensors[i] = {sources[first + i],
                           kInPlace ? nullptr : destinations[first + i].rows.data};
      widest = std::max(widest, sources[first + i].row_bytes);
    }
    // Whole rows if there are streams enough, else narrower slices; a thread per vector at least.
    const int vector_bytes = common_vector_bytes<kInPlace>(params.tensors, count);
    const int64_t wanted = (kEnoughMoveBlocks - 1) / (num_lists * count) + 1;
    const int64_t least = (widest - 1) / (vector_bytes * kMoveThreads) + 1;
    const int64_t most = (widest - 1) / kSectorBytes + 1;
    const int64_t num_slices = std::clamp(wanted, least, most);
    params.num_slices = static_cast<uint32_t>(num_slices);
    const dim3 grid(static_cast<unsigned>(num_lists * num_slices), static_cast<unsigned>(count));
    const bool few = num_lists * num_slices * count <= kFewMoveBlocks;

    cudaError_t error = cudaSuccess;
    (void)dispatch_value<1, 2, 4, 8, 16>(vector_bytes, [&](auto bytes) {
      (void)dispatch_value<false, true>(few, [&](auto few_blocks) {
        using Vec = typename VectorOf<bytes>::Type;
        constexpr int kThreads = few_blocks ? kMoveThreadsOfFewBlocks : kMoveThreads;
        error = launch(move_rows_kernel<Vec, kThreads, kInPlace>,
                       {grid, dim3(kThreads), sizeof(MoveRing<Vec, kThreads>)}, stream, params);
      });
    });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace kvevict
