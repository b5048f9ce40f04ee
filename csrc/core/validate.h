// SPDX-License-Identifier: Apache-2.0
// Looks for values that break a contract. Each function returns the first offender's place, or -1.
#pragma once

#include <cmath>
#include <cstdint>

namespace kvevict {

inline int64_t find_outside(const int32_t* values, int64_t count, int64_t low, int64_t high) {
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] < low || values[i] >= high) return i;
  }
  return -1;
}

inline int64_t find_bad_weight(const float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (!(values[i] >= 0.0f && std::isfinite(values[i]))) return i;
  }
  return -1;
}

inline int64_t find_not_finite(const float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (!std::isfinite(values[i])) return i;
  }
  return -1;
}

inline int64_t find_not_ascending(const int32_t* values, int64_t count) {
  for (int64_t i = 1; i < count; ++i) {
    if (values[i] <= values[i - 1]) return i;
  }
  return -1;
}

}  // namespace kvevict
