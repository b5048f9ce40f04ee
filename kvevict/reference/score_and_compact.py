"""Oracle of `kvevict.score_and_compact`."""

from __future__ import annotations

import torch
from torch import Tensor

from kvevict.ops.enums import HeadReduction
from kvevict.reference.compact_kv import compact_kv_
from kvevict.reference.score_keys import score_keys
from kvevict.reference.score_keys_by_text import score_keys_by_text
from kvevict.reference.select_topk import expand_priority, select_topk


def score_and_compact(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    budget: int,
    *,
    row_index: Tensor | None = None,
    row_weight: Tensor | None = None,
    text_weighted: bool = False,
    softmax_lse: Tensor | None = None,
    priority: Tensor | None = None,
    key_mask: Tensor | None = None,
    sm_scale: float | None = None,
    causal: bool = True,
    head_reduction: int = HeadReduction.GROUP_MEAN,
    pool_kernel: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score, pool, select and compact in place.

    Returns:
        kept_indices [batch_size, num_heads, budget], kept_lens [batch_size, num_heads] and the
        scores before pooling [batch_size, num_heads, kv_len]; num_heads is num_kv_heads, or 1 for
        a list that all heads share.
    """
    if text_weighted:
        assert row_index is not None
        scores, _, _ = score_keys_by_text(
            query, key, row_index, softmax_lse=softmax_lse, key_mask=key_mask, sm_scale=sm_scale
        )
    else:
        scores = score_keys(
            query,
            key,
            row_index=row_index,
            row_weight=row_weight,
            softmax_lse=softmax_lse,
            key_mask=key_mask,
            sm_scale=sm_scale,
            causal=causal,
            head_reduction=head_reduction,
        )
    classes = mask_priority(scores, priority, key_mask)
    pooled = pool_scores(scores, classes, pool_kernel)
    kept_indices, kept_lens = select_topk(pooled, budget, priority=classes)
    compact_kv_([key], [value], kept_indices, kept_lens)
    return kept_indices, kept_lens, scores


def mask_priority(scores: Tensor, priority: Tensor | None, key_mask: Tensor | None) -> Tensor:
    """Return the priority of every score [batch_size, num_heads, kv_len], 0 for a masked key."""
    classes = expand_priority(scores, priority)
    return classes if key_mask is None else classes.masked_fill(~key_mask[:, None], 0)


def pool_scores(scores: Tensor, priority: Tensor, pool_kernel: int) -> Tensor:
    """Average the scores of ordinary keys (priority 1) over `pool_kernel` neighbors.

    Other keys count as zero neighbors and keep their own score. The sum runs from left to right in
    the dtype of the scores.
    """
    if pool_kernel == 1:
        return scores
    kv_len = scores.shape[-1]
    ordinary = priority == 1
    half = pool_kernel // 2
    padded = torch.nn.functional.pad(scores.where(ordinary, 0.0), (half, half))
    total = torch.zeros_like(scores)
    for offset in range(pool_kernel):
        total = total + padded[..., offset : offset + kv_len]
    return (total / pool_kernel).where(ordinary, scores)
