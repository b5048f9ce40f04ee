// SPDX-License-Identifier: Apache-2.0
// Looks for values that break a contract. Each function returns the first offender's place, or -1.
#pragma once

#include <algorithm>
#include <cstdint>

namespace kvevict {

// Asks about many places at a time, so that compilers vectorize; bad(i) must have no side effects.
template <typename Bad>
inline int64_t find_first(int64_t begin, int64_t end, const Bad& bad) {
  constexpr int64_t kBlock = 256;
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t last = std::min(first + kBlock, end);
    int any = 0;
    for (int64_t i = first; i < last; ++i) any |= static_cast<int>(bad(i));
    if (any == 0) continue;
    for (int64_t i = first; i < last; ++i) {
      if (bad(i)) return i;
    }
  }
  return -1;
}

// Values outside of [low, high), where -1 <= low <= high <= 2^31.
inline int64_t find_outside(const int32_t* values, int64_t count, int64_t low, int64_t high) {
  const auto shift = static_cast<uint32_t>(low), size = static_cast<uint32_t>(high - low);
  return find_first(0, count,
                    [=](int64_t i) { return static_cast<uint32_t>(values[i]) - shift >= size; });
}

inline int64_t find_bad_weight(const float* values, int64_t count) {
  constexpr float kInfinity = __builtin_inff();
  return find_first(0, count,
                    [=](int64_t i) { return !((values[i] >= 0.0f) & (values[i] < kInfinity)); });
}

inline int64_t find_not_finite(const float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (!std::isfinite(values[i])) return i;
  }
  return -1;
}

inline int64_t find_not_ascending(const int32_t* values, int64_t count) {
  return find_first(1, count, [=](int64_t i) { return values[i] <= values[i - 1]; });
}

// The same for a list that -1s fill up: they are followed by nothing else.
inline int64_t find_not_ascending_then_none(const int32_t* values, int64_t count) {
  return find_first(1, count, [=](int64_t i) {
    const auto last = static_cast<uint32_t>(values[i - 1]);
    return (values[i] >= 0) & (last >= static_cast<uint32_t>(values[i]));
  });
}

}  // namespace kvevict
