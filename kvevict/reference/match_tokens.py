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
    similarity = similarities(tokens, source_index, target_index, metric)
    candidate = (source_index[..., :, None] >= 0) & (target_index[..., None, :] >= 0)
    if source_group is not None and target_group is not None:
        group = F.pad(target_group, (0, 1))
        candidate = candidate & (source_group[..., :, None] == group[..., None, :])
    candidate = candidate.expand(similarity.shape)

    # NaN counts as -inf; the first of the largest wins.
    rank = similarity.nan_to_num(-torch.inf, torch.inf, -torch.inf).where(candidate, -torch.inf)
    wins = candidate & (rank == rank.amax(-1, keepdim=True))
    place = wins.int().argmax(-1, keepdim=True)
    exists = candidate.any(-1)
    positions = target_index.expand(*similarity.shape[:2], -1).gather(-1, place[..., 0].long())
    match_index = positions.where(exists, -1)
    return match_index.int(), similarity.gather(-1, place)[..., 0].where(exists, -torch.inf)


def similarities(tokens: Tensor, source_index: Tensor, target_index: Tensor, metric: int) -> Tensor:
    """Return every similarity [batch_size, num_heads, num_sources, num_targets]."""
    sources = take(tokens.double(), 2, source_index.long()[..., None])
    targets = take(tokens.double(), 2, target_index.long()[..., None])
    products = sources @ targets.transpose(-1, -2)
    if metric == Metric.DOT:
        return products
    norms: Tensor = sources.norm(dim=-1)[..., :, None] * targets.norm(dim=-1)[..., None, :]
    return products / (norms + 1e-8)
