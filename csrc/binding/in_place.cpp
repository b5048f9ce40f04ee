// SPDX-License-Identifier: Apache-2.0
#include "binding/in_place.h"

#include <array>
#include <stdexcept>

namespace kvevict {
namespace {

// aten::is_leaf and the like: a question about one tensor.
bool ask(const char* question, const Tensor& tensor) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(tensor)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(question, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(stack[0]);
}

}  // namespace

void announce_writes(const char* op, const std::vector<Tensor>& tensors,
                     const std::vector<Argument>& names) {
  const bool grad_mode = aoti_torch_grad_mode_is_enabled();
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto fail = [&](const char* words) {
      throw std::runtime_error("kvevict::" + std::string(op) + ": " + names[i].text() + ": " +
                               words);
    };
    if (grad_mode && !ask("aten::is_leaf", tensors[i])) {
      fail(
          "a Variable that requires grad is being used in an in-place operation that has no "
          "derivative. Call it under torch.no_grad().");
    }
    // Copying a tensor to itself moves nothing, but passes through autograd as every in-place op.
    if (aoti_torch_copy_(tensors[i].get(), tensors[i].get(), /*non_blocking=*/0) == 0) continue;
    if (ask("aten::is_inference", tensors[i])) {
      fail("Inplace update to inference tensor outside InferenceMode is not allowed.");
    }
    fail("a leaf Variable that requires grad is being used in an in-place operation.");
  }
}

void claim(const Check& check, const std::vector<Tensor>& written, std::vector<Argument> names,
           std::initializer_list<std::pair<Argument, std::optional<Tensor>>> read) {
  std::vector<Tensor> tensors = written;
  for (const auto& [name, tensor] : read) {
    if (!tensor) continue;
    tensors.push_back(*tensor);
    names.push_back(name);
  }
  check.disjoint(tensors, names, written.size());
  announce_writes(check.op(), written, names);
}

}  // namespace kvevict
