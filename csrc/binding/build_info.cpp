// SPDX-License-Identifier: Apache-2.0
// What kvevict.build_info() tells, as JSON.
#include <string>

#include "core/cpu/isa.h"

extern "C" __attribute__((visibility("default"))) const char* kvevict_build_info() {
  using namespace kvevict;
  static const std::string json = [] {
    std::string built, supported;
    for (int i = 0; i < kNumIsas; ++i) {
      const std::string quoted = '"' + std::string(kIsaNames[i]) + '"';
      built += (built.empty() ? "" : ", ") + quoted;
      if (isa_supported(static_cast<Isa>(i))) supported += (supported.empty() ? "" : ", ") + quoted;
    }
    const std::string cuda_version = KVEVICT_CUDA_VERSION;
    return std::string("{\"version\": \"") + KVEVICT_VERSION +
           "\", \"built_with_torch\": \"" + KVEVICT_TORCH_BUILD +
           "\", \"cpu_isa_built\": [" + built + "], \"cpu_isa_supported\": [" + supported +
           "], \"cpu_isa\": \"" + kIsaNames[static_cast<int>(active_isa())] +
           "\", \"cuda_version\": " + (cuda_version.empty() ? "null" : '"' + cuda_version + '"') +
           ", \"cuda_archs\": \"" + (cuda_version.empty() ? "" : KVEVICT_CUDA_ARCHS) +
           "\", \"no_cuda_reason\": " +
           (cuda_version.empty() ? '"' + std::string(KVEVICT_NO_CUDA_REASON) + '"' : "null") + "}";
  }();
  return json.c_str();
}
