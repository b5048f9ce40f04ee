// SPDX-License-Identifier: Apache-2.0
// What the threads of a warp do together.
#pragma once

#include <cstdint>

namespace kvevict::emulation {

enum class Shuffle { kIndex, kUp, kDown, kXor };
uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, int argument, int width);

void sync_warp(uint32_t mask);
uint32_t ballot(uint32_t mask, bool predicate);
uint32_t match_any(uint32_t mask, uint64_t value);

enum class Reduction { kAdd, kMin, kMax, kAnd, kOr, kXor };
uint32_t reduce_unsigned(Reduction kind, uint32_t mask, uint32_t value);
int32_t reduce_signed(Reduction kind, uint32_t mask, int32_t value);

float fp16_to_float(uint16_t bits);

// csrc/cuda/ptx.h says what the fragments are.
void load_matrices(uint32_t (&registers)[4], const void* shared_row, bool transpose);
void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_fp16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

}  // namespace kvevict::emulation
