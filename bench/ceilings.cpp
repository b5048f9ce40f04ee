// SPDX-License-Identifier: Apache-2.0
// What this machine can do at most: fused multiply-adds per second and bytes per second, measured
// with all given threads. Compiled at run time by ceilings.py for the host it runs on.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kFloats = kVectorBytes / sizeof(float);
typedef float FloatVector __attribute__((vector_size(kVectorBytes)));
typedef int64_t IntVector __attribute__((vector_size(kVectorBytes)));

// Enough independent chains to hide the latency of two pipes, few enough to stay in registers.
constexpr int kChains = 12;

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Runs work(thread) on all threads at once; returns the seconds from the common start to the end
// of the last one.
template <typename Work>
double timed_on_threads(int num_threads, const Work& work) {
  std::atomic<int> waiting{0};
  std::vector<double> begin(num_threads), end(num_threads);
  std::vector<std::thread> threads;
  for (int t = 0; t < num_threads; ++t) {
    threads.emplace_back([&, t] {
      waiting.fetch_add(1);
      while (waiting.load() < num_threads) std::this_thread::yield();
      begin[t] = seconds_now();
      work(t);
      end[t] = seconds_now();
    });
  }
  for (std::thread& thread : threads) thread.join();
  return *std::max_element(end.begin(), end.end()) - *std::min_element(begin.begin(), begin.end());
}

// Makes the compiler believe that value is read, so that the loop before it must run.
template <typename Value>
void keep(Value& value) {
  asm volatile("" : : "m"(value) : "memory");
}

void fma_loop(int64_t iterations) {
  FloatVector sums[kChains], scale, offset;
  for (int i = 0; i < kFloats; ++i) {
    scale[i] = 0.5f;
    offset[i] = 0.25f;
  }
  asm volatile("" : "+m"(scale), "+m"(offset));
  for (int c = 0; c < kChains; ++c) sums[c] = scale + static_cast<float>(c);
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) sums[c] = sums[c] * scale + offset;
  }
  keep(sums);
}

#if defined(__AVX512BF16__)
void bf16_dot_loop(int64_t iterations) {
  __m512 sums[kChains];
  uint32_t pair_of_ones = 0x3f803f80u;
  asm volatile("" : "+m"(pair_of_ones));
  const __m512bh a = (__m512bh)_mm512_set1_epi32(static_cast<int>(pair_of_ones));
  for (int c = 0; c < kChains; ++c) sums[c] = _mm512_setzero_ps();
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) sums[c] = _mm512_dpbf16_ps(sums[c], a, a);
  }
  keep(sums);
}
#endif

void read_all(const IntVector* source, int64_t count) {
  constexpr int kStreams = 8;
  IntVector sums[kStreams] = {};
  for (int64_t i = 0; i + kStreams <= count; i += kStreams) {
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; ++s) sums[s] += source[i + s];
  }
  keep(sums);
}

void copy_all(const IntVector* source, IntVector* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    target[i] = source[i];
    asm volatile("" : : : "memory");  // keeps the loop from becoming a call of memcpy
  }
}

void copy_all_past_the_cache(const IntVector* source, IntVector* target, int64_t count) {
#if defined(__AVX512F__)
  for (int64_t i = 0; i < count; ++i) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target + i), (__m512i)source[i]);
  }
  _mm_sfence();
#elif defined(__AVX__)
  for (int64_t i = 0; i < count; ++i) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(target + i), (__m256i)source[i]);
  }
  _mm_sfence();
#elif defined(__x86_64__)
  for (int64_t i = 0; i < count; ++i) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(target + i), (__m128i)source[i]);
  }
  _mm_sfence();
#else
  std::memcpy(target, source, count * sizeof(IntVector));
#endif
}

struct Array {
  Array(int64_t num_bytes, int fill)
      : data(static_cast<IntVector*>(std::aligned_alloc(4096, (num_bytes + 4095) / 4096 * 4096))) {
    std::memset(static_cast<void*>(data), fill, num_bytes);
  }
  IntVector* const data;
};

template <typename Loop>
double flops(int num_threads, int64_t iterations, int repeats, double flops_per_iteration,
             const Loop& loop) {
  double best = 0;
  for (int r = 0; r < repeats; ++r) {
    const double seconds = timed_on_threads(num_threads, [&](int) { loop(iterations); });
    best = std::max(best, iterations * flops_per_iteration * num_threads / seconds);
  }
  return best;
}

}  // namespace

extern "C" {

// FLOP/s of fp32 fused multiply-adds (one counts as two).
double fma_flops(int num_threads, int64_t iterations, int repeats) {
  return flops(num_threads, iterations, repeats, 2.0 * kFloats * kChains, fma_loop);
}

// FLOP/s of vdpbf16ps, or 0 where the machine lacks it.
double bf16_dot_flops(int num_threads, int64_t iterations, int repeats) {
#if defined(__AVX512BF16__)
  return flops(num_threads, iterations, repeats, 4.0 * 16 * kChains, bf16_dot_loop);
#else
  (void)num_threads, (void)iterations, (void)repeats;
  return 0;
#endif
}

// Bytes read and written per second over arrays of num_bytes; kind 0 reads, 1 copies, 2 copies with
// stores that bypass the cache. The arrays are kept for the next call.
double memory_rate(int kind, int num_threads, int64_t num_bytes, int repeats) {
  static Array source(num_bytes, 1), target(num_bytes, 2);
  const int64_t count = num_bytes / kVectorBytes / num_threads;
  const int64_t total = count * num_threads * kVectorBytes;
  double best = 0;
  for (int r = 0; r < repeats; ++r) {
    const double seconds = timed_on_threads(num_threads, [&](int t) {
      const IntVector* from = source.data + t * count;
      if (kind == 0) return read_all(from, count);
      IntVector* to = target.data + t * count;
      return kind == 1 ? copy_all(from, to, count) : copy_all_past_the_cache(from, to, count);
    });
    best = std::max(best, (kind == 0 ? 1 : 2) * static_cast<double>(total) / seconds);
  }
  return best;
}

}  // extern "C"
