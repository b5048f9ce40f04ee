// SPDX-License-Identifier: Apache-2.0
#include "emulation/faults.h"

#include <ucontext.h>

#include <cstdint>
#include <cstdio>

#include "emulation/emulator.h"
#include "emulation/fiber.h"

namespace kvevict::emulation {

#ifdef __SANITIZE_ADDRESS__

FaultHandler::FaultHandler() {}
FaultHandler::~FaultHandler() {}

#else

namespace {

constexpr size_t kStackBytes = 64 * 1024;
alignas(16) char handler_stack[kStackBytes];
alignas(16) char failing_stack[kStackBytes];  // the fiber's own one may be the problem
char message[256];

[[noreturn]] void fail_after_fault() { fail("%s", message); }

void describe(const siginfo_t& info) {
  const Fiber& fiber = *running_fiber();
  const auto address = reinterpret_cast<uintptr_t>(info.si_addr);
  const auto stack = reinterpret_cast<uintptr_t>(fiber.stack);
  if (info.si_code == SI_KERNEL) {
    snprintf(message, sizeof(message), "a misaligned vector access, or a wild pointer");
  } else if (address < stack && address >= stack - FiberPool::kGuardBytes) {
    snprintf(message, sizeof(message), "the thread needs more than %zu bytes of stack",
             fiber.stack_bytes);
  } else if (is_behind_shared_memory(info.si_addr)) {
    snprintf(message, sizeof(message), "an access behind the end of shared memory");
  } else {
    snprintf(message, sizeof(message), "an access to memory that does not exist, at %p",
             info.si_addr);
  }
}

void on_fault(int signal, siginfo_t* info, void* context) {
  if (running_fiber() == nullptr) {  // not ours: die of it when it happens again
    ::signal(signal, SIG_DFL);
    return;
  }
  describe(*info);
  auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  registers[REG_RSP] = reinterpret_cast<greg_t>(failing_stack + kStackBytes - 8);
  registers[REG_RIP] = reinterpret_cast<greg_t>(fail_after_fault);
}

}  // namespace

FaultHandler::FaultHandler() {
  stack_t stack = {};
  stack.ss_sp = handler_stack;
  stack.ss_size = kStackBytes;
  sigaltstack(&stack, &old_stack_);
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &old_segv_);
  sigaction(SIGBUS, &action, &old_bus_);
}

FaultHandler::~FaultHandler() {
  sigaction(SIGSEGV, &old_segv_, nullptr);
  sigaction(SIGBUS, &old_bus_, nullptr);
  sigaltstack(&old_stack_, nullptr);
}

// Kernels are compiled with some of UndefinedBehaviorSanitizer's checks, which call these. The
// types are those that the compiler passes.
namespace {

struct SourceLocation {
  const char* file;
  uint32_t line, column;
};
struct TypeDescriptor {
  uint16_t kind, info;
  char name[1];
};

const char* base_name(const char* path) {
  const char* name = path;
  for (const char* c = path; *c != 0; ++c) {
    if (*c == '/') name = c + 1;
  }
  return name;
}

}  // namespace

extern "C" {

struct TypeMismatch {
  SourceLocation place;
  const TypeDescriptor& type;
  unsigned char log_alignment, kind;
};
[[noreturn]] void __ubsan_handle_type_mismatch_v1_abort(TypeMismatch* data, uintptr_t address) {
  const char* file = base_name(data->place.file);
  if (address == 0) fail("%s:%u: an access through a null pointer", file, data->place.line);
  fail("%s:%u: a misaligned access to %s at %p, which must be a multiple of %u", file,
       data->place.line, data->type.name, reinterpret_cast<void*>(address),
       1u << data->log_alignment);
}

struct OutOfBounds {
  SourceLocation place;
  const TypeDescriptor &array, &index;
};
[[noreturn]] void __ubsan_handle_out_of_bounds_abort(OutOfBounds* data, uintptr_t index) {
  fail("%s:%u: index %lld is out of the bounds of %s", base_name(data->place.file),
       data->place.line, static_cast<long long>(index), data->array.name);
}

struct ShiftOutOfBounds {
  SourceLocation place;
  const TypeDescriptor &left, &right;
};
[[noreturn]] void __ubsan_handle_shift_out_of_bounds_abort(ShiftOutOfBounds* data, uintptr_t,
                                                           uintptr_t count) {
  fail("%s:%u: %s is shifted by %lld", base_name(data->place.file), data->place.line,
       data->left.name, static_cast<long long>(count));
}

struct Overflow {
  SourceLocation place;
  const TypeDescriptor& type;
};
[[noreturn]] void __ubsan_handle_divrem_overflow_abort(Overflow* data, uintptr_t, uintptr_t) {
  fail("%s:%u: a division by zero", base_name(data->place.file), data->place.line);
}

}  // extern "C"

#endif

}  // namespace kvevict::emulation
