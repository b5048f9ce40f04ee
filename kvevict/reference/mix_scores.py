"""Oracle of `kvevict.mix_scores`."""

from __future__ import annotations

from torch import Tensor

from kvevict.ops.enums import DiversityReference
from kvevict.reference.select_topk import expand_priority

TINY = 1e-8


def mix_scores(
    scores: Tensor,
    similarity: Tensor,
    value_norm: Tensor,
    redundancy: Tensor,
    *,
    priority: Tensor | None = None,
    diversity_reference: int = DiversityReference.ATTENTION,
) -> Tensor:
    """Return the mixed scores [batch_size, num_heads, kv_len]; only ordinary keys are mixed."""
    candidate = expand_priority(scores, priority) == 1
    mixed = scores.double()
    for b in range(scores.shape[0]):
        for h in range(scores.shape[1]):
            row = candidate[b, h]
            if row.any():
                mixed[b, h, row] = mix_row(
                    mixed[b, h, row],
                    similarity[b, h, row].double(),
                    value_norm[b, h, row].double(),
                    redundancy[b, h].double(),
                    diversity_reference,
                )
    return mixed


def mix_row(
    scores: Tensor,
    similarity: Tensor,
    value_norm: Tensor,
    redundancy: Tensor,
    diversity_reference: int,
) -> Tensor:
    """Mix the candidates [num_candidates] of one head."""
    value = scale_to(scores.mean(), value_norm)
    importance = scores + value
    to_attention = diversity_reference == DiversityReference.ATTENTION
    diversity = scale_to((scores if to_attention else importance).mean(), -similarity)
    return redundancy * diversity + (1 - redundancy) * importance


def scale_to(mean: Tensor, values: Tensor) -> Tensor:
    """Bring values to [0, 1], then to a mean."""
    unit = (values - values.min()) / (values.max() - values.min() + TINY)
    return unit * mean / (unit.mean() + TINY)
