// SPDX-License-Identifier: Apache-2.0
// CPU kernels are compiled once per instruction set from one source; the best is chosen at load.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dispatch.h"

namespace kvevict {

enum class Isa : int8_t { baseline, avx2, avx512, avx512_bf16 };
inline constexpr int kNumIsas = 4;
inline constexpr const char* kIsaNames[kNumIsas] = {"baseline", "avx2", "avx512", "avx512_bf16"};

// The instruction set in use: the best of the machine, or KVEVICT_CPU_ISA if it is set and runs.
Isa active_isa();
bool isa_supported(Isa isa);

// Calls f(Constant<isa>{}) for the instruction set in use.
template <typename F>
void dispatch_isa(F&& f) {
  (void)dispatch_value<Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16>(active_isa(), f);
}

// How an op spreads over threads: phases one after the other, each of independent items.
struct CpuPlan {
  static constexpr int kMaxPhases = 3;
  int num_phases;
  int64_t num_items[kMaxPhases];
  int64_t shared_bytes;      // workspace that carries results from phase to phase
  int64_t bytes_per_thread;  // scratch
  int64_t min_items = 1;     // that are worth a thread
};

// What one thread does in one phase: items [begin, end).
struct CpuWork {
  int phase;
  int num_threads;  // as given to the plan
  int64_t begin, end;
  std::byte* shared;
  std::byte* scratch;
};

#ifdef KVEVICT_ISA
inline constexpr Isa kThisIsa = Isa::KVEVICT_ISA;  // of the translation unit
#endif

}  // namespace kvevict
