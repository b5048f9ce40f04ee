// SPDX-License-Identifier: Apache-2.0
#include "ops/key_diversity/key_diversity.h"

#include "core/cpu/simd.h"

namespace kvevict {
namespace {

constexpr int kStep = 2 * kLanes;  // elements of a key that are taken at a time
static_assert(KeySums::kMaxStep % kStep == 0);

struct VecPair {
  Vec first, second;
};

// kStep elements as floats. The even elements of bfloat16 come first, then the odd ones: that is
// cheaper than widening them, and no sum here asks for the place of an element.
template <DType dtype>
VecPair load_step(const void* source, int64_t index) {
  if constexpr (dtype == DType::kBFloat16) {
    const auto pairs = load<UintVec>(static_cast<const uint16_t*>(source) + index);
    return {bit_cast<Vec>(pairs << 16), bit_cast<Vec>(pairs & 0xFFFF0000u)};
  } else {
    return {load_as_float<dtype>(source, index), load_as_float<dtype>(source, index + kLanes)};
  }
}

// Spelled out so that they stay in registers.
void set_to_zero(Vec (&vectors)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) vectors[i] = Vec{};
}

// Keys of a head: where they are and which are real.
template <DType dtype>
struct HeadKeys {
  const char* rows;
  int64_t stride_bytes;
  int64_t head_dim, kv_len;
  const bool* mask;  // or null

  HeadKeys(const KeyDiversityParams& params, int64_t head)
      : rows(static_cast<const char*>(element_address<dtype>(params.key, head / params.num_kv_heads,
                                                             head % params.num_kv_heads, 0))),
        stride_bytes(params.key.stride_seq * kElementBytes<dtype>),
        head_dim(params.head_dim),
        kv_len(params.kv_len),
        mask(params.mask_of(head)) {}

  const char* row(int64_t key_index) const { return rows + key_index * stride_bytes; }

  // Of keys [first, first + kLanes), which ones are there and not masked.
  IntVec real(int64_t first) const {
    const int64_t count = kv_len - first;
    const IntVec there = first_lanes(count);
    if (!mask) return there;
    const auto bytes = load_up_to<Bytes>(mask + first, count);
    return there & (__builtin_convertvector(bytes, IntVec) != 0);
  }
};

constexpr int64_t kMaxHeadDim = 256;
constexpr float kZeros[kMaxHeadDim] = {};

// kLanes neighboring keys. Zeros stand in for those that are not real.
template <DType dtype>
class KeyBlock {
 public:
  KeyBlock(const HeadKeys<dtype>& head, int64_t first, IntVec real)
      : stride_bytes_(head.stride_bytes),
        whole_steps_(head.head_dim / kStep * kStep),
        rest_(head.head_dim - whole_steps_) {
    for (int i = 0; i < kLanes; ++i) keys_[i] = head.row(first + i);
    for (uint32_t missing = to_bits(~real); missing != 0; missing &= missing - 1) {
      keys_[__builtin_ctz(missing)] = reinterpret_cast<const char*>(kZeros);
    }
    if (rest_ == 0) return;
    memset(rests_, 0, sizeof(rests_));
    for (int i = 0; i < kLanes; ++i) {
      constexpr int64_t kUnit = 8;  // every head_dim is a multiple of it
      for (int64_t d = 0; d < rest_; d += kUnit) {
        memcpy(rests_[i] + d * kElementBytes<dtype>,
               keys_[i] + (whole_steps_ + d) * kElementBytes<dtype>, kUnit * kElementBytes<dtype>);
      }
    }
  }

  // Calls f(d, load) for elements [d, d + kStep) of all keys: load(i) gives those of key i.
  template <typename F>
  void visit_steps(F&& f) const {
    for (int64_t d = 0; d < whole_steps_; d += kStep) {
      f(d, [&](int i) { return load_step<dtype>(keys_[i], d); });
    }
    if (rest_ > 0) f(whole_steps_, [&](int i) { return load_step<dtype>(rests_[i], 0); });
  }

  // The same, and fetches as many keys from `ahead` on into the second-level cache meanwhile.
  template <typename F>
  void visit_steps(const char* ahead, F&& f) const {
    constexpr int64_t kLine = 64, kStepBytes = kStep * kElementBytes<dtype>;
    visit_steps([&](int64_t d, auto&& load_key) {
      const char* lines = ahead + d * kElementBytes<dtype>;
      for (int64_t i = 0; i < kLanes; ++i, lines += stride_bytes_) {
        for (int64_t byte = 0; byte < kStepBytes; byte += kLine) {
          _mm_prefetch(lines + byte, _MM_HINT_T1);
        }
      }
      f(d, load_key);
    });
  }

 private:
  const char* keys_[kLanes];
  int64_t stride_bytes_, whole_steps_, rest_;
  alignas(64) char rests_[kLanes][kStep * kElementBytes<dtype>];  // zeros behind the last element
};

// How many keys ahead of the current ones memory is asked for them. Past the last key that does no
// harm.
constexpr int64_t kAhead = 64;

// Calls f(first) for the keys of a chunk, kLanes at a time.
template <typename F>
void visit_chunk(const KeyDiversityParams& params, int64_t chunk, F&& f) {
  const int64_t begin = chunk * KeySums::kChunkKeys;
  const int64_t end = std::min(begin + KeySums::kChunkKeys, params.kv_len);
  for (int64_t first = begin; first < end; first += kLanes) f(first);
}

// Sums up the unit keys of a chunk and leaves their scales where their similarities will be.
template <DType dtype>
void sum_chunk(const KeyDiversityParams& params, int64_t head, int64_t chunk, const KeySums& sums) {
  const HeadKeys<dtype> keys(params, head);
  const int64_t head_dim = KeySums::padded_head_dim(params);
  float* sum = sums.chunk_sums + chunk * head_dim;
  std::fill(sum, sum + head_dim, 0.0f);
  int64_t len = 0;
  visit_chunk(params, chunk, [&](int64_t first) {
    const IntVec real = keys.real(first);
    const KeyBlock<dtype> block(keys, first, real);
    Vec squares[kLanes];
    set_to_zero(squares);
    block.visit_steps(keys.row(first + kAhead), [&](int64_t, auto&& load_key) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const VecPair key = load_key(i);
        squares[i] = key.first * key.first + squares[i];
        squares[i] = key.second * key.second + squares[i];
      }
    });
    float scales[kLanes];
    store(scales, reduce_add(squares));
    for (float& scale : scales) scale = unit_scale(scale);
    store(scales, real ? load<Vec>(scales) : Vec{});
    store_up_to(params.similarity + head * params.kv_len + first, params.kv_len - first,
                load<Vec>(scales));
    block.visit_steps([&](int64_t d, auto&& load_key) {
      VecPair total{load<Vec>(sum + d), load<Vec>(sum + d + kLanes)};
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const VecPair key = load_key(i);
        total.first = key.first * scales[i] + total.first;
        total.second = key.second * scales[i] + total.second;
      }
      store(sum + d, total.first);
      store(sum + d + kLanes, total.second);
    });
    len += __builtin_popcount(to_bits(real));
  });
  sums.chunk_lens[chunk] = len;
}

// The mean of a head's unit keys, from the sums of its chunks, and its redundancy.
void average_chunks(const KeyDiversityParams& params, int64_t head, const KeySums& sums) {
  const int64_t head_dim = KeySums::padded_head_dim(params);
  double total[kMaxHeadDim] = {};
  int64_t count = 0;
  for (int64_t chunk = 0; chunk < KeySums::num_chunks(params); ++chunk) {
    for (int64_t d = 0; d < head_dim; ++d) total[d] += sums.chunk_sums[chunk * head_dim + d];
    count += sums.chunk_lens[chunk];
  }
  double square = 0.0;
  for (int64_t d = 0; d < head_dim; ++d) {
    square += total[d] * total[d];
    sums.mean[d] = static_cast<float>(total[d] / static_cast<double>(std::max<int64_t>(count, 1)));
  }
  params.redundancy[head] = mean_cosine(square, count);
}

// Turns the scales of a chunk into similarities.
template <DType dtype>
void compare_chunk(const KeyDiversityParams& params, int64_t head, int64_t chunk,
                   const float* mean) {
  const HeadKeys<dtype> keys(params, head);
  visit_chunk(params, chunk, [&](int64_t first) {
    const IntVec real = keys.real(first);
    const KeyBlock<dtype> block(keys, first, real);
    Vec products[kLanes];
    set_to_zero(products);
    block.visit_steps(keys.row(first + kAhead), [&](int64_t d, auto&& load_key) {
      const auto mean_first = load<Vec>(mean + d), mean_second = load<Vec>(mean + d + kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const VecPair key = load_key(i);
        products[i] = key.first * mean_first + products[i];
        products[i] = key.second * mean_second + products[i];
      }
    });
    float* similarity = params.similarity + head * params.kv_len + first;
    const Vec product = reduce_add(products) * load_up_to<Vec>(similarity, params.kv_len - first);
    store_up_to(similarity, params.kv_len - first, real ? product : Vec{});
  });
}

template <DType dtype>
void run(const KeyDiversityParams& params, const CpuWork& work) {
  const int64_t num_chunks = KeySums::num_chunks(params);
  if (!KeyDiversity::splits_heads(params, work.num_threads)) {
    Arena scratch(work.scratch);
    const KeySums sums = KeySums::carve(scratch, params, 1);
    for (int64_t head = work.begin; head < work.end; ++head) {
      for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
        sum_chunk<dtype>(params, head, chunk, sums);
      }
      average_chunks(params, head, sums);
      for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
        compare_chunk<dtype>(params, head, chunk, sums.mean);
      }
    }
    return;
  }
  Arena shared(work.shared);
  const KeySums all_sums = KeySums::carve(shared, params, params.num_heads());
  for (int64_t item = work.begin; item < work.end; ++item) {
    const int64_t head = work.phase == 1 ? item : item / num_chunks;
    const KeySums sums = all_sums.of_head(params, head);
    switch (work.phase) {
      case 0: sum_chunk<dtype>(params, head, item % num_chunks, sums); break;
      case 1: average_chunks(params, head, sums); break;
      default: compare_chunk<dtype>(params, head, item % num_chunks, sums.mean);
    }
  }
}

}  // namespace

template <>
void KeyDiversity::run_cpu<kThisIsa>(const KeyDiversityParams& params,
                                     const CpuWork& work) noexcept {
  dispatch_dtype(params.dtype, [&](auto dtype) { run<dtype.value>(params, work); });
}

}  // namespace kvevict
