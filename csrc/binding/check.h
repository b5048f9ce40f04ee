// SPDX-License-Identifier: Apache-2.0
// Contract checks. Every refusal is a std::invalid_argument, in Python a ValueError, that reads
//   kvevict::<op>: <argument> must <expectation>, got <value>
// kvevict/ops/_check.py says the same words for the fake kernels; tests hold them together.
#pragma once

#include <sstream>
#include <string>
#include <vector>

#include "binding/tensor.h"

namespace kvevict {

class Check {
 public:
  explicit Check(const char* op) : op_(op) {}

  [[noreturn]] void fail(const std::string& argument, const std::string& expectation,
                         const std::string& value) const;

  // One dimension of an expected shape: a size, one of two sizes, or any.
  struct Dim {
    Dim(int64_t size) : size(size), other(size) {}  // NOLINT: sizes are meant to convert
    Dim(int64_t size, int64_t other) : size(size), other(other) {}
    int64_t size, other;
  };
  static constexpr int64_t kAny = -1;

  void shape(const Tensor& tensor, const std::string& argument, std::vector<Dim> expected) const;
  void dtype(const Tensor& tensor, const std::string& argument,
             std::initializer_list<ScalarType> allowed) const;
  void device(const Tensor& tensor, const std::string& argument, const Tensor& reference,
              const std::string& reference_name) const;
  void contiguous_last_dim(const Tensor& tensor, const std::string& argument) const;
  void at_least(int64_t value, const std::string& argument, int64_t minimum) const;
  void in_range(int64_t value, const std::string& argument, int64_t low, int64_t high) const;
  void one_of(int64_t value, const std::string& argument,
              std::initializer_list<const char*> names) const;
  void finite(double value, const std::string& argument) const;

  // A small tensor of a given type and shape beside the op's first tensor.
  void companion(const Tensor& tensor, const std::string& argument, ScalarType type,
                 std::vector<Dim> expected, const Tensor& reference,
                 const std::string& reference_name) const;

  // On the CPU, where the data can be read for free: the elements of a dense tensor of int32 lie in
  // [low, high).
  void elements_in_range(const Tensor& tensor, const std::string& argument, int64_t low,
                         int64_t high) const;

  // Priorities of scores of a shape [batch_size, num_heads, kv_len], per key or per head and key.
  void priority(const std::optional<Tensor>& tensor, int64_t batch_size, int64_t num_heads,
                int64_t kv_len, const Tensor& reference, const std::string& reference_name) const;

  // A tensor whose rows are multiplied or added, 16 bytes at a time.
  void multiple_of_8(const Tensor& tensor, const std::string& argument) const;

  // A tensor whose elements can be moved as bytes.
  void movable(const Tensor& tensor, const std::string& argument) const;

  // The first num_written tensors have no element twice and share none with any other tensor: they
  // will be written. The rest is only read.
  void disjoint(const std::vector<Tensor>& tensors, const std::vector<std::string>& names,
                size_t num_written) const;

 private:
  const char* op_;
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
