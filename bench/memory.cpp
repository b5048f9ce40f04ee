// SPDX-License-Identifier: Apache-2.0
// Counts the bytes of the C heap, for LD_PRELOAD: everything that torch, MKL, oneDNN, the
// compiler's generated code and the operators under test allocate goes through these functions.
// Memory that a program maps by itself (mmap) is not counted.
#include <errno.h>
#include <malloc.h>
#include <stddef.h>
#include <stdint.h>

#include <atomic>

extern "C" {
void* __libc_malloc(size_t size);
void* __libc_calloc(size_t count, size_t size);
void* __libc_realloc(void* pointer, size_t size);
void* __libc_memalign(size_t alignment, size_t size);
void __libc_free(void* pointer);
}

namespace {

std::atomic<int64_t> in_use{0};
std::atomic<int64_t> peak{0};

void* count(void* pointer) {
  if (pointer == nullptr) return nullptr;
  const int64_t size = static_cast<int64_t>(malloc_usable_size(pointer));
  const int64_t now = in_use.fetch_add(size) + size;
  int64_t highest = peak.load();
  while (now > highest && !peak.compare_exchange_weak(highest, now)) {
  }
  return pointer;
}

void uncount(void* pointer) {
  if (pointer != nullptr) in_use.fetch_sub(static_cast<int64_t>(malloc_usable_size(pointer)));
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int64_t counted_in_use() { return in_use.load(); }
EXPORT int64_t counted_peak() { return peak.load(); }
EXPORT void counted_reset_peak() { peak.store(in_use.load()); }

EXPORT void* malloc(size_t size) { return count(__libc_malloc(size)); }
EXPORT void* calloc(size_t number, size_t size) { return count(__libc_calloc(number, size)); }
EXPORT void* memalign(size_t alignment, size_t size) {
  return count(__libc_memalign(alignment, size));
}
EXPORT void* aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

EXPORT int posix_memalign(void** result, size_t alignment, size_t size) {
  void* pointer = memalign(alignment, size);
  if (pointer == nullptr) return ENOMEM;
  *result = pointer;
  return 0;
}

EXPORT void* realloc(void* pointer, size_t size) {
  uncount(pointer);
  void* moved = __libc_realloc(pointer, size);
  // Where it failed the old block is still there; of size 0, it is gone.
  count(moved != nullptr || size == 0 ? moved : pointer);
  return moved;
}

EXPORT void free(void* pointer) {
  uncount(pointer);
  __libc_free(pointer);
}
