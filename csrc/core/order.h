// SPDX-License-Identifier: Apache-2.0
// THE total order of scores, used by every selection on every backend: NaN below -inf, -0 equal to
// +0, otherwise as floats compare. Ties go to the lower index, which the selection itself sees to.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/macros.h"

namespace kvevict {

// Keys outside the range of order_key: below and above every score.
inline constexpr uint32_t kKeyNever = 0;
inline constexpr uint32_t kKeyAlways = 0xFFFFFFFFu;

// Maps score bits to unsigned integers in the same order; all results lie strictly between
// kKeyNever and kKeyAlways.
KVEVICT_HD inline uint32_t order_key(uint32_t bits) {
  constexpr uint32_t kSign = 0x80000000u;
  constexpr uint32_t kInfinity = 0x7F800000u;
  const uint32_t magnitude = bits & ~kSign;
  if (magnitude > kInfinity) return 1;  // NaN of either sign
  if (magnitude == 0) return kSign;     // -0 is +0
  return (bits & kSign) ? ~bits : bits | kSign;
}

KVEVICT_HD inline uint32_t order_key(float score) {
  uint32_t bits;
  memcpy(&bits, &score, sizeof(bits));
  return order_key(bits);
}

}  // namespace kvevict
