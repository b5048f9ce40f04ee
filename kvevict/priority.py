"""Priorities for :func:`kvevict.select_topk`, so that nobody writes them by hand."""

from __future__ import annotations

import torch
from torch import Tensor

NEVER, ORDINARY, PREFERRED, FORCED = 0, 1, 2, 3


def build_priority(
    key_mask: Tensor,
    *,
    num_sink: int | Tensor = 0,
    num_recent: int | Tensor = 0,
    preferred: Tensor | None = None,
) -> Tensor:
    """Builds the priority of every key.

    Sinks and recent keys are counted among each sequence's real tokens, so left- and right-padded
    batches come out alike.

    Args:
        key_mask: [batch_size, kv_len] bool, True for a real token.
        num_sink: how many of the first real tokens are forced, or [batch_size] integers, one count
            per sequence (whose values are not checked: negative ones count as 0).
        num_recent: how many of the last real tokens are forced, likewise.
        preferred: [batch_size, kv_len] bool, tokens that outrank ordinary ones whatever their
            score, such as text before vision.

    Returns:
        [batch_size, kv_len] uint8: 3 for sinks and recent keys, 2 for preferred, 1 for ordinary
        keys, 0 for padding.

    Raises:
        ValueError: if key_mask is not bool, num_sink or num_recent is negative, or these or
            preferred have another shape.
    """
    if key_mask.dtype != torch.bool or key_mask.dim() != 2:
        what = f"{key_mask.dtype} of shape {tuple(key_mask.shape)}"
        raise ValueError(f"kvevict.build_priority: key_mask must be bool of rank 2, got {what}")
    if preferred is not None:
        _check_shape("preferred", preferred, key_mask.shape)
    num_sink = _check_count("num_sink", num_sink, key_mask)
    num_recent = _check_count("num_recent", num_recent, key_mask)
    from_start = key_mask.cumsum(-1)
    from_end = key_mask.flip(-1).cumsum(-1).flip(-1)
    priority = torch.full_like(key_mask, ORDINARY, dtype=torch.uint8)
    if preferred is not None:
        priority.masked_fill_(preferred, PREFERRED)
    priority.masked_fill_((from_start <= num_sink) | (from_end <= num_recent), FORCED)
    return priority.masked_fill_(~key_mask, NEVER)


def _check_count(name: str, count: int | Tensor, key_mask: Tensor) -> int | Tensor:
    """Returns a count to compare ranks [batch_size, kv_len] with."""
    if isinstance(count, Tensor):
        _check_shape(name, count, key_mask.shape[:1])
        return count[:, None]
    if count < 0:
        raise ValueError(f"kvevict.build_priority: {name} must be at least 0, got {count}")
    return count


def _check_shape(name: str, tensor: Tensor, expected: torch.Size) -> None:
    if tensor.shape != expected:
        shapes = f"{tuple(expected)}, got {tuple(tensor.shape)}"
        raise ValueError(f"kvevict.build_priority: {name} must have shape {shapes}")
