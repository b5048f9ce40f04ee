// SPDX-License-Identifier: Apache-2.0
// Rows of a tensor as floats in registers, several elements per thread.
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

// Eight neighboring elements of a row, in the bits in which they are stored.
template <DType dtype>
struct EightElements {
  static constexpr int kVectors = 8 * kElementBytes<dtype> / 16;
  uint4 vectors[kVectors];

  // aligned: to 16 bytes, else only to an element.
  __device__ __forceinline__ void load(const char* source, bool aligned) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      vectors[i] = aligned ? __ldg(reinterpret_cast<const uint4*>(source) + i)
                           : load_unaligned(source + 16 * i);
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

 private:
  static __device__ __forceinline__ uint4 load_unaligned(const char* source) {
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (dtype == DType::kFloat32) {
        words[j] = __ldg(reinterpret_cast<const uint32_t*>(source) + j);
      } else {
        const auto* halves = reinterpret_cast<const uint16_t*>(source) + 2 * j;
        words[j] = __ldg(halves) | static_cast<uint32_t>(__ldg(halves + 1)) << 16;
      }
    }
    return {words[0], words[1], words[2], words[3]};
  }
};

}  // namespace kvevict
