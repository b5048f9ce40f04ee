// SPDX-License-Identifier: Apache-2.0
// Runs an op's kernels: on torch's thread pool, or on torch's CUDA stream.
#pragma once

#include <algorithm>

#include "binding/device.h"
#include "binding/tensor.h"
#include "core/cpu/isa.h"

namespace kvevict {

// Memory for the length of an op, from torch's allocator.
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t bytes) {
    if (bytes > 0) tensor_ = new_empty(like, {bytes}, ScalarType::Byte);
  }
  void* data() const { return tensor_ ? tensor_->mutable_data_ptr() : nullptr; }

 private:
  std::optional<Tensor> tensor_;
};

template <typename Op, DeviceType device, typename Params>
void run(const char* op, const Params& params, const Tensor& like) {
  if constexpr (device == DeviceType::CPU) {
    const auto num_threads = static_cast<int64_t>(torch::stable::get_num_threads());
    const CpuPlan plan = Op::plan_cpu(params, static_cast<int>(num_threads));
    const int64_t most_items = *std::max_element(plan.num_items, plan.num_items + plan.num_phases);
    const int64_t bytes =
        plan.shared_bytes + std::min(num_threads, most_items) * plan.bytes_per_thread;
    const Workspace workspace(like, bytes);
    auto* base = static_cast<std::byte*>(workspace.data());
    for (int phase = 0; phase < plan.num_phases; ++phase) {
      const int64_t items = plan.num_items[phase];
      const int64_t chunks = std::min(num_threads, (items + plan.min_items - 1) / plan.min_items);
      const auto run_chunks = [&](int64_t begin, int64_t end) noexcept {
        for (int64_t chunk = begin; chunk < end; ++chunk) {
          const CpuWork work{phase,
                             static_cast<int>(num_threads),
                             items * chunk / chunks,
                             items * (chunk + 1) / chunks,
                             base,
                             base + plan.shared_bytes + chunk * plan.bytes_per_thread};
          dispatch_isa([&](auto isa) { Op::template run_cpu<isa.value>(params, work); });
        }
      };
      if (chunks == 1) {
        run_chunks(0, 1);
      } else if (chunks > 1) {
        torch::stable::parallel_for(0, chunks, 1, run_chunks);
      }
    }
  } else {
    const DeviceGuard guard(like);
    const Workspace workspace(like, Op::cuda_workspace_bytes(params));
    check_launch(Op::launch_cuda(params, workspace.data(), current_stream(like)), op);
  }
}

}  // namespace kvevict
