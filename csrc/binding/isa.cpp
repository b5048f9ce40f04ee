// SPDX-License-Identifier: Apache-2.0
#include "core/cpu/isa.h"

#include <cstdlib>
#include <cstring>

namespace kvevict {

bool isa_supported(Isa isa) {
  switch (isa) {
    case Isa::baseline: return __builtin_cpu_supports("x86-64-v2");
    case Isa::avx2: return __builtin_cpu_supports("x86-64-v3");
    case Isa::avx512: return __builtin_cpu_supports("x86-64-v4");
    case Isa::avx512_bf16:
      return __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16");
  }
  return false;
}

Isa active_isa() {
  static const Isa active = [] {
    const char* wanted = std::getenv("KVEVICT_CPU_ISA");
    Isa best = Isa::baseline;
    for (int i = 0; i < kNumIsas; ++i) {
      const Isa isa = static_cast<Isa>(i);
      if (!isa_supported(isa)) continue;
      if (wanted && std::strcmp(wanted, kIsaNames[i]) == 0) return isa;
      best = isa;
    }
    return best;
  }();
  return active;
}

}  // namespace kvevict
