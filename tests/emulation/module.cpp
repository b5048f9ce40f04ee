// SPDX-License-Identifier: Apache-2.0
// _kvevict_emulator: controls and counters of the emulator for the tests, and the kernels that test
// the emulator itself. No torch header may come in here (see tests/host/host_module.cpp).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>

#include "emulation/emulator.h"
#include "emulation/kernels.h"

namespace py = pybind11;

namespace kvevict::emulation {

using namespace emulation_test;  // NOLINT: this module is for both

namespace {

const std::map<std::string, Order> kOrders = {
    {"forward", Order::kForward}, {"reverse", Order::kReverse}, {"random", Order::kRandom}};
const std::map<std::string, CopyMode> kCopyModes = {{"eager", CopyMode::kEager},
                                                    {"lazy", CopyMode::kLazy}};

template <typename T>
T from_name(const std::map<std::string, T>& names, const std::string& name, const char* argument) {
  const auto found = names.find(name);
  if (found == names.end()) throw std::invalid_argument(argument + (": no such name: " + name));
  return found->second;
}

template <typename T>
std::string name_of(const std::map<std::string, T>& names, T value) {
  for (const auto& [name, other] : names) {
    if (other == value) return name;
  }
  return {};
}

void set_schedule(const std::string& order, uint64_t seed, const std::string& cp_async) {
  controls.order = from_name(kOrders, order, "order");
  controls.copies = from_name(kCopyModes, cp_async, "cp_async");
  controls.seed = seed;
}

py::dict get_schedule() {
  py::dict schedule;
  schedule["order"] = name_of(kOrders, controls.order);
  schedule["seed"] = controls.seed;
  schedule["cp_async"] = name_of(kCopyModes, controls.copies);
  return schedule;
}

void set_device(int num_multiprocessors, size_t max_shared_bytes) {
  if (num_multiprocessors < 1 || max_shared_bytes > kMaxSharedBytes) {
    throw std::invalid_argument("num_multiprocessors is at least 1, max_shared_bytes at most " +
                                std::to_string(kMaxSharedBytes));
  }
  controls.num_multiprocessors = num_multiprocessors;
  controls.max_shared_bytes = max_shared_bytes;
}

py::dict get_counters() {
  py::dict counts;
  counts["launches"] = counters.launches;
  counts["blocks"] = counters.blocks;
  counts["threads"] = counters.threads;
  counts["switches"] = counters.switches;
  counts["barriers"] = counters.barriers;
  counts["collectives"] = counters.collectives;
  counts["mmas"] = counters.mmas;
  counts["copied_bytes"] = counters.copied_bytes;
  return counts;
}

// --- The kernels that test the emulator ----------------------------------------------------------

template <typename T>
using Array = py::array_t<T, py::array::c_style>;  // no forcecast: a wrong dtype is a TypeError

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(last_error);
}

Array<float> sum_rows_of(const Array<float>& rows, const std::string& mistake) {
  const auto num_rows = static_cast<int>(rows.shape(0)), length = static_cast<int>(rows.shape(1));
  if (length % kRowSumTile != 0) throw std::invalid_argument("rows are not whole tiles");
  Array<float> sums(num_rows);
  check(sum_rows(mistake, rows.data(), sums.mutable_data(), num_rows, length / kRowSumTile));
  return sums;
}

Array<float> multiply_arrays(Element element, const Array<uint16_t>& a, const Array<uint16_t>& b) {
  const auto depth = static_cast<int>(a.shape(1));
  if (a.shape(0) != 16 || b.shape(0) != 8 || b.shape(1) != depth || depth % 16 != 0) {
    throw std::invalid_argument("a must have shape [16, depth] and b [8, depth]");
  }
  Array<float> d({16, 8});
  check(multiply(element, a.data(), b.data(), d.mutable_data(), depth));
  return d;
}

py::dict collectives_of(const Array<int>& values) {
  if (values.size() != 32) throw std::invalid_argument("values must be those of 32 lanes");
  const auto names = collective_names();
  Array<int> results({static_cast<py::ssize_t>(names.size()), py::ssize_t{32}});
  std::fill_n(results.mutable_data(), results.size(), 0);
  check(run_collectives(values.data(), results.mutable_data()));
  py::dict by_name;
  for (size_t i = 0; i < names.size(); ++i) by_name[names[i].c_str()] = results[py::int_(i)];
  return by_name;
}

std::tuple<Array<int>, int> count_in(const Array<int>& values) {
  Array<int> counts(64);
  int total = 0;
  check(
      count_values(values.data(), static_cast<int>(values.size()), counts.mutable_data(), &total));
  return {counts, total};
}

Array<int> order_of(const std::string& what, int count) {
  Array<int> order(count);
  int ticket = 0;
  check(record_order(what == "blocks", order.mutable_data(), &ticket, count));
  return order;
}

void launch_nothing(std::tuple<unsigned, unsigned, unsigned> grid,
                    std::tuple<unsigned, unsigned, unsigned> block, size_t shared_bytes,
                    size_t allowed_bytes) {
  const auto dim = [](auto sizes) { return std::make_from_tuple<dim3>(sizes); };
  check(launch_empty(dim(grid), dim(block), shared_bytes, allowed_bytes));
}

void misbehave_somehow(const std::string& misdeed) {
  struct alignas(64) Memory {
    char bytes[64] = {};
  };
  const auto memory = std::make_unique<Memory>();
  check(misbehave(misdeed, memory->bytes));
}

void repeat_times(const std::string& what, int num_threads, int times) {
  float result[32];
  check(repeat(what, num_threads, times, result));
}

}  // namespace

PYBIND11_MODULE(KVEVICT_EMULATOR_MODULE, m) {
  m.def("set_schedule", set_schedule, py::arg("order"), py::arg("seed"), py::arg("cp_async"));
  m.def("schedule", get_schedule);
  m.def("set_device", set_device, py::arg("num_multiprocessors"), py::arg("max_shared_bytes"));
  m.def("counters", get_counters);
  m.def("reset_counters", [] { counters = {}; });
  m.def("last_error", [] { return last_error; });

  m.attr("ROW_SUM_TILE") = kRowSumTile;
  m.attr("ROW_SUM_MISTAKES") = row_sum_mistakes();
  m.attr("MISDEEDS") = misdeeds();
  m.def("sum_rows", sum_rows_of, py::arg("rows"), py::arg("mistake") = "none");
  m.def("multiply_bf16", [](const Array<uint16_t>& a, const Array<uint16_t>& b) {
    return multiply_arrays(Element::kBf16, a, b);
  });
  m.def("multiply_fp16", [](const Array<uint16_t>& a, const Array<uint16_t>& b) {
    return multiply_arrays(Element::kFp16, a, b);
  });
  m.def("collectives", collectives_of);
  m.def("count", count_in);
  m.def("order", order_of, py::arg("what"), py::arg("count"));
  m.def("launch_nothing", launch_nothing, py::arg("grid"), py::arg("block"),
        py::arg("shared_bytes") = 0, py::arg("allowed_bytes") = 0);
  m.def("misbehave", misbehave_somehow);
  m.def("repeat", repeat_times, py::arg("what"), py::arg("num_threads"), py::arg("times"));
}

}  // namespace kvevict::emulation
