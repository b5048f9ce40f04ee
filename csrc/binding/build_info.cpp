// SPDX-License-Identifier: Apache-2.0
// What kvevict.build_info() tells, as JSON.
#include <sstream>
#include <string>

#include "core/cpu/isa.h"

namespace kvevict {
namespace {

// "" is null.
std::string quoted(const std::string& text) { return text.empty() ? "null" : '"' + text + '"'; }

template <typename F>
std::string isa_list(F&& is_listed) {
  std::string list;
  for (int i = 0; i < kNumIsas; ++i) {
    if (!is_listed(static_cast<Isa>(i))) continue;
    list += (list.empty() ? "" : ", ") + quoted(kIsaNames[i]);
  }
  return "[" + list + "]";
}

std::string build_info() {
  const bool has_cuda = !std::string(KVEVICT_CUDA_VERSION).empty();
  std::ostringstream json;
  json << "{\"version\": " << quoted(KVEVICT_VERSION)
       << ", \"built_with_torch\": " << quoted(KVEVICT_TORCH_BUILD)
       << ", \"cpu_isa_built\": " << isa_list([](Isa) { return true; })
       << ", \"cpu_isa_supported\": " << isa_list(isa_supported)
       << ", \"cpu_isa\": " << quoted(kIsaNames[static_cast<int>(active_isa())])
       << ", \"cuda_version\": " << quoted(KVEVICT_CUDA_VERSION)
       << ", \"cuda_archs\": " << quoted(has_cuda ? KVEVICT_CUDA_ARCHS : "")
       << ", \"no_cuda_reason\": " << quoted(KVEVICT_NO_CUDA_REASON) << "}";
  return json.str();
}

}  // namespace
}  // namespace kvevict

extern "C" __attribute__((visibility("default"))) const char* kvevict_build_info() {
  static const std::string json = kvevict::build_info();
  return json.c_str();
}
