// SPDX-License-Identifier: Apache-2.0
#include "emulation/kernels.h"

#include "cuda/launch.h"
#include "cuda/ptx.h"

namespace kvevict::emulation_test {
namespace {

// --- Sums of rows --------------------------------------------------------------------------------

constexpr int kSumThreads = kRowSumTile / 4;
constexpr int kSumWarps = kSumThreads / 32;

struct RowSumShared {
  float4 tiles[2][kSumThreads];
  float partial[kSumWarps];
};

enum class Mistake {
  kNone,
  kNoWait,
  kNoBarrierAfterWait,
  kNoBarrierBeforeOverwrite,
  kNoBarrierBeforePartial,
  kIndexOutOfBounds,
  kCopyInFlight,
  kTooLittleShared,
};
constexpr const char* kMistakes[] = {"none",
                                     "no_wait",
                                     "no_barrier_after_wait",
                                     "no_barrier_before_overwrite",
                                     "no_barrier_before_partial",
                                     "index_out_of_bounds",
                                     "copy_in_flight",
                                     "too_little_shared"};

__device__ float warp_sum(float value) {
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, distance);
  }
  return value;
}

__global__ void __launch_bounds__(kSumThreads)
    row_sum_kernel(Mistake mistake, const float* rows, float* sums, int num_tiles) {
  auto& shared = shared_memory<RowSumShared>();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const auto* row =
      reinterpret_cast<const float4*>(rows) + int64_t{blockIdx.x} * num_tiles * kSumThreads;
  const auto fetch = [&](int tile) {
    if (tile < num_tiles) {
      cp_async_16(&shared.tiles[tile % 2][thread], row + tile * kSumThreads + thread);
    }
    cp_async_commit();
  };

  float sum = 0.0f;
  fetch(0);
  for (int tile = 0; tile < num_tiles; ++tile) {
    fetch(tile + 1);
    if (mistake != Mistake::kNoWait) cp_async_wait<1>();
    if (mistake != Mistake::kNoBarrierAfterWait) __syncthreads();
    const float4 part = shared.tiles[tile % 2][(thread + 32) % kSumThreads];  // another warp's
    sum += (part.x + part.y) + (part.z + part.w);
    if (mistake != Mistake::kNoBarrierBeforeOverwrite) __syncthreads();
  }
  cp_async_wait<0>();
  if (mistake == Mistake::kCopyInFlight) fetch(0);

  sum = warp_sum(sum);
  if (thread % 32 == 0) {
    shared.partial[mistake == Mistake::kIndexOutOfBounds ? warp + 1 : warp] = sum;
  }
  if (mistake != Mistake::kNoBarrierBeforePartial) __syncthreads();
  if (warp == 0) {
    const float total = warp_sum(thread < kSumWarps ? shared.partial[thread] : 0.0f);
    if (thread == 0) sums[blockIdx.x] = total;
  }
}

// --- Matrices ------------------------------------------------------------------------------------

struct MultiplyShared {
  uint4 a[16][2];  // 32 bytes of depth
  uint4 b[8][2];
};

template <Element element>
__global__ void multiply_kernel(const uint4* a, const uint4* b, float* d, int num_steps) {
  auto& shared = shared_memory<MultiplyShared>();
  const int lane = static_cast<int>(threadIdx.x);
  float sums[4] = {};
  for (int step = 0; step < num_steps; ++step) {
    __syncwarp();
    shared.a[lane / 2][lane % 2] = a[lane / 2 * 2 * num_steps + 2 * step + lane % 2];
    if (lane < 16) shared.b[lane / 2][lane % 2] = b[lane / 2 * 2 * num_steps + 2 * step + lane % 2];
    __syncwarp();
    uint32_t fragment[4], both[4];
    ldmatrix_x4(fragment, &shared.a[lane % 16][lane / 16]);
    ldmatrix_x4(both, &shared.b[lane % 8][lane / 8 % 2]);
    const uint32_t column[2] = {both[0], both[1]};
    if constexpr (element == Element::kBf16) mma_bf16(sums, fragment, column);
    if constexpr (element == Element::kFp16) mma_fp16(sums, fragment, column);
  }
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

// --- Collectives ---------------------------------------------------------------------------------

constexpr const char* kCollectives[] = {"rotate",      "rotate_in_8",  "up_3",        "up_3_in_16",
                                        "down_5",      "down_5_in_8",  "xor_6",       "xor_6_in_4",
                                        "ballot",      "any",          "all",         "match",
                                        "reduce_add",  "reduce_min",   "reduce_max",  "reduce_or",
                                        "add_in_half", "halves_apart", "exited_lanes"};

__global__ void collective_kernel(const int* values, int* results) {
  const int lane = static_cast<int>(threadIdx.x);
  const int value = values[lane];
  const auto bits = static_cast<unsigned>(value);
  const unsigned half = lane < 16 ? 0x0000FFFFu : 0xFFFF0000u;
  int row = 0;
  const auto put = [&](auto result) { results[32 * row++ + lane] = static_cast<int>(result); };
  put(__shfl_sync(kFullWarp, value, lane + 1));
  put(__shfl_sync(kFullWarp, value, lane + 1, 8));
  put(__shfl_up_sync(kFullWarp, value, 3));
  put(__shfl_up_sync(kFullWarp, value, 3, 16));
  put(__shfl_down_sync(kFullWarp, value, 5));
  put(__shfl_down_sync(kFullWarp, value, 5, 8));
  put(__shfl_xor_sync(kFullWarp, value, 6));
  put(__shfl_xor_sync(kFullWarp, value, 6, 4));
  put(__ballot_sync(kFullWarp, value > 0));
  put(__any_sync(kFullWarp, value == 7));
  put(__all_sync(kFullWarp, value < 1000));
  put(__match_any_sync(kFullWarp, value));
  put(__reduce_add_sync(kFullWarp, value));
  put(__reduce_min_sync(kFullWarp, value));
  put(__reduce_max_sync(kFullWarp, value));
  put(__reduce_or_sync(kFullWarp, bits));
  put(__reduce_add_sync(half, value));
  // The halves of a warp need not do the same.
  if (lane < 16) {
    put(__shfl_xor_sync(half, value, 1));
  } else {
    put(__ballot_sync(half, value > 0));
  }
  if (lane >= 24) return;
  put(__reduce_add_sync(kFullWarp, value));
}

struct CountShared {
  unsigned counts[64];
};

__global__ void count_kernel(const int* values, int num_values, int* counts, int* total) {
  auto& shared = shared_memory<CountShared>();
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < 64) shared.counts[thread] = 0;
  __syncthreads();
  bool odd = false;
  for (int i = thread; i < num_values; i += static_cast<int>(blockDim.x)) {
    atomicAdd(&shared.counts[values[i]], 1u);
    odd |= values[i] % 2 != 0;
  }
  const int num_odd = __syncthreads_count(odd);
  if (thread < 64) counts[thread] = static_cast<int>(shared.counts[thread]);
  if (thread == 0) *total = num_odd;
}

__global__ void order_kernel(int* order, int* ticket) {
  order[atomicAdd(ticket, 1)] = static_cast<int>(blockIdx.x + threadIdx.x);
}

__global__ void empty_kernel() {}

// --- Misdeeds ------------------------------------------------------------------------------------

__global__ void deadlock_kernel(char*) {
  if (threadIdx.x % 32 < 16) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}
__global__ void different_collectives_kernel(char* memory) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (lane % 2) {
    memory[lane] = static_cast<char>(__shfl_xor_sync(kFullWarp, lane, 1));
  } else {
    memory[lane] = static_cast<char>(__ballot_sync(kFullWarp, lane));
  }
}
__global__ void different_masks_kernel(char*) {
  __syncwarp(threadIdx.x % 32 == 0 ? kFullWarp : 0xFFFFFFFEu);
  __syncthreads();
}
__global__ void not_in_the_mask_kernel(char*) { __syncwarp(2u); }
__global__ void lane_outside_the_mask_kernel(char* memory) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (lane < 16) memory[lane] = static_cast<char>(__shfl_xor_sync(0xFFFFu, lane, 16));
}
__global__ void mma_of_half_a_warp_kernel(char*) {
  if (threadIdx.x % 32 < 16) return;
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  mma_bf16(d, a, b);
}
__global__ void waits_forever_kernel(char* memory) {
  while (*static_cast<volatile char*>(memory) == 0) __nanosleep(100);
}
__global__ void trap_kernel(char*) { __trap(); }

__global__ void misaligned_copy_kernel(char* memory) {
  cp_async_16(&shared_memory<uint4>(), memory + 8);
  cp_async_wait<0>();
}
__global__ void copy_behind_shared_kernel(char* memory) {
  cp_async_16(&shared_memory<uint4>() + 64, memory);
  cp_async_wait<0>();
}
__global__ void misaligned_load_kernel(char* memory) {
  shared_memory<uint4>() = *reinterpret_cast<const uint4*>(memory + 8);
}
__global__ void misaligned_streaming_store_kernel(char* memory) {
  store_streaming(memory + 4, uint4{});
}
__global__ void null_pointer_kernel(char* memory) {
  memory -= reinterpret_cast<uintptr_t>(memory);
  *reinterpret_cast<int*>(memory) = 1;
}
__global__ void wild_pointer_kernel(char* memory) { memory[int64_t{1} << 46] = 1; }
__global__ void behind_shared_kernel(char*) {
  char* end = reinterpret_cast<char*>(&shared_memory<uint4>()) + 1024;
  end[threadIdx.x] = 1;
}
__global__ void just_behind_shared_kernel(char*) {
  // The launch gives 1000 bytes: not at the end of a page.
  char* end = reinterpret_cast<char*>(&shared_memory<uint4>()) + 1000;
  if (threadIdx.x == 0) *end = 1;
}
__global__ void behind_global_kernel(char* memory) {  // only the sanitizers notice
  if (threadIdx.x == 0) memory[64] = 1;
}
__global__ void endless_recursion_kernel(char* memory) {
  volatile char frame[512];
  frame[0] = *memory;
  if (frame[0] == 0) endless_recursion_kernel(memory);
  frame[1] = frame[0];
}
__global__ void shift_too_far_kernel(char* memory) {
  *memory = static_cast<char>(1 << (*memory + 32));
}
__global__ void division_by_zero_kernel(char* memory) { *memory = static_cast<char>(7 / *memory); }

struct Misdeed {
  const char* name;
  void (*kernel)(char*);
};
constexpr Misdeed kMisdeeds[] = {
    {"deadlock", deadlock_kernel},
    {"different_collectives", different_collectives_kernel},
    {"different_masks", different_masks_kernel},
    {"not_in_the_mask", not_in_the_mask_kernel},
    {"lane_outside_the_mask", lane_outside_the_mask_kernel},
    {"mma_of_half_a_warp", mma_of_half_a_warp_kernel},
    {"waits_forever", waits_forever_kernel},
    {"trap", trap_kernel},
    {"misaligned_copy", misaligned_copy_kernel},
    {"copy_behind_shared", copy_behind_shared_kernel},
    {"misaligned_load", misaligned_load_kernel},
    {"misaligned_streaming_store", misaligned_streaming_store_kernel},
    {"null_pointer", null_pointer_kernel},
    {"wild_pointer", wild_pointer_kernel},
    {"behind_shared", behind_shared_kernel},
    {"just_behind_shared", just_behind_shared_kernel},
    {"behind_global", behind_global_kernel},
    {"endless_recursion", endless_recursion_kernel},
    {"shift_too_far", shift_too_far_kernel},
    {"division_by_zero", division_by_zero_kernel},
};

// --- Speed ---------------------------------------------------------------------------------------

__global__ void barriers_kernel(int times, float*) {
  for (int i = 0; i < times; ++i) __syncthreads();
}
__global__ void shuffles_kernel(int times, float* result) {
  float sum = static_cast<float>(threadIdx.x);
  for (int i = 0; i < times; ++i) sum += __shfl_xor_sync(kFullWarp, sum, 1 + i % 16);
  result[threadIdx.x % 32] = sum;
}
__global__ void mmas_kernel(int times, float* result) {
  float d[4] = {};
  const uint32_t a[4] = {0x3F803F80u}, b[2] = {0x3F803F80u};
  for (int i = 0; i < times; ++i) mma_bf16(d, a, b);
  result[threadIdx.x % 32] = d[0];
}

template <size_t count>
std::vector<std::string> names_of(const char* const (&names)[count]) {
  return {names, names + count};
}

}  // namespace

std::vector<std::string> row_sum_mistakes() { return names_of(kMistakes); }

cudaError_t sum_rows(const std::string& mistake, const float* rows, float* sums, int num_rows,
                     int num_tiles) {
  int index = 0;
  while (mistake != kMistakes[index]) ++index;
  const auto chosen = static_cast<Mistake>(index);
  const unsigned missing = chosen == Mistake::kTooLittleShared ? 4 : 0;
  return launch(row_sum_kernel,
                {dim3(static_cast<unsigned>(num_rows)), dim3(kSumThreads),
                 static_cast<unsigned>(sizeof(RowSumShared)) - missing},
                nullptr, chosen, rows, sums, num_tiles);
}

cudaError_t multiply(Element element, const void* a, const void* b, float* d, int depth) {
  const auto run = [&](auto kernel) {
    return launch(kernel, {dim3(1), dim3(32), sizeof(MultiplyShared)}, nullptr,
                  static_cast<const uint4*>(a), static_cast<const uint4*>(b), d, depth / 16);
  };
  switch (element) {
    case Element::kBf16: return run(multiply_kernel<Element::kBf16>);
    case Element::kFp16: return run(multiply_kernel<Element::kFp16>);
  }
  return cudaErrorInvalidValue;
}

std::vector<std::string> collective_names() { return names_of(kCollectives); }

cudaError_t run_collectives(const int* values, int* results) {
  return launch(collective_kernel, {dim3(1), dim3(32)}, nullptr, values, results);
}

cudaError_t count_values(const int* values, int num_values, int* counts, int* total) {
  return launch(count_kernel, {dim3(1), dim3(96), sizeof(CountShared)}, nullptr, values, num_values,
                counts, total);
}

cudaError_t record_order(bool of_blocks, int* order, int* ticket, int count) {
  const dim3 many(static_cast<unsigned>(count)), one(1);
  return launch(order_kernel, {of_blocks ? many : one, of_blocks ? one : many}, nullptr, order,
                ticket);
}

cudaError_t launch_empty(dim3 grid, dim3 block, size_t shared_bytes, size_t allowed_bytes) {
  if (allowed_bytes > 0) {
    const auto bytes = static_cast<int>(allowed_bytes);
    const cudaError_t error =
        cudaFuncSetAttribute(empty_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
  }
  const cudaLaunchConfig_t config = {grid, block, shared_bytes, nullptr, nullptr, 0};
  return cudaLaunchKernelEx(&config, empty_kernel);
}

std::vector<std::string> misdeeds() {
  std::vector<std::string> names;
  for (const Misdeed& misdeed : kMisdeeds) names.emplace_back(misdeed.name);
  return names;
}

cudaError_t misbehave(const std::string& misdeed, void* memory) {
  for (const auto& [name, kernel] : kMisdeeds) {
    if (misdeed != name) continue;
    const unsigned shared_bytes = misdeed == "just_behind_shared" ? 1000 : 1024;
    return launch(kernel, {dim3(2), dim3(64), shared_bytes}, nullptr, static_cast<char*>(memory));
  }
  return cudaErrorInvalidValue;
}

cudaError_t repeat(const std::string& what, int num_threads, int times, float* result) {
  const auto kernel = what == "barrier"   ? barriers_kernel
                      : what == "shuffle" ? shuffles_kernel
                                          : mmas_kernel;
  return launch(kernel, {dim3(1), dim3(static_cast<unsigned>(num_threads))}, nullptr, times,
                result);
}

}  // namespace kvevict::emulation_test
