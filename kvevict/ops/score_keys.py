"""Attention received by each key."""

from __future__ import annotations

import torch
from torch import Tensor

from kvevict.ops._check import (
    Check,
    check_attention,
    check_head_reduction,
    check_voting_rows,
    num_score_heads,
)
from kvevict.ops._fake import register_fake
from kvevict.ops.enums import HeadReduction, Statistic


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
    """Scores keys by the attention that chosen query rows pay to them.

    A statistic over the voting rows ``r`` of ``row_weight[r] * softmax(q_r K^T * sm_scale)[key]``,
    then a reduction over heads: SnapKV's window score (arXiv 2404.14469, Listing 1, before
    pooling), H2O's accumulated attention (arXiv 2306.14048, section 4), and with ``MAX`` and a
    head mean the second statistic of HAE's dual-attention pruning (arXiv 2602.02197). The
    attention matrix never exists.

    Args:
        query: [batch_size, num_qo_heads, qo_len, head_dim] float32, float16 or bfloat16, any
            strides with a contiguous last dimension; head_dim a multiple of 8 up to 256.
        key: [batch_size, num_kv_heads, kv_len, head_dim], dtype of query.
        row_index: [batch_size, num_rows] int32, the query rows that vote; an entry votes once, -1
            not at all. None for all rows.
        row_weight: [batch_size, num_rows] or [batch_size, num_qo_heads, num_rows] float32, finite
            and at least 0, of each entry of ``row_index``; 1 if None.
        softmax_lse: [batch_size, num_qo_heads, qo_len] float32 as from :func:`attention_lse`, by
            query row (not by entry); computed if None. A row with -inf has no vote.
        key_mask: [batch_size, kv_len] bool, True for a real token; None for all. Masked keys score
            0 and, if causal, their rows do not vote.
        sm_scale: factor of the logits; ``1 / sqrt(head_dim)`` if None.
        causal: row ``i`` stands at key position ``kv_len - qo_len + i`` and sees keys up to it.
        statistic: a :class:`Statistic` of the weighted probabilities. Without voting rows it is 0.
        head_reduction: a :class:`HeadReduction`. For ``MAX``, means over heads are taken before
            the maximum over rows.

    Returns:
        float32 scores [batch_size, num_qo_heads, kv_len] for ``NONE``, [batch_size, num_kv_heads,
        kv_len] for ``GROUP_MEAN`` and ``GROUP_MAX``, [batch_size, 1, kv_len] for ``ALL_MEAN``.

    Raises:
        ValueError: naming the argument, what it must be and what it is. Values of ``row_index``
            and ``row_weight`` are checked on the CPU, and on CUDA if ``KVEVICT_DEBUG=1``.

    O(num_qo_heads * num_rows * kv_len * head_dim) time. Extra memory: num_qo_heads * kv_len floats
    and, per thread, a block of rows (a few MB).
    """
    scores: Tensor = torch.ops.kvevict.score_keys(
        query,
        key,
        row_index=row_index,
        row_weight=row_weight,
        softmax_lse=softmax_lse,
        key_mask=key_mask,
        sm_scale=sm_scale,
        causal=causal,
        statistic=statistic,
        head_reduction=head_reduction,
    )
    return scores


@register_fake("score_keys")
def _(
    query: Tensor,
    key: Tensor,
    *,
    row_index: Tensor | None = None,
    row_weight: Tensor | None = None,
    softmax_lse: Tensor | None = None,
    key_mask: Tensor | None = None,
    sm_scale: float | None = None,
    causal: bool = True,
    statistic: int = 0,
    head_reduction: int = 1,
) -> Tensor:
    check = Check("score_keys")
    check_attention(check, query, key, key_mask, sm_scale, causal)
    check_voting_rows(check, query, row_index, row_weight, softmax_lse)
    check.one_of(statistic, "statistic", ("SUM", "MAX", "SUM_OF_SQUARES"))
    check_head_reduction(check, head_reduction)
    shape = (query.shape[0], num_score_heads(query, key, head_reduction), key.shape[2])
    return query.new_empty(shape, dtype=torch.float32)
