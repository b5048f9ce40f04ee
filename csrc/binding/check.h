// SPDX-License-Identifier: Apache-2.0
// Contract checks. Every refusal is a std::invalid_argument, in Python a ValueError, that reads
//   kvevict::<op>: <argument> must <expectation>, got <value>
// kvevict/ops/_check.py says the same words for the fake kernels; tests hold them together.
#pragma once

#include <span>
#include <sstream>
#include <string>
#include <vector>

#include "binding/tensor.h"

namespace kvevict {

// The name of an argument or of an element of a list, "keys[3]"; text only where a message needs
// it.
class Argument {
 public:
  Argument(const char* name) : name_(name) {}                 // NOLINT: names are meant to convert
  Argument(const std::string& name) : name_(name.c_str()) {}  // NOLINT
  Argument(const char* list, size_t index) : name_(list), index_(static_cast<int64_t>(index)) {}

  std::string text() const {
    return index_ < 0 ? name_ : name_ + ("[" + std::to_string(index_) + "]");
  }

 private:
  const char* name_;
  int64_t index_ = -1;
};

class Check {
 public:
  // device: where the op runs.
  Check(const char* op, DeviceType device);

  // Whether values of small arguments are checked too. Always on the CPU, where they are read for
  // free; elsewhere, where that waits for the device, if the environment has KVEVICT_DEBUG=1.
  bool reads_values() const { return reads_values_; }

  const char* op() const { return op_; }

  [[noreturn]] void fail(const Argument& argument, const std::string& expectation,
                         const std::string& value) const;

  // One dimension of an expected shape: a size, one of two sizes, or any.
  struct Dim {
    Dim(int64_t size) : size(size), other(size) {}  // NOLINT: sizes are meant to convert
    Dim(int64_t size, int64_t other) : size(size), other(other) {}
    int64_t size, other;
  };
  static constexpr int64_t kAny = -1;

  void shape(const Tensor& tensor, const Argument& argument, std::span<const Dim> expected) const;
  void shape(const Tensor& tensor, const Argument& argument,
             std::initializer_list<Dim> expected) const {
    shape(tensor, argument, std::span(expected.begin(), expected.size()));
  }
  void dtype(const Tensor& tensor, const Argument& argument,
             std::initializer_list<ScalarType> allowed) const;
  void device(const Tensor& tensor, const Argument& argument, const Tensor& reference,
              const Argument& reference_name) const;
  void contiguous_last_dim(const Tensor& tensor, const Argument& argument) const;
  void at_least(int64_t value, const Argument& argument, int64_t minimum) const;
  void in_range(int64_t value, const Argument& argument, int64_t low, int64_t high) const;
  void one_of(int64_t value, const Argument& argument,
              std::initializer_list<const char*> names) const;
  void finite(double value, const Argument& argument) const;
  void not_negative(double value, const Argument& argument) const;

  // A dimension whose elements int32 indices name: it ends before kIndexEnd.
  static constexpr int64_t kIndexEnd = int64_t{1} << 31;
  void indexable(const Tensor& tensor, const Argument& argument, int64_t dim,
                 const char* size_name) const;

  // A small tensor of a given type and shape beside the op's first tensor.
  void companion(const Tensor& tensor, const Argument& argument, ScalarType type,
                 std::vector<Dim> expected, const Tensor& reference,
                 const Argument& reference_name) const;

  // Priorities of scores of a shape [batch_size, num_heads, kv_len], per key or per head and key.
  void priority(const std::optional<Tensor>& tensor, int64_t batch_size, int64_t num_heads,
                int64_t kv_len, const Tensor& reference, const Argument& reference_name) const;

  // If values are read: those of a dense int32 tensor lie in [low, high).
  void values_in_range(const Tensor& tensor, const Argument& argument, int64_t low,
                       int64_t high) const;

  // A tensor [batch_size, num_heads, len, head_dim] whose rows can be scored.
  void scorable(const Tensor& tensor, const Argument& argument) const;

  // A tensor whose rows are multiplied or added, 16 bytes at a time.
  void multiple_of_8(const Tensor& tensor, const Argument& argument) const;

  // A tensor whose elements can be moved as bytes.
  void movable(const Tensor& tensor, const Argument& argument) const;

  // The first num_written tensors have no element twice and share none with any other tensor: they
  // will be written. The rest is only read. Strides without any common order may be refused, too.
  void disjoint(const std::vector<Tensor>& tensors, const std::vector<Argument>& names,
                size_t num_written) const;

 private:
  const char* op_;
  bool reads_values_;
};

// An offending element and its place: "900 at [1, 3, 17]".
template <typename T>
std::string element_text(const Tensor& tensor, int64_t flat_index, T value) {
  std::ostringstream text;
  text << value << " at [";
  for (int64_t d = 0, rest = tensor.numel(); d < tensor.dim(); ++d) {
    rest /= tensor.size(d);
    text << (d == 0 ? "" : ", ") << flat_index / rest;
    flat_index %= rest;
  }
  text << "]";
  return text.str();
}

}  // namespace kvevict
