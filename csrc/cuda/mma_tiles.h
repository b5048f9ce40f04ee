// SPDX-License-Identifier: Apache-2.0
// A resident tile of rows A against a stream of tiles of rows B: products A * B^T, of 16-bit
// elements on tensor cores, of float32 by fused multiply-add. Keys and query rows can each take
// either part; a product's bits do not depend on which.
#pragma once

#include "core/dtype.h"
#include "cuda/reductions.h"

namespace kvevict {

// Everything below is shaped by how many 16-byte chunks a row has once head_dim is padded.
struct TileTuning {
  int row_tiles;  // 16-row tiles of A per warp
  int columns;    // rows of B per tile
  int stages;     // B tiles in shared memory
  bool resident;  // A's fragments stay in registers
};
// Within 99 KB of shared memory for every shape, so that one choice serves sm_80 to sm_120.
constexpr TileTuning tile_tuning(int chunks, int element_bytes) {
  if (chunks <= 16 && element_bytes == 2) return {2, 64, 3, true};
  if (chunks <= 32) return {1, 32, 2, false};
  return {1, 16, 2, false};
}

inline constexpr int kMaxChunks = 64;  // head_dim 256 in float32

inline constexpr int kTileWarps = 4;
inline constexpr int kTileThreads = 32 * kTileWarps;
// Blocks per multiprocessor to leave registers for. Without it ptxas spills to fit more.
inline constexpr int kTileBlocks = 2;

template <DType dtype, int kHeadDim_, bool small = false>
struct TileShape {
  static constexpr DType kDType = dtype;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kElementBytes = kvevict::kElementBytes<dtype>;
  static constexpr int kChunks = kHeadDim * kElementBytes / 16;
  static constexpr TileTuning kTuning = tile_tuning(small ? kMaxChunks : kChunks, kElementBytes);
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

// d += a * b on tensor cores, as mma_bf16 does.
template <DType dtype>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  if constexpr (dtype == DType::kBFloat16) {
    mma_bf16(d, a, b);
  } else {
    mma_fp16(d, a, b);
  }
}

template <typename Shape>
struct TileBuffers {
  uint4 a[Shape::kRows][Shape::kPitch];
  uint4 b[Shape::kStages][Shape::kColumns][Shape::kPitch];
};

// A thread's products: row l / 4 + 8 * (i / 2) of its warp's tile r, column 2 * (l % 4) + i % 2 of
// column tile c, for lane l.
template <typename Shape>
using TileProducts = float[Shape::kRowTiles][Shape::kColumnTiles][4];

// The row of the A tile of products[r][..][i], and the column of the B tile of products[..][c][i].
template <typename Shape>
__device__ __forceinline__ int product_row(int r, int i) {
  return (warp_index() * Shape::kRowTiles + r) * 16 + lane_index() / 4 + 8 * (i / 2);
}
__device__ __forceinline__ int product_column(int c, int i) {
  return c * 8 + 2 * (lane_index() % 4) + i % 2;
}

// Reads 16 bytes of a row, zeros behind its end and where there is no row.
__device__ __forceinline__ uint4 read_chunk(const char* row, int chunk, int row_bytes,
                                            bool aligned) {
  if (row == nullptr || chunk * 16 >= row_bytes) return make_uint4(0, 0, 0, 0);
  const char* source = row + chunk * 16;
  if (aligned) return *reinterpret_cast<const uint4*>(source);
  uint16_t halves[8];
  for (int j = 0; j < 8; ++j) halves[j] = reinterpret_cast<const uint16_t*>(source)[j];
  return make_uint4(halves[0] | halves[1] << 16, halves[2] | halves[3] << 16,
                    halves[4] | halves[5] << 16, halves[6] | halves[7] << 16);
}

// Brings rows into shared memory, padded with zeros. row(i) is the address of row i or null.
template <typename Shape, int kRows, typename Row>
__device__ __forceinline__ void load_rows(uint4 (&rows)[kRows][Shape::kPitch], int row_bytes,
                                          bool aligned, Row&& row) {
  for (int i = threadIdx.x; i < kRows * Shape::kChunks; i += kTileThreads) {
    const int chunk = i % Shape::kChunks;
    const char* source = row(i / Shape::kChunks);
    uint4* destination = &rows[i / Shape::kChunks][chunk];
    if (aligned) {
      const bool valid = source != nullptr && chunk * 16 < row_bytes;
      cp_async_16(destination, valid ? source + chunk * 16 : nullptr, valid);
    } else {
      *destination = read_chunk(source, chunk, row_bytes, false);  // visible after the same barrier
    }
  }
}

// The A tile's part in the products: on tensor cores fragments of it, in registers where they fit.
template <typename Shape>
struct TileMultiplier {
  static constexpr bool kResident = Shape::kTuning.resident;
  uint32_t fragments[kResident ? Shape::kSteps : 1][Shape::kRowTiles][4];

  // Lane l addresses row l % 16 and chunk l / 16 of A's 16 x 32-byte tiles.
  __device__ __forceinline__ void load_step(const TileBuffers<Shape>& buffers, int step,
                                            uint32_t (&tiles)[Shape::kRowTiles][4]) {
    const int row = warp_index() * Shape::kRowTiles * 16 + lane_index() % 16;
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r) {
      ldmatrix_x4(tiles[r], &buffers.a[row + r * 16][step * 2 + lane_index() / 16]);
    }
  }

  __device__ __forceinline__ void load(const TileBuffers<Shape>& buffers) {
    if constexpr (kResident) {
#pragma unroll
      for (int step = 0; step < Shape::kSteps; ++step) load_step(buffers, step, fragments[step]);
    }
  }

  __device__ __forceinline__ void multiply(const TileBuffers<Shape>& buffers, int stage,
                                           TileProducts<Shape>& products) {
    // The four matrices of an ldmatrix of B are two column tiles of 8 by two chunks.
    const int row = lane_index() % 8 + lane_index() / 16 * 8;
#pragma unroll(kResident ? Shape::kSteps : 4)
    for (int step = 0; step < Shape::kSteps; ++step) {
      if constexpr (!kResident) load_step(buffers, step, fragments[0]);
      const auto& a = fragments[kResident ? step : 0];
#pragma unroll
      for (int c = 0; c < Shape::kColumnTiles; c += 2) {
        uint32_t b[4];
        ldmatrix_x4(b, &buffers.b[stage][c * 8 + row][step * 2 + lane_index() / 8 % 2]);
#pragma unroll
        for (int r = 0; r < Shape::kRowTiles; ++r) {
          multiply_add<Shape::kDType>(products[r][c], a[r], {b[0], b[1]});
          multiply_add<Shape::kDType>(products[r][c + 1], a[r], {b[2], b[3]});
        }
      }
    }
  }
};

// float32: the same products in the same registers, each a chain of fused multiply-adds.
template <typename Shape>
  requires(Shape::kElementBytes == 4)
struct TileMultiplier<Shape> {
  __device__ __forceinline__ void load(const TileBuffers<Shape>& /*buffers*/) {}

  __device__ __forceinline__ void multiply(const TileBuffers<Shape>& buffers, int stage,
                                           TileProducts<Shape>& products) {
#pragma unroll 2
    for (int chunk = 0; chunk < Shape::kChunks; ++chunk) {
      float4 a[Shape::kRowTiles][2];
#pragma unroll
      for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          a[r][half] = as_floats(buffers.a[product_row<Shape>(r, half * 2)][chunk]);
        }
      }
#pragma unroll
      for (int c = 0; c < Shape::kColumnTiles; ++c) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const float4 b = as_floats(buffers.b[stage][product_column(c, side)][chunk]);
#pragma unroll
          for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              float& product = products[r][c][half * 2 + side];
              product = fmaf(a[r][half].x, b.x, product);
              product = fmaf(a[r][half].y, b.y, product);
              product = fmaf(a[r][half].z, b.z, product);
              product = fmaf(a[r][half].w, b.w, product);
            }
          }
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ float4 as_floats(const uint4& bits) {
    return make_float4(__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z),
                       __uint_as_float(bits.w));
  }
};

// Streams num_tiles tiles of B past the A tile. Calls prepare(stage, tile) when a tile is asked
// for, to put what belongs to its columns into shared memory, and consume(stage, tile, products).
template <typename Shape, typename RowA, typename RowB, typename Prepare, typename Consume>
__device__ __forceinline__ void stream_tiles(TileBuffers<Shape>& buffers, int row_bytes,
                                             bool aligned, int64_t num_tiles, RowA&& row_a,
                                             RowB&& row_b, Prepare&& prepare, Consume&& consume) {
  constexpr int kStages = Shape::kStages;
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

  TileMultiplier<Shape> multiplier;
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    const int stage = static_cast<int>(tile % kStages);
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this tile is there, and everybody is done with the one before
    fetch(tile + kStages - 1);
    if (tile == 0) multiplier.load(buffers);
    TileProducts<Shape> products = {};
    multiplier.multiply(buffers, stage, products);
    consume(stage, tile, products);
  }
  cp_async_wait<0>();
}

}  // namespace kvevict
