"""Oracle of `kvevict.rerotate_keys_`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rerotate_keys_(
    keys: Sequence[Tensor],
    old_positions: Tensor,
    new_positions: Tensor,
    inv_freq: Tensor,
    *,
    axis_of_freq: Tensor | None = None,
    interleaved: bool = False,
) -> None:
    """Turn the pairs of channels of every slot by (new - old) * inv_freq, in place.

    Slots that do not move, and empty ones, are not written. The others are computed in float64 and
    rounded once.
    """
    if len(keys) == 0:
        return
    if axis_of_freq is None:
        axis_of_freq = torch.zeros_like(inv_freq, dtype=torch.int32)
        old_positions, new_positions = old_positions[None], new_positions[None]
    old = expand_positions(old_positions, len(keys))
    new = expand_positions(new_positions, len(keys))
    distance = new - old
    moves = ~((old < 0) | (new < 0)).any(0) & (distance != 0).any(0)
    for layer, key in enumerate(keys):
        of_layer = (slice(None), layer, slice(None), slice(None), slice(key.shape[2]))
        by_freq = distance[of_layer][axis_of_freq.long()].movedim(0, -1)
        rotary = key[..., : 2 * len(inv_freq)]
        rotated = rotate_pairs(rotary.double(), by_freq * inv_freq.double(), interleaved)
        row_moves = moves[of_layer[1:]][..., None]
        rotary.copy_(rotated.to(key.dtype).where(row_moves, rotary))


def rotate_pairs(states: Tensor, angle: Tensor, interleaved: bool) -> Tensor:
    """Turn pairs of channels [..., 2 * num_freqs] by angle [..., num_freqs]."""
    if interleaved:
        a, b = states[..., 0::2], states[..., 1::2]
    else:
        a, b = states.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1 if interleaved else -2).flatten(
        -2
    )


def expand_positions(positions: Tensor, num_layers: int) -> Tensor:
    """Return [num_axes, num_layers, batch_size, num_kv_heads | 1, kv_len] int64.

    From positions by sequence, by sequence and head, or by layer, sequence and head.
    """
    if positions.dim() == 3:
        positions = positions[:, :, None]
    if positions.dim() == 4:
        positions = positions[:, None]
    return positions.long().expand(-1, num_layers, -1, -1, -1)
