// SPDX-License-Identifier: Apache-2.0
// Runs the functions of core/cpu/simd.h on arrays, once per instruction set.
#pragma once

#include <cstdint>

#include "core/cpu/isa.h"

namespace kvevict {

struct SimdProbe {
  template <Isa isa>
  static int lanes();

  // A multiple of lanes() elements; input and output do not overlap.
  template <Isa isa>
  static void exp2(const float* input, float* output, int64_t count);
  template <Isa isa>
  static void half_to_float(const uint16_t* input, float* output, int64_t count);
  template <Isa isa>
  static void bfloat16_to_float(const uint16_t* input, float* output, int64_t count);

  template <Isa isa>
  static void float_to_half(const float* input, uint16_t* output, int64_t count);
  template <Isa isa>
  static void float_to_bfloat16(const float* input, uint16_t* output, int64_t count);

  template <Isa isa>
  static void transpose(const float* input, float* output);  // [lanes, lanes]
};

}  // namespace kvevict
