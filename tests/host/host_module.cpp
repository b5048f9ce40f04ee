// SPDX-License-Identifier: Apache-2.0
// White-box access to csrc/core for the tests. No torch header may come in here: pybind11 and
// LibTorch's stable ABI do not mix in one translation unit.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "core/cpu/isa.h"
#include "core/order.h"
#include "simd_probe.h"

namespace py = pybind11;

namespace kvevict {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;  // no forcecast: a wrong dtype is a TypeError

// Calls f(Constant<isa>{}) for the instruction set of that name.
template <typename F>
void with_isa(const std::string& name, F&& f) {
  for (int i = 0; i < kNumIsas; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (name != kIsaNames[i] || !isa_supported(isa)) continue;
    (void)dispatch_value<Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16>(isa, f);
    return;
  }
  throw std::invalid_argument("isa must be one that this CPU has, got " + name);
}

int lanes(const std::string& name) {
  int result = 0;
  with_isa(name, [&](auto isa) { result = SimdProbe::lanes<isa.value>(); });
  return result;
}

void check_multiple(py::ssize_t count, int lanes) {
  if (count % lanes != 0) {
    throw std::invalid_argument("the number of elements must be a multiple of " +
                                std::to_string(lanes) + ", got " + std::to_string(count));
  }
}

Array<uint32_t> order_keys(const Array<float>& scores) {
  Array<uint32_t> keys(scores.size());
  for (py::ssize_t i = 0; i < scores.size(); ++i) {
    keys.mutable_data()[i] = order_key(scores.data()[i]);
  }
  return keys;
}

Array<float> exp2(const std::string& name, const Array<float>& input) {
  Array<float> output(input.size());
  check_multiple(input.size(), lanes(name));
  with_isa(name, [&](auto isa) {
    SimdProbe::exp2<isa.value>(input.data(), output.mutable_data(), input.size());
  });
  return output;
}

Array<float> half_to_float(const std::string& name, const Array<uint16_t>& input) {
  Array<float> output(input.size());
  check_multiple(input.size(), lanes(name));
  with_isa(name, [&](auto isa) {
    SimdProbe::half_to_float<isa.value>(input.data(), output.mutable_data(), input.size());
  });
  return output;
}

Array<float> bfloat16_to_float(const std::string& name, const Array<uint16_t>& input) {
  Array<float> output(input.size());
  check_multiple(input.size(), lanes(name));
  with_isa(name, [&](auto isa) {
    SimdProbe::bfloat16_to_float<isa.value>(input.data(), output.mutable_data(), input.size());
  });
  return output;
}

Array<uint16_t> float_to_half(const std::string& name, const Array<float>& input) {
  Array<uint16_t> output(input.size());
  check_multiple(input.size(), lanes(name));
  with_isa(name, [&](auto isa) {
    SimdProbe::float_to_half<isa.value>(input.data(), output.mutable_data(), input.size());
  });
  return output;
}

Array<uint16_t> float_to_bfloat16(const std::string& name, const Array<float>& input) {
  Array<uint16_t> output(input.size());
  check_multiple(input.size(), lanes(name));
  with_isa(name, [&](auto isa) {
    SimdProbe::float_to_bfloat16<isa.value>(input.data(), output.mutable_data(), input.size());
  });
  return output;
}

Array<float> transpose(const std::string& name, const Array<float>& matrix) {
  const int size = lanes(name);
  if (matrix.ndim() != 2 || matrix.shape(0) != size || matrix.shape(1) != size) {
    throw std::invalid_argument("matrix must be square of size " + std::to_string(size));
  }
  Array<float> output({size, size});
  with_isa(name, [&](auto isa) {
    SimdProbe::transpose<isa.value>(matrix.data(), output.mutable_data());
  });
  return output;
}

}  // namespace
}  // namespace kvevict

PYBIND11_MODULE(_kvevict_host, m) {
  m.attr("KEY_NEVER") = kvevict::kKeyNever;
  m.attr("KEY_ALWAYS") = kvevict::kKeyAlways;
  m.def("order_key", &kvevict::order_keys, py::arg("scores"));
  m.def("lanes", &kvevict::lanes, py::arg("isa"));
  m.def("exp2", &kvevict::exp2, py::arg("isa"), py::arg("input"));
  m.def("half_to_float", &kvevict::half_to_float, py::arg("isa"), py::arg("input"));
  m.def("bfloat16_to_float", &kvevict::bfloat16_to_float, py::arg("isa"), py::arg("input"));
  m.def("float_to_half", &kvevict::float_to_half, py::arg("isa"), py::arg("input"));
  m.def("float_to_bfloat16", &kvevict::float_to_bfloat16, py::arg("isa"), py::arg("input"));
  m.def("transpose", &kvevict::transpose, py::arg("isa"), py::arg("matrix"));
}
