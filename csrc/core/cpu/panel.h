// SPDX-License-Identifier: Apache-2.0
// Products of rows with rows on the CPU. Those of one side are the lanes: kPanel of them are packed
// to [depth][kPanel] once and meet kTileRows rows of the other side, which are the registers, at a
// time. A product's bits depend on nothing but its two rows: each is one chain of multiply-adds.
#pragma once

#include <algorithm>

#include "core/cpu/panel_size.h"
#include "core/cpu/simd.h"

namespace kvevict {
inline namespace KVEVICT_ISA {

// 6 x 4 vectors of 16 lanes leave room in AVX-512's 32 registers, 6 x 2 of 8 in AVX2's 16.
inline constexpr int kTileRows = 6;
inline constexpr int kTileVecs = kLanes == 16 ? 4 : 2;
inline constexpr int kPanel = kTileVecs * kLanes;
static_assert(kPanel <= kMaxPanel && kMaxPanel % kPanel == 0 && kTileRows <= kMaxTileRows);

// How products are taken. An element of a packed row is 4 bytes.
struct Fp32Product {
  static constexpr int64_t kElements = 1;
  static Vec multiply_add(Vec sum, Vec lanes, float row) { return lanes * row + sum; }
  static Vec square_add(Vec sum, Vec lanes) { return lanes * lanes + sum; }
};
#if defined(__AVX512BF16__)
struct Bf16Product {  // an element is a pair of neighbouring dimensions
  static constexpr int64_t kElements = 2;
  static Vec multiply_add(Vec sum, Vec lanes, float row) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)lanes, (__m512bh)broadcast_bits(row));
  }
  static Vec square_add(Vec sum, Vec lanes) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)lanes, (__m512bh)lanes);
  }
  static Vec broadcast_bits(float row) { return (Vec)_mm512_set1_epi32(bit_cast<int32_t>(row)); }
};
#endif

template <DType dtype>
struct ProductOf {
  using type = Fp32Product;
  static constexpr DType kPacked = dtype;  // what packing converts from
};
#if defined(__AVX512BF16__)
template <>
struct ProductOf<DType::kBFloat16> {
  using type = Bf16Product;
  static constexpr DType kPacked = DType::kFloat32;  // pairs are moved as they are
};
#endif

// Packs elements [first, first + depth) of a row. flip: bits to invert in each.
template <DType dtype>
inline void pack_row(const void* row, int64_t first, int64_t depth, float* packed,
                     uint32_t flip = 0) {
  constexpr DType kPacked = ProductOf<dtype>::kPacked;
  int64_t d = 0;
  for (; d + kLanes <= depth; d += kLanes) {
    store(packed + d, bit_cast<UintVec>(load_as_float<kPacked>(row, first + d)) ^ flip);
  }
  for (; d < depth; ++d) {
    const float element = element_as_float<kPacked>(row, first + d);
    packed[d] = bit_cast<float>(bit_cast<uint32_t>(element) ^ flip);
  }
}

// Packs elements [first, first + depth) of kPanel rows, address(i) being that of row i.
template <DType dtype, typename Address>
inline void pack_panel(int64_t first, int64_t depth, float* panel, Address&& address) {
  constexpr DType kPacked = ProductOf<dtype>::kPacked;
  for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
    const void* sources[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) sources[i] = address(lane + i);
    if (depth < kLanes) {
      for (int64_t d = 0; d < depth; ++d) {
        for (int64_t i = 0; i < kLanes; ++i) {
          panel[d * kPanel + lane + i] = element_as_float<kPacked>(sources[i], first + d);
        }
      }
      continue;
    }
    for (int64_t d = 0; d < depth; d += kLanes) {
      const int64_t start = std::min(d, depth - kLanes);  // the last step overlaps the one before
      Vec rows[kLanes];
      for (int i = 0; i < kLanes; ++i) rows[i] = load_as_float<kPacked>(sources[i], first + start);
      transpose(rows);
      for (int i = 0; i < kLanes; ++i) store(panel + (start + i) * kPanel + lane, rows[i]);
    }
  }
}

// Calls use_row(i, products) for the rows of a tile [num_rows][depth], with their products with
// num_vecs vectors of the panel.
template <typename Product, int num_rows, int num_vecs, typename F>
inline void multiply_tile(const float* rows, const float* panel, int64_t depth, F&& use_row) {
  Vec sums[num_rows][num_vecs];
#pragma GCC unroll 6
  for (int i = 0; i < num_rows; ++i) {  // one by one, or GCC clears memory and loads that
#pragma GCC unroll 4
    for (int j = 0; j < num_vecs; ++j) sums[i][j] = Vec{};
  }
  for (int64_t d = 0; d < depth; ++d) {
    Vec lanes[num_vecs];
#pragma GCC unroll 4
    for (int j = 0; j < num_vecs; ++j) lanes[j] = load<Vec>(panel + d * kPanel + j * kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < num_rows; ++i) {
      const float element = rows[i * depth + d];
#pragma GCC unroll 4
      for (int j = 0; j < num_vecs; ++j) {
        sums[i][j] = Product::multiply_add(sums[i][j], lanes[j], element);
      }
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < num_rows; ++i) use_row(i, sums[i]);
}

}  // namespace KVEVICT_ISA
}  // namespace kvevict
