// SPDX-License-Identifier: Apache-2.0
// Radix select, then one sweep in index order: indices come out ascending and ties go to the lower
// index by construction. A short row takes one block and stays in shared memory; a long one is cut
// into segments, one per warp, and read twice: for the histogram of the keys' first digits, and to
// single out the few keys that share the first digit of the threshold.
#include "cuda/launch.h"
#include "cuda/reductions.h"
#include "ops/select_topk/select_topk.h"

namespace kvevict {
namespace {

// --- Tuning --------------------------------------------------------------------------------------

constexpr int kThreadsPerSm = 1536;     // what every architecture has room for
constexpr int kMaxShortRow = 48 << 10;  // and no longer than shared memory
constexpr int kMaxRowOf256Threads = 4 << 10;
constexpr int kMaxRowOf512Threads = 16 << 10;
constexpr int kVectorsInFlight = 4;  // of a thread that loads a short row
constexpr int kSegmentKeys = kWarpSize * kWarpSize;
constexpr int kSegmentThreads = 256;
constexpr int kSegmentsPerBlock = kSegmentThreads / kWarpSize;
constexpr int kKeysInFlight = 8;  // of a lane that reads a segment
constexpr int kDecideThreads = 1024;

// --- Radix select --------------------------------------------------------------------------------

// A key's digits, from the highest: 11, 11 and 10 bits.
constexpr int kNumDigits = 3;
constexpr int kBuckets = 1 << 11;
KVEVICT_HD constexpr int digit_shift(int digit) { return digit == 0 ? 21 : digit == 1 ? 10 : 0; }
KVEVICT_HD constexpr uint32_t digit_of(uint32_t key, int digit) {
  return key >> digit_shift(digit) & (digit == 2 ? kBuckets / 2 - 1 : kBuckets - 1);
}

struct Bucket {
  uint32_t index;
  uint32_t above;  // entries in higher buckets
  uint32_t count;  // entries in this one
};

// Kept are the keys above `key` and the first `ties` that equal it.
struct Threshold {
  uint32_t key;
  uint32_t ties;
};

template <int kThreads>
struct alignas(16) SelectShared {
  uint32_t histogram[kBuckets];
  uint32_t warp_sums[kThreads / kWarpSize];
  uint32_t warp_ties[kThreads / kWarpSize];
  Bucket bucket;
};

template <int kThreads>
__device__ void clear_histogram(SelectShared<kThreads>& shared) {
  for (int i = threadIdx.x; i < kBuckets; i += kThreads) shared.histogram[i] = 0;
  __syncthreads();
}

// The bucket of the need-th largest entry (1 <= need <= entries). Before: a barrier.
template <int kThreads>
__device__ Bucket find_bucket(SelectShared<kThreads>& shared, const uint32_t* histogram,
                              uint32_t need) {
  constexpr int kPerThread = kBuckets / kThreads;
  const int highest = kBuckets - 1 - kPerThread * static_cast<int>(threadIdx.x);
  uint32_t counts[kPerThread], sum = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) sum += counts[i] = histogram[highest - i];
  uint32_t above = block_exclusive_sum<kThreads>(sum, shared.warp_sums);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    if (above < need && need <= above + counts[i]) {
      shared.bucket = {static_cast<uint32_t>(highest - i), above, counts[i]};
    }
    above += counts[i];
  }
  __syncthreads();
  return shared.bucket;
}

// The threshold that keeps `need` keys, given the histogram of their first digits.
// visit(f) calls f(key) for all keys that may have the threshold's first digit, spread over the
// block. Stops early when a whole bucket is kept.
template <int kThreads, typename Visit>
__device__ Threshold find_threshold(SelectShared<kThreads>& shared, const uint32_t* histogram,
                                    uint32_t need, const Visit& visit) {
  Bucket bucket = find_bucket(shared, histogram, need);
  Threshold threshold{bucket.index << digit_shift(0), need - bucket.above};
#pragma unroll
  for (int digit = 1; digit < kNumDigits; ++digit) {
    if (bucket.count == threshold.ties) break;
    clear_histogram(shared);
    const uint32_t prefix = threshold.key >> digit_shift(digit - 1);
    visit([&](uint32_t key) {
      if (key >> digit_shift(digit - 1) == prefix) {
        atomicAdd(&shared.histogram[digit_of(key, digit)], 1u);
      }
    });
    __syncthreads();
    bucket = find_bucket(shared, shared.histogram, threshold.ties);
    threshold.key |= bucket.index << digit_shift(digit);
    threshold.ties -= bucket.above;
  }
  threshold.key = max(threshold.key, kKeyNever + 1);  // fill-in keys are never kept
  return threshold;
}

// Writes the indices of kept keys, 32 consecutive keys after the other. One per warp.
struct IndexWriter {
  int32_t* kept;
  Threshold threshold;
  uint32_t num_kept, num_ties;  // before the next key

  __device__ __forceinline__ void add(uint32_t key, int32_t index) {
    const bool tie = key == threshold.key;
    const unsigned ties = __ballot_sync(kFullWarp, tie);
    const uint32_t ties_before = num_ties + __popc(ties & lanes_before());
    const bool keep = key > threshold.key || (tie && ties_before < threshold.ties);
    const unsigned keeps = __ballot_sync(kFullWarp, keep);
    if (keep) kept[num_kept + __popc(keeps & lanes_before())] = index;
    num_kept += __popc(keeps);
    num_ties += __popc(ties);
  }
};

// --- Rows ----------------------------------------------------------------------------------------

// How many keys of a row are kept, and the class in which the last one is found: all keys of higher
// classes are kept, none of lower ones.
struct Need {
  uint32_t count;
  int decisive_class;
};

// classes: how many keys have each priority; not read where there are none.
template <int kThreads>
__device__ Need find_need(const SelectTopkParams& params, int64_t row,
                          SelectShared<kThreads>& shared, const uint32_t* classes) {
  int64_t limit = params.k;
  if (params.row_k) limit = max(min(int64_t{params.row_k[row]}, limit), int64_t{0});
  const int64_t never = params.priority ? classes[0] : 0;
  const auto count = static_cast<uint32_t>(min(limit, params.kv_len - never));
  if (count == 0 || !params.priority) return {count, 0};
  return {count, static_cast<int>(find_bucket(shared, classes, count).index)};
}

// The keys of a row. The priorities that decide by themselves are keys that beat or lose to every
// score.
struct KeyRow {
  const float* scores;
  const uint8_t* priority;  // or null
  uint32_t kv_len;
  int decisive_class;

  __device__ KeyRow(const SelectTopkParams& params, int64_t row, int decisive_class)
      : scores(params.scores + row * params.kv_len),
        priority(params.priority_of(row)),
        kv_len(static_cast<uint32_t>(params.kv_len)),
        decisive_class(decisive_class) {}

  __device__ __forceinline__ uint32_t key_of(uint32_t index, float score) const {
    const int key_class = priority ? __ldg(priority + index) : decisive_class;
    if (key_class == decisive_class) return order_key(score);
    return key_class > decisive_class ? kKeyAlways : kKeyNever;
  }
  // Key `index`, or kKeyNever outside of the row; indices before it wrap around.
  __device__ __forceinline__ uint32_t key(uint32_t index) const {
    return index < kv_len ? key_of(index, __ldg(scores + index)) : kKeyNever;
  }
  // Four keys, the first of which stands, or would stand, at a multiple of 16 bytes.
  __device__ __forceinline__ uint4 four_keys(uint32_t index) const {
    if (index >= kv_len || index + 3 >= kv_len) {
      return {key(index), key(index + 1), key(index + 2), key(index + 3)};
    }
    const float4 four = __ldg(reinterpret_cast<const float4*>(scores + index));
    return {key_of(index, four.x), key_of(index + 1, four.y), key_of(index + 2, four.z),
            key_of(index + 3, four.w)};
  }
};

// Adds the keys [begin, end) of a row to a histogram of their priorities.
template <int kThreads>
__device__ void count_classes(const uint8_t* priority, int64_t begin, int64_t end,
                              uint32_t* classes) {
  constexpr int kVector = sizeof(uint4);
  const auto lead = static_cast<int64_t>(reinterpret_cast<uintptr_t>(priority + begin) % kVector);
  for (int64_t i = begin - lead + kVector * threadIdx.x; i < end; i += kVector * kThreads) {
    if (i < begin || i + kVector > end) {
      for (int64_t j = max(i, begin); j < min(i + kVector, end); ++j) {
        atomicAdd(&classes[priority[j]], 1u);
      }
    } else {
      const uint4 vector = __ldg(reinterpret_cast<const uint4*>(priority + i));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        atomicAdd(&classes[vector.x >> (8 * j) & 0xFF], 1u);
        atomicAdd(&classes[vector.y >> (8 * j) & 0xFF], 1u);
        atomicAdd(&classes[vector.z >> (8 * j) & 0xFF], 1u);
        atomicAdd(&classes[vector.w >> (8 * j) & 0xFF], 1u);
      }
    }
  }
}

// Fills up a list behind the kept indices, together with the other threads.
__device__ void fill_up(int32_t* kept, int64_t count, int64_t k, int64_t thread,
                        int64_t num_threads) {
  for (int64_t i = count + thread; i < k; i += num_threads) kept[i] = -1;
}

// --- Short rows: one block each ------------------------------------------------------------------

// A row's slots begin where its scores' first 16 bytes do and hold kKeyNever before and behind it.
constexpr int64_t max_slots(int64_t kv_len) { return (kv_len + 3 + 3) / 4 * 4; }

template <int kThreads>
__global__ void __launch_bounds__(kThreads, kThreadsPerSm / kThreads)
    select_short_kernel(const SelectTopkParams params) {
  auto& shared = shared_memory<SelectShared<kThreads>>();
  auto* keys = reinterpret_cast<uint32_t*>(&shared + 1);  // [max_slots]
  const int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), warp = warp_index(), lane = lane_index();
  int32_t* kept = params.kept_indices + row * params.k;

  clear_histogram(shared);
  if (params.priority) {
    count_classes<kThreads>(params.priority_of(row), 0, params.kv_len, shared.histogram);
    __syncthreads();
  }
  const Need need = find_need(params, row, shared, shared.histogram);
  if (thread == 0) params.kept_lens[row] = static_cast<int32_t>(need.count);
  fill_up(kept, need.count, params.k, thread, kThreads);
  if (need.count == 0) return;
  if (params.priority) clear_histogram(shared);

  const KeyRow key_row(params, row, need.decisive_class);
  const int lead = static_cast<int>(reinterpret_cast<uintptr_t>(key_row.scores) / 4 % 4);
  const int num_slots = (lead + static_cast<int>(params.kv_len) + 3) / 4 * 4;
  for (int first = 4 * thread; first < num_slots; first += 4 * kThreads * kVectorsInFlight) {
    uint4 vectors[kVectorsInFlight];
#pragma unroll
    for (int i = 0; i < kVectorsInFlight; ++i) {
      vectors[i] = key_row.four_keys(first + 4 * kThreads * i - lead);
    }
#pragma unroll
    for (int i = 0; i < kVectorsInFlight; ++i) {
      const int slot = first + 4 * kThreads * i;
      if (slot >= num_slots) break;
      *reinterpret_cast<uint4*>(keys + slot) = vectors[i];
      atomicAdd(&shared.histogram[digit_of(vectors[i].x, 0)], 1u);
      atomicAdd(&shared.histogram[digit_of(vectors[i].y, 0)], 1u);
      atomicAdd(&shared.histogram[digit_of(vectors[i].z, 0)], 1u);
      atomicAdd(&shared.histogram[digit_of(vectors[i].w, 0)], 1u);
    }
  }
  __syncthreads();
  const Threshold threshold =
      find_threshold(shared, shared.histogram, need.count, [&](const auto& f) {
        for (int slot = 4 * thread; slot < num_slots; slot += 4 * kThreads) {
          const uint4 vector = *reinterpret_cast<const uint4*>(keys + slot);
          f(vector.x);
          f(vector.y);
          f(vector.z);
          f(vector.w);
        }
      });

  // Every warp lists a part of the row, behind what the warps before it list.
  const int part = (num_slots + kThreads - 1) / kThreads * kWarpSize;
  const int begin = min(warp * part, num_slots), end = min(begin + part, num_slots);
  uint32_t above = 0, ties = 0;
  for (int slot = begin + lane; slot < end; slot += kWarpSize) {
    above += keys[slot] > threshold.key;
    ties += keys[slot] == threshold.key;
  }
  above = __reduce_add_sync(kFullWarp, above);
  ties = __reduce_add_sync(kFullWarp, ties);
  if (lane == 0) {
    shared.warp_sums[warp] = above;
    shared.warp_ties[warp] = ties;
  }
  __syncthreads();
  const bool before = lane < warp;
  above = __reduce_add_sync(kFullWarp, before ? shared.warp_sums[lane] : 0u);
  ties = __reduce_add_sync(kFullWarp, before ? shared.warp_ties[lane] : 0u);
  IndexWriter writer{kept, threshold, above + min(ties, threshold.ties), ties};
  for (int slot = begin; slot < end; slot += kWarpSize) {
    const int mine = slot + lane;
    writer.add(mine < end ? keys[mine] : kKeyNever, mine - lead);
  }
}

// --- Long rows -----------------------------------------------------------------------------------

// What the kernels of a long row tell each other.
struct RowState {
  uint32_t classes[kBuckets];       // keys of each priority; the rest stays 0
  uint32_t first_digits[kBuckets];  // keys of each first digit
  Need need;
  Threshold threshold;
};

struct Segment {
  // Bit i of word w: key 32 * w + i has a higher first digit than the threshold, or the same.
  uint32_t above_bits[kWarpSize];
  uint32_t candidate_bits[kWarpSize];
  uint32_t num_above, num_candidates;
  uint32_t above_before, ties_before;  // the segment, in the whole row
  uint32_t candidates[kSegmentKeys];   // the keys that have the same, in order
};

struct LongRows {
  RowState* states;   // [num_rows]
  Segment* segments;  // [num_rows, num_segments]
  uint32_t num_segments;
  uint32_t blocks_per_row;  // of kernels with a warp per segment
  int64_t bytes;            // of the workspace

  LongRows(const SelectTopkParams& params, void* workspace)
      : num_segments(static_cast<uint32_t>((params.kv_len + kSegmentKeys - 1) / kSegmentKeys)),
        blocks_per_row((num_segments + kSegmentsPerBlock - 1) / kSegmentsPerBlock) {
    Arena arena(static_cast<std::byte*>(workspace));
    const int64_t num_rows = params.batch_size * params.num_heads;
    states = arena.take<RowState>(num_rows);
    segments = arena.take<Segment>(num_rows * num_segments);
    bytes = arena.bytes();
  }

  __device__ Segment* segments_of(int64_t row) const { return segments + row * num_segments; }
};

// The part of a row that a block of a kernel with a warp per segment sees.
struct BlockPlace {
  int64_t row;
  uint32_t block;    // of the row
  uint32_t segment;  // of this warp; may be behind the last one

  __device__ explicit BlockPlace(const LongRows& long_rows)
      : row(blockIdx.x / long_rows.blocks_per_row),
        block(blockIdx.x % long_rows.blocks_per_row),
        segment(block * kSegmentsPerBlock + warp_index()) {}

  // Of this lane's key in a word of the segment.
  __device__ uint32_t index(int word) const {
    return segment * kSegmentKeys + word * kWarpSize + lane_index();
  }
};

__global__ void __launch_bounds__(kSegmentThreads)
    count_classes_kernel(const SelectTopkParams params, const LongRows long_rows) {
  auto& shared = shared_memory<SelectShared<kSegmentThreads>>();
  const BlockPlace place(long_rows);
  constexpr int64_t kBlockKeys = kSegmentsPerBlock * kSegmentKeys;
  static_assert(kSegmentThreads == 256);  // a thread per class
  const int64_t begin = place.block * kBlockKeys;
  clear_histogram(shared);
  count_classes<kSegmentThreads>(params.priority_of(place.row), begin,
                                 min(begin + kBlockKeys, params.kv_len), shared.histogram);
  __syncthreads();
  const uint32_t count = shared.histogram[threadIdx.x];
  if (count) atomicAdd(&long_rows.states[place.row].classes[threadIdx.x], count);
}

// Calls f(w, read(w)) for all words w of a segment in order, with several reads under way. A word
// is the keys 32 * w, ..., one per lane.
template <typename Read, typename F>
__device__ __forceinline__ void visit_words(const Read& read, const F& f) {
  for (int first = 0; first < kWarpSize; first += kKeysInFlight) {
    uint32_t keys[kKeysInFlight];
#pragma unroll
    for (int i = 0; i < kKeysInFlight; ++i) keys[i] = read(first + i);
#pragma unroll
    for (int i = 0; i < kKeysInFlight; ++i) f(first + i, keys[i]);
  }
}

__global__ void __launch_bounds__(kSegmentThreads)
    count_digits_kernel(const SelectTopkParams params, const LongRows long_rows) {
  auto& shared = shared_memory<SelectShared<kSegmentThreads>>();
  const BlockPlace place(long_rows);
  RowState& state = long_rows.states[place.row];
  const Need need = find_need(params, place.row, shared, state.classes);
  if (place.block == 0 && threadIdx.x == 0) {
    state.need = need;
    params.kept_lens[place.row] = static_cast<int32_t>(need.count);
  }
  if (need.count == 0) return;
  clear_histogram(shared);
  if (place.segment < long_rows.num_segments) {
    const KeyRow row(params, place.row, need.decisive_class);
    visit_words([&](int word) { return row.key(place.index(word)); },
                [&](int, uint32_t key) { atomicAdd(&shared.histogram[digit_of(key, 0)], 1u); });
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kBuckets; i += kSegmentThreads) {
    if (shared.histogram[i]) atomicAdd(&state.first_digits[i], shared.histogram[i]);
  }
}

__global__ void __launch_bounds__(kSegmentThreads)
    split_kernel(const SelectTopkParams params, const LongRows long_rows) {
  auto& shared = shared_memory<SelectShared<kSegmentThreads>>();
  const BlockPlace place(long_rows);
  const RowState& state = long_rows.states[place.row];
  if (state.need.count == 0) return;
  const uint32_t bucket = find_bucket(shared, state.first_digits, state.need.count).index;
  if (place.segment >= long_rows.num_segments) return;
  Segment& segment = long_rows.segments_of(place.row)[place.segment];
  const int lane = lane_index();
  uint32_t num_above = 0, num_candidates = 0;
  const KeyRow row(params, place.row, state.need.decisive_class);
  visit_words([&](int word) { return row.key(place.index(word)); },
              [&](int word, uint32_t key) {
                const uint32_t digit = digit_of(key, 0);
                const unsigned above = __ballot_sync(kFullWarp, digit > bucket);
                const unsigned candidates = __ballot_sync(kFullWarp, digit == bucket);
                if (digit == bucket) {
                  segment.candidates[num_candidates + __popc(candidates & lanes_before())] = key;
                }
                if (lane == 0) {
                  segment.above_bits[word] = above;
                  segment.candidate_bits[word] = candidates;
                }
                num_above += __popc(above);
                num_candidates += __popc(candidates);
              });
  if (lane == 0) {
    segment.num_above = num_above;
    segment.num_candidates = num_candidates;
  }
}

// One block per row.
__global__ void __launch_bounds__(kDecideThreads) decide_kernel(const LongRows long_rows) {
  auto& shared = shared_memory<SelectShared<kDecideThreads>>();
  constexpr int kWarps = kDecideThreads / kWarpSize;
  const int64_t row = blockIdx.x;
  RowState& state = long_rows.states[row];
  Segment* segments = long_rows.segments_of(row);
  const uint32_t num_segments = long_rows.num_segments;
  if (state.need.count == 0) return;
  const Threshold threshold =
      find_threshold(shared, state.first_digits, state.need.count, [&](const auto& f) {
        for (uint32_t i = warp_index(); i < num_segments; i += kWarps) {
          const Segment& segment = segments[i];
          for (uint32_t j = lane_index(); j < segment.num_candidates; j += kWarpSize) {
            f(segment.candidates[j]);
          }
        }
      });
  if (threadIdx.x == 0) state.threshold = threshold;

  for (uint32_t i = warp_index(); i < num_segments; i += kWarps) {
    Segment& segment = segments[i];
    uint32_t above = 0, ties = 0;
    for (uint32_t j = lane_index(); j < segment.num_candidates; j += kWarpSize) {
      above += segment.candidates[j] > threshold.key;
      ties += segment.candidates[j] == threshold.key;
    }
    above = __reduce_add_sync(kFullWarp, above);
    ties = __reduce_add_sync(kFullWarp, ties);
    if (lane_index() == 0) {
      segment.above_before = segment.num_above + above;  // of the segment itself, until summed up
      segment.ties_before = ties;
    }
  }
  __syncthreads();
  // Every thread sums up over some segments.
  const uint32_t per_thread = (num_segments + kDecideThreads - 1) / kDecideThreads;
  const uint32_t begin = min(per_thread * threadIdx.x, num_segments);
  const uint32_t end = min(begin + per_thread, num_segments);
  uint32_t above = 0, ties = 0;
  for (uint32_t i = begin; i < end; ++i) {
    above += segments[i].above_before;
    ties += segments[i].ties_before;
  }
  above = block_exclusive_sum<kDecideThreads>(above, shared.warp_sums);
  ties = block_exclusive_sum<kDecideThreads>(ties, shared.warp_sums);
  for (uint32_t i = begin; i < end; ++i) {
    const uint32_t own_above = segments[i].above_before, own_ties = segments[i].ties_before;
    segments[i].above_before = above;
    segments[i].ties_before = ties;
    above += own_above;
    ties += own_ties;
  }
}

__global__ void __launch_bounds__(kSegmentThreads)
    list_kernel(const SelectTopkParams params, const LongRows long_rows) {
  const BlockPlace place(long_rows);
  const RowState& state = long_rows.states[place.row];
  int32_t* kept = params.kept_indices + place.row * params.k;
  fill_up(kept, state.need.count, params.k, place.block * kSegmentThreads + threadIdx.x,
          long_rows.blocks_per_row * kSegmentThreads);
  if (state.need.count == 0 || place.segment >= long_rows.num_segments) return;
  const Segment& segment = long_rows.segments_of(place.row)[place.segment];
  const int lane = lane_index();
  const unsigned above_bits = segment.above_bits[lane];
  const unsigned candidate_bits = segment.candidate_bits[lane];
  uint32_t num_candidates = 0;
  const uint32_t ties = segment.ties_before;
  IndexWriter writer{kept, state.threshold, segment.above_before + min(ties, state.threshold.ties),
                     ties};
  // The key of a candidate; of other keys whether they are above or below them.
  const auto read = [&](int word) {
    const unsigned above = __shfl_sync(kFullWarp, above_bits, word);
    const unsigned candidates = __shfl_sync(kFullWarp, candidate_bits, word);
    const uint32_t place_of_candidate = num_candidates + __popc(candidates & lanes_before());
    num_candidates += __popc(candidates);
    if (candidates >> lane & 1) return segment.candidates[place_of_candidate];
    return above >> lane & 1 ? kKeyAlways : kKeyNever;
  };
  visit_words(read, [&](int word, uint32_t key) {
    writer.add(key, static_cast<int32_t>(place.index(word)));
  });
}

// --- Launches ------------------------------------------------------------------------------------

template <int kThreads>
int64_t short_row_bytes(int64_t kv_len) {
  return sizeof(SelectShared<kThreads>) + max_slots(kv_len) * sizeof(uint32_t);
}

bool is_short(int64_t kv_len) {
  if (kv_len > kMaxShortRow) return false;
  int device = 0, shared_bytes = 0;
  (void)cudaGetDevice(&device);
  (void)cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return short_row_bytes<1024>(kv_len) <= shared_bytes;
}

int threads_for(int64_t kv_len) {
  return kv_len <= kMaxRowOf256Threads ? 256 : kv_len <= kMaxRowOf512Threads ? 512 : 1024;
}

}  // namespace

int64_t SelectTopk::cuda_workspace_bytes(const SelectTopkParams& params) {
  return is_short(params.kv_len) ? 0 : LongRows(params, nullptr).bytes;
}

int SelectTopk::launch_cuda(const SelectTopkParams& params, void* workspace,
                            void* stream) noexcept {
  const int64_t num_rows = params.batch_size * params.num_heads;
  if (num_rows == 0) return cudaSuccess;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const dim3 rows(static_cast<unsigned>(num_rows));
  cudaError_t error = cudaSuccess;
  if (is_short(params.kv_len)) {
    (void)dispatch_value<256, 512, 1024>(threads_for(params.kv_len), [&](auto threads) {
      const auto bytes = static_cast<unsigned>(short_row_bytes<threads>(params.kv_len));
      error =
          launch(select_short_kernel<threads>, {rows, dim3(threads), bytes}, cuda_stream, params);
    });
    return error;
  }

  const LongRows long_rows(params, workspace);
  error = cudaMemsetAsync(long_rows.states, 0, num_rows * sizeof(RowState), cuda_stream);
  const auto launch_segments = [&](auto* kernel) {
    if (error != cudaSuccess) return;
    const dim3 blocks(static_cast<unsigned>(num_rows * long_rows.blocks_per_row));
    const unsigned bytes = sizeof(SelectShared<kSegmentThreads>);
    error = launch(kernel, {blocks, dim3(kSegmentThreads), bytes}, cuda_stream, params, long_rows);
  };
  if (params.priority) launch_segments(count_classes_kernel);
  launch_segments(count_digits_kernel);
  launch_segments(split_kernel);
  if (error != cudaSuccess) return error;
  error = launch(decide_kernel, {rows, dim3(kDecideThreads), sizeof(SelectShared<kDecideThreads>)},
                 cuda_stream, long_rows);
  launch_segments(list_kernel);
  return error;
}

}  // namespace kvevict
