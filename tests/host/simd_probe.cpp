// SPDX-License-Identifier: Apache-2.0
#include "simd_probe.h"

#include "core/cpu/simd.h"

namespace kvevict {

template <>
int SimdProbe::lanes<kThisIsa>() {
  return kLanes;
}

template <>
void SimdProbe::exp2<kThisIsa>(const float* input, float* output, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    store(output + i, KVEVICT_ISA::exp2(load<Vec>(input + i)));
  }
}

template <>
void SimdProbe::half_to_float<kThisIsa>(const uint16_t* input, float* output, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    store(output + i, load_as_float<DType::kFloat16>(input, i));
  }
}

template <>
void SimdProbe::bfloat16_to_float<kThisIsa>(const uint16_t* input, float* output, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    store(output + i, load_as_float<DType::kBFloat16>(input, i));
  }
}

template <>
void SimdProbe::float_to_half<kThisIsa>(const float* input, uint16_t* output, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    store_rounded<DType::kFloat16>(output, i, load<Vec>(input + i));
  }
}

template <>
void SimdProbe::float_to_bfloat16<kThisIsa>(const float* input, uint16_t* output, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    store_rounded<DType::kBFloat16>(output, i, load<Vec>(input + i));
  }
}

template <>
void SimdProbe::transpose<kThisIsa>(const float* input, float* output) {
  Vec rows[kLanes];
  for (int i = 0; i < kLanes; ++i) rows[i] = load<Vec>(input + i * kLanes);
  KVEVICT_ISA::transpose(rows);
  for (int i = 0; i < kLanes; ++i) store(output + i * kLanes, rows[i]);
}

}  // namespace kvevict
