// SPDX-License-Identifier: Apache-2.0
// CUDA's execution model on the CPU: every CUDA thread is a fiber, blocks run one after the other,
// and a thread runs until it has to wait. README.md tells what is modeled and what is caught.
#pragma once

#include <driver_types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace kvevict::emulation {

inline constexpr int kWarpSize = 32;
inline constexpr int kMaxThreadsPerBlock = 1024;
inline constexpr int kL2Bytes = 256 << 10;
inline constexpr size_t kMaxPlainSharedBytes = 48 * 1024;  // more must be asked for
inline constexpr size_t kMaxSharedBytes = 227 * 1024;
inline constexpr size_t kMaxParameterBytes = 4096;

// --- Controls and results ------------------------------------------------------------------------

// Which of the threads that can run does run: the first, the last, or any. Blocks likewise.
enum class Order { kForward, kReverse, kRandom };

// When cp.async copies: at once, or at the wait for it; until then its target holds garbage.
enum class CopyMode { kEager, kLazy };

struct Controls {
  Order order = Order::kForward;
  uint64_t seed = 0;  // of kRandom; every launch starts from it
  CopyMode copies = CopyMode::kLazy;
  int num_multiprocessors = 4;
  size_t max_shared_bytes = kMaxSharedBytes;
};

struct Counters {
  uint64_t launches, blocks, threads;
  uint64_t switches;     // from one fiber to another
  uint64_t barriers;     // __syncthreads of a whole block
  uint64_t collectives;  // of a warp or a part of it
  uint64_t mmas;
  uint64_t copied_bytes;  // by cp.async
};

// One state per process; launches take turns.
extern Controls controls;
extern Counters counters;
extern std::string last_error;  // of the last launch that failed

// --- Host side -----------------------------------------------------------------------------------

// Runs `kernel` once per thread of the grid. What goes wrong in it ends up in last_error.
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, size_t parameter_bytes,
                   const std::function<void()>& run_thread);

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t get_attribute(int* value, cudaDeviceAttr attribute);

// --- Thread side ---------------------------------------------------------------------------------

// What CUDA calls threadIdx, blockIdx, blockDim and gridDim.
struct Place {
  uint3 thread_index, block_index;
  dim3 block_dim, grid_dim;
};
extern const Place& here;

// Ends the launch.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

// __syncthreads; returns for how many threads of the block the predicate holds.
int barrier(bool predicate = false);

// Lets others run.
void sleep();

// The dynamic shared memory, which has to hold as many bytes.
void* shared_memory(size_t bytes, size_t alignment);

void check_aligned(const void* address, size_t alignment, const char* what);
void check_shared(const void* address, size_t bytes, const char* what);

// cp.async
void copy_async(void* shared, const void* global, size_t bytes, bool valid);
void commit_copies();
void wait_for_copies(unsigned pending_groups);

// What the lanes of a mask do together. When the last of them has come, `complete` gets what each
// lane brought, and leaves there what it takes home.
struct Collective {
  const char* name;
  void (*complete)(void* const* lanes, uint32_t mask);
  bool whole_warp;  // PTX's .aligned: no lane may have exited
};
void collective(const Collective& kind, uint32_t mask, void* lane_data);

}  // namespace kvevict::emulation
