"""Importance and diversity in one score."""

from __future__ import annotations

import torch
from torch import Tensor

from kvevict.ops._check import ANY, Check, check_priority
from kvevict.ops._fake import register_fake
from kvevict.ops.enums import DiversityReference


def mix_scores(
    scores: Tensor,
    similarity: Tensor,
    value_norm: Tensor,
    redundancy: Tensor,
    *,
    priority: Tensor | None = None,
    diversity_reference: int = DiversityReference.ATTENTION,
) -> Tensor:
    """Mixes attention, value norms and key diversity as MixKV does (arXiv 2510.20707, section 3).

    Per sequence and head, over its candidates, with ``unit(x) = (x - min(x)) / (max(x) - min(x) +
    1e-8)`` and ``scale(x, m) = unit(x) * m / (mean(unit(x)) + 1e-8)``::

        importance = scores + scale(value_norm, mean(scores))
        diversity = scale(-similarity, mean(scores))
        mixed = redundancy * diversity + (1 - redundancy) * importance

    Args:
        scores: [batch_size, num_heads, kv_len] float32, attention received, pooled or not.
        similarity: shape and dtype of scores, as from :func:`key_diversity`.
        value_norm: shape and dtype of scores, L2 norms of the values.
        redundancy: [batch_size, num_heads] float32, as from :func:`key_diversity`; meant to lie in
            [0, 1], used as it is.
        priority: [batch_size, kv_len] or [batch_size, num_heads, kv_len] uint8: keys of priority 1
            are candidates, all others keep their score and have no part in any minimum, maximum or
            mean. None: all are candidates.
        diversity_reference: a :class:`DiversityReference`: scale the diversity to the mean of the
            scores, as the released code does, or to the mean of the importance.

    Returns:
        [batch_size, num_heads, kv_len] float32. A NaN among a row's candidates, or an infinite
        similarity or value norm, makes all of its candidates NaN.

    Raises:
        ValueError: naming the argument, what it must be and what it is.

    O(kv_len) time per row and no extra memory on the CPU, 32 bytes per 2048 keys on CUDA.
    """
    mixed: Tensor = torch.ops.kvevict.mix_scores(
        scores,
        similarity,
        value_norm,
        redundancy,
        priority=priority,
        diversity_reference=diversity_reference,
    )
    return mixed


@register_fake("mix_scores")
def _(
    scores: Tensor,
    similarity: Tensor,
    value_norm: Tensor,
    redundancy: Tensor,
    *,
    priority: Tensor | None = None,
    diversity_reference: int = 0,
) -> Tensor:
    check = Check("mix_scores")
    check.dtype(scores, "scores", torch.float32)
    check.shape(scores, "scores", ANY, ANY, ANY)
    batch_size, num_heads, kv_len = scores.shape
    shape = (batch_size, num_heads, kv_len)
    check.companion(similarity, "similarity", torch.float32, shape, scores, "scores")
    check.companion(value_norm, "value_norm", torch.float32, shape, scores, "scores")
    check.companion(redundancy, "redundancy", torch.float32, shape[:2], scores, "scores")
    if priority is not None:
        check_priority(check, priority, shape, scores, "scores")
    check.one_of(diversity_reference, "diversity_reference", ("ATTENTION", "IMPORTANCE"))
    return scores.new_empty(shape)
