// SPDX-License-Identifier: Apache-2.0
// Run-time values to compile-time constants, without macros.
#pragma once

#include <type_traits>

namespace kvevict {

template <auto value>
using Constant = std::integral_constant<decltype(value), value>;

// Calls f(Constant<V>{}) for the V that equals value; returns whether there is one.
template <auto... Vs, typename T, typename F>
constexpr bool dispatch_value(T value, F&& f) {
  return ((value == Vs ? (f(Constant<Vs>{}), true) : false) || ...);
}

}  // namespace kvevict
