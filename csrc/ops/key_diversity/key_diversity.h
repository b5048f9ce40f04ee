// SPDX-License-Identifier: Apache-2.0
// How alike the keys of a head are: the mean cosine of a key to all keys is its cosine-like product
// with the mean of all unit keys, so no pair of keys ever meets.
#pragma once

#include <algorithm>
#include <cmath>

#include "core/arena.h"
#include "core/cpu/isa.h"
#include "core/dtype.h"
#include "core/head_tensor.h"

namespace kvevict {

struct KeyDiversityParams {
  HeadTensor key;        // [batch_size, num_kv_heads, kv_len, head_dim]
  const bool* key_mask;  // [batch_size, kv_len] or null; true = real token
  DType dtype;
  float* similarity;  // [batch_size, num_kv_heads, kv_len]
  float* redundancy;  // [batch_size, num_kv_heads]
  int64_t batch_size, num_kv_heads, kv_len, head_dim;

  int64_t num_heads() const { return batch_size * num_kv_heads; }

  KVEVICT_HD const bool* mask_of(int64_t head) const {
    return key_mask ? key_mask + head / num_kv_heads * kv_len : nullptr;
  }
};

// What makes a key with that sum of squares a unit key. Beyond float32 it is NaN, as for a key that
// has a NaN or an infinity.
KVEVICT_HD inline float unit_scale(float sum_of_squares) {
  constexpr float kMinNorm = 1e-12f;
  constexpr float kLargest = 0x1.fffffep127f;
  const float norm = sqrtf(sum_of_squares);
  return sum_of_squares <= kLargest ? 1.0f / (norm > kMinNorm ? norm : kMinNorm)
                                    : sum_of_squares - sum_of_squares;
}

// The mean cosine of two different keys, from the sum of all unit keys.
KVEVICT_HD inline float mean_cosine(double square_of_sum, int64_t num_keys) {
  if (num_keys < 2) return 0.0f;
  const auto n = static_cast<double>(num_keys);
  const double mean = (square_of_sum / n - 1.0) / (n - 1.0);
  return static_cast<float>(mean < 0.0 ? 0.0 : mean > 1.0 ? 1.0 : mean);
}

// Sums of unit keys on the CPU. Chunks are as long for any number of threads, and their sums are
// added in order: so is the mean.
struct KeySums {
  static constexpr int64_t kChunkKeys = 256;
  static constexpr int64_t kMaxStep = 32;  // the most elements that any instruction set takes

  float* chunk_sums;    // [num_heads, num_chunks, padded_head_dim]
  int64_t* chunk_lens;  // [num_heads, num_chunks], real keys
  float* mean;          // [num_heads, padded_head_dim]

  static int64_t num_chunks(const KeyDiversityParams& params) {
    return (params.kv_len + kChunkKeys - 1) / kChunkKeys;
  }
  static int64_t padded_head_dim(const KeyDiversityParams& params) {
    return (params.head_dim + kMaxStep - 1) / kMaxStep * kMaxStep;
  }
  static KeySums carve(Arena& arena, const KeyDiversityParams& params, int64_t num_heads) {
    const int64_t head_dim = padded_head_dim(params);
    return {arena.take<float>(num_heads * num_chunks(params) * head_dim),
            arena.take<int64_t>(num_heads * num_chunks(params)),
            arena.take<float>(num_heads * head_dim)};
  }
  KeySums of_head(const KeyDiversityParams& params, int64_t head) const {
    const int64_t first_chunk = head * num_chunks(params), head_dim = padded_head_dim(params);
    return {chunk_sums + first_chunk * head_dim, chunk_lens + first_chunk, mean + head * head_dim};
  }
};

struct KeyDiversity {
  static CpuPlan plan_cpu(const KeyDiversityParams& params, int num_threads) {
    constexpr int64_t kElementsPerThread = 1 << 17;
    const int64_t num_heads = params.num_heads(), num_chunks = KeySums::num_chunks(params);
    const bool splits = splits_heads(params, num_threads);
    Arena sums;
    KeySums::carve(sums, params, splits ? num_heads : 1);
    const int64_t item_keys = splits ? KeySums::kChunkKeys : std::max<int64_t>(params.kv_len, 1);
    const int64_t min_items =
        std::max<int64_t>(kElementsPerThread / (item_keys * params.head_dim), 1);
    if (!splits) return {1, {num_heads}, 0, sums.bytes(), min_items};
    const int64_t num_items = num_heads * num_chunks;
    return {3, {num_items, num_heads, num_items}, sums.bytes(), 0, min_items};
  }
  template <Isa isa>
  static void run_cpu(const KeyDiversityParams& params, const CpuWork& work) noexcept;

  static int64_t cuda_workspace_bytes(const KeyDiversityParams& params);
  static int launch_cuda(const KeyDiversityParams& params, void* workspace, void* stream) noexcept;

  // A thread takes whole heads, whose keys it finds in its cache when it meets them again, unless
  // more than a quarter of the threads would be left without.
  static bool splits_heads(const KeyDiversityParams& params, int64_t num_threads) {
    const int64_t num_heads = params.num_heads();
    const int64_t rounds = (num_heads + num_threads - 1) / num_threads;
    return 4 * num_heads < 3 * rounds * num_threads;
  }
};

}  // namespace kvevict
