// SPDX-License-Identifier: Apache-2.0
#include "binding/check.h"
#include "binding/registration.h"
#include "binding/run.h"
#include "ops/null/null.h"

namespace kvevict {
namespace {

template <DeviceType device>
Tensor null(const Tensor& input) {
  const Check check("null", device);
  check.dtype(input, "input", {ScalarType::Float});
  const Tensor dense_input = dense(input);
  const Tensor output = torch::stable::empty_like(dense_input);
  const NullParams params{
      static_cast<const float*>(dense_input.const_data_ptr()),
      static_cast<float*>(output.mutable_data_ptr()),
      input.numel(),
  };
  run<Null, device>("null", params, output);
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(KVEVICT_NAMESPACE, m) { m.def("null(Tensor input) -> Tensor"); }

KVEVICT_IMPL(null)

}  // namespace kvevict
