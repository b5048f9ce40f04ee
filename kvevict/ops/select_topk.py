"""Selection of the keys to keep."""

from __future__ import annotations

import torch
from torch import Tensor

from kvevict.ops._check import ANY, INDEX_END, Check, check_priority
from kvevict.ops._fake import register_fake


def select_topk(
    scores: Tensor,
    k: int,
    *,
    row_k: Tensor | None = None,
    priority: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Lists the best keys of every row in ascending order.

    The order is total: descending priority, then descending score, then ascending index; -0 equals
    +0, NaN is below -inf. The result is the same on every backend, bit for bit.

    Args:
        scores: [batch_size, num_heads, kv_len] float32.
        k: capacity of a list; may exceed kv_len. Both are below 2**31, as indices are int32.
        row_k: [batch_size, num_heads] int32 in [0, k], how many to keep of each row; k if None.
        priority: [batch_size, kv_len] or [batch_size, num_heads, kv_len] uint8: 0 never keeps a key
            (padding), 1 is ordinary, higher classes win over any score (sinks, recent window, text
            first). 1 if None. :func:`kvevict.build_priority` builds it.

    Returns:
        kept_indices [batch_size, num_heads, k] int32, strictly ascending, then -1; and kept_lens
        [batch_size, num_heads] int32, ``min(row_k, number of keys with priority > 0)``.

    Raises:
        ValueError: naming the argument, what it must be and what it is. Values of ``row_k`` are
            checked on the CPU, and on CUDA if ``KVEVICT_DEBUG=1``.

    O(kv_len + k) time per row: a radix select and one ordered sweep. Extra memory: two copies of a
    row per thread.
    """
    results: tuple[Tensor, Tensor] = torch.ops.kvevict.select_topk(
        scores, k, row_k=row_k, priority=priority
    )
    return results


@register_fake("select_topk")
def _(
    scores: Tensor, k: int, *, row_k: Tensor | None = None, priority: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    check = Check("select_topk")
    check.dtype(scores, "scores", torch.float32)
    check.shape(scores, "scores", ANY, ANY, ANY)
    check.indexable(scores, "scores", 2, "kv_len")
    check.in_range(k, "k", 0, INDEX_END)
    batch_size, num_heads, kv_len = scores.shape
    if row_k is not None:
        check.companion(row_k, "row_k", torch.int32, (batch_size, num_heads), scores, "scores")
    if priority is not None:
        check_priority(check, priority, (batch_size, num_heads, kv_len), scores, "scores")
    kept_indices = scores.new_empty((batch_size, num_heads, k), dtype=torch.int32)
    return kept_indices, scores.new_empty((batch_size, num_heads), dtype=torch.int32)
