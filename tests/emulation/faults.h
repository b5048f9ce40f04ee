// SPDX-License-Identifier: Apache-2.0
// Turns bad memory accesses of kernels into failed launches.
#pragma once

#include <csignal>

namespace kvevict::emulation {

struct Fiber;

// While it lives, a segmentation fault of a fiber fails the launch. Under AddressSanitizer, which
// tells more, it does nothing.
class FaultHandler {
 public:
  FaultHandler();
  ~FaultHandler();
  FaultHandler(const FaultHandler&) = delete;
  FaultHandler& operator=(const FaultHandler&) = delete;

 private:
  struct sigaction old_segv_, old_bus_;
  stack_t old_stack_;
};

// What the handler asks the emulator.
const Fiber* running_fiber();  // null in host code
bool is_behind_shared_memory(const void* address);

}  // namespace kvevict::emulation
