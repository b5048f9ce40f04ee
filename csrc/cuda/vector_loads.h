// SPDX-License-Identifier: Apache-2.0
// Rows of a tensor in registers: 16 bytes at a time, as they are stored or as floats.
#pragma once

#include "core/dtype.h"
#include "core/head_tensor.h"
#include "cuda/ptx.h"

namespace kvevict {

// Whether all rows of a tensor start on 16 bytes.
inline bool rows_aligned(const HeadTensor& tensor, int element_bytes) {
  const auto address = reinterpret_cast<intptr_t>(tensor.data);
  const int64_t strides = tensor.stride_batch | tensor.stride_head | tensor.stride_seq;
  return address % 16 == 0 && strides * element_bytes % 16 == 0;
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

// Eight neighboring elements of a row, in the bits in which they are stored.
template <DType dtype>
struct EightElements {
  static constexpr int kVectors = 8 * kElementBytes<dtype> / 16;
  uint4 vectors[kVectors];

  // The index-th eight; zeros behind the end of the row and where there is no row.
  __device__ __forceinline__ void read(const char* row, int index, int row_bytes, bool aligned) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      vectors[i] = read_chunk(row, index * kVectors + i, row_bytes, aligned);
    }
  }

  __device__ __forceinline__ void to_floats(float (&elements)[8]) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const uint32_t words[4] = {vectors[i].x, vectors[i].y, vectors[i].z, vectors[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (dtype == DType::kFloat32) {
          elements[4 * i + j] = __uint_as_float(words[j]);
        } else if constexpr (dtype == DType::kBFloat16) {
          elements[2 * j] = __uint_as_float(words[j] << 16);
          elements[2 * j + 1] = __uint_as_float(words[j] & 0xFFFF0000u);
        } else {
          elements[2 * j] = fp16_to_float(static_cast<uint16_t>(words[j]));
          elements[2 * j + 1] = fp16_to_float(static_cast<uint16_t>(words[j] >> 16));
        }
      }
    }
  }
};

}  // namespace kvevict
