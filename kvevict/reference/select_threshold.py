"""Oracle of `kvevict.select_threshold`. The threshold is float32, as the contract has it."""

from __future__ import annotations

import torch
from torch import Tensor

from kvevict.reference.select_topk import select_topk


def select_threshold(
    sums: Tensor,
    maxima: Tensor,
    candidates: Tensor,
    *,
    ratio: float | None = None,
    kappa: float | None = None,
    alpha: float,
    max_evicted: int | None = None,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return kept_indices [batch_size, num_heads, kv_len] and kept_lens [batch_size, num_heads]."""
    kv_len = sums.shape[-1]
    real = torch.ones_like(candidates) if key_mask is None else key_mask
    real = real[:, None].expand(sums.shape)
    candidates = candidates[:, None] & real
    threshold = compute_threshold(sums, candidates, ratio, kappa)
    evictable = candidates & (sums < threshold) & (maxima < sums.new_tensor(alpha))
    num_evicted = evictable.sum(-1).clamp(max=kv_len if max_evicted is None else max_evicted)

    # What is evicted are the last ones of the total order: the lowest sums, then the highest index.
    priority = torch.where(evictable, 1, 2).where(real, 0).to(torch.uint8)
    row_k = real.sum(-1) - num_evicted
    return select_topk(sums, kv_len, row_k=row_k, priority=priority)


def compute_threshold(
    sums: Tensor, candidates: Tensor, ratio: float | None, kappa: float | None
) -> Tensor:
    """Return ratio * total, or kappa / num_candidates * total [batch_size, num_heads, 1]."""
    segments = split(sums.where(candidates, 0), 1024)
    total = add_up(add_up(segments))[..., None]
    if kappa is None:
        return sums.new_tensor(ratio) * total
    return sums.new_tensor(kappa) / candidates.sum(-1, keepdim=True) * total


def add_up(values: Tensor) -> Tensor:
    """Add up the last dimension in the order of the contract.

    32 lanes add up every 32nd value each, then lanes are added pairwise at halving distances.
    """
    lanes = values.new_zeros(*values.shape[:-1], 32)
    for step in split(values, 32).unbind(-2):
        lanes = lanes + step
    while lanes.shape[-1] > 1:
        lower, upper = lanes.chunk(2, dim=-1)
        lanes = lower + upper
    return lanes[..., 0]


def split(values: Tensor, size: int) -> Tensor:
    """Return the last dimension in pieces of `size`, the last one filled up with 0."""
    *outer, length = values.shape
    count = -(-length // size)
    zeros = values.new_zeros(*outer, count * size - length)
    return torch.cat([values, zeros], dim=-1).view(*outer, count, size)
