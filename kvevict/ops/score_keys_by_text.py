"""Text-weighted attention received by each key."""

from __future__ import annotations

import torch
from torch import Tensor

from kvevict.ops._check import Check, check_attention, check_voting_rows
from kvevict.ops._fake import register_fake


def score_keys_by_text(
    query: Tensor,
    key: Tensor,
    row_index: Tensor,
    *,
    softmax_lse: Tensor | None = None,
    key_mask: Tensor | None = None,
    sm_scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores keys by text rows that are themselves weighted by the attention they receive.

    With ``Abar`` the mean over all query heads of the causal attention rows in ``row_index``::

        row_weights[r] = mean of Abar[i, key of r] over the text rows i that see r
        scores[key]      = sum_r row_weights[r] * Abar[r, key]
        column_sums[key] = sum_r Abar[r, key]

    This is TGV-KV's text-weighted ranking (arXiv 2606.03075); its layer budgets are shares of the
    column sums over vision keys.

    Args:
        query: [batch_size, num_qo_heads, qo_len, head_dim] float32, float16 or bfloat16, any
            strides with a contiguous last dimension; head_dim a multiple of 8 up to 256.
        key: [batch_size, num_kv_heads, kv_len, head_dim], dtype of query.
        row_index: [batch_size, num_rows] int32, the text rows of the query; -1 for none.
        softmax_lse: [batch_size, num_qo_heads, qo_len] float32, as from :func:`attention_lse`;
            computed if None.
        key_mask: [batch_size, kv_len] bool, True for a real token; None for all.
        sm_scale: factor of the logits; ``1 / sqrt(head_dim)`` if None.

    Returns:
        scores [batch_size, 1, kv_len], column_sums [batch_size, 1, kv_len] and row_weights
        [batch_size, num_rows] (0 for an entry of -1 or padding), all float32.

    Raises:
        ValueError: naming the argument, what it must be and what it is. Values of ``row_index``
            are checked on the CPU, and on CUDA if ``KVEVICT_DEBUG=1``.

    O(num_qo_heads * num_rows * kv_len * head_dim) time; extra memory at most 4 * num_rows * kv_len
    floats per sequence, however many heads.
    """
    results: tuple[Tensor, Tensor, Tensor] = torch.ops.kvevict.score_keys_by_text(
        query, key, row_index, softmax_lse=softmax_lse, key_mask=key_mask, sm_scale=sm_scale
    )
    return results


@register_fake("score_keys_by_text")
def _(
    query: Tensor,
    key: Tensor,
    row_index: Tensor,
    *,
    softmax_lse: Tensor | None = None,
    key_mask: Tensor | None = None,
    sm_scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    check = Check("score_keys_by_text")
    check_attention(check, query, key, key_mask, sm_scale, causal=True)
    check_voting_rows(check, query, row_index, None, softmax_lse)
    scores = query.new_empty((query.shape[0], 1, key.shape[2]), dtype=torch.float32)
    row_weights = query.new_empty(row_index.shape, dtype=torch.float32)
    return scores, torch.empty_like(scores), row_weights
