"""Attention received by each key, added to what it has received so far."""

from __future__ import annotations

import torch
from torch import Tensor

from kvevict.ops._check import (
    ANY,
    Check,
    check_attention,
    check_head_reduction,
    check_voting_rows,
    num_score_heads,
)
from kvevict.ops._fake import register_fake
from kvevict.ops.enums import HeadReduction


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
    """Adds the attention of the query rows to the running scores of the keys, in place.

    Equal, bit for bit, to ``scores[..., :kv_len].mul_(decay).add_(score_keys(query, key, ...))``
    with the statistic SUM: the product is rounded before the sum, there is no fused multiply-add.
    One call per decoding step and layer keeps H2O's accumulated attention (arXiv 2306.14048,
    section 4), the scores of HAE's recycle bin (arXiv 2602.02197, DDES) and, with ``decay=0.98``,
    ZSMerge's scores. A refused call leaves every byte as it was.

    Args:
        scores: [batch_size, num_heads, capacity] float32, any strides with a contiguous last
            dimension; num_heads as :func:`score_keys` returns it: num_qo_heads for ``NONE``,
            num_kv_heads for ``GROUP_MEAN`` and ``GROUP_MAX``, 1 for ``ALL_MEAN``. capacity is at
            least kv_len; what is behind kv_len is not touched. Must not share elements with any
            other argument.
        query: [batch_size, num_qo_heads, qo_len, head_dim], as in :func:`score_keys`; qo_len is 1
            in a usual decoding step. All rows vote.
        key: [batch_size, num_kv_heads, kv_len, head_dim], dtype of query.
        decay: factor of the old scores, any finite number; it is no reset, as 0 * NaN is NaN.
        row_weight: [batch_size, qo_len] or [batch_size, num_qo_heads, qo_len] float32, finite and
            at least 0; 1 if None.
        key_mask: [batch_size, kv_len] bool by slot of the sequence, True for a real token; None
            for all. The old score of a masked key decays like any other. There is no mask per
            head: caches whose heads have different lengths need one call per head.
        sm_scale: factor of the logits; ``1 / sqrt(head_dim)`` if None.
        causal: row ``i`` stands at key position ``kv_len - qo_len + i`` and sees keys up to it. A
            cache with free slots behind the newest token takes False and a key_mask.
        head_reduction: a :class:`HeadReduction`.

    Raises:
        ValueError: naming the argument, what it must be and what it is. Values of ``row_weight``
            are checked on the CPU only.

    Time and memory of :func:`score_keys`, and O(num_heads * kv_len) of both.
    """
    torch.ops.kvevict.accumulate_scores_(
        scores,
        query,
        key,
        decay=decay,
        row_weight=row_weight,
        key_mask=key_mask,
        sm_scale=sm_scale,
        causal=causal,
        head_reduction=head_reduction,
    )


@register_fake("accumulate_scores_")
def _(
    scores: Tensor,
    query: Tensor,
    key: Tensor,
    *,
    decay: float = 1.0,
    row_weight: Tensor | None = None,
    key_mask: Tensor | None = None,
    sm_scale: float | None = None,
    causal: bool = True,
    head_reduction: int = 1,
) -> None:
    check = Check("accumulate_scores_")
    check_attention(check, query, key, key_mask, sm_scale, causal)
    check_voting_rows(check, query, None, row_weight, None)
    check_head_reduction(check, head_reduction)
    check.finite(decay, "decay")
    kv_len = key.shape[2]
    shape = (query.shape[0], num_score_heads(query, key, head_reduction), ANY)
    check.companion(scores, "scores", torch.float32, shape, query, "query")
    check.contiguous_last_dim(scores, "scores")
    if scores.shape[2] < kv_len:
        check.fail("scores", f"have room for kv_len = {kv_len} keys", scores.shape[2])
