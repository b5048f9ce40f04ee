"""Log-sum-exp of attention rows."""

from __future__ import annotations

import torch
from torch import Tensor

from kvevict.ops._check import Check, check_attention
from kvevict.ops._fake import register_fake


def attention_lse(
    query: Tensor,
    key: Tensor,
    *,
    key_mask: Tensor | None = None,
    sm_scale: float | None = None,
    causal: bool = True,
) -> Tensor:
    """Log-sum-exp of every row of ``softmax(query @ key^T * sm_scale)``.

    Query head ``h`` reads KV head ``h // group_size``. Causal: row ``i`` stands at key position
    ``kv_len - qo_len + i`` and sees the keys up to it; a row whose own key is masked is padding.
    Not causal: rows and keys are two free sets, as LightKV needs them (arXiv 2605.00789) to let
    text keys attend over queries.

    Args:
        query: [batch_size, num_qo_heads, qo_len, head_dim] float32, float16 or bfloat16, any
            strides with a contiguous last dimension; head_dim a multiple of 8 up to 256.
        key: [batch_size, num_kv_heads, kv_len, head_dim], dtype of query.
        key_mask: [batch_size, kv_len] bool, True for a real token; None for all.
        sm_scale: factor of the logits; ``1 / sqrt(head_dim)`` if None.
        causal: whether rows see only keys up to their own position.

    Returns:
        [batch_size, num_qo_heads, qo_len] float32, natural logarithm. A padding row, or one that
        sees no key, has -inf.

    Raises:
        ValueError: naming the argument, what it must be and what it is.

    O(num_qo_heads * qo_len * kv_len * head_dim) time; extra memory is a panel of keys and a block
    of rows per thread.
    """
    lse: Tensor = torch.ops.kvevict.attention_lse(
        query, key, key_mask=key_mask, sm_scale=sm_scale, causal=causal
    )
    return lse


@register_fake("attention_lse")
def _(
    query: Tensor,
    key: Tensor,
    *,
    key_mask: Tensor | None = None,
    sm_scale: float | None = None,
    causal: bool = True,
) -> Tensor:
    check_attention(Check("attention_lse"), query, key, key_mask, sm_scale, causal)
    return query.new_empty(query.shape[:3], dtype=torch.float32)
