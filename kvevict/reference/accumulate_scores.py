"""Oracle of `kvevict.accumulate_scores_`."""

from __future__ import annotations

from torch import Tensor

from kvevict.ops.enums import HeadReduction
from kvevict.reference.score_keys import score_keys


def accumulate_scores_(
    scores: Tensor,
    query: Tensor,
    key: Tensor,
    *,
    decay: float = 1.0,
    row_weight: Tensor | None = None,
    key_mask: Tensor | None = None,
    sm_scale: float | None = None,
    causal: bool = True,
    head_reduction: int = HeadReduction.GROUP_MEAN,
) -> None:
    """Decay the scores of all keys and add the attention that they receive now, in place.

    Computed in float64 and rounded once, to the dtype of the scores.
    """
    received = score_keys(
        query,
        key,
        row_weight=row_weight,
        key_mask=key_mask,
        sm_scale=sm_scale,
        causal=causal,
        head_reduction=head_reduction,
    )
    current = scores[..., : key.shape[2]]
    current.copy_(current.double() * decay + received)
