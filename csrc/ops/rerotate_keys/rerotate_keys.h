// SPDX-License-Identifier: Apache-2.0
// Angles are fractions of a turn in fixed point. Sums and products wrap around as angles do, so
// that nothing has to be reduced modulo 2 pi, and all backends turn by the same angle exactly.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/arena.h"
#include "core/cpu/isa.h"
#include "core/dtype.h"
#include "core/kv_layers.h"

namespace kvevict {

// Positions [num_axes, num_layers, batch_size, num_kv_heads, kv_len]; a stride of 0 shares a list.
struct PositionLists {
  const int32_t* positions;
  int64_t stride_axis, stride_layer, stride_batch, stride_head;

  // Of the first axis.
  KVEVICT_HD const int32_t* list(int64_t layer, int64_t batch, int64_t head) const {
    return positions + layer * stride_layer + batch * stride_batch + head * stride_head;
  }
};

// A slot of a list of old positions and one of new positions.
struct Move {
  const int32_t* from;
  const int32_t* to;
  int64_t from_stride_axis, to_stride_axis;

  KVEVICT_HD bool is_empty(int64_t axis) const {
    return from[axis * from_stride_axis] < 0 || to[axis * to_stride_axis] < 0;
  }
  // By how many positions; not called for empty slots.
  KVEVICT_HD int32_t distance(int64_t axis) const {
    return to[axis * to_stride_axis] - from[axis * from_stride_axis];
  }
};

// inv_freq / (2 pi), the turns from one position to the next, in units of 2^-64.
KVEVICT_HD inline uint64_t turns_per_position(float inv_freq) {
  constexpr uint64_t kHigh = 0x28BE60DB, kLow = 0x9391054A;  // 2^64 / (2 pi)
  uint32_t bits;
  memcpy(&bits, &inv_freq, sizeof(bits));
  const auto exponent = static_cast<int>(bits >> 23 & 0xFF);
  if (exponent == 0) return 0;  // 0, or less than a unit
  const uint64_t mantissa = (bits & 0x7FFFFF) | 0x800000;
  const uint64_t product = mantissa * kHigh + (mantissa * kLow >> 32);  // has less than 58 bits
  const int shift = exponent - (127 + 23) + 32;
  uint64_t turns = 0;
  if (0 <= shift && shift < 64) turns = product << shift;
  if (-64 < shift && shift < 0) turns = product >> -shift;
  return bits >> 31 ? 0 - turns : turns;
}

// The angle of a distance in units of 2^-32 turns, from -1/2 turn to below 1/2.
KVEVICT_HD inline int32_t turn_by(uint64_t turns_per_position, int32_t distance) {
  const auto positions = static_cast<uint64_t>(int64_t{distance});
  return static_cast<int32_t>(turns_per_position * positions >> 32);
}

struct RerotateKeysParams {
  const KvTensor* keys;  // [num_layers]
  DType dtype;           // of all keys
  PositionLists old_positions, new_positions;
  const float* inv_freq;        // [num_freqs]
  const int32_t* axis_of_freq;  // [num_freqs], or null: one axis
  int64_t num_axes, num_freqs;
  bool interleaved;  // pairs of channels (2c, 2c + 1), else (c, c + num_freqs)
  int64_t num_layers, batch_size, num_kv_heads;
  int64_t kv_len;  // of the longest layer

  // Layers and heads that have positions of their own, and the others that share them.
  KVEVICT_HD int64_t list_layers() const {
    return old_positions.stride_layer || new_positions.stride_layer ? num_layers : 1;
  }
  KVEVICT_HD int64_t list_heads() const {
    return old_positions.stride_head || new_positions.stride_head ? num_kv_heads : 1;
  }
  KVEVICT_HD int64_t layers_per_list() const { return num_layers / list_layers(); }
  KVEVICT_HD int64_t heads_per_list() const { return num_kv_heads / list_heads(); }

  KVEVICT_HD Move move(int64_t layer, int64_t batch, int64_t head, int64_t slot) const {
    return {old_positions.list(layer, batch, head) + slot,
            new_positions.list(layer, batch, head) + slot, old_positions.stride_axis,
            new_positions.stride_axis};
  }
  // Whether any channel turns: a slot without a position on some axis is empty.
  KVEVICT_HD bool turns(const Move& move) const {
    bool turns = false;
    for (int64_t axis = 0; axis < num_axes; ++axis) {
      if (move.is_empty(axis)) return false;
      turns |= move.distance(axis) != 0;
    }
    return turns;
  }
};

struct RerotateKeys {
  static constexpr int64_t kCpuSlots = 32;  // per work item: their angles stay in cache

  // The angles of the slots of a work item, for all layers and heads that share them.
  struct Angles {
    int64_t stride;      // num_freqs in whole vectors
    uint64_t* turns;     // [stride], turns per position
    int32_t* distances;  // [stride], of one slot
    int32_t* angles;     // [stride], of one slot
    float *cos, *sin;    // [kCpuSlots, stride]
    int32_t* slots;      // [kCpuSlots], those that turn
    int32_t* rows;       // [kCpuSlots], of cos and sin: neighbors often turn alike

    static Angles carve(Arena& arena, const RerotateKeysParams& params) {
      constexpr int64_t kMostLanes = 16;
      const int64_t stride = (params.num_freqs + kMostLanes - 1) / kMostLanes * kMostLanes;
      return {stride,
              arena.take<uint64_t>(stride),
              arena.take<int32_t>(stride),
              arena.take<int32_t>(stride),
              arena.take<float>(kCpuSlots * stride),
              arena.take<float>(kCpuSlots * stride),
              arena.take<int32_t>(kCpuSlots),
              arena.take<int32_t>(kCpuSlots)};
    }
  };

  static int64_t blocks_per_list(const RerotateKeysParams& params) {
    return (params.kv_len + kCpuSlots - 1) / kCpuSlots;
  }
  static CpuPlan plan_cpu(const RerotateKeysParams& params, int /*num_threads*/) {
    constexpr int64_t kMinBlocks = 16;  // of one layer and head, that are worth a thread
    if (params.batch_size == 0 || params.num_kv_heads == 0) return {1, {0}, 0, 0};
    const int64_t lists = params.list_layers() * params.batch_size * params.list_heads();
    const int64_t sharing = params.layers_per_list() * params.heads_per_list();
    Arena arena;
    Angles::carve(arena, params);
    return {1, {lists * blocks_per_list(params)}, 0, arena.bytes(), kMinBlocks / sharing + 1};
  }
  template <Isa isa>
  static void run_cpu(const RerotateKeysParams& params, const CpuWork& work) noexcept;

  static int64_t cuda_workspace_bytes(const RerotateKeysParams& /*params*/) { return 0; }
  static int launch_cuda(const RerotateKeysParams& params, void* workspace, void* stream) noexcept;
};

}  // namespace kvevict
