// SPDX-License-Identifier: Apache-2.0
#include "ops/rerotate_keys/rerotate_keys.h"

#include <algorithm>

#include "core/cpu/simd.h"

namespace kvevict {
namespace {

using Angles = RerotateKeys::Angles;

struct CosSin {
  Vec cos, sin;
};

// Of angles in units of 2^-32 turns. The polynomials are minimax on an eighth of a turn, with
// relative errors of 4e-9 and 2e-10.
CosSin cos_sin(IntVec angle) {
  constexpr float kRadians = 0x1.921fb6p-30f;  // 2 pi / 2^32
  const UintVec bits = bit_cast<UintVec>(angle);
  // The nearest quarter of a turn, modulo 4, and how far behind or beyond it.
  const UintVec quarter = (bits + (1u << 29)) >> 30;
  const Vec x = __builtin_convertvector(bit_cast<IntVec>(bits - (quarter << 30)), Vec) * kRadians;
  const Vec z = x * x;
  const Vec s = x + x * z * (-0x1.555546p-3f + z * (0x1.110760p-7f + z * -0x1.994eb4p-13f));
  const Vec c =
      1.0f - 0.5f * z + z * z * (0x1.55554ap-5f + z * (-0x1.6c0c34p-10f + z * 0x1.99eb9cp-16f));
  const IntVec odd = (quarter & 1u) != 0u;
  const UintVec cos_sign = ((quarter + 1u) & 2u) << 30, sin_sign = (quarter & 2u) << 30;
  return {bit_cast<Vec>(bit_cast<UintVec>(odd ? s : c) ^ cos_sign),
          bit_cast<Vec>(bit_cast<UintVec>(odd ? c : s) ^ sin_sign)};
}

template <int... lanes>
void deinterleave(Vec& a, Vec& b, std::integer_sequence<int, lanes...>) {
  const Vec even = __builtin_shufflevector(a, b, (2 * lanes)...);
  b = __builtin_shufflevector(a, b, (2 * lanes + 1)...);
  a = even;
}

// Turns kLanes pairs of channels.
template <DType dtype, bool interleaved>
void rotate(char* first, char* second, const float* cos, const float* sin) {
  using Lanes = std::make_integer_sequence<int, kLanes>;
  Vec a = load_as_float<dtype>(first, 0), b = load_as_float<dtype>(second, 0);
  if constexpr (interleaved) deinterleave(a, b, Lanes{});
  const Vec c = load<Vec>(cos), s = load<Vec>(sin);
  Vec turned_a = a * c - b * s, turned_b = b * c + a * s;
  if constexpr (interleaved) {
    const Vec low = detail::interleave(turned_a, turned_b, 0, Lanes{});
    turned_b = detail::interleave(turned_a, turned_b, 1, Lanes{});
    turned_a = low;
  }
  store_rounded<dtype>(first, 0, turned_a);
  store_rounded<dtype>(second, 0, turned_b);
}

template <DType dtype, bool interleaved>
void rotate_row(char* row, int64_t num_freqs, const float* cos, const float* sin) {
  constexpr int64_t kBytes = dtype == DType::kFloat32 ? 4 : 2;
  // Where kLanes pairs begin, and their second halves.
  constexpr int64_t kStep = interleaved ? 2 * kBytes : kBytes;
  const int64_t second = (interleaved ? kLanes : num_freqs) * kBytes;
  int64_t freq = 0;
  for (; freq + kLanes <= num_freqs; freq += kLanes) {
    char* first = row + freq * kStep;
    rotate<dtype, interleaved>(first, first + second, cos + freq, sin + freq);
  }
  if (freq == num_freqs) return;
  char pairs[2 * kLanes * kBytes] = {};
  char *first = row + freq * kStep, *behind = pairs + kLanes * kBytes;
  const int64_t bytes = (num_freqs - freq) * kBytes;
  if constexpr (interleaved) {
    memcpy(pairs, first, 2 * bytes);
  } else {
    memcpy(pairs, first, bytes);
    memcpy(behind, first + second, bytes);
  }
  rotate<dtype, interleaved>(pairs, behind, cos + freq, sin + freq);
  if constexpr (interleaved) {
    memcpy(first, pairs, 2 * bytes);
  } else {
    memcpy(first, pairs, bytes);
    memcpy(first + second, behind, bytes);
  }
}

// Computes a row of cos and sin.
void compute_angles(const RerotateKeysParams& params, const Move& move, const Angles& angles,
                    int64_t row) {
  if (params.num_axes == 1) {
    std::fill(angles.distances, angles.distances + angles.stride, move.distance(0));
  } else {
    for (int64_t freq = 0; freq < params.num_freqs; ++freq) {
      angles.distances[freq] = move.distance(params.axis_of_freq[freq]);
    }
  }
  for (int64_t freq = 0; freq < angles.stride; ++freq) {
    angles.angles[freq] = turn_by(angles.turns[freq], angles.distances[freq]);
  }
  for (int64_t freq = 0; freq < angles.stride; freq += kLanes) {
    const CosSin v = cos_sin(load<IntVec>(angles.angles + freq));
    store(angles.cos + row * angles.stride + freq, v.cos);
    store(angles.sin + row * angles.stride + freq, v.sin);
  }
}

// Computes the angles of slots [begin, end) of a list; returns how many of them turn.
int64_t compute_slots(const RerotateKeysParams& params, int64_t layer, int64_t batch, int64_t head,
                      int64_t begin, int64_t end, const Angles& angles) {
  int64_t count = 0;
  int32_t row = -1;
  Move last{};
  const auto same_distance = [&](const Move& move) {
    for (int64_t axis = 0; axis < params.num_axes; ++axis) {
      if (move.distance(axis) != last.distance(axis)) return false;
    }
    return true;
  };
  for (int64_t slot = begin; slot < end; ++slot) {
    const Move move = params.move(layer, batch, head, slot);
    if (!params.turns(move)) continue;
    if (row < 0 || !same_distance(move)) compute_angles(params, move, angles, ++row);
    angles.slots[count] = static_cast<int32_t>(slot);
    angles.rows[count++] = row;
    last = move;
  }
  return count;
}

template <DType dtype, bool interleaved>
void rotate_blocks(const RerotateKeysParams& params, const CpuWork& work) {
  Arena arena(work.scratch);
  const Angles angles = Angles::carve(arena, params);
  std::fill(angles.turns, angles.turns + angles.stride, 0);
  std::fill(angles.distances, angles.distances + angles.stride, 0);
  std::transform(params.inv_freq, params.inv_freq + params.num_freqs, angles.turns,
                 turns_per_position);
  const int64_t blocks = RerotateKeys::blocks_per_list(params);
  const int64_t layers = params.layers_per_list(), heads = params.heads_per_list();
  for (int64_t item = work.begin; item < work.end; ++item) {
    const int64_t list = item / blocks;
    const int64_t begin_head = list % params.list_heads() * heads;
    const int64_t batch = list / params.list_heads() % params.batch_size;
    const int64_t begin_layer = list / params.list_heads() / params.batch_size * layers;
    const int64_t begin = item % blocks * RerotateKeys::kCpuSlots;
    const int64_t end = std::min(begin + RerotateKeys::kCpuSlots, params.kv_len);
    const int64_t count = compute_slots(params, begin_layer, batch, begin_head, begin, end, angles);
    for (int64_t layer = begin_layer; layer < begin_layer + layers; ++layer) {
      const KvTensor& key = params.keys[layer];
      for (int64_t head = begin_head; head < begin_head + heads; ++head) {
        for (int64_t i = 0; i < count && angles.slots[i] < key.kv_len; ++i) {
          const int64_t row = angles.rows[i] * angles.stride;
          rotate_row<dtype, interleaved>(key.row(batch, head, angles.slots[i]), params.num_freqs,
                                         angles.cos + row, angles.sin + row);
        }
      }
    }
  }
}

}  // namespace

template <>
void RerotateKeys::run_cpu<kThisIsa>(const RerotateKeysParams& params,
                                     const CpuWork& work) noexcept {
  dispatch_dtype(params.dtype, [&](auto dtype) {
    (void)dispatch_value<false, true>(params.interleaved, [&](auto interleaved) {
      rotate_blocks<dtype.value, interleaved.value>(params, work);
    });
  });
}

}  // namespace kvevict
