"""Lists of keys, as masks and in parts."""

from __future__ import annotations

import torch
from torch import Tensor


def in_list(index: Tensor, kv_len: int) -> Tensor:
    """Return which keys are in a list.

    Args:
        index: [..., k] int32, positions, -1 = none.
        kv_len: number of keys.

    Returns:
        [..., kv_len] bool.
    """
    shape = (*index.shape[:-1], kv_len + 1)
    found = torch.zeros(shape, dtype=torch.bool, device=index.device)
    return found.scatter_(-1, index.where(index >= 0, kv_len).long(), True)[..., :kv_len]


def part_of(place: Tensor, size: Tensor, num_parts: int | Tensor) -> Tensor:
    """Return the part that a place is in, of `size` places cut into contiguous parts.

    The first `size % num_parts` parts are one place longer than the others.
    """
    short, rest = size // num_parts, size % num_parts
    split = rest * (short + 1)
    return torch.where(
        place < split,
        place // (short + 1),
        rest + (place - split) // short.clamp(min=1),
    )


def at(values: Tensor, index: Tensor) -> Tensor:
    """Return `values` [batch_size, num_lists, kv_len] at `index`, that of the last for -1."""
    batch_size, num_lists, _ = values.shape
    sequence = torch.arange(batch_size, device=values.device)[:, None, None]
    which = torch.arange(num_lists, device=values.device)[:, None]
    return values[sequence, which, index.long()]
