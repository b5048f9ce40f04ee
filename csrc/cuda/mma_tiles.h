// SPDX-License-Identifier: Apache-2.0
// A resident tile of rows A against a stream of tiles of rows B: products A * B^T on tensor cores.
// Keys and query rows can each take either part.
#pragma once

#include "core/dtype.h"
#include "cuda/ptx.h"

namespace kvevict {

// Everything below is shaped by how many 16-byte chunks a row has once head_dim is padded.
struct TileTuning {
  int row_tiles;  // 16-row tiles of A per warp
  int columns;    // rows of B per tile
  int stages;     // B tiles in shared memory
  bool resident;  // A's fragments stay in registers
};
// Within 99 KB of shared memory for every shape, so that one choice serves sm_80 to sm_120.
constexpr TileTuning tile_tuning(int chunks) {
  if (chunks <= 16) return {2, 64, 3, true};
  if (chunks <= 32) return {1, 32, 2, false};
  return {1, 16, 2, false};
}

inline constexpr int kMaxChunks = 64;  // head_dim 256 in float32

inline constexpr int kTileWarps = 4;
inline constexpr int kTileThreads = 32 * kTileWarps;

// Products of one 16 x 8 tile and 32 bytes of depth, from fragments as ldmatrix delivers them.
template <DType dtype>
struct TileElement {
  static constexpr int kBytes = 2;
  static __device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4],
                                                      const uint32_t (&b)[2]) {
    if constexpr (dtype == DType::kBFloat16) {
      mma_bf16(d, a, b);
    } else {
      mma_fp16(d, a, b);
    }
  }
};
// float32 as three tf32 products: the rounding left out is 2^-22 of a product.
template <>
struct TileElement<DType::kFloat32> {
  static constexpr int kBytes = 4;
  static __device__ __forceinline__ void split(uint32_t bits, uint32_t& high, uint32_t& low) {
    high = bits & 0xFFFFE000u;
    low = __float_as_uint(__uint_as_float(bits) - __uint_as_float(high));
  }
  static __device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4],
                                                      const uint32_t (&b)[2]) {
    uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) split(a[i], a_high[i], a_low[i]);
#pragma unroll
    for (int i = 0; i < 2; ++i) split(b[i], b_high[i], b_low[i]);
    mma_tf32(d, a_low, b_high);
    mma_tf32(d, a_high, b_low);
    mma_tf32(d, a_high, b_high);
  }
};

template <DType dtype, int kHeadDim_, bool small = false>
struct TileShape {
  using Element = TileElement<dtype>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kChunks = kHeadDim * Element::kBytes / 16;
  static constexpr TileTuning kTuning = tile_tuning(small ? kMaxChunks : kChunks);
  // The same rows in smaller tiles, for kernels that keep more beside the products.
  using Small = TileShape<dtype, kHeadDim, true>;
  static constexpr int kRowTiles = kTuning.row_tiles;
  static constexpr int kRows = kTileWarps * kRowTiles * 16;
  static constexpr int kColumns = kTuning.columns;
  static constexpr int kColumnTiles = kColumns / 8;
  static constexpr int kStages = kTuning.stages;
  static constexpr int kSteps = kChunks / 2;
  // An odd number of chunks per row puts the 8 rows of an ldmatrix into different banks.
  static constexpr int kPitch = kChunks + 1;
};

template <typename Shape>
struct TileBuffers {
  uint4 a[Shape::kRows][Shape::kPitch];
  uint4 b[Shape::kStages][Shape::kColumns][Shape::kPitch];
};

// A thread's products: row l / 4 + 8 * (i / 2) of its warp's tile r, column 2 * (l % 4) + i % 2 of
// column tile c, for lane l.
template <typename Shape>
using TileProducts = float[Shape::kRowTiles][Shape::kColumnTiles][4];

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % 32; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) / 32; }

// The row of the A tile of products[r][..][i], and the column of the B tile of products[..][c][i].
template <typename Shape>
__device__ __forceinline__ int product_row(int r, int i) {
  return (warp_id() * Shape::kRowTiles + r) * 16 + lane_id() / 4 + 8 * (i / 2);
}
__device__ __forceinline__ int product_column(int c, int i) {
  return c * 8 + 2 * (lane_id() % 4) + i % 2;
}

// Brings rows into shared memory, padded with zeros. row(i) is the address of row i or null.
template <typename Shape, int kRows, typename Row>
__device__ __forceinline__ void load_rows(uint4 (&rows)[kRows][Shape::kPitch], int row_bytes,
                                          bool aligned, Row&& row) {
  for (int i = threadIdx.x; i < kRows * Shape::kChunks; i += kTileThreads) {
    const int chunk = i % Shape::kChunks;
    const char* source = row(i / Shape::kChunks);
    const bool valid = source != nullptr && chunk * 16 < row_bytes;
    uint4* destination = &rows[i / Shape::kChunks][chunk];
    if (aligned) {
      cp_async_16(destination, valid ? source + chunk * 16 : nullptr, valid);
    } else {
      // Rows that start anywhere: elements one by one, visible after the same barrier.
      uint16_t halves[8] = {};
      for (int j = 0; valid && j < 8; ++j) {
        halves[j] = reinterpret_cast<const uint16_t*>(source + chunk * 16)[j];
      }
      *destination = make_uint4(halves[0] | halves[1] << 16, halves[2] | halves[3] << 16,
                                halves[4] | halves[5] << 16, halves[6] | halves[7] << 16);
    }
  }
}

// Streams num_tiles tiles of B past the A tile. Calls prepare(stage, tile) when a tile is asked
// for, to put what belongs to its columns into shared memory, and consume(stage, tile, products).
template <typename Shape, typename RowA, typename RowB, typename Prepare, typename Consume>
__device__ __forceinline__ void stream_tiles(TileBuffers<Shape>& buffers, int row_bytes,
                                             bool aligned, int64_t num_tiles, RowA&& row_a,
                                             RowB&& row_b, Prepare&& prepare, Consume&& consume) {
  constexpr int kStages = Shape::kStages;
  const int lane = lane_id();
  const auto fetch = [&](int64_t tile) {
    const int stage = static_cast<int>(tile % kStages);
    if (tile < num_tiles) {
      prepare(stage, tile);
      load_rows<Shape>(buffers.b[stage], row_bytes, aligned,
                       [&](int i) { return row_b(tile * Shape::kColumns + i); });
    }
    cp_async_commit();
  };

  __syncthreads();  // nobody reads the tiles of an earlier stream any more
  load_rows<Shape>(buffers.a, row_bytes, aligned, row_a);
  for (int tile = 0; tile < kStages - 1; ++tile) fetch(tile);

  // Lane l addresses row l % 16 and chunk l / 16 of A's 16 x 32-byte tiles; for B the four matrices
  // are two column tiles of 8 by two chunks.
  const int a_row = warp_id() * Shape::kRowTiles * 16 + lane % 16;
  const int b_row = lane % 8 + lane / 16 * 8;
  uint32_t a[Shape::kTuning.resident ? Shape::kSteps : 1][Shape::kRowTiles][4];
  const auto load_a = [&](int step, uint32_t (&fragments)[Shape::kRowTiles][4]) {
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r) {
      ldmatrix_x4(fragments[r], &buffers.a[a_row + r * 16][step * 2 + lane / 16]);
    }
  };

  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    const int stage = static_cast<int>(tile % kStages);
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this tile is there, and everybody is done with the one before
    fetch(tile + kStages - 1);
    if constexpr (Shape::kTuning.resident) {
      if (tile == 0) {
#pragma unroll
        for (int step = 0; step < Shape::kSteps; ++step) load_a(step, a[step]);
      }
    }
    TileProducts<Shape> products = {};
#pragma unroll
    for (int step = 0; step < Shape::kSteps; ++step) {
      if constexpr (!Shape::kTuning.resident) load_a(step, a[0]);
      const auto& fragments = a[Shape::kTuning.resident ? step : 0];
#pragma unroll
      for (int c = 0; c < Shape::kColumnTiles; c += 2) {
        uint32_t b[4];
        ldmatrix_x4(b, &buffers.b[stage][c * 8 + b_row][step * 2 + lane / 8 % 2]);
#pragma unroll
        for (int r = 0; r < Shape::kRowTiles; ++r) {
          Shape::Element::multiply_add(products[r][c], fragments[r], {b[0], b[1]});
          Shape::Element::multiply_add(products[r][c + 1], fragments[r], {b[2], b[3]});
        }
      }
    }
    consume(stage, tile, products);
  }
  cp_async_wait<0>();
}

}  // namespace kvevict
