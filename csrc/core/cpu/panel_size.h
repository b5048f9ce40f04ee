// SPDX-License-Identifier: Apache-2.0
// How large panels and tiles get. Nothing here depends on the instruction set, so that any
// translation unit can plan with it.
#pragma once

#include <cstdint>

namespace kvevict {

// The most rows that any instruction set packs to a panel, and takes as a tile's registers.
inline constexpr int64_t kMaxPanel = 64;
inline constexpr int64_t kMaxTileRows = 6;

}  // namespace kvevict
