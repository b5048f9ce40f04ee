"""Oracle of `kvevict.select_topk`, and the statement of the total order."""

from __future__ import annotations

import torch
from torch import Tensor


def select_topk(
    scores: Tensor,
    k: int,
    *,
    row_k: Tensor | None = None,
    priority: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return kept_indices [batch_size, num_heads, k] and kept_lens [batch_size, num_heads]."""
    batch_size, num_heads, kv_len = scores.shape
    priority = expand_priority(scores, priority)
    kept_lens = (priority > 0).sum(-1).clamp(max=k)
    if row_k is not None:
        kept_lens = torch.minimum(kept_lens, row_k.long())

    rank = sort_keys(scores, priority).argsort(-1)
    kept = rank < kept_lens[..., None]
    index = torch.arange(kv_len, device=scores.device).expand_as(kept)
    ascending = index.where(kept, kv_len).sort(-1).values[..., :k]
    kept_indices = ascending.new_full((batch_size, num_heads, k), -1)
    kept_indices[..., :kv_len] = ascending.where(ascending < kv_len, -1)
    return kept_indices.int(), kept_lens.int()


def expand_priority(scores: Tensor, priority: Tensor | None) -> Tensor:
    """Return the priority of every score [batch_size, num_heads, kv_len] uint8."""
    if priority is None:
        return torch.ones_like(scores, dtype=torch.uint8)
    return (priority[:, None] if priority.dim() == 2 else priority).expand_as(scores)


def sort_keys(scores: Tensor, priority: Tensor) -> Tensor:
    """Return the indices of all keys, best first, in the last dimension.

    The order: descending priority, then descending score, then ascending index. -0 equals +0, and
    NaN is below -inf. Stable sorts from the least to the most significant criterion.
    """
    order = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
    nan = scores.isnan()
    for criterion in (scores.masked_fill(nan, -torch.inf), ~nan, priority):
        step = criterion.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices
        order = order.gather(-1, step)
    return order
