// SPDX-License-Identifier: Apache-2.0
// The kernels that test the emulator. Every function returns a cudaError_t.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>
#include <vector>

namespace kvevict::emulation_test {

// Sums of rows of num_tiles * kRowSumTile floats, through a double buffer, shuffles and shared
// partial sums: right, or with a mistake in it.
inline constexpr int kRowSumTile = 512;
std::vector<std::string> row_sum_mistakes();
cudaError_t sum_rows(const std::string& mistake, const float* rows, float* sums, int num_rows,
                     int num_tiles);

// d[16][8] = a[16][depth] * b[8][depth]^T on tensor cores.
enum class Element { kBf16, kFp16 };
cudaError_t multiply(Element element, const void* a, const void* b, float* d, int depth);

// What every lane gets from every collective: results[i][lane] for the operation of names[i].
std::vector<std::string> collective_names();
cudaError_t run_collectives(const int* values, int* results);

// counts[v] = how often v is in values, in [0, 64); total[0] = how many threads saw an odd value.
cudaError_t count_values(const int* values, int num_values, int* counts, int* total);

// order[i] = the block (of one thread) or the thread (of one block) that came i-th.
cudaError_t record_order(bool of_blocks, int* order, int* ticket, int count);

// Nothing but a launch.
cudaError_t launch_empty(dim3 grid, dim3 block, size_t shared_bytes, size_t allowed_bytes);

// Kernels that must not survive. `memory`: 64 aligned bytes.
std::vector<std::string> misdeeds();
cudaError_t misbehave(const std::string& misdeed, void* memory);

// For measuring: one block whose threads do the same many times.
cudaError_t repeat(const std::string& what, int num_threads, int times, float* result);

}  // namespace kvevict::emulation_test
