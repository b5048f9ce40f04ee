// SPDX-License-Identifier: Apache-2.0
#include "emulation/shared_arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "emulation/emulator.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace kvevict::emulation {
namespace {

constexpr size_t kPageBytes = 4096;
constexpr size_t kGuardBytes = 16 * kPageBytes;
constexpr size_t kAlignment = 128;
constexpr size_t kArenaBytes = (kMaxSharedBytes + kPageBytes - 1) / kPageBytes * kPageBytes;

}  // namespace

SharedArena::SharedArena() {
  void* memory = mmap(nullptr, kArenaBytes + 2 * kGuardBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<char*>(memory) + kGuardBytes;
  guard_ = begin_ = memory_ + kArenaBytes;
  mprotect(memory_ - kGuardBytes, kGuardBytes, PROT_NONE);
  mprotect(guard_, kGuardBytes, PROT_NONE);
}

void SharedArena::start_block(size_t bytes) {
  bytes_ = bytes;
  begin_ = guard_ - (bytes + kAlignment - 1) / kAlignment * kAlignment;
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(memory_, kArenaBytes);
#endif
  memset(begin_, kGarbage, static_cast<size_t>(guard_ - begin_));
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(memory_, static_cast<size_t>(begin_ - memory_));
  __asan_poison_memory_region(begin_ + bytes, static_cast<size_t>(guard_ - begin_ - bytes));
#endif
}

bool SharedArena::is_intact() const {
#ifdef __SANITIZE_ADDRESS__
  return true;  // every access was checked
#else
  return std::all_of(begin_ + bytes_, guard_,
                     [](char c) { return c == static_cast<char>(kGarbage); });
#endif
}

bool SharedArena::contains(const void* address, size_t count) const {
  const auto* first = static_cast<const char*>(address);
  return first >= begin_ && first + count <= begin_ + bytes_;
}

bool SharedArena::is_guard(const void* address) const {
  return address >= guard_ && address < guard_ + kGuardBytes;
}

}  // namespace kvevict::emulation
