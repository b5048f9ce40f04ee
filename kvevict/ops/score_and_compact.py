"""Scoring, selection and compaction of one layer in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from kvevict.ops._check import (
    ANY,
    INDEX_END,
    Check,
    check_attention,
    check_head_reduction,
    check_priority,
    check_voting_rows,
    num_score_heads,
)
from kvevict.ops._fake import register_fake
from kvevict.ops.enums import HeadReduction


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
    """Compacts ``key`` and ``value`` in place to the best ``budget`` keys of each head.

    Equal, bit for bit, to :func:`score_keys` (statistic SUM) or :func:`score_keys_by_text`, then
    :func:`select_topk`, then :func:`compact_kv_`. A refused call leaves every byte as it was.

    Args:
        query: [batch_size, num_qo_heads, qo_len, head_dim], as in :func:`score_keys`.
        key: [batch_size, num_kv_heads, kv_len, head_dim]; written.
        value: [batch_size, num_kv_heads, kv_len, head_dim of the values], any dtype of 1, 2, 4 or 8
            bytes; written. Must not share elements with key.
        budget: how many keys to keep; may exceed kv_len.
        row_index, row_weight, softmax_lse, key_mask, sm_scale, causal: as in :func:`score_keys`.
        text_weighted: score by :func:`score_keys_by_text`: row_index is required, row_weight and
            ``causal=False`` are refused, head_reduction is not used and one list serves all heads.
        priority: [batch_size, kv_len] or [batch_size, num_heads, kv_len] uint8, as in
            :func:`select_topk`; masked keys get 0.
        head_reduction: a :class:`HeadReduction`; ``NONE`` needs a group size of 1.
        pool_kernel: odd. Before selection the scores of ordinary keys (priority 1) are replaced by
            the average over that many neighbors; other keys count as zero neighbors and keep their
            own score (SnapKV's pool over the keys before its window, arXiv 2404.14469).

    Returns:
        kept_indices [batch_size, num_heads, budget] int32, kept_lens [batch_size, num_heads] int32
        and the scores before pooling [batch_size, num_heads, kv_len] float32; num_heads is
        num_kv_heads, or 1 where all heads share one list.

    Raises:
        ValueError: naming the argument, what it must be and what it is. Values of ``row_index``
            and ``row_weight`` are checked on the CPU, and on CUDA if ``KVEVICT_DEBUG=1``.
        RuntimeError: if autograd forbids to write key or value: it requires grad outside of
            ``torch.no_grad()``, or is an inference tensor outside of inference mode.

    Time and memory of the ops it is made of.
    """
    results: tuple[Tensor, Tensor, Tensor] = torch.ops.kvevict.score_and_compact(
        query,
        key,
        value,
        budget,
        row_index=row_index,
        row_weight=row_weight,
        text_weighted=text_weighted,
        softmax_lse=softmax_lse,
        priority=priority,
        key_mask=key_mask,
        sm_scale=sm_scale,
        causal=causal,
        head_reduction=head_reduction,
        pool_kernel=pool_kernel,
    )
    return results


@register_fake("score_and_compact")
def _(
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
    head_reduction: int = 1,
    pool_kernel: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    check = Check("score_and_compact")
    check_attention(check, query, key, key_mask, sm_scale, causal)
    batch_size, num_kv_heads, kv_len = key.shape[:3]
    check.device(value, "value", query, "query")
    check.shape(value, "value", batch_size, num_kv_heads, kv_len, ANY)
    check.movable(value, "value")
    check.indexable(key, "key", 2, "kv_len")
    check.in_range(budget, "budget", 0, INDEX_END)
    check_head_reduction(check, head_reduction)
    if text_weighted:
        if row_index is None:
            check.fail("row_index", "be given when text_weighted", None)
        if row_weight is not None:
            check.fail("row_weight", "be None when text_weighted", "a tensor")
        if not causal:
            check.fail("causal", "be True when text_weighted", False)
    elif head_reduction == HeadReduction.NONE:
        words = f"reduce to key's {num_kv_heads} heads"
        check.require(query.shape[1] == num_kv_heads, "head_reduction", words, "0 (NONE)")
    is_odd = (pool_kernel >= 1) & (pool_kernel % 2 == 1)
    check.require(is_odd, "pool_kernel", "be odd and at least 1", pool_kernel)
    num_heads = 1 if text_weighted else num_score_heads(query, key, head_reduction)
    if priority is not None:
        check_priority(check, priority, (batch_size, num_heads, kv_len), query, "query")
    check_voting_rows(check, query, row_index, row_weight, softmax_lse)
    kept_indices = query.new_empty((batch_size, num_heads, budget), dtype=torch.int32)
    kept_lens = query.new_empty((batch_size, num_heads), dtype=torch.int32)
    scores = query.new_empty((batch_size, num_heads, kv_len), dtype=torch.float32)
    return kept_indices, kept_lens, scores
