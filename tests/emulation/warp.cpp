// SPDX-License-Identifier: Apache-2.0
#include "emulation/warp.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "emulation/emulator.h"

namespace kvevict::emulation {
namespace {

template <typename F>
void for_each_lane(uint32_t mask, F&& f) {
  for (; mask != 0; mask &= mask - 1) f(std::countr_zero(mask));
}

template <typename T>
T& lane_data(void* const* lanes, int lane) {
  return *static_cast<T*>(lanes[lane]);
}

// --- Shuffles ------------------------------------------------------------------------------------

struct ShuffleLane {
  uint64_t value;
  int argument, width;
  uint64_t result;
};

template <Shuffle kind>
int source_lane(int lane, int argument, int width) {
  const int first = lane & ~(width - 1), last = first + width - 1;
  switch (kind) {
    case Shuffle::kIndex: return first + (argument & (width - 1));
    case Shuffle::kUp: return lane - argument < first ? lane : lane - argument;
    case Shuffle::kDown: return lane + argument > last ? lane : lane + argument;
    case Shuffle::kXor: return (lane ^ argument) > last ? lane : lane ^ argument;
  }
}

template <Shuffle kind>
void complete_shuffle(void* const* lanes, uint32_t mask) {
  for_each_lane(mask, [&](int lane) {
    auto& data = lane_data<ShuffleLane>(lanes, lane);
    const int source = source_lane<kind>(lane, data.argument, data.width);
    if (!(mask >> source & 1)) {
      fail("shuffle: lane %d reads lane %d, which takes no part (lanes 0x%08x do)", lane, source,
           mask);
    }
    data.result = lane_data<ShuffleLane>(lanes, source).value;
  });
}

constexpr Collective kShuffles[] = {
    {"__shfl_sync", complete_shuffle<Shuffle::kIndex>, false},
    {"__shfl_up_sync", complete_shuffle<Shuffle::kUp>, false},
    {"__shfl_down_sync", complete_shuffle<Shuffle::kDown>, false},
    {"__shfl_xor_sync", complete_shuffle<Shuffle::kXor>, false},
};

// --- Votes and reductions ------------------------------------------------------------------------

constexpr Collective kSyncWarp = {"__syncwarp", [](void* const*, uint32_t) {}, false};

struct VoteLane {
  uint64_t value;
  uint32_t result;
};

void complete_ballot(void* const* lanes, uint32_t mask) {
  uint32_t votes = 0;
  for_each_lane(mask, [&](int lane) {
    votes |= static_cast<uint32_t>(lane_data<VoteLane>(lanes, lane).value) << lane;
  });
  for_each_lane(mask, [&](int lane) { lane_data<VoteLane>(lanes, lane).result = votes; });
}
constexpr Collective kBallot = {"__ballot_sync (or __any_sync, __all_sync)", complete_ballot,
                                false};

void complete_match(void* const* lanes, uint32_t mask) {
  for_each_lane(mask, [&](int lane) {
    auto& mine = lane_data<VoteLane>(lanes, lane);
    mine.result = 0;
    for_each_lane(mask, [&](int other) {
      const bool same = lane_data<VoteLane>(lanes, other).value == mine.value;
      mine.result |= static_cast<uint32_t>(same) << other;
    });
  });
}
constexpr Collective kMatchAny = {"__match_any_sync", complete_match, false};

template <typename T, Reduction kind>
T combine(T a, T b) {
  switch (kind) {
    case Reduction::kAdd:
      return static_cast<T>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
    case Reduction::kMin: return std::min(a, b);
    case Reduction::kMax: return std::max(a, b);
    case Reduction::kAnd: return a & b;
    case Reduction::kOr: return a | b;
    case Reduction::kXor: return a ^ b;
  }
}

template <typename T, Reduction kind>
void complete_reduction(void* const* lanes, uint32_t mask) {
  T total = lane_data<T>(lanes, std::countr_zero(mask));
  for_each_lane(mask & (mask - 1),
                [&](int lane) { total = combine<T, kind>(total, lane_data<T>(lanes, lane)); });
  for_each_lane(mask, [&](int lane) { lane_data<T>(lanes, lane) = total; });
}

template <typename T>
constexpr Collective kReductions[] = {
    {"__reduce_add_sync", complete_reduction<T, Reduction::kAdd>, false},
    {"__reduce_min_sync", complete_reduction<T, Reduction::kMin>, false},
    {"__reduce_max_sync", complete_reduction<T, Reduction::kMax>, false},
    {"__reduce_and_sync", complete_reduction<T, Reduction::kAnd>, false},
    {"__reduce_or_sync", complete_reduction<T, Reduction::kOr>, false},
    {"__reduce_xor_sync", complete_reduction<T, Reduction::kXor>, false},
};

// --- Matrices ------------------------------------------------------------------------------------

constexpr uint32_t kWholeWarp = ~0u;

struct LoadLane {
  const char* row;  // 16 bytes
  uint32_t* registers;
};

template <bool transpose>
void complete_load(void* const* lanes, uint32_t) {
  uint16_t matrices[4][8][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    memcpy(matrices[lane / 8][lane % 8], lane_data<LoadLane>(lanes, lane).row, 16);
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int row = lane / 4, column = 2 * (lane % 4);
    for (int i = 0; i < 4; ++i) {
      const auto& m = matrices[i];
      const uint32_t low = transpose ? m[column][row] : m[row][column];
      const uint32_t high = transpose ? m[column + 1][row] : m[row][column + 1];
      lane_data<LoadLane>(lanes, lane).registers[i] = low | high << 16;
    }
  }
}
constexpr Collective kLoadMatrices = {"ldmatrix", complete_load<false>, true};
constexpr Collective kLoadTransposed = {"ldmatrix.trans", complete_load<true>, true};

struct MmaLane {
  float* d;
  const uint32_t *a, *b;
};

float from_bits(uint32_t bits) { return std::bit_cast<float>(bits); }

float from_bf16(uint16_t bits) { return from_bits(static_cast<uint32_t>(bits) << 16); }

// Tensor cores round toward zero (Fasi et al., Numerical behavior of NVIDIA tensor cores, 2021).
float truncate(double x) {
  const auto nearest = static_cast<float>(x);
  const bool away = std::fabs(static_cast<double>(nearest)) > std::fabs(x);
  return from_bits(std::bit_cast<uint32_t>(nearest) - (away ? 1 : 0));
}

// d += a * b. The sum of all products and d is rounded once.
void multiply_add(float (&d)[16][8], const float (&a)[16][16], const float (&b)[16][8]) {
  for (int row = 0; row < 16; ++row) {
    double sums[8];
    for (int j = 0; j < 8; ++j) sums[j] = d[row][j];
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 8; ++j) sums[j] += static_cast<double>(a[row][k]) * b[k][j];
    }
    for (int j = 0; j < 8; ++j) d[row][j] = truncate(sums[j]);
  }
}

template <typename F>
void complete_mma(void* const* lanes, F&& unpack) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& data = lane_data<MmaLane>(lanes, lane);
    const int group = lane / 4, in_group = lane % 4;
    unpack(data, group, in_group, a, b);
    for (int i = 0; i < 4; ++i) d[group + 8 * (i / 2)][2 * in_group + i % 2] = data.d[i];
  }
  multiply_add(d, a, b);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& data = lane_data<MmaLane>(lanes, lane);
    for (int i = 0; i < 4; ++i) data.d[i] = d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
  }
  ++counters.mmas;
}

// m16n8k16
template <float (*convert)(uint16_t)>
void complete_mma_16_bit(void* const* lanes, uint32_t) {
  complete_mma(lanes, [](const MmaLane& data, int group, int in_group, auto& a, auto& b) {
    for (int half = 0; half < 2; ++half) {
      const auto unpacked = [half](uint32_t pair) {
        return convert(static_cast<uint16_t>(pair >> (16 * half)));
      };
      const int k = 2 * in_group + half;
      for (int i = 0; i < 4; ++i) a[group + 8 * (i % 2)][k + 8 * (i / 2)] = unpacked(data.a[i]);
      for (int i = 0; i < 2; ++i) b[k + 8 * i][group] = unpacked(data.b[i]);
    }
  });
}

constexpr Collective kMmaBf16 = {"mma bf16", complete_mma_16_bit<from_bf16>, true};
constexpr Collective kMmaFp16 = {"mma fp16", complete_mma_16_bit<fp16_to_float>, true};

void mma(const Collective& kind, float* d, const uint32_t* a, const uint32_t* b) {
  MmaLane lane{d, a, b};
  collective(kind, kWholeWarp, &lane);
}

}  // namespace

uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, int argument, int width) {
  ShuffleLane lane{value, argument, width, 0};
  collective(kShuffles[static_cast<int>(kind)], mask, &lane);
  return lane.result;
}

void sync_warp(uint32_t mask) { collective(kSyncWarp, mask, nullptr); }

uint32_t ballot(uint32_t mask, bool predicate) {
  VoteLane lane{predicate, 0};
  collective(kBallot, mask, &lane);
  return lane.result;
}

uint32_t match_any(uint32_t mask, uint64_t value) {
  VoteLane lane{value, 0};
  collective(kMatchAny, mask, &lane);
  return lane.result;
}

uint32_t reduce_unsigned(Reduction kind, uint32_t mask, uint32_t value) {
  collective(kReductions<uint32_t>[static_cast<int>(kind)], mask, &value);
  return value;
}

int32_t reduce_signed(Reduction kind, uint32_t mask, int32_t value) {
  collective(kReductions<int32_t>[static_cast<int>(kind)], mask, &value);
  return value;
}

float fp16_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7FFFu) << 13;
  const bool finite = (bits & 0x7C00u) != 0x7C00u;
  const float value = finite ? from_bits(magnitude) * 0x1p112f : from_bits(magnitude | 0x7F800000u);
  return from_bits(sign | std::bit_cast<uint32_t>(value));
}

void load_matrices(uint32_t (&registers)[4], const void* shared_row, bool transpose) {
  check_aligned(shared_row, 16, "ldmatrix");
  check_shared(shared_row, 16, "ldmatrix");
  LoadLane lane{static_cast<const char*>(shared_row), registers};
  collective(transpose ? kLoadTransposed : kLoadMatrices, kWholeWarp, &lane);
}

void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma(kMmaBf16, d, a, b);
}
void mma_fp16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma(kMmaFp16, d, a, b);
}

}  // namespace kvevict::emulation
