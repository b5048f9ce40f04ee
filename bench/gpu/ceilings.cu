// SPDX-License-Identifier: Apache-2.0
// What a GPU can do at most, on random data: prints one line of JSON with rates per second.
// Copies count bytes read and written; mma.sync is bf16 m16n8k16 with fp32 sums.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

namespace {

constexpr int kRepeats = 20;
constexpr int kThreads = 256;
constexpr int64_t kBytes = int64_t{2} << 30;  // of the source and of the destination
constexpr int kRowVectors = 16;               // a row of 256 bytes
constexpr int kUnroll = 4;                    // independent loads in flight of a thread
constexpr int kChains = 8;                    // independent results of a thread or warp
constexpr int kMmaSteps = 4096;
constexpr int kEx2Steps = 8192;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}
#define CHECK(call) check(call, #call)

__device__ uint32_t scramble(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352dU;
  x = (x ^ (x >> 15)) * 0x846ca68bU;
  return x ^ (x >> 16);
}

// Two bf16 numbers of either sign with a magnitude in [1, 2).
__device__ uint32_t random_bf16_pair(uint32_t x) {
  return 0x3F803F80U | (scramble(x) & 0x807F807FU);
}

__global__ void fill_kernel(uint32_t* output, int64_t count) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    output[i] = random_bf16_pair(static_cast<uint32_t>(i) ^ static_cast<uint32_t>(i >> 32));
  }
}

// Every block takes kUnroll * kThreads neighboring vectors.
__global__ void copy_kernel(const uint4* __restrict__ input, uint4* __restrict__ output) {
  const int64_t first = int64_t{blockIdx.x} * kUnroll * kThreads + threadIdx.x;
  uint4 loaded[kUnroll];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) loaded[i] = __ldcs(input + first + i * kThreads);
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) __stcs(output + first + i * kThreads, loaded[i]);
}

__global__ void read_kernel(const uint4* __restrict__ input, uint32_t* output) {
  const int64_t first = int64_t{blockIdx.x} * kUnroll * kThreads + threadIdx.x;
  uint4 loaded[kUnroll];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) loaded[i] = __ldcs(input + first + i * kThreads);
  uint32_t all = 0;
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) all |= loaded[i].x & loaded[i].y & loaded[i].z & loaded[i].w;
  if (all == 1) *output = all;  // the exponent bits are set: never true, and the loads stay
}

// Every row of the output is a random row of the input, of which there are row_mask + 1.
__global__ void gather_kernel(const uint4* __restrict__ input, uint4* __restrict__ output,
                              uint32_t row_mask) {
  const int64_t first = int64_t{blockIdx.x} * kUnroll * kThreads + threadIdx.x;
  uint4 loaded[kUnroll];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    const int64_t vector = first + i * kThreads;
    const int64_t row = scramble(static_cast<uint32_t>(vector / kRowVectors)) & row_mask;
    loaded[i] = __ldcs(input + row * kRowVectors + vector % kRowVectors);
  }
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) __stcs(output + first + i * kThreads, loaded[i]);
}

__global__ void __launch_bounds__(kThreads) mma_kernel(const uint32_t* input, float* output) {
  uint32_t a[4];
  uint32_t b[kChains][2];
  float d[kChains][4] = {};
  for (int i = 0; i < 4; ++i) a[i] = input[threadIdx.x * 4 + i];
  for (int chain = 0; chain < kChains; ++chain) {
    for (int i = 0; i < 2; ++i) b[chain][i] = input[4096 + (threadIdx.x * kChains + chain) * 2 + i];
  }
  for (int step = 0; step < kMmaSteps; ++step) {
#pragma unroll
    for (int chain = 0; chain < kChains; ++chain) {
      float (&sum)[4] = d[chain];
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
          "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
          : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[chain][0]), "r"(b[chain][1]));
    }
  }
  float total = 0;
  for (int chain = 0; chain < kChains; ++chain) {
    for (int i = 0; i < 4; ++i) total += d[chain][i];
  }
  output[int64_t{blockIdx.x} * blockDim.x + threadIdx.x] = total;
}

// x = 2^-x stays between 0 and 1.
__global__ void __launch_bounds__(kThreads) ex2_kernel(const uint32_t* input, float* output) {
  float x[kChains];
  for (int i = 0; i < kChains; ++i) {
    x[i] = static_cast<float>(input[threadIdx.x * kChains + i] & 0x7FFFU) / 32768.0F;
  }
  for (int step = 0; step < kEx2Steps; ++step) {
#pragma unroll
    for (int i = 0; i < kChains; ++i) {
      asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(x[i]) : "f"(-x[i]));
    }
  }
  float total = 0;
  for (int i = 0; i < kChains; ++i) total += x[i];
  output[int64_t{blockIdx.x} * blockDim.x + threadIdx.x] = total;
}

// Median seconds of a call.
double seconds(const std::function<void()>& call) {
  cudaEvent_t start;
  cudaEvent_t stop;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&stop));
  for (int i = 0; i < 3; ++i) call();
  std::vector<float> milliseconds(kRepeats);
  for (float& each : milliseconds) {
    CHECK(cudaEventRecord(start));
    call();
    CHECK(cudaEventRecord(stop));
    CHECK(cudaGetLastError());
    CHECK(cudaEventSynchronize(stop));
    CHECK(cudaEventElapsedTime(&each, start, stop));
  }
  std::sort(milliseconds.begin(), milliseconds.end());
  return milliseconds[kRepeats / 2] * 1e-3;
}

}  // namespace

int main() {
  int device = 0;
  cudaDeviceProp properties;
  CHECK(cudaGetDevice(&device));
  CHECK(cudaGetDeviceProperties(&properties, device));
  uint4* source = nullptr;
  uint4* target = nullptr;
  CHECK(cudaMalloc(&source, kBytes));
  CHECK(cudaMalloc(&target, kBytes));
  auto* words = reinterpret_cast<uint32_t*>(source);
  auto* floats = reinterpret_cast<float*>(target);
  fill_kernel<<<4096, kThreads>>>(words, kBytes / 4);
  fill_kernel<<<4096, kThreads>>>(reinterpret_cast<uint32_t*>(target), kBytes / 4);
  CHECK(cudaDeviceSynchronize());

  const int64_t vectors = kBytes / int64_t{sizeof(uint4)};
  const auto blocks = static_cast<unsigned>(vectors / (kUnroll * kThreads));
  const auto row_mask = static_cast<uint32_t>(vectors / kRowVectors - 1);
  const double memcpy_seconds =
      seconds([&] { CHECK(cudaMemcpyAsync(target, source, kBytes, cudaMemcpyDeviceToDevice)); });
  const double copy_seconds = seconds([&] { copy_kernel<<<blocks, kThreads>>>(source, target); });
  const double read_seconds = seconds(
      [&] { read_kernel<<<blocks, kThreads>>>(source, reinterpret_cast<uint32_t*>(target)); });
  const double gather_seconds =
      seconds([&] { gather_kernel<<<blocks, kThreads>>>(source, target, row_mask); });

  const unsigned busy = static_cast<unsigned>(properties.multiProcessorCount) * 8;
  const double mma_seconds = seconds([&] { mma_kernel<<<busy, kThreads>>>(words, floats); });
  const double ex2_seconds = seconds([&] { ex2_kernel<<<busy, kThreads>>>(words, floats); });
  CHECK(cudaDeviceSynchronize());

  const double warps = double{1} * busy * kThreads / 32;
  const double flops = warps * kChains * kMmaSteps * (2.0 * 16 * 8 * 16);
  const double exponentials = double{1} * busy * kThreads * kChains * kEx2Steps;
  std::printf(
      "{\"memcpy_rate\": %.6e, \"kernel_copy_rate\": %.6e, \"read_rate\": %.6e, "
      "\"gather_256_rate\": %.6e, \"mma_sync_flops\": %.6e, \"ex2_rate\": %.6e}\n",
      2.0 * kBytes / memcpy_seconds, 2.0 * kBytes / copy_seconds, 1.0 * kBytes / read_seconds,
      2.0 * kBytes / gather_seconds, flops / mma_seconds, exponentials / ex2_seconds);
  return 0;
}
