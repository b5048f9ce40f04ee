// SPDX-License-Identifier: Apache-2.0
// The dynamic shared memory of the block that runs.
#pragma once

#include <cstddef>

namespace kvevict::emulation {

inline constexpr int kGarbage = 0xFF;  // NaN as a float, -1 as an integer

// Ends at a guard page. What lies between the last byte and the page is checked after the block.
class SharedArena {
 public:
  SharedArena();

  // Fills the memory of a new block with garbage.
  void start_block(size_t bytes);
  bool is_intact() const;

  char* begin() const { return begin_; }
  size_t bytes() const { return bytes_; }
  bool contains(const void* address, size_t count) const;
  bool is_guard(const void* address) const;

 private:
  char* memory_;
  char* guard_;
  char* begin_;
  size_t bytes_ = 0;
};

}  // namespace kvevict::emulation
