// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvevict {

// Carves aligned arrays out of a workspace. With a null base it only measures, so that one
// function describes a layout to the planner and to the kernel.
class Arena {
 public:
  explicit Arena(std::byte* base = nullptr) : base_(base) {}

  template <typename T>
  T* take(int64_t count) {
    constexpr int64_t kAlignment = 64;
    const int64_t offset = bytes_;
    bytes_ += (count * int64_t{sizeof(T)} + kAlignment - 1) / kAlignment * kAlignment;
    return base_ ? reinterpret_cast<T*>(base_ + offset) : nullptr;
  }

  int64_t bytes() const { return bytes_; }

 private:
  std::byte* base_;
  int64_t bytes_ = 0;
};

}  // namespace kvevict
