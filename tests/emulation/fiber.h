// SPDX-License-Identifier: Apache-2.0
// Fibers: stacks of their own and the switch between them. x86-64 Linux.
#pragma once

#include <cstddef>
#include <vector>

namespace kvevict::emulation {

struct Fiber {
  void* stack_pointer = nullptr;  // while it does not run
  char* stack = nullptr;          // lowest address
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// Stacks with a guard page below each, made once and used again and again.
class FiberPool {
 public:
  static constexpr size_t kGuardBytes = 4096;

  explicit FiberPool(size_t count);

  // A fiber that will start in `entry`, which must never return.
  Fiber* take(void (*entry)());
  void give_back(Fiber* fiber) { free_.push_back(fiber); }
  void give_back_all();  // also those that were left halfway

 private:
  std::vector<Fiber> fibers_;
  std::vector<Fiber*> free_;
};

// Continues `to`; returns when somebody continues `from`.
void switch_fiber(Fiber& from, Fiber& to);
// The same for a fiber that will not be continued.
[[noreturn]] void leave_fiber(Fiber& from, Fiber& to);
// The first thing that `entry` does. `previous`: the fiber that switched here.
void arrive_in_fiber(Fiber& previous);

}  // namespace kvevict::emulation
