"""Oracle of `kvevict.score_keys`."""

from __future__ import annotations

import torch
from torch import Tensor

from kvevict.ops.enums import HeadReduction, Statistic
from kvevict.reference._attention import choose_rows, compute_attention


def score_keys(
    query: Tensor,
    key: Tensor,
    *,
    row_index: Tensor | None = None,
    row_weight: Tensor | None = None,
    softmax_lse: Tensor | None = None,
    key_mask: Tensor | None = None,
    sm_scale: float | None = None,
    causal: bool = True,
    statistic: int = Statistic.SUM,
    head_reduction: int = HeadReduction.GROUP_MEAN,
) -> Tensor:
    """Return the attention that each key receives [batch_size, num_heads, kv_len].

    num_heads is num_qo_heads, num_kv_heads or 1, as `head_reduction` says.
    """
    rows = choose_rows(query, key, row_index, key_mask, causal)
    votes = compute_attention(query, key, rows, softmax_lse, sm_scale)
    if row_weight is not None:
        per_head = row_weight if row_weight.dim() == 3 else row_weight[:, None]
        votes = votes * per_head[..., None].double()

    num_kv_heads = key.shape[1]
    means_heads = head_reduction in (HeadReduction.GROUP_MEAN, HeadReduction.ALL_MEAN)
    if statistic == Statistic.MAX and means_heads:
        return _reduce_rows(_reduce_heads(votes, num_kv_heads, head_reduction), statistic)
    return _reduce_heads(_reduce_rows(votes, statistic), num_kv_heads, head_reduction)


def _reduce_rows(votes: Tensor, statistic: int) -> Tensor:
    """Reduce dimension 2, the rows. Votes are not negative, so no row and a row of 0 are one."""
    if statistic == Statistic.MAX:
        no_vote = votes.new_zeros(*votes.shape[:2], 1, votes.shape[3])
        return torch.cat([no_vote, votes], dim=2).amax(2)
    if statistic == Statistic.SUM_OF_SQUARES:
        return votes.square().sum(2)
    return votes.sum(2)


def _reduce_heads(values: Tensor, num_kv_heads: int, head_reduction: int) -> Tensor:
    """Reduce dimension 1, the query heads."""
    if head_reduction == HeadReduction.NONE:
        return values
    if head_reduction == HeadReduction.ALL_MEAN:
        return values.mean(1, keepdim=True)
    batch_size, num_qo_heads, *rest = values.shape
    groups = values.view(batch_size, num_kv_heads, num_qo_heads // num_kv_heads, *rest)
    return groups.amax(2) if head_reduction == HeadReduction.GROUP_MAX else groups.mean(2)
