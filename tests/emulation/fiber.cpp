// SPDX-License-Identifier: Apache-2.0
#include "emulation/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves what a called function must preserve on the stack, and goes on on another one.
extern "C" void kvevict_switch_stack(void** save_stack_pointer, void* stack_pointer);
asm(R"(
  .text
  .globl kvevict_switch_stack
  .hidden kvevict_switch_stack
  .type kvevict_switch_stack, @function
kvevict_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size kvevict_switch_stack, . - kvevict_switch_stack
)");

namespace kvevict::emulation {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = 256 * 1024;
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif
constexpr int kSavedRegisters = 6;

}  // namespace

FiberPool::FiberPool(size_t count) : fibers_(count) {
  const size_t slot_bytes = kGuardBytes + kStackBytes;
  void* memory = mmap(nullptr, slot_bytes * count, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  for (size_t i = 0; i < count; ++i) {
    char* slot = static_cast<char*>(memory) + i * slot_bytes;
    mprotect(slot, kGuardBytes, PROT_NONE);
    fibers_[i].stack = slot + kGuardBytes;
    fibers_[i].stack_bytes = kStackBytes;
  }
  give_back_all();
}

Fiber* FiberPool::take(void (*entry)()) {
  Fiber* fiber = free_.back();
  free_.pop_back();
  // Tops of stacks at different offsets in their pages do not compete for the same cache lines.
  const size_t color = static_cast<size_t>(fiber - fibers_.data()) % 32 * 192;
  auto** top = reinterpret_cast<void**>(fiber->stack + kStackBytes - color);
  *--top = nullptr;  // entry's return address; also aligns its frame
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  fiber->stack_pointer = top;
  fiber->fake_stack = nullptr;
  return fiber;
}

void FiberPool::give_back_all() {
  free_.clear();
  for (auto fiber = fibers_.rbegin(); fiber != fibers_.rend(); ++fiber) {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(fiber->stack, fiber->stack_bytes);  // of frames left for good
#endif
    free_.push_back(&*fiber);
  }
}

void switch_fiber(Fiber& from, Fiber& to) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
  kvevict_switch_stack(&from.stack_pointer, to.stack_pointer);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void leave_fiber(Fiber& from, Fiber& to) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(nullptr, to.stack, to.stack_bytes);
#endif
  kvevict_switch_stack(&from.stack_pointer, to.stack_pointer);
  std::abort();  // not reached
}

void arrive_in_fiber([[maybe_unused]] Fiber& previous) {
#ifdef __SANITIZE_ADDRESS__
  const void* stack;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &previous.stack_bytes);
  previous.stack = static_cast<char*>(const_cast<void*>(stack));
#endif
}

}  // namespace kvevict::emulation
