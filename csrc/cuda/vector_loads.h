// SPDX-License-Identifier: Apache-2.0
// Rows of a tensor in registers, 16 bytes at a time: as they are stored, as floats, and back.
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

// Elements as they are stored, 16 bytes of them or a single one, to floats.
template <DType dtype>
__device__ __forceinline__ void unpack(const uint4& words, float* elements) {
  const uint32_t each[] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (dtype == DType::kFloat32) {
      elements[i] = __uint_as_float(each[i]);
    } else if constexpr (dtype == DType::kBFloat16) {
      elements[2 * i] = __uint_as_float(each[i] << 16);
      elements[2 * i + 1] = __uint_as_float(each[i] & 0xFFFF0000u);
    } else {
      elements[2 * i] = fp16_to_float(static_cast<uint16_t>(each[i]));
      elements[2 * i + 1] = fp16_to_float(static_cast<uint16_t>(each[i] >> 16));
    }
  }
}
template <DType dtype>
__device__ __forceinline__ void unpack(uint32_t word, float* element) {
  *element = __uint_as_float(word);
}
template <DType dtype>
__device__ __forceinline__ void unpack(uint16_t word, float* element) {
  *element =
      dtype == DType::kBFloat16 ? __uint_as_float(uint32_t{word} << 16) : fp16_to_float(word);
}

// Floats to elements as they are stored.
template <DType dtype>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  return dtype == DType::kBFloat16 ? pack_bf16(low, high) : pack_fp16(low, high);
}
template <DType dtype>
__device__ __forceinline__ void pack(const float* elements, uint4& words) {
  if constexpr (dtype == DType::kFloat32) {
    words = {__float_as_uint(elements[0]), __float_as_uint(elements[1]),
             __float_as_uint(elements[2]), __float_as_uint(elements[3])};
  } else {
    words = {pack_pair<dtype>(elements[0], elements[1]), pack_pair<dtype>(elements[2], elements[3]),
             pack_pair<dtype>(elements[4], elements[5]),
             pack_pair<dtype>(elements[6], elements[7])};
  }
}
template <DType dtype>
__device__ __forceinline__ void pack(const float* element, uint32_t& word) {
  word = __float_as_uint(*element);
}
template <DType dtype>
__device__ __forceinline__ void pack(const float* element, uint16_t& word) {
  word = static_cast<uint16_t>(pack_pair<dtype>(*element, 0.0f));
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
    for (int i = 0; i < kVectors; ++i) unpack<dtype>(vectors[i], elements + i * (8 / kVectors));
  }
};

}  // namespace kvevict
