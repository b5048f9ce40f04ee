"""Oracle of `kvevict.match_tokens`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kvevict.ops.enums import Metric
from kvevict.reference._attention import take


def match_tokens(
    tokens: Tensor,
    source_index: Tensor,
    target_index: Tensor,
    *,
    source_group: Tensor | None = None,
    target_group: Tensor | None = None,
    metric: int = Metric.COSINE,
) -> tuple[Tensor, Tensor]:
    """Return match_index int32 and similarity, both [batch_size, num_heads, num_sources]."""
    # One more target that is none: reductions over nothing are no special case.
    target_index = F.pad(target_index, (0, 1), value=-1)
    similarity, rank = similarities(tokens, source_index, target_index, metric)
    candidate = (source_index[..., :, None] >= 0) & (target_index[..., None, :] >= 0)
    if source_group is not None and target_group is not None:
        group = F.pad(target_group, (0, 1))
        candidate = candidate & (source_group[..., :, None] == group[..., None, :])
    candidate = candidate.expand(similarity.shape)

    # The first of the largest wins. NaN and -inf are no rank; without any, the first target it is.
    rank = rank.nan_to_num(-torch.inf, torch.inf, -torch.inf).where(candidate, -torch.inf)
    best = rank.amax(-1, keepdim=True)
    place = (candidate & (rank == best)).int().argmax(-1, keepdim=True)
    similarity = similarity.gather(-1, place).where(best > -torch.inf, torch.nan)[..., 0]
    exists = candidate.any(-1)
    positions = target_index.expand(*similarity.shape[:2], -1).gather(-1, place[..., 0].long())
    match_index = positions.where(exists, -1)
    return match_index.int(), similarity.where(exists, -torch.inf)


def similarities(
    tokens: Tensor, source_index: Tensor, target_index: Tensor, metric: int
) -> tuple[Tensor, Tensor]:
    """Return similarities and what ranks them [batch_size, num_heads, num_sources, num_targets].

    The rank of a cosine is that without the 1e-8, times the norm of the source.
    """
    sources = take(tokens.double(), 2, source_index.long()[..., None])
    targets = take(tokens.double(), 2, target_index.long()[..., None])
    products = sources @ targets.transpose(-1, -2)
    if metric == Metric.DOT:
        return products, products
    source_norm: Tensor = sources.norm(dim=-1)[..., :, None]
    target_norm: Tensor = targets.norm(dim=-1)[..., None, :]
    rank = torch.where(target_norm == 0, products, products / target_norm)
    rank = rank.masked_fill(source_norm.isinf(), torch.nan)
    return products / (source_norm * target_norm + 1e-8), rank
