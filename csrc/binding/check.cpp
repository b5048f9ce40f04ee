// SPDX-License-Identifier: Apache-2.0
#include "binding/check.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
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
  Extent extent{reinterpret_cast<int64_t>(tensor.const_data_ptr()), 0, bytes, {}};
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1) extent.dims.emplace_back(tensor.stride(d) * bytes, tensor.size(d));
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

// Whether offset + a combination of multiples (|multiple| < size) of the strides from dim on comes
// closer to 0 than row_bytes.
bool meets(const Extent& extent, int64_t offset, size_t dim) {
  if (dim == extent.dims.size()) return std::abs(offset) < extent.row_bytes;
  const auto [stride, size] = extent.dims[dim];
  int64_t reach = extent.row_bytes;
  for (size_t d = dim + 1; d < extent.dims.size(); ++d) {
    reach += extent.dims[d].first * (extent.dims[d].second - 1);
  }
  if (stride == 0) return meets(extent, offset, dim + 1);
  const int64_t low = std::max(-(size - 1), (-reach - offset) / stride - 1);
  const int64_t high = std::min(size - 1, (reach - offset) / stride + 1);
  for (int64_t multiple = low; multiple <= high; ++multiple) {
    if (meets(extent, offset + multiple * stride, dim + 1)) return true;
  }
  return false;
}

bool overlap(const Extent& a, const Extent& b) {
  if (a.end <= b.begin || b.end <= a.begin) return false;
  // Tensors of one layout may interleave; of different layouts, crossing extents are refused.
  return a.dims != b.dims || a.row_bytes != b.row_bytes || meets(a, b.begin - a.begin, 0);
}

bool overlaps_itself(const Extent& extent) {
  int64_t covered = extent.row_bytes;
  for (auto dim = extent.dims.rbegin(); dim != extent.dims.rend(); ++dim) {
    if (dim->first < covered) return true;
    covered = dim->first * (dim->second - 1) + covered;
  }
  return false;
}

}  // namespace

void Check::fail(const std::string& argument, const std::string& expectation,
                 const std::string& value) const {
  throw std::invalid_argument("kvevict::" + std::string(op_) + ": " + argument + " must " +
                              expectation + ", got " + value);
}

void Check::shape(const Tensor& tensor, const std::string& argument,
                  std::vector<Dim> expected) const {
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

void Check::dtype(const Tensor& tensor, const std::string& argument,
                  std::initializer_list<ScalarType> allowed) const {
  const ScalarType type = tensor.scalar_type();
  if (std::find(allowed.begin(), allowed.end(), type) != allowed.end()) return;
  std::vector<std::string> names;
  for (ScalarType name : allowed) names.push_back(dtype_name(name));
  fail(argument, "be " + join(names), dtype_name(type));
}

void Check::device(const Tensor& tensor, const std::string& argument, const Tensor& reference,
                   const std::string& reference_name) const {
  const std::string expected = device_name(reference);
  const std::string name = device_name(tensor);
  if (name != expected) fail(argument, "be on " + expected + " as " + reference_name + " is", name);
}

void Check::contiguous_last_dim(const Tensor& tensor, const std::string& argument) const {
  const int64_t last = tensor.dim() - 1;
  if (tensor.size(last) > 1 && tensor.stride(last) != 1) {
    fail(argument, "have a contiguous last dimension",
         "stride " + std::to_string(tensor.stride(last)));
  }
}

void Check::at_least(int64_t value, const std::string& argument, int64_t minimum) const {
  if (value < minimum) {
    fail(argument, "be at least " + std::to_string(minimum), std::to_string(value));
  }
}

void Check::in_range(int64_t value, const std::string& argument, int64_t low, int64_t high) const {
  if (low <= value && value < high) return;
  fail(argument, "be in [" + std::to_string(low) + ", " + std::to_string(high) + ")",
       std::to_string(value));
}

void Check::one_of(int64_t value, const std::string& argument,
                   std::initializer_list<const char*> names) const {
  if (0 <= value && value < static_cast<int64_t>(names.size())) return;
  std::vector<std::string> words;
  for (const char* name : names) {
    words.push_back(std::to_string(words.size()) + " (" + name + ")");
  }
  fail(argument, "be " + join(words), std::to_string(value));
}

void Check::finite(double value, const std::string& argument) const {
  if (std::isfinite(value)) return;
  fail(argument, "be finite", std::isnan(value) ? "nan" : value > 0 ? "inf" : "-inf");
}

void Check::companion(const Tensor& tensor, const std::string& argument, ScalarType type,
                      std::vector<Dim> expected, const Tensor& reference,
                      const std::string& reference_name) const {
  device(tensor, argument, reference, reference_name);
  dtype(tensor, argument, {type});
  shape(tensor, argument, std::move(expected));
}

void Check::elements_in_range(const Tensor& tensor, const std::string& argument, int64_t low,
                              int64_t high) const {
  if (!tensor.is_cpu()) return;
  const auto* values = static_cast<const int32_t*>(tensor.const_data_ptr());
  const int64_t bad = find_outside(values, tensor.numel(), low, high);
  if (bad < 0) return;
  fail(argument, "be in [" + std::to_string(low) + ", " + std::to_string(high) + ")",
       element_text(tensor, bad, values[bad]));
}

void Check::priority(const std::optional<Tensor>& tensor, int64_t batch_size, int64_t num_heads,
                     int64_t kv_len, const Tensor& reference,
                     const std::string& reference_name) const {
  if (!tensor) return;
  std::vector<Dim> expected{batch_size, kv_len};
  if (tensor->dim() == 3) expected.insert(expected.begin() + 1, num_heads);
  companion(*tensor, "priority", ScalarType::Byte, expected, reference, reference_name);
}

void Check::multiple_of_8(const Tensor& tensor, const std::string& argument) const {
  const int64_t dim = tensor.size(-1);
  if (dim < 8 || dim % 8 != 0) {
    fail(argument, "have a dim that is a multiple of 8", std::to_string(dim));
  }
}

void Check::movable(const Tensor& tensor, const std::string& argument) const {
  const auto bytes = tensor.element_size();
  if (bytes != 1 && bytes != 2 && bytes != 4 && bytes != 8) {
    fail(argument, "have elements of 1, 2, 4 or 8 bytes", dtype_name(tensor.scalar_type()));
  }
  contiguous_last_dim(tensor, argument);
}

void Check::disjoint(const std::vector<Tensor>& tensors, const std::vector<std::string>& names,
                     size_t num_written) const {
  struct Named {
    Extent extent;
    size_t index;
  };
  std::vector<Named> sorted;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].numel() == 0) continue;
    sorted.push_back({extent_of(tensors[i]), i});
    if (i < num_written && overlaps_itself(sorted.back().extent)) {
      fail(names[i], "not overlap itself", "an expanded tensor");
    }
  }
  std::sort(sorted.begin(), sorted.end(),
            [](const Named& a, const Named& b) { return a.extent.begin < b.extent.begin; });
  for (size_t i = 0; i < sorted.size(); ++i) {
    for (size_t j = i + 1; j < sorted.size(); ++j) {
      if (sorted[j].extent.begin >= sorted[i].extent.end) break;
      const auto [first, second] = std::minmax(sorted[i].index, sorted[j].index);
      if (first < num_written && overlap(sorted[i].extent, sorted[j].extent)) {
        fail(names[second], "not overlap " + names[first], "shared memory");
      }
    }
  }
}

}  // namespace kvevict
