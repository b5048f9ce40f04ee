// SPDX-License-Identifier: Apache-2.0
#include "binding/check.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "core/validate.h"

namespace kvevict {
namespace {

std::string dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Half: return "float16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::ComplexHalf: return "complex32";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    case ScalarType::Bool: return "bool";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float8_e5m2: return "float8_e5m2";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::UInt16: return "uint16";
    case ScalarType::UInt32: return "uint32";
    case ScalarType::UInt64: return "uint64";
    default: return "dtype " + std::to_string(static_cast<int>(type));
  }
}

std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  const std::string index = std::to_string(tensor.get_device_index());
  return tensor.is_cuda()
             ? "cuda:" + index
             : "device " + std::to_string(static_cast<int>(tensor.device().type())) + ":" + index;
}

// "a, b or c"
std::string join(const std::vector<std::string>& words) {
  std::string text;
  for (size_t i = 0; i < words.size(); ++i) {
    if (i > 0) text += i + 1 == words.size() ? " or " : ", ";
    text += words[i];
  }
  return text;
}

template <typename Range, typename F>
std::string tuple(const Range& range, F&& word) {
  std::string text = "(";
  size_t count = 0;
  for (const auto& item : range) text += (count++ ? ", " : "") + word(item);
  return text + (count == 1 ? ",)" : ")");
}

std::string dim_name(const Check::Dim& dim) {
  if (dim.size == Check::kAny) return "*";
  if (dim.size == dim.other) return std::to_string(dim.size);
  return std::to_string(dim.size) + " or " + std::to_string(dim.other);
}

// The elements of a tensor as a set of byte ranges.
struct Extent {
  int64_t begin, end;  // of all, in bytes from 0
  int64_t row_bytes;   // of the contiguous run at each combination of the other dimensions
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride in bytes, size), stride descending
};

Extent extent_of(const Tensor& tensor) {
  const auto bytes = static_cast<int64_t>(tensor.element_size());
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  Extent extent{reinterpret_cast<int64_t>(tensor.const_data_ptr()), 0, bytes, {}};
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] > 1) extent.dims.emplace_back(strides[d] * bytes, sizes[d]);
  }
  std::sort(extent.dims.rbegin(), extent.dims.rend());
  if (!extent.dims.empty() && extent.dims.back().first == bytes) {
    extent.row_bytes = bytes * extent.dims.back().second;
    extent.dims.pop_back();
  }
  extent.end = extent.begin + extent.row_bytes;
  for (const auto& [stride, size] : extent.dims) extent.end += stride * (size - 1);
  return extent;
}

// How far two tensors' rows may be apart: multiples of their strides, in descending order.
struct Step {
  int64_t stride, low, high;
};

// Looks for two rows that share a byte.
struct RowSearch {
  std::vector<Step> steps;
  int64_t first_bytes, second_bytes;  // of a row
  int64_t budget;                     // of visits; enough unless strides have nothing in common

  // Whether such rows exist at `distance` + a combination of the steps from `i` on. Where the
  // budget does not suffice to tell, they are said to.
  bool finds(int64_t distance, size_t i = 0) {
    if (budget-- == 0) return true;
    if (i == steps.size()) return -second_bytes < distance && distance < first_bytes;
    int64_t low = -second_bytes + 1 - distance, high = first_bytes - 1 - distance;
    for (size_t rest = i + 1; rest < steps.size(); ++rest) {
      low -= steps[rest].high * steps[rest].stride;
      high -= steps[rest].low * steps[rest].stride;
    }
    const Step& step = steps[i];
    const int64_t last = std::min(step.high, floor_div(high, step.stride));
    for (int64_t m = std::max(step.low, -floor_div(-low, step.stride)); m <= last; ++m) {
      if (finds(distance + m * step.stride, i + 1)) return true;
    }
    return false;
  }

  static int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }
};

bool overlap(const Extent& a, const Extent& b) {
  if (a.end <= b.begin || b.end <= a.begin) return false;
  constexpr int64_t kBudget = 1 << 12;
  RowSearch search{{}, a.row_bytes, b.row_bytes, kBudget};
  const auto add = [&](const Extent& extent, int64_t sign) {
    for (const auto& [stride, size] : extent.dims) {
      if (stride == 0) continue;
      auto step = std::find_if(search.steps.begin(), search.steps.end(),
                               [stride = stride](const Step& s) { return s.stride == stride; });
      if (step == search.steps.end()) step = search.steps.insert(step, {stride, 0, 0});
      (sign < 0 ? step->low : step->high) += sign * (size - 1);
    }
  };
  add(a, -1);
  add(b, 1);
  std::sort(search.steps.begin(), search.steps.end(),
            [](const Step& x, const Step& y) { return x.stride > y.stride; });
  return search.finds(b.begin - a.begin);
}

bool overlaps_itself(const Extent& extent) {
  int64_t covered = extent.row_bytes;
  for (auto dim = extent.dims.rbegin(); dim != extent.dims.rend(); ++dim) {
    if (dim->first < covered) return true;
    covered = dim->first * (dim->second - 1) + covered;
  }
  return false;
}

bool debugging() {
  const char* debug = std::getenv("KVEVICT_DEBUG");
  return debug && std::strcmp(debug, "1") == 0;
}

}  // namespace

Check::Check(const char* op, DeviceType device)
    : op_(op), reads_values_(device == DeviceType::CPU || debugging()) {}

void Check::fail(const Argument& argument, const std::string& expectation,
                 const std::string& value) const {
  throw std::invalid_argument("kvevict::" + std::string(op_) + ": " + argument.text() + " must " +
                              expectation + ", got " + value);
}

void Check::shape(const Tensor& tensor, const Argument& argument,
                  std::span<const Dim> expected) const {
  const auto sizes = tensor.sizes();
  bool fits = sizes.size() == expected.size();
  for (size_t d = 0; fits && d < expected.size(); ++d) {
    const Dim& dim = expected[d];
    fits = dim.size == kAny || sizes[d] == dim.size || sizes[d] == dim.other;
  }
  if (fits) return;
  fail(argument, "have shape " + tuple(expected, dim_name),
       tuple(sizes, [](int64_t size) { return std::to_string(size); }));
}

void Check::dtype(const Tensor& tensor, const Argument& argument,
                  std::initializer_list<ScalarType> allowed) const {
  const ScalarType type = tensor.scalar_type();
  if (std::find(allowed.begin(), allowed.end(), type) != allowed.end()) return;
  std::vector<std::string> names;
  for (ScalarType name : allowed) names.push_back(dtype_name(name));
  fail(argument, "be " + join(names), dtype_name(type));
}

void Check::device(const Tensor& tensor, const Argument& argument, const Tensor& reference,
                   const Argument& reference_name) const {
  if (tensor.device() == reference.device()) return;
  const std::string expected = device_name(reference);
  const std::string name = device_name(tensor);
  if (name == expected) return;  // cpu is cpu:0
  fail(argument, "be on " + expected + " as " + reference_name.text() + " is", name);
}

void Check::contiguous_last_dim(const Tensor& tensor, const Argument& argument) const {
  const int64_t last = tensor.dim() - 1;
  if (tensor.size(last) > 1 && tensor.stride(last) != 1) {
    fail(argument, "have a contiguous last dimension",
         "stride " + std::to_string(tensor.stride(last)));
  }
}

void Check::at_least(int64_t value, const Argument& argument, int64_t minimum) const {
  if (value < minimum) {
    fail(argument, "be at least " + std::to_string(minimum), std::to_string(value));
  }
}

void Check::in_range(int64_t value, const Argument& argument, int64_t low, int64_t high) const {
  if (low <= value && value < high) return;
  fail(argument, "be in [" + std::to_string(low) + ", " + std::to_string(high) + ")",
       std::to_string(value));
}

void Check::one_of(int64_t value, const Argument& argument,
                   std::initializer_list<const char*> names) const {
  if (0 <= value && value < static_cast<int64_t>(names.size())) return;
  std::vector<std::string> words;
  for (const char* name : names) {
    words.push_back(std::to_string(words.size()) + " (" + name + ")");
  }
  fail(argument, "be " + join(words), std::to_string(value));
}

void Check::finite(double value, const Argument& argument) const {
  if (std::isfinite(value)) return;
  fail(argument, "be finite", std::isnan(value) ? "nan" : value > 0 ? "inf" : "-inf");
}

void Check::indexable(const Tensor& tensor, const Argument& argument, int64_t dim,
                      const char* size_name) const {
  const int64_t size = tensor.size(dim);
  if (size < kIndexEnd) return;
  fail(argument, std::string("have a ") + size_name + " below " + std::to_string(kIndexEnd),
       std::to_string(size));
}

void Check::not_negative(double value, const Argument& argument) const {
  finite(static_cast<float>(value), argument);
  if (value >= 0.0) return;
  std::ostringstream text;
  text << value;
  fail(argument, "be at least 0", text.str());
}

void Check::companion(const Tensor& tensor, const Argument& argument, ScalarType type,
                      std::vector<Dim> expected, const Tensor& reference,
                      const Argument& reference_name) const {
  device(tensor, argument, reference, reference_name);
  dtype(tensor, argument, {type});
  shape(tensor, argument, std::move(expected));
}

void Check::priority(const std::optional<Tensor>& tensor, int64_t batch_size, int64_t num_heads,
                     int64_t kv_len, const Tensor& reference,
                     const Argument& reference_name) const {
  if (!tensor) return;
  std::vector<Dim> expected{batch_size, kv_len};
  if (tensor->dim() == 3) expected.insert(expected.begin() + 1, num_heads);
  companion(*tensor, "priority", ScalarType::Byte, expected, reference, reference_name);
}

void Check::values_in_range(const Tensor& tensor, const Argument& argument, int64_t low,
                            int64_t high) const {
  if (!reads_values()) return;
  const Tensor host = on_host(tensor);
  const auto* values = static_cast<const int32_t*>(host.const_data_ptr());
  const int64_t bad = find_outside(values, host.numel(), low, high);
  if (bad >= 0) {
    fail(argument, "be in [" + std::to_string(low) + ", " + std::to_string(high) + ")",
         element_text(host, bad, values[bad]));
  }
}

void Check::scorable(const Tensor& tensor, const Argument& argument) const {
  dtype(tensor, argument, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16});
  shape(tensor, argument, {kAny, kAny, kAny, kAny});
  contiguous_last_dim(tensor, argument);
  const int64_t head_dim = tensor.size(3);
  if (head_dim < 8 || head_dim > 256 || head_dim % 8 != 0) {
    fail(argument, "have a head_dim that is a multiple of 8 up to 256", std::to_string(head_dim));
  }
}

void Check::multiple_of_8(const Tensor& tensor, const Argument& argument) const {
  const int64_t dim = tensor.size(-1);
  if (dim < 8 || dim % 8 != 0) {
    fail(argument, "have a dim that is a multiple of 8", std::to_string(dim));
  }
}

void Check::movable(const Tensor& tensor, const Argument& argument) const {
  const auto bytes = tensor.element_size();
  if (bytes != 1 && bytes != 2 && bytes != 4 && bytes != 8) {
    fail(argument, "have elements of 1, 2, 4 or 8 bytes", dtype_name(tensor.scalar_type()));
  }
  contiguous_last_dim(tensor, argument);
}

void Check::disjoint(const std::vector<Tensor>& tensors, const std::vector<Argument>& names,
                     size_t num_written) const {
  struct Range {
    int64_t begin, end;  // of all elements, in bytes from 0
    size_t index;
  };
  std::vector<Range> ranges;
  ranges.reserve(tensors.size());
  // Only tensors that are not contiguous, or whose ranges cross, need a closer look.
  std::vector<std::optional<Extent>> extents(tensors.size());
  const auto extent = [&](size_t i) -> const Extent& {
    if (!extents[i]) extents[i] = extent_of(tensors[i]);
    return *extents[i];
  };
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& tensor = tensors[i];
    const int64_t bytes = tensor.numel() * static_cast<int64_t>(tensor.element_size());
    if (bytes == 0) continue;
    if (tensor.is_contiguous()) {
      const auto begin = reinterpret_cast<int64_t>(tensor.const_data_ptr());
      ranges.push_back({begin, begin + bytes, i});
      continue;
    }
    ranges.push_back({extent(i).begin, extent(i).end, i});
    if (i < num_written && overlaps_itself(extent(i))) {
      fail(names[i], "not overlap itself", "an expanded tensor");
    }
  }
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (size_t i = 0; i < ranges.size(); ++i) {
    for (size_t j = i + 1; j < ranges.size() && ranges[j].begin < ranges[i].end; ++j) {
      const auto [first, second] = std::minmax(ranges[i].index, ranges[j].index);
      if (first < num_written && overlap(extent(ranges[i].index), extent(ranges[j].index))) {
        fail(names[second], "not overlap " + names[first].text(), "shared memory");
      }
    }
  }
}

}  // namespace kvevict
